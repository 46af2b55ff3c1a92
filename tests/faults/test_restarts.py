"""torchrun restarts all ranks when one has died. The run ends with the bits of a run that nothing has stopped."""

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from ranks import Ranks, assert_same_bits, checkpoint_of, driver, is_running, rows_of, wait_until
from tiny_run import STEPS, tiny_corpus, tiny_flags, write_questions

RESTARTS = 3
# Steps and syncs take longer, so that a random moment falls into a step, a save or a validation, not only into imports.
SLOWED = """
import time
from torch.optim.optimizer import register_optimizer_step_post_hook

note("pids", os.getpid())
register_optimizer_step_post_hook(lambda *_: time.sleep(0.08))
fsync = os.fsync
os.fsync = lambda fd: (time.sleep(0.01), fsync(fd))
"""


@pytest.fixture(scope="module")
def flags_for(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    flags = partial(tiny_flags, tiny_corpus(folder), write_questions(folder))
    return partial(flags, save_every=2, val_every=4, resume=True)


def run_with_kills(folder: Path, flags: list[str], draw: random.Random, kills: int, seconds: float) -> list[str]:
    """Run two ranks under torchrun. Kill one of them, at most `kills` times, up to `seconds` after its start.

    Returns where each kill fell.
    """
    script, fell = driver(folder / "drivers", SLOWED), []
    with Ranks(script, flags, 2, torchrun=True, extra=["--max-restarts", str(RESTARTS)]) as ranks:
        for attempt in range(kills):
            rank, moment = draw.randrange(2), draw.uniform(0, seconds)
            wait_until(lambda n=attempt: all(len(ranks.text("pids", r).split()) > n for r in (0, 1)) or ranks.ended())
            time.sleep(moment)
            pid = int(ranks.text("pids", rank).split()[attempt])
            if not is_running(pid):
                break  # the run has ended before
            os.kill(pid, signal.SIGKILL)
            saving = any((folder / "run/checkpoints").glob(".step_*.tmp"))
            rows = folder / "run/metrics.jsonl"
            steps = rows.read_text().count("train_loss") if rows.is_file() else 0
            fell.append(f"rank {rank} after {moment:.1f} s, {steps} steps{', in a save' if saving else ''}")
        assert ranks.wait(180) == [0], ranks.text("err")
        left = [int(pid) for r in (0, 1) for pid in ranks.text("pids", r).split() if is_running(int(pid))]
        assert not left, ranks.text("err")
        assert len(ranks.text("pids").split()) == len(fell) + 1
    return fell


def assert_same_end(run: Path, other: Path) -> None:
    """All losses, and the last checkpoint: weights, moments, position in the data, random state, the best loss."""
    assert_same_bits(run, other, first_step=1)
    assert [row["step"] for row in rows_of(run)] == list(range(1, STEPS + 1))
    state, other_state = (checkpoint_of(out_dir, STEPS) for out_dir in (run, other))
    for name in ("random_state", "data", "best_val_loss"):
        assert state[name] == other_state[name], name
    assert (run / "checkpoints/best").read_text() == (other / "checkpoints/best").read_text()
    assert not list(run.rglob("*.tmp"))  # no part of a save that was cut off


@pytest.fixture(scope="module")
def uninterrupted(flags_for, tmp_path_factory) -> tuple[Path, float]:
    """The run directory, and the seconds that it took."""
    folder, began = tmp_path_factory.mktemp("uninterrupted"), time.monotonic()
    run_with_kills(folder, flags_for(folder / "run"), random.Random(), 0, 0)
    return folder / "run", time.monotonic() - began


@pytest.mark.faults
def test_a_run_goes_on_after_two_kills_of_a_rank(flags_for, uninterrupted, tmp_path):
    """Both in the first half of the time of a whole run, so that no kill comes too late."""
    other, seconds = uninterrupted
    fell = run_with_kills(tmp_path, flags_for(tmp_path / "run"), random.Random(1), 2, seconds / 2)
    assert len(fell) == 2
    assert_same_end(tmp_path / "run", other)


@pytest.mark.slow
def test_a_run_goes_on_after_twenty_kills_of_a_rank(flags_for, uninterrupted, tmp_path):
    """Each run has up to three kills, at moments of its whole time."""
    other, seconds = uninterrupted
    draw, fell = random.Random(0), []
    for number in range(20):
        folder = tmp_path / str(number)
        fell += run_with_kills(folder, flags_for(folder / "run"), draw, min(RESTARTS, 20 - len(fell)), 0.8 * seconds)
        assert_same_end(folder / "run", other)
        if len(fell) == 20:
            break
    print("\n" + "\n".join(fell))
    print(f"{len(fell)} kills in {number + 1} runs, {sum('save' in place for place in fell)} of them in a save")
    assert len(fell) == 20
