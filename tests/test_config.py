"""config.py: what is refused, and which configuration is in force. test_train.py has the command line."""

import math
from dataclasses import fields, replace

import pytest

from config import ORDERS, REFUSALS, Config, config_errors, read_config
from flags import split_flags
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


def test_every_field_has_a_meaning_that_help_shows(capsys):
    with pytest.raises(SystemExit):
        read_config(["--help"], ORIGINAL, SAMPLE)
    shown = capsys.readouterr().out
    for field in fields(Config):
        assert f"--{field.name}" in shown or f"--{field.name}." in shown, field.name


def test_reading_flags_changes_neither_configuration(tmp_path, monkeypatch):
    """A second call in one process must not see the flags of the first."""
    monkeypatch.chdir(tmp_path)
    before = replace(ORIGINAL), replace(SAMPLE)
    cfg = read_config(["--device", "cpu", "--max_steps", "3"], ORIGINAL, SAMPLE)
    assert cfg.max_steps == 3 and cfg.data_root == SAMPLE.data_root and cfg.dtype != "auto"
    assert before == (ORIGINAL, SAMPLE)


@pytest.mark.parametrize(
    ("args", "spelled_out"),
    [
        ([], []),
        (["--dry_run"], ["--dry_run", "True"]),
        (["--dry_run", "--seed", "1"], ["--dry_run", "True", "--seed", "1"]),
        (["--dry_run", "False"], ["--dry_run", "False"]),
    ],
)
def test_an_order_may_stand_without_a_value(args, spelled_out):
    assert [word for flag in split_flags(args, ORDERS) for word in flag.words] == spelled_out


def test_no_flags_at_all_are_the_sample_where_nothing_is_prepared(tmp_path, monkeypatch):
    """The README's first line."""
    monkeypatch.chdir(tmp_path)
    assert read_config([], ORIGINAL, SAMPLE).data_root == SAMPLE.data_root
