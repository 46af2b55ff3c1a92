"""What a run takes: memory, time and disk. `python train.py --dry_run` prints it, and writes nothing.

The figures come from real updates on random ids: the model is built, wrapped and compiled as for a run, and train.py's
own `update` is measured. Every rank takes part, and rank zero prints.
"""

import math
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn

from checkpoints import checkpoint_bytes, checkpoints_at_once
from config import Config, config_as_dict
from files import existing_parent
from memory import (
    accumulation_of,
    after_out_of_memory,
    build_trial,
    find_batch_size,
    memory_free,
    memory_peak,
    memory_taken,
    random_batches,
    size,
    smaller_batch_sizes,
    stop_together,
    try_update,
)
from model import Transformer
from optimizers import Muon
from processes import Process

MEASURED_STEPS = 3


def dry_run(cfg: Config, process: Process, update: Callable, notes: list[str]) -> int:
    """Print what the run takes. Returns 1 if it will not fit into the memory or on the disk, else 0.

    Args:
        update: train.py's, handed over because no file imports train.py.
        notes: lines to print first; they name the configuration.
    """
    before = memory_taken(process.device)
    if cfg.batch_size == "auto":
        cfg = replace(cfg, batch_size=find_batch_size(cfg, process, update, notes.append))
    process.print(*notes, packed(config_as_dict(cfg)), sep="\n")
    torch.manual_seed(cfg.seed)
    free = memory_free(process.device)
    model, optimizers, wrapped, step = build_trial(cfg, process, update)
    process.print(table("parameters", parameters_by_part(model)))
    weights = sum(p.nbytes for p in model.parameters())
    checkpoint = checkpoint_bytes(model, optimizers)
    parts = {"weights": weights, "gradients": weights, "moments of the optimizer": checkpoint - weights}

    saved = try_update(step, wrapped, cfg, process, free)
    if saved is None:
        process.print(table("memory, without the activations", {name: size(count) for name, count in parts.items()}))
        advice = f"not even --batch_size 1 does: {after_out_of_memory(replace(cfg, batch_size=1), process.world_size)}"
        for smaller in smaller_batch_sizes(cfg, process):
            if try_update(step, wrapped, replace(cfg, batch_size=smaller), process, free) is not None:
                advice = f"--batch_size {smaller} does; the update stays the same"
                break
        process.print(
            f"--batch_size {cfg.batch_size} does not fit into the {size(free)} free on {process.device}; {advice}"
        )
        return 1
    for optimizer in optimizers:
        if isinstance(optimizer, Muon):
            optimizer.ranks = (process.rank, process.world_size)  # as in a run: the processes share its work
    seconds = seconds_a_step(step, wrapped, cfg, process)
    peak = max(memory_peak(process.device) - before, 0)
    copy = {"and in main memory, while a checkpoint is written": size(checkpoint)}
    process.print(table(memory_title(process.device, free), memory_lines(parts, saved, peak, cfg) | copy))
    process.print(table("time", time_lines(cfg, process, seconds)))
    kept, free_disk = checkpoints_at_once(cfg) * checkpoint, shutil.disk_usage(existing_parent(Path(cfg.out_dir))).free
    lines = {
        "a checkpoint": size(checkpoint),
        f"{checkpoints_at_once(cfg)} checkpoints, the most at a time": size(kept),
    }
    process.print(table("disk", lines | {"free": size(free_disk)}))
    if kept > free_disk:
        process.print("the disk is too small: make room, lower --keep_checkpoints, or choose another --out_dir")
    return 1 if kept > free_disk else 0


# ---------------------------------------------------------------- measurements


def seconds_a_step(step: Callable, wrapped: nn.Module, cfg: Config, process: Process) -> float:
    """Seconds of an update, the median of three.

    All micro-steps but the last take the same time. So a long update, which may be minutes on a CPU, is not measured:
    updates of one and of two micro-steps tell what it takes.
    """
    accumulation, batches = accumulation_of(cfg, process), random_batches(cfg)
    medians = []
    for micro_steps in (1, 2) if accumulation > 2 else (accumulation,):
        seconds = []
        for _ in range(MEASURED_STEPS):
            began = time.perf_counter()
            step(wrapped, batches=batches, cfg=cfg, accumulation=micro_steps, process=process)
            if process.device.type != "cpu":
                torch.accelerator.synchronize(process.device)
            seconds.append(time.perf_counter() - began)
            stop_together(process)
        medians.append(statistics.median(seconds))
    return medians[0] + max(medians[-1] - medians[0], 0) * (accumulation - 1)


# ---------------------------------------------------------------- the tables


def parameters_by_part(model: Transformer) -> dict[str, str]:
    """How many parameters each part has, and what share of all."""
    counts = dict.fromkeys(("embedding", "attention", "feed-forward", "norms", "output layer"), 0)
    places = {"tok_embeddings": "embedding", "output": "output layer"}
    for name, p in model.named_parameters():
        inner = "attention" if ".attention." in name else "feed-forward" if ".feed_forward." in name else "norms"
        counts[places.get(name.split(".")[0], inner)] += p.numel()
    total = sum(counts.values())
    lines = {part: f"{count:,}  {count / total:.0%}" for part, count in counts.items() if count}
    return lines | {"all": f"{total:,}"}


def memory_title(device: torch.device, free: float) -> str:
    room = "" if math.isinf(free) else f", of {size(free)} free"
    if device.type == "cpu":
        return f"memory on {device}{room}"
    return f"memory on {device}{room}: an estimate, because the driver and the gaps of the allocator come on top"


def memory_lines(parts: dict[str, int], saved: int, peak: int, cfg: Config) -> dict[str, str]:
    """The parts, and the peak of all together. The parts are not all there at one time, so they may exceed the peak."""
    shape = f"{cfg.batch_size} x {cfg.model.max_seq_len} tokens, {cfg.dtype}"
    parts = parts | {f"activations ({shape})": saved}
    rest = peak - sum(parts.values())
    if rest > 0:
        parts["buffers, libraries, lost in the heap"] = rest
    lines = {name: size(count) for name, count in parts.items()}
    return lines | {"peak of a step": size(peak) if peak else "unknown"}


def time_lines(cfg: Config, process: Process, seconds: float) -> dict[str, str]:
    shape = f"{process.world_size} x {accumulation_of(cfg, process)} x {cfg.batch_size} x {cfg.model.max_seq_len}"
    return {
        "tokens a step": f"{cfg.total_batch_size:,} = {shape}",
        "seconds a step": f"{seconds:.3g} ({cfg.total_batch_size / seconds:,.0f} tokens/s)",
        f"{cfg.max_steps:,} steps": f"{timedelta(seconds=round(cfg.max_steps * seconds))}, evaluations and saves aside",
    }


def table(title: str, lines: dict[str, str]) -> str:
    return "\n".join([title, *(f"  {name:<42} {value}" for name, value in lines.items())])


def packed(values: dict, width: int = 118) -> str:
    """`name=value` for all values, as many in a line as fit."""
    words = [f"{k}={v!r}" if isinstance(v, str) else f"{k}={v}" for k, v in values.items() if k != "model"]
    words += [f"model.{k}={v}" for k, v in values["model"].items()]
    lines = [" "]
    for word in words:
        if len(lines[-1]) + 1 + len(word) > width:
            lines.append(" ")
        lines[-1] += f" {word}"
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nRun `python train.py --dry_run`.")
