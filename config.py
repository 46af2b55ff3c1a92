"""What a run may be told: the fields, their flags, and the values that are refused. train.py holds the values."""

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

import torch

from command_line import shown
from dataloaders import folder_quotas
from environment import local_rank, local_world_size, world_size
from hardware import has_in_hardware, pick_device
from model import ModelConfig, model_errors
from tokenizer import VOCAB_SIZES, Tokenizer


@dataclass(kw_only=True)
class Config:
    config: str = ""  # named configuration whose values are the defaults; train.py has them

    # Data
    data_root: str | tuple[str, ...]  # prepared folder; or several to mix, as path:weight
    hellaswag_path: str  # file that load_hellaswag_dataset.py fetched
    out_dir: str  # folder of this run: metrics, samples, checkpoints
    document_mask: bool  # attention stays within a document, as Llama 3 was trained; slower on long sequences

    # Batch and length of the run
    total_batch_size: int  # tokens an optimizer step, over all processes
    # Sequences a micro-step in each process; lower it when memory runs out. auto: the largest power of two that fits,
    # found by updates on random ids before the run; on a CPU one that surely fits
    batch_size: int | Literal["auto"]
    max_steps: int  # optimizer steps

    # Optimizer. None: what the optimizer's recipe has, see RECIPES in optimizers.py
    optimizer: Literal["adamw", "muon"]  # muon: for the matrices of the blocks, AdamW for the rest
    max_lr: float | None = None  # AdamW's peak learning rate, for every role whose own flag is not given
    embedding_lr: float | None = None  # peak of the embedding
    output_lr: float | None = None  # peak of the output layer, if its weights are its own
    norm_lr: float | None = None  # peak of the norms' scales
    muon_lr: float | None = None  # peak of the blocks' matrices, on a scale of its own; with optimizer=muon alone
    betas: tuple[float, float] | None = None  # AdamW's decay of the first and second moments
    weight_decay: float | None = None  # on matrices alone; with optimizer=muon on those of the blocks alone
    grad_clip: float  # largest norm of the whole gradient; 0 does not clip

    # Learning-rate schedule. None: the recipe's
    schedule: Literal["cosine", "wsd"] | None = None  # wsd: warm up, hold, decay at the end
    warmup_steps: int | None = None  # steps of linear warm-up; None: a share of max_steps
    min_lr_fraction: float | None = None  # learning rate at the end, as a share of the peak
    decay_fraction: float | None = None  # with wsd: share of the steps that decay

    # Device
    device: str  # auto, cpu, cuda, cuda:N or mps
    dtype: Literal["auto", "bfloat16", "float16", "float32"]  # of the matrix products; auto: the fastest here
    tf32: bool  # on CUDA with dtype=float32: round the factors of products to 10 bits of mantissa; faster
    compile: bool | Literal["auto"]  # torch.compile; auto: where a compiler is found
    # The inside of every second block (blocks) or of each (all) is not kept for the backward pass, but computed again
    # there: less memory, slower, the same numbers
    activation_checkpointing: Literal["none", "blocks", "all"]
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
    resume: bool | str  # True: go on from the newest checkpoint in out_dir, if there is one. best, a path: go back
    # Updates in a row that may be left out because a loss or gradient is not finite. 0: none. Overflows of float16 that
    # a smaller loss scale may mend do not count
    skip_nonfinite: int
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

    # Orders, not settings
    dry_run: bool = False  # show what the run will take, and stop; writes nothing
    allow_config_change: bool = False  # go on although a field that changes the result differs from the checkpoint's


ORDERS = ("config", "dry_run", "allow_config_change")  # no record of a run has them, and no resume compares them


def config_as_dict(config: Any) -> dict:
    """A configuration as plain JSON data, as the records of a run hold it."""
    values = asdict(config)
    for order in ORDERS:
        values.pop(order, None)
    return json.loads(json.dumps(values))


def local_device(name: str) -> torch.device:
    """`pick_device(name)` for the place of this process. No process group works over Apple's mps, on any machine."""
    return pick_device(name, (local_rank(), local_world_size()) if world_size() > 1 else None)


# What a resumed run may change at will. None of it changes the parameters that come out, up to rounding.
FREE = {"out_dir", "hellaswag_path", "batch_size", "device", "compile", "timeout", "log_every", "val_every"}
FREE |= {"hellaswag_every", "hellaswag_limit", "generate_every", "save_every", "keep_checkpoints", "profile", "resume"}
FREE |= {"skip_nonfinite", "init_from", "prompts", "generate_tokens", "temperature", "top_p", "wandb_project"}
FREE |= {"activation_checkpointing", "wandb_artifact", "tensorboard"}
FREE |= {"data_root"}  # data may have moved: the windows compare what is in it


def flat(config: dict) -> dict:
    """`config` with the fields of the model beside the others, as `model.dim`."""
    return {k: v for k, v in config.items() if k != "model"} | {f"model.{k}": v for k, v in config["model"].items()}


# ---------------------------------------------------------------- refusals of values

RATES = ("max_lr", "embedding_lr", "output_lr", "norm_lr", "muon_lr")
# Fields that the oldest checkpoints lack, and the values that their runs had.
LATER_FIELDS = dict.fromkeys(RATES) | {"tf32": False}
POSITIVE = ("total_batch_size", "batch_size", "max_steps", "log_every", "val_tokens", "keep_checkpoints")
POSITIVE += ("generate_tokens", "timeout")
NOT_NEGATIVE = ("val_every", "hellaswag_every", "generate_every", "save_every", "hellaswag_limit", "warmup_steps")
NOT_NEGATIVE += ("seed", "profile", "skip_nonfinite")
BIG = ("seed", "val_tokens", "hellaswag_limit")  # no sum or product of them must fit 64 bits
LARGEST = 10**9  # max_steps x total_batch_size, the tokens of a run, fit 64 bits

# Fields, what is true of a value that can be honoured, and the sentence for any other value.
REFUSALS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (POSITIVE, lambda value: value >= 1, "must be at least 1"),
    (NOT_NEGATIVE, lambda value: value >= 0, "must be 0 or more"),
    (BIG, lambda value: value < 2**63, "must be below 2^63"),
    (
        tuple(name for name in POSITIVE + NOT_NEGATIVE if name not in (*BIG, "timeout")),
        lambda value: value <= LARGEST,
        f"must be at most {LARGEST:,}",
    ),
    (("timeout",), lambda value: value <= 2_000_000, "must be at most 2,000,000, which is 23 days"),  # 2^31 ms
    (
        (*RATES, "grad_clip", "weight_decay", "temperature"),
        lambda value: 0 <= value < math.inf,
        "must be 0 or more, and finite",
    ),
    (("min_lr_fraction", "decay_fraction"), lambda value: 0 <= value <= 1, "must be between 0 and 1"),
    (("top_p",), lambda value: 0 < value <= 1, "must be above 0 and at most 1"),
    (
        ("betas",),
        lambda value: all(0 <= beta < 1 for beta in value),
        "both must be 0 or more and below 1",
    ),
    (
        ("device",),
        lambda value: re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,2})?", value),
        "must be auto, cpu, cuda, cuda:N or mps",
    ),
    (("out_dir",), lambda value: value != "", "must name a folder of the run's own"),
    (("out_dir",), lambda value: not value.startswith("~"), "write the folder that ~ stands for; the shell did not"),
)


def config_errors(cfg: Config) -> list[str]:
    """One sentence for every field that cannot be honoured: its name, its value, the cure. The disk is not asked."""
    errors = [f"model.{error}" for error in model_errors(cfg.model)]
    if cfg.model.vocab_size not in VOCAB_SIZES:
        errors.append(f"model.vocab_size={cfg.model.vocab_size}: must be {VOCAB_SIZES[0]} to {VOCAB_SIZES[-1]}")
    for names, is_right, sentence in REFUSALS:
        # What is None or auto gets its value later.
        values = {name: value for name in names if (value := getattr(cfg, name)) not in (None, "auto")}
        errors += [f"{name}={shown(value)}: {sentence}" for name, value in values.items() if not is_right(value)]
    refused = {error.partition("=")[0] for error in errors}
    sequences = 1 if cfg.batch_size == "auto" else cfg.batch_size
    tokens = sequences * world_size() * cfg.model.max_seq_len  # of one micro-step
    if not refused & {"batch_size", "total_batch_size", "model.max_seq_len"} and cfg.total_batch_size % tokens:
        nearest = max(1, round(cfg.total_batch_size / tokens)) * tokens
        errors.append(
            f"total_batch_size={cfg.total_batch_size}: must be a multiple of batch_size={sequences} x "
            f"{world_size()} processes x model.max_seq_len={cfg.model.max_seq_len} = {tokens}; {nearest} would do"
        )
    if cfg.generate_every and not cfg.prompts:
        errors.append("prompts=(): must hold at least one; --generate_every 0 goes without")
    if not refused & {"model.max_seq_len", "model.vocab_size"}:
        errors += prompt_errors(cfg)
    if cfg.tensorboard and find_spec("tensorboard") is None:
        errors.append(
            "tensorboard=True: the package is not installed; `pip install tensorboard`, or leave the flag out"
        )
    if "device" not in refused:
        errors += device_errors(cfg)
    return errors


def device_errors(cfg: Config) -> list[str]:
    """A sentence for a device that is not there; else for each dtype that it lacks."""
    try:
        device = local_device(cfg.device)
    except ValueError as error:
        return [str(error)]
    errors, is_cuda = [], device.type == "cuda"
    if is_cuda and cfg.dtype != "auto" and not has_in_hardware(device, getattr(torch, cfg.dtype)):
        errors.append(f"dtype={cfg.dtype}: this GPU has none in hardware; leave it out, or pass --dtype float32")
    # A GPU with bfloat16 has TF32, too.
    if cfg.tf32 and not (is_cuda and cfg.dtype == "float32" and has_in_hardware(device, torch.bfloat16)):
        what = "only products in float32 on CUDA, from compute capability 8.0 on, can use it"
        errors.append(f"tf32=True: {what}; pass --dtype float32 on such a GPU, or leave it out")
    return errors


def prompt_errors(cfg: Config) -> list[str]:
    """A sentence for every prompt that leaves no place for a continuation."""
    length = cfg.model.max_seq_len
    # A token has at least one byte, so few prompts need the tokenizer, which takes long to load.
    long = [text for text in cfg.prompts if len(text.encode("utf-8", "surrogatepass")) + 1 >= length]
    if not (cfg.generate_every and long):
        return []
    tokenizer = Tokenizer(vocab_size=cfg.model.vocab_size)
    counts = {text: len(tokenizer.encode(text, bos=True)) for text in long}
    return [
        f"prompts={shown(repr(text))}: its {count} tokens fill model.max_seq_len={length}; shorten it, or raise "
        "--model.max_seq_len"
        for text, count in counts.items()
        if count >= length
    ]


# ---------------------------------------------------------------- refusals of paths


def path_errors(cfg: Config) -> list[str]:
    """A sentence for out_dir and for resume if they cannot be honoured. Nothing is created."""
    errors = []
    if cfg.out_dir:  # "" is refused with the values
        if cause := folder_error(Path(cfg.out_dir) / "checkpoints"):
            errors.append(f"out_dir={shown(cfg.out_dir)}: cannot be written to ({cause}); choose another --out_dir")
        elif held := next(held_by(cfg), None):
            errors.append(
                f"out_dir={shown(cfg.out_dir)}: {held} is in it, and a new run moves an earlier one aside, with all "
                "that is in the folder; choose another --out_dir"
            )
    if isinstance(cfg.resume, str) and cfg.resume != "best" and (not cfg.resume or not os.path.exists(cfg.resume)):
        cure = "give a checkpoint, a run directory, best, True or False"
        errors.append(f"resume={shown(cfg.resume)}: no such folder; {cure}")
    return errors


def folder_error(folder: Path) -> str:
    """Why `folder` cannot be made and written to; "" if it can.

    The mode bits do not tell it: root, network disks and /proc have rules of their own. So a file without a name is
    opened in the nearest folder that is there.
    """
    try:
        for place in (folder.absolute(), *folder.absolute().parents):
            try:
                os.lstat(place)
            except (FileNotFoundError, NotADirectoryError):
                continue
            if not place.is_dir():
                return f"{place} is not a folder"
            with TemporaryFile(dir=place):
                return ""
    except OSError as error:
        return error.strerror or str(error)
    return "no such disk"


def held_by(cfg: Config) -> Iterator[str]:
    """What out_dir holds, or is, that is not the run's own: the current folder, data, a model."""
    out_dir, paths = Path(os.path.realpath(cfg.out_dir)), [("the current folder", os.getcwd())]
    with suppress(ValueError):  # data_errors has a sentence for it
        paths += [(f"data_root={shown(folder)}", folder) for folder in folder_quotas(cfg.data_root)]
    if cfg.hellaswag_every:
        paths.append((f"hellaswag_path={shown(cfg.hellaswag_path)}", cfg.hellaswag_path))
    if cfg.init_from:
        paths.append((f"init_from={shown(cfg.init_from)}", cfg.init_from))
    for name, path in paths:
        if path and Path(os.path.realpath(path)).is_relative_to(out_dir):
            yield name


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\n`python train.py --help` lists them.")
