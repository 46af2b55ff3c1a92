"""Wrong configurations of train.py: refused at once, in one message that names field, value and cure.

Most cases call `read_config` here. A few start train.py, alone and as two processes.
"""

import errno
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import config
import train
from config import config_errors
from environment import PLACE, TASKS
from model import ModelConfig, Transformer
from model_folders import write_model
from run_config import read_config
from train import CONFIGS, SAMPLE

pytestmark = pytest.mark.faults

TRAIN = Path(train.__file__)
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
# A run that would start: 65,536 tokens are four micro-steps of ORIGINAL.
BASE = {"data_root": "prepared", "hellaswag_path": "rows.jsonl", "out_dir": "run", "device": "cpu"}
BASE |= {"total_batch_size": "65536", "dtype": "float32"}


@pytest.fixture(scope="module")
def small_model(tmp_path_factory) -> Path:
    model = Transformer(ModelConfig(32, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=512, multiple_of=32))
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, dict(model.named_parameters()), model.config)
    return folder


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch, small_model):
    """A folder with corpora, rows and a model, without torchrun. A process group fails the test."""
    for name in (*PLACE, *TASKS, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: pytest.fail("a process group"))
    monkeypatch.chdir(tmp_path)
    for folder in ("prepared", "nested/prepared", "damaged"):
        Path(folder).mkdir(parents=True)
    for file in ("prepared/manifest.json", "nested/prepared/manifest.json", "rows.jsonl", "nested/rows.jsonl"):
        Path(file).touch()
    Path("damaged/checkpoints").touch()  # a file where a folder is due
    shutil.copytree(small_model, "nested/model")
    Path("dangling").symlink_to("nowhere")
    return tmp_path


def command_line(flags: str) -> list[str]:
    """`flags`, and those of BASE that are not among them."""
    words = shlex.split(flags)
    given = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in words if word.startswith("--")}
    return [*words, *(word for name in BASE if name not in given for word in (f"--{name}", BASE[name]))]


def tree() -> list[tuple[str, int]]:
    """All that is on the disk here, with sizes."""
    return sorted((str(path), path.lstat().st_size) for path in Path.cwd().rglob("*"))


def refusal(words: list[str]) -> list[str]:
    """The lines of the message that refuses a command line."""
    before = tree()
    with pytest.raises(ValueError) as error:
        read_config(words, CONFIGS)
    assert tree() == before
    return str(error.value).splitlines()


def assert_lines(lines: list[str], expected: list[str]) -> None:
    """Each line of a message begins as one of `expected` does, and there is no other."""
    assert len(lines) == len(expected), "\n".join(lines)
    for start in expected:
        assert any(line.startswith(start) for line in lines), "\n".join(lines)


def test_the_configuration_that_the_cases_change_has_no_error():
    before = tree()
    assert read_config(command_line(""), CONFIGS).out_dir == "run"
    assert tree() == before


# ---------------------------------------------------------------- one problem a case

NO_FOLDER = "no such folder; give a checkpoint, a run directory, best, True or False"
NOT_PREPARED = "not a prepared folder; load_fineweb_dataset.py makes one"
NO_ROWS = "no such file; `python load_hellaswag_dataset.py` fetches HellaSwag; --hellaswag_every 0 goes without"
DEVICES = "must be auto, cpu, cuda, cuda:N or mps"
FINITE = "must be 0 or more, and finite"
SIZE = "must be 1 to 16,777,216"
BILLION = "must be at most 1,000,000,000"
MOVED = "is in it, and a new run moves an earlier one aside, with all that is in the folder; choose another --out_dir"
MULTIPLE = "must be a multiple of batch_size"

WRONG_FLAGS = {
    "--max_lrr 1": "--max_lrr 1: no such flag; did you mean --max_lr?",
    "--max-lrr=1": "--max-lrr=1: no such flag; did you mean --max_lr?",
    "-seed 3": "-seed 3: no such flag; did you mean --seed?",
    "--Max_Steps 3": "--Max_Steps 3: no such flag; did you mean --max_steps?",
    "--dim 64": "--dim 64: no such flag; did you mean --model.dim?",
    "--model.n_layer 2": "--model.n_layer 2: no such flag; did you mean --model.n_layers?",
    "--quux 1": "--quux 1: no such flag; `python train.py --help` lists them",
    "--no-compile": "--no-compile: no such flag; did you mean --compile?",
    "--max_l 1": "--max_l 1: no such flag; did you mean --max_lr?",
    "-- --seed 3": "--: belongs to no flag; write --FIELD VALUE",
    "stray --seed 3": "stray: belongs to no flag; write --FIELD VALUE",
    "--seed 3 stray": "seed=3 stray: must be a whole number",
    "--out_dir my run": "out_dir=my run: must be one text, in quotes if it has spaces",
    "--max_lr": "max_lr: has no value; it must be a number",
    "--max_lr --seed 3": "max_lr: has no value; it must be a number",
    "--seed 1 --seed 2": "seed=1 and 2: given 2 times; give it once",
    "--max-lr 1 --max_lr=1": "max_lr=1 and 1: given 2 times; give it once",
    "--prompts a --prompts b": "prompts=a and b: given 2 times; give it once",
}
WRONG_TYPES = {
    "--max_lr abc": "max_lr=abc: must be a number",
    "--max_lr=": "max_lr=: must be a number",
    "--max_lr 1,5": "max_lr=1,5: must be a number",
    "--betas 0.9": "betas=0.9: must be two numbers",
    "--betas 0.9 0.95 0.99": "betas=0.9 0.95 0.99: must be two numbers",
    "--betas 0.9 b": "betas=0.9 b: must be two numbers",
    "--max_steps 1.5": "max_steps=1.5: must be a whole number",
    "--max_steps 1e3": "max_steps=1e3: must be a whole number",
    "--max_steps ten": "max_steps=ten: must be a whole number",
    "--optimizer sgd": "optimizer=sgd: must be adamw or muon",
    "--schedule linear": "schedule=linear: must be cosine or wsd",
    "--dtype float8": "dtype=float8: must be auto or bfloat16 or float16 or float32",
    "--compile maybe": "compile=maybe: must be True or False or auto",
    "--wandb_artifact yes": "wandb_artifact=yes: must be True or False",
    "--document_mask 2": "document_mask=2: must be True or False",
    "--dry_run perhaps": "dry_run=perhaps: must be True or False",
    "--model.dim 0x10": "model.dim=0x10: must be a whole number",
    "--model.dim 3.5": "model.dim=3.5: must be a whole number",
    "--model.ffn_dim_multiplier big": "model.ffn_dim_multiplier=big: must be a number or None",
    "--model.tie_embeddings no": "model.tie_embeddings=no: must be True or False",
    "--seed 'a\nb'": "seed='a\\nb': must be a whole number",
    f"--seed {'9' * 5000}": f"seed={'9' * 200}...: must be a whole number",
}
WRONG_VALUES = {
    "--max_lr nan": f"max_lr=nan: {FINITE}",
    "--max_lr -inf": f"max_lr=-inf: {FINITE}",
    "--muon_lr inf": f"muon_lr=inf: {FINITE}",
    "--weight_decay inf": f"weight_decay=inf: {FINITE}",
    "--grad_clip nan": f"grad_clip=nan: {FINITE}",
    "--temperature inf": f"temperature=inf: {FINITE}",
    "--top_p nan": "top_p=nan: must be above 0 and at most 1",
    "--top_p 0": "top_p=0.0: must be above 0 and at most 1",
    "--betas 0.9 1": "betas=(0.9, 1.0): both must be 0 or more and below 1",
    "--betas nan 0.9": "betas=(nan, 0.9): both must be 0 or more and below 1",
    "--min_lr_fraction 1.1": "min_lr_fraction=1.1: must be between 0 and 1",
    "--decay_fraction -0.1": "decay_fraction=-0.1: must be between 0 and 1",
    "--max_steps 0": "max_steps=0: must be at least 1",
    f"--max_steps {10**30}": f"max_steps={10**30}: {BILLION}",
    "--batch_size 0": "batch_size=0: must be at least 1",
    f"--batch_size {10**4000}": f"batch_size=1{'0' * 199}...: {BILLION}",
    f"--total_batch_size {10**4000}": f"total_batch_size=1{'0' * 199}...: {BILLION}",
    "--log_every 0": "log_every=0: must be at least 1",
    "--keep_checkpoints 0": "keep_checkpoints=0: must be at least 1",
    "--save_every -1": "save_every=-1: must be 0 or more",
    "--warmup_steps -1": "warmup_steps=-1: must be 0 or more",
    "--skip_nonfinite -1": "skip_nonfinite=-1: must be 0 or more",
    "--timeout 0": "timeout=0: must be at least 1",
    f"--timeout {10**12}": f"timeout={10**12}: must be at most 2,000,000, which is 23 days",
    "--seed -1": "seed=-1: must be 0 or more",
    f"--seed {10**30}": f"seed={10**30}: must be below 2^63",
    f"--val_tokens {2**63}": f"val_tokens={2**63}: must be below 2^63",
    "--prompts": "prompts=(): must hold at least one; --generate_every 0 goes without",
    f"--prompts '{'ab ' * 1024}'": f"prompts='{('ab ' * 100)[:199]}...: its ",
    "--device tpu": f"device=tpu: {DEVICES}",
    "--device ''": f"device=: {DEVICES}",
    "--device cuda:1000": f"device=cuda:1000: {DEVICES}",
    "--device cpu:3": f"device=cpu:3: {DEVICES}",
    "--device cuda:99": "device=cuda:99: ",  # no GPU, or not so many
    "--device mps": "device=mps: needs an Apple GPU and a single process; pass --device cpu",
}
WRONG_MODELS = {
    "--model.n_layers 0": f"model.n_layers=0: {SIZE}",
    f"--model.dim {10**400}": f"model.dim=1{'0' * 400}: {SIZE}",
    "--model.dim 770": "model.dim=770: must be a multiple of n_heads=16",
    "--model.dim 144": "model.dim=144: dim / n_heads = 9 must be even",
    "--model.n_kv_heads 3": "model.n_kv_heads=3: must divide n_heads=16",
    "--model.vocab_size 300": "model.vocab_size=300: must be 512 to 128256",
    "--model.vocab_size 128257": "model.vocab_size=128257: must be 512 to 128256",
    "--model.norm_eps inf": "model.norm_eps=inf: must be above 0 and below 1",
    "--model.rope_theta inf": "model.rope_theta=inf: must be positive, and finite",
    "--model.rope_scale inf": "model.rope_scale=inf: must be 1 (off) or more, and finite",
    "--model.ffn_dim_multiplier 1e308": "model.ffn_dim_multiplier=1e+308: must be above 0 and at most 1000",
    "--total_batch_size 65537": f"total_batch_size=65537: {MULTIPLE}=16 x 1 processes",
    "--total_batch_size 1024": f"total_batch_size=1024: {MULTIPLE}=16 x 1 processes",
    "--model.max_seq_len 1000": f"total_batch_size=65536: {MULTIPLE}=16 x 1 processes x model.max_seq_len=1000",
}
WRONG_PATHS = {
    "--out_dir ''": "out_dir=: must name a folder of the run's own",
    "--out_dir=~/run": "out_dir=~/run: write the folder that ~ stands for; the shell did not",
    "--out_dir rows.jsonl": "out_dir=rows.jsonl: cannot be written to (",
    "--out_dir rows.jsonl/a/b": "out_dir=rows.jsonl/a/b: cannot be written to (",
    "--out_dir damaged": "out_dir=damaged: cannot be written to (",
    "--out_dir dangling": "out_dir=dangling: cannot be written to (",
    f"--out_dir {'a' * 300}": f"out_dir={'a' * 200}...: cannot be written to (File name too long)",
    "--out_dir .": f"out_dir=.: the current folder {MOVED}",
    "--out_dir /": f"out_dir=/: the current folder {MOVED}",
    "--out_dir prepared": f"out_dir=prepared: data_root=prepared {MOVED}",
    "--out_dir nested --data_root prepared nested/prepared": f"out_dir=nested: data_root=nested/prepared {MOVED}",
    "--out_dir nested/../nested/ --hellaswag_path nested/rows.jsonl": (
        f"out_dir=nested/../nested/: hellaswag_path=nested/rows.jsonl {MOVED}"
    ),
    "--out_dir nested --init_from nested/model": f"out_dir=nested: init_from=nested/model {MOVED}",
    "--data_root nowhere": f"data_root=nowhere: {NOT_PREPARED}",
    "--data_root rows.jsonl": f"data_root=rows.jsonl: {NOT_PREPARED}",
    "--data_root prepared nowhere:2": f"data_root=nowhere: {NOT_PREPARED}",
    "--data_root ''": "data_root=: a folder has no name; give one that load_fineweb_dataset.py has prepared",
    "--data_root": "data_root: names no folder",
    "--data_root prepared:-1": "data_root: prepared:-1 is no path:weight with a weight above 0",
    f"--data_root {'a' * 300}": f"data_root={'a' * 200}...: {NOT_PREPARED}",
    "--hellaswag_path nowhere.jsonl": f"hellaswag_path=nowhere.jsonl: {NO_ROWS}",
    "--hellaswag_path prepared": f"hellaswag_path=prepared: {NO_ROWS}",
    "--hellaswag_path ''": f"hellaswag_path=: {NO_ROWS}",
    "--init_from nowhere": "init_from=nowhere: nowhere: no checkpoint there; give a run directory",
    "--init_from nested/model --model.dim 64": "model.dim=64: nested/model has 32; leave the flag out",
    "--resume runs/nowhere": f"resume=runs/nowhere: {NO_FOLDER}",
    "--resume yes": f"resume=yes: {NO_FOLDER}",
    "--resume 2": f"resume=2: {NO_FOLDER}",
    "--resume ''": f"resume=: {NO_FOLDER}",
}
CASES = WRONG_FLAGS | WRONG_TYPES | WRONG_VALUES | WRONG_MODELS | WRONG_PATHS


@pytest.mark.parametrize("flags", CASES, ids=lambda flags: flags[:60])
def test_a_wrong_configuration_is_refused_in_one_sentence(flags):
    assert_lines(refusal(command_line(flags)), [CASES[flags]])


def test_values_that_look_wrong_and_are_not_go_through():
    """A text may begin with "-" behind "=". A folder may be called true. Hyphens are right too."""
    Path("true").mkdir()
    words = command_line("--prompts=-a --resume ./true --max-steps=5 --muon_lr=1e-3 --save_every 0 --warmup_steps 715")
    cfg = read_config(words, CONFIGS)
    assert (cfg.prompts, cfg.resume, cfg.max_steps, cfg.muon_lr) == (("-a",), "./true", 5, 1e-3)
    cfg = read_config(command_line("--prompts '' '- a' --resume best --dry_run --allow-config-change"), CONFIGS)
    assert (cfg.prompts, cfg.resume, cfg.dry_run, cfg.allow_config_change) == (("", "- a"), "best", True, True)
    largest = f"--seed {2**63 - 1} --model.ffn_dim_multiplier None --timeout 2000000"
    cfg = read_config(command_line(largest), CONFIGS)
    torch.manual_seed(cfg.seed)
    timedelta(seconds=cfg.timeout)


def test_an_order_takes_true_or_false_or_nothing():
    assert read_config(command_line("--dry_run False --seed 5"), CONFIGS).dry_run is False
    assert_lines(refusal(command_line("--dry_run 2")), ["dry_run=2: must be True or False"])


# ---------------------------------------------------------------- the place of the process

TORCHRUN_CURE = "start the processes with torchrun, or unset it to train alone"
ALONE = (
    "so many tasks have no torchrun, and each would train alone; start one torchrun a node, as launch/slurm.sbatch does"
)
PLACES = [
    ({"WORLD_SIZE": "abc"}, [f"WORLD_SIZE=abc: must be a whole number, 1 or more; {TORCHRUN_CURE}"]),
    ({"WORLD_SIZE": "0"}, [f"WORLD_SIZE=0: must be a whole number, 1 or more; {TORCHRUN_CURE}"]),
    ({"WORLD_SIZE": ""}, ["WORLD_SIZE=: must be a whole number, 1 or more; "]),
    (TORCHRUN | {"WORLD_SIZE": "-2"}, ["WORLD_SIZE=-2: must be a whole number, 1 or more; "]),
    (TORCHRUN | {"RANK": "first"}, ["RANK=first: must be a whole number, 0 or more; "]),
    (TORCHRUN | {"RANK": "2"}, ["RANK=2: must be below the number of processes, WORLD_SIZE=2; "]),
    (
        TORCHRUN | {"LOCAL_RANK": "2"},
        ["LOCAL_RANK=2: must be below the number of processes here, LOCAL_WORLD_SIZE=2; "],
    ),
    (TORCHRUN | {"LOCAL_RANK": "1.0"}, ["LOCAL_RANK=1.0: must be a whole number, 0 or more; "]),
    (TORCHRUN | {"LOCAL_WORLD_SIZE": "0"}, ["LOCAL_WORLD_SIZE=0: must be a whole number, 1 or more; "]),
    (TORCHRUN | {"RANK": "a", "LOCAL_RANK": "b"}, ["RANK=a: must be a whole", "LOCAL_RANK=b: must be a whole"]),
    ({"RANK": "1"}, ["RANK=1: must be below the number of processes, WORLD_SIZE=1; "]),
    ({"LOCAL_RANK": "1"}, ["LOCAL_RANK=1: must be below the number of processes here, LOCAL_WORLD_SIZE=1; "]),
    (TORCHRUN | {"RANK": None}, ["WORLD_SIZE=2: RANK must be set too; start the processes with torchrun"]),
    (TORCHRUN | {"LOCAL_RANK": None}, ["WORLD_SIZE=2: LOCAL_RANK must be set too; start the processes with torchrun"]),
    (TORCHRUN | {"LOCAL_WORLD_SIZE": None}, ["WORLD_SIZE=2: LOCAL_WORLD_SIZE must be set too; "]),
    (
        TORCHRUN | {"MASTER_ADDR": None},
        ["WORLD_SIZE=2: MASTER_ADDR must be set too; start the processes with torchrun"],
    ),
    (
        TORCHRUN | {"MASTER_PORT": None},
        ["WORLD_SIZE=2: MASTER_PORT must be set too; start the processes with torchrun"],
    ),
    (TORCHRUN | {"MASTER_PORT": "http"}, ["MASTER_PORT=http: must be 1 to 65535; start the processes with torchrun"]),
    (TORCHRUN | {"MASTER_PORT": "70000"}, ["MASTER_PORT=70000: must be 1 to 65535; start the processes with torchrun"]),
    (
        {"WORLD_SIZE": "2"},
        ["WORLD_SIZE=2: RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT must be set too; "],
    ),
    ({"SLURM_STEP_NUM_TASKS": "8"}, [f"SLURM_STEP_NUM_TASKS=8: {ALONE}"]),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, [f"OMPI_COMM_WORLD_SIZE=4: {ALONE}"]),
    ({"PMI_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2"}, [f"SLURM_STEP_NUM_TASKS=2: {ALONE}"]),
]


@pytest.mark.parametrize(("variables", "expected"), PLACES, ids=str)
def test_a_process_without_a_place_is_refused(variables, expected, monkeypatch):
    for name, value in variables.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    assert_lines(refusal(command_line("")), expected)
    assert config.world_size() >= 1


@pytest.mark.parametrize(
    "variables",
    [
        TORCHRUN,
        TORCHRUN | {"SLURM_STEP_NUM_TASKS": "2"},
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "SLURM_STEP_NUM_TASKS": "4"},
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"},
        {"MASTER_ADDR": "node", "MASTER_PORT": "29500"},
    ],
    ids=str,
)
def test_a_place_that_torchrun_gives_is_taken_and_so_is_a_process_alone(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert read_config(command_line(""), CONFIGS).out_dir == "run"


@pytest.mark.parametrize("processes", [*range(1, 9), 11, 16, 33, 100])
def test_the_sample_runs_on_any_number_of_processes(processes, monkeypatch):
    """The block asks for the number of processes when train.py is imported, so it is imported anew."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    spec = importlib.util.spec_from_file_location("train_again", TRAIN)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    sample = again.SAMPLE
    assert config_errors(replace(sample, device="cpu", dtype="float32")) == []
    sequences = sample.total_batch_size / sample.model.max_seq_len
    assert sequences == sample.batch_size * processes  # one micro-step
    assert abs(sequences - 16) <= processes / 2 or sequences == processes
    if processes in (1, 2, 4, 8):
        assert sample.total_batch_size == 2048


@pytest.mark.parametrize(
    ("flags", "processes", "expected"),
    [
        ("--total_batch_size 16384", 2, "total_batch_size=16384: must be a multiple of batch_size=16 x 2 processes"),
        ("--total_batch_size 65536", 3, "total_batch_size=65536: must be a multiple of batch_size=16 x 3 processes"),
        ("--batch_size 5", 2, "total_batch_size=65536: must be a multiple of batch_size=5 x 2 processes"),
    ],
)
def test_a_batch_that_the_processes_cannot_share_is_refused(flags, processes, expected, monkeypatch):
    for name, value in (TORCHRUN | {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}).items():
        monkeypatch.setenv(name, value)
    [line] = refusal(command_line(flags))
    assert line.startswith(expected)
    would_do = int(line.removesuffix(" would do").rpartition(" ")[2])
    assert read_config(command_line(f"{flags.partition('--total')[0]} --total_batch_size {would_do}"), CONFIGS)


# ---------------------------------------------------------------- several problems at once

COMBINED = {
    "--max_lrr 1 --betas 0.9 --top_p 2": [
        WRONG_FLAGS["--max_lrr 1"],
        WRONG_TYPES["--betas 0.9"],
        "top_p=2.0: must be above 0",
    ],
    "stray --max_lr abc --seed 1 --seed 2 --device tpu --out_dir rows.jsonl": [
        "stray: belongs to no flag",
        WRONG_TYPES["--max_lr abc"],
        WRONG_FLAGS["--seed 1 --seed 2"],
        WRONG_VALUES["--device tpu"],
        WRONG_PATHS["--out_dir rows.jsonl"],
    ],
    "--prompts -a --max_steps": [
        "-a: no such flag; `python train.py --help` lists them; a text that begins with - goes behind =",
        "prompts=(): must hold at least one",
        "max_steps: has no value; it must be a whole number",
    ],
    "--data_root nowhere --hellaswag_path nowhere --init_from nowhere --resume nowhere --out_dir rows.jsonl/run": [
        WRONG_PATHS["--data_root nowhere"],
        "hellaswag_path=nowhere: no such file",
        WRONG_PATHS["--init_from nowhere"],
        "resume=nowhere: no such folder",
        "out_dir=rows.jsonl/run: cannot be written to (",
    ],
    "--model.dim 770 --model.norm_eps x --total_batch_size 3 --max_step 5": [
        WRONG_MODELS["--model.dim 770"],
        "model.norm_eps=x: must be a number",
        "total_batch_size=3: must be a multiple of batch_size=16",
        "--max_step 5: no such flag; did you mean --max_steps?",
    ],
    f"--model.dim 0 --model.n_layers {10**30} --batch_size -2 --timeout {10**12} --log_every 0": [
        f"model.dim=0: {SIZE}",
        f"model.n_layers={10**30}: {SIZE}",
        "batch_size=-2: must be at least 1",
        f"timeout={10**12}: must be at most 2,000,000",
        "log_every=0: must be at least 1",
    ],
    # A field that cannot be read still has its default. No sentence may speak of that value.
    "--batch_size abc --total_batch_size 1025 --model.n_heads x --model.dim 770 --seed -1": [
        "batch_size=abc: must be a whole number or auto",
        "model.n_heads=x: must be a whole number",
        "seed=-1: must be 0 or more",
    ],
}


@pytest.mark.parametrize("flags", COMBINED, ids=lambda flags: flags[:60])
def test_all_problems_stand_in_one_message(flags):
    assert_lines(refusal(command_line(flags)), COMBINED[flags])


def test_a_wrong_place_does_not_hide_the_other_problems(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "abc")
    lines = refusal(command_line("--max_lrr 1 --top_p 2 --resume yes"))
    assert_lines(lines, ["WORLD_SIZE=abc: ", "--max_lrr 1: ", "top_p=2.0: ", "resume=yes: "])


def test_the_sample_is_checked_too_where_nothing_is_prepared(capsys):
    """A file of rows that the sample run would not write; and no talk of the sample before a refusal."""
    lines = refusal(shlex.split("--hellaswag_path nowhere.jsonl --device cpu --max_lr abc"))
    assert_lines(lines, [f"hellaswag_path=nowhere.jsonl: {NO_ROWS}", WRONG_TYPES["--max_lr abc"]])
    assert capsys.readouterr() == ("", "")
    assert read_config(["--device", "cpu"], CONFIGS).data_root == SAMPLE.data_root
    assert capsys.readouterr().out.startswith("configuration: sample; `python load_fineweb_dataset.py` prepares")


def test_a_folder_that_refuses_files_is_found_without_its_mode_bits(monkeypatch):
    """Root may write everywhere. A network disk may refuse even root."""

    def refuse(dir):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(config, "TemporaryFile", refuse)
    expected = "out_dir=run: cannot be written to (Permission denied); choose another --out_dir"
    assert_lines(refusal(command_line("")), [expected])


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_proc_takes_no_run():
    assert_lines(refusal(command_line("--out_dir /proc/run")), ["out_dir=/proc/run: cannot be written to ("])


def test_tensorboard_is_looked_for_before_the_run(monkeypatch):
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    expected = "tensorboard=True: the package is not installed; `pip install tensorboard`, or leave the flag out"
    assert_lines(refusal(command_line("--tensorboard True")), [expected])


# ---------------------------------------------------------------- train.py itself


def start(words: list[str], variables: dict[str, str] | None = None) -> subprocess.Popen:
    """train.py in a process of its own, in which a process group would be an error with a traceback."""
    code = (
        "import sys, runpy, torch.distributed as dist\n"
        "def fail(*args, **kwargs): raise SystemError('a process group')\n"
        f"dist.init_process_group = fail\nsys.argv[0] = {str(TRAIN)!r}\nsys.path.insert(0, {str(TRAIN.parent)!r})\n"
        f"runpy.run_path({str(TRAIN)!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", code, *words]
    environment, pipe = os.environ | (variables or {}), subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("flags", list(COMBINED)[:3])
def test_train_py_prints_the_message_and_ends_with_status_1(flags):
    before = tree()
    process = start(command_line(flags))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.startswith("train.py: ")
    assert_lines(err.removeprefix("train.py: ").splitlines(), COMBINED[flags])
    assert tree() == before


@pytest.mark.parametrize(
    ("port", "said"),
    [
        ("29500", ["--max_lrr 1: no", "top_p=2.0: ", "resume=yes: "]),
        ("", ["WORLD_SIZE=2: MASTER_PORT must", "--max_lrr 1"]),
    ],
)
def test_two_processes_are_refused_before_any_process_group(port, said):
    """The message is the same on both, so the first one alone prints it."""
    before, words = tree(), command_line("--max_lrr 1 --top_p 2 --resume yes")
    ranks = [TORCHRUN | {"RANK": str(n), "LOCAL_RANK": str(n), "MASTER_PORT": port} for n in range(2)]
    processes = [start(words, variables) for variables in ranks]
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert results[1] == ("", "") and results[0][0] == ""
    for start_of_line in said:
        assert any(line.removeprefix("train.py: ").startswith(start_of_line) for line in results[0][1].splitlines())
    assert tree() == before


@pytest.mark.parametrize(
    "variables",
    [{"LOCAL_RANK": "1"}, TORCHRUN | {"RANK": "5", "LOCAL_RANK": "1"}, {"WORLD_SIZE": "x", "LOCAL_RANK": "1"}],
)
def test_a_process_with_an_impossible_place_does_not_end_in_silence(variables, monkeypatch, capsys):
    """Otherwise local rank 0 alone prints. Here no process may be that one."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py", *command_line("")])
    assert train.main() == 1
    assert "must be" in capsys.readouterr().err


def test_help_goes_on_to_be_printed_even_beside_wrong_flags(capsys):
    with pytest.raises(SystemExit) as end:
        read_config(["--max_lrr", "1", "--help"], CONFIGS)
    assert end.value.code == 0
    printed = capsys.readouterr()
    assert "--max_lr" in printed.out and printed.err == ""


def test_a_refusal_takes_seconds_beyond_the_import_of_torch():
    """The target is 3 seconds. The bound is wider, because other programs may have the cores."""
    seconds = []
    for command in (["-c", "import torch"], [str(TRAIN), *command_line(list(COMBINED)[1])]):
        began = time.perf_counter()
        result = subprocess.run([sys.executable, *command], capture_output=True, timeout=120)
        seconds.append(time.perf_counter() - began)
    assert result.returncode == 1
    print(f"import torch takes {seconds[0]:.2f} s, and a refusal {seconds[1] - seconds[0]:.2f} s more")
    assert seconds[1] - seconds[0] < 10
