"""Ranks of train.py as subprocesses, patched from outside; and what they have written, compared bit for bit."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from checkpoint_files import read_checkpoint
from tiny_run import ROOT, STEPS, TRAIN, plain_environment


class Result(NamedTuple):
    status: int
    out: str
    err: str


# Patches torch, then runs train.py as the main program. train.py does not know of the patches.
DRIVER = """
import os, runpy, sys
from pathlib import Path
sys.path.insert(0, {root!r})
RANK = int(os.environ["RANK"])

def note(name, line):
    with open(Path(__file__).with_name(f"{{name}}.{{RANK}}"), "a") as file:
        file.write(f"{{line}}\\n")

{patches}

sys.argv[0] = {train!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def driver(folder: Path, patches: str) -> Path:
    folder.mkdir(parents=True)
    path = folder / "driver.py"
    path.write_text(DRIVER.format(root=str(ROOT), train=str(TRAIN), patches=patches))
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_rank(script: Path, flags: list[str], port: int, rank: int, ranks: int, ranks_a_node: int) -> subprocess.Popen:
    env = plain_environment() | {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    env |= {"LOCAL_RANK": str(rank % ranks_a_node), "LOCAL_WORLD_SIZE": str(ranks_a_node)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command, pipe = [sys.executable, str(script), *flags], subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


def launch(script: Path, flags: list[str], ranks: int) -> list[Result]:
    """Start ranks with torchrun's environment, but without torchrun. This is seconds faster and shows each status."""
    port = free_port()
    processes = [start_rank(script, flags, port, rank, ranks, ranks_a_node=ranks) for rank in range(ranks)]
    try:
        outputs = [process.communicate(timeout=90) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Result(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def noted(script: Path, name: str, rank: int) -> list[str]:
    return script.with_name(f"{name}.{rank}").read_text().split()


def rows_of(out_dir: Path, field: str = "train_loss") -> list[dict]:
    """Rows of metrics.jsonl that hold `field`."""
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if field in row]


def checkpoint_of(out_dir: Path, step: int) -> dict:
    return read_checkpoint(out_dir / "checkpoints" / f"step_{step:08d}")


def assert_same_bits(run: Path, other: Path, first_step: int, last_step: int = STEPS) -> None:
    """The losses must be equal from first_step on, and the parameters and optimizer states at the end."""
    for field, start in (("train_loss", first_step), ("grad_norm", first_step), ("val_loss", first_step)):
        figures, others = (
            {row["step"]: row[field] for row in rows_of(out_dir, field) if row["step"] >= start}
            for out_dir in (run, other)
        )
        assert figures == others and last_step in figures, field
    end, other_end = checkpoint_of(run, last_step), checkpoint_of(other, last_step)
    assert end["model"].keys() == other_end["model"].keys()
    for name, value in end["model"].items():
        assert torch.equal(value, other_end["model"][name]), name
    torch.testing.assert_close(end["moments"], other_end["moments"], rtol=0, atol=0)


def assert_close(checkpoint: dict, other: dict) -> None:
    assert checkpoint["model"].keys() == other["model"].keys()
    for name, value in checkpoint["model"].items():
        torch.testing.assert_close(value, other["model"][name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------- runs that are disturbed


class Ranks:
    """Ranks of a script, started without torchrun, so that each status shows; or with torchrun.

    The `with` block kills what is left at its end. The output goes to files beside the script: `out.0`, `err.0`.
    """

    def __init__(self, script: Path, flags: list[str], ranks: int, *, torchrun: bool = False, extra: list[str] = ()):
        self.script, self.ranks, self.torchrun = script, ranks, torchrun
        for old in script.parent.glob("*.[0-9]"):
            old.unlink()
        if torchrun:
            words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *extra]
            commands, envs = [[sys.executable, *words, str(script), *flags]], [plain_environment()]
        else:
            shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
            shared["MASTER_PORT"] = str(free_port())
            commands = [[sys.executable, str(script), *flags]] * ranks
            envs = [plain_environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(ranks)]
        self.processes = []
        for number, (command, env) in enumerate(zip(commands, envs, strict=True)):
            with (
                open(script.with_name(f"out.{number}"), "wb") as out,
                open(script.with_name(f"err.{number}"), "wb") as err,
            ):
                # A session of its own, so that a signal to its group reaches nobody else.
                started = subprocess.Popen(command, env=env, stdout=out, stderr=err, start_new_session=True)
            self.processes.append(started)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def pids(self) -> list[int]:
        """The processes of the ranks, by rank."""
        if not self.torchrun:
            return [process.pid for process in self.processes]
        return [int(self.marked("pid", rank)) for rank in range(self.ranks)]

    def everybody(self) -> list[int]:
        """All processes that belong to these ranks, torchrun's and the loader's too."""
        return [pid for process in self.processes for pid in (process.pid, *descendants(process.pid))]

    def kill(self) -> None:
        """SIGKILL to all of them at once."""
        pids = self.everybody()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.wait(timeout=30)

    def text(self, name: str, number: int = 0) -> str:
        path = self.script.with_name(f"{name}.{number}")
        return path.read_text(errors="replace") if path.exists() else ""

    def marked(self, name: str, rank: int, timeout: float = 90) -> str:
        """Wait until a rank has noted something under `name`. Returns what."""
        wait_until(lambda: self.text(name, rank).endswith("\n") or self.ended(), timeout)
        assert self.text(name, rank), (
            f"ended before {name}: {self.text('out')} {self.text('err')} {self.text('err', 1)}"
        )
        return self.text(name, rank).strip()

    def ended(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def wait(self, timeout: float) -> list[int]:
        """Wait for the end of all. Returns their statuses."""
        deadline = time.monotonic() + timeout
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]


def descendants(pid: int) -> list[int]:
    """The processes below one, from /proc."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue  # it has just ended
    found, more = [], [pid]
    while more:
        more = [child for child, parent in parents.items() if parent in more]
        found += more
    return found


def is_running(pid: int) -> bool:
    """Whether a process runs; one that has ended and nobody has asked for counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], Any], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)
