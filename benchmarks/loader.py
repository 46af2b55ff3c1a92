"""The loader against reading whole shards: time to the first batch, tokens a second, memory, a step's wait for data.

    python benchmarks/loader.py                               100 shards of a million tokens, a minute on a CPU
    python benchmarks/loader.py --shard_tokens 10_000_000     4 GB in the temporary folder

The peer reads as build-nanogpt does: whole shards into memory, as int64, in order, without a shuffle. Both read from
the system's cache, because the files have just been written. They take turns. Figures are medians over the turns.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from common import DEVICE, SHAPES
from train_step import adamw, make_update

from dataloaders import BatchLayout, TrainWindows
from hardware import dtype_name, fastest_dtype, keep_freed_memory
from model import ModelConfig, Transformer
from model_utils import MixedPrecision, compile_blocks, place_model
from shards import MANIFEST, SHARD_FORMAT_VERSION, SHARD_KEYS, TokenStream, shard_name

# FOLDER_VOCAB makes the shards hold 32-bit ids. The random ids are below MODEL_VOCAB, the small model's vocabulary.
FOLDER_VOCAB, MODEL_VOCAB = 128_256, 8192


def write_shards(root: Path, shards: int, tokens: int) -> None:
    """Write `shards` training shards of `tokens` random ids, a short validation shard, and the manifest."""
    rng, described = np.random.default_rng(0), []
    for index in range(shards + 1):
        ids = rng.integers(MODEL_VOCAB, size=tokens if index else 2048, dtype=np.uint32)
        np.save(root / shard_name(index), ids)
        shard = {"file": shard_name(index), "split": "train" if index else "val", "tokens": len(ids)}
        described.append(dict.fromkeys(SHARD_KEYS, 0) | shard)
    manifest = {"format_version": SHARD_FORMAT_VERSION, "vocab_size": FOLDER_VOCAB, "dtype": "uint32"}
    manifest |= {"tokenizer_fingerprint": "", "documents": 0, "tokens": shards * tokens, "shards": described}
    (root / MANIFEST).write_text(json.dumps(manifest))


def ours(root: Path, B: int, T: int) -> Iterator:
    """Batches of our loader: inputs (B, T) and targets (B, T)."""
    stream = TokenStream(root, "train", vocab_size=FOLDER_VOCAB)
    windows = TrainWindows([stream], BatchLayout(T, B), seed=0)
    return windows.batches(0, 10**9, torch.device("cpu"))


def whole_shards(root: Path, B: int, T: int) -> Iterator:
    """Batches of the peer: inputs (B, T) and targets (B, T), without end."""
    while True:
        for path in sorted(root.glob("*_train_*.npy")):
            shard = torch.from_numpy(np.load(path).astype(np.int64))
            for start in range(0, len(shard) - B * T, B * T):
                piece = shard[start : start + B * T + 1]
                yield piece[:-1].view(B, T), piece[1:].view(B, T)


LOADERS = {"ours": ours, "whole shards": whole_shards}


def memory() -> dict[str, float]:
    """MB of this process's own memory, and of its mapped files, which the system may take back at any time."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # only Linux has this file
        return {"own": 0.0, "mapped": 0.0}
    kb = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
    return {"own": kb["RssAnon"] / 1e3, "mapped": kb["RssFile"] / 1e3}


def measure_loaders(root: Path, B: int, T: int, batches: int, turns: int) -> dict[str, dict[str, float]]:
    """Median figures of each loader over the turns: milliseconds, tokens a second, MB."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in LOADERS}
    for _ in range(turns):
        for name, loader in LOADERS.items():
            before, began = memory(), time.perf_counter()
            it = loader(root, B, T)
            checksum = next(it)[0].sum()
            first = time.perf_counter() - began
            opened, began = memory(), time.perf_counter()
            for _ in range(batches):
                x, y = next(it)
                checksum += x.sum() + y.sum()  # views cost nothing until they are read
            seconds, after = time.perf_counter() - began, memory()
            rows[name].append(
                {
                    "first_batch_ms": 1e3 * first,
                    "tokens_per_sec": batches * B * T / seconds,
                    "own_mb_first_batch": opened["own"] - before["own"],
                    "own_mb_growth": after["own"] - opened["own"],
                    "mapped_mb_growth": after["mapped"] - opened["mapped"],
                }
            )
            del it, x, y
    return {name: {key: statistics.median(row[key] for row in r) for key in r[0]} for name, r in rows.items()}


def measure_waiting(root: Path, steps: int) -> dict[str, float]:
    """Medians of compiled training steps of the small shape, 16 x 256 tokens: the whole step, its wait for data."""
    keep_freed_memory()  # as train.py does
    config, shape = ModelConfig(**SHAPES["small"], max_seq_len=256), (16, 256)
    model = place_model(Transformer(config), DEVICE)
    compile_blocks(model)
    optimizers = [adamw(model)]
    mixed = MixedPrecision(model, fastest_dtype(DEVICE), optimizers)
    dtype = dtype_name(fastest_dtype(DEVICE))
    batches, waits = ours(root, *shape), []

    def loss_of(*unused: torch.Tensor) -> torch.Tensor:  # the loader's batch replaces make_update's random tokens
        began = time.perf_counter()
        x, y = next(batches)
        waits.append(time.perf_counter() - began)
        return mixed(x.to(DEVICE), y.to(DEVICE))

    update = make_update(*optimizers, {dtype: loss_of}, config, shape, 1)
    totals = [update(dtype, "default")["seconds"] for _ in range(steps + 2)]  # the first two compile and warm up
    wait, total = statistics.median(waits[2:]), statistics.median(totals[2:])
    return {"step_ms": 1e3 * total, "waiting_ms": 1e3 * wait, "waiting_share": wait / total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100, help="training shards (default: 100)")
    parser.add_argument("--shard_tokens", type=int, default=1_000_000, help="tokens in each (default: a million)")
    parser.add_argument("--batch_size", type=int, default=16, help="sequences a batch (default: 16)")
    parser.add_argument("--seq_len", type=int, default=1024, help="tokens a sequence (default: 1024)")
    parser.add_argument("--batches", type=int, default=1000, help="batches of each loader in a turn (default: 1000)")
    parser.add_argument("--turns", type=int, default=5, help="turns of each loader (default: 5)")
    parser.add_argument("--steps", type=int, default=20, help="training steps; 0 leaves them out (default: 20)")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), args.shards, args.shard_tokens)
        shape = args.batch_size, args.seq_len
        result: dict = {"shards": args.shards, "shard_tokens": args.shard_tokens, "batch": shape}
        result["loaders"] = measure_loaders(Path(folder), *shape, args.batches, args.turns)
        for name, row in result["loaders"].items():
            figures = ", ".join(f"{key} {value:,.1f}" for key, value in row.items())
            print(f"{name:>12}: {figures}")
        if args.steps:
            result["step"] = step = measure_waiting(Path(folder), args.steps)
            print(f"a step of {step['step_ms']:.0f} ms waits {step['waiting_ms']:.2f} ms for data")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
