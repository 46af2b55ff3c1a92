"""Ranks that fail, fall silent, differ or share a folder: all end soon, the culprit is named, no process is left."""

import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
from ranks import Ranks, checkpoint_of, driver, is_running, rows_of, wait_until
from tiny_run import STEPS, plain_environment, start_run, tiny_corpus, tiny_flags, write_questions

import run_lock

pytestmark = pytest.mark.faults

HEAD = 'import time, torch\nnote("pid", os.getpid())\n'

# Update 13 of one rank raises, or lasts.
AT_13 = """
from torch.optim.optimizer import register_optimizer_step_pre_hook
updates = 0
def disturb(*args):
    global updates
    updates += 1
    if updates == 13 and RANK == {rank}:
        note("now", 13)
        {what}
register_optimizer_step_pre_hook(disturb)
"""

# A rank's loss or gradient is not a number from its 7th forward pass: two micro-steps a step, so in step 4.
POISONED = """
class Poisoned(torch.nn.parallel.DistributedDataParallel):
    passes = 0
    def forward(self, *args, **kwargs):
        self.passes += 1
        loss = super().forward(*args, **kwargs)
        if RANK == 1 and {passes}:
            loss = {loss}
        return loss
torch.nn.parallel.DistributedDataParallel = Poisoned
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("data")
    return tiny_corpus(folder), write_questions(folder)


@pytest.fixture
def flags(data, tmp_path):
    """A function that returns the flags of a run into `tmp_path/run`."""
    return lambda **changes: tiny_flags(*data, tmp_path / "run", **{"val_every": 0, "save_every": 10} | changes)


def assert_all_gone(pids: list[int]) -> None:
    wait_until(lambda: not any(map(is_running, pids)), 10)


# ---------------------------------------------------------------- a rank fails, or falls silent


@pytest.mark.parametrize(("rank", "torchrun"), [(0, False), (1, False), (1, True)])
def test_one_rank_raises(flags, tmp_path, rank, torchrun):
    """The other one is in a collective. Both end, and the cause is named."""
    script = driver(tmp_path / "driver", HEAD + AT_13.format(rank=rank, what="raise RuntimeError('it broke')"))
    with Ranks(script, flags(timeout=30), 2, torchrun=torchrun) as ranks:
        pids = ranks.pids()
        ranks.marked("now", rank)
        everybody, began = ranks.everybody(), time.monotonic()
        statuses = ranks.wait(35)
        assert time.monotonic() - began < 15
        assert all(statuses)
        err = ranks.text("err") + ranks.text("err", 1)
        assert "RuntimeError: it broke" in err and "Traceback" in err
        if not torchrun:  # torchrun may end the other one before it can say something
            assert f"rank {rank} has failed at step 13" in err
        assert_all_gone(pids + everybody)
    assert checkpoint_of(tmp_path / "run", 10)["step"] == 10


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_is_stopped(flags, tmp_path, rank):
    """SIGSTOP, as a machine that hangs: no connection is closed. torchrun itself would wait for 30 s more."""
    script = driver(tmp_path / "driver", HEAD + AT_13.format(rank=rank, what="time.sleep(3)"))
    with Ranks(script, flags(timeout=5), 2, torchrun=True) as ranks:
        pids = ranks.pids()
        ranks.marked("now", rank)
        everybody = ranks.everybody()
        time.sleep(1.5)  # a record is a second old at most
        began = time.monotonic()
        os.kill(pids[rank], signal.SIGSTOP)
        assert ranks.wait(30) == [1]
        assert time.monotonic() - began < 5 + 5 + 5  # torchrun itself takes a while
        err = ranks.text("err")
        assert f"rank {rank} (process {pids[rank]} on {socket.gethostname()}, at step 13" in err
        assert "given no sign of life" in err or "Timed out" in err
        assert_all_gone(pids + everybody)


def test_rank_zeros_long_work_does_not_count(flags, tmp_path):
    """Samples and a save that take longer than `timeout`, while the other rank waits."""
    slow = """
import sampling, checkpoints
real, real_save = sampling.sample_next, checkpoints.save_checkpoint
def slow(*args):
    time.sleep(0.5)
    return real(*args)
def slow_save(*args, **kwargs):
    time.sleep(8)
    return real_save(*args, **kwargs)
sampling.sample_next, checkpoints.save_checkpoint = slow, slow_save
"""
    fields = {"timeout": 4, "generate_every": 2, "max_steps": 2, "generate_tokens": 14}
    with Ranks(driver(tmp_path / "driver", HEAD + slow), flags(**fields), 2) as ranks:
        assert ranks.wait(90) == [0, 0], ranks.text("err", 1)


# The loader's thread at the first of step 14's four batches, which it reads during step 13.
READS = """
import dataloaders
real = dataloaders.TrainWindows.batch
def disturbed(self, micro_step, pinned):
    if micro_step == 52:
        {what}
    return real(self, micro_step, pinned)
dataloaders.TrainWindows.batch = disturbed
"""


@pytest.mark.parametrize("of_loader", [False, True])
@pytest.mark.parametrize("rank", [1, "RANK"])
def test_errors_of_one_rank_and_of_all_have_a_traceback_each_and_nothing_is_left(flags, tmp_path, rank, of_loader):
    """The error is the main thread's, or the loader's. torchrun may stop a rank before it has printed its own."""
    raises = "raise RuntimeError('it broke')"
    disturb = AT_13.format(rank=rank, what="time.sleep(1)" if of_loader else raises)
    if of_loader:
        disturb += READS.replace("== 52", f"== 52 // 2 and RANK == {rank}").format(what=raises)
    with Ranks(driver(tmp_path / "driver", HEAD + disturb), flags(timeout=30), 2, torchrun=True) as ranks:
        pids = ranks.pids()
        ranks.marked("now", 1)
        everybody, began = ranks.everybody(), time.monotonic()
        assert all(ranks.wait(35))
        assert time.monotonic() - began < 15
        err = ranks.text("err")
        tracebacks = err.count("Traceback (most recent call last)") - err.count("raise ChildFailedError")  # torchrun's
        assert 1 <= tracebacks <= (2 if rank == "RANK" else 1) and "RuntimeError: it broke" in err, err
        assert_all_gone(pids + everybody)


@pytest.mark.parametrize(
    ("what", "at_13"),
    [("raise RuntimeError('it broke')", "pass"), ("time.sleep(3600)", "raise RuntimeError('it broke')")],
)
def test_the_loaders_thread_fails_or_hangs_and_the_run_ends(flags, tmp_path, what, at_13):
    """A read that hangs must not hold back a run that has failed meanwhile."""
    disturb = READS.format(what=what) + AT_13.format(rank=0, what=at_13)
    with Ranks(driver(tmp_path / "driver", HEAD + disturb), flags(), 1) as ranks:
        everybody = ranks.everybody()
        assert ranks.wait(60) == [1]
        assert "Traceback" in ranks.text("err") and "RuntimeError: it broke" in ranks.text("err")
        assert_all_gone(everybody)


def test_a_rank_that_waits_for_nothing_ends_too_and_its_save_is_finished(flags, tmp_path):
    """Rank 1 fails. Rank 0 hangs outside of any collective, and a save is in progress: the watch waits for it alone."""
    disturb = AT_13.format(rank="RANK", what="time.sleep(300) if RANK == 0 else 1 / 0")
    slow = """
import checkpoints
real = checkpoints.save_checkpoint
def slow(*args, **kwargs):
    time.sleep(8)
    return real(*args, **kwargs)
checkpoints.save_checkpoint = slow
"""
    with Ranks(driver(tmp_path / "driver", HEAD + disturb + slow), flags(save_every=12), 2) as ranks:
        ranks.marked("now", 0)
        began = time.monotonic()
        assert ranks.wait(60) == [1, 1]
        assert time.monotonic() - began < 30
        assert "rank 1 has failed at step 13: ZeroDivisionError: division by zero; so this rank ends too" in ranks.text(
            "err"
        )
    assert checkpoint_of(tmp_path / "run", 12)["step"] == 12


def test_ranks_agree_before_the_last_micro_step(flags, tmp_path):
    """Rank 1 alone has heard a signal, and leaves micro-steps out. Its gradient would lack them."""
    hears = """
import watch
watch.Watch._exchange_records = lambda self: None  # it would tell rank 0
class Hearing(torch.nn.parallel.DistributedDataParallel):
    passes = 0
    def forward(self, *args, **kwargs):
        self.passes += 1
        if RANK == 1 and self.passes == 12 * 4 + 2:  # in the second of four micro-steps of step 13
            os.kill(os.getpid(), 10)
        note("passes", self.passes)
        return super().forward(*args, **kwargs)
torch.nn.parallel.DistributedDataParallel = Hearing
"""
    with Ranks(driver(tmp_path / "driver", HEAD + hears), flags(batch_size=1), 2) as ranks:
        assert ranks.wait(60) == [128 + signal.SIGUSR1] * 2, (ranks.text("err"), ranks.text("err", 1))
        passes = [int(ranks.text("passes", rank).split()[-1]) for rank in (0, 1)]
        assert passes[0] == 12 * 4 + 3 and passes[1] == 12 * 4 + 2  # no rank has made the last micro-step
    assert rows_of(tmp_path / "run")[-1]["step"] == checkpoint_of(tmp_path / "run", 12)["step"] == 12


# ---------------------------------------------------------------- not a number


def health(out_dir: Path) -> list[str]:
    """The checkpoints of a run, all of whose weights are finite."""
    paths = sorted((out_dir / "checkpoints").glob("step_*"))
    for path in paths:
        weights = checkpoint_of(out_dir, int(path.name[5:]))["model"].values()
        assert all(weight.isfinite().all() for weight in weights)
    return [path.name for path in paths]


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ('loss * float("nan")', "the loss on rank 1 is nan"),
        ('loss * float("inf")', "the loss on rank 1 is inf"),
        ("loss + (loss * 0 - loss.detach() * 0).sqrt() * 1", "the gradient is nan"),  # the root of 0 has no slope
    ],
)
def test_a_number_that_is_not_finite_on_one_rank_stops_both_in_the_same_step(flags, tmp_path, loss, words):
    script = driver(tmp_path / "driver", HEAD + POISONED.format(passes="self.passes >= 7", loss=loss))
    with Ranks(script, flags(max_steps=9, save_every=1, keep_checkpoints=2), 2) as ranks:
        assert ranks.wait(60) == [1, 1]
        for rank in (0, 1):
            err = ranks.text("err", rank)
            assert "step 4: " in err and words in err and "step_00000003, " in err and "step_00000002. " in err
            assert "--resume PATH" in err and "--max_lr" in err and "--skip_nonfinite" in err
    assert health(tmp_path / "run") == ["step_00000002", "step_00000003"]
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2, 3]


def test_such_updates_may_be_left_out(flags, tmp_path):
    """Passes 7 to 10 are those of steps 4 and 5."""
    script = driver(
        tmp_path / "driver", HEAD + POISONED.format(passes="7 <= self.passes <= 10", loss='loss * float("nan")')
    )
    with Ranks(script, flags(max_steps=9, skip_nonfinite=2), 2) as ranks:
        assert ranks.wait(60) == [0, 0], ranks.text("err")
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2, 3, 6, 7, 8, 9]
    assert [(row["step"], row["skipped"]) for row in rows_of(tmp_path / "run", "skipped")] == [(4, 1), (5, 2)]
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "run")
    with Ranks(script, flags(max_steps=9, skip_nonfinite=1), 2) as ranks:
        assert ranks.wait(60) == [1, 1]
        assert "step 5: the loss on rank 1 is nan" in ranks.text("err")


def test_a_rate_that_blows_up_before_the_number_shows(flags, tmp_path):
    """The checkpoints of the last steps may be spoilt. The message names older ones, and the best one is among them."""
    fields = {"max_steps": 30, "save_every": 1, "keep_checkpoints": 2, "val_every": 2, "warmup_steps": 0}
    blow_up = """
from torch.optim.optimizer import register_optimizer_step_pre_hook
updates = 0
def blow_up(optimizer, *args):
    global updates
    updates += 1
    for group in optimizer.param_groups:
        if updates >= 9:
            group["lr"] = 1e12
register_optimizer_step_pre_hook(blow_up)
"""
    process = start_run(
        flags(**fields), script=driver(tmp_path / "driver", "RANK = 0\n" + blow_up), env=plain_environment(RANK="0")
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and b"Traceback" not in err, (out, err)
    assert b"is not finite" in err and b"(best)" in err and b"go on from an older one with --resume PATH" in err
    names = health(tmp_path / "run")
    best = (tmp_path / "run/checkpoints/best").read_text().strip()
    assert best in names and int(best[5:]) <= 8
    # The cure that it names works.
    path = tmp_path / "run/checkpoints" / best
    process = start_run([*flags(**fields | {"max_lr": 1e-4}), "--resume", str(path), "--allow_config_change"])
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert {row["step"] for row in rows_of(tmp_path / "run")} == set(range(1, 31))
    assert {path.name for path in (tmp_path / "run/checkpoints/aside").iterdir()} == set(names) - {best}


# ---------------------------------------------------------------- ranks that differ


def other_corpus(data: tuple[Path, Path], tmp_path: Path) -> dict:
    """Data of the same size, of which a shard's content differs."""
    root = shutil.copytree(data[0], tmp_path / "other")
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["shards"][1]["sha256"] = "0" * 64
    (root / "manifest.json").write_text(json.dumps(manifest))
    return {"data_root": root}


def other_questions(data: tuple[Path, Path], tmp_path: Path) -> dict:
    path = tmp_path / "other.jsonl"
    path.write_text("".join(data[1].read_text().splitlines(keepends=True)[:3]))
    return {"hellaswag_path": path, "hellaswag_every": 10}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda *_: {"max_lr": 2e-3}, ["max_lr: 0.001 on rank 0; 0.002 on rank 1"]),
        (lambda *_: {"seed": 7, "batch_size": 1}, ["seed: 1337 on rank 0; 7 on rank 1", "batch_size: 2 on"]),
        (lambda *_: {"model__n_layers": 3}, ["'n_layers': 2", "'n_layers': 3"]),
        (other_corpus, ["data_root: "]),
        (other_questions, ["hellaswag_every: 0 on rank 0; 10 on rank 1"]),
    ],
    ids=["rate", "seed", "model", "data", "examples"],
)
def test_ranks_with_other_flags_are_refused(data, flags, tmp_path, change, words):
    assert_refused(flags(), flags(**change(data, tmp_path)), tmp_path, words)


def assert_refused(flags: list[str], others: list[str], tmp_path: Path, words: list[str], link: str = "") -> None:
    """Rank 1 has the flags `others`. Both ranks say in which way they differ, before they train."""
    script = driver(tmp_path / "driver", HEAD + f"if RANK == 1:\n    sys.argv = [sys.argv[0], *{others!r}]\n" + link)
    with Ranks(script, flags, 2) as ranks:
        assert ranks.wait(60) == [1, 1]
        for rank in (0, 1):
            assert all(word in ranks.text("err", rank) for word in words), ranks.text("err", rank)
            assert "would train apart" in ranks.text("err", rank)
    assert not rows_of(tmp_path / "run") if (tmp_path / "run/metrics.jsonl").exists() else True


# Rank 1 sees other files at the same paths, as on a node without the shared storage.
ELSEWHERE = """
import builtins, io, pathlib
here, there = {here!r}, {there!r}
if RANK == 1:
    real = io.open
    def elsewhere(path, *args, **kwargs):
        path = os.fspath(path) if not isinstance(path, int) else path
        return real(there + path[len(here):] if str(path).startswith(here) else path, *args, **kwargs)
    builtins.open = io.open = elsewhere
"""


def test_ranks_that_see_other_data_at_the_same_path_are_refused(data, flags, tmp_path):
    there = other_corpus(data, tmp_path)["data_root"]
    link = ELSEWHERE.format(here=str(data[0]), there=str(there))
    assert_refused(flags(), flags(), tmp_path, ["training data: "], link)


def test_ranks_that_see_other_questions_at_the_same_path_are_refused(data, flags, tmp_path):
    there = other_questions(data, tmp_path)["hellaswag_path"]
    link = ELSEWHERE.format(here=str(data[1]), there=str(there))
    every = flags(hellaswag_every=10)
    assert_refused(every, every, tmp_path, ["examples: "], link)


def test_ranks_that_see_another_checkpoint_are_refused(data, flags, tmp_path):
    """The folder of rank 1 holds another run. Rank zero chooses the checkpoint, and rank 1 reads its own."""
    for name, seed in (("run", 1), ("other", 2)):
        process = start_run(tiny_flags(*data, tmp_path / name, val_every=0, save_every=10, max_steps=10, seed=seed))
        assert process.wait(60) == 0
    link = """
import json, resuming
real = resuming.TrainState.resume
def elsewhere(self, path, cfg):
    return real(self, path if RANK == 0 else path.parents[2] / "other/checkpoints" / path.name, cfg)
resuming.TrainState.resume = elsewhere
"""
    script = driver(tmp_path / "driver", HEAD + link)
    with Ranks(script, flags(resume=True, seed=1, allow_config_change=True), 2) as ranks:
        assert ranks.wait(60) == [1, 1]
        assert "seed was 2, is 1" in ranks.text("err", 1) or "run: " in ranks.text("err")


def test_an_error_that_one_rank_alone_finds_is_printed_there(data, flags, tmp_path):
    """The data is missing on its node."""
    link = """
import shards
real = shards.read_manifest
def missing(folder, *args):
    if RANK == 1:
        raise FileNotFoundError(f"{folder}/manifest.json: not found")
    return real(folder, *args)
shards.read_manifest = missing
"""
    with Ranks(driver(tmp_path / "driver", HEAD + link), flags(), 2) as ranks:
        assert ranks.wait(60) == [1, 1]
        assert "train.py [rank 1]: " in ranks.text("err", 1) and "manifest.json: not found" in ranks.text("err", 1)
        assert "rank 1 has failed" in ranks.text("err")


# ---------------------------------------------------------------- two runs, one folder


def test_a_second_run_in_the_same_folder_is_refused_and_harms_nothing(flags, tmp_path):
    wait = 'while not Path(__file__).with_name("go").exists(): time.sleep(0.05)'
    first = Ranks(driver(tmp_path / "driver", HEAD + AT_13.format(rank=0, what=wait)), flags(), 1)
    with first:
        first.marked("now", 0)
        for more in ([], ["--resume", "True"]):
            process = start_run([*flags(), *more])
            out, err = process.communicate(timeout=60)
            assert process.returncode == 1
            pid, host = first.processes[0].pid, socket.gethostname()
            assert f"another run is in there, process {pid} on {host}, since 20" in err.decode(), (out, err)
        (tmp_path / "driver/go").touch()
        assert first.wait(60) == [0]
    assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert not list(tmp_path.glob("run.*")) and not (tmp_path / "run/.lock").exists()
    assert not (tmp_path / "run/.holder.json").exists()


def test_the_sign_of_life_of_a_run_is_renewed(flags, tmp_path):
    soon = "import run_lock\nrun_lock.BEAT = 0.5\n"
    script = driver(tmp_path / "driver", HEAD + soon + AT_13.format(rank=0, what="time.sleep(4)"))
    holder = tmp_path / "run/.holder.json"
    with Ranks(script, flags(), 1) as ranks:
        ranks.marked("now", 0)
        before = holder.stat().st_mtime
        time.sleep(3)
        assert holder.stat().st_mtime > before + 1
        assert ranks.wait(60) == [0]


def test_the_lock_of_a_run_that_died_on_this_machine_is_taken_over_at_once(flags, tmp_path):
    script = driver(tmp_path / "driver", HEAD + AT_13.format(rank=0, what="time.sleep(60)"))
    with Ranks(script, flags(), 1) as ranks:
        ranks.marked("now", 0)
    assert (tmp_path / "run/.holder.json").exists()
    process = start_run([*flags(), "--resume", "True"])
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, (out, err)


@pytest.mark.parametrize(("age", "refused"), [(10, True), (280, True), (310, False)])
@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_a_run_of_another_machine_holds_the_folder_while_its_heart_beats(tmp_path, monkeypatch, age, refused, locks):
    """The file system may tell nothing of that machine's locks, or have none at all."""
    if not locks:

        def no_locks(folder):
            raise run_lock.NoLocks("no locks")

        monkeypatch.setattr(run_lock, "lock_folder", no_locks)
    content = {"host": "node7", "machine": "another", "pid": 4711, "since": "2026-01-01T00:00:00+00:00"}
    holder = tmp_path / ".holder.json"
    holder.write_text(json.dumps(content))
    os.utime(holder, (time.time() - age,) * 2)
    lock = run_lock.RunLock(tmp_path)
    if refused:
        with pytest.raises(run_lock.FolderLocked, match=r"process 4711 on node7, since 2026-01-01.* sign of life is"):
            lock.acquire()
        assert json.loads(holder.read_text()) == content
        assert {path.name for path in tmp_path.iterdir()} == {".holder.json"}
        return
    lock.acquire()
    assert json.loads(holder.read_text())["pid"] == os.getpid()
    os.utime(holder, (1, 1))
    monkeypatch.setattr(run_lock, "BEAT", 0)
    lock.beat()
    assert time.time() - holder.stat().st_mtime < 60
    lock.release()
    assert not list(tmp_path.iterdir())


def test_without_locks_a_run_of_the_same_machine_holds_the_folder_too(tmp_path, monkeypatch):
    def no_locks(folder):
        raise run_lock.NoLocks("no locks")

    monkeypatch.setattr(run_lock, "lock_folder", no_locks)
    first = run_lock.RunLock(tmp_path)
    first.acquire()
    with pytest.raises(run_lock.FolderLocked, match=f"process {os.getpid()} on "):
        run_lock.RunLock(tmp_path).acquire()
    first.release()
    run_lock.RunLock(tmp_path).acquire()


def test_a_heartbeat_syncs_nothing_and_makes_a_lost_file_again(tmp_path, monkeypatch):
    """A sync waits behind the gigabytes of a save. In that time the other ranks would hear nothing of this one."""
    lock = run_lock.RunLock(tmp_path)
    lock.acquire()
    monkeypatch.setattr(run_lock, "BEAT", 0)
    lock.holder.unlink()
    lock.beat()
    assert json.loads(lock.holder.read_text())["pid"] == os.getpid()
    os.utime(lock.holder, (1, 1))
    monkeypatch.setattr(os, "fsync", lambda fd: pytest.fail("synced"))
    lock.beat()
    assert time.time() - lock.holder.stat().st_mtime < 60
    lock.release()


def test_an_error_at_the_very_end_ends_the_process_although_a_thread_goes_on(flags, tmp_path):
    patch = """
import threading, processes
def lost(*args):
    threading.Thread(target=time.sleep, args=(100,)).start()
    raise RuntimeError("a rank was lost at the end")
processes.end_process = lost
"""
    with Ranks(driver(tmp_path / "driver", HEAD + patch), flags(max_steps=1), 1) as ranks:
        assert ranks.wait(30) == [1]
        assert "a rank was lost at the end" in ranks.text("err")
