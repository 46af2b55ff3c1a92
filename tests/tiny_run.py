"""A corpus, questions and flags of a run that takes a second or two, and `train.py` as a subprocess of a test."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from preparation import prepare

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "train.py"
STEPS, VOCAB, TOKENS_PER_STEP = 40, 512, 256
# Variables of Weights & Biases, the hub and torchrun, which the developer's shell may hold.
FOREIGN = ("WANDB_", "HF_TOKEN", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_", "TORCHELASTIC_")


def tiny_corpus(folder: Path) -> Path:
    """Random words: about 8,100 training tokens, so that 40 steps of 256 cross from one epoch into the next."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 7))) for _ in range(100)]
    for i in range(5):
        (folder / f"{i}.txt").write_text(" ".join(draw.choices(words, k=380)))
    root = folder / "prepared"
    files = [str(folder / f"{i}.txt") for i in range(5)]
    manifest = prepare(files[1:], root, vocab_size=VOCAB, val_source=files[:1], show_progress=False)
    training_tokens = manifest["shards"][1]["tokens"]
    assert 20 * TOKENS_PER_STEP < training_tokens < STEPS * TOKENS_PER_STEP
    return root


def write_questions(folder: Path) -> Path:
    """Four questions in HellaSwag's format."""
    path = folder / "hellaswag_val.jsonl"
    with open(path, "w") as file:
        for label in range(4):
            row = {"ctx": "the cat sat", "endings": ["on a mat", "in a hat", "by a bat", "at a vat"], "label": label}
            file.write(json.dumps(row) + "\n")
    return path


def tiny_flags(corpus: Path, questions: Path, out_dir: Path, **changes: Any) -> list[str]:
    """The flags of a run of 40 steps into `out_dir`. `changes` are fields: max_steps=3, model__dim=64."""
    fields = {
        "data_root": corpus,
        "hellaswag_path": questions,
        "out_dir": out_dir,
        "model.dim": 32,
        "model.n_layers": 2,
        "model.n_heads": 4,
        "model.n_kv_heads": 2,
        "model.vocab_size": VOCAB,
        "model.multiple_of": 32,
        "model.max_seq_len": 32,
        "batch_size": 2,
        "total_batch_size": TOKENS_PER_STEP,  # 4 micro-steps on one process, 2 on two
        "max_steps": STEPS,
        "optimizer": "adamw",
        "warmup_steps": 4,
        "max_lr": 1e-3,
        "device": "cpu",
        "dtype": "float32",
        "compile": False,
        "val_every": 10,
        "val_tokens": 512,
        "hellaswag_every": 0,
        "generate_every": 0,
        "generate_tokens": 8,
        "prompts": ["abc", "the "],
        "save_every": 20,
    }
    fields |= {name.replace("__", "."): value for name, value in changes.items()}
    words = []
    for name, value in fields.items():
        words += [f"--{name}", *([str(v) for v in value] if isinstance(value, list) else [str(value)])]
    return words


def plain_environment(**changes: str) -> dict[str, str]:
    """This process's environment without Weights & Biases, the hub and torchrun; one thread; then `changes`."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    return env | {"OMP_NUM_THREADS": "1"} | changes


def start_run(flags: list[str], *, script: Path = TRAIN, env: dict[str, str] | None = None, **popen: Any):
    """Start `python train.py FLAGS`, a Popen. Its output goes to pipes, as bytes, unless `popen` says otherwise."""
    popen = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | popen
    return subprocess.Popen([sys.executable, str(script), *flags], env=env or plain_environment(), **popen)


def changed(flags: list[str], *extra: str) -> list[str]:
    """`flags` with the pairs `extra`, in the place of those of the same name."""
    names = {word for word in extra if word.startswith("--")}
    dropped = {i for i, word in enumerate(flags) if word in names}
    return [word for i, word in enumerate(flags) if i not in dropped and i - 1 not in dropped] + [*extra]
