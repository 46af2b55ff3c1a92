"""Runs that are killed again and again, at any moment, end with the bits of the run that nobody killed."""

import random
import signal
import time
from pathlib import Path

import pytest
from ranks import Ranks, assert_close, assert_same_bits, checkpoint_of, driver, rows_of, wait_until
from tiny_run import STEPS, VOCAB, tiny_corpus, tiny_flags, write_questions

from preparation import prepare

# Updates of 20 ms, and saves of about a third of a second, so that random moments fall into both.
SLOW = """
import time, checkpoints, model_folders
from torch.optim.optimizer import register_optimizer_step_post_hook
note("pid", os.getpid())
register_optimizer_step_post_hook(lambda *args: (time.sleep(0.02), note("step", 1))[0])

def slowed(module, name, first=False):
    real = getattr(module, name)
    def slow(*args, **kwargs):
        if first:
            note("saving", 1)
        time.sleep(0.08)
        return real(*args, **kwargs)
    setattr(module, name, slow)

slowed(checkpoints, "save_checkpoint", first=True)
slowed(checkpoints, "save_file")
slowed(model_folders, "save_file")
slowed(checkpoints, "write_json")
"""

# The process stops itself after the updates that are named.
STOPS = """
import signal
from torch.optim.optimizer import register_optimizer_step_post_hook
note("pid", os.getpid())
updates = 0
def stop(*args):
    global updates
    updates += 1
    if updates == {after}:
        os.kill(os.getpid(), signal.SIGUSR1)
register_optimizer_step_post_hook(stop)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, Path]:
    """A corpus of three training shards, and questions."""
    folder = tmp_path_factory.mktemp("data")
    tiny_corpus(folder)
    files = [str(folder / f"{i}.txt") for i in range(5)]
    prepare(files[1:], folder / "shards", vocab_size=VOCAB, val_source=files[:1], shard_size=3000, show_progress=False)
    assert len(list((folder / "shards").glob("*train*"))) == 3
    return folder / "shards", write_questions(folder)


def assert_same_run(run: Path, whole: Path, last_step: int) -> None:
    """Everything that a run leaves is the same: losses, evaluations, texts, parameters, moments, random state."""
    assert_same_bits(run, whole, first_step=1, last_step=last_step)
    assert [row["step"] for row in rows_of(run)] == list(range(1, last_step + 1))
    for field in ("val_loss", "val_bpb", "hellaswag_acc", "samples_end"):
        figures, others = ([(row["step"], row[field]) for row in rows_of(out, field)] for out in (run, whole))
        assert figures == others, field
    assert (run / "samples.txt").read_text() == (whole / "samples.txt").read_text()
    assert (run / "checkpoints/best").read_text() == (whole / "checkpoints/best").read_text()
    state, other = (checkpoint_of(out, last_step) for out in (run, whole))
    for name in ("random_state", "data", "best_val_loss", "step"):
        assert state[name] == other[name], name
    assert not list(run.rglob("*.tmp"))


def kill_until_done(data: tuple[Path, Path], folder: Path, kills: int, steps: int, seed: int) -> int:
    """Kill torchrun and its two ranks `kills` times, every second time inside a save; then let the run end.

    Returns the kills: fewer if the run was faster.
    """
    draw, done = random.Random(seed), 0
    fields = {"max_steps": steps, "save_every": 5, "val_every": 20, "hellaswag_every": 40, "generate_every": 40}
    flags = tiny_flags(*data, folder / "run", **fields, resume=True)
    whole = tiny_flags(*data, folder / "whole", **fields)
    with Ranks(driver(folder / "plain", ""), whole, 2) as ranks:
        assert ranks.wait(200) == [0, 0], ranks.text("err")
    script = driver(folder / "driver", SLOW)
    while True:
        with Ranks(script, flags, 2, torchrun=True) as ranks:
            if done == kills:
                assert ranks.wait(200) == [0], ranks.text("err")
                break
            saves, updates = draw.randint(2, 4), draw.randint(12, 60)
            inside = done % 2 == 0
            name, count = ("saving", saves) if inside else ("step", updates)
            wait_until(lambda ranks=ranks, name=name, count=count: count_of(ranks, name) >= count or ranks.ended(), 90)
            if ranks.ended():
                assert ranks.wait(1) == [0], ranks.text("err")
                break
            time.sleep(draw.uniform(0, 0.35 if inside else 0.05))
            ranks.kill()
            done += 1
            assert "Traceback" not in ranks.text("err"), ranks.text("err")
    assert_same_run(folder / "run", folder / "whole", steps)
    return done


def count_of(ranks: Ranks, name: str) -> int:
    return ranks.text(name, 0).count("\n")


@pytest.mark.faults
def test_a_run_killed_four_times_ends_with_the_bits_of_the_whole_one(data, tmp_path):
    assert kill_until_done(data, tmp_path, kills=4, steps=160, seed=0) == 4


@pytest.mark.slow
def test_50_kills_of_the_whole_group(data, tmp_path):
    done, seed = 0, 1
    while done < 50:
        done += kill_until_done(data, tmp_path / str(seed), kills=min(10, 50 - done), steps=400, seed=seed)
        seed += 1
        print(f"{done} kills, {done} resumes")


def chain(data: tuple[Path, Path], folder: Path, worlds: list[int], stops: list[int]) -> Path:
    """A run that stops itself after the steps `stops`, and goes on each time with the next number of processes."""
    last = 0
    for ranks_now, stop in zip(worlds, [*stops, 0], strict=True):
        every = {"val_every": 10, "save_every": 20, "hellaswag_every": 20, "generate_every": 20}
        flags = tiny_flags(*data, folder / "run", **every, resume=True, batch_size=4 // ranks_now)
        patches = STOPS.format(after=stop - last) if stop else ""
        with Ranks(driver(folder / f"driver{last}", patches), flags, ranks_now) as ranks:
            status = 128 + signal.SIGUSR1 if stop else 0
            assert ranks.wait(90) == [status] * ranks_now, ranks.text("err")
            assert ("stopped after step" in ranks.text("out")) == bool(stop)
        last = stop
    return folder / "run"


@pytest.mark.faults
@pytest.mark.parametrize("ranks", [1, 2])
def test_five_resumes_in_a_chain_change_no_bit(data, tmp_path, ranks):
    """40 steps of 256 tokens read the three shards more than once: stops before, at and after the borders."""
    whole = chain(data, tmp_path / "whole", [ranks], [])
    run = chain(data, tmp_path / "chain", [ranks] * 6, [1, 12, 13, 31, 39])
    assert_same_run(run, whole, STEPS)


@pytest.mark.faults
def test_another_number_of_processes_reads_the_same_windows(data, tmp_path):
    """From one process to two and back, at the same total batch."""
    whole = chain(data, tmp_path / "whole", [1], [])
    run = chain(data, tmp_path / "chain", [1, 2, 1], [13, 27])
    losses, others = ([row["train_loss"] for row in rows_of(out)] for out in (run, whole))
    assert len(losses) == STEPS and losses == pytest.approx(others, abs=1e-5)
    assert_close(checkpoint_of(run, STEPS), checkpoint_of(whole, STEPS))
    assert checkpoint_of(run, STEPS)["data"] == checkpoint_of(whole, STEPS)["data"]
