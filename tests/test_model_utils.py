"""model_utils.py and optimizers.py: devices, the schedule, checkpoints that survive, records. CPU, no network."""

import builtins
import ctypes
import json
import math
import os
import pickle
import platform
import random
import struct
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoints import (
    checkpoints_in,
    find_checkpoint,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from config import config_as_dict
from config import local_device as pick_device
from hardware import can_compile, fastest_dtype, keep_freed_memory, peak_flops
from model import ModelConfig, Transformer
from model_utils import (
    MetricsLog,
    NullRun,
    Process,
    cast_weights,
    flops_per_token,
    load_model,
    start_process,
    start_wandb,
    sum_over_processes,
)
from optimizers import Muon, build_optimizers, lr_factor, orthogonalise
from train import ORIGINAL

ROOT = Path(__file__).resolve().parents[1]
TINY = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=512, multiple_of=32, max_seq_len=32)
TIED = ModelConfig(**(config_as_dict(TINY) | {"tie_embeddings": True}))


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One process without Weights & Biases, whatever the shell of the developer has set."""
    for name in ("WANDB_API_KEY", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


# ---------------------------------------------------------------- devices


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that the machine has `count` GPUs, and an Apple one or not."""

    def pretend(count: int, mps: bool = False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


def set_ranks(monkeypatch, local_rank: int, world_size: int) -> None:
    for name, value in (("RANK", local_rank), ("LOCAL_RANK", local_rank), ("WORLD_SIZE", world_size)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world_size))


def test_auto_takes_cuda_then_mps_then_the_cpu(gpus):
    gpus(1, mps=True)
    assert pick_device("auto") == torch.device("cuda", 0)
    gpus(0, mps=True)
    assert pick_device("auto") == torch.device("mps")
    gpus(0)
    assert pick_device("auto") == torch.device("cpu")


def test_named_devices_are_taken_as_they_are(gpus):
    gpus(2)
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("cuda") == torch.device("cuda", 0)
    assert pick_device("cuda:1") == torch.device("cuda", 1)


def test_each_rank_takes_the_gpu_of_its_own_number(gpus, monkeypatch):
    gpus(2)
    for rank in (0, 1):
        set_ranks(monkeypatch, rank, 2)
        assert pick_device("cuda") == pick_device("auto") == torch.device("cuda", rank)


def test_several_processes_on_a_mac_share_the_cpu(gpus, monkeypatch):
    gpus(0, mps=True)
    set_ranks(monkeypatch, 0, 2)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"device=mps: .*--device cpu"):
        pick_device("mps")


@pytest.mark.parametrize(
    ("name", "count", "cure"),
    [
        ("cuda", 0, "--device cpu"),
        ("cuda:2", 2, "--device cpu"),
        ("mps", 0, "--device cpu"),
        ("tpu", 0, "name auto, cpu, cuda"),
        ("meta", 0, "name auto, cpu, cuda"),
        ("cuda:x", 1, "name auto, cpu, cuda"),
        ("", 0, "name auto, cpu, cuda"),
    ],
)
def test_device_that_is_not_there_is_refused_with_the_cure(gpus, name, count, cure):
    gpus(count)
    with pytest.raises(ValueError, match=f"device={name}: ") as refusal:
        pick_device(name)
    assert cure in str(refusal.value)


def test_more_processes_than_gpus_are_refused(gpus, monkeypatch):
    gpus(1)
    set_ranks(monkeypatch, 1, 2)
    with pytest.raises(ValueError, match=r"device=cuda: .*fewer processes"):
        pick_device("cuda")


def test_compiler_that_fails_means_training_without(monkeypatch, capsys):
    def broken(function):
        raise FileNotFoundError("g++")

    monkeypatch.setattr(torch, "compile", broken)
    assert can_compile(torch.device("cpu")) is False
    assert "FileNotFoundError" in capsys.readouterr().out


def test_processes_share_the_cores_that_they_may_use(monkeypatch):
    """Not the machine's, of which a container or a batch job has a part."""
    set_ranks(monkeypatch, 1, 2)
    threads = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args: None)
    assert start_process(torch.device("cpu")).world_size == 2
    assert threads == [3]


def test_process_on_a_cpu_keeps_freed_memory(monkeypatch):
    """A stand-in for the C library notes the two switches: M_MMAP_MAX and M_TRIM_THRESHOLD."""
    switches = {}
    library = SimpleNamespace(mallopt=switches.__setitem__)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    start_process(torch.device("cpu"))
    assert switches == {-4: 0, -1: -1}


def test_only_the_main_process_prints(capsys):
    for rank in (0, 1):
        Process(rank, 2, torch.device("cpu")).print("rank", rank)
    assert capsys.readouterr().out == "rank 0\n"


def test_sum_of_one_process_is_what_it_has():
    assert sum_over_processes([1.5, 2.0], torch.device("cpu")) == [1.5, 2.0]


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_flops_per_token_by_hand(config):
    block = 32 * 32 + 32 * 16 + 32 * 16 + 32 * 32  # wq, wk, wv, wo: 4 heads and 2 key/value heads of 8
    block += 3 * 32 * 96  # w1, w2, w3: 2/3 x 4 x 32 = 85, rounded up to a multiple of 32
    weights = 2 * block + 32 * 512  # the output layer multiplies, the embedding looks up
    attention = 12 * 2 * 32 * 32  # 12 x layers x width x sequence
    assert flops_per_token(Transformer(config)) == 6 * weights + attention == 270_336


def test_peak_of_a_known_gpu_is_its_data_sheets(monkeypatch):
    gpu = torch.device("cuda", 0)
    cards = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA GH200 480GB": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA L4": 121e12,
    }
    for name, flops in cards.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(gpu, torch.bfloat16) == flops


def test_peak_of_another_gpu_with_a_similar_name_is_measured(monkeypatch):
    def measured(*args, **kwargs):
        raise InterruptedError

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA RTX A1000 Laptop GPU")  # no A100
    monkeypatch.setattr(torch, "randn", measured)
    with pytest.raises(InterruptedError):
        peak_flops(torch.device("cuda", 0), torch.bfloat16)


def test_peak_of_a_cpu_is_measured():
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e15


@pytest.mark.parametrize("has_bf16", [False, True])
def test_bf16_is_taken_where_the_hardware_multiplies_it(monkeypatch, has_bf16):
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16 or including_emulation)
    expected = torch.bfloat16 if has_bf16 else torch.float32
    assert fastest_dtype(torch.device("cuda", 0)) == expected
    for name in ("avx512_bf16", "amx_bf16", "bf16"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {"avx2": True, name: has_bf16})
        assert fastest_dtype(torch.device("cpu")) == expected


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the switches")
def test_kept_memory_comes_without_page_faults():
    """In a process of its own, which keeps its memory to its end."""
    lines = """
import resource, torch
from hardware import keep_freed_memory
keep_freed_memory()
for _ in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(50_000_000)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    run = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True, check=True)
    faults = list(map(int, run.stdout.split()))
    assert faults[0] > 90  # pages of 4 KB, or huge ones of 2 MB
    assert sum(faults[-5:]) < faults[0]  # the first blocks may not lie where the next one fits


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    keep_freed_memory()


def factor(step: int, **changes) -> float:
    fields = {"schedule": "cosine", "warmup_steps": 10, "max_steps": 110, "min_lr_fraction": 0.1, "decay_fraction": 0.2}
    return lr_factor(step, replace(ORIGINAL, **(fields | changes)))


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, 0.1),  # the first step of warm-up learns already
        (9, 0.9),
        (10, 1.0),
        (35, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2),  # a quarter of the way: cos 45 degrees
        (60, 0.55),  # the middle
        (85, 0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2),
        (110, 0.1),
    ],
)
def test_cosine_schedule_by_hand(step, expected):
    assert factor(step) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("step", "expected"), [(1, 0.1), (10, 1.0), (50, 1.0), (80, 1.0), (90, 0.55), (99, 0.145), (100, 0.1)]
)
def test_wsd_schedule_by_hand(step, expected):
    assert factor(step, schedule="wsd", max_steps=100) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_schedule_without_warm_up_and_of_a_single_step(schedule):
    assert factor(1, schedule=schedule, warmup_steps=0, max_steps=1000) == pytest.approx(1, abs=1e-4)
    assert 0 < factor(1, schedule=schedule, warmup_steps=0, max_steps=1) <= 1
    assert factor(5, schedule=schedule, warmup_steps=10, max_steps=5) == 0.5  # a smoke run that ends in its warm-up


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_learning_rates_are_plain_floats(schedule):
    """They go into the optimizers' state: one of numpy's makes a checkpoint that weights_only refuses to load."""
    assert {type(factor(step, schedule=schedule)) for step in (1, 10, 60, 110)} == {float}


def groups_by_name(model: Transformer, **changes) -> list[tuple[str, set[str], dict]]:
    """(optimizer, names of the parameters, the group) for every group."""
    fields = {"optimizer": "adamw", "max_lr": 1e-3, "muon_lr": 0.02, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        (type(optimizer).__name__, {names[id(p)] for p in group["params"]}, group)
        for optimizer in build_optimizers(model, replace(ORIGINAL, **(fields | changes)))
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_in_exactly_one_group(config, optimizer):
    model = Transformer(config)
    groups = groups_by_name(model, optimizer=optimizer)
    listed = [id(parameter) for _, _, group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(id(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_acts_on_matrices_alone(optimizer):
    model = Transformer(TINY)
    decayed = set()
    for _, names, group in groups_by_name(model, optimizer=optimizer):
        assert group["weight_decay"] in (0, 0.1)
        decayed |= names if group["weight_decay"] else set()
    assert decayed == {name for name, parameter in model.named_parameters() if parameter.dim() == 2}
    assert not [name for name in decayed if "norm" in name]


def test_muon_moves_exactly_the_matrices_of_the_blocks():
    model = Transformer(TINY)
    groups = groups_by_name(model, optimizer="muon")
    muon = set().union(*(names for kind, names, _ in groups if kind == "Muon"))
    matrices = ("attention.wq", "attention.wk", "attention.wv", "attention.wo")
    matrices += ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    assert muon == {f"layers.{i}.{name}.weight" for i in (0, 1) for name in matrices}
    assert {kind for kind, _, _ in groups_by_name(model, optimizer="adamw")} == {"AdamW"}


def test_each_group_knows_the_peak_of_its_own_learning_rate():
    for kind, _, group in groups_by_name(Transformer(TINY), optimizer="muon"):
        assert group["lr"] == group["initial_lr"] == (0.02 if kind == "Muon" else 1e-3)
        if kind == "AdamW":
            assert tuple(group["betas"]) == (0.9, 0.95)


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8), (1, 16, 16)])
def test_orthogonalised_matrices_keep_their_singular_vectors_and_lose_their_sizes(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape) * torch.tensor([1e-3, 1.0, 1e3])[: shape[0], None, None]
    result = orthogonalise(matrices)
    assert result.shape == matrices.shape
    U, _, V = torch.linalg.svd(matrices, full_matrices=False)
    sizes = U.mT @ result @ V.mT  # in the basis of the singular vectors: diagonal, and near 1
    assert (sizes - torch.diag_embed(sizes.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3
    spread = sizes.diagonal(dim1=1, dim2=2)[:, : min(shape[1:]) * 3 // 4]  # the smallest may need more steps
    assert spread.min() > 0.6 and spread.max() < 1.3


@pytest.mark.parametrize("largest_batch", [Muon.LARGEST_BATCH, 900, 1])
def test_muon_takes_the_steps_of_torchs(monkeypatch, largest_batch):
    """Which rounds to bfloat16 on the way, so that the paths agree to three digits."""
    monkeypatch.setattr(Muon, "LARGEST_BATCH", largest_batch)
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in [(16, 24), (40, 16), (16, 24), (16, 24), (16, 16)]]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    settings = {"lr": 0.02, "weight_decay": 0.1}
    optimizers = Muon(ours, **settings), torch.optim.Muon(theirs, momentum=0.95, **settings)
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q, before in zip(ours, theirs, start, strict=True):
        assert (p - q).norm() < 0.01 * (q - before).norm()


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
        # The output layer's matrix, which may be the embedding's, is cast where its gradient is summed in float32.
        expected = 3 if p is model.output.weight else int(p.dim() == 2 and "tok_embeddings" not in name)
        assert casts.counts[p.data_ptr()] == expected, name
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


def test_gradients_of_weights_cast_beforehand_do_not_wait_for_the_end_of_the_backward_pass():
    """The last block's come first, so that data parallelism can send them while the others are computed."""
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


def test_float32_needs_no_casts():
    assert cast_weights(Transformer(TINY), torch.float32) == {}


# ---------------------------------------------------------------- checkpoints


def checkpoint_at(step: int, model: Transformer | None = None) -> dict:
    model = model or Transformer(TINY)
    return {"step": step, "model": model.state_dict(), "config": {"model": config_as_dict(model.config)}}


def save(folder: Path, step: int, *, keep: int = 100, is_best: bool = False) -> Path:
    return save_checkpoint(folder, {"step": step, "tensor": torch.full((1000,), step)}, keep=keep, is_best=is_best)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_checkpoint_brings_back_model_optimizers_and_random_state(tmp_path, optimizer):
    model = Transformer(TINY)
    fields = {"max_lr": 1e-3, "muon_lr": 0.02, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    cfg = replace(ORIGINAL, optimizer=optimizer, **fields)
    optimizers = build_optimizers(model, cfg)
    tokens = torch.randint(512, (2, 16))
    model(tokens, tokens).backward()
    for one in optimizers:
        one.step()
    extra = {"optimizers": [one.state_dict() for one in optimizers], "random_state": random_state()}
    path = save_checkpoint(tmp_path, checkpoint_at(7, model) | extra, keep=1, is_best=False)
    drawn = torch.rand(3), random.random()

    loaded, rest = load_model(path, "cpu")
    assert rest.keys() == checkpoint_at(7, model).keys() - {"model"} | {"format_version", "random_state"}
    checkpoint = load_checkpoint(path, "cpu")
    assert checkpoint["step"] == 7 and loaded.config == TINY and not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    fresh = build_optimizers(loaded, cfg)
    for one, state, saved in zip(fresh, checkpoint["optimizers"], extra["optimizers"], strict=True):
        one.load_state_dict(state)
        torch.testing.assert_close(one.state_dict()["state"], saved["state"], rtol=0, atol=0)
    restore_random_state(checkpoint["random_state"])
    assert torch.equal(torch.rand(3), drawn[0]) and random.random() == drawn[1]


def test_tied_weights_are_tied_after_loading(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint_at(1, Transformer(TIED)), keep=1, is_best=False)
    loaded, _ = load_model(path, "cpu")
    assert loaded.output.weight is loaded.tok_embeddings.weight


def test_newest_are_kept_and_the_best_besides(tmp_path):
    for step in (8, 9, 10, 11):
        save(tmp_path, step, keep=2, is_best=step == 8)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step_00000010.pt", "step_00000011.pt"]
    assert load_checkpoint(tmp_path / "best.pt", "cpu")["step"] == 8
    save(tmp_path, 12, keep=2, is_best=True)
    assert load_checkpoint(tmp_path / "best.pt", "cpu")["step"] == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "step_00000011.pt", "step_00000012.pt"]


def test_best_is_a_copy_where_links_are_not_possible(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError("this file system has no hard links")

    monkeypatch.setattr(os, "link", refuse)
    save(tmp_path, 1, is_best=True)
    assert load_checkpoint(tmp_path / "best.pt", "cpu")["step"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "step_00000001.pt"]


def chained(error: Exception, context: Exception | None) -> Exception:
    error.__context__ = context
    return error


FULL, BROKEN = OSError(28, "No space left on device"), RuntimeError("unexpected pos 6784 vs 6678")


@pytest.mark.parametrize(
    "failure",
    [
        chained(OSError(*FULL.args), None),
        chained(RuntimeError(*BROKEN.args), FULL),  # torch's writer notices at its own end
        chained(OSError(*FULL.args), chained(RuntimeError(*BROKEN.args), FULL)),  # and closing the file fails too
    ],
    ids=["plain", "from torch's writer", "from closing the file"],
)
def test_failed_save_tells_why_and_leaves_the_older_checkpoint_and_no_litter(tmp_path, monkeypatch, failure):
    older = save(tmp_path, 1, is_best=True)
    before = older.read_bytes()

    def half_a_file(checkpoint, file):
        file.write(b"x" * 100)
        raise failure

    monkeypatch.setattr(torch, "save", half_a_file)
    with pytest.raises(OSError, match=r"00002.pt: could not be written .*last good checkpoint is .*00001.pt") as told:
        save(tmp_path, 2, keep=1)
    assert "No space left" in str(told.value) and "unexpected pos" not in str(told.value)
    assert older.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "step_00000001.pt"]


def test_checkpoint_is_found_by_file_folder_and_run(tmp_path):
    folder = tmp_path / "checkpoints"
    newest = [save(folder, step) for step in (9, 100, 20)][1]
    assert find_checkpoint(newest) == newest
    assert find_checkpoint(folder) == find_checkpoint(tmp_path) == newest
    with pytest.raises(FileNotFoundError, match="nowhere: no checkpoint"):
        find_checkpoint(tmp_path / "nowhere")


class Harmful:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    torch.save({"format_version": 1, "step": 1, "model": Harmful(tmp_path / "ran")}, tmp_path / "step_00000001.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Harmful(tmp_path / "ran"), protocol=2))
    for name in ("step_00000001.pt", "bare.pt"):
        with pytest.raises(ValueError, match=f"{name}: not a readable checkpoint"):
            load_checkpoint(tmp_path / name, "cpu")
        assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "step_00000001.pt", weights_only=False)  # the trap would have snapped
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("cut", [0, 10, 2000, -1], ids=lambda cut: f"to {cut} bytes")
def test_checkpoint_cut_short_is_refused_by_name(tmp_path, cut):
    path = save(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"step_00000001.pt: not a readable checkpoint .*older one"):
        load_checkpoint(path, "cpu")


def test_checkpoint_with_a_flipped_bit_is_refused(tmp_path):
    """In the middle of a tensor, where nothing but the check sum can tell."""
    path = save(tmp_path, 1)
    contents = bytearray(path.read_bytes())
    tensor = contents.find(struct.pack("<q", 1) * 1000)
    contents[tensor + 4000] ^= 1
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=r"step_00000001.pt: not a readable checkpoint .*older one"):
        load_checkpoint(path, "cpu")


@pytest.mark.parametrize("content", [{"step": 1}, [1, 2]])
def test_other_torch_files_are_no_checkpoints(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: not a readable checkpoint"):
        load_checkpoint(tmp_path / "other.pt", "cpu")


def test_checkpoint_of_another_format_is_told_from_a_damaged_one(tmp_path):
    torch.save({"format_version": 99}, tmp_path / "newer.pt")
    with pytest.raises(ValueError, match=r"newer\.pt: of format 99, this code reads 1; take the code that wrote it"):
        load_checkpoint(tmp_path / "newer.pt", "cpu")


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, PermissionError])
def test_trouble_with_the_machine_is_not_taken_for_a_damaged_file(tmp_path, monkeypatch, error):
    """Who is told to delete the file has lost a good one."""
    path = save(tmp_path, 1)

    def load(*args, **kwargs):
        raise error("no room")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(error, match="no room"):
        load_checkpoint(path, "cpu")


def test_a_cpu_without_memory_is_not_taken_for_a_damaged_file(tmp_path, monkeypatch):
    path = save(tmp_path, 1)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: torch.empty(2**60, dtype=torch.uint8))
    with pytest.raises(MemoryError, match=r"step_00000001.pt: does not fit into memory .*allocate memory"):
        load_checkpoint(path, "cpu")


def test_missing_checkpoint_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none.pt", "cpu")


# ---------------------------------------------------------------- records


class FakeRun:
    """Stands in for a Weights & Biases run and remembers."""

    def __init__(self):
        self.logged, self.finished = [], 0

    def log(self, row, step):
        self.logged.append((step, row))

    def finish(self):
        self.finished += 1


def test_metrics_are_lines_at_once_and_go_to_weights_and_biases(tmp_path):
    run = FakeRun()
    log = MetricsLog(tmp_path, run, True, last_step=0)
    log.write({"step": 1, "train_loss": 2.5})
    log.write({"step": 2, "train_loss": 2.0})
    # Read before it is closed: a run that is killed has lost nothing.
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert run.logged == [(1, {"train_loss": 2.5}), (2, {"train_loss": 2.0})]
    log.close()
    assert run.finished == 1


def test_rows_beyond_the_checkpoint_and_a_cut_line_are_dropped(tmp_path):
    rows = [json.dumps({"step": step}) for step in (0, 1, 2, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 5, "tra')
    log = MetricsLog(tmp_path, NullRun(), True, last_step=2)
    log.write({"step": 3, "new": True})
    log.close()
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kept == [{"step": 0}, {"step": 1}, {"step": 2}, {"step": 2}, {"step": 3, "new": True}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_other_ranks_write_no_metrics(tmp_path):
    run = FakeRun()
    log = MetricsLog(tmp_path, run, False, last_step=0)
    log.write({"step": 1})
    log.close()
    assert not list(tmp_path.iterdir()) and not run.logged


def wandb_arguments(folder: Path, is_main: bool = True) -> tuple:
    cfg = replace(ORIGINAL, wandb_project="p", out_dir=str(folder))
    return cfg, "abc12345", Process(0 if is_main else 1, 2, torch.device("cpu"))


@pytest.mark.parametrize(
    ("key", "is_main"), [(None, True), ("", True), ("0" * 40, False)], ids=["no key", "empty key", "not the main rank"]
)
def test_wandb_is_not_even_imported(tmp_path, monkeypatch, key, is_main):
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    imported, real = [], builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest: imported.append(name) or real(name, *rest))
    run = start_wandb(*wandb_arguments(tmp_path, is_main=is_main))
    run.log({"loss": 1.0}, step=1)
    run.finish()
    assert isinstance(run, NullRun)
    assert not [name for name in imported if name.startswith("wandb")]
    assert not list(tmp_path.iterdir())


def test_nothing_imports_wandb_at_the_top():
    for path in ROOT.glob("*.py"):
        assert "\nimport wandb" not in path.read_text() and "\nfrom wandb" not in path.read_text(), path.name


class BrokenWandb:
    """The module wandb, on a day when its server is down."""

    class Error(Exception):
        pass

    @staticmethod
    def init(**kwargs):
        raise BrokenWandb.Error("no network\nand three more lines of advice")


@pytest.mark.parametrize("module", [BrokenWandb, None], ids=["init fails", "not installed"])
def test_wandb_that_fails_is_one_line_and_no_error(tmp_path, monkeypatch, capsys, module):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setitem(sys.modules, "wandb", module)
    assert isinstance(start_wandb(*wandb_arguments(tmp_path)), NullRun)
    out, err = capsys.readouterr()
    assert "Weights & Biases is off" in out and len(out.splitlines()) == 1
    assert not err


@pytest.mark.parametrize("method", ["log", "finish"])
def test_wandb_that_breaks_during_the_run_costs_no_row(tmp_path, method):
    def fail(*args, **kwargs):
        raise BrokenPipeError("the service is gone")

    run = FakeRun()
    setattr(run, method, fail)
    log = MetricsLog(tmp_path, run, True, last_step=0)
    for step in (1, 2, 3):
        log.write({"step": step, "train_loss": 1.0})
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


WANDB_RUN = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from dataclasses import replace
import torch
from model_utils import MetricsLog, Process, start_wandb
from train import ORIGINAL

folder = Path({folder!r})
cfg = replace(ORIGINAL, wandb_project="p", out_dir=str(folder))
run = start_wandb(cfg, "abc12345", Process(0, 1, torch.device("cpu")))
log = MetricsLog(folder, run, True, last_step=0)
log.write({{"step": 1, "tokens": 256, "train_loss": 2.5, "lr": 0.001, "grad_norm": 1.5, "mfu": 0.25}})
log.write({{"step": 1, "tokens": 256, "val_loss": 2.25, "val_bpb": 1.75}})
log.write({{"step": 2, "tokens": 512, "train_loss": 2.0, "lr": 0.001, "grad_norm": 1.25, "mfu": 0.25}})
log.close()
print(type(run).__name__)
"""


def wandb_subprocess(folder: Path, mode: str) -> subprocess.CompletedProcess:
    """A process of its own: wandb starts a service and leaves hooks behind."""
    (folder / "script.py").write_text(WANDB_RUN.format(root=str(ROOT), folder=str(folder)))
    env = os.environ | {"WANDB_API_KEY": "0" * 40, "WANDB_MODE": mode, "WANDB_SILENT": "true", "HOME": str(folder)}
    command = [sys.executable, str(folder / "script.py")]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=120)


def wandb_records(path: Path) -> list:
    """A .wandb file holds protobuf messages in LevelDB's log format: blocks of 32 KiB, and in them pieces with a header
    of checksum, length and kind (1 whole, 2 first, 3 middle, 4 last)."""
    from wandb.proto import wandb_internal_pb2

    contents, records, message = path.read_bytes(), [], b""
    position = 7  # the file's own header
    while position + 7 <= len(contents):
        if 32768 - position % 32768 < 7:  # too little is left of the block for a header
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", contents[position : position + 7])
        message += contents[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            records.append(wandb_internal_pb2.Record.FromString(message))
            message = b""
    return records


def test_offline_run_of_wandb_holds_every_metric(tmp_path):
    pytest.importorskip("wandb")
    result = wandb_subprocess(tmp_path, "offline")
    assert result.returncode == 0 and result.stdout.split()[-1] == "Run", result
    [path] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert "abc12345" in path.name
    history = {}
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            history[row["_step"]] = row
    expected = {"tokens": 256, "train_loss": 2.5, "lr": 0.001, "grad_norm": 1.5, "mfu": 0.25}
    expected |= {"val_loss": 2.25, "val_bpb": 1.75}
    assert history[1].items() >= expected.items()
    assert history[2]["train_loss"] == 2.0


@pytest.mark.slow
def test_wandb_in_a_mode_that_does_not_exist_leaves_training_alive(tmp_path):
    pytest.importorskip("wandb")
    result = wandb_subprocess(tmp_path, "bogus")
    assert result.returncode == 0, result
    assert "Weights & Biases is off" in result.stdout and result.stdout.split()[-1] == "NullRun"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
