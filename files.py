"""Files that matter are written whole or not at all. Also: digests, free space, and a lock for a folder."""

import errno
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file beside `path` for writing. On success it is synced to the disk and renamed to `path`.

    After a crash or a power cut `path` is the old file or the whole new one. After an exception the temporary file is
    gone and `path` is untouched. Python does not say which file met a full disk, so that error gets the name `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
            error.strerror, error.filename = f"{error.strerror}; make room", str(path)
        raise
    if os.name == "posix":  # sync the rename itself too; Windows cannot open folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sha256_of(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


class FolderLocked(Exception):
    """Another process holds the lock of a folder."""


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Make `folder` and lock it against other processes that ask for this lock. At the end an empty folder is removed.

    Raises:
        FolderLocked: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    lock = FileLock(path, timeout=0)
    try:
        try:
            lock.acquire()
        except Timeout as error:
            raise FolderLocked(f"{folder}: locked by another process") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            lock.release()
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()


def check_free_space(needed: Iterable[tuple[Path, int]]) -> None:
    """Raises OSError unless the disks have room for `needed`: pairs of a folder, which may not exist yet, and bytes."""
    disks, bytes_needed = {}, Counter()
    for folder, count in needed:
        folder = folder.absolute()
        while not folder.exists():
            folder = folder.parent
        device = folder.stat().st_dev
        disks[device] = folder
        bytes_needed[device] += count
    for device, folder in disks.items():
        free = shutil.disk_usage(folder).free
        if bytes_needed[device] > free:
            raise OSError(
                errno.ENOSPC, f"needs {bytes_needed[device]:,} bytes, and the disk has {free:,}; make room", str(folder)
            )


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
