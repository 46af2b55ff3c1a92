"""The records of a run on a full disk: the run goes on, and its records are whole again once there is room."""

import errno
import io
import json
import os
from contextlib import contextmanager

import pytest
from tiny_run import ROOT, TRAIN, start_run, tiny_corpus, tiny_flags, write_questions

import records
from records import GrowingFile, MetricsLog, write_report_or_say_why

pytestmark = pytest.mark.faults


class FullDisk(io.FileIO):
    """A file on a disk that has `room` for so many more bytes, and then fails with `error`."""

    room, error = 10**9, errno.ENOSPC

    def write(self, data) -> int:
        if FullDisk.room <= 0:
            raise OSError(FullDisk.error, os.strerror(FullDisk.error))
        written = super().write(data[: FullDisk.room])  # the last write before the disk is full is a short one
        FullDisk.room -= written
        return written


@pytest.fixture
def disk(monkeypatch):
    """What GrowingFile opens lies on a FullDisk."""
    monkeypatch.setattr(records, "open", lambda path, mode, buffering: FullDisk(path, "a"), raising=False)
    monkeypatch.setattr(FullDisk, "room", 10**9)
    monkeypatch.setattr(FullDisk, "error", errno.ENOSPC)
    return FullDisk


ROWS = [{"step": step, "train_loss": step / 7} for step in range(1, 9)]
LINES = [json.dumps(row) + "\n" for row in ROWS]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS])
def test_rows_are_kept_while_they_cannot_be_written_and_come_in_order_later(tmp_path, disk, monkeypatch, capsys, error):
    monkeypatch.setattr(disk, "error", error)
    log = MetricsLog(tmp_path)
    for row in ROWS[:2]:
        log.write(row)
    disk.room = 10  # a third of the third row
    log.write(ROWS[2])
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(LINES[:2]) + LINES[2][:10]
    for row in ROWS[3:5]:
        log.write(row)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(LINES[:2])
    disk.room = 10**9
    log.write(ROWS[5])
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(LINES[:6])
    disk.room = 0
    log.write(ROWS[6])
    disk.room = 10**9
    log.write(ROWS[7])
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(LINES)
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1  # said once
    assert f"metrics.jsonl: not written for now ({os.strerror(error)}); training goes on" in err


@pytest.mark.parametrize("room", range(len(LINES[1]) + 1))
def test_no_row_is_torn_wherever_the_disk_becomes_full(tmp_path, disk, room):
    log = MetricsLog(tmp_path)
    log.write(ROWS[0])
    disk.room = room
    log.write(ROWS[1])
    disk.room = 10**9
    log.write(ROWS[2])
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(LINES[:3])


def test_the_end_tries_once_more_and_says_what_is_missing(tmp_path, disk, capsys):
    log = MetricsLog(tmp_path)
    disk.room = 0
    log.write(ROWS[0])
    log.samples(1, 10, ["abc"])
    log.close()
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 4 and all("never written" in line for line in err[2:]), err
    log = MetricsLog(tmp_path)
    log.write(ROWS[0])
    disk.room = 10**9
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == LINES[0]


def test_sizes_in_the_rows_of_samples_count_what_is_kept(tmp_path, disk):
    log = MetricsLog(tmp_path)
    disk.room = 0
    log.samples(2, 20, ["abc"])
    disk.room = 10**9
    log.samples(4, 40, ["東京"])
    log.close()
    ends = [json.loads(line)["samples_end"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    text = (tmp_path / "samples.txt").read_bytes()
    assert ends == [text.index(b"===== step 4"), len(text)]


def test_a_folder_that_is_gone_for_a_while_does_not_end_the_run(tmp_path):
    file = GrowingFile(tmp_path / "run" / "metrics.jsonl")  # the folder is missing
    file.append("a\n")
    (tmp_path / "run").mkdir()
    assert file.append("b\n") == 4
    file.close()
    assert (tmp_path / "run/metrics.jsonl").read_text() == "a\nb\n"


def test_tensorboard_on_a_full_disk_ends_alone(tmp_path, capsys):
    class Writer:
        def add_scalar(self, *args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        add_text = add_scalar

    log = MetricsLog(tmp_path, tensorboard=Writer())
    log.write(ROWS[0])
    log.samples(1, 10, ["abc"])
    log.close()
    assert capsys.readouterr().err.count("TensorBoard is off") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


# ---------------------------------------------------------------- the report


@contextmanager
def file_size_limit(size: int):
    """A write beyond `size` bytes fails, as on a full disk. Python ignores SIGXFSZ, so the write raises an error."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_report_that_does_not_fit_on_the_disk_is_one_sentence(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("".join(LINES))
    with file_size_limit(100):
        assert not write_report_or_say_why(tmp_path)
    err = capsys.readouterr().err
    assert err.startswith("report.html: not written (") and "python report.py" in err and err.count("\n") == 1
    assert os.listdir(tmp_path) == ["metrics.jsonl"]  # no temporary file
    assert write_report_or_say_why(tmp_path)


def test_a_report_without_rows_is_one_sentence(tmp_path, capsys):
    assert not write_report_or_say_why(tmp_path)
    assert "holds no metrics.jsonl" in capsys.readouterr().err


# ---------------------------------------------------------------- a run

FULL_FROM_STEP_3_TO_5 = """
import errno, io, os, runpy, sys
sys.path.insert(0, {root!r})
import records
write = records.MetricsLog.write
class Full(io.FileIO):
    full = False
    def write(self, data):
        if Full.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)
def write_row(self, row):
    Full.full = 3 <= row["step"] < 5
    write(self, row)
records.open = lambda path, mode, buffering: Full(path, "a")
records.MetricsLog.write = write_row
sys.argv[0] = {train!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_run_goes_on_while_the_disk_is_full_and_its_records_are_whole_at_the_end(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(FULL_FROM_STEP_3_TO_5.format(root=str(ROOT), train=str(TRAIN)))
    fields = {"max_steps": 6, "save_every": 3, "val_every": 2, "generate_every": 4}
    flags = tiny_flags(tiny_corpus(tmp_path), write_questions(tmp_path), tmp_path / "run", **fields)
    run = start_run(flags, script=script)
    _, err = run.communicate(timeout=90)
    assert run.returncode == 0, err
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train_loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 2, 4, 6]
    text = (tmp_path / "run/samples.txt").read_text()
    assert [line for line in text.splitlines() if line.startswith("=====")] == ["===== step 4", "===== step 6"]
    assert err.count(b"not written for now") == 2  # metrics.jsonl and samples.txt
    assert (tmp_path / "run/report.html").is_file() and not list((tmp_path / "run").glob("*.tmp"))
