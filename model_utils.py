"""What a run needs around the model: processes and devices, checkpoints, records."""

import ctypes
import json
import os
import random
import re
import shutil
import signal
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from files import atomic_write
from model import ModelConfig, Transformer
from workers import num_cores

# ---------------------------------------------------------------- processes and devices


@dataclass(frozen=True)
class Process:
    """This process's place among those that torchrun started; alone, rank 0 of 1."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print in the main process alone."""
        if self.is_main:
            print(*args, flush=True, **kwargs)


# From torchrun's environment, so that configuration can be checked before any process group exists.
def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def pick_device(name: str) -> torch.device:
    """The device of this process: `name`, or with "auto" the first of CUDA, Apple's mps and the CPU that is there.

    Raises:
        ValueError: no such device here; the message names the cure.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "mps" and world_size() > 1:
            name = "cpu"  # there is one mps device, and no process group works over it
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name}: name auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0)) if world_size() > 1 else device.index or 0
        # Every process asks for the last one's GPU too: the one that prints must see the error.
        largest = int(os.environ["LOCAL_WORLD_SIZE"]) - 1 if world_size() > 1 else index
        if largest >= torch.cuda.device_count():
            raise ValueError(
                f"device={name}: GPU {largest} was asked for and {torch.cuda.device_count()} are visible; "
                "start fewer processes, or pass --device cpu"
            )
        return torch.device("cuda", index)
    if device.type == "mps" and (world_size() > 1 or not torch.backends.mps.is_available()):
        raise ValueError(f"device={name}: needs an Apple GPU and a single process; pass --device cpu")
    if device.type not in ("cpu", "mps"):
        raise ValueError(f"device={name}: name auto, cpu, cuda, cuda:N or mps")
    return device


def start_process(device: torch.device) -> Process:
    """Join the process group (NCCL between GPUs, gloo between CPUs) if torchrun started this process."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before the group exists: NCCL takes the current device
    if device.type == "cpu":
        keep_freed_memory()
    if world_size() > 1:
        if device.type == "cpu":  # torchrun sets one thread a process, whatever the cores
            torch.set_num_threads(max(1, num_cores() // int(os.environ["LOCAL_WORLD_SIZE"])))
            dist.init_process_group("gloo")
        else:
            dist.init_process_group("nccl", device_id=device)
    return Process(int(os.environ.get("RANK", 0)), world_size(), device)


def sum_over_processes(values: list[float], device: torch.device) -> list[float]:
    """Element-wise sum of a few numbers over all processes, in float64."""
    if not dist.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def in_main_process(work: Callable[[], None], process: Process) -> None:
    """Do `work` in the main process while the others wait; where it fails, all of them end, not one of many."""
    failure = None
    if process.is_main:
        try:
            work()
        except Exception as error:
            failure = error
    [failed] = sum_over_processes([float(failure is not None)], process.device)
    if failed:
        raise failure or SystemExit(1)


def share(loss: float, stop: int, process: Process) -> tuple[list[float], int]:
    """Every process's loss, and the largest of their wishes to stop, the same in all: one small all-reduce."""
    table = [0.0] * (2 * process.world_size)
    table[process.rank], table[process.world_size + process.rank] = loss, stop
    table = sum_over_processes(table, process.device)
    return table[: process.world_size], int(max(table[process.world_size :]))


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a wish that the loop grants after the current step; the second kills."""

    def __init__(self):
        self.number = 0  # of the signal that came
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number: int, frame: Any) -> None:
        self.number = number
        signal.signal(number, signal.SIG_DFL)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here, found out by compiling one line: it needs a C++ compiler or Triton."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
        return True
    except Exception as error:  # whatever the compiler says, the answer is no, and training goes on without it
        if is_main_process():
            print(f"torch.compile does not work here ({type(error).__name__}); training uncompiled, which is slower")
        return False


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware. Elsewhere, as on most laptops' CPUs, it is emulated, ten to
    a hundred times slower than float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        has_bf16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    else:
        has_bf16 = True
    return torch.bfloat16 if has_bf16 else torch.float32


def cast_weights(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The blocks' matrices by name, in `dtype`; gradients flow back through them to the parameters.

    For `torch.func.functional_call`: autocast alone would cast them in every micro-step. The embedding is a look-up,
    and the output layer's gradient is summed in float32, so OutputLoss casts its matrix itself.
    """
    names = [name for name, p in model.named_parameters() if p.dim() == 2 and p.dtype != dtype and "layers." in name]
    weights = {name: model.get_parameter(name).to(dtype) for name in names}
    for weight in weights.values():
        # Autograd takes what was made last first. Made before the forward pass, the casts would all wait for its end,
        # and data parallelism could send no gradient meanwhile.
        weight.grad_fn._set_sequence_nr(2**63 - 1)
    return weights


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next step. It would give large blocks back to the system, to have
    them handed out again page by page, zeroed: that took a tenth of a training step on a CPU.

    The switches are glibc's, mallopt(3); other libraries have none and are left alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no blocks in mappings of their own
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing given back


# Dense bf16 peak of a card in FLOP/s, from the vendors' data sheets; the first name found in the card's name counts.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A6000": 155e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that a perfect program would reach: a known GPU's published bf16 peak, else a matmul measured now."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for card, flops in PEAK_FLOPS.items():
            if re.search(rf"\b{card}\b", name):  # an "RTX A1000" is no A100
                return flops
    n = 1024 if device.type == "cpu" else 4096
    a = torch.randn(n, n, device=device).to(dtype)
    seconds = []
    while len(seconds) < 10 and sum(seconds) < 0.5:  # where bf16 is emulated, one takes seconds
        began = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds)


def flops_per_token(model: Transformer) -> float:
    """Forward and backward arithmetic of one token: 6 for each weight of a matrix product, and 12 L H K T for
    attention (PaLM, arXiv 2204.02311, appendix B). The embedding is a look-up and does not count."""
    config = model.config
    weights = sum(p.numel() for name, p in model.named_parameters(remove_duplicate=False) if p.dim() == 2)
    weights -= model.tok_embeddings.weight.numel()
    return 6 * weights + 12 * config.n_layers * config.dim * config.max_seq_len


# ---------------------------------------------------------------- checkpoints

CHECKPOINT_FORMAT_VERSION = 1


def checkpoints_in(folder: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(Path(folder).glob("step_*.pt"))


def save_checkpoint(folder: str | Path, checkpoint: dict, *, keep: int, is_best: bool) -> Path:
    """Write `folder/step_NNNNNNNN.pt` whole or not at all, then drop all but the newest `keep`; return its path.

    With `is_best`, `folder/best.pt` becomes another name of the same file, and stays when the step is dropped.

    Raises:
        OSError: it could not be written (a full disk); the older checkpoints are untouched.
    """
    path = Path(folder) / f"step_{checkpoint['step']:08d}.pt"
    for leftover in Path(folder).glob(".step_*.tmp"):  # of a save that was killed
        leftover.unlink()
    try:
        with atomic_write(path) as file:
            torch.save({"format_version": CHECKPOINT_FORMAT_VERSION, **checkpoint}, file)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        last = checkpoints_in(folder)
        reason = error if isinstance(error, OSError) else error.__cause__ or error.__context__ or error
        raise OSError(
            f"{path}: could not be written ({reason}); make room or choose another --out_dir; the last "
            f"good checkpoint is {last[-1] if last else 'none'}"
        ) from error
    if is_best:
        link = path.with_name(".best.pt.tmp")
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, link)
        os.replace(link, path.with_name("best.pt"))
    for old in checkpoints_in(folder)[:-keep]:
        old.unlink()
    return path


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint file as it is; of a run directory or its `checkpoints/`, the newest.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    found = checkpoints_in(path / "checkpoints") or checkpoints_in(path)
    if not found:
        raise FileNotFoundError(f"{path}: no checkpoint there; give a .pt file or a run directory that holds one")
    return found[-1]


def load_checkpoint(path: str | Path, device: torch.device | str) -> dict:
    """Read what `save_checkpoint` wrote, as plain data and tensors on `device`; no code in the file is run.

    Raises:
        ValueError: the file is damaged or not one of ours.
        OSError, MemoryError, torch.OutOfMemoryError: it could not be read, or does not fit.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the check sums
            if damaged := archive.testzip():
                raise ValueError(f"the check sum of {damaged} is wrong")
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        version = checkpoint["format_version"]
    except (OSError, MemoryError, torch.OutOfMemoryError):  # the file may be in order
        raise
    except Exception as error:  # zip, pickle and torch errors: for the user all mean the same
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        if "allocate memory" in reason:  # as torch says it of a CPU's
            raise MemoryError(f"{path}: does not fit into memory ({reason})") from error
        raise ValueError(
            f"{path}: not a readable checkpoint ({reason}); if it was one, delete it and use an older one"
        ) from error
    if version != CHECKPOINT_FORMAT_VERSION:
        raise ValueError(
            f"{path}: of format {version}, this code reads {CHECKPOINT_FORMAT_VERSION}; take the code that wrote it"
        )
    return checkpoint


def load_model(path: str | Path, device: torch.device | str) -> tuple[Transformer, dict]:
    """The model of a checkpoint (file or run directory), rebuilt from the file alone; and the rest of the checkpoint,
    without the optimizers' state, which is twice as large as the weights."""
    path = find_checkpoint(path)
    checkpoint = load_checkpoint(path, "cpu")  # of a GPU's memory the weights alone are taken
    try:
        model = Transformer(ModelConfig(**checkpoint["config"]["model"]))
        model.load_state_dict(checkpoint.pop("model"))
    except (KeyError, TypeError, RuntimeError) as error:  # a field or weight missing, unknown or of another shape
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: its weights and its configuration do not make a model ({reason})") from error
    checkpoint.pop("optimizers", None)
    return model.to(device).eval(), checkpoint


def random_state() -> dict:
    """State of every random generator of this process, as plain data and tensors."""
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


# ---------------------------------------------------------------- logging


class NullRun:
    """Stands in for a Weights & Biases run and does nothing."""

    def log(self, *args: Any, **kwargs: Any) -> None: ...

    def finish(self, *args: Any, **kwargs: Any) -> None: ...


def start_wandb(*, project: str, name: str, run_id: str, config: dict, folder: Path, is_main: bool) -> Any:
    """A Weights & Biases run in the main process if WANDB_API_KEY is set, else a `NullRun`.

    A resumed run goes on under its `run_id`. Without the key wandb is not even imported; trouble on its side is one
    printed line and does not stop training.
    """
    if not is_main or not os.environ.get("WANDB_API_KEY"):
        return NullRun()
    try:
        import wandb

        return wandb.init(project=project, name=name, id=run_id, resume="allow", config=config, dir=folder)
    except Exception as error:  # no account, no network, a wrong key: the run is worth more than its plots
        print(f"Weights & Biases is off ({type(error).__name__}: {str(error).partition(chr(10))[0]})")
        return NullRun()


class MetricsLog:
    """Appends rows to `metrics.jsonl`, a line each, flushed; rows also go to Weights & Biases."""

    def __init__(self, folder: Path, wandb_run: Any, is_main: bool, last_step: int):
        """Rows beyond `last_step`, left by a run that went on after its last checkpoint, are dropped."""
        self.path, self.wandb_run, self.file = folder / "metrics.jsonl", wandb_run, None
        if is_main:
            kept = []
            if self.path.is_file():
                for line in self.path.read_text().splitlines():
                    try:
                        if json.loads(line)["step"] <= last_step:
                            kept.append(line + "\n")
                    except ValueError:
                        pass  # the line that a kill cut short
            with atomic_write(self.path, "w") as file:
                file.writelines(kept)
            self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 (open as long as the run)

    def write(self, row: dict) -> None:
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
            try:
                self.wandb_run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])
            except Exception as error:
                print(f"Weights & Biases is off from step {row['step']} ({type(error).__name__}: {error})")
                self.wandb_run = NullRun()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        try:
            self.wandb_run.finish()
        except Exception as error:
            print(f"Weights & Biases could not finish ({type(error).__name__}: {error})")


def config_as_dict(config: Any) -> dict:
    """A dataclass as plain JSON data."""
    return json.loads(json.dumps(asdict(config)))
