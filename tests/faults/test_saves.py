"""A save interrupted anywhere, a full disk, a damaged checkpoint: the run goes on from a whole checkpoint."""

import errno
import json
import math
import os
import random
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_files import read_checkpoint, rewrite_digests, size_of
from safetensors.torch import load_file, save_file
from test_checkpoints import trained

import checkpoints
import model_folders
from checkpoints import CheckpointSaver, TrainState, save_checkpoint
from preparation import prepare
from resuming import Start, find_start, leave_spoilt

pytestmark = pytest.mark.faults


@pytest.fixture(autouse=True)
def fast(no_syncs):
    """Thousands of files are written here."""


class Run:
    """A run directory with saves of one model, whose weights differ from step to step."""

    def __init__(self, out_dir: Path):
        self.state, cfg = trained()
        self.cfg = replace(cfg, out_dir=str(out_dir), resume=True)
        self.folder = out_dir / "checkpoints"
        self.folder.mkdir(parents=True)

    def save(self, step: int, *, keep: int = 2, is_best: bool = False) -> Path:
        self.state.step = step
        with torch.no_grad():
            for parameter in self.state.model.parameters():
                parameter.fill_(step)
        return save_checkpoint(self.folder, self.state.as_checkpoint(self.cfg, "tokens"), keep=keep, is_best=is_best)

    def resume(self) -> Start:
        """Start as train.py does, and check that what is loaded is whole."""
        start = Start(**find_start(self.cfg))
        step = int(start.checkpoint[-8:])
        state = TrainState(self.state.model, self.state.optimizers, self.state.windows)
        state.resume(Path(start.checkpoint), self.cfg)
        assert state.step == step
        assert all((parameter == step).all() for parameter in state.model.parameters())
        leave_spoilt(start, self.folder)
        return start

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}


# ---------------------------------------------------------------- every file operation of a save, interrupted in turn


class Killed(BaseException):
    """Ends a save as a kill does: no handler can touch a file any more."""


class Interrupter:
    """Counts file operations. Number `at` fails: as an error of the disk, or as a kill that also ends all later ones.

    Operations are Python's audit events (open, rename, remove, mkdir, rmdir, chmod), syncs, and writes. Half of what an
    interrupted write writes reaches the disk.
    """

    EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "shutil.rmtree")

    def __init__(self):
        self.folder, self.at, self.kills, self.count, self.names = None, math.inf, False, 0, []

    def note(self, name: str, *half: object) -> None:
        if self.folder is None:
            return
        self.count += 1
        self.names.append(name)
        if self.count == self.at or (self.kills and self.count > self.at):
            for write in half if self.count == self.at else ():
                write()
            raise Killed if self.kills else OSError(errno.EIO, "Input/output error")

    def hook(self, event: str, args: tuple) -> None:
        # Deleting a tree names its files within an open folder.
        if self.folder and event in self.EVENTS and (str(self.folder) in str(args[0]) or "/" not in str(args[0])):
            self.note(event)


INTERRUPTER = Interrupter()
sys.addaudithook(INTERRUPTER.hook)  # it cannot be removed, so there is one for all tests


@pytest.fixture
def interrupter(monkeypatch):
    """The INTERRUPTER, which sees the writes too."""

    def interrupted(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def operation(*args, **kwargs):
            folder, INTERRUPTER.folder = INTERRUPTER.folder, None  # what it opens itself does not count

            def half():
                real(*args, **kwargs)
                path = args[1] if name == "save_file" else args[0]
                if isinstance(path, Path):
                    os.truncate(path, path.stat().st_size // 2)

            try:
                INTERRUPTER.folder = folder
                INTERRUPTER.note(name, *([half] if name != "fsync" else []))
                INTERRUPTER.folder = None
                return real(*args, **kwargs)
            finally:
                INTERRUPTER.folder = folder

        monkeypatch.setattr(owner, name, operation)

    for owner, name in [
        (Path, "write_text"),
        (Path, "write_bytes"),
        (os, "fsync"),
        (checkpoints, "save_file"),
        (model_folders, "save_file"),
    ]:
        interrupted(owner, name)
    yield INTERRUPTER
    INTERRUPTER.folder = None


def test_the_interrupter_sees_all_kinds_of_operations(tmp_path, interrupter):
    run = Run(tmp_path)
    run.save(1)
    interrupter.at, interrupter.count, interrupter.names, interrupter.folder = math.inf, 0, [], run.folder
    run.save(2, keep=1, is_best=True)
    assert {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "fsync"} <= set(interrupter.names)
    assert interrupter.names.count("save_file") == 2 and interrupter.names.count("write_text") == 4
    assert interrupter.count > 50


@pytest.mark.parametrize("kills", [True, False], ids=["kill", "error"])
def test_a_save_interrupted_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path, interrupter, kills):
    """The save prunes one checkpoint and makes a new best one. Then the run resumes, and saves again."""
    at, tried = 0, 0
    while True:
        at += 1
        folder = tmp_path / str(at)
        run = Run(folder)
        run.save(1, is_best=True)
        run.save(2)
        interrupter.at, interrupter.kills, interrupter.count, interrupter.folder = at, kills, 0, run.folder
        try:
            run.save(3, keep=1, is_best=True)
        except (Killed, OSError) as error:
            interrupter.folder = None
            if not kills:
                assert "it needs" in str(error) and "last good checkpoint is" in str(error)
        else:
            interrupter.folder = None
            if interrupter.count < at:
                break
        tried += 1
        start = run.resume()
        assert int(start.checkpoint[-8:]) in (2, 3) and not start.notes, (at, interrupter.names[-1])
        if not kills:
            assert not [name for name in run.names() if name.endswith(".tmp") and "step_00000003" in name]
        run.save(4, keep=1)
        assert run.names() - {"best"} <= {"step_00000001", "step_00000003", "step_00000004"}
        assert run.resume().checkpoint.endswith("step_00000004")
        shutil.rmtree(folder)
    print(f"{tried} operations interrupted")
    assert tried > 50


@pytest.mark.parametrize("kills", [True, False], ids=["kill", "error"])
def test_saving_a_step_again_is_safe_too(tmp_path, interrupter, kills):
    """The checkpoint of that step is the only one. Between the two renames it has another name."""
    at = 0
    while True:
        at += 1
        run = Run(tmp_path / str(at))
        run.save(2, keep=1)
        interrupter.at, interrupter.kills, interrupter.count, interrupter.folder = at, kills, 0, run.folder
        try:
            run.save(2, keep=1)
        except (Killed, OSError):
            interrupter.folder = None
        else:
            interrupter.folder = None
            if interrupter.count < at:
                break
        checkpoints._clear_leftovers(run.folder)
        assert run.resume().checkpoint.endswith("step_00000002"), at
    assert at > 30


# ---------------------------------------------------------------- a full disk


@contextmanager
def small_disk(folder: Path, size: int):
    """A file system of `size` bytes at `folder`. Only root may mount one; without it the test cannot run."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_full_at_any_write_of_a_save_keeps_the_earlier_ones_whole(tmp_path):
    """The free space grows page by page, so that each file in turn is the one that does not fit."""
    disk = tmp_path / "disk"
    with small_disk(disk, 16 * 2**20):
        run = Run(disk / "run")
        run.save(1, is_best=True)
        size, failed = size_of(run.folder / "step_00000001"), 0
        for free in [0, 1, *range(4096, 2 * size, 8192)]:
            filler = disk / "filler"
            filler.unlink(missing_ok=True)
            room = os.statvfs(disk)
            with suppress_full_disk(), open(filler, "wb") as file:
                file.write(b"\0" * max(0, room.f_bavail * room.f_frsize - free))
            try:
                run.save(2)
            except OSError as error:
                failed += 1
                assert "it needs" in str(error) and "and the disk has" in str(error) and "step_00000001" in str(error)
                assert run.names() == {"step_00000001", "best"}
                assert run.resume().checkpoint.endswith("step_00000001")
            else:
                break
        assert failed > 20
        assert run.resume().checkpoint.endswith("step_00000002")


def test_a_disk_full_at_any_write_of_a_preparation_loses_no_shard(tmp_path):
    """The disk grows from try to try. In the end the folder has the bytes of one that never met its end."""
    draw = random.Random(0)
    texts = tmp_path / "texts.jsonl"
    documents = ["".join(draw.choices("abcdefghij ", k=600)) for _ in range(200)]
    texts.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    arguments = {"vocab_size": 512, "shard_size": 8192, "val_fraction": 0.2, "show_progress": False}
    prepare([str(texts)], tmp_path / "whole", **arguments)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    disk, size, failed, kept = tmp_path / "disk", 2**16, 0, 0
    with small_disk(disk, size):
        while True:
            try:
                prepare([str(texts)], disk / "data", **arguments)
            except OSError as error:
                failed += 1
                assert str(disk) in str(error), error
                assert not list(disk.rglob("*.tmp"))
                shards = {path.name for path in disk.rglob("edufineweb_train*")}
                assert len(shards) >= kept  # what was whole stays
                kept = len(shards)
                assert all((disk / "data" / name).read_bytes() == whole[name] for name in shards)
            else:
                break
            size += 2**13
            subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)
        assert failed > 5
        assert {path.name: path.read_bytes() for path in (disk / "data").iterdir()} == whole


@contextmanager
def suppress_full_disk():
    try:
        yield
    except OSError as error:
        assert error.errno == errno.ENOSPC


def test_a_save_that_fails_does_not_end_the_run_and_the_next_one_succeeds(tmp_path, monkeypatch, capsys):
    run, real, fails = Run(tmp_path), checkpoints.save_checkpoint, [True, False, True]

    def save(*args, **kwargs):
        if fails.pop(0):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoints, "save_checkpoint", save)
    saver = CheckpointSaver(run.folder, keep=2)
    for step in (1, 2):
        run.state.step = step
        saver.save(run.state.as_checkpoint(run.cfg, "tokens"), is_best=False)
        saver.wait()
    saver.finish()
    out, err = capsys.readouterr()
    assert "No space left" in err and "training goes on" in err and err.count("\n") == 1
    assert out.split() == ["step", "2", "saved", "in", str(run.folder)]
    saver.save(run.state.as_checkpoint(run.cfg, "tokens"), is_best=False, is_last=True)
    with pytest.raises(OSError, match="No space left"):
        saver.finish()
    assert not capsys.readouterr().err  # whoever called finish says it


@pytest.mark.parametrize("is_last", [True, False])
def test_an_error_in_the_background_that_nobody_expects_is_not_lost(tmp_path, monkeypatch, capsys, is_last):
    def broken(*args):
        raise MemoryError("no room for the weights")

    run = Run(tmp_path)
    monkeypatch.setattr(checkpoints, "write_model", broken)
    saver = CheckpointSaver(run.folder, keep=2)
    saver.save(run.state.as_checkpoint(run.cfg, "tokens"), is_best=False, is_last=is_last)
    with pytest.raises(MemoryError, match="no room for the weights"):
        saver.finish()
    err = capsys.readouterr().err
    assert not err if is_last else "MemoryError: no room for the weights; training goes on" in err


# ---------------------------------------------------------------- a damaged checkpoint


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Run:
    """A run with checkpoints of steps 1 and 2."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        run = Run(tmp_path_factory.mktemp("template") / "run")
        run.save(1, is_best=True)
        run.save(2)
    return run


@pytest.fixture
def run(template, tmp_path) -> Run:
    """A copy of it, to damage."""
    shutil.copytree(template.folder.parent, tmp_path / "run")
    run = object.__new__(Run)
    run.state, run.folder = template.state, tmp_path / "run/checkpoints"
    run.cfg = replace(template.cfg, out_dir=str(tmp_path / "run"))
    return run


def assert_falls_back(run: Run, what: object) -> None:
    """The damage of step 2 is found and named, step 1 is resumed, step 2 is kept aside as it is."""
    newest = run.folder / "step_00000002"
    before = {path.relative_to(newest): path.read_bytes() for path in newest.rglob("*") if path.is_file()}
    start = run.resume()
    assert start.checkpoint.endswith("step_00000001"), what
    assert len(start.notes) == 1 and str(newest) in start.notes[0] and "trying the one before" in start.notes[0], what
    aside = run.folder / "aside/step_00000002"
    assert {path.relative_to(aside): path.read_bytes() for path in aside.rglob("*") if path.is_file()} == before
    assert (run.folder / "best").read_text() == "step_00000001\n"
    aside.rename(newest)


def files_of(run: Run) -> list[Path]:
    return sorted(path for path in (run.folder / "step_00000002").rglob("*") if path.is_file())


def test_every_flipped_bit_is_found(run):
    """200 bits, spread over all files."""
    draw, files = random.Random(0), files_of(run)
    assert len(files) == 8
    for i in range(200):
        path = files[i % len(files)]
        whole = path.read_bytes()
        place, bit = draw.randrange(len(whole)), draw.randrange(8)
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        assert_falls_back(run, (path, place, bit))
        path.write_bytes(whole)


def test_every_truncation_is_found(run):
    draw, files = random.Random(1), files_of(run)
    for i in range(50):
        path = files[i % len(files)]
        whole = path.read_bytes()
        path.write_bytes(whole[: draw.randrange(len(whole))])
        assert_falls_back(run, path)
        path.write_bytes(whole)


def test_every_missing_or_empty_file_is_found(run):
    for path in files_of(run):
        whole = path.read_bytes()
        path.unlink()
        assert_falls_back(run, path)
        path.touch()
        assert_falls_back(run, path)
        path.write_bytes(whole)
    shutil.rmtree(run.folder / "step_00000002")
    (run.folder / "step_00000002").mkdir()
    assert_falls_back(run, "an empty folder")


@pytest.mark.parametrize("name", ["model.safetensors", "training_state/optimizer.safetensors"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_found(run, name, value):
    """Their digests are right: the run saved them so."""
    path = run.folder / "step_00000002"
    tensors = load_file(path / name)
    tensors[sorted(tensors)[0]].view(-1)[0] = value
    save_file(tensors, path / name)
    rewrite_digests(path)
    assert_falls_back(run, name)


def test_where_all_checkpoints_are_damaged_nothing_is_touched(run):
    for path in run.folder.glob("step_*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    before = sorted(run.folder.rglob("*"))
    with pytest.raises(ValueError, match="no checkpoint to resume from is whole") as told:
        find_start(run.cfg)
    assert "step_00000001: " in str(told.value) and "step_00000002: " in str(told.value)
    assert sorted(run.folder.rglob("*")) == before


def test_best_alone_is_resumed_from(run):
    shutil.rmtree(run.folder / "step_00000002")
    assert run.resume().checkpoint.endswith("step_00000001")


def test_resume_best_goes_back_and_keeps_what_came_after(run):
    run.cfg = replace(run.cfg, resume="best")
    start = run.resume()
    assert start.same_run and start.checkpoint.endswith("step_00000001") and not start.notes
    assert run.names() == {"aside", "best", "step_00000001"}
    assert read_checkpoint(run.folder / "aside/step_00000002")["step"] == 2
    # The same again: a second folder of that name gets a number.
    run.save(2)
    run.resume()
    assert {path.name for path in (run.folder / "aside").iterdir()} == {"step_00000002", "step_00000002.1"}


def test_going_back_behind_the_best_checkpoint_gives_it_up(run):
    run.save(3, keep=3, is_best=True)
    run.cfg = replace(run.cfg, resume=str(run.folder / "step_00000002"))
    start = Start(**find_start(run.cfg))
    assert start.same_run and not leave_spoilt(start, run.folder)
    assert not (run.folder / "best").exists()
    assert (run.folder / "aside/step_00000003").is_dir()


def test_resume_best_without_a_best_one_and_folders_without_a_run_are_refused(run, tmp_path):
    (run.folder / "best").unlink()
    (tmp_path / "empty").mkdir()
    for resume, words in [
        ("best", "resume=best: "),
        (str(tmp_path / "empty"), "no checkpoint there"),
        (str(tmp_path / "nowhere"), "no checkpoint there"),
    ]:
        with pytest.raises((ValueError, OSError), match=words):
            find_start(replace(run.cfg, resume=resume))
    model = tmp_path / "model"
    shutil.copytree(run.folder / "step_00000001", model)
    shutil.rmtree(model / "training_state")
    (model / "checkpoint.json").unlink()
    with pytest.raises(ValueError, match="holds a model but no run to resume; --init_from begins"):
        find_start(replace(run.cfg, resume=str(model)))


def test_another_runs_folder_begins_a_new_run_with_its_state(run, tmp_path):
    cfg = replace(run.cfg, out_dir=str(tmp_path / "other"), resume=str(run.folder.parent))
    start = Start(**find_start(cfg))
    assert start.checkpoint.endswith("step_00000002") and not start.same_run and not start.spoilt
    assert start.run_id != json.loads((Path(start.checkpoint) / "training_state/state.json").read_text())["run_id"]


def test_resume_with_nothing_there_says_that_it_starts_at_step_0(run, tmp_path):
    start = Start(**find_start(replace(run.cfg, out_dir=str(tmp_path / "new"))))
    assert not start.checkpoint and "starts at step 0" in start.notes[0]
