"""What a run may be told: the fields, their flags, and the values that are refused. train.py holds the values."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from dataloaders import folder_quotas
from hardware import dtype_name, fastest_dtype, pick_device
from model import ModelConfig, model_errors
from model_folders import find_checkpoint, read_model_config
from shards import is_prepared
from tokenizer import VOCAB_SIZES


@dataclass
class Config:
    # Data
    data_root: str | tuple[str, ...]  # prepared folder; or several to mix, as path:weight
    hellaswag_path: str  # file that load_hellaswag_dataset.py fetched
    out_dir: str  # folder of this run: metrics, samples, checkpoints
    document_mask: bool  # attention stays within a document, as Llama 3 was trained; slower on long sequences

    # Batch and length of the run
    total_batch_size: int  # tokens an optimizer step, over all processes
    batch_size: int  # sequences a micro-step in each process; lower it when memory runs out
    max_steps: int  # optimizer steps

    # Optimizer
    optimizer: Literal["adamw", "muon"]  # muon: for the matrices of the blocks, AdamW for the rest
    max_lr: float  # AdamW's peak learning rate
    muon_lr: float  # Muon's peak learning rate, on a scale of its own; with optimizer=muon alone
    betas: tuple[float, float]  # AdamW's decay of the first and second moments
    weight_decay: float  # on matrices alone
    grad_clip: float  # largest norm of the whole gradient; 0 does not clip

    # Learning-rate schedule
    schedule: Literal["cosine", "wsd"]  # wsd: warm up, hold, decay at the end
    warmup_steps: int  # steps of linear warm-up
    min_lr_fraction: float  # learning rate at the last step, as a share of the peak
    decay_fraction: float  # with wsd: share of the steps that decay

    # Device
    device: str  # auto, cpu, cuda, cuda:N or mps
    dtype: Literal["auto", "bfloat16", "float32"]  # of the matrix products; auto: bfloat16 where it is fast
    compile: bool | Literal["auto"]  # torch.compile; auto: where a compiler is found
    seed: int  # of the initial weights and of the order of the data
    timeout: int  # seconds that ranks wait for a rank that has fallen silent

    # Along the way. An interval of 0 switches that activity off. The end of a run is always validated and saved.
    log_every: int  # steps between printed lines; metrics.jsonl has every step
    val_every: int  # steps between validations
    val_tokens: int  # tokens of the validation shard that each one reads
    hellaswag_every: int  # steps between HellaSwag evaluations
    hellaswag_limit: int  # rows of it that count; 0 is all 10,042
    generate_every: int  # steps between continuations of the prompts, into samples.txt
    save_every: int  # steps between checkpoints
    keep_checkpoints: int  # newest ones kept, besides the best
    profile: int  # steps recorded with torch.profiler, into the folder of the run; 0 records none
    resume: bool | str  # True: go on from the newest checkpoint in out_dir, if there is one; best; or a path
    skip_nonfinite: int  # updates in a row that may be left out because a loss or gradient is not finite; 0: none
    init_from: str  # Llama 3 in Hugging Face's layout, or a checkpoint, whose weights a new run begins with; "": none

    # Generation
    prompts: tuple[str, ...]  # texts to continue
    generate_tokens: int  # tokens for each prompt
    temperature: float  # 0 takes the likeliest token
    top_p: float  # probability of the nucleus that tokens are drawn from

    # Weights & Biases, used where WANDB_API_KEY is set; and TensorBoard
    wandb_project: str  # project that the run appears in
    wandb_artifact: bool  # upload the last checkpoint of a finished run
    tensorboard: bool  # write event files into out_dir/tensorboard; needs `pip install tensorboard`

    # The model; its fields are flags too, --model.dim and so on
    model: ModelConfig

    # Orders, not settings: no record of a run has them. `--dry_run` alone means `--dry_run True`.
    dry_run: bool = False  # show what the run will take, and stop; writes nothing
    allow_config_change: bool = False  # go on although a field that changes the result differs from the checkpoint's


ORDERS = ("dry_run", "allow_config_change")


def config_as_dict(config: Any) -> dict:
    """A configuration as plain JSON data, as the records of a run hold it."""
    values = asdict(config)
    for order in ORDERS:
        values.pop(order, None)
    return json.loads(json.dumps(values))


# ---------------------------------------------------------------- torchrun's environment
# It tells the place of this process before any process group exists, so the configuration can be checked first.


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def local_device(name: str) -> torch.device:
    """`pick_device(name)` for the place of this process. No process group works over Apple's mps, on any machine."""
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    return pick_device(name, (local_rank(), local_world_size) if world_size() > 1 else None)


# ---------------------------------------------------------------- refusals

POSITIVE = ("total_batch_size", "batch_size", "max_steps", "log_every", "val_tokens", "keep_checkpoints")
POSITIVE += ("generate_tokens", "timeout")
NOT_NEGATIVE = ("val_every", "hellaswag_every", "generate_every", "save_every", "hellaswag_limit", "warmup_steps")
NOT_NEGATIVE += ("seed", "profile", "skip_nonfinite")

# Fields, what is true of a value that can be honoured, and the sentence for any other value.
REFUSALS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (POSITIVE, lambda value: value >= 1, "must be at least 1"),
    (NOT_NEGATIVE, lambda value: value >= 0, "must be 0 or more"),
    (
        ("max_lr", "muon_lr", "grad_clip", "weight_decay", "temperature"),
        lambda value: 0 <= value < math.inf,
        "must be 0 or more",
    ),
    (("min_lr_fraction", "decay_fraction"), lambda value: 0 <= value <= 1, "must be between 0 and 1"),
    (("top_p",), lambda value: 0 < value <= 1, "must be above 0 and at most 1"),
    (
        ("betas",),
        lambda value: all(0 <= beta < 1 for beta in value),
        "both must be 0 or more and below 1",
    ),
)


def config_errors(cfg: Config) -> list[str]:
    """One sentence for every field that cannot be honoured: its name, its value, the cure."""
    errors = [f"model.{error}" for error in model_errors(cfg.model)]
    if cfg.model.vocab_size not in VOCAB_SIZES:
        errors.append(f"model.vocab_size={cfg.model.vocab_size}: must be {VOCAB_SIZES[0]} to {VOCAB_SIZES[-1]}")
    for names, is_right, sentence in REFUSALS:
        errors += [f"{name}={value}: {sentence}" for name in names if not is_right(value := getattr(cfg, name))]
    if cfg.generate_every and not cfg.prompts:
        errors.append("prompts=(): must hold at least one; --generate_every 0 goes without")
    tokens = cfg.batch_size * world_size() * cfg.model.max_seq_len  # of one micro-step
    if tokens > 0 and cfg.total_batch_size % tokens:
        nearest = max(1, round(cfg.total_batch_size / tokens)) * tokens
        errors.append(
            f"total_batch_size={cfg.total_batch_size}: must be a multiple of batch_size={cfg.batch_size} x "
            f"{world_size()} processes x model.max_seq_len={cfg.model.max_seq_len} = {tokens}; {nearest} would do"
        )
    try:
        device = local_device(cfg.device)
        if cfg.dtype == "bfloat16" and device.type == "cuda" and fastest_dtype(device) == torch.float32:
            errors.append(f"dtype={cfg.dtype}: this GPU has none; pass --dtype float32")
    except ValueError as error:
        errors.append(str(error))
    return errors


# ---------------------------------------------------------------- flags


def with_model_of(cfg: Config, args: list[str]) -> tuple[Config, list[str]]:
    """`cfg` with the model that `init_from` names, and a sentence for each flag in `args` that it contradicts.

    The sequence length stays that of the run.
    """
    try:
        model, _ = read_model_config(find_checkpoint(cfg.init_from))
    except (ValueError, OSError) as error:
        return cfg, [f"init_from={cfg.init_from}: {error}"]
    given = {arg.partition("=")[0].lstrip("-").replace("-", "_") for arg in args}
    errors = [
        f"model.{name}={asked}: {cfg.init_from} has {value}; leave the flag out"
        for name, value in asdict(model).items()
        if name != "max_seq_len" and f"model.{name}" in given and (asked := getattr(cfg.model, name)) != value
    ]
    length = cfg.model.max_seq_len
    if length > model.max_seq_len:
        errors.append(f"model.max_seq_len={length}: {cfg.init_from} has only {model.max_seq_len} positions; lower it")
    return replace(cfg, model=replace(model, max_seq_len=length)), errors


def spell_out_orders(args: list[str]) -> list[str]:
    """`args` with a True after each order that has no value. The other flags always take one."""
    words = []
    for place, word in enumerate(args):
        words.append(word)
        if word.lstrip("-").replace("-", "_") in ORDERS and args[place + 1 : place + 2] not in (["True"], ["False"]):
            words.append("True")
    return words


def read_config(args: list[str], original: Config, sample: Config, description: str | None = None) -> Config:
    """`original` with the flags in `args`; `sample` with them where the original's data is not prepared.

    Raises:
        ValueError: fields that cannot be honoured, all of them in one message.
        SystemExit: a flag that does not exist, or --help.
    """
    parse = partial(
        tyro.cli, Config, args=spell_out_orders(args), use_underscores=True, config=(tyro.conf.FlagConversionOff,)
    )
    cfg, sample = parse(default=original, description=description), parse(default=sample)
    errors = []
    data_given = cfg.data_root == sample.data_root  # the two configurations differ in it, unless a flag set it
    hellaswag_given = cfg.hellaswag_path == sample.hellaswag_path
    missing = []
    try:
        missing = [folder for folder in folder_quotas(cfg.data_root) if not is_prepared(folder)]
    except ValueError as error:
        errors.append(str(error))
    if missing and data_given:
        errors += [f"data_root={m}: not a prepared folder; load_fineweb_dataset.py makes one" for m in missing]
    elif missing:
        if rank() == 0:
            print(f"{cfg.data_root} is not prepared: `python load_fineweb_dataset.py` prepares 10 billion tokens.")
            print("Training the sample configuration instead: a small Llama 3 on the Python standard library.")
        cfg = sample
    if cfg is not sample and cfg.hellaswag_every and not Path(cfg.hellaswag_path).is_file():
        cure = "`python load_hellaswag_dataset.py` fetches HellaSwag; --hellaswag_every 0 goes without"
        if hellaswag_given:
            errors.append(f"hellaswag_path={cfg.hellaswag_path}: no such file; {cure}")
        else:
            if rank() == 0:
                print(f"{cfg.hellaswag_path} is not there, so this run goes without it; {cure}")
            cfg = replace(cfg, hellaswag_every=0)
    if cfg.init_from:
        cfg, found = with_model_of(cfg, args)
        errors += found
    errors += config_errors(cfg)
    if errors:
        raise ValueError("\n".join(errors))
    if cfg.dtype == "auto":  # the records of a run say which dtype it was
        cfg = replace(cfg, dtype=dtype_name(fastest_dtype(local_device(cfg.device))))
    return cfg


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\n`python train.py --help` lists them.")
