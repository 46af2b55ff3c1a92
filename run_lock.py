"""One run at a time in a run directory.

The lock of `files.lock_folder` ends with the process that holds it, however that ends. But only the machine itself is
sure to know of it. For other machines that share the folder, the file `.holder.json` says who holds it since when, and
a heartbeat renews its time.
"""

import json
import os
import socket
import time
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path

from files import FolderLocked, NoLocks, atomic_write, lock_folder

STALE = 300  # seconds without a heartbeat after which another machine's run counts as dead
BEAT = 30  # seconds between heartbeats


class RunLock:
    """Holds `out_dir` from `acquire` to `release`. Call `beat` now and then."""

    FILES = (".lock", ".holder.json")

    def __init__(self, out_dir: str | Path):
        self.folder, self.holder = Path(out_dir), Path(out_dir) / ".holder.json"
        self._stack, self._beaten, self._text = ExitStack(), 0.0, ""

    def acquire(self) -> None:
        """Take the lock, also that of a run that has died.

        Raises:
            FolderLocked: another run holds it.
            OSError: the folder cannot be written to.
        """
        locked = True
        try:
            self._stack.enter_context(lock_folder(self.folder))
        except FolderLocked as error:
            raise FolderLocked(f"out_dir={self.folder}: {self._who()}; wait, or choose another --out_dir") from error
        except NoLocks:
            locked = False  # a file system without locks: the heartbeat decides
        except OSError as error:
            raise OSError(f"out_dir={self.folder}: cannot be written to ({error}); choose another --out_dir") from error
        try:
            self._refuse_living_holder(locked)
            now = datetime.now().astimezone()
            content = {"host": socket.gethostname(), "machine": machine(), "pid": os.getpid()}
            self._text = json.dumps(content | {"since": now.isoformat(timespec="seconds")})
            self._write()
        except BaseException:
            self._stack.close()
            raise

    def _refuse_living_holder(self, locked: bool) -> None:
        """On this machine the lock, if there is one, has told already. Of another machine only the heartbeat tells."""
        if not self.holder.is_file() or (locked and self._read().get("machine") == machine()):
            return
        probe = self.folder / f".probe.{os.getpid()}.tmp"  # the time of the file system's own clock
        probe.touch()
        age = probe.stat().st_mtime - self.holder.stat().st_mtime
        probe.unlink()
        if age < STALE:
            raise FolderLocked(
                f"out_dir={self.folder}: {self._who()}; its last sign of life is {max(0, age):.0f} s old; if that run "
                f"is dead, wait until it is {STALE} s old, or choose another --out_dir"
            )

    def _read(self) -> dict:
        try:
            return {**json.loads(self.holder.read_text(encoding="utf-8"))}
        except (OSError, ValueError, TypeError):
            return {}  # not there, or cut short: nobody can be named

    def _who(self) -> str:
        holder = self._read()
        if "host" not in holder:
            return "another run is in there"
        return f"another run is in there, process {holder['pid']} on {holder['host']}, since {holder['since']}"

    def beat(self) -> None:
        """Renew the sign of life, if it is time."""
        if not self._text or time.monotonic() - self._beaten < BEAT:
            return
        self._beaten = time.monotonic()
        try:
            os.utime(self.holder)  # no sync: behind a save of gigabytes it would take longer than ranks wait for a sign
        except OSError:
            self._write()

    def _write(self) -> None:
        self._beaten, text = time.monotonic(), self._text
        # On a full disk this machine's own lock holds without the file.
        with suppress(OSError), atomic_write(self.holder, "w") as file:
            file.write(text)

    def release(self) -> None:
        """Give the lock back."""
        if self._text:
            self._text = ""
            with suppress(OSError):  # the folder has gone
                self.holder.unlink(missing_ok=True)
        self._stack.close()


def machine() -> str:
    """Something that two processes share if they run on one machine, in containers too."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one. Run train.py.")
