"""wandb_log.py: what Weights & Biases gets from a run. No network: the runs are offline, or have no wandb at all."""

import builtins
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import ROOT, plain_environment
from wandb_files import wandb_history, wandb_records

from train import ORIGINAL
from wandb_log import start_wandb


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("key", [None, ""], ids=["no key", "empty key"])
def test_wandb_is_not_imported_without_a_key(tmp_path, monkeypatch, key):
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    imported, real = [], builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest: imported.append(name) or real(name, *rest))
    assert start_wandb(replace(ORIGINAL, out_dir=str(tmp_path)), "abc12345") is None
    assert not [name for name in imported if name.startswith("wandb")]
    assert not list(tmp_path.iterdir())


def test_nothing_imports_wandb_at_the_top():
    for path in ROOT.glob("*.py"):
        assert "\nimport wandb" not in path.read_text() and "\nfrom wandb " not in path.read_text(), path.name


class BrokenWandb:
    """The module wandb, on a day when its server is down."""

    class Error(Exception):
        pass

    class Settings:
        def __init__(self, **kwargs): ...

    @staticmethod
    def init(**kwargs):
        raise BrokenWandb.Error("no network\nand three more lines of advice")


@pytest.mark.parametrize("module", [BrokenWandb, None], ids=["init fails", "not installed"])
def test_wandb_that_fails_at_the_start_prints_one_line_and_raises_no_error(tmp_path, monkeypatch, capsys, module):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setitem(sys.modules, "wandb", module)
    log = start_wandb(replace(ORIGINAL, out_dir=str(tmp_path)), "abc12345")
    log.log(1, {"loss": 1.0})
    log.close()
    out, err = capsys.readouterr()
    assert "Weights & Biases is off" in out and len(out.splitlines()) == 1
    assert not err


WANDB_RUN = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from dataclasses import replace
from records import MetricsLog
from train import ORIGINAL
from wandb_log import start_wandb

folder = Path({folder!r})
log = MetricsLog(folder, start_wandb(replace(ORIGINAL, wandb_project="p", out_dir=str(folder)), "abc12345"))
log.write({{"step": 1, "tokens": 256, "train_loss": 2.5, "lr": 0.001, "grad_norm": 1.5, "mfu": 0.25}})
log.write({{"step": 1, "tokens": 256, "val_loss": 2.25, "val_bpb": 1.75}})
log.write({{"step": 2, "tokens": 512, "train_loss": 2.0, "lr": 0.001, "grad_norm": 1.25, "mfu": 0.25}})
log.write({{"step": 2, "tokens": 512, "config_change": {{"max_lr": [0.001, 0.002]}}, "skipped_updates": 1}})
log.samples(2, 512, ["Once upon", "a time"])
(folder / "step_00000002").mkdir()
(folder / "step_00000002/model.safetensors").write_bytes(b"weights")
log.wandb.upload(folder / "step_00000002", "run-abc12345")
log.close()
sys.stdout.flush()
os._exit(0)  # as train.py ends: without wandb's own shutdown
"""


def wandb_subprocess(folder: Path, mode: str) -> subprocess.CompletedProcess:
    """Run it in a process of its own, because wandb starts a service and leaves hooks behind."""
    (folder / "script.py").write_text(WANDB_RUN.format(root=str(ROOT), folder=str(folder)))
    env = plain_environment(WANDB_API_KEY="0" * 40, WANDB_MODE=mode, WANDB_SILENT="true", HOME=str(folder))
    command = [sys.executable, str(folder / "script.py")]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=120)


def test_offline_run_of_wandb_holds_every_metric_the_samples_and_the_checkpoint(tmp_path):
    pytest.importorskip("wandb")
    result = wandb_subprocess(tmp_path, "offline")
    assert (result.returncode, result.stdout) == (0, ""), result
    [path] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert "abc12345" in path.name
    records, history, axes, artifacts = wandb_records(path), {}, {}, {}
    for row in wandb_history(records):
        history.setdefault(row["_step"], {}).update(row)
    for record in records:
        kind = record.WhichOneof("record_type")
        if kind == "metric":
            axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "artifact":
            artifacts[record.artifact.name] = [entry.path for entry in record.artifact.manifest.contents]
    assert "exit" in [record.WhichOneof("record_type") for record in records]  # the file is whole
    expected = {"tokens": 256, "train_loss": 2.5, "lr": 0.001, "grad_norm": 1.5, "mfu": 0.25}
    expected |= {"val_loss": 2.25, "val_bpb": 1.75}
    assert history[1].items() >= expected.items()
    assert history[2].items() >= {"train_loss": 2.0, "skipped_updates": 1}.items()
    assert history[2]["config_change.max_lr"] == [0.001, 0.002]
    assert axes["*"] == "tokens"
    assert history[2]["samples._type"] == "table-file"
    [table] = tmp_path.glob("wandb/offline-run-*/files/" + history[2]["samples.path"])
    assert json.loads(table.read_text())["data"] == [[2, "Once upon"], [2, "a time"]]
    assert artifacts["run-abc12345"] == ["model.safetensors"]


@pytest.mark.slow
def test_wandb_in_a_mode_that_does_not_exist_leaves_training_alive(tmp_path):
    pytest.importorskip("wandb")
    result = wandb_subprocess(tmp_path, "bogus")
    assert result.returncode == 0, result
    assert "Weights & Biases is off" in result.stdout
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
