"""run_config.py and flags.py: which configuration is in force, its flags, and what must lie on the disk."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from tiny_run import TRAIN, plain_environment

from config import Config, config_as_dict
from optimizers import with_recipe
from run_config import read_config
from shards import SHARD_FORMAT_VERSION
from train import CONFIGS, ORIGINAL, SAMPLE

HINT = "configuration: sample; `python load_fineweb_dataset.py` prepares the original"
NO_DATA = "data_root=data/fineweb-edu-10BT: not a prepared folder; `python load_fineweb_dataset.py` makes it; "
NO_DATA += "--config sample needs no preparation"
NO_HELLASWAG = "without HellaSwag, which `python load_hellaswag_dataset.py` fetches"


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """One process in an empty folder, whatever the shell of the developer has set."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def prepared(folder: str, vocab_size: int) -> None:
    """A folder with the manifest of a prepared one, and no shard."""
    manifest = {"format_version": SHARD_FORMAT_VERSION, "vocab_size": vocab_size, "documents": 0, "tokens": 0}
    manifest |= {"tokenizer_fingerprint": "", "shards": [], "dtype": "uint16" if vocab_size < 2**16 else "uint32"}
    Path(folder).mkdir(parents=True)
    Path(folder, "manifest.json").write_text(json.dumps(manifest))


def read(*args: str) -> tuple[Config, list[str]]:
    """The configuration of a command line on a CPU, and what is said."""
    said = []
    cfg = read_config([*args, "--device", "cpu", "--dtype", "float32"], CONFIGS, say=said.append)
    return cfg, said


def refusal(*args: str) -> list[str]:
    """The lines of the message that refuses a command line."""
    with pytest.raises(ValueError) as error:
        read_config([*args, "--device", "cpu"], CONFIGS, say=lambda line: pytest.fail(f"before a refusal: {line}"))
    return str(error.value).splitlines()


# ---------------------------------------------------------------- the one in force


def test_without_data_the_sample_is_in_force_and_one_line_says_how_to_get_the_original():
    assert read()[0].data_root == SAMPLE.data_root
    assert read() == (with_recipe(replace(SAMPLE, config="sample", device="cpu", dtype="float32")), [HINT])


def test_with_data_the_original_is_in_force_and_the_sample_by_its_name():
    prepared(ORIGINAL.data_root, ORIGINAL.model.vocab_size)
    cfg, said = read()
    original = replace(ORIGINAL, config="original", device="cpu", dtype="float32", hellaswag_every=0)
    assert cfg == with_recipe(original)
    assert said == ["configuration: original", NO_HELLASWAG]
    assert read("--config", "sample") == (
        with_recipe(replace(SAMPLE, config="sample", device="cpu", dtype="float32")),
        ["configuration: sample"],
    )
    assert read("--config=original")[0] == cfg


@pytest.mark.parametrize("flags", [["--config", "original"], ["--init_from", "model"]])
def test_the_original_without_its_data_is_refused_with_the_command_that_prepares_it(flags):
    """Weights of another model are not for the sample either."""
    assert NO_DATA in refusal(*flags)


def test_rates_that_never_reach_their_peaks_are_said():
    flags = ("--config", "sample", "--max_steps", "6")
    assert read(*flags)[1] == ["configuration: sample"]
    _, said = read(*flags, "--warmup_steps", "715")
    assert len(said) == 2 and said[1].startswith(
        "the learning rates reach only 1% of their peaks, because warmup_steps=715"
    )
    _, said = read("--config", "sample", "--max_steps", "100", "--warmup_steps", "50", "--decay_fraction", "1")
    assert "reach only 66% of their peaks" in said[1]
    assert read("--config", "sample", "--warmup_steps", "100")[1] == ["configuration: sample"]
    # What the warm-up is not to blame for is not said of it.
    assert read("--config", "sample", "--max_steps", "13", "--decay_fraction", "0.96")[1] == ["configuration: sample"]
    assert read("--config", "sample", "--max_steps", "1", "--warmup_steps", "1")[1] == ["configuration: sample"]


def test_a_rate_of_muon_is_refused_where_there_is_none():
    assert refusal("--config", "sample", "--optimizer", "adamw", "--muon_lr", "0.1") == [
        "muon_lr=0.1: optimizer=adamw has no Muon; give max_lr, or leave it out"
    ]


def test_a_further_configuration_is_one_entry():
    further = replace(SAMPLE, data_root="data/web", model=replace(SAMPLE.model, vocab_size=8192))
    with pytest.raises(ValueError, match=r"`python load_fineweb_dataset.py --vocab_size 8192 --out_dir data/web`"):
        read_config(["--config", "further"], CONFIGS | {"further": further})
    prepared("data/web", 8192)
    cfg = read_config(["--config", "further", "--hellaswag_every", "0"], CONFIGS | {"further": further})
    assert (cfg.data_root, cfg.config) == ("data/web", "further")
    with pytest.raises(ValueError, match="config=other: must be original or recommended or sample or further"):
        read_config(["--config", "other"], CONFIGS | {"further": further})


def test_a_name_that_does_not_exist_is_all_that_is_refused():
    assert refusal("--config", "orignal") == ["config=orignal: must be original or recommended or sample"]
    assert refusal("--config") == ["config: has no value; it must be one text, in quotes if it has spaces"]


def test_data_that_a_flag_names_is_never_replaced_by_the_sample():
    missing = "not a prepared folder; load_fineweb_dataset.py makes one"
    assert refusal("--data_root", "elsewhere") == [f"data_root=elsewhere: {missing}"]
    assert refusal("--data_root", "data/sample") == [f"data_root=data/sample: {missing}"]
    assert refusal("--config", "sample", "--data_root", "else") == [f"data_root=else: {missing}"]
    prepared("mine", 128_256)
    assert read("--data_root", "mine")[0].model == ORIGINAL.model


def test_a_dry_run_of_the_original_needs_no_data():
    """The plan comes before a download of 28 GB."""
    assert read("--config", "original", "--dry_run")[0].max_steps == ORIGINAL.max_steps
    assert refusal("--dry_run", "--data_root", "elsewhere")


def test_data_of_another_vocabulary_is_refused_with_the_flag_to_pass():
    prepared("mine", 8192)
    [line] = refusal("--data_root", "mine")
    assert line == "data_root=mine: its vocabulary is 8192, the model's is 128256; pass --model.vocab_size 8192"
    assert read("--data_root", "mine", "--model.vocab_size", "8192")[0].model.vocab_size == 8192
    assert refusal("--data_root", "mine", "--model.vocab_size", "x") == ["model.vocab_size=x: must be a whole number"]
    prepared("data/sample", 4096)
    [line] = refusal("--data_root", "data/sample")
    assert line.endswith("pass --config sample")
    [line] = refusal("--model.vocab_size", "2048")
    assert line.endswith("its vocabulary is 4096, the model's is 2048; pass --model.vocab_size 4096")


def test_the_name_is_no_setting_that_a_resumed_run_compares():
    assert "config" not in config_as_dict(replace(SAMPLE, config="sample"))


def test_reading_flags_changes_no_configuration():
    """A second call in one process must not see the flags of the first."""
    before = {name: replace(cfg) for name, cfg in CONFIGS.items()}
    assert read("--max_steps", "3")[0].max_steps == 3
    assert before == CONFIGS


# ---------------------------------------------------------------- --help


@pytest.mark.parametrize("name", CONFIGS)
def test_help_shows_the_defaults_in_force_and_which_they_are(name, capsys):
    with pytest.raises(SystemExit) as end:
        read_config(["--help", "--config", name], CONFIGS, "Trains.")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert end.value.code == 0
    assert f"The defaults below are those of --config {name}; " in shown
    cfg = CONFIGS[name]
    for default in (name, cfg.out_dir, cfg.max_steps, cfg.model.dim, cfg.total_batch_size):
        assert f"(default: {default})" in shown, default


def test_help_has_every_field_and_fits_into_80_columns():
    environment = plain_environment(COLUMNS="80")
    done = subprocess.run(
        [sys.executable, TRAIN, "--help"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    for field in fields(Config):
        assert f"--{field.name}" in done.stdout, field.name
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []


# ---------------------------------------------------------------- booleans


@pytest.mark.parametrize("value", [["True"], ["true"], ["1"], []])
def test_the_words_for_true_and_the_bare_flag(value):
    for name in ("document_mask", "dry_run", "compile", "resume"):
        assert getattr(read(f"--{name}", *value)[0], name) is True, name
    if value:
        assert read(f"--document_mask={value[0]}")[0].document_mask is True


@pytest.mark.parametrize("value", ["False", "false", "0"])
def test_the_words_for_false(value):
    for name in ("document_mask", "dry_run", "compile", "resume"):
        assert getattr(read(f"--{name}", value)[0], name) is False, name


def test_other_words_are_what_they_were():
    assert read("--compile", "auto")[0].compile == "auto"
    assert read("--resume", "best")[0].resume == "best"
    assert refusal("--document_mask", "yes") == ["document_mask=yes: must be True or False"]
    assert refusal("--compile", "2") == ["compile=2: must be True or False or auto"]
    assert refusal("--resume", "--seed", "x") == ["seed=x: must be a whole number"]


# ---------------------------------------------------------------- train.py


def test_a_refused_run_prints_nothing_before_its_refusal(tmp_path):
    """The name of the configuration stands there only when nothing can be refused any more."""
    done = subprocess.run(
        [sys.executable, TRAIN, "--device", "cpu", "--compile", "0", "--resume", "best"],
        env=plain_environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.rstrip().splitlines()[-1].startswith("train.py: resume=best: ")


def test_under_torchrun_the_refusal_stands_once_and_last(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, TRAIN, "--max_step", "5", "--top_p", "2"],
        env=plain_environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    said = done.stderr.rstrip("=\n")
    lines = [
        "train.py: --max_step 5: no such flag; did you mean --max_steps?",
        "top_p=2.0: must be above 0 and at most 1",
    ]
    assert said.endswith("\n  ".join(lines)), said
    assert said.count("--max_step 5") == said.count("top_p=2.0") == 1
    assert not list(tmp_path.iterdir())


def test_a_process_that_alone_is_refused_says_so(tmp_path, monkeypatch, capsys):
    """torchrun does not stop it, because the first process goes on."""
    import processes

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(processes, "PATIENCE", 0.0)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes.signal, "signal", lambda *_: None)
    processes.say_why(None, "the cause")
    assert capsys.readouterr().err == "train.py: the cause\n"
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(processes, "PERIOD", 0.0)
    processes.say_why(None, "the cause")
    assert capsys.readouterr().err == "" and "the cause" in (tmp_path / "error.json").read_text()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "no folder" / "error.json"))
    processes.say_why(None, "the cause")
    assert capsys.readouterr().err == "train.py: the cause\n"
