"""What a run says while it goes: a bar on a terminal, plain lines elsewhere, and how to go on at its end.

A thread does this, and not the watch's: a terminal that is stopped by Ctrl-S blocks whoever writes to it, and other
ranks would take a blocked watch for a lost rank. Rank zero alone has the thread. The main thread notes what it is doing
in an attribute. It waits for the bar only to print a line.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from tqdm import tqdm

from config import Config
from model_folders import checkpoints_in
from next_commands import on_which_machines, resume_command, talk_command
from watch import Watch

TICK = 0.5  # seconds between two looks at the run
SILENCE = 10.0  # seconds without a line after which one says where the run is
LONG = 2.0  # seconds after which the bar names what takes so long
COLUMNS = 80  # the longest line
SAVING = "saving"


class Activity(NamedTuple):
    """What the main thread is doing."""

    what: str  # a noun, or SAVING; "": nothing that takes long
    part: int  # the part in progress, from 0 on
    parts: int  # 1: it has no parts
    since: float  # when it began
    step: int = 0  # of an update in progress; otherwise 0


class Bar(tqdm):
    """tqdm without its own thread, and with a lock of this process alone."""

    monitor_interval = 0
    _lock = threading.RLock()


class AboveBar:
    """A terminal's stream, while the bar is the last line there. Whole lines come above the bar."""

    def __init__(self, stream: TextIO, bar: Bar):
        self._stream, self._bar, self._rest = stream, bar, ""

    def write(self, text: str) -> int:
        with self._bar.get_lock():
            lines, newline, rest = text.rpartition("\n")
            if newline:
                self._bar.clear(nolock=True)
                self._bar.fp.flush()
                self._stream.write(self._rest + lines + newline)
                self._stream.flush()
                self._rest = ""
                self._bar.refresh(nolock=True)
            self._rest += rest
        return len(text)

    def without_bar(self) -> TextIO:
        """The stream itself, after the line that is not ended."""
        self._stream.write(self._rest)
        self._rest = ""
        return self._stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Progress:
    """Follows a run. The main thread calls `begin`, `doing`, `micro_step`, `updated` and `said`, which take no time.

    Args:
        watch: of the process.
        is_shown: whether this process prints, as rank zero does. The other ranks say how to go on if rank zero is lost.
    """

    def __init__(self, watch: Watch | None = None, *, is_shown: bool = False):
        self.watch, self.is_shown, self.bar = watch, is_shown, None
        self.has_begun = self.is_over = False  # whether there is something to go on from; whether all is done
        self.step = self.first_step = self.saved = self.max_steps = 0
        self.folder, self.config = Path(), ""  # of the run's checkpoints; name of its configuration
        self.figures: Sequence[str] = ()  # of the last update: loss, speed, time left
        self.compiles = False  # the first update compiles
        self.began = self.last_line = time.monotonic()
        self.activity = Activity("", 0, 1, self.began)
        self._acknowledged = self._told = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    # ------------------------------------------------------------ called by the main thread

    def start(self) -> None:
        if self.is_shown:
            self._thread.start()

    def begin(self, cfg: Config, step: int, saved: int) -> None:
        """The run begins after `step`. The last step that its folder holds a checkpoint of is `saved`."""
        self.step = self.first_step = step
        self.saved, self.max_steps, self.folder = saved, cfg.max_steps, Path(cfg.out_dir) / "checkpoints"
        self.config, self.has_begun, self.began = cfg.config, True, time.monotonic()
        self.doing("")
        if self.is_shown and is_terminal(sys.stdout) and is_terminal(sys.stderr):
            # `disable`, because a bar that the variable TQDM_DISABLE has switched off lacks what AboveBar writes to.
            self.bar = Bar(total=cfg.max_steps, initial=step, file=sys.stderr, leave=False, ncols=1, disable=False)
            sys.stdout, sys.stderr = AboveBar(sys.stdout, self.bar), AboveBar(sys.stderr, self.bar)

    def doing(self, what: str, part: int = 0, parts: int = 1) -> None:
        """The main thread does something that may take long: its `part`, from 0 on, of `parts`."""
        since = self.activity.since if what == self.activity.what and part else time.monotonic()
        self.activity = Activity(what, part, parts, since)

    def micro_step(self, step: int, part: int, parts: int) -> None:
        """Micro-step `part`, from 0 on, of update number `step` begins. In the last one the update will be finished."""
        since = time.monotonic() if part == 0 or not self.activity.step else self.activity.since
        self.activity = Activity("compiling" if self.compiles else "micro-step", part, parts, since, step)

    def updated(self, step: int) -> None:
        """Update number `step` is made. A GPU may still be busy with it."""
        self.step, self.compiles = step, False

    def said(self) -> None:
        """A line has been printed."""
        self.last_line = time.monotonic()

    def close(self) -> None:
        """Take the bar away, and print how to go on if the run is not over: on one rank, once."""
        self._closing.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(2 * TICK)  # a blocked terminal may hold it for ever
        if self.bar:
            self.bar.close()
            for name in ("stdout", "stderr"):
                if isinstance(stream := getattr(sys, name), AboveBar):
                    setattr(sys, name, stream.without_bar())
            self.bar = None
        if self.has_begun and not self.is_over and not self._told and self.watch.is_first_alive():
            self._told = True
            print(way_on(self.folder, self.config, failed=not self.watch.stop), flush=True)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        while not self._closing.wait(TICK):
            self.tick()

    def tick(self) -> None:
        """Acknowledge a stop signal, move the bar, or end a silence."""
        now = time.monotonic()
        if self.watch.stop and not self._acknowledged:
            self._acknowledged = True
            self._print(f"{signal.Signals(self.watch.stop).name}: {self.answer_to_stop()}")
        if bar := self.bar:
            bar.ncols = columns(bar.fp)
            bar.n, bar.bar_format = self.step, self.bar_format(now)
            bar.refresh()
        elif now - self.last_line >= SILENCE and (line := self.line_after_silence(now)):
            self._print(line)

    def _print(self, line: str) -> None:
        print(line, flush=True)
        self.said()

    def answer_to_stop(self) -> str:
        """What the run does now that it has heard a stop signal."""
        doing, step = self.activity, self.step
        kept = f"then saving step {step}"
        if self.saved == step:  # or its save is in progress
            is_there = (self.folder / f"step_{step:08d}").is_dir()
            kept = f"step {step} is saved" if is_there else "then ending the save" if step else "nothing to save yet"
        if self.is_over:
            words = "all steps are saved, ending the records"
        elif not self.has_begun:
            words = "stopping before the first step"
        elif doing.what == SAVING:
            words = f"saving step {step}, then stopping"
        elif doing.step and doing.part + 1 == doing.parts:
            words = f"finishing step {doing.step}, then saving"
        elif doing.step:
            words = f"leaving step {doing.step}, {kept}"
        else:
            words = f"leaving the {doing.what}, {kept}" if doing.what else f"stopping, {kept}"
        return words + ("; Ctrl-C again to stop now" if self.watch.stop == signal.SIGINT else "")

    def bar_format(self, now: float) -> str:
        """tqdm's format of the bar: the step, the bar, the figures of the last update, and what takes long."""
        doing, seconds = self.activity, now - self.activity.since
        words = list(self.figures)
        if doing.what and (seconds >= LONG or not doing.step):
            part = f" {doing.part + 1}/{doing.parts}" if doing.parts > 1 else ""
            words.append(f"{doing.what}{part} {duration(seconds)}")
        return f"step {self.step}/{self.max_steps} {{bar}} " + "  ".join(words)

    def line_after_silence(self, now: float) -> str:
        """Where the run is: what takes long, or the figures of the last update where no update does."""
        doing, seconds = self.activity, now - self.activity.since
        if seconds < SILENCE and self.figures:
            return f"step {self.step:>6}  " + "  ".join(self.figures)
        if not doing.what:
            return ""
        part = f" {doing.part + 1} of {doing.parts}" if doing.parts > 1 else ""
        place = f"step {doing.step or self.step:>6}  " if self.has_begun else ""
        return f"{place}{doing.what}{part}, {duration(seconds)} so far"


def is_terminal(stream: TextIO) -> bool:
    """Whether lines there can be written again. On a dumb terminal, as an editor's, they cannot."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def columns(stream: TextIO) -> int:
    """The width of the bar. A terminal breaks the line after its last column, so that one stays free."""
    try:
        width = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):  # the terminal is gone
        width = COLUMNS
    return max(10, min(COLUMNS, width or COLUMNS) - 1)


# ---------------------------------------------------------------- figures in words


def decimals(number: float, digits: int) -> str:
    """A number with so many decimals. A large one has an exponent, so that it stays short."""
    return f"{number:.{digits}f}" if abs(number) < 100 else f"{number:.1e}"


def duration(seconds: float) -> str:
    """Two units of time: 35s, 4m05s, 1h05m, 12d03h."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


# ---------------------------------------------------------------- the end


def summary(cfg: Config, rows: Sequence[dict], first_step: int, seconds: float, *, has_report: bool) -> list[str]:
    """The end of a finished run, in eight lines at most. The last one can be pasted.

    Args:
        rows: of metrics.jsonl, with those of earlier starts.
        first_step, seconds: where this start began, and how long it took.
    """
    steps, out_dir = cfg.max_steps - first_step, Path(cfg.out_dir)
    took = f"{tqdm.format_sizeof(steps * cfg.total_batch_size)} tokens in {duration(seconds)}"
    lines = [
        f"done: {cfg.max_steps:,} steps; the last {steps:,}, {took}" if first_step else f"done: {steps:,} steps, {took}"
    ]
    validated = [row for row in rows if "val_loss" in row]
    if validated:
        best = min(validated, key=lambda row: row["val_loss"])
        named = (("validation  first", validated[0]), ("best ", best), ("last ", validated[-1]))
        lines += [f"{name:>17}  {validation_words(row)} (step {row['step']})" for name, row in named]
    if has_report:
        lines.append(f"report      {out_dir / 'report.html'}")
    lines += [f"model       {path}" for path in checkpoints_in(out_dir / "checkpoints")[-1:]]
    return [*lines, "to talk to it:", f"    {talk_command(cfg.out_dir, cfg.prompts, cfg.device)}"]


def validation_words(row: dict) -> str:
    return f"{decimals(row['val_loss'], 4)} nats a token, {decimals(row['val_bpb'], 4)} bits a byte"


def way_on(folder: Path, config: str = "", *, failed: bool = False) -> str:
    """How to go on with a run of the configuration `config` that is not over. `folder` holds its checkpoints.

    A run that has `failed` would fail again with the same flags, if a number that is not finite or the memory was the
    cause.
    """
    there = checkpoints_in(folder)
    if not there:
        return "nothing was saved; the same command starts the run anew"
    if "SLURM_JOB_ID" in os.environ and not sys.stdout.isatty():  # on a terminal somebody has typed the command
        return f"saved: {there[-1]}\na job with --resume True goes on there; launch/slurm.sbatch passes it"
    when = ", once the cause is gone" if failed else ""
    return f"saved: {there[-1]}\nto go on from there{when}{on_which_machines()}:\n    {resume_command(config)}"


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one. Run train.py.")
