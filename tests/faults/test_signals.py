"""A stop signal at any moment of a run of two ranks: both save, both end with its status, and the resumed run is whole.

The short form has each moment once, with each signal, to one rank or to both. The long form has all combinations.
"""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoint_files import copy_checkpoint
from ranks import (
    Ranks,
    assert_same_bits,
    checkpoint_of,
    descendants,
    driver,
    is_running,
    rows_of,
    wait_until,
)
from tiny_run import STEPS, plain_environment, start_run, tiny_corpus, tiny_flags, write_questions

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")

# Each makes one moment of the run last, so that the signal falls into it, and notes that it has begun.
MOMENTS = {
    "start": """
import run_data
real = run_data.open_streams
def slow(*args, **kwargs):
    note("now", "start"); time.sleep(1.5)
    return real(*args, **kwargs)
run_data.open_streams = slow
""",
    "step": """
from torch.optim.optimizer import register_optimizer_step_pre_hook
updates = 0
def slow(*args):
    global updates
    updates += 1
    if updates == 13:
        note("now", "step"); time.sleep(1.5)
register_optimizer_step_pre_hook(slow)
""",
    # 40 micro-steps of a second each: the signal must not wait for the end of the step.
    "accumulating": """
class Slow(torch.nn.parallel.DistributedDataParallel):
    passes = 0
    def forward(self, *args, **kwargs):
        self.passes += 1
        if self.passes > 12 * 16 + 2:
            note("now", "accumulating"); time.sleep(2)
        return super().forward(*args, **kwargs)
torch.nn.parallel.DistributedDataParallel = Slow
""",
    "validation": """
import dataloaders
real, calls = dataloaders.validation_batches, 0
def slow(*args, **kwargs):
    global calls
    calls += 1
    for batch in real(*args, **kwargs):
        if calls > 2:  # the first checks the data, the second is at step 0
            note("now", "validation"); time.sleep(5)
        yield batch
dataloaders.validation_batches = slow
""",
    "hellaswag": """
import functools, hellaswag_utils
real = hellaswag_utils.ending_log_probs
def slow(*args):
    note("now", "hellaswag"); time.sleep(8)
    return real(*args)
hellaswag_utils.ending_log_probs = slow
hellaswag_utils.count_correct = functools.partial(hellaswag_utils.count_correct, batch_tokens=1)
""",
    # The other rank waits for rank 0, which draws them.
    "generation": """
import sampling
real = sampling.sample_next
def slow(*args):
    note("now", "generation"); time.sleep(4)
    return real(*args)
sampling.sample_next = slow
""",
    "saving": """
import checkpoints
real = checkpoints.save_checkpoint
def slow(*args, **kwargs):
    note("now", "saving"); time.sleep(2)
    return real(*args, **kwargs)
checkpoints.save_checkpoint = slow
""",
}
HEAD = 'import time, torch\nnote("pid", os.getpid())\n'
ONE_SIDED = ("generation", "saving")  # rank 0 alone does it
MICRO_STEPS = {"accumulating": {"batch_size": 1, "total_batch_size": 1024, "max_steps": 20}}


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A function that returns the flags of the run into a folder, for a moment."""
    folder = tmp_path_factory.mktemp("data")
    corpus, questions = tiny_corpus(folder), write_questions(folder)

    def flags_of(out_dir: Path, moment: str = "", **changes) -> list[str]:
        every = {"val_every": 10, "save_every": 10, "hellaswag_every": 20, "generate_every": 20, "keep_checkpoints": 9}
        return tiny_flags(corpus, questions, out_dir, **every | MICRO_STEPS.get(moment, {}) | changes)

    return flags_of


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """A function that returns the directory of the uninterrupted run for a moment. It runs once."""
    folder, done = tmp_path_factory.mktemp("whole"), {}

    def run(moment: str) -> Path:
        kind = "accumulating" if moment in MICRO_STEPS else "plain"
        if kind not in done:
            done[kind] = folder / kind / "run"
            with Ranks(driver(folder / kind, HEAD), flags(done[kind], moment), 2) as ranks:
                assert ranks.wait(90) == [0, 0], ranks.text("err")
        return done[kind]

    return run


def cases(long: bool) -> list:
    """Moments, signals, and the ranks that get them."""
    if long:
        return list(itertools.product(MOMENTS, SIGNALS, ("both", "rank 0", "rank 1")))
    targets = itertools.cycle(["rank 1", "both", "rank 0"])
    return [(moment, SIGNALS[i % 4], next(targets)) for i, moment in enumerate(MOMENTS)]


def interrupt(moment: str, name: str, target: str, flags, whole: Path, tmp_path: Path) -> None:
    out_dir, number = tmp_path / "run", getattr(signal, name)
    steps = 20 if moment in MICRO_STEPS else STEPS
    with Ranks(driver(tmp_path / "driver", HEAD + MOMENTS[moment]), flags(out_dir, moment), 2) as ranks:
        pids = ranks.pids()
        ranks.marked("now", 0)
        if moment not in ONE_SIDED:
            ranks.marked("now", 1)
        began = time.monotonic()
        for rank, pid in enumerate(pids):
            if target in ("both", f"rank {rank}"):
                os.kill(pid, number)
        statuses = ranks.wait(20)
        seconds = time.monotonic() - began
        assert statuses == [128 + number] * 2, (ranks.text("out"), ranks.text("err"), ranks.text("err", 1))
        assert seconds < 20
        out = ranks.text("out")
        assert f" by {name}\n" in out and out.count("stopped ") == 1
        assert ("nothing was saved" if moment == "start" else "--resume True\n") in out and "saved" not in ranks.text(
            "out", 1
        )
        # No step is lost: what the records have is saved.
        rows = rows_of(out_dir)
        if moment == "start":
            assert not rows and not list((out_dir / "checkpoints").glob("step_*"))
        else:
            assert checkpoint_of(out_dir, rows[-1]["step"])["step"] == rows[-1]["step"] >= 10
    with Ranks(driver(tmp_path / "driver2", HEAD), [*flags(out_dir, moment), "--resume", "True"], 2) as ranks:
        assert ranks.wait(90) == [0, 0], ranks.text("err")
    assert_same_bits(out_dir, whole, first_step=1, last_step=steps)
    assert [row["step"] for row in rows_of(out_dir)] == list(range(1, steps + 1))
    for field in ("val_loss", "hellaswag_acc", "samples_end"):  # made up where the signal has cut them off
        figures, others = ([(row["step"], row[field]) for row in rows_of(run, field)] for run in (out_dir, whole))
        assert figures == others, field
    assert (out_dir / "samples.txt").read_text() == (whole / "samples.txt").read_text()
    assert (out_dir / "checkpoints/best").read_text() == (whole / "checkpoints/best").read_text()


@pytest.mark.faults
@pytest.mark.parametrize(("moment", "name", "target"), cases(long=False))
def test_a_signal_stops_all_ranks_and_loses_nothing(moment, name, target, flags, whole, tmp_path):
    interrupt(moment, name, target, flags, whole(moment), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "name", "target"), cases(long=True))
def test_every_signal_at_every_moment_to_every_rank(moment, name, target, flags, whole, tmp_path):
    interrupt(moment, name, target, flags, whole(moment), tmp_path)


@pytest.mark.faults
def test_a_signal_in_a_step_of_90_seconds_saves_the_last_whole_step_within_10(flags, tmp_path):
    """torchrun kills 30 s after its signal. The step has 45 micro-steps of two seconds."""
    slow = MOMENTS["accumulating"].replace("12 * 16 + 2", "2 * 45")
    fields = {"batch_size": 1, "total_batch_size": 45 * 64, "max_steps": 20, "val_every": 0}
    with Ranks(driver(tmp_path / "driver", HEAD + slow), flags(tmp_path / "run", **fields), 2, torchrun=True) as ranks:
        ranks.marked("now", 1)
        pids = ranks.pids()
        time.sleep(3)
        began = time.monotonic()
        ranks.processes[0].send_signal(signal.SIGTERM)
        wait_until(lambda: not any(map(is_running, pids)), 30)
        assert time.monotonic() - began < 10
        assert "step      2  saved in" in ranks.text("out") and "stopped after step 2" in ranks.text("out")
    assert checkpoint_of(tmp_path / "run", 2)["step"] == 2


@pytest.mark.faults
def test_nohup_keeps_a_run_alive_when_its_terminal_goes(flags, tmp_path):
    """Under plain python an ignored SIGHUP stays ignored. Without nohup it saves and stops the run."""
    for nohup, status in (("nohup", 0), ("env", 128 + signal.SIGHUP)):
        out_dir = tmp_path / nohup
        script = driver(tmp_path / f"driver-{nohup}", HEAD + MOMENTS["step"])
        process = subprocess.Popen(
            [nohup, sys.executable, str(script), *flags(out_dir)],
            env=plain_environment(RANK="0"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )
        wait_until(lambda script=script: script.with_name("now.0").exists(), 60)
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == status
        assert checkpoint_of(out_dir, STEPS if nohup == "nohup" else 13)


@pytest.mark.faults
def test_a_resume_beyond_the_end_changes_nothing_and_says_so(flags, whole, tmp_path):
    out_dir = copy_checkpoint(whole("step"), STEPS, tmp_path / "run")
    for name in ("metrics.jsonl", "samples.txt", "report.html", "config.json"):
        (out_dir / name).write_bytes((whole("step") / name).read_bytes())
    before = {path: path.read_bytes() for path in out_dir.rglob("*") if path.is_file()}
    out, err = start_run([*flags(out_dir), "--resume", "True"]).communicate(timeout=60)
    assert b"nothing is left to do" in out, (out, err)
    assert {path: path.read_bytes() for path in out_dir.rglob("*") if path.is_file()} == before


@pytest.mark.faults
@pytest.mark.parametrize("moment", ["hellaswag", "generation"])
def test_a_signal_in_an_evaluation_at_a_step_that_saves_nothing_saves_it(moment, flags, tmp_path):
    """Step 20 has HellaSwag and samples, but no save is due."""
    fields = flags(tmp_path / "run", save_every=0, max_steps=30)
    with Ranks(driver(tmp_path / "driver", HEAD + MOMENTS[moment]), fields, 2) as ranks:
        pids = ranks.pids()
        ranks.marked("now", 0)
        os.kill(pids[1], signal.SIGTERM)
        assert ranks.wait(20) == [128 + signal.SIGTERM] * 2, ranks.text("err")
    assert checkpoint_of(tmp_path / "run", 20)["step"] == 20
    assert (tmp_path / "run/checkpoints/best").read_text() == "step_00000020\n"


# The losses of validations are given. Those of steps 30 and 40 are worse than that of step 20.
GIVEN_LOSSES = """
import inspect, signal
import evaluation
real = evaluation.validate
def given(*args):
    step = inspect.currentframe().f_back.f_locals["step"]
    if step == {step}:
        os.kill(os.getpid(), {number}); time.sleep(0.1)
    row, stop = real(*args)
    return ({{"val_loss": {{0: 9.0, 10: 5.0, 20: 1.0, 30: 3.0, 40: 2.0}}[step], "val_bpb": 1.0}} if row else row), stop
evaluation.validate = given
"""


@pytest.mark.faults
def test_the_best_checkpoint_stays_the_best_after_its_validation_was_made_up(flags, tmp_path):
    """A signal cuts off the validation of step 20. The resumed run makes it up, and is killed before it saves again."""
    fields = flags(tmp_path / "run", resume=True, save_every=20, keep_checkpoints=1, hellaswag_every=0)
    for step, number, status in ((20, 15, 143), (30, 9, -9), (-1, 0, 0)):
        script = driver(tmp_path / f"driver{number}", HEAD + GIVEN_LOSSES.format(step=step, number=number))
        with Ranks(script, fields, 1) as ranks:
            assert ranks.wait(60) == [status], ranks.text("err")
    assert (tmp_path / "run/checkpoints/best").read_text() == "step_00000020\n"
    assert checkpoint_of(tmp_path / "run", 40)["best_val_loss"] == 1.0
    assert checkpoint_of(tmp_path / "run", 20)["step"] == 20


@pytest.mark.faults
def test_ctrl_c_that_also_ends_the_compiler_is_no_error(flags, tmp_path):
    """A terminal sends it to all processes of its group: to the C++ compiler, whose end the run sees as a failure."""
    env = plain_environment(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    process = start_run(flags(tmp_path / "run", compile=True), env=env, start_new_session=True)
    try:
        wait_until(lambda: any(is_compiler(pid) for pid in descendants(process.pid)))
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGINT and b"Traceback" not in err, (out, err)


def is_compiler(pid: int) -> bool:
    """Whether a process compiles a kernel of the model. The first files only ask the compiler what it can do."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has just ended
        return False
    return b".main.cpp" in words
