"""What report.py reads in run directories: rows, settings, and the points of a curve."""

import json
import math
import re
import time
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from json_files import check_values, read_object

Point = tuple[float, float, float, float]  # step, tokens trained on, seconds of training, value

# Each has a contrast of 3 on white and on black. Readers with deuteranopia can tell them apart: in the simulation of
# Machado et al. (2009) two of them differ by 25 in CIELAB or more. tests/test_report.py computes both.
COLOURS = ("#2578cf", "#e0600f", "#1e7901", "#d26ad4", "#09707c", "#fc3ca6", "#087b50", "#fe5674")
DASHES = ("", "7 4", "2 3", "9 3 2 3")  # runs 9 to 16 have the same colours and the second dash, and so on
STALE = 300  # seconds without a heartbeat (run_lock.py) after which a run counts as stopped
NONE = "–"  # in place of a value that a run does not have


@dataclass
class Run:
    """The contents of a run directory."""

    index: int  # among the runs of the page
    name: str
    rows: list[dict]  # sorted by step
    config: dict[str, str]  # flat: "model.dim" -> "768"
    about: dict[str, Any]  # run.json: when and on what it trained; empty if there is none
    sample: str  # the last entry of samples.txt
    is_alive: bool  # a process trains in the directory

    @property
    def colour(self) -> str:
        return COLOURS[self.index % len(COLOURS)]

    @property
    def dash(self) -> str:
        return DASHES[self.index // len(COLOURS) % len(DASHES)]

    @property
    def benchmark(self) -> str:
        """The run's benchmark. A copy of hellaswag_utils.benchmark_name, because this file does without torch."""
        stem = Path(self.config.get("hellaswag_path", "")).stem
        return "HellaSwag" if stem.lower().startswith("hellaswag") else stem.replace("_", " ") or "Multiple choice"

    @cached_property
    def places(self) -> list[tuple[float, float, float]]:
        """Step, tokens and seconds of training up to each row. A row without them has NaN."""
        places, seconds, trained = [], 0.0, 0.0
        for row in self.rows:
            step, tokens, speed = (row.get(key) for key in ("step", "tokens", "tokens_per_sec"))
            if not is_number(tokens) or not is_number(step) or min(step, tokens) < 0:
                places.append((math.nan,) * 3)
                continue
            if is_number(speed) and speed > 0 and tokens > trained:
                seconds, trained = seconds + (tokens - trained) / speed, tokens
            places.append((step, tokens, seconds))
        return places

    @cached_property
    def curves(self) -> dict[str, dict[float, Point]]:
        """The points of each field of the rows, by step. Of two at one step, the row written later counts."""
        curves: dict[str, dict[float, Point]] = {}
        for (step, tokens, seconds), row in zip(self.places, self.rows, strict=True):
            for field, value in row.items() if step == step else ():
                if is_number(value):
                    curves.setdefault(field, {})[step] = (step, tokens, seconds, value)
        return curves

    def points(self, field: str) -> list[Point]:
        """The points of all rows where `field` is a finite number."""
        return list(self.curves.get(field, {}).values())

    @cached_property
    def left_out(self) -> list[tuple[float, float, float]]:
        """The places of updates that were left out: a loss or the gradient was not finite, or float16 overflowed."""
        return [
            place
            for place, row in zip(self.places, self.rows, strict=True)
            if place[0] == place[0] and ("skipped" in row or is_not_finite(row.get("train_loss")))
        ]

    def facts(self) -> dict[str, str]:
        """State, dates, device and size of the run, as text."""
        step = max((step for step, *_ in self.places if step == step), default=0)
        end = self.config.get("max_steps", "")
        state = "finished" if end == str(step) else "running when this was written" if self.is_alive else "stopped"
        starts = [(start["time"], start["after_step"], on_what(start)) for start in self.about.get("starts", ())]
        begun = [moment(time) for time, after, _ in starts if after is None]
        resumes = [f"after step {after:,} on {moment(time)}" for time, after, _ in starts if after is not None]
        often = "once" if len(resumes) == 1 else f"{len(resumes)} times, last"
        return {
            "state": f"{step:,} of {int(end):,} steps, {state}" if end.isdecimal() else f"{step:,} steps",
            "started": begun[0] if begun else NONE,
            "resumed": f"{often} {resumes[-1]}" if resumes else NONE,
            "device": "; ".join(dict.fromkeys(device for *_, device in starts)) or self.config.get("device", NONE),
            "parameters": f"{self.about['parameters']:,}" if starts else NONE,
        }


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and -1e18 < value < 1e18  # False for NaN; the limits keep sums finite


def is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def read_json(text: str) -> dict:
    """The JSON object in `text`, or an empty dict if there is none: a killed run may leave an incomplete line."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # RecursionError: nested deeper than the parser goes
        return {}
    return value if isinstance(value, dict) else {}


def moment(text: str) -> str:
    """A time of ISO 8601 as people read it: "2026-01-02 03:04 UTC"."""
    return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M %Z}".strip()


def on_what(start: dict[str, Any]) -> str:
    """The device of a start of run.json, and the number of processes if there were several."""
    return start["device"] + (f", {start['processes']} processes" if start["processes"] > 1 else "")


def read_about(path: Path) -> dict[str, Any]:
    """run.json of a run: `parameters`, and a list of `starts`. Empty if the file is missing, damaged or another's.

    A start has `time` (ISO 8601), `after_step` (None: the run was new), `device`, `processes` and `torch`.
    """
    try:
        found = read_object(path)
        check_values(found, {"parameters": int, "starts": list})
        for start in found["starts"]:
            check_values(start, {"time": str, "device": str, "processes": int, "torch": str})
            if start["after_step"] is not None:
                check_values(start, {"after_step": int})
            moment(start["time"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found


def read_runs(run_dirs: Sequence[str | Path]) -> list[Run]:
    """Read run directories, with or without the other files. Raises ValueError without metrics.jsonl."""
    runs, names = [], [Path(folder).resolve().name for folder in run_dirs]
    for i, folder in enumerate(map(Path, run_dirs)):
        if not (folder / "metrics.jsonl").is_file():
            problem = "holds no metrics.jsonl" if folder.is_dir() else "no such run directory"
            raise ValueError(f"{folder}: {problem}; give the out_dir of a run that train.py has begun")
        files = (folder / name for name in ("metrics.jsonl", "config.json", "samples.txt"))
        metrics, config, samples = (f.read_text("utf-8", errors="replace") if f.is_file() else "" for f in files)
        fields = read_json(config)
        if isinstance(fields.get("model"), dict):
            fields |= {f"model.{key}": value for key, value in fields.pop("model").items()}
        rows = [row for line in metrics.splitlines() if (row := read_json(line))]
        rows.sort(key=lambda row: row["step"] if is_number(row.get("step")) else -1)
        holder = folder / ".holder.json"
        run = Run(
            index=i,
            name=names[i] if names.count(names[i]) == 1 else str(folder),
            rows=rows,
            config={k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in fields.items()},
            about=read_about(folder / "run.json"),
            sample=re.split(r"^===== (?=step \d+$)", samples, flags=re.MULTILINE)[-1],  # records.py heads them
            is_alive=holder.is_file() and time.time() - holder.stat().st_mtime < STALE,
        )
        runs.append(run)
    return runs


def smooth(values: Sequence[float]) -> list[float]:
    """Running median over 1% of the values on each side: a spike leaves no trace. At the start the window is narrower,
    because the loss is steep there. The last is the median of the last 1%, or of the last two if 1% is fewer."""
    reach, window, smoothed, begin, end = max(1, len(values) // 100), [], [], 0, 0
    for i in range(len(values)):
        while end <= min(2 * i, i + reach, len(values) - 1):
            insort(window, values[end])
            end += 1
        while begin < i - reach:
            del window[bisect_left(window, values[begin])]
            begin += 1
        smoothed.append((window[(len(window) - 1) // 2] + window[len(window) // 2]) / 2)
    return smoothed


def kept(values: Sequence[float], limit: int) -> list[int]:
    """The indices of about `limit` values that draw the same line: the first, the last, and the extremes of bins of
    equal size. Means of the bins would lose the spikes."""
    if len(values) <= limit:
        return list(range(len(values)))
    chosen = {0, len(values) - 1}
    for begin, end in pairwise(len(values) * i // (limit // 2) for i in range(limit // 2 + 1)):
        chosen |= {extreme(range(begin, end), key=values.__getitem__) for extreme in (min, max)}
    return sorted(chosen)


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one. Run report.py.")
