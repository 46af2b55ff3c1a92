"""What a run takes: memory, time and disk. `python train.py --dry_run` prints it, and writes nothing.

The figures come from real updates on random ids: the model is built, wrapped and compiled as for a run, and train.py's
own `update` is measured. Every rank takes part, and rank zero prints.
"""

import gc
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints import checkpoint_bytes, checkpoints_at_once
from config import Config, config_as_dict
from files import existing_parent
from model import Transformer
from model_utils import place_model, wrap_model
from optimizers import Muon, build_optimizers
from processes import Process, sum_over_processes

MARGIN = 0.95  # share of a GPU's free memory that may be taken: the allocator leaves gaps, evaluations need some too
MEASURED_STEPS = 3


def dry_run(cfg: Config, process: Process, update: Callable, notes: list[str]) -> int:
    """Print what the run takes. Returns 1 if it will not fit into the memory or on the disk, else 0.

    Args:
        update: train.py's, handed over because no file imports train.py.
        notes: lines to print first; they name the configuration.
    """
    process.print(*notes, packed(config_as_dict(cfg)), sep="\n")
    torch.manual_seed(cfg.seed)
    before = memory_taken(process.device)
    free = memory_free(process.device)
    model = place_model(Transformer(cfg.model), process.device)
    optimizers = build_optimizers(model, cfg)
    process.print(table("parameters", parameters_by_part(model)))
    wrapped = wrap_model(model, optimizers, cfg, process)
    scaler = torch.amp.GradScaler(process.device.type, enabled=cfg.dtype == "float16")
    step = partial(measured, update, optimizers=optimizers, step=1, bos_id=0, scaler=scaler)
    weights = sum(p.nbytes for p in model.parameters())
    checkpoint = checkpoint_bytes(model, optimizers)
    parts = {"weights": weights, "gradients": weights, "moments of the optimizer": checkpoint - weights}

    saved = try_update(step, wrapped, cfg, process, free)
    if saved is None:
        process.print(table("memory, without the activations", {name: size(count) for name, count in parts.items()}))
        advice = "not even --batch_size 1 does: take a smaller model or a shorter --model.max_seq_len"
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


class SavedTensors:
    """Hooks that count the bytes which autograd keeps for the backward pass, the parameters aside."""

    def __init__(self, model: nn.Module):
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.sizes: dict[int, int] = {}  # by address, because several saved tensors may share their memory

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def unpack(self, tensor: Tensor) -> Tensor:
        return tensor


def try_update(step: Callable, wrapped: nn.Module, cfg: Config, process: Process, free: float) -> int | None:
    """Run updates that take as much memory as any of the run. Return the bytes that autograd keeps for a backward pass,
    or None if the updates do not fit on some rank.

    Two micro-steps are enough: in the second one the gradients of the first are there beside the activations.
    """
    if process.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(process.device)
    # Several processes try alone, without DDP. If one of them ran out of memory within an all-reduce, the others would
    # wait for it for ever.
    model = wrapped.module if process.world_size > 1 else wrapped
    step = partial(step, process=process.alone())
    saved, batches, fits = SavedTensors(model), random_batches(cfg), True
    try:
        step(model, batches=batches, cfg=cfg, accumulation=1)  # compiles
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            step(model, batches=batches, cfg=cfg, accumulation=1)
        step(model, batches=batches, cfg=cfg, accumulation=min(2, accumulation_of(cfg, process)))
        if process.device.type == "cuda":
            fits = memory_peak(process.device) <= MARGIN * free
    except torch.OutOfMemoryError:
        fits = False
    if not fits:  # outside of the except block: there the error would still hold the activations
        model.zero_grad(set_to_none=True)
        gc.collect()
        if process.device.type == "cuda":
            torch.cuda.empty_cache()
    [failed] = sum_over_processes([float(not fits)], process)
    return None if failed else sum(saved.sizes.values())


def measured(update: Callable, *args: Any, process: Process, **kwargs: Any) -> None:
    """One update. Raises KeyboardInterrupt if a stop signal has come."""
    update(*args, process=process, **kwargs)
    process.progress.compiles = False  # the first update has compiled
    if process.stop:
        raise KeyboardInterrupt


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
        medians.append(statistics.median(seconds))
    return medians[0] + max(medians[-1] - medians[0], 0) * (accumulation - 1)


def random_batches(cfg: Config) -> Iterator[tuple[Tensor, Tensor]]:
    """Random ids in the shape of the run's batches."""
    while True:
        tokens = torch.randint(cfg.model.vocab_size, (cfg.batch_size, cfg.model.max_seq_len + 1))
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def accumulation_of(cfg: Config, process: Process) -> int:
    """Micro-steps an update."""
    return cfg.total_batch_size // (cfg.batch_size * cfg.model.max_seq_len * process.world_size)


def smaller_batch_sizes(cfg: Config, process: Process) -> list[int]:
    """The batch sizes below cfg's that divide the update, the largest first."""
    sequences = cfg.total_batch_size // (cfg.model.max_seq_len * process.world_size)
    return [size for size in range(cfg.batch_size - 1, 0, -1) if sequences % size == 0]


# ---------------------------------------------------------------- what the machine says


def proc_bytes(file: str, name: str) -> int | None:
    """The figure `name` of a file of Linux's /proc; None where there is none."""
    try:
        line = next(line for line in Path(file).read_text().splitlines() if line.startswith(f"{name}:"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024


def memory_taken(device: torch.device) -> int:
    """Bytes that this process has on the device now. On a CPU these are of the whole process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return proc_bytes("/proc/self/status", "VmRSS") or 0


def memory_peak(device: torch.device) -> int:
    """The most bytes that this process has had on the device; 0 where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()  # freed memory stays in it
    return proc_bytes("/proc/self/status", "VmHWM") or 0


def memory_free(device: torch.device) -> float:
    """Bytes that this process can still get on the device; infinity where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return (proc_bytes("/proc/meminfo", "MemAvailable") if device.type == "cpu" else None) or math.inf


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


def size(count: float) -> str:
    """A number of bytes, to read."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


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
