"""model_utils.py: the wrapped model. The tests need only a CPU and no network."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo.config as dynamo_config
import torch._functorch.config as functorch_config
import torch.distributed as dist
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import model_utils
from config import config_as_dict
from memory import SavedTensors
from model import ModelConfig, Transformer
from model_utils import (
    MixedPrecision,
    autocast,
    cast_weights,
    checkpoint_activations,
    flops_per_token,
    place_model,
    wrap_model,
)
from optimizers import build_optimizers, with_recipe
from processes import Process
from train import ORIGINAL

ROOT = Path(__file__).resolve().parents[1]
TINY = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=512, multiple_of=32, max_seq_len=32)
TIED = ModelConfig(**(config_as_dict(TINY) | {"tie_embeddings": True}))


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Unset the variables of Weights & Biases and torchrun, which the developer's shell may hold."""
    for name in ("WANDB_API_KEY", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def set_ranks(monkeypatch, local_rank: int, world_size: int) -> None:
    for name, value in (("RANK", local_rank), ("LOCAL_RANK", local_rank), ("WORLD_SIZE", world_size)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world_size))


# ---------------------------------------------------------------- the model, as the loop trains it


@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_flops_per_token_by_hand(config):
    block = 32 * 32 + 32 * 16 + 32 * 16 + 32 * 32  # wq, wk, wv, wo: 4 heads and 2 key/value heads of 8
    block += 3 * 32 * 96  # w1, w2, w3: 2/3 x 4 x 32 = 85, rounded up to a multiple of 32
    weights = 2 * block + 32 * 512  # the output layer multiplies, the embedding looks up
    attention = 12 * 2 * 32 * 32  # 12 x layers x width x sequence
    assert flops_per_token(Transformer(config)) == 6 * weights + attention == 270_336


class Casts(TorchDispatchMode):
    """Counts how often each tensor, by its address, is cast to bfloat16."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.counts[args[0].data_ptr()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_weights_cast_once_for_all_micro_steps_give_the_gradients_of_autocast(config):
    model = Transformer(config)
    tokens, targets = torch.randint(512, (2, 3, 2, 16))
    gradients = []
    for weights_of in (lambda: {}, lambda: cast_weights(model, torch.bfloat16)):
        with Casts() as casts:
            weights = weights_of()
            for x, y in zip(tokens, targets, strict=True):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = functional_call(model, weights, (x, y), tie_weights=False)
                loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad()
    for name, p in model.named_parameters():
        # The output layer's matrix may also be the embedding's. The loss casts it in each micro-step, because it sums
        # its gradient in float32.
        expected = 3 if p is model.output.weight else int(p.dim() == 2 and "tok_embeddings" not in name)
        assert casts.counts[p.data_ptr()] == expected, name
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


def test_gradients_of_cast_weights_do_not_wait_for_the_end_of_the_backward_pass():
    """The gradients of the last block come first, so DDP can send them while the others are computed."""
    model = Transformer(TINY)
    order = []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    weights = cast_weights(model, torch.bfloat16)
    tokens = torch.randint(512, (2, 16))
    with torch.autocast("cpu", torch.bfloat16):
        loss = functional_call(model, weights, (tokens, tokens), tie_weights=False)
    loss.backward()
    assert [name for name in order if "attention.wo" in name or "tok" in name] == [
        "layers.1.attention.wo.weight",
        "layers.0.attention.wo.weight",
        "tok_embeddings.weight",
    ]


def test_a_matrix_that_is_not_trained_is_cast_and_gets_no_gradient():
    model, tokens = Transformer(TINY), torch.randint(512, (2, 16))
    model.layers[0].attention.wq.weight.requires_grad_(False)
    MixedPrecision(model, torch.bfloat16, [])(tokens, tokens).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == ["layers.0.attention.wq.weight"]


def test_float32_needs_no_casts():
    assert cast_weights(Transformer(TINY), torch.float32) == {}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_forward_pass_after_an_update_sees_the_update(optimizer):
    """Fused AdamW changes a parameter without raising its version counter. The casts must still be made anew."""
    torch.manual_seed(0)
    model, tokens = Transformer(TINY), torch.randint(512, (2, 16))
    cfg = replace(ORIGINAL, optimizer=optimizer, dtype="bfloat16", max_lr=0.01)
    optimizers = build_optimizers(model, with_recipe(cfg))
    mixed, losses = MixedPrecision(model, torch.bfloat16, optimizers), []
    for _ in range(3):
        losses.append(mixed(tokens, tokens))
        with torch.no_grad(), autocast(torch.device("cpu"), torch.bfloat16):
            torch.testing.assert_close(losses[-1].detach(), model(tokens, tokens), rtol=0, atol=0)
        losses[-1].backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
    assert losses[0] > losses[1] > losses[2]


def test_a_wrapped_model_trains_the_parameters_of_the_bare_one():
    model = Transformer(TINY)
    wrapped = wrap_model(
        model, [], replace(ORIGINAL, dtype="float32", compile=False), Process(0, 1, torch.device("cpu"))
    )
    tokens = torch.randint(512, (2, 16))
    wrapped(tokens, tokens).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_forward_pass_without_gradients_spoils_no_later_one():
    model, tokens = Transformer(TINY), torch.randint(512, (2, 16))
    mixed = MixedPrecision(model, torch.bfloat16, [])
    with torch.no_grad():
        mixed(tokens, tokens)
    mixed(tokens, tokens).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# ---------------------------------------------------------------- what DDP sends, and when


@pytest.fixture
def group_of_one():
    """A process group whose only process sends to itself."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("is_compiled", [False, True])
def test_gradients_are_sent_in_float32_while_earlier_blocks_still_go_backward(monkeypatch, is_compiled):
    """The second update has the order of all later ones."""
    small_buckets = partial(DistributedDataParallel, bucket_cap_mb=0.05)
    monkeypatch.setattr(model_utils, "DistributedDataParallel", small_buckets)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    cfg = with_recipe(replace(ORIGINAL, dtype="bfloat16", compile=is_compiled, model=replace(TINY, n_layers=4)))
    process = Process(0, 2, torch.device("cpu"))
    monkeypatch.setattr(process.progress, "doing", lambda *args: None)
    model, events = Transformer(cfg.model), []
    names = {p: name for name, p in model.named_parameters()}

    def send(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        events.append(("sent", bucket.buffer().dtype, [names[p] for p in bucket.parameters()]))
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    with dynamo_config.patch(optimize_ddp=True), functorch_config.patch(activation_memory_budget=1.0):  # restores them
        wrapped = wrap_model(model, build_optimizers(model, cfg), cfg, process)
        wrapped.register_comm_hook(None, send)
        for p, name in names.items():
            p.register_post_accumulate_grad_hook(lambda _, name=name: events.append(("there", None, [name])))
        for _ in range(2):
            events.clear()
            tokens = torch.randint(512, (2, 16))
            wrapped(tokens, tokens).backward()
    sent = [(dtype, parameters) for what, dtype, parameters in events if what == "sent"]
    assert {dtype for dtype, _ in sent} == {torch.float32}
    assert sorted(name for _, parameters in sent for name in parameters) == sorted(names.values())
    assert len(sent) > 4 and "output.weight" in sent[0][1] and "tok_embeddings.weight" in sent[-1][1]
    for block in range(4):  # two blocks later, all is sent before the first gradient of this block is there
        there = events.index(("there", None, [f"layers.{block}.attention.wq.weight"]))
        before = {name for what, _, parameters in events[:there] if what == "sent" for name in parameters}
        for later in range(block + 2, 4):
            assert {name for name in names.values() if f"layers.{later}." in name} <= before, (block, later)


# ---------------------------------------------------------------- activations that are computed again


DEEP = replace(TINY, n_layers=3)


def two_updates(which: str, dtype: str, compiles: bool, mask: bool = False) -> tuple[list, dict, int, Counter]:
    """The losses and weights of two updates of two micro-steps each; the bytes that autograd keeps for the first
    backward pass; and how often each matrix of the first block is cast to bfloat16."""
    torch.manual_seed(0)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = place_model(Transformer(DEEP), torch.device("cpu"))
    cfg = replace(ORIGINAL, dtype=dtype, compile=compiles, activation_checkpointing=which, optimizer="adamw")
    optimizers = build_optimizers(model, with_recipe(cfg))
    wrapped = wrap_model(model, optimizers, cfg, Process(0, 1, torch.device("cpu")))
    tokens, targets = torch.randint(1, 512, (2, 2, 2, 32))
    positions = torch.arange(32).remainder(20).expand(2, -1) if mask else None
    saved, losses, casts = SavedTensors(wrapped), [], Casts()
    with nullcontext() if compiles else casts:  # nothing is compiled while Casts looks on
        for _ in range(2):
            for x, y in zip(tokens, targets, strict=True):
                first = not losses
                with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack) if first else nullcontext():
                    losses.append(wrapped(x, y, positions=positions))
                losses[-1].backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                losses.append(model(tokens[0], targets[0]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (2 if compiles else 0)  # a block, and the loss
    counts = Counter({n: casts.counts[p.data_ptr()] for n, p in model.layers[0].named_parameters() if p.dim() == 2})
    return [loss.item() for loss in losses], model.state_dict(), sum(saved.sizes.values()), counts


@pytest.mark.parametrize(
    ("dtype", "compiles", "mask"),
    [
        ("float32", False, False),
        ("bfloat16", False, False),
        ("float32", False, True),
        pytest.param("float32", True, False, marks=pytest.mark.slow),
        pytest.param("bfloat16", True, False, marks=pytest.mark.slow),
    ],
)
def test_activations_computed_again_change_no_bit_and_take_less_memory(dtype, compiles, mask):
    results = {which: two_updates(which, dtype, compiles, mask) for which in ("none", "blocks", "all")}
    losses, weights, _, counts = results["none"]
    for which in ("blocks", "all"):
        assert results[which][0] == losses, which
        for name, weight in weights.items():
            assert torch.equal(results[which][1][name], weight), (which, name)
        # The second pass has the casts of the first. The float32 weights would be cast again.
        assert results[which][3] == counts, which
    assert results["all"][2] < results["blocks"][2] < results["none"][2]
    assert compiles or set(counts.values()) == ({2} if dtype == "bfloat16" else {0})  # once an update


def test_names_and_evaluations_do_not_notice_that_activations_are_computed_again(monkeypatch):
    model = Transformer(TINY)
    names, tokens = list(model.state_dict()), torch.randint(512, (2, 16))
    logits = model(tokens)
    checkpoint_activations(model, "all")
    assert list(model.state_dict()) == names == list(dict(model.named_parameters()))
    monkeypatch.setattr(model_utils, "checkpoint", lambda *_, **__: pytest.fail("nothing goes backward here"))
    with torch.no_grad():
        assert torch.equal(model(tokens), logits)
