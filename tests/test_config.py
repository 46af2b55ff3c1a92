"""config.py: what is refused. test_run_config.py has the flags, test_train.py the command line."""

import math
from dataclasses import replace

import pytest

from config import REFUSALS, config_errors
from train import ORIGINAL, SAMPLE

CPU = replace(SAMPLE, device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One process, whatever the shell of the developer has set."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("cfg", [ORIGINAL, SAMPLE], ids=["original", "sample"])
def test_the_configurations_of_the_block_have_no_errors(cfg):
    assert config_errors(replace(cfg, device="cpu", dtype="float32")) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, -1) for names, *_ in REFUSALS for name in names if name not in ("betas", "device", "out_dir")]
    + [(name, math.nan) for name in ("max_lr", "muon_lr", "grad_clip", "weight_decay", "temperature", "top_p")]
    + [("max_lr", math.inf), ("top_p", 0.0), ("top_p", 1.1), ("min_lr_fraction", 1.1), ("decay_fraction", math.nan)]
    + [("betas", (0.9, 1.0)), ("betas", (-0.1, 0.9)), ("batch_size", 0), ("max_steps", 0), ("log_every", 0)]
    + [("device", "tpu"), ("total_batch_size", 2049)],
)
def test_a_value_that_cannot_be_honoured_is_refused_by_name_and_value(name, value):
    errors = config_errors(replace(CPU, **{name: value}))
    assert any(error.startswith(f"{name}={value}: ") for error in errors), errors


def test_only_the_culprit_is_named():
    assert len(config_errors(replace(CPU, top_p=2.0))) == 1
    assert len(config_errors(replace(CPU, max_lr=-1.0, seed=-1))) == 2
