"""What a run needs around the model: its processes, the wrapped model, loading a model, the records of a run."""

import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

import cpu_kernels
import cuda_kernels
from checkpoints import read_state
from config import Config, config_as_dict, rank, world_size
from files import atomic_write
from hardware import can_compile, keep_freed_memory, peak_flops
from model import Transformer
from model_folders import find_checkpoint, read_model, verify_checkpoint
from threads import num_cores

# ---------------------------------------------------------------- processes


@dataclass(frozen=True)
class Process:
    """This process's place among those that torchrun started. A process alone is rank 0 of 1."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on rank zero alone."""
        if self.is_main:
            print(*args, flush=True, **kwargs)


def start_process(device: torch.device) -> Process:
    """Join the process group (NCCL between GPUs, gloo between CPUs) if torchrun started this process."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before the group exists, because NCCL takes the current device
    if device.type == "cpu":
        keep_freed_memory()
    if world_size() > 1:
        if device.type == "cpu":  # torchrun sets one thread a process, however many cores there are
            torch.set_num_threads(max(1, num_cores() // int(os.environ["LOCAL_WORLD_SIZE"])))
            dist.init_process_group("gloo")
        else:
            dist.init_process_group("nccl", device_id=device)
    return Process(rank(), world_size(), device)


def sum_over_processes(values: list[float], device: torch.device) -> list[float]:
    """Element-wise sum of a few numbers over all processes, in float64."""
    if not dist.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


class RankZeroFailed(Exception):
    """What rank zero did for all has failed there. Rank zero says why."""


def run_on_rank_zero(work: Callable[[], Any], process: Process) -> None:
    """Do `work` on rank zero while the other ranks wait. If it fails there, all ranks end.

    Raises:
        Exception: what `work` raised, on rank zero. RankZeroFailed on the other ranks.
    """
    failure = None
    if process.is_main:
        try:
            work()
        except Exception as error:
            failure = error
    [failed] = sum_over_processes([float(failure is not None)], process.device)
    if failed:
        raise failure or RankZeroFailed


def share_loss_and_stop(loss: float, stop: int, process: Process) -> tuple[list[float], int]:
    """Every rank's loss, and the largest signal number that any rank has seen, in one small all-reduce."""
    table = [0.0] * (2 * process.world_size)
    table[process.rank], table[process.world_size + process.rank] = loss, stop
    table = sum_over_processes(table, process.device)
    return table[: process.world_size], int(max(table[process.world_size :]))


class StopSignal:
    """Notes the first Ctrl-C or SIGTERM, so that the loop can stop after the current step. The second one kills."""

    def __init__(self):
        self.number = 0  # of the signal that came
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number: int, frame: Any) -> None:
        self.number = number
        signal.signal(number, signal.SIG_DFL)


# ---------------------------------------------------------------- the model, as the loop trains it


def place_model(model: Transformer, device: torch.device) -> Transformer:
    """Move `model` to `device`, and put in the kernels that are faster there. The numbers stay the same."""
    (cpu_kernels if device.type == "cpu" else cuda_kernels).install(model)
    return model.to(device)


def wrap_model(
    model: Transformer, optimizers: Sequence[torch.optim.Optimizer], cfg: Config, process: Process
) -> nn.Module:
    """`model` compiled, in mixed precision, and with its gradients averaged over the processes, in this order.

    The result trains the parameters of `model`, so load a checkpoint into `model` first. Sharding over the processes
    would come here, before compiling.
    """
    if cfg.compile is True or (cfg.compile == "auto" and can_compile(process.device, process.print)):
        compile_blocks(model)
        process.print("compiling; the first step takes up to a minute")
    wrapped: nn.Module = MixedPrecision(model, getattr(torch, cfg.dtype), optimizers)
    if process.world_size > 1:
        wrapped = DistributedDataParallel(wrapped, gradient_as_bucket_view=True, forward_sync_buffers=False)
    return wrapped


def compile_blocks(model: Transformer) -> None:
    """Compile each block, and the kernel of the loss. A step is as fast as with the whole model in one graph.

    The blocks share their code, so the first block is compiled for all, and the wait is half as long. The gradients of
    a block are there when its backward pass is done, so DDP can send them while the other blocks are computed.
    """
    torch._dynamo.config.optimize_ddp = False  # it would cut the graphs of the blocks again, by size
    for layer in model.layers:
        layer.compile(dynamic=False)
    model.loss.kernel = torch.compile(model.loss.kernel, dynamic=False)


class MixedPrecision(nn.Module):
    """Runs a model under autocast to `dtype`. Its parameters, their gradients and their updates stay float32.

    Autocast alone would cast the blocks' matrices in every micro-step. Here they are cast once an update: the casts of
    the first micro-step serve until one of the `optimizers` has made its step. Load weights before the first forward
    pass: a change by anything but these optimizers is not seen.
    """

    def __init__(self, model: Transformer, dtype: torch.dtype, optimizers: Sequence[torch.optim.Optimizer]):
        super().__init__()
        self.model, self.dtype = model, dtype
        self._casts: dict[str, Tensor] | None = None
        for optimizer in optimizers:
            optimizer.register_step_post_hook(self._drop_casts)

    def _drop_casts(self, *_: Any) -> None:
        self._casts = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._casts is None:
            with torch.enable_grad():  # a later forward pass may need gradients, even if this one does not
                self._casts = cast_weights(self.model, self.dtype)
        with autocast(self.model.output.weight.device, self.dtype):
            return functional_call(self.model, self._casts, args, kwargs, tie_weights=False)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in bfloat16 if `dtype` is bfloat16. Nothing changes for float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def cast_weights(model: Transformer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The blocks' matrices by name, in `dtype`. Gradients flow back through them to the parameters.

    The embedding is a look-up and needs no cast. The gradient of the output layer is summed in float32, so the loss
    casts that matrix itself.
    """
    names = [name for name, p in model.named_parameters() if p.dim() == 2 and p.dtype != dtype and "layers." in name]
    weights = {name: model.get_parameter(name).to(dtype) for name in names}
    for weight in weights.values():
        # Autograd runs the newest nodes first. The casts are older than the forward pass, so without this line they
        # would all run at the end of the backward pass, and DDP could send no gradient before.
        weight.grad_fn._set_sequence_nr(2**63 - 1)
    return weights


def flops_per_token(model: Transformer) -> float:
    """Arithmetic of the forward and backward pass of one token: 6 for each weight of a matrix product, and 12 L H K T
    for attention (PaLM, arXiv 2204.02311, appendix B). The embedding is a look-up and does not count."""
    config = model.config
    weights = sum(p.numel() for name, p in model.named_parameters(remove_duplicate=False) if p.dim() == 2)
    weights -= model.tok_embeddings.weight.numel()
    return 6 * weights + 12 * config.n_layers * config.dim * config.max_seq_len


def load_model(path: str | Path, device: torch.device) -> tuple[Transformer, dict]:
    """The model of a checkpoint, a run directory, or any Llama 3 in Hugging Face's layout.

    Returns the model too with what is known of it: "step" (None for a folder of another program) and "dtype", that of
    its products in training.

    Raises:
        ValueError, OSError: there is no such folder, it is damaged, or it holds another model than a Llama 3.
    """
    path = find_checkpoint(path)
    verify_checkpoint(path, training_state=False)
    model, settings = read_model(path)
    state = read_state(path)
    dtype = state["config"]["dtype"] if state else settings.get("dtype", settings.get("torch_dtype"))
    return place_model(model, torch.device(device)).eval(), {"step": state.get("step"), "dtype": dtype}


# ---------------------------------------------------------------- records of a run


class NullRun:
    """Stands in for a Weights & Biases run and does nothing."""

    def log(self, *args: Any, **kwargs: Any) -> None: ...

    def finish(self, *args: Any, **kwargs: Any) -> None: ...


def start_wandb(cfg: Config, run_id: str, process: Process) -> Any:
    """A Weights & Biases run on rank zero if WANDB_API_KEY is set, else a `NullRun`.

    A resumed run goes on under its `run_id`. Without the key wandb is not even imported. An error of wandb is one
    printed line and does not stop training.
    """
    if not process.is_main or not os.environ.get("WANDB_API_KEY"):
        return NullRun()
    try:
        import wandb

        return wandb.init(
            project=cfg.wandb_project,
            name=Path(cfg.out_dir).name,
            id=run_id,
            resume="allow",
            config=config_as_dict(cfg),
            dir=cfg.out_dir,
        )
    except Exception as error:  # no account, no network, a wrong key: the run is worth more than its plots
        print(f"Weights & Biases is off ({type(error).__name__}: {str(error).partition(chr(10))[0]})")
        return NullRun()


class MetricsLog:
    """Appends rows to `metrics.jsonl`, a line each, flushed. Rows also go to Weights & Biases."""

    def __init__(self, folder: Path, wandb_run: Any, is_main: bool, last_step: int):
        """Drop the rows beyond `last_step`: an earlier run wrote them after its last checkpoint."""
        self.path, self.wandb_run, self.file = folder / "metrics.jsonl", wandb_run, None
        if is_main:
            kept = []
            if self.path.is_file():
                for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                    try:
                        if json.loads(line)["step"] <= last_step:
                            kept.append(line + "\n")
                    except ValueError:
                        pass  # a kill cut this line short
            with atomic_write(self.path, "w") as file:
                file.writelines(kept)
            self.file = open(self.path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 (open as long as the run)

    def write(self, row: dict) -> None:
        """Append `row`. An error of Weights & Biases ends its part alone."""
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


def open_run_folder(cfg: Config) -> None:
    """Make out_dir and its config.json. An earlier run there is moved aside, not lost, unless this run resumes it.

    Raises:
        OSError: out_dir or its checkpoints/ cannot be written to. A run would find the latter hours later.
    """
    out_dir = Path(cfg.out_dir)
    try:
        if not cfg.resume and ((out_dir / "metrics.jsonl").is_file() or any(out_dir.glob("checkpoints/step_*"))):
            aside = next(p for i in itertools.count(1) if not (p := out_dir.with_name(f"{out_dir.name}.{i}")).exists())
            out_dir.rename(aside)
            print(f"{out_dir} held an earlier run, now in {aside}; --resume True would have gone on with it")
        (out_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out_dir / "checkpoints"), atomic_write(out_dir / "config.json", "w") as file:
            json.dump(config_as_dict(cfg), file, indent=1)
    except OSError as error:
        raise OSError(f"out_dir={out_dir}: cannot be written to ({error}); choose another --out_dir") from error


class Records:
    """Writes the rows of a run into its folder and prints its lines, on rank zero alone."""

    def __init__(self, model: Transformer, cfg: Config, process: Process, run_id: str, last_step: int):
        """Open the run folder. Rows beyond `last_step` (-1: all) are dropped."""
        run_on_rank_zero(partial(open_run_folder, cfg), process)
        self.cfg, self.process = cfg, process
        self.metrics = MetricsLog(Path(cfg.out_dir), start_wandb(cfg, run_id, process), process.is_main, last_step)
        self.peak = process.world_size * peak_flops(process.device, getattr(torch, cfg.dtype))  # FLOP/s of all devices
        self.flops = flops_per_token(model)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.first_step: tuple[int, float] | None = None  # its number, and the time when it was done

    def write(self, step: int, row: dict, line: str) -> None:
        """A row of metrics.jsonl, and a printed line if `line` is not empty."""
        self.metrics.write({"step": step, "tokens": step * self.cfg.total_batch_size, **row})
        if line:
            self.process.print(f"step {step:>6}  {line}")

    def training(self, step: int, seconds: float, row: dict) -> None:
        """The row of an update that took `seconds`: `row` holds train_loss, lr and grad_norm."""
        tokens_per_sec = self.cfg.total_batch_size / seconds
        row = row | {"tokens_per_sec": tokens_per_sec, "mfu": tokens_per_sec * self.flops / self.peak}
        # The first step is left out of the estimate of the time left, because it also compiles.
        self.first_step = self.first_step or (step, time.perf_counter())
        number, done = self.first_step
        left = (time.perf_counter() - done) / max(1, step - number) * (self.cfg.max_steps - step)
        line = (
            f"loss {row['train_loss']:.4f}  lr {row['lr']:.2e}  norm {row['grad_norm']:.2f}  "
            f"{tokens_per_sec:,.0f} tokens/s  mfu {row['mfu']:.0%}  {timedelta(seconds=round(left))} left"
        )
        self.write(step, row, line if step % self.cfg.log_every == 0 or step == self.cfg.max_steps else "")

    def validation(self, step: int, row: dict, shares: dict[str, float]) -> None:
        """`row` is `evaluation.validate`'s. `shares` of mixed folders in the windows so far are recorded with it."""
        line = f"validation {row['val_loss']:.4f} nats a token, {row['val_bpb']:.4f} bits a byte"
        line += "".join(f", {share:.1%} of {folder}" for folder, share in shares.items())
        self.write(step, row | ({"data_shares": shares} if shares else {}), line)

    def hellaswag(self, step: int, row: dict, name: str) -> None:
        """`row` is `evaluation.score_hellaswag`'s, `name` what to call the benchmark."""
        acc, acc_norm, examples = (row[f"hellaswag_{key}"] for key in ("acc", "acc_norm", "examples"))
        self.write(step, row, f"{name}: acc {acc:.1%}, acc_norm {acc_norm:.1%} of {examples:,} (chance 25%)")

    def samples(self, step: int, row: dict) -> None:
        """`row` is `evaluation.draw_samples`'s, which is empty on all ranks but zero. The texts go to samples.txt."""
        if row:
            text = "\n\n".join(row["samples"])
            with open(Path(self.cfg.out_dir) / "samples.txt", "a", encoding="utf-8") as file:
                file.write(f"===== step {step}\n{text}\n\n")
            self.process.print(f"----- step {step}\n{text}\n-----")


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one. Run train.py.")
