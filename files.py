"""Files that matter are written whole or not at all. Also: digests, free space, locks, and safe output."""

import errno
import hashlib
import io
import os
import shutil
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file beside `path` for writing. On success it is synced to the disk and renamed to `path`.

    After a crash or a power cut `path` is the old file or the whole new one. After an exception the temporary file is
    gone and `path` is untouched. The error of a full disk names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with full_disk_named(path):
            temporary.unlink(missing_ok=True)  # a link of this name would lead elsewhere
            with open(temporary, mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            replace_synced(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Name `path` in the error of a full disk. Python does not say which file met it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
            error.strerror, error.filename = f"{error.strerror}; make room", str(path)
        raise


def replace_synced(source: Path, target: Path) -> None:
    """Rename a file, which must be on the disk already, and sync the rename too."""
    os.replace(source, target)
    _sync(target.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Make a temporary folder beside `path` to write into. On success it is synced to the disk and renamed to `path`.

    After a crash or a power cut `path` is whole or absent. After an exception the temporary folder is gone. A folder
    `path` that exists already is replaced.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with full_disk_named(path):
            yield temporary
            mode = stat.S_IMODE(temporary.stat().st_mode) & 0o666  # what the umask leaves of a file's mode
            for entry in [*temporary.rglob("*"), temporary]:
                if entry.is_file():
                    entry.chmod(mode)  # safetensors makes files that only their owner may read
                _sync(entry)
            if path.exists():
                os.replace(path, path.with_name(f".{path.name}.old.{os.getpid()}.tmp"))
            replace_synced(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    """Bring a file or a folder to the disk. Windows cannot open folders."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


class FolderLocked(Exception):
    """Another process holds the lock of a folder."""


class NoLocks(OSError):
    """The file system of a folder offers no locks."""


NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # the errors of a file system that offers no locks


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Make `folder` and lock it against other processes that ask for this lock.

    If this call made the folder and the folder is empty at the end, it is removed.

    Raises:
        FolderLocked: another process holds the lock.
        NoLocks: its file system offers no locks.
        OSError: the folder cannot be made.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    lock = FileLock(path, timeout=0)
    try:
        try:
            lock.acquire()
        except Timeout as error:
            raise FolderLocked(f"{folder}: locked by another process") from error
        except (OSError, NotImplementedError) as error:  # NotImplementedError: ENOSYS, in older versions of filelock
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            if made:  # so the lock file is our own
                path.unlink(missing_ok=True)
            raise NoLocks(
                f"{folder}: its file system offers no locks ({error}); choose another folder, on a local disk"
            ) from error
        try:
            yield
        finally:
            # Remove the file while it is locked: after the release it could be another process's. Windows refuses to
            # remove an open file. There, release() removes it.
            with suppress(PermissionError):
                path.unlink(missing_ok=True)
            lock.release()
    finally:
        if made:
            with suppress(OSError):  # the folder is not empty
                folder.rmdir()


def existing_parent(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def check_free_space(needed: Iterable[tuple[Path, int]]) -> None:
    """Raises OSError unless the disks have room for `needed`: pairs of a folder, which may not exist yet, and bytes."""
    disks, bytes_needed = {}, Counter()
    for folder, count in needed:
        folder = existing_parent(folder)
        device = folder.stat().st_dev
        disks[device] = folder
        bytes_needed[device] += count
    for device, folder in disks.items():
        free = shutil.disk_usage(folder).free
        if bytes_needed[device] > free:
            raise OSError(
                errno.ENOSPC, f"needs {bytes_needed[device]:,} bytes, and the disk has {free:,}; make room", str(folder)
            )


def allow_any_text_in_output() -> None:
    """Let standard output and standard error take every character. Call this at the start of a script.

    A terminal or a pipe may have an encoding with few characters (cp1252, latin-1, ASCII). By default a print of any
    other character is an error, and would end the script. Standard output shows "?" for it, because a text stays easy
    to read so. Standard error shows its escape (\\u6771), because the name of a file stays exact so.
    """
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # not so where there is no terminal, or where a notebook took its place
            stream.reconfigure(errors=errors)


class Console(io.FileIO):
    """The file descriptor of a console. After the first failed write, all that is written there is dropped."""

    def write(self, data: bytes) -> int:
        try:
            while (written := super().write(data)) is None:  # another program made the terminal non-blocking
                os.set_blocking(self.fileno(), True)
            return written
        except OSError:  # a closed pipe, a lost terminal, a full disk: nobody is there to be told
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


def let_output_fail() -> None:
    """From here on a failed write to standard output or standard error is no error. Call this in a script whose work is
    worth more than its output.

    A stream that was closed before the start is None; it becomes the null device. A stream that a test or a notebook
    has replaced is left alone.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open as long as the process)
        elif stream is getattr(sys, f"__{name}__"):
            console = io.TextIOWrapper(
                io.BufferedWriter(Console(stream.fileno(), "w", closefd=False)),
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=stream.line_buffering or stream.write_through,  # write_through: python -u
            )
            setattr(sys, name, console)


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
