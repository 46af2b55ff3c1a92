"""What a run reads, opened and checked before it begins: training windows, validation, HellaSwag."""

from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch

import hellaswag_utils
from config import Config
from dataloaders import BLOCK, BatchLayout, TrainWindows, digest_of, open_streams, validation_batches
from hardware import has_in_hardware
from load_hellaswag_dataset import write_sample
from preparation import prepare
from processes import Process, run_on_rank_zero
from records import Records
from shards import TokenStream, is_prepared
from tokenizer import Tokenizer


@dataclass
class RunData:
    """What a run reads."""

    tokenizer: Tokenizer
    windows: TrainWindows  # training batches
    val_streams: list[TokenStream]
    examples: list[hellaswag_utils.Example]  # HellaSwag's, none where it is switched off

    def facts(self) -> dict:
        """What must be the same on all ranks."""
        return {
            "training data": self.windows.state(),
            "validation data": [digest_of(stream) for stream in self.val_streams],
            "examples": sha256(repr(self.examples).encode()).hexdigest(),
        }


def open_data(cfg: Config, sample: Config, process: Process) -> RunData:
    """Open the data of the run, after writing those of `sample` if they are asked for and not there.

    Raises:
        ValueError, OSError: data that is missing, too short, damaged, or does not fit the model; a prompt too long.
    """
    run_on_rank_zero(partial(prepare_sample, cfg, sample), process)
    process.progress.doing("reading of the data")
    tokenizer = Tokenizer(vocab_size=cfg.model.vocab_size)
    for prompt in cfg.prompts if cfg.generate_every else ():
        if (n := len(tokenizer.encode(prompt, bos=True))) >= cfg.model.max_seq_len:
            raise ValueError(f"prompts={prompt!r}: its {n} tokens fill model.max_seq_len={cfg.model.max_seq_len}")
    train_streams, val_streams = (
        open_streams(cfg.data_root, split, vocab_size=tokenizer.vocab_size, fingerprint=tokenizer.fingerprint)
        for split in ("train", "val")
    )
    accumulation = cfg.total_batch_size // (cfg.batch_size * cfg.model.max_seq_len * process.world_size)
    layout = BatchLayout(cfg.model.max_seq_len, cfg.batch_size, accumulation, process.rank, process.world_size)
    windows = TrainWindows(train_streams, layout, seed=cfg.seed)
    # The end of every run is validated. So try now whether the data fill a batch: the first one, on every rank alike.
    next(validation_batches(val_streams, replace(layout, rank=0), max_tokens=cfg.val_tokens))
    examples = []
    if cfg.hellaswag_every:
        examples = hellaswag_utils.load_examples(cfg.hellaswag_path, tokenizer, cfg.hellaswag_limit or None)
    return RunData(tokenizer, windows, val_streams, examples)


def prepare_sample(cfg: Config, sample: Config) -> None:
    """Write the sample's files if the sample is asked for and they are not there."""
    if cfg.data_root != sample.data_root:
        return
    if not is_prepared(cfg.data_root):
        prepare(["sample"], cfg.data_root, vocab_size=cfg.model.vocab_size)
    if cfg.hellaswag_path == sample.hellaswag_path and not Path(cfg.hellaswag_path).is_file():
        write_sample(cfg.data_root, cfg.hellaswag_path, cfg.model.vocab_size)


def describe(cfg: Config, process: Process, data: RunData, records: Records) -> list[str]:
    """The run in a few lines: size of the model, peak of the devices, shape of a step, length of the run."""
    layout, tokens = data.windows.layout, cfg.max_steps * cfg.total_batch_size
    processes, micro_steps = process.world_size, layout.accumulation
    shape = f"{processes} process{'es' * (processes > 1)} x {micro_steps} micro-step{'s' * (micro_steps > 1)}"
    shape += f" x {cfg.batch_size} x {cfg.model.max_seq_len}"
    return [
        f"{records.num_parameters / 1e6:.1f}M parameters on {processes} x {process.device}, "
        f"peak {records.peak / 1e12:.2f} TFLOP/s ({records.peak_source})",
        *float32_products(cfg, process.device),
        f"{cfg.max_steps:,} steps of {cfg.total_batch_size:,} tokens: {shape}",
        *(
            f"{tokens * stream.quota / BLOCK / len(stream):.2f} epochs of {len(stream):,} tokens"
            for stream in data.windows.streams
        ),
    ]


def float32_products(cfg: Config, device: torch.device) -> list[str]:
    """A line on the products of a run in float32 where CUDA has two kinds of them."""
    if cfg.dtype != "float32" or device.type != "cuda" or not has_in_hardware(device, torch.bfloat16):
        return []
    if cfg.tf32:
        return ["float32 products in TF32, with 10 of 23 bits of mantissa"]
    return ["float32 products with all 23 bits of mantissa; --tf32 True is faster, with 10"]


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one. Run train.py.")
