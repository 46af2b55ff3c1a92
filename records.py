"""The records of a run: metrics.jsonl, samples.txt, printed lines; and what Weights & Biases and TensorBoard get."""

import itertools
import json
import math
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from threads import num_cores

import torch
from tqdm import tqdm

from config import Config, config_as_dict
from files import atomic_write
from hardware import device_name, peak_flops
from model import Transformer
from model_folders import checkpoints_in
from model_utils import flops_per_token
from processes import Process, run_on_rank_zero
from progress import decimals, duration, summary, validation_words
from report import write_report
from run_folders import read_about
from run_lock import RunLock
from wandb_log import WandbLog, start_wandb


class GrowingFile:
    """A text file that grows. What cannot be written is kept, and written with the next text once there is room."""

    def __init__(self, path: Path):
        self.path, self.file, self.kept, self.said = path, None, b"", False
        self.size = path.stat().st_size if path.exists() else 0  # up to the end of the last whole text

    def append(self, text: str) -> int:
        """Append `text`, and return the size of the file with it. The first failure is a printed line, no error."""
        self.kept += text.encode(errors="replace")
        try:
            if self.file is None:
                self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)
                self.file.truncate(self.size)  # a full disk may have taken half a line
            rest = memoryview(self.kept)
            while rest:
                rest = rest[self.file.write(rest) :]
            self.size, self.kept = self.size + len(self.kept), b""
        except OSError as error:
            self._let_go()
            if not self.said:
                self.said = True
                complain(
                    f"{self.path.name}: not written for now ({error.strerror or error}); training goes on; what is "
                    "missing is kept, and written when there is room"
                )
        return self.size + len(self.kept)

    def close(self) -> None:
        """Try for the last time to write what was kept."""
        if self.kept:
            self.append("")
        if self.kept:
            complain(f"{self.path}: its last {len(self.kept):,} bytes were never written; it is whole up to there")
        self._let_go()

    def _let_go(self) -> None:
        with suppress(OSError):  # of a lost disk; the next append opens the file again
            if self.file is not None:
                self.file.close()
        self.file = None


def complain(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def read_rows(out_dir: Path) -> list[dict]:
    """The rows of metrics.jsonl; none where there is no file. A line that a kill or a power cut damaged is left out."""
    path, rows = out_dir / "metrics.jsonl", []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError):  # no JSON
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def recorded_at(out_dir: Path, step: int) -> set[str]:
    """Which of val_loss, hellaswag_acc and samples_end the rows of metrics.jsonl hold at `step`."""
    keys = {key for row in read_rows(out_dir) if row["step"] == step for key in row}
    return keys & {"val_loss", "hellaswag_acc", "samples_end"}


def recorded_loss(out_dir: Path, checkpoint: Path | None) -> float | None:
    """The val_loss that the rows of metrics.jsonl have of the step of a checkpoint; None if there is none."""
    name = checkpoint.name if checkpoint else ""
    losses = [row["val_loss"] for row in read_rows(out_dir) if "val_loss" in row and f"step_{row['step']:08d}" == name]
    return losses[-1] if losses and isinstance(losses[-1], float) else None


def drop_after(out_dir: Path, last_step: int) -> None:
    """Drop the rows and samples beyond `last_step`: an earlier run wrote them after its last checkpoint.

    Raises:
        OSError: the folder cannot be written to.
    """
    rows = read_rows(out_dir)
    kept = [row for row in rows if row["step"] <= last_step]
    samples = out_dir / "samples.txt"
    if samples.is_file() and (last_step < 0 or any("samples_end" in row for row in rows)):
        end = next((row["samples_end"] for row in reversed(kept) if "samples_end" in row), 0)
        os.truncate(samples, min(end, samples.stat().st_size))
    with atomic_write(out_dir / "metrics.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in kept)


class MetricsLog:
    """Appends rows to `metrics.jsonl`, a line each. Rows also go to Weights & Biases and to TensorBoard."""

    def __init__(self, folder: Path, wandb: WandbLog | None = None, tensorboard: Any = None):
        self.rows, self.texts = GrowingFile(folder / "metrics.jsonl"), GrowingFile(folder / "samples.txt")
        self.wandb, self.tensorboard = wandb, tensorboard  # tensorboard: a SummaryWriter, or None

    def write(self, row: dict) -> None:
        """Append `row`."""
        self.rows.append(json.dumps(row) + "\n")
        fields = {key: value for key, value in row.items() if key != "step"}
        if self.wandb:
            self.wandb.log(row["step"], fields)

        def add(writer: Any) -> None:
            for key, value in fields.items():
                if isinstance(value, int | float):
                    writer.add_scalar(key, value, row["step"])

        self.tell_tensorboard(add)

    def samples(self, step: int, tokens: int, texts: list[str]) -> None:
        """Append texts to samples.txt, and a row with its size: a run that repeats this step cuts the file there."""
        text = "\n\n".join(texts)
        end = self.texts.append(f"===== step {step}\n{text}\n\n")
        self.rows.append(json.dumps({"step": step, "tokens": tokens, "samples_end": end}) + "\n")
        if self.wandb:
            self.wandb.samples(step, tokens, texts)

        def add(writer: Any) -> None:
            for i, text in enumerate(texts):
                writer.add_text(f"sample {i}", f"```\n{text}\n```", step)

        self.tell_tensorboard(add)

    def tell_tensorboard(self, what: Callable[[Any], None]) -> None:
        """Call `what` with the writer. An error, as of a full disk, is a printed line and ends TensorBoard's part."""
        try:
            if self.tensorboard is not None:
                what(self.tensorboard)
        except Exception as error:
            complain(f"TensorBoard is off from here on ({type(error).__name__}: {error})")
            self.tensorboard = None

    def close(self) -> None:
        self.rows.close()
        self.texts.close()
        self.tell_tensorboard(lambda writer: writer.close())
        if self.wandb:
            self.wandb.close()


def start_tensorboard(cfg: Config, last_step: int) -> Any:
    """A SummaryWriter if the configuration asks for it, else None. Events beyond `last_step` are hidden.

    Raises:
        ValueError: the package tensorboard is not there.
    """
    if not cfg.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"tensorboard=True: {error}; `pip install tensorboard`, or leave the flag out") from error
    return SummaryWriter(str(Path(cfg.out_dir) / "tensorboard"), purge_step=last_step + 1)


def open_run_folder(cfg: Config, goes_on: bool) -> None:
    """Make out_dir and its config.json. An earlier run there is moved aside, not lost, unless this run goes on with it.

    Raises:
        OSError: out_dir or its checkpoints/ cannot be written to. A run would find the latter hours later.
    """
    out_dir = Path(cfg.out_dir)
    try:
        for leftover in out_dir.glob(".*.tmp"):  # of a run that was killed
            leftover.unlink()
        # Rows beyond the first save tell of checkpoints. If a run goes on without any, somebody has removed them.
        had_some = cfg.save_every and any(row["step"] > cfg.save_every for row in read_rows(out_dir))
        if had_some and not any(out_dir.glob("checkpoints/step_*")):
            goes_on = False
        if not goes_on and ((out_dir / "metrics.jsonl").is_file() or any(out_dir.glob("checkpoints/step_*"))):
            aside = next(p for i in itertools.count(1) if not (p := out_dir.with_name(f"{out_dir.name}.{i}")).exists())
            aside.mkdir()
            for entry in sorted(out_dir.iterdir()):  # not the folder: this run's lock is in it
                if entry.name not in RunLock.FILES:
                    entry.rename(aside / entry.name)
            print(f"{out_dir} held an earlier run, now in {aside}")
            if not cfg.resume:
                print("(--resume True would have gone on with it)")
        (out_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out_dir / "checkpoints"), atomic_write(out_dir / "config.json", "w") as file:
            json.dump(config_as_dict(cfg), file, indent=1)
    except OSError as error:
        raise OSError(f"out_dir={out_dir}: cannot be written to ({error}); choose another --out_dir") from error


def note_start(out_dir: Path, parameters: int, start: dict[str, Any]) -> None:
    """Add a `start` to run.json: when, after which step (None: of a new run), on what. The page of the run shows them.

    A file of that name that no run has written is left alone, and a printed line says so.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = out_dir / "run.json"
    known = read_about(path)
    if not known and os.path.lexists(path):
        complain(f"{path}: no run has written this file, so it stays, and the page does without date and parameters")
        return
    earlier = [] if start["after_step"] is None else known.get("starts", [])
    with atomic_write(path, "w") as file:
        json.dump({"parameters": parameters, "starts": [*earlier, start]}, file, indent=1)


class Records:
    """Writes the rows of a run into its folder and prints its lines, on rank zero alone."""

    def __init__(
        self, model: Transformer, cfg: Config, process: Process, run_id: str, last_step: int, *, goes_on: bool = False
    ):
        """Open the run folder. If the run `goes_on`, the folder holds an earlier part of it. Rows and samples beyond
        `last_step` (-1: all) are dropped."""
        self.cfg, self.process, self.run_id = cfg, process, run_id
        self.metrics: MetricsLog | None = None  # on rank zero alone
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        run_on_rank_zero(partial(self._open, last_step, goes_on), process)
        peak, self.peak_source = peak_flops(process.device, getattr(torch, cfg.dtype))
        self.peak = process.world_size * peak  # FLOP/s of all devices
        self.flops = flops_per_token(model)
        self.first_step: tuple[int, float] | None = None  # of this start: its number, and the time when it was done
        self.since_line: list[float] = []  # seconds of the updates since the last printed one
        self.page_seconds, self.page_done = 0.0, 0.0  # what writing the page took, and when it was done

    def _open(self, last_step: int, goes_on: bool) -> None:
        out_dir = Path(self.cfg.out_dir)
        open_run_folder(self.cfg, goes_on)
        drop_after(out_dir, last_step)
        device = self.process.device
        start = {
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "after_step": last_step if last_step >= 0 else None,
            "device": device_name(device) + (f", {num_cores()} cores" if device.type == "cpu" else ""),
            "processes": self.process.world_size,
            "torch": torch.__version__,
        }
        note_start(out_dir, self.num_parameters, start)
        tensorboard = start_tensorboard(self.cfg, last_step)
        self.metrics = MetricsLog(out_dir, start_wandb(self.cfg, self.run_id), tensorboard)

    def write(self, step: int, row: dict, *lines: str) -> None:
        """A row of metrics.jsonl; and printed lines, if there are any."""
        if self.metrics:
            self.metrics.write({"step": step, "tokens": step * self.cfg.total_batch_size, **row})
        if lines:
            self.process.print(f"step {step:>6}  {lines[0]}", *(f"{'':13}{line}" for line in lines[1:]), sep="\n")

    def training(self, step: int, seconds: float, row: dict, left_out: str = "") -> None:
        """The row of an update that took `seconds`: `row` holds train_loss, lr and grad_norm.

        An update that was `left_out`, for the cause given, has `skipped` instead of train_loss and grad_norm: how many
        were left out in a row.
        The printed speed is that since the last line. The first update of a start is always printed.
        """
        tokens_per_sec = self.cfg.total_batch_size / seconds
        row = row | {"tokens_per_sec": tokens_per_sec, "mfu": tokens_per_sec * self.flops / self.peak}
        self.since_line.append(seconds)
        speed = self.cfg.total_batch_size * len(self.since_line) / sum(self.since_line)
        loss = [f"loss {decimals(row['train_loss'], 4)}"] if "train_loss" in row else []
        rate, is_first, left = f"{tqdm.format_sizeof(speed)} tokens/s", self.first_step is None, self.time_left(step)
        self.process.progress.figures = [*loss, rate, *left]
        if "skipped" in row:
            self.write(step, row, f"left out: {left_out}; {row['skipped']} in a row")
        elif is_first or step % self.cfg.log_every == 0 or step == self.cfg.max_steps:
            norm, mfu = f"norm {decimals(row['grad_norm'], 2)}", f"mfu {speed * self.flops / self.peak:.0%}"
            self.write(step, row, "  ".join([*loss, norm, rate, mfu, *left]))
            self.since_line.clear()
        else:
            self.write(step, row)

    def time_left(self, step: int) -> list[str]:
        """The time until the end, evaluations and saves included. Unknown at the first update, which also compiles."""
        now = time.perf_counter()
        if self.first_step is None:
            self.first_step = step, now
            return []
        number, done = self.first_step
        return [f"{duration((now - done) / (step - number) * (self.cfg.max_steps - step))} left"]

    def validation(self, step: int, row: dict, shares: dict[str, float]) -> None:
        """`row` is `evaluation.validate`'s. `shares` of mixed folders in the windows so far are recorded with it."""
        lines = [f"validation {validation_words(row)}", *(f"{share:.1%} of {root}" for root, share in shares.items())]
        self.write(step, row | ({"data_shares": shares} if shares else {}), *lines)
        self.write_page()

    def hellaswag(self, step: int, row: dict, name: str) -> None:
        """`row` is `evaluation.score_hellaswag`'s, `name` what to call the benchmark."""
        acc, acc_norm, examples = (row[f"hellaswag_{key}"] for key in ("acc", "acc_norm", "examples"))
        self.write(step, row, f"{name}: acc {acc:.1%}, acc_norm {acc_norm:.1%} of {examples:,} (chance 25%)")
        self.write_page()

    def samples(self, step: int, row: dict) -> None:
        """`row` is `evaluation.draw_samples`'s, which is empty on all ranks but zero. The texts go to samples.txt."""
        if row and self.metrics:
            self.metrics.samples(step, step * self.cfg.total_batch_size, row["samples"])
            text = "\n\n".join(map(folded, row["samples"]))
            self.process.print(f"----- step {step}\n{text}\n-----")
            self.write_page()

    def write_page(self, *, is_end: bool = False) -> bool:
        """Write report.html on rank zero, so that a run can be watched. Returns whether it was written.

        A page takes seconds to write where a run has hundreds of thousands of rows. It is left out where it would take
        more than 1% of the time, and after one that failed. The end of a run is always tried.
        """
        began = time.perf_counter()
        if self.metrics is None or (not is_end and began - self.page_done < 100 * self.page_seconds):
            return False
        self.process.progress.doing("report")
        is_written = write_report_or_say_why(Path(self.cfg.out_dir), is_end=is_end)
        self.page_done = time.perf_counter()
        self.page_seconds = self.page_done - began if is_written else math.inf
        return is_written

    def close(self, step: int, stop: int) -> None:
        """End the records after `step`, by the signal `stop` or (0) at the end of the run, and print how it ended.

        With `wandb_artifact` the last checkpoint of a finished run goes to Weights & Biases.
        """
        if self.metrics is None:
            return
        is_written, out_dir = self.write_page(is_end=True), Path(self.cfg.out_dir)
        checkpoints = checkpoints_in(out_dir / "checkpoints")
        if not stop and checkpoints and self.cfg.wandb_artifact and self.metrics.wandb:
            self.metrics.wandb.upload(checkpoints[-1], f"{out_dir.name}-{self.run_id}")
        self.process.progress.doing("wait for Weights & Biases" if self.metrics.wandb else "")
        self.metrics.close()
        if stop:
            place = f"after step {step}" if step else "before the first step"
            self.process.print(f"stopped {place} by {signal.Signals(stop).name}")
        else:
            progress, rows = self.process.progress, read_rows(out_dir)
            seconds = time.monotonic() - progress.began
            self.process.print(*summary(self.cfg, rows, progress.first_step, seconds, has_report=is_written), sep="\n")


def folded(text: str, width: int = 80) -> str:
    """`text` in lines of at most `width` characters, for a terminal. What would move its cursor is a question mark."""
    lines = (line.expandtabs(4) for line in text.splitlines())
    lines = ("".join(c if c.isprintable() else "?" for c in line) for line in lines)
    return "\n".join(textwrap.fill(line, width, replace_whitespace=False, drop_whitespace=False) for line in lines)


def write_report_or_say_why(out_dir: Path, *, is_end: bool = True) -> bool:
    """Write report.html of a run. If it cannot be written, print why and return False: no page is worth a run."""
    try:
        write_report([out_dir], out_dir / "report.html", is_end=is_end)
    except Exception as error:
        complain(f"report.html: not written ({error}); the run is whole; `python report.py {out_dir}` writes it later")
        return False
    return True


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one. Run train.py.")
