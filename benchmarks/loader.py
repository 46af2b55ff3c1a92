"""The loader against other ways to read: time to the first batch, tokens a second, memory, a step's wait for data.

    python benchmarks/loader.py                               100 shards of a million tokens, a minute on a CPU
    python benchmarks/loader.py --shard_tokens 10_000_000     4 GB in the temporary folder
    python benchmarks/loader.py --shards 4 --shard_tokens 100_000_000 --cold --folder /on/a/disk    1.6 GB there

The peer reads as build-nanogpt does: whole shards into memory, as int64, in order, without a shuffle. Both read from
the system's cache, because the files have just been written.

`--cold` (Linux) takes the files out of that cache before each measurement, and counts the bytes that come from the
disk. There the peers are memory maps: in our order, with and without MADV_RANDOM, and nanoGPT's, mapped anew for each
batch. The same is measured in the order of validation. All take turns. Figures are medians over the turns.
"""

import argparse
import itertools
import json
import mmap
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import DEVICE, SHAPES
from train_step import adamw, make_update

from dataloaders import BatchLayout, TrainWindows, validation_batches
from hardware import dtype_name, fastest_dtype, keep_freed_memory
from model import ModelConfig, Transformer
from model_utils import MixedPrecision, compile_blocks, place_model
from shards import COUNTS, MANIFEST, SHARD_FORMAT_VERSION, TokenStream, shard_name

# FOLDER_VOCAB makes the shards hold 32-bit ids. The random ids are below MODEL_VOCAB, the small model's vocabulary.
FOLDER_VOCAB, MODEL_VOCAB = 128_256, 8192


def write_shards(root: Path, shards: int, tokens: int) -> None:
    """Write `shards` training shards of `tokens` random ids, a short validation shard, and the manifest."""
    rng, described = np.random.default_rng(0), []
    for index in range(shards + 1):
        ids = rng.integers(MODEL_VOCAB, size=tokens if index else 2048, dtype=np.uint32)
        np.save(root / shard_name(index), ids)
        shard = {"file": shard_name(index), "split": "train" if index else "val", "tokens": len(ids)}
        described.append(dict.fromkeys(COUNTS, 0) | shard | {"sha256": ""})
    manifest = {"format_version": SHARD_FORMAT_VERSION, "vocab_size": FOLDER_VOCAB, "dtype": "uint32"}
    manifest |= {"tokenizer_fingerprint": "", "documents": 0, "tokens": 2048 + shards * tokens, "shards": described}
    (root / MANIFEST).write_text(json.dumps(manifest))


def ours(root: Path, B: int, T: int) -> Iterator:
    """Batches of our loader: inputs (B, T) and targets (B, T)."""
    return in_our_order(TokenStream(root, "train", vocab_size=FOLDER_VOCAB), B, T)


def in_our_order(stream: TokenStream, B: int, T: int) -> Iterator:
    return TrainWindows([stream], BatchLayout(T, B), seed=0).batches(0, 10**9, torch.device("cpu"))


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


# ---------------------------------------------------------------- cold


class MappedStream(TokenStream):
    """Reads through memory maps. `advice` is one of mmap's."""

    def __init__(self, root: Path, split: str, *, vocab_size: int, advice: int | None = None):
        super().__init__(root, split, vocab_size=vocab_size)
        self.maps = [np.load(self.root / file, mmap_mode="r") for file in self.files]
        for ids in self.maps:
            if advice is not None:
                ids._mmap.madvise(advice)

    def _read(self, index: int, first: int, last: int) -> np.ndarray:
        return self.maps[index][first:last]


def nanogpt(root: Path, B: int, T: int) -> Iterator:
    """Batches as nanoGPT's get_batch makes them: random windows of one file, mapped anew against a leak of memory."""
    rng, paths = np.random.default_rng(0), sorted(root.glob("*_train_*.npy"))
    while True:
        ids = np.load(paths[rng.integers(len(paths))], mmap_mode="r")
        starts = rng.integers(len(ids) - T, size=B)
        x, y = (np.stack([ids[s + d : s + d + T].astype(np.int64) for s in starts]) for d in (0, 1))
        yield torch.from_numpy(x), torch.from_numpy(y)


STREAMS = {
    "ours": TokenStream,
    "memory map": MappedStream,
    "memory map, MADV_RANDOM": partial(MappedStream, advice=getattr(mmap, "MADV_RANDOM", None)),
}


def empty_cache(root: Path) -> None:
    """Take the pages of all shards out of the system's cache. Only pages that are on the disk can go."""
    for path in root.glob("*.npy"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_from_disk() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def measure_cold(way: str, order: str, root: Path, B: int, T: int, batches: int) -> dict[str, float]:
    """Read batches with a cold cache: tokens a second, and bytes that the disk gives for each byte of tokens."""
    if way == "nanoGPT":
        it = nanogpt(root, B, T)
    else:
        stream = STREAMS[way](root, "train", vocab_size=FOLDER_VOCAB)
        if order == "training":
            it = in_our_order(stream, B, T)
        else:
            it = validation_batches([stream], BatchLayout(T, B), max_tokens=batches * B * T)
    next(in_our_order(TokenStream(root, "val", vocab_size=FOLDER_VOCAB), B, T))  # first calls take longer
    empty_cache(root)
    before, began = bytes_from_disk(), time.perf_counter()
    for _ in range(batches):
        next(it)
    seconds = time.perf_counter() - began
    read = (bytes_from_disk() - before) / (batches * B * T * np.dtype(np.uint32).itemsize)
    return {"tokens_per_sec": batches * B * T / seconds, "read_per_byte": read}


def measure_all_cold(root: Path, B: int, T: int, batches: int, turns: int) -> dict[str, dict[str, float]]:
    """Medians of `measure_cold`, each time in a new process, which has mapped no page yet."""
    rows: dict[str, list[dict[str, float]]] = {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for _ in range(turns):
            for way, order in [*itertools.product(STREAMS, ("training", "validation")), ("nanoGPT", "")]:
                row = pool.apply(measure_cold, (way, order, root, B, T, batches))
                rows.setdefault(f"{way} {order}".strip(), []).append(row)
    if not any(row["read_per_byte"] for row in rows["ours training"]):
        raise SystemExit(f"{root}: nothing was read from a disk, so this folder lies in memory; name one by --folder")
    return {name: {key: statistics.median(row[key] for row in r) for key in r[0]} for name, r in rows.items()}


def read_ahead_kb(root: Path) -> int:
    """What the system reads around a page of a map at most, on the disk of a folder; 0 if it does not say."""
    device = os.stat(root).st_dev
    try:
        return int(Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue/read_ahead_kb").read_text())
    except OSError:
        return 0


# ---------------------------------------------------------------- a step


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
    parser.add_argument("--cold", action="store_true", help="measure with a cold cache, and nothing else")
    parser.add_argument("--folder", type=Path, help="where the shards are written (default: the temporary folder)")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root, shape = Path(folder), (args.batch_size, args.seq_len)
        write_shards(root, args.shards, args.shard_tokens)
        result: dict = {"shards": args.shards, "shard_tokens": args.shard_tokens, "batch": shape}
        if args.cold:
            result["read_ahead_kb"] = read_ahead_kb(root)
            result["cold"] = measure_all_cold(root, *shape, args.batches, args.turns)
        else:
            result["loaders"] = measure_loaders(root, *shape, args.batches, args.turns)
        for name, row in (result.get("cold") or result["loaders"]).items():
            figures = ", ".join(f"{key} {value:,.1f}" for key, value in row.items())
            print(f"{name:>34}: {figures}")
        if args.steps and not args.cold:
            result["step"] = step = measure_waiting(root, args.steps)
            print(f"a step of {step['step_ms']:.0f} ms waits {step['waiting_ms']:.2f} ms for data")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
