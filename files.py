"""Files that matter: written whole or not at all. And the layout of a folder of prepared token shards."""

import errno
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

SHARD_FORMAT_VERSION = 1
MANIFEST = "manifest.json"


def shard_name(index: int) -> str:
    """File name of shard `index`; shard 0 is the validation split, all others are training data."""
    return f"edufineweb_{'train' if index else 'val'}_{index:06d}.npy"


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest unsigned type that holds the ids 0 to vocab_size - 1."""
    return np.min_scalar_type(vocab_size - 1)


def is_prepared(data_root: str | Path) -> bool:
    """Whether a folder of shards is complete: its manifest is written last."""
    return (Path(data_root) / MANIFEST).is_file()


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary neighbour of `path` for writing; on success it takes the name, for good.

    After a crash or a power cut `path` is what it was before or all of the new file. On an exception the temporary
    file is removed and `path` is untouched; that of a full disk, which no write puts a name to, names `path`.
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
    if os.name == "posix":  # the rename itself must reach the disk; Windows cannot open folders
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


def check_free_space(needed: Iterable[tuple[Path, int]]) -> None:
    """Raises OSError unless the disks can hold what is asked for: (folder, bytes), each folder there or to be made."""
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
