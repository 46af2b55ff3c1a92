"""What fits into the memory of the device: updates are tried on it, and `--batch_size auto` takes the largest batch."""

import ctypes
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from threads import CGROUP

import torch
from torch import Tensor, nn

from checkpoints import checkpoint_bytes
from config import Config
from environment import local_world_size
from json_files import read_object
from model import Transformer
from model_utils import place_model, wrap_model
from optimizers import build_optimizers
from processes import Process, agree_on_stop, gather, run_on_rank_zero, sum_over_processes

MARGIN = 0.95  # share of a GPU's free memory that may be taken: the allocator leaves gaps, evaluations need some too


# ---------------------------------------------------------------- one size, tried


def build_trial(
    cfg: Config, process: Process, update: Callable
) -> tuple[Transformer, list[torch.optim.Optimizer], nn.Module, Callable]:
    """What a run trains, with new weights: the model, its optimizers, and the wrapped model; and an update of it.

    Args:
        update: train.py's, handed over because no file imports train.py.
    """
    model = place_model(Transformer(cfg.model), process.device)
    optimizers = build_optimizers(model, cfg)
    wrapped = wrap_model(model, optimizers, cfg, process)
    scaler = torch.amp.GradScaler(process.device.type, enabled=cfg.dtype == "float16")
    step = partial(measured, update, optimizers=optimizers, step=1, bos_id=0, scaler=scaler)
    return model, optimizers, wrapped, step


def measured(update: Callable, *args: Any, process: Process, **kwargs: Any) -> None:
    """One update, or nothing if a stop signal has come."""
    update(*args, process=process, **kwargs)
    process.progress.compiles = False  # the first update has compiled


def stop_together(process: Process) -> None:
    """Raises KeyboardInterrupt on all ranks if one of them has heard a stop signal."""
    if stop := agree_on_stop(process):
        process.watch.stop = stop
        raise KeyboardInterrupt


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

    Raises:
        KeyboardInterrupt: a stop signal has come, on all ranks alike.
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
        give_back(process.device)
    [failed] = sum_over_processes([float(not fits)], process)
    stop_together(process)
    return None if failed else sum(saved.sizes.values())


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


# ---------------------------------------------------------------- the largest size


def find_batch_size(cfg: Config, process: Process, update: Callable, say: Callable[[str], Any] = print) -> int:
    """What `--batch_size auto` means here: the largest power of two that fits the device of every rank, and divides the
    update. On a CPU, where nothing may be tried, it is one that surely fits. Nothing is left of the search but the
    compiler's cache on the disk.

    A run that goes on in its own folder keeps the size that it had, because another one would round otherwise.

    Args:
        update: train.py's.
        say: gets a line on what was found.

    Raises:
        KeyboardInterrupt: a stop signal has come, on all ranks alike.
        ValueError: not even one sequence fits, or nothing tells how much memory is free; on every rank alike.
    """
    if found := run_on_rank_zero(partial(recorded_batch_size, cfg, process.world_size), process):
        say(f"batch_size: {found}, as the run had before")
        return found
    try:
        found = largest_batch_size(cfg, process, update)
    finally:
        torch._dynamo.reset()  # the run may compile as often as without a search
        give_back(process.device)
        process.progress.doing("")
    what = "the largest power of two that fits" if process.device.type == "cuda" else "a power of two that surely fits"
    say(f"batch_size: {found} is {what}")
    return found


def recorded_batch_size(cfg: Config, world_size: int) -> int:
    """The batch size of the run in out_dir that this one goes on with; 0 if there is none, or if it does not divide the
    update over so many processes."""
    if cfg.resume not in (True, "best"):
        return 0
    with suppress(OSError, ValueError):  # there is no such run, or its file is damaged: then the run itself says so
        size = read_object(Path(cfg.out_dir) / "config.json").get("batch_size")
        if type(size) is int and size > 0 and cfg.total_batch_size % (size * world_size * cfg.model.max_seq_len) == 0:
            return size
    return 0


def largest_batch_size(cfg: Config, process: Process, update: Callable) -> int:
    """`find_batch_size`, with all that it has tried still in memory.

    One sequence, and then two, tell what a sequence takes at least. So the first size that is tried after them is at
    least as large as the result, and few sizes are compiled.
    """
    device, free, before = process.device, memory_free(process.device), memory_taken(process.device)
    model, optimizers, wrapped, step = build_trial(cfg, process, update)

    def tried(count: int) -> int | None:
        return try_update(step, wrapped, replace(cfg, batch_size=count), process, free)

    sequences = cfg.total_batch_size // (cfg.model.max_seq_len * process.world_size)  # of an update, in this process
    largest, saved = sequences & -sequences, tried(1)
    if saved is None:
        advice = after_out_of_memory(replace(cfg, batch_size=1), process.world_size)
        raise ValueError(f"batch_size=auto: not even 1 fits into the {size(free)} free on {device}; {advice}")
    peak = memory_peak(device)
    if device.type == "cuda":
        more = tried(2) if largest > 1 else None
        if more is None:
            return 1
        room, each = MARGIN * free - peak, max(1, more - saved)
    else:
        # Too large a batch raises no error here: the system swaps, or kills the process. So nothing larger is tried,
        # and all that does not belong to the weights counts as if each sequence took it.
        peak, checkpoint = peak - before, checkpoint_bytes(model, optimizers)
        each = max(1, peak - checkpoint - sum(p.nbytes for p in model.parameters()))  # the gradients are there too
        room = MARGIN * free - peak - checkpoint  # which is copied when it is written
    fitting = 1 + room // each if 0 < peak < free < math.inf else 0
    fitting = min(gather(fitting, process))
    if fitting < 1 and device.type != "cuda":
        raise ValueError(f"batch_size=auto: nothing says that even 1 fits into the memory of {device}; give a number")
    found = 2 ** int(math.log2(max(1, min(fitting, largest))))
    while device.type == "cuda" and found > 2 and tried(found) is None:
        found //= 2
    return found


def after_out_of_memory(cfg: Config, world_size: int) -> str:
    """What to do after memory ran out: the values of the flags that take less. The update stays the same."""
    advice = []
    if cfg.batch_size != "auto" and cfg.batch_size > 1:
        sequences = cfg.total_batch_size // (cfg.model.max_seq_len * world_size)
        smaller = next(count for count in range(cfg.batch_size // 2, 0, -1) if sequences % count == 0)
        advice.append(f"--batch_size {smaller} (or auto)")
    if cfg.activation_checkpointing != "all":
        which = "blocks" if advice and cfg.activation_checkpointing == "none" else "all"
        advice.append(f"--activation_checkpointing {which}")
    least = f"take a shorter --model.max_seq_len than {cfg.model.max_seq_len}, or a smaller model"
    if not advice:
        return least
    smaller_update = f"; if that is not enough, {least}" if cfg.batch_size == 1 else ""
    return f"pass {' or '.join(advice)}; the update stays the same{smaller_update}"


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
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    limits = [proc_bytes("/proc/meminfo", "MemAvailable"), container_bytes()]
    return min([limit for limit in limits if limit], default=math.inf) / local_world_size()  # its processes share it


def container_bytes() -> int | None:
    """What the memory limit of a control group (version 2), as a container has, leaves; None where there is no limit.

    The group's pages of files count as free, because the system gives them up first.
    """
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return max(1, limit - used + int(counts["inactive_file"]))
    except (OSError, ValueError, KeyError):  # "max" is no number: there is no limit
        return None


def give_back(device: torch.device) -> None:
    """Give the memory that nothing uses any more back to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with suppress(AttributeError, TypeError):  # the C library is not glibc
        ctypes.CDLL(None).malloc_trim(0)  # hardware.keep_freed_memory lets it keep all


def size(count: float) -> str:
    """A number of bytes, to read."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one. Run `python train.py --dry_run`.")
