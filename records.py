"""The records of a run: metrics.jsonl, samples.txt, printed lines; and what Weights & Biases and TensorBoard get."""

import itertools
import json
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from config import Config, config_as_dict
from files import atomic_write
from hardware import peak_flops
from model import Transformer
from model_folders import checkpoints_in
from model_utils import NullRun, flops_per_token, start_wandb
from processes import Process, run_on_rank_zero
from run_lock import RunLock


class MetricsLog:
    """Appends rows to `metrics.jsonl`, a line each, flushed. Rows also go to Weights & Biases and to TensorBoard."""

    def __init__(self, folder: Path, wandb_run: Any, is_main: bool, last_step: int, tensorboard: Any = None):
        """Drop the rows beyond `last_step`: an earlier run wrote them after its last checkpoint."""
        self.path, self.wandb_run, self.file = folder / "metrics.jsonl", wandb_run, None
        self.tensorboard = tensorboard  # a SummaryWriter, or None
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
        """Append `row`."""
        if self.file is None:
            return
        self.file.write(json.dumps(row) + "\n")
        fields = {key: value for key, value in row.items() if key != "step"}
        self.tell_wandb(lambda run: run.log(fields, step=row["step"]))
        if self.tensorboard is not None:
            for key, value in fields.items():
                if isinstance(value, int | float):
                    self.tensorboard.add_scalar(key, value, row["step"])

    def samples(self, step: int, tokens: int, texts: list[str]) -> None:
        """Show texts in Weights & Biases, as a table, and in TensorBoard."""

        def log(run: Any) -> None:
            import wandb

            table = wandb.Table(columns=["step", "text"], data=[[step, text] for text in texts])
            run.log({"samples": table, "tokens": tokens}, step=step)

        if not isinstance(self.wandb_run, NullRun):
            self.tell_wandb(log)
        if self.tensorboard is not None:
            for i, text in enumerate(texts):
                self.tensorboard.add_text(f"sample {i}", f"```\n{text}\n```", step)

    def upload(self, checkpoint: Path, name: str) -> None:
        """Upload a checkpoint to Weights & Biases, as an artifact."""

        def log(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(name, type="model")
            artifact.add_dir(str(checkpoint))
            run.log_artifact(artifact)

        if not isinstance(self.wandb_run, NullRun):
            self.tell_wandb(log)

    def tell_wandb(self, what: Callable[[Any], None]) -> None:
        """Call `what` with the run. An error of Weights & Biases is a printed line, and ends its part alone."""
        try:
            what(self.wandb_run)
        except Exception as error:
            print(f"Weights & Biases is off from here on ({type(error).__name__}: {error})")
            self.wandb_run = NullRun()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        self.tell_wandb(lambda run: run.finish())
        if self.tensorboard is not None:
            self.tensorboard.close()


def start_tensorboard(cfg: Config, process: Process, last_step: int) -> Any:
    """A SummaryWriter on rank zero if the configuration asks for it, else None. Events beyond `last_step` are hidden.

    Raises:
        ValueError: the package tensorboard is not there.
    """
    if not (cfg.tensorboard and process.is_main):
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"tensorboard=True: {error}; `pip install tensorboard`, or leave the flag out") from error
    return SummaryWriter(str(Path(cfg.out_dir) / "tensorboard"), purge_step=last_step + 1)


def recorded_at(out_dir: Path, step: int) -> set[str]:
    import json as j

    p = out_dir / "metrics.jsonl"
    if not p.is_file():
        return set()
    found = set()
    for line in p.read_text(errors="replace").splitlines():
        try:
            row = j.loads(line)
        except ValueError:
            continue
        if row.get("step") == step:
            found |= row.keys() & {"val_loss", "hellaswag_acc", "samples_end"}
    return found


def open_run_folder(cfg: Config, goes_on: bool) -> None:
    """Make out_dir and its config.json. An earlier run there is moved aside, not lost, unless this run goes on with it.

    Raises:
        OSError: out_dir or its checkpoints/ cannot be written to. A run would find the latter hours later.
    """
    out_dir = Path(cfg.out_dir)
    try:
        if not goes_on and ((out_dir / "metrics.jsonl").is_file() or any(out_dir.glob("checkpoints/step_*"))):
            aside = next(p for i in itertools.count(1) if not (p := out_dir.with_name(f"{out_dir.name}.{i}")).exists())
            aside.mkdir()
            for entry in sorted(out_dir.iterdir()):  # not the folder: this run's lock is in it
                if entry.name not in RunLock.FILES:
                    entry.rename(aside / entry.name)
            print(f"{out_dir} held an earlier run, now in {aside}; --resume True would have gone on with it")
        (out_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out_dir / "checkpoints"), atomic_write(out_dir / "config.json", "w") as file:
            json.dump(config_as_dict(cfg), file, indent=1)
    except OSError as error:
        raise OSError(f"out_dir={out_dir}: cannot be written to ({error}); choose another --out_dir") from error


class Records:
    """Writes the rows of a run into its folder and prints its lines, on rank zero alone."""

    def __init__(
        self, model: Transformer, cfg: Config, process: Process, run_id: str, last_step: int, *, goes_on: bool = False
    ):
        """Open the run folder. It holds an earlier part of this run if it `goes_on`; rows beyond `last_step` (-1: all)
        are dropped."""
        run_on_rank_zero(partial(open_run_folder, cfg, goes_on), process)
        self.cfg, self.process = cfg, process
        self.run_id, tensorboard = run_id, start_tensorboard(cfg, process, last_step)
        wandb_run = start_wandb(cfg, run_id, process)
        self.metrics = MetricsLog(Path(cfg.out_dir), wandb_run, process.is_main, last_step, tensorboard)
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
            self.metrics.samples(step, step * self.cfg.total_batch_size, row["samples"])
            self.process.print(f"----- step {step}\n{text}\n-----")

    def close(self, *, finished: bool) -> None:
        """End the records. With `wandb_artifact` the last checkpoint of a finished run goes to Weights & Biases."""
        checkpoints = checkpoints_in(Path(self.cfg.out_dir) / "checkpoints")
        if finished and checkpoints and self.cfg.wandb_artifact:
            self.metrics.upload(checkpoints[-1], f"{Path(self.cfg.out_dir).name}-{self.run_id}")
        self.metrics.close()


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one. Run train.py.")
