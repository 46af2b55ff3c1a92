"""model_utils.py: processes, the wrapped model, records. The tests need only a CPU and no network."""

import builtins
import json
import os
import struct
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from config import config_as_dict
from model import ModelConfig, Transformer
from model_utils import (
    MixedPrecision,
    NullRun,
    autocast,
    cast_weights,
    flops_per_token,
    start_wandb,
    wrap_model,
)
from optimizers import build_optimizers
from processes import Process
from records import MetricsLog, start_tensorboard
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


def test_float32_needs_no_casts():
    assert cast_weights(Transformer(TINY), torch.float32) == {}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_forward_pass_after_an_update_sees_the_update(optimizer):
    """Fused AdamW changes a parameter without raising its version counter. The casts must still be made anew."""
    torch.manual_seed(0)
    model, tokens = Transformer(TINY), torch.randint(512, (2, 16))
    optimizers = build_optimizers(model, replace(ORIGINAL, optimizer=optimizer, max_lr=0.01, muon_lr=0.1))
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


# ---------------------------------------------------------------- records


class FakeRun:
    """Stands in for a Weights & Biases run and remembers what it gets."""

    def __init__(self):
        self.logged, self.finished = [], 0

    def log(self, row, step):
        self.logged.append((step, row))

    def finish(self):
        self.finished += 1


def test_metrics_are_written_at_once_and_sent_to_weights_and_biases(tmp_path):
    run = FakeRun()
    log = MetricsLog(tmp_path, run, True, last_step=0)
    log.write({"step": 1, "train_loss": 2.5})
    log.write({"step": 2, "train_loss": 2.0})
    # The file is read before it is closed: a killed run must lose nothing.
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
def test_wandb_is_not_imported_without_a_key_or_off_the_main_rank(tmp_path, monkeypatch, key, is_main):
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
def test_wandb_that_fails_at_the_start_prints_one_line_and_raises_no_error(tmp_path, monkeypatch, capsys, module):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setitem(sys.modules, "wandb", module)
    assert isinstance(start_wandb(*wandb_arguments(tmp_path)), NullRun)
    out, err = capsys.readouterr()
    assert "Weights & Biases is off" in out and len(out.splitlines()) == 1
    assert not err


@pytest.mark.parametrize("method", ["log", "finish"])
def test_no_row_is_lost_if_wandb_breaks_during_the_run(tmp_path, method):
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
from model_utils import start_wandb
from processes import Process
from records import MetricsLog
from train import ORIGINAL

folder = Path({folder!r})
cfg = replace(ORIGINAL, wandb_project="p", out_dir=str(folder))
run = start_wandb(cfg, "abc12345", Process(0, 1, torch.device("cpu")))
log = MetricsLog(folder, run, True, last_step=0)
log.write({{"step": 1, "tokens": 256, "train_loss": 2.5, "lr": 0.001, "grad_norm": 1.5, "mfu": 0.25}})
log.write({{"step": 1, "tokens": 256, "val_loss": 2.25, "val_bpb": 1.75}})
log.write({{"step": 2, "tokens": 512, "train_loss": 2.0, "lr": 0.001, "grad_norm": 1.25, "mfu": 0.25}})
log.samples(2, 512, ["Once upon", "a time"])
(folder / "step_00000002").mkdir()
(folder / "step_00000002/model.safetensors").write_bytes(b"weights")
log.upload(folder / "step_00000002", "run-abc12345")
log.close()
print(type(run).__name__)
"""


def wandb_subprocess(folder: Path, mode: str) -> subprocess.CompletedProcess:
    """Run it in a process of its own, because wandb starts a service and leaves hooks behind."""
    (folder / "script.py").write_text(WANDB_RUN.format(root=str(ROOT), folder=str(folder)))
    env = os.environ | {"WANDB_API_KEY": "0" * 40, "WANDB_MODE": mode, "WANDB_SILENT": "true", "HOME": str(folder)}
    command = [sys.executable, str(folder / "script.py")]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=120)


def wandb_records(path: Path) -> list:
    """The protobuf messages of a .wandb file, which has LevelDB's log format. Blocks of 32 KiB hold pieces. Each piece
    has a header of checksum, length and kind (1 whole, 2 first, 3 middle, 4 last)."""
    from wandb.proto import wandb_internal_pb2

    contents, records, message = path.read_bytes(), [], b""
    position = 7  # the file's own header
    while position + 7 <= len(contents):
        if 32768 - position % 32768 < 7:  # the rest of the block is too short for a header
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", contents[position : position + 7])
        message += contents[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            records.append(wandb_internal_pb2.Record.FromString(message))
            message = b""
    return records


def test_offline_run_of_wandb_holds_every_metric_the_samples_and_the_checkpoint(tmp_path):
    pytest.importorskip("wandb")
    result = wandb_subprocess(tmp_path, "offline")
    assert result.returncode == 0 and result.stdout.split()[-1] == "Run", result
    assert "Weights & Biases is off" not in result.stdout, result.stdout
    [path] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert "abc12345" in path.name
    history, axes, artifacts = {}, {}, {}
    for record in wandb_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = record.history.item
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
            history.setdefault(row["_step"], {}).update(row)
        elif kind == "metric":
            axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "artifact":
            artifacts[record.artifact.name] = [entry.path for entry in record.artifact.manifest.contents]
    expected = {"tokens": 256, "train_loss": 2.5, "lr": 0.001, "grad_norm": 1.5, "mfu": 0.25}
    expected |= {"val_loss": 2.25, "val_bpb": 1.75}
    assert history[1].items() >= expected.items()
    assert history[2]["train_loss"] == 2.0
    assert axes["*"] == "tokens"
    assert history[2]["samples._type"] == "table-file"
    [table] = tmp_path.glob("wandb/offline-run-*/files/" + history[2]["samples.path"])
    assert json.loads(table.read_text())["data"] == [[2, "Once upon"], [2, "a time"]]
    assert artifacts["run-abc12345"] == ["model.safetensors"]


def test_tensorboard_holds_every_metric_and_the_samples(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = replace(ORIGINAL, out_dir=str(tmp_path), tensorboard=True)
    alone = Process(0, 1, torch.device("cpu"))
    for last_step, steps in ((-1, (1, 2, 3)), (1, (2,))):  # the second run goes on after step 1
        log = MetricsLog(tmp_path, NullRun(), True, last_step, start_tensorboard(cfg, alone, last_step))
        for step in steps:
            log.write({"step": step, "tokens": 10 * step, "train_loss": 1.0 / step - last_step})
        log.samples(steps[-1], 30, ["Once upon"])
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    rows = [(event.step, event.value) for event in events.Scalars("train_loss")]
    assert rows == [(1, 2.0), (2, -0.5)]
    assert [event.step for event in events.Tensors("sample 0/text_summary")][-1] == 2
    assert start_tensorboard(replace(cfg, tensorboard=False), alone, 0) is None
    assert start_tensorboard(cfg, Process(1, 2, torch.device("cpu")), 0) is None


def test_a_missing_tensorboard_is_said_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"tensorboard=True: .*; `pip install tensorboard`, or leave the flag out"):
        start_tensorboard(replace(ORIGINAL, tensorboard=True), Process(0, 1, torch.device("cpu")), 0)


@pytest.mark.slow
def test_wandb_in_a_mode_that_does_not_exist_leaves_training_alive(tmp_path):
    pytest.importorskip("wandb")
    result = wandb_subprocess(tmp_path, "bogus")
    assert result.returncode == 0, result
    assert "Weights & Biases is off" in result.stdout and result.stdout.split()[-1] == "NullRun"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
