"""The processes of a run: how they start, what they agree on, how they wait for one another.

torchrun starts a process for each device, a rank. Ranks meet in collectives (sums over all of them). A rank that waits
there for one that never comes would wait for ever, so no rank alone raises, waits or leaves: what one finds, all learn
before the next collective. watch.py is for what nobody can foresee: signals, ranks that fail or fall silent.
"""

import itertools
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from threads import num_cores

import torch
import torch.distributed as dist
from torch import Tensor

from environment import local_rank, rank, world_size
from hardware import keep_freed_memory
from progress import Progress
from watch import PERIOD, Watch

PATIENCE = 10.0  # seconds that a refused process waits for torchrun to stop it


@dataclass(frozen=True)
class Process:
    """This process's place among those that torchrun started. A process alone is rank 0 of 1."""

    rank: int
    world_size: int
    device: torch.device
    watch: Watch | None = None
    progress: Progress = field(default_factory=Progress)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def stop(self) -> int:
        """The stop signal that this process has heard of, or 0. Others may not have heard of it yet."""
        return self.watch.stop if self.watch else 0

    def is_told_to_stop(self) -> bool:
        return self.stop != 0

    def alone(self) -> "Process":
        """This process without the others."""
        return replace(self, rank=0, world_size=1)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on rank zero alone."""
        if self.is_main:
            print(*args, flush=True, **kwargs)
            self.progress.said()


def start_process(device: torch.device, timeout: int = 600) -> Process:
    """Join the process group (NCCL between GPUs, gloo between processes) if torchrun started this process.

    From here on stop signals are noted, and end the run when it asks for them.

    Args:
        timeout: seconds that a rank waits for another one in a collective.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before the group exists, because NCCL takes the current device
    if device.type == "cpu":
        keep_freed_memory()
    store = None
    if world_size() > 1:
        limit = timedelta(seconds=timeout)
        store = own_store(limit)
        place = {"store": dist.PrefixStore("group", store), "rank": rank(), "world_size": world_size()}
        if device.type == "cpu":  # torchrun sets one thread a process, however many cores there are
            torch.set_num_threads(max(1, num_cores() // int(os.environ["LOCAL_WORLD_SIZE"])))
            dist.init_process_group("gloo", timeout=limit, **place)
        else:
            # NCCL for what is on the GPUs. gloo for what processes agree on, which then waits for no GPU.
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=limit, device_id=device, **place)
    watch = Watch(rank(), world_size(), store, timeout)
    process = Process(rank(), world_size(), device, watch, Progress(watch, is_shown=rank() == 0))
    watch.last_words = process.progress.close
    watch.start()
    process.progress.start()
    return process


def own_store(limit: timedelta) -> dist.Store:
    """A part of the shared store that only the ranks of this start use.

    After a restart torchrun's store still has the keys of the ranks before. A rank that reads them waits for a process
    that is dead. So each rank writes a number that it has just drawn. Rank zero writes the list of all numbers again
    and again, until every rank has found its own there. An old list lacks the number, so no rank takes it.

    Raises:
        DistError: rank zero or another rank did not start within `limit`.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # Rank zero hosts the store, unless torchrun does.
    is_host = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(host, port, is_master=is_host, timeout=limit, wait_for_workers=False)
    own, deadline = secrets.token_hex(8), time.monotonic() + limit.total_seconds()
    others = range(1, world_size())
    if rank():
        store.set(f"number {rank()}", own)
    while time.monotonic() < deadline:
        if rank() == 0:
            there = [r for r in others if store.check([f"number {r}"])]
            store.set("numbers", json.dumps([own, *(store.get(f"number {r}").decode() for r in there)]))
            if all(store.check([f"{own} {r}"]) for r in others):
                return dist.PrefixStore(own, store)
        elif store.check(["numbers"]) and own in (numbers := json.loads(store.get("numbers"))):
            store.set(f"{numbers[0]} {rank()}", "")
            return dist.PrefixStore(numbers[0], store)
        time.sleep(0.05)
    missing = [r for r in others if not store.check([f"{own} {r}"])] if rank() == 0 else [0]
    raise dist.DistStoreError(f"{named_ranks(missing)} did not start within {limit.total_seconds():.0f} seconds")


def end_process(process: Process, cause: str) -> None:
    """Leave the other ranks: as one that is done, or as one that has failed with a `cause`. Print how to go on."""
    if cause:
        process.watch.fail(cause)  # before anything is printed: a pipe that nobody reads would hold the news back
    process.progress.close()
    hosts_store = process.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # as without torchrun
    if cause and hosts_store and process.world_size > 1:
        time.sleep(2 * PERIOD)  # in which the others read the cause
    process.watch.close()
    if dist.is_initialized() and not cause:
        sum_over_processes([0.0], process)  # no rank ends while another one still needs the store
        dist.destroy_process_group()


def say_why(process: Process | None, cause: str) -> None:
    """Print why this process ends.

    Before the process group exists (`process` is None), all processes of a machine find the same error, so one of them
    prints it. Later a rank may fail alone, so each prints its own.
    """
    if process:
        print(f"train.py{f' [rank {process.rank}]' if process.rank else ''}: {cause}", file=sys.stderr)
    elif file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        leave_to_torchrun(cause, Path(file))
    elif local_rank() == 0:
        print(f"train.py: {cause}", file=sys.stderr)


def leave_to_torchrun(cause: str, file: Path) -> None:
    """Let torchrun print the cause, for which the processes of a machine are refused.

    torchrun reports a failed process in 30 lines, and each further one in 7 more. A message above them is easily
    missed. The last lines of the report are what the failed process has written to its error `file`. So the first
    process writes the cause there. The others wait until torchrun stops them, and end with status 0, because then
    torchrun does not report them.
    """
    if local_rank() == 0:
        time.sleep(PERIOD)  # in which the others get here
        extra = {"py_callstack": f"train.py: {cause}", "timestamp": str(int(time.time()))}
        with suppress(OSError):
            file.write_text(json.dumps({"message": {"message": cause, "extraInfo": extra}}), encoding="utf-8")
            return
    else:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        time.sleep(PATIENCE)
    # The disk is full; or this process alone is refused, and the first one is not.
    print(f"train.py: {cause}", file=sys.stderr)


def is_lost_connection(error: Exception) -> bool:
    """Whether a collective has failed because of another rank. gloo's errors have no class of their own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


# ---------------------------------------------------------------- what all ranks learn


def sum_over_processes(values: list[float], process: Process) -> list[float]:
    """Element-wise sum of a few numbers over all processes, in float64. No GPU takes part, so none is waited for."""
    if process.world_size == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def gather(value: float, process: Process) -> list[float]:
    """The number of each rank, by rank."""
    table = [0.0] * process.world_size
    table[process.rank] = value
    return sum_over_processes(table, process)


def agree_on_stop(process: Process) -> int:
    """The largest stop signal that any rank has heard of, the same on all ranks; 0 if none has."""
    return int(max(gather(process.stop, process)))


def gather_on_device(value: Tensor, process: Process) -> Tensor:
    """The number of each rank, (world_size,), on the device. Between GPUs no process waits for it."""
    table = value.new_zeros(process.world_size)
    table[process.rank] = value
    if process.world_size > 1:
        dist.all_reduce(table)
    return table


class RankZeroFailed(Exception):
    """What rank zero did for all has failed there. Rank zero says why."""


_numbers = itertools.count()  # of the keys in the store; the same on all ranks


def run_on_rank_zero(work: Callable[[], Any], process: Process) -> Any:
    """Do `work` on rank zero while the other ranks wait, as long as it takes. If it fails there, all ranks end.

    Returns what `work` returns, plain JSON data, on all ranks.

    Raises:
        Exception: what `work` raised, on rank zero. RankZeroFailed on the other ranks.
    """
    if process.world_size == 1:
        return work()
    key, answer, error = f"work {next(_numbers)}", [None], None
    if process.is_main:
        try:
            answer = [json.dumps({"result": work()})]
        except BaseException as failure:
            error = failure
        process.watch.tell(key)
    else:
        process.watch.wait_for(key)
    # The key only ends the wait. The answer itself does without the store, which torchrun may take with it.
    try:
        dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
    finally:
        if error:
            raise error
    if answer[0] is None:
        raise RankZeroFailed
    return json.loads(answer[0])["result"]


def compare_ranks(facts: dict[str, Any], process: Process) -> None:
    """Compare what ranks on different machines must have in common.

    Args:
        facts: by name; plain JSON data.

    Raises:
        ValueError: ranks differ, on every rank alike. The message has each difference, and who has what.
    """
    if process.world_size == 1:
        return
    keys = [f"facts {next(_numbers)} of {number}" for number in range(process.world_size)]
    process.watch.tell(keys[process.rank])
    if not all(map(process.watch.wait_for, keys)):
        raise ConnectionError("torchrun is gone, and this run has not begun; start it again")
    of_ranks = [{}] * process.world_size
    dist.all_gather_object(of_ranks, facts)
    lines = []
    for name in dict.fromkeys(name for theirs in of_ranks for name in theirs):
        ranks: dict[str, list[int]] = {}
        for number, theirs in enumerate(of_ranks):
            ranks.setdefault(str(theirs.get(name)), []).append(number)
        if len(ranks) > 1:
            lines.append(f"{name}: " + "; ".join(f"{value} on {named_ranks(which)}" for value, which in ranks.items()))
    if lines:
        raise ValueError(
            "the ranks of this run differ, so they would train apart; give all of them the same flags and shared "
            "folders\n" + "\n".join(lines)
        )


def named_ranks(ranks: list[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for number in ranks:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {words}"


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one. Run train.py.")
