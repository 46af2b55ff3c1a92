import errno
import hashlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

import files
from files import FolderLocked, allow_any_text_in_output, atomic_folder, atomic_write, lock_folder, sha256_of

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


@pytest.mark.skipif(os.name != "posix", reason="no folder can be synced")
def test_all_of_a_folder_reaches_the_disk_before_its_name_does(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    with atomic_folder(tmp_path / "new") as folder:
        (folder / "below").mkdir()
        (folder / "below/file").write_text("b")
        (folder / "file").write_text("a")
    places = [tmp_path / "new", *(tmp_path / "new").rglob("*")]
    assert sorted(events[:4]) == sorted(path.stat().st_ino for path in places)
    assert events[4:] == ["replace", tmp_path.stat().st_ino]


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**20 + 1, 3_000_000])  # the file is read in blocks of 2^20 bytes
def test_sha256_of_a_file(tmp_path, size):
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


# ---------------------------------------------------------------- the lock of a folder

NO_LOCKS = [OSError(code, os.strerror(code)) for code in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)]
NO_LOCKS.append(NotImplementedError("FileSystem does not appear to support flock"))  # of older versions of filelock


def test_a_locked_folder_is_refused_and_the_lock_is_free_afterwards(tmp_path):
    with lock_folder(tmp_path):
        with pytest.raises(FolderLocked, match=str(tmp_path)), lock_folder(tmp_path):
            pass
        assert os.listdir(tmp_path) == [".lock"]  # the refused one has not removed it
    assert os.listdir(tmp_path) == []
    with lock_folder(tmp_path):
        pass


@pytest.mark.parametrize("was_there", [False, True])
@pytest.mark.parametrize("error", NO_LOCKS, ids=str)
def test_a_file_system_without_locks_gives_a_sentence_with_the_cure(tmp_path, monkeypatch, error, was_there):
    folder = tmp_path / "data"
    if was_there:
        folder.mkdir()

    def acquire(self, *args, **kwargs):
        Path(self.lock_file).touch()  # filelock opens the file before the system refuses the lock
        raise error

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with pytest.raises(OSError) as told, lock_folder(folder):
        pytest.fail("not locked")
    assert str(told.value).startswith(f"{folder}: its file system offers no locks (")
    assert str(told.value).endswith("; choose another folder, on a local disk")
    assert folder.exists() == was_there


def test_another_error_of_the_lock_is_not_taken_for_a_lack_of_locks(tmp_path, monkeypatch):
    def acquire(self, *args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with pytest.raises(OSError, match=r"^\[Errno 5\] Input/output error$"), lock_folder(tmp_path):
        pass


def test_a_lock_file_that_cannot_be_removed_while_it_is_open_is_removed_later(tmp_path, monkeypatch):
    """Windows refuses to remove an open file. There, filelock removes the file when it releases the lock."""

    class WindowsLock(FileLock):
        def release(self, *args, **kwargs):
            super().release(*args, **kwargs)
            os.unlink(self.lock_file)

    def unlink(self, missing_ok=False):
        raise PermissionError(errno.EACCES, "The process cannot access the file", str(self))

    monkeypatch.setattr(files, "FileLock", WindowsLock)
    monkeypatch.setattr(Path, "unlink", unlink)
    with lock_folder(tmp_path / "data"):
        (tmp_path / "data" / "shard").touch()
    assert os.listdir(tmp_path / "data") == ["shard"]
    FileLock(tmp_path / "data" / ".lock").acquire(timeout=0)  # raises Timeout if the lock is still held


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_only_a_folder_that_the_call_made_is_removed_and_only_if_it_is_empty(tmp_path, error):
    (tmp_path / "old").mkdir()
    for name in ("old", "new", "filled"):
        try:
            with lock_folder(tmp_path / name):
                if name == "filled":
                    (tmp_path / name / "shard").touch()
                if error:
                    raise error
        except KeyboardInterrupt:
            pass
    assert sorted(os.listdir(tmp_path)) == ["filled", "old"]
    assert os.listdir(tmp_path / "filled") == ["shard"]


# ---------------------------------------------------------------- output


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_output_takes_any_text_in_any_encoding(monkeypatch, encoding):
    """Text of a model may hold any character. A file name may hold bytes that are no text: Python has surrogates."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, newline="") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    allow_any_text_in_output()
    for stream in (out, err):
        print("naïve 東京 \udcff", file=stream, flush=True)
    shown, told = (stream.buffer.getvalue().decode(encoding) for stream in (out, err))
    text = {"ascii": "na?ve", "utf-8": "naïve 東京 "}.get(encoding, "naïve ")
    assert shown.startswith(text) and "\\" not in shown
    assert told.rstrip().endswith("\\udcff")  # an error that names a file names it exactly
    assert out.encoding == encoding


def test_output_that_is_missing_or_replaced_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    allow_any_text_in_output()
