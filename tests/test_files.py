import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from files import atomic_write, sha256_of

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "precious.bin"
    path.write_bytes(b"old")
    return path


@pytest.mark.parametrize(("mode", "content"), [("wb", b"\x00\xff\r\n"), ("w", "Zürich, 東京\n")])
def test_missing_folders_are_made_and_hold_only_the_new_file(tmp_path, mode, content):
    path = tmp_path / "a" / "b" / "file"
    with atomic_write(path, mode) as file:
        file.write(content)
    assert path.read_bytes() == (content if mode == "wb" else content.encode("utf-8"))
    assert os.listdir(path.parent) == ["file"]


def test_readers_see_the_old_file_until_the_new_one_is_whole(old):
    with atomic_write(old) as file:
        file.write(b"new")
        file.flush()
        assert old.read_bytes() == b"old"
        # A rename is only atomic within one file system, so the temporary file must be in the same folder.
        assert Path(file.name).parent == old.parent
    assert old.read_bytes() == b"new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_leaves_the_old_file_and_no_temporary(old, error):
    with pytest.raises(error), atomic_write(old) as file:
        file.write(b"new")
        raise error
    assert old.read_bytes() == b"old"
    assert os.listdir(old.parent) == [old.name]


def test_an_exception_leaves_no_file_if_there_was_none(tmp_path):
    with pytest.raises(ValueError), atomic_write(tmp_path / "file") as file:
        file.write(b"new")
        raise ValueError
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_the_old_file_and_no_temporary(old, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as told, atomic_write(old) as file:
        file.write(b"new")
    assert str(old) in str(told.value) and "make room" in str(told.value)
    assert old.read_bytes() == b"old"
    assert os.listdir(old.parent) == [old.name]


@pytest.mark.skipif(os.name != "posix", reason="no SIGKILL, and no folder can be synced")
def test_a_killed_writer_leaves_the_old_content(old):
    script = (
        "import os, signal, sys\n"
        "from files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as file:\n"
        "    file.write(b'new' * 100_000)\n"
        "    file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, old], cwd=REPO, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert old.read_bytes() == b"old"
    with atomic_write(old) as file:  # the killed writer's temporary file is not in the way
        file.write(b"newer")
    assert old.read_bytes() == b"newer"


@pytest.mark.skipif(os.name != "posix", reason="no SIGKILL, and no folder can be synced")
def test_content_and_name_reach_the_disk_in_that_order(old, monkeypatch):
    # A test cannot cut the power. It can check the order of the system calls that protects files from a power cut.
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("fsync", os.fstat(fd).st_ino)), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("replace", os.stat(a).st_ino)), replace(a, b)))
    with atomic_write(old) as file:
        file.write(b"new")
    inode = old.stat().st_ino
    assert events == [("fsync", inode), ("replace", inode), ("fsync", old.parent.stat().st_ino)]


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**20 + 1, 3_000_000])  # the file is read in blocks of 2^20 bytes
def test_sha256_of_a_file(tmp_path, size):
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()
