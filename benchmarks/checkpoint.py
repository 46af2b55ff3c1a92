"""Saving a checkpoint in the background against torch.save: how long training waits, and what a step takes meanwhile.

    python benchmarks/checkpoint.py                                train.py's shape, 3.6 GB a save: 10 minutes
    python benchmarks/checkpoint.py --shape small --seq_len 256    107 MB a save
    python benchmarks/checkpoint.py --folder /mnt/shared           onto another disk (default: the temporary folder)

The weights are random, and AdamW has made one update. Ours is `CheckpointSaver`: it copies the tensors, and a thread
writes the folder, hashes it and syncs it. The peer is torch.save of both state dicts, which training waits for, alone
and with an fsync. The last two ways are the time of an uncompiled training step, alone and while a save is in progress.
All take turns.
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from common import DEVICE, SHAPES, Worker, medians, report, take_turns
from train_step import adamw, make_update

from checkpoints import CheckpointSaver, moments
from hardware import dtype_name, fastest_dtype, keep_freed_memory
from model import ModelConfig, Transformer
from model_utils import MixedPrecision, place_model

STEPS = 2  # in a turn without a save


def make_ways(config: ModelConfig, shape: tuple[int, int], folder: str) -> dict[str, Callable[[], dict]]:
    """The ways by name. Each saves the same model and the same moments."""
    keep_freed_memory()  # as train.py does
    model = place_model(Transformer(config), DEVICE)
    optimizers = [adamw(model)]
    dtype = fastest_dtype(DEVICE)
    losses = {dtype_name(dtype): MixedPrecision(model, dtype, optimizers)}
    update = make_update(*optimizers, losses, config, shape, accumulation=1)
    step = partial(update, dtype_name(dtype), "force_eager")
    step()  # makes the moments
    saver = CheckpointSaver(Path(folder) / "ours", keep=1)
    number = 0

    def begin() -> float:
        """Start a save. Returns how long it stalls training."""
        nonlocal number
        number += 1
        state = {"step": number, "model": dict(model.named_parameters()), "moments": moments(model, optimizers)}
        began = time.perf_counter()
        saver.save(state | {"config": {"model": asdict(config)}}, is_best=False)
        return time.perf_counter() - began

    def warm_up() -> None:
        """Take the memory of a copy and of a step. A run keeps it, but this process gives it back between the turns."""
        begin()
        step()
        saver.finish()

    def ours() -> dict[str, float]:
        warm_up()
        began = time.perf_counter()
        stall = begin()
        saver.finish()
        end = time.perf_counter()
        size = sum(path.stat().st_size for path in saver.folder.rglob("*") if path.is_file())
        return {"seconds": stall, "whole_seconds": end - began, "bytes": size}

    def peer(sync: bool) -> dict[str, float]:
        path = Path(folder) / "peer.pt"
        path.unlink(missing_ok=True)
        began = time.perf_counter()
        with open(path, "wb") as file:
            torch.save({"model": model.state_dict(), "optimizer": optimizers[0].state_dict()}, file)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "whole_seconds": seconds, "bytes": path.stat().st_size}

    def steps() -> dict[str, float]:
        warm_up()
        return {"seconds": statistics.median(step()["seconds"] for _ in range(STEPS))}

    def steps_during_a_save() -> dict[str, float]:
        warm_up()
        begin()
        seconds = [step()["seconds"]]
        while any(thread.name == "save" for thread in threading.enumerate()):
            seconds.append(step()["seconds"])
        saver.finish()
        return {"seconds": statistics.median(seconds[:-1] or seconds)}  # the save ended within the last one

    return {
        "ours": ours,
        "torch.save": partial(peer, sync=False),
        "torch.save, fsync": partial(peer, sync=True),
        "a step": steps,
        "a step during a save": steps_during_a_save,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="original", help="the model (default: original)")
    parser.add_argument("--batch_size", type=int, default=1, help="sequences of a step (default: 1)")
    parser.add_argument("--seq_len", type=int, default=1024, help="tokens a sequence (default: 1024)")
    parser.add_argument("--turns", type=int, default=3, help="turns of each way (default: 3)")
    parser.add_argument("--folder", help="where to save (default: the temporary folder)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()
    config = ModelConfig(**SHAPES[args.shape], max_seq_len=args.seq_len)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        worker = Worker(make_ways, config, (args.batch_size, args.seq_len), folder)
        result = medians(take_turns([worker], args.turns))
    for name, row in result.items():
        row["ratio"] = row["seconds"] / result["a step" if "step" in name else "ours"]["seconds"]
    columns = {
        "training waits, or a step takes, s": lambda row: f"{row['seconds']:.3f}",
        "ratio": lambda row: f"{row['ratio']:.2f}",
        "whole on the disk after, s": lambda row: f"{row['whole_seconds']:.2f}" if "bytes" in row else "-",
        "MB": lambda row: f"{row['bytes'] / 1e6:,.0f}" if "bytes" in row else "-",
        "peak memory, GiB": lambda row: f"{row['peak_gib']:.1f}",
    }
    report(f"{args.shape}, steps of {args.batch_size} x {args.seq_len} tokens", columns, result, args.json)


if __name__ == "__main__":
    main()
