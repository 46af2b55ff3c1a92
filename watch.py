"""The watch of a process: a thread that hears stop signals and the other ranks, whatever the main thread does.

Once a second it writes a record into the store that all ranks share, and reads the records of the others: a heartbeat,
where the rank is, the stop signal that it has heard, the cause if it has failed. So

- a stop signal to one rank reaches all, even in the middle of a long product or of a wait for another rank;
- a rank that has fallen silent (stopped, swapped out, its machine lost) is named, and the others end;
- a rank that has failed is named with the cause, and the others end.

Alone, a process has a watch too, for its signals. The watch also prints the stacks of a step that takes far too long.
"""

import faulthandler
import json
import os
import select
import signal
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
PERIOD = 1.0  # seconds between two heartbeats
PATIENCE = 2.0  # seconds in which further signals are the same wish: torchrun forwards its own to ranks that have one
SLOW, LEAST_SLOW = 10, 5.0  # a step is far too long at SLOW times its usual time and LEAST_SLOW seconds
STOP_TIMEOUT = 10.0  # seconds without a heartbeat after which a rank counts as lost when a stop signal has come
LAST_SECONDS = 3.0  # for an end of the main thread's own when another rank has failed; and for the last words


class Watch(threading.Thread):
    """Start it in the main thread, because Python lets only that set handlers of signals; `close` ends it.

    Args:
        store: of all ranks (torch.distributed's), or None for a process alone.
        timeout: seconds after which a rank without a heartbeat counts as lost.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, store: Any = None, timeout: float = 600):
        super().__init__(name="watch", daemon=True)
        self.rank, self.world_size, self.store, self.timeout = rank, world_size, store, timeout
        self.stop = 0  # the stop signal that this rank has heard, or another one
        self.chores: list[Callable[[], None]] = []  # what else to do once a second
        self.before_end: Callable[[], None] | None = None  # what to wait for before the watch ends the process
        self.last_words: Callable[[], None] | None = None  # what to print when the watch ends the process
        self._own_signal = 0.0  # time of the first signal to this process
        self._record = {"host": socket.gethostname(), "pid": os.getpid(), "mark": mark_of(os.getpid()), "beat": 0}
        self._record |= {"at": "the start", "failed": ""}
        self._others: dict[int, dict] = {}
        self._changed: dict[int, float] = {}  # when the record of a rank last changed
        self._end_at, self._named = 0.0, set()
        self._step: tuple[int, float] | None = None  # the step in progress, and when it began
        self._usual: deque[float] = deque(maxlen=20)  # seconds of the last steps
        self._told = threading.Event()
        self._closing = False
        self._ear, self._mouth = socket.socketpair()
        self._ear.setblocking(False)
        self._mouth.setblocking(False)

    # ------------------------------------------------------------ called by the main thread

    def start(self) -> None:
        self._handlers = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in self._handlers.items():
            # Under nohup SIGHUP is ignored, and stays so.
            if not (number == getattr(signal, "SIGHUP", None) and handler == signal.SIG_IGN):
                signal.signal(number, self._note)
        self._wakeup_fd = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        if self.store is not None:
            self._write_record()  # before a rank reads it
        super().start()

    def close(self) -> None:
        """Tell the other ranks that this one ends as it should. Restore the handlers of signals."""
        self._record["ended"] = True
        self._wake(wait=True)
        self._closing = True
        self._wake()
        self.join(PERIOD)
        signal.set_wakeup_fd(self._wakeup_fd)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if not self.is_alive():  # else it waits for the store, and needs them when it wakes
            self._ear.close()
            self._mouth.close()

    def fail(self, cause: str) -> None:
        """Tell the other ranks that this one ends, and why."""
        self._record["failed"] = cause
        self._wake(wait=True)

    def begin(self, step: int) -> None:
        self._record["at"] = f"step {step}"
        self._step = step, time.monotonic()

    def end(self, what_is_next: str) -> None:
        """The step in progress has ended."""
        if self._step:
            self._usual.append(time.monotonic() - self._step[1])
        self._step = None
        self._record["at"] += f", {what_is_next}"

    def tell(self, key: str) -> None:
        """Set `key`, which other ranks wait for."""
        with suppress(RuntimeError):  # torchrun is gone, and the store with it: then nobody waits
            if (store := self.store) is not None:
                store.set(key, "")

    def wait_for(self, key: str) -> bool:
        """Wait until a rank has set `key`, however long it takes. A lost rank ends this process too.

        Returns False if the store is gone, and True otherwise.
        """
        pause = 0.001
        with suppress(RuntimeError):  # torchrun is gone, and the store with it
            while (store := self.store) is not None:
                if store.check([key]):
                    return True
                time.sleep(pause)
                pause = min(2 * pause, 0.1)
        return False

    def failures(self, seconds: float) -> str:
        """Which other ranks have failed or fallen silent; waits `seconds` at most for the news. Else where all are."""
        deadline = time.monotonic() + seconds
        while not (found := self._failed(self.timeout)) and time.monotonic() < deadline:
            time.sleep(0.1)
        self._kill_silent_ranks()
        found = found or self._failed(3 * PERIOD)
        at = [f"rank {rank} is at {record['at']}" for rank, record in sorted(self._others.items())]
        return "; ".join(found or at)

    def is_first_alive(self) -> bool:
        """Whether all ranks before this one are lost. Then this one says what is said once.

        A rank that has failed or ended is not lost: it has spoken for itself.
        """
        if self.store is None:  # nobody knows who is alive
            return self.rank == 0
        now = time.monotonic()
        records = [self._others.get(rank, {}) for rank in range(self.rank)]
        if any(record.get("failed") or "ended" in record for record in records):
            return False
        return all(now - self._changed.get(rank, now) > 3 * PERIOD for rank in range(self.rank))

    # ------------------------------------------------------------ called by signals and in the thread

    def _note(self, number: int, frame: Any) -> None:
        """The handler of the stop signals. The thread hears of the signal through the socket, at once."""
        self.stop = self.stop or number

    def _wake(self, *, wait: bool = False) -> None:
        self._told.clear()
        self._mouth.send(b"\0")
        if wait and self.is_alive():
            self._told.wait(2 * PERIOD)  # no longer: the store may be gone

    def run(self) -> None:
        while not self._closing:
            readable, _, _ = select.select([self._ear], [], [], PERIOD)
            for number in self._ear.recv(1024) if readable else b"":
                if number in SIGNALS:
                    self._hear(number)
            try:
                if self.store is not None:
                    self._exchange_records()
                for chore in self.chores:
                    chore()
                self._look_at_step()
            except Exception:  # a fault here must not silence the rank: the others would take it for lost
                traceback.print_exc()
            self._told.set()

    def _hear(self, number: int) -> None:
        now = time.monotonic()
        self.stop = self.stop or number
        if not self._own_signal:
            self._own_signal = now
        elif now - self._own_signal > PATIENCE:
            self._end(128 + number, f"train.py: a second {signal.Signals(number).name}, so this process ends at once")

    def _end(self, status: int, sentence: str = "") -> None:
        """End the process, whatever its main thread does.

        Another thread speaks, because a terminal or a pipe that nobody reads holds whoever writes to it for ever.
        """
        speaker = threading.Thread(target=self._speak, args=(sentence,), daemon=True)
        speaker.start()
        speaker.join(LAST_SECONDS)
        os._exit(status)

    def _speak(self, sentence: str) -> None:
        if sentence:
            say(sentence)
        if self.last_words:
            self.last_words()

    def _write_record(self) -> None:
        self._record["beat"] += 1
        self.store.set(f"rank/{self.rank}", json.dumps(self._record | {"stop": self.stop}))

    def _exchange_records(self) -> None:
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        try:
            self._write_record()
            records = self.store.multi_get([f"rank/{rank}" for rank in others])
        except RuntimeError:  # torch.distributed's errors are RuntimeErrors
            # torchrun hosts the store. Its processes would train on without it, and nobody could stop them.
            self.store = None
            if not self._closing and "ended" not in self._record and not self.stop:
                self.stop = signal.SIGTERM
                say(f"train.py [rank {self.rank}]: torchrun is gone, so this run saves and stops")
            return
        now = time.monotonic()
        for rank, text in zip(others, records, strict=True):
            record = json.loads(text)
            if record != self._others.get(rank):
                self._others[rank], self._changed[rank] = record, now
            self.stop = self.stop or record["stop"]
        # torchrun stops all ranks when one has died. It would kill a rank that waits for the dead one after 30 seconds.
        failed = self._failed(min(self.timeout, STOP_TIMEOUT) if self.stop else self.timeout)
        if not failed or self._closing or self._record["failed"] or "ended" in self._record:
            return
        if not self._end_at:
            self._end_at = now + LAST_SECONDS
        for sentence in failed:
            if sentence not in self._named:
                say(f"train.py [rank {self.rank}]: {sentence}; so this rank ends too")
            self._named.add(sentence)
        self._kill_silent_ranks()
        if now > self._end_at:  # the main thread waits for what will not come
            if self.before_end:
                self.before_end()
            self._end(1)

    def _failed(self, silence: float) -> list[str]:
        """A sentence for each rank that has failed, or has given no sign of life for `silence` seconds."""
        found = []
        for rank, record in sorted(self._others.items()):
            silent = time.monotonic() - self._changed[rank]
            if record["failed"]:
                found.append(f"rank {rank} has failed at {record['at']}: {record['failed']}")
            elif silent > silence and "ended" not in record:
                place = f"process {record['pid']} on {record['host']}, at {record['at']}"
                found.append(f"rank {rank} ({place}) has given no sign of life for {silence:g} seconds")
        return found

    def _kill_silent_ranks(self) -> None:
        """A stopped process would outlive torchrun's SIGTERM, and keep its memory. Those of this machine are ours."""
        for rank, record in self._others.items():
            silent = time.monotonic() - self._changed[rank] > self.timeout
            if silent and not record["failed"] and record["mark"] and record["mark"] == mark_of(record["pid"]):
                with suppress(OSError):  # it has ended meanwhile
                    os.kill(record["pid"], signal.SIGKILL)

    def _look_at_step(self) -> None:
        if not self._step or len(self._usual) < 3:
            return
        (step, began), usual = self._step, statistics.median(self._usual)
        if time.monotonic() - began > max(SLOW * usual, LEAST_SLOW):
            self._step = None  # say it once
            say(
                f"train.py [rank {self.rank}]: step {step} takes more than {SLOW} times the usual {usual:.2g} s; "
                "what each thread of this rank does:"
            )
            faulthandler.dump_traceback(sys.__stderr__)


def mark_of(pid: int) -> str:
    """What no other process has at any time: when Linux booted, its space of process numbers, when it began; or ""."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        began = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{boot} {os.readlink(f'/proc/{pid}/ns/pid')} {pid} {began}"
    except (OSError, IndexError):  # another system, or the process has ended
        return ""


def say(line: str) -> None:
    """Print a line to standard error at once, whatever another thread is printing."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one. Run train.py.")
