"""dry_run.py: its figures against real runs, and that it leaves no trace."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dry_run
import records
import train
from config import config_as_dict
from model import Transformer
from preparation import prepare
from processes import Process
from run_config import read_config

ROOT = Path(__file__).resolve().parents[1]
ALONE = Process(0, 1, torch.device("cpu"))
TINY = {
    "model.dim": 32,
    "model.n_layers": 2,
    "model.n_heads": 4,
    "model.n_kv_heads": 2,
    "model.vocab_size": 512,
    "model.multiple_of": 32,
    "model.max_seq_len": 32,
    "batch_size": 8,
    "total_batch_size": 512,  # two micro-steps
    "device": "cpu",
    "compile": False,
}
# Trains twelve steps as train.py does, and prints by how much the peak memory has grown since the model was built.
MEASURE = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import memory, train

def peak(): return memory.proc_bytes("/proc/self/status", "VmHWM")

class Transformer(train.Transformer):
    def __init__(self, config):
        global before
        before = peak()
        super().__init__(config)

def update(*args, real=train.update, **kwargs):
    result = real(*args, **kwargs)
    print("GROWTH", peak() - before)
    return result

train.Transformer, train.update = Transformer, update
sys.exit(train.main())
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One process, whatever the shell of the developer has set."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def words(fields: dict) -> list[str]:
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Whether the sample's data has been prepared in the current folder must make no difference."""
    monkeypatch.chdir(tmp_path)


def tiny_config(**changes) -> train.Config:
    cfg = read_config(words(TINY), train.CONFIGS)
    return replace(cfg, **changes)


def run_python(*args: str, cwd: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    result = subprocess.run([sys.executable, *args], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def everything_in(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and folder by name, with its time of change and its bytes."""
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"")
        for p in folder.rglob("*")
    }


def in_bytes(figure: str) -> float:
    number, unit = figure.split()
    return float(number.replace(",", "")) * {"MiB": 2**20, "GiB": 2**30}[unit]


def memory_of(out: str) -> dict[str, float]:
    """The lines of the table of memory."""
    section = out[out.index("memory on") : out.index("\ntime")]
    return {name.strip(): in_bytes(value) for name, value in re.findall(r"^  (.+?)  +(\S+ [MG]iB)$", section, re.M)}


# ---------------------------------------------------------------- the figures


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A prepared folder of random words, with ids of the sample's vocabulary."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for i in range(2):
        (folder / f"{i}.txt").write_text(" ".join(str(draw.randrange(10**6)) for _ in range(20_000)))
    val, text = str(folder / "0.txt"), str(folder / "1.txt")
    prepare([text], folder / "prepared", vocab_size=4096, val_source=[val], show_progress=False)
    return folder / "prepared"


OTHER_SHAPE = {
    "model.dim": 256,
    "model.n_layers": 2,
    "model.n_heads": 4,
    "model.n_kv_heads": 2,
    "model.max_seq_len": 256,
    "batch_size": 4,
    "total_batch_size": 3072,  # three micro-steps, so the time is composed
    "optimizer": "adamw",
    "dtype": "float32",
    "compile": False,
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak memory of a process")
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"compile": False}, id="sample"),
        pytest.param({}, id="sample, compiled", marks=pytest.mark.slow),
        pytest.param(OTHER_SHAPE, id="other shape", marks=pytest.mark.slow),
    ],
)
def test_the_memory_is_what_a_real_step_takes(changes, corpus, tmp_path):
    sample = {f"model.{name}": value for name, value in config_as_dict(train.SAMPLE.model).items()}
    sample |= {name: getattr(train.SAMPLE, name) for name in ("batch_size", "total_batch_size", "optimizer")}
    fields = sample | changes | {"data_root": corpus, "out_dir": "run", "max_steps": 12, "device": "cpu"}
    fields |= dict.fromkeys(("val_every", "hellaswag_every", "generate_every", "save_every"), 0) | {"val_tokens": 2048}
    out = run_python(str(ROOT / "train.py"), *words(fields), "--dry_run", cwd=tmp_path)
    assert not list(tmp_path.iterdir())
    shown = memory_of(out)
    real = run_python("-c", MEASURE, str(ROOT), *words(fields), cwd=tmp_path)
    growth = max(int(figure) for figure in re.findall(r"GROWTH (\d+)", real))
    print(f"shown {shown}, grown {growth}, ratio {shown['peak of a step'] / growth:.3f}")
    # In the first steps the heap still grows by a tenth, so three would not show it whole.
    assert shown["peak of a step"] == pytest.approx(growth, rel=0.15)
    parts = [value for name, value in shown.items() if name != "peak of a step"]
    assert sum(parts) == pytest.approx(shown["peak of a step"], rel=0.01)  # nothing is hidden, nothing counts twice


def test_the_parts_add_up_to_the_model():
    model = Transformer(tiny_config().model)
    lines = dry_run.parameters_by_part(model)
    counts = {name: int(line.split()[0].replace(",", "")) for name, line in lines.items()}
    total = counts.pop("all")
    assert total == sum(p.numel() for p in model.parameters()) == sum(counts.values())
    assert counts["embedding"] == counts["output layer"] == 512 * 32
    assert counts["attention"] == 2 * (2 * 32 * 32 + 2 * 32 * 16) and counts["norms"] == 5 * 32


@pytest.mark.parametrize(("accumulation", "seconds"), [(1, 5.0), (2, 8.0), (10, 2 + 10 * 3.0)])
def test_the_time_of_a_long_update_is_that_of_its_micro_steps(accumulation, seconds, monkeypatch):
    """A clock that only the update moves: 3 seconds for each micro-step and 2 for the rest."""
    clock = [0.0]

    def step(model, *, batches, cfg, accumulation, process):
        next(batches)
        clock[0] += 2 + 3 * accumulation

    monkeypatch.setattr(dry_run.time, "perf_counter", lambda: clock[0])
    cfg = tiny_config(total_batch_size=accumulation * 8 * 32)
    assert dry_run.seconds_a_step(step, None, cfg, ALONE) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("save_every", "keep", "count"),
    [(0, 2, 1), (100, 2, 4), (100, 200, 10), (999, 5, 2)],  # the end is saved, the best one stays, one is being written
)
def test_the_checkpoints_that_the_disk_holds_at_a_time(save_every, keep, count):
    assert (
        dry_run.checkpoints_at_once(tiny_config(max_steps=1000, save_every=save_every, keep_checkpoints=keep)) == count
    )


# ---------------------------------------------------------------- what does not fit


def out_of_memory_above(largest: int):
    """An update for which a GPU has memory for `largest` sequences."""

    def update(model, optimizers, batches, step, cfg, **kwargs):
        if len(next(batches)[0]) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return train.update(model, optimizers, batches, step, cfg, **kwargs)

    return update


def test_the_largest_batch_size_that_fits_is_named(capsys):
    """512 tokens are 16 sequences, so 5, 6 and 7 do not divide an update."""
    assert dry_run.dry_run(tiny_config(), ALONE, out_of_memory_above(7), []) == 1
    out = capsys.readouterr().out
    assert "--batch_size 8 does not fit" in out and "--batch_size 4 does" in out
    assert "gradients" in out and "\ntime" not in out


def test_a_model_that_never_fits_is_said_so(capsys):
    assert dry_run.dry_run(tiny_config(), ALONE, out_of_memory_above(0), []) == 1
    assert "not even --batch_size 1 does: pass --activation_checkpointing all" in capsys.readouterr().out


def test_a_disk_that_is_too_small_is_named(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert dry_run.dry_run(tiny_config(), ALONE, train.update, []) == 1
    assert "--keep_checkpoints" in capsys.readouterr().out


# ---------------------------------------------------------------- the flag, and no trace of it


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (["--dry_run"], True),
        (["--dry_run", "True"], True),
        (["--dry-run", "--max_steps", "3"], True),
        (["--max_steps", "3", "--dry_run"], True),
        (["--dry_run=True"], True),
        (["--dry_run", "False"], False),
        ([], False),
    ],
)
def test_the_flag_works_with_and_without_a_value(flags, value):
    cfg = read_config([*words(TINY), *flags], train.CONFIGS)
    assert cfg.dry_run is value
    given = {"max_steps": cfg.max_steps, "warmup_steps": cfg.warmup_steps}  # the second follows the first
    assert config_as_dict(cfg) == config_as_dict(tiny_config(**given))
    assert "dry_run" not in config_as_dict(cfg)


def test_a_wrong_value_is_refused_as_always(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *words(TINY), "--dry_run", "--top_p", "2"])
    assert train.main() == 1
    captured = capsys.readouterr()
    assert "top_p=2.0: must be" in captured.err and "parameters" not in captured.out
    monkeypatch.setattr(sys, "argv", ["train.py", "--dry_run", "perhaps"])
    assert train.main() == 1
    assert "dry_run=perhaps: must be True or False" in capsys.readouterr().err


def test_an_old_run_stays_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    run = tmp_path / "runs" / "sample"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    before = everything_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "key")
    monkeypatch.setattr(records, "start_wandb", lambda *_: pytest.fail("wandb was started"))
    monkeypatch.setattr(sys, "argv", ["train.py", *words(TINY), "--dry_run"])
    assert train.main() == 0
    assert everything_in(tmp_path) == before
    out = capsys.readouterr().out
    for name in ("batch_size=8", "model.dim=32", "parameters", "moments", "activations", "tokens a step", "checkpoint"):
        assert name in out, name


def test_two_processes_measure_together_and_one_prints(tmp_path):
    """They look for a batch size first. 24 sequences for each process are 3 x 8."""
    out = run_python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "train.py"), "--dry_run"),
        *words(TINY | {"total_batch_size": 1536, "document_mask": True, "batch_size": "auto"}),
        cwd=tmp_path,
    )
    assert out.count("peak of a step") == 1 and "1,536 = 2 x 3 x 8 x 32" in out
    assert out.count("batch_size: 8 is a power of two that surely fits") == 1
    assert not list(tmp_path.iterdir())


def test_sizes_are_readable():
    assert dry_run.size(2**20) == "1.0 MiB" and dry_run.size(3 * 2**30) == "3.00 GiB"
    assert "unknown" in dry_run.memory_lines({"weights": 1}, 0, 0, tiny_config())["peak of a step"]
    assert dry_run.memory_title(torch.device("cpu"), math.inf) == "memory on cpu"
    assert "an estimate" in dry_run.memory_title(torch.device("cuda"), 2**30)
