"""profiling.py: what --profile writes and prints. The tests need only a CPU and no network."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from processes import Process
from profiling import StepProfiler, start_profiler

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


def work() -> None:
    torch.ones(64, 64) @ torch.ones(64, 64)


def counts(folder) -> dict[str, int]:
    """How often each operation appears in the trace."""
    names = [event.get("name") for event in json.loads((folder / "trace.json").read_text())["traceEvents"]]
    return {name: names.count(name) for name in set(names)}


@pytest.mark.parametrize(("steps", "run", "recorded"), [(3, 9, 3), (3, 5, 3), (3, 4, 2)])
def test_steps_after_the_first_two_are_recorded(tmp_path, capsys, steps, run, recorded):
    profiler = StepProfiler(steps, tmp_path / "profile", CPU)
    for _ in range(run):
        work()
        profiler.step()
    profiler.finish()
    assert counts(tmp_path / "profile")["aten::mm"] == recorded
    out = capsys.readouterr().out
    assert out.count(f"the ten costliest operations of {recorded} steps") == 1
    rows = [line for line in out.splitlines() if line.lstrip().startswith("aten::")]
    assert 0 < len(rows) <= 10 and any("aten::mm" in row for row in rows)


@pytest.mark.parametrize("run", [2, 3])
def test_a_run_that_fails_ends_as_it_would_without_the_profiler(tmp_path, run):
    lines = f"""
import sys, torch
from pathlib import Path
from profiling import StepProfiler
profiler = StepProfiler(9, Path({str(tmp_path)!r}), torch.device("cpu"))
for _ in range({run}):
    torch.ones(64, 64) @ torch.ones(64, 64)
    profiler.step()
sys.exit(3)
"""
    result = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 3, result.stderr
    assert (tmp_path / "trace.json").is_file() == (run == 3)


@pytest.mark.parametrize("run", [0, 1, 2])
def test_a_run_too_short_to_profile_says_so(tmp_path, capsys, run):
    profiler = StepProfiler(3, tmp_path / "profile", CPU)
    for _ in range(run):
        profiler.step()
    profiler.finish()
    assert "more than 2 steps" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("steps", "rank"), [(0, 0), (3, 1)])
def test_nothing_is_recorded_without_the_flag_or_off_the_main_process(tmp_path, capsys, steps, rank):
    profiler = start_profiler(steps, tmp_path / "profile", Process(rank, 2, CPU))
    for _ in range(6):
        work()
        profiler.step()
    profiler.finish()
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())
