"""train.py, from its command line to its files.

Runs have one process or two. They are stopped and resumed, refused for bad flags, or broken on purpose. Most runs call
`train.main()` in this process and take about a second. Runs that need a signal, a second rank or an empty working
directory are subprocesses. Module-scoped fixtures share runs between tests.
"""

import errno
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from threads import num_cores

import numpy as np
import pytest
import tiny_run
import torch
from checkpoint_files import copy_checkpoint, read_checkpoint, rewrite_state, size_of
from ranks import (
    Result,
    assert_close,
    assert_same_bits,
    checkpoint_of,
    driver,
    free_port,
    launch,
    noted,
    rows_of,
    start_rank,
)
from tiny_run import STEPS, TOKENS_PER_STEP, TRAIN, VOCAB
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import evaluation
import records
import train
from dataloaders import BatchLayout, validation_batches
from generate import complete
from hardware import device_name
from model_utils import load_model
from preparation import prepare
from processes import end_process, start_process
from run_config import read_config
from shards import TokenStream
from tokenizer import Tokenizer

FLOPS_PER_TOKEN = 270_336  # for the model of `tiny_flags`; test_model_utils.py counts it by hand

# ---------------------------------------------------------------- helpers


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """One thread is fastest at this size. The subprocesses must have as many threads, or their bits would differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def plain_environment():
    """Unset the variables of Weights & Biases and torchrun, which the developer's shell may hold."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_API_KEY", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            patch.delenv(name, raising=False)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def tiny_corpus(tmp_path_factory) -> Path:
    return tiny_run.tiny_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def flags_for(tiny_corpus, tmp_path_factory):
    """A function that returns flags, with the given changes, for a run into `out_dir` that takes a second."""
    questions = tiny_run.write_questions(tmp_path_factory.mktemp("questions"))
    return partial(tiny_run.tiny_flags, tiny_corpus, questions)


def train_in_these_streams(flags: list[str]) -> int:
    """Run train.main() in this process. It reads sys.argv and handles two signals. Restore both afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    argv, sys.argv = sys.argv, [str(TRAIN), *flags]
    try:
        return train.main()
    except SystemExit as end:  # the parser of the command line raises it
        return end.code
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train_here(flags: list[str]) -> Result:
    """Run train.main() in this process, and catch its output."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = train_in_these_streams(flags)
    return Result(status, out.getvalue(), err.getvalue())


# Every rank notes the hash of all parameters after each update, and the sync flag at each forward pass.
RECORD = """
import hashlib, torch
from torch.optim.optimizer import register_optimizer_step_post_hook

def after_update(optimizer, args, kwargs):
    digest = hashlib.sha256()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            digest.update(parameter.detach().numpy().tobytes())
    note("hashes", digest.hexdigest())

register_optimizer_step_post_hook(after_update)

class Recording(torch.nn.parallel.DistributedDataParallel):
    def forward(self, *args, **kwargs):
        note("sync", self.require_backward_grad_sync)
        return super().forward(*args, **kwargs)

torch.nn.parallel.DistributedDataParallel = Recording
"""

# Each reading moves the clock on by a millisecond, so train.py always measures the same peak speed.
TICKING_CLOCK = """
import itertools, time
ticks = itertools.count()
time.perf_counter = lambda: next(ticks) / 1000
"""

# The defect of the original code: the flag takes effect one forward pass late, as if it were set after the pass.
LATE_SYNC = """
class Late(Recording):
    flag_before = True
    def forward(self, *args, **kwargs):
        flag, self.require_backward_grad_sync = self.require_backward_grad_sync, self.flag_before
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.flag_before = self.require_backward_grad_sync = flag

torch.nn.parallel.DistributedDataParallel = Late
"""

# The process sends itself the signal, so it comes at update 13 on any machine.
SIGTERM_AT_13 = """
import signal
from torch.optim.optimizer import register_optimizer_step_post_hook
updates = 0

def terminate(optimizer, args, kwargs):
    global updates
    updates += 1
    if updates == 13:
        os.kill(os.getpid(), signal.SIGTERM)

register_optimizer_step_post_hook(terminate)
"""

# Only rank 1 gets the signal. It comes during the validation at step 10, after the ranks have agreed on that step.
SIGTERM_IN_VALIDATION = """
import dataloaders, signal
validation_batches, calls = dataloaders.validation_batches, 0

def interrupted(*args, **kwargs):
    global calls
    calls += 1
    if calls == 3 and RANK == 1:  # the first checks the data, the second is at step 0
        os.kill(os.getpid(), signal.SIGTERM)
    return validation_batches(*args, **kwargs)

dataloaders.validation_batches = interrupted
"""

# Rank 1's loss is not a number from its 7th forward pass. A step has two micro-steps, so that pass begins step 4.
POISON_RANK_1 = """
import torch

class Poisoned(torch.nn.parallel.DistributedDataParallel):
    passes = 0
    def forward(self, *args, **kwargs):
        self.passes += 1
        return super().forward(*args, **kwargs) * (float("nan") if RANK == 1 and self.passes >= 7 else 1)

torch.nn.parallel.DistributedDataParallel = Poisoned
"""


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- runs that several tests share


@pytest.fixture(scope="module")
def whole_flags(flags_for):
    """Flags of the uninterrupted runs, and of the runs that must equal them."""
    return lambda out_dir, **changes: flags_for(
        out_dir, **{"save_every": 5, "keep_checkpoints": 100, "hellaswag_every": 20, "generate_every": 20} | changes
    )


@contextmanager
def settings_of_updates():
    """A list that gets, for each group of parameters of each update, the optimizer's name and the group's settings."""
    settings = []

    def note(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            settings.append((type(optimizer).__name__, {k: v for k, v in group.items() if k != "params"}))

    hook = register_optimizer_step_pre_hook(note)
    try:
        yield settings
    finally:
        hook.remove()


@pytest.fixture(scope="module")
def whole(whole_flags, tmp_path_factory) -> Path:
    """40 steps on one process, uninterrupted."""
    out_dir = tmp_path_factory.mktemp("whole") / "run"
    with settings_of_updates() as settings:
        result = train_here(whole_flags(out_dir))
    assert result.status == 0, result.err
    (out_dir.parent / "stdout").write_text(result.out)
    (out_dir.parent / "settings.json").write_text(json.dumps(settings))
    return out_dir


@pytest.fixture(scope="module")
def whole_of_two(whole_flags, tmp_path_factory) -> Path:
    """40 steps under torchrun on two processes, uninterrupted. The folder also holds the notes of the ranks."""
    folder = tmp_path_factory.mktemp("two") / "drivers"
    script = driver(folder, RECORD + TICKING_CLOCK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    result = subprocess.run([*torchrun, *whole_flags(folder / "run")], capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def tuned(flags_for, tmp_path_factory) -> Path:
    """4 steps with Muon, and with flags that differ from their defaults. Validation reads 5 windows, 2 at a time."""
    out_dir = tmp_path_factory.mktemp("tuned") / "run"
    changes = {"optimizer": "muon", "muon_lr": 0.03, "max_lr": 0.02, "betas": ["0.7", "0.8"], "weight_decay": 0.3}
    changes["embedding_lr"] = 0.3
    changes |= {"schedule": "wsd", "decay_fraction": 0.75, "min_lr_fraction": 0.1, "warmup_steps": 0, "max_steps": 4}
    changes |= {"save_every": 2, "val_every": 0, "val_tokens": 160, "generate_every": 4, "temperature": 0}
    with settings_of_updates() as settings:
        result = train_here(flags_for(out_dir, **changes))
    assert result.status == 0, result.err
    (out_dir.parent / "settings.json").write_text(json.dumps(settings))
    return out_dir


@pytest.fixture(scope="module")
def clocked(flags_for, tmp_path_factory) -> Path:
    """3 steps on one process. Each reading moves its clock on by a millisecond, and each update by 2 seconds."""
    out_dir = tmp_path_factory.mktemp("clocked") / "run"
    ticks, updates = itertools.count(), []
    hook = register_optimizer_step_post_hook(lambda *args: updates.append(1))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "perf_counter", lambda: next(ticks) / 1000 + 2 * len(updates))
            result = train_here(flags_for(out_dir, max_steps=3, log_every=1))
    finally:
        hook.remove()
    assert result.status == 0, result.err
    (out_dir.parent / "stdout").write_text(result.out)
    return out_dir


# ---------------------------------------------------------------- two processes equal one


def test_two_processes_train_what_one_trains(whole, whole_of_two):
    for step in (5, STEPS):
        assert_close(checkpoint_of(whole_of_two, step), checkpoint_of(whole, step))
    for row, other in zip(rows_of(whole_of_two), rows_of(whole), strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], abs=1e-5)
        # If a gradient is a sum instead of a mean, AdamW hardly changes. The norm shows the difference.
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    for field in ("val_loss", "val_bpb", "hellaswag_acc", "hellaswag_acc_norm", "hellaswag_examples"):
        figures, others = ({r["step"]: r[field] for r in rows_of(run, field)} for run in (whole_of_two, whole))
        assert figures == pytest.approx(others, abs=1e-5), field


def test_ranks_hold_the_same_bits_after_every_update(whole_of_two):
    script = whole_of_two.with_name("driver.py")
    hashes = [noted(script, "hashes", rank) for rank in (0, 1)]
    assert len(set(hashes[0])) == STEPS
    assert hashes[0] == hashes[1]


def test_two_processes_train_what_one_trains_with_muon_in_bf16_too(flags_for, tmp_path):
    """The processes share Muon's work.

    In bf16 the forward pass uses casts of the weights instead of the parameters that DDP knows."""
    changes = {"dtype": "bfloat16", "max_steps": 3, "val_every": 0, "max_lr": 1e-2, "optimizer": "muon"}
    script = driver(tmp_path / "drivers", RECORD)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    command = [*torchrun, *flags_for(tmp_path / "two", **changes)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
    hashes = [noted(script, "hashes", rank) for rank in (0, 1)]
    assert len(set(hashes[0])) == 2 * 3 and hashes[0] == hashes[1]  # AdamW's step, then Muon's
    assert train_here(flags_for(tmp_path / "one", **changes)).status == 0
    for row, other in zip(rows_of(tmp_path / "two"), rows_of(tmp_path / "one"), strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], abs=0.02)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.05)


def test_gradients_are_sent_only_in_the_last_micro_step_of_each_update(whole_of_two):
    script = whole_of_two.with_name("driver.py")
    for rank in (0, 1):
        assert noted(script, "sync", rank) == ["False", "True"] * STEPS


def test_ranks_drift_apart_if_the_sync_flag_is_set_after_the_forward_pass(flags_for, tmp_path):
    """This shows that the check of the hashes can fail. The patch puts the original code's defect back."""
    script = driver(tmp_path / "late", RECORD + LATE_SYNC)
    results = launch(script, flags_for(tmp_path / "run", max_steps=3, val_every=0), ranks=2)
    assert [result.status for result in results] == [0, 0], results
    assert noted(script, "sync", 0) == ["True", "False"] * 3
    hashes = [noted(script, "hashes", rank) for rank in (0, 1)]
    assert hashes[0][-1] != hashes[1][-1]


# ---------------------------------------------------------------- stopped and resumed


@pytest.fixture(scope="module")
def resumed(whole, whole_flags, tmp_path_factory) -> Path:
    """Steps 21 to 40, resumed from step 20. At first metrics.jsonl has rows beyond step 20. A kill cut the last."""
    out_dir = copy_checkpoint(whole, 20, tmp_path_factory.mktemp("resumed") / "run")
    rows = (whole / "metrics.jsonl").read_text()
    (out_dir / "metrics.jsonl").write_text(rows[: rows.index('{"step": 33') + 25])
    shutil.copy(whole / "run.json", out_dir)
    result = train_here(whole_flags(out_dir, resume=True))
    assert result.status == 0, result.err
    assert not (out_dir / "checkpoints/step_00000019").exists()
    return out_dir


def test_resumed_run_has_the_bits_of_the_uninterrupted_one(whole, resumed):
    assert_same_bits(resumed, whole, first_step=21)


def test_metrics_of_a_resumed_run_have_each_step_once(whole, resumed):
    assert [row["step"] for row in rows_of(resumed)] == list(range(1, STEPS + 1))
    for field in ("train_loss", "lr", "val_loss", "hellaswag_acc"):
        figures, others = ([(row["step"], row[field]) for row in rows_of(run, field)] for run in (resumed, whole))
        assert figures == others


def test_a_resume_is_added_to_run_json(whole, resumed):
    old, new = (json.loads((run / "run.json").read_text()) for run in (whole, resumed))
    assert new["parameters"] == old["parameters"] and new["starts"][:-1] == old["starts"]
    assert new["starts"][-1]["after_step"] == 20
    assert "resumed once after step 20 on " in (resumed / "report.html").read_text()


def test_resumed_run_goes_on_with_the_saved_random_state(whole, whole_flags, tmp_path):
    """The test writes another random state into a checkpoint. The next checkpoint shows that the run restored it."""
    path = copy_checkpoint(whole, 35, tmp_path / "run") / "checkpoints/step_00000035"
    torchs = torch.Generator().manual_seed(7).get_state().numpy().tobytes().hex()
    rewrite_state(path, random_state={"torch": torchs})
    result = train_here(whole_flags(tmp_path / "run", resume=True, max_steps=36, allow_config_change=True))
    assert result.status == 0, result.err
    state = checkpoint_of(tmp_path / "run", 36)["random_state"]
    generator = torch.Generator()
    generator.set_state(torch.tensor(list(bytes.fromhex(state["torch"])), dtype=torch.uint8))
    assert generator.initial_seed() == 7


def test_two_resumed_processes_have_the_bits_of_two_uninterrupted_ones(whole_of_two, whole_flags, tmp_path):
    out_dir = copy_checkpoint(whole_of_two, 20, tmp_path / "run")
    script = driver(tmp_path / "driver", RECORD)
    results = launch(script, whole_flags(out_dir, resume=True), ranks=2)
    assert [result.status for result in results] == [0, 0], results
    assert_same_bits(out_dir, whole_of_two, first_step=21)
    uninterrupted = noted(whole_of_two.with_name("driver.py"), "hashes", 1)
    for rank in (0, 1):
        assert noted(script, "hashes", rank) == uninterrupted[20:]


def test_run_of_two_processes_goes_on_with_one(whole, whole_of_two, whole_flags, tmp_path):
    out_dir = copy_checkpoint(whole_of_two, 20, tmp_path / "run")
    result = train_here(whole_flags(out_dir, resume=True, batch_size=4))
    assert result.status == 0, result.err
    assert_close(checkpoint_of(out_dir, STEPS), checkpoint_of(whole, STEPS))
    for row, other in zip(rows_of(out_dir), rows_of(whole)[20:], strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], abs=1e-5)


def test_muon_resumes_with_the_bits_of_the_uninterrupted_run(flags_for, tmp_path):
    muon = {"optimizer": "muon", "schedule": "wsd", "decay_fraction": 0.3, "keep_checkpoints": 2}
    assert train_here(flags_for(tmp_path / "whole", **muon)).status == 0
    out_dir = copy_checkpoint(tmp_path / "whole", 20, tmp_path / "run")
    result = train_here(flags_for(out_dir, resume=True, **muon))
    assert result.status == 0, result.err
    assert_same_bits(out_dir, tmp_path / "whole", first_step=21)
    kinds = {name.rpartition(":")[2] for name in checkpoint_of(out_dir, STEPS)["moments"]}
    assert kinds == {"step", "exp_avg", "exp_avg_sq", "momentum_buffer"}


def write_corpus(folder: Path, seed: int) -> Path:
    """A prepared folder of 300 documents of about 30 tokens. A window holds several of them."""
    folder.mkdir()
    draw = random.Random(seed)
    with open(folder / "texts.jsonl", "w") as file:
        for _ in range(300):
            file.write(json.dumps({"text": " ".join(draw.choices(["one", "two", "three", "four"], k=14))}) + "\n")
    options = {"vocab_size": VOCAB, "val_fraction": 0.1, "show_progress": False}
    prepare([str(folder / "texts.jsonl")], folder / "prepared", **options)
    return folder / "prepared"


def test_masking_documents_changes_the_losses_and_a_resumed_run_has_the_same_bits(flags_for, tmp_path):
    root = write_corpus(tmp_path / "corpus", seed=0)
    fields = {"data_root": root, "max_steps": 6, "save_every": 3}
    for masked in (True, False):
        result = train_here(flags_for(tmp_path / str(masked), document_mask=masked, **fields))
        assert result.status == 0, result.err
    for field, step in (("val_loss", 0), ("train_loss", 1)):  # the same weights; only what attention sees differs
        [[loss], [other]] = (
            [row[field] for row in rows_of(tmp_path / name, field) if row["step"] == step] for name in ("True", "False")
        )
        assert abs(loss - other) > 1e-5, field
    out_dir = copy_checkpoint(tmp_path / "True", 3, tmp_path / "run")
    result = train_here(flags_for(out_dir, resume=True, document_mask=True, **fields))
    assert result.status == 0, result.err
    assert_same_bits(out_dir, tmp_path / "True", first_step=4, last_step=6)


def test_mix_of_two_folders_resumes_and_records_its_shares(flags_for, tmp_path):
    roots = [write_corpus(tmp_path / name, seed) for seed, name in enumerate("ab")]
    mixed = {"data_root": [f"{roots[0]}:0.75", f"{roots[1]}:0.25"], "max_steps": 6, "val_every": 3, "save_every": 3}
    result = train_here(flags_for(tmp_path / "whole", **mixed))
    assert result.status == 0, result.err
    epochs = re.findall(r"([\d.]+) epochs of ([\d,]+) tokens", result.out)
    times, tokens, other_times, other_tokens = (float(number.replace(",", "")) for pair in epochs for number in pair)
    assert times == pytest.approx(0.75 * 6 * TOKENS_PER_STEP / tokens, abs=0.005)
    assert other_times == pytest.approx(0.25 * 6 * TOKENS_PER_STEP / other_tokens, abs=0.005)
    shares = {row["step"]: row["data_shares"] for row in rows_of(tmp_path / "whole", "data_shares")}
    assert list(shares) == [3, 6]
    for share in shares.values():
        assert list(share) == [str(root) for root in roots] and sum(share.values()) == pytest.approx(1)
        assert 0.5 < share[str(roots[0])] < 0.95
    assert f"{shares[6][str(roots[1])]:.1%} of {roots[1]}" in result.out
    config = json.loads((tmp_path / "whole/config.json").read_text())
    assert config["data_root"] == checkpoint_of(tmp_path / "whole", 3)["config"]["data_root"] == mixed["data_root"]

    out_dir = copy_checkpoint(tmp_path / "whole", 3, tmp_path / "run")
    result = train_here(flags_for(out_dir, resume=True, **mixed))
    assert result.status == 0, result.err
    assert_same_bits(out_dir, tmp_path / "whole", first_step=4, last_step=6)
    assert rows_of(out_dir, "data_shares")[-1]["data_shares"] == shares[6]
    other_weights = mixed | {"data_root": [f"{roots[0]}:0.5", f"{roots[1]}:0.25"]}
    result = train_here(flags_for(out_dir, resume=True, **other_weights))
    assert_refused(result, "quotas was [750, 250], is [667, 333]")
    result = train_here(flags_for(out_dir, resume=True, **mixed | {"data_root": roots[0]}))
    assert_refused(result, "training tokens was [", "quotas was [750, 250], is None")


def test_sigterm_saves_and_the_resumed_run_has_the_bits_of_the_uninterrupted_one(whole, whole_flags, tmp_path):
    [result] = launch(driver(tmp_path / "driver", SIGTERM_AT_13), whole_flags(tmp_path / "run"), ranks=1)
    assert result.status == 128 + signal.SIGTERM, result
    assert "13" in result.out and "SIGTERM" in result.out and "--resume True" in result.out
    assert rows_of(tmp_path / "run")[-1]["step"] == checkpoint_of(tmp_path / "run", 13)["step"] == 13
    result = train_here(whole_flags(tmp_path / "run", resume=True))
    assert result.status == 0, result.err
    assert_same_bits(tmp_path / "run", whole, first_step=1)
    assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(1, STEPS + 1))


def test_sigterm_at_one_rank_stops_both_after_the_same_step(whole, whole_flags, tmp_path):
    script = driver(tmp_path / "driver", RECORD + SIGTERM_IN_VALIDATION)
    results = launch(script, whole_flags(tmp_path / "run"), ranks=2)
    assert [result.status for result in results] == [128 + signal.SIGTERM] * 2, results
    hashes = [noted(script, "hashes", rank) for rank in (0, 1)]
    assert hashes[0] == hashes[1] and 10 <= len(hashes[0]) <= 11
    assert checkpoint_of(tmp_path / "run", len(hashes[0]))["step"] == rows_of(tmp_path / "run")[-1]["step"]
    result = train_here(whole_flags(tmp_path / "run", resume=True))
    assert result.status == 0, result.err
    assert_close(checkpoint_of(tmp_path / "run", STEPS), checkpoint_of(whole, STEPS))


def test_ctrl_c_under_torchrun_saves_and_stops(flags_for, tmp_path):
    """torchrun passes the signal on to its processes once."""
    out_dir = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(TRAIN)]
    flags = flags_for(out_dir, max_steps=100_000, val_every=0, save_every=0)
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen([*torchrun, *flags], stdout=out, stderr=out, start_new_session=True)
        try:
            deadline = time.monotonic() + 120
            while not (out_dir / "metrics.jsonl").is_file() or len(rows_of(out_dir)) < 3:
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "out").read_text()
                time.sleep(0.2)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does; each process of torchrun has its own group
            assert process.wait(timeout=60) != 0
        finally:
            process.terminate()  # torchrun ends its processes too
            process.wait(timeout=60)
    [newest] = (out_dir / "checkpoints").glob("step_*")
    assert read_checkpoint(newest)["step"] == rows_of(out_dir)[-1]["step"]
    out = (tmp_path / "out").read_text()
    assert out.count(" by SIGINT\n") == 1 and out.count("SIGINT: ") <= 1  # it may stop at once
    [command] = [line for line in out.splitlines() if line.startswith("    ") and "--resume True" in line]
    assert shlex.split(command) == [*torchrun, *flags, "--resume", "True"]


def test_a_step_is_saved_before_it_is_scored(flags_for, tmp_path, monkeypatch):
    """HellaSwag may take longer than torchrun waits between a signal and a kill."""

    processes = []

    def start(*args):
        processes.append(start_process(*args))
        return processes[-1]

    def killed(*args, **kwargs):
        raise SystemExit("killed")

    flags = flags_for(tmp_path, max_steps=4, save_every=2, hellaswag_every=2, generate_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation.hellaswag_utils, "count_correct", killed)
        patch.setattr(train, "start_process", start)
        assert train_here(flags).status == "killed"
    end_process(processes[0], "")  # its threads are still there
    assert read_checkpoint(tmp_path / "checkpoints/step_00000002")["step"] == 2
    # The resumed run makes up the score and the sample of step 2.
    assert train_here([*flags, "--resume", "True"]).status == 0
    assert [row["step"] for row in rows_of(tmp_path, "hellaswag_acc")] == [2, 4]
    assert [line for line in (tmp_path / "samples.txt").read_text().splitlines() if line.startswith("=====")] == [
        "===== step 2",
        "===== step 4",
    ]


def test_sigterm_during_an_evaluation_loses_no_step(flags_for, tmp_path, monkeypatch):
    """In a real run evaluations take minutes, so a signal is likely to come during one."""
    validate, calls = train.validate, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:  # the first call is at step 0
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(*args)

    monkeypatch.setattr(train, "validate", interrupted)
    result = train_here(flags_for(tmp_path, max_steps=8, val_every=2, save_every=0))
    assert result.status == 128 + signal.SIGTERM, result
    newest = max((tmp_path / "checkpoints").glob("step_*"), default=None)
    assert newest is not None, f"it says {result.out.splitlines()[-1]!r} and has saved nothing"
    assert read_checkpoint(newest)["step"] == rows_of(tmp_path)[-1]["step"]


def test_resume_without_a_checkpoint_begins_anew_and_has_each_row_once(flags_for, tmp_path):
    """A run was killed before its first checkpoint. The same command with --resume True starts it again."""
    assert train_here(flags_for(tmp_path, max_steps=2, resume=True)).status == 0
    shutil.rmtree(tmp_path / "checkpoints")
    assert train_here(flags_for(tmp_path, max_steps=2, resume=True)).status == 0
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2]
    assert [row["step"] for row in rows_of(tmp_path, "val_loss")] == [0, 2]


def test_a_run_whose_checkpoints_were_removed_is_moved_aside_and_not_overwritten(flags_for, tmp_path):
    flags = flags_for(tmp_path / "run", max_steps=6, save_every=2, resume=True)
    assert train_here(flags).status == 0
    rows = (tmp_path / "run/metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "run/checkpoints")
    result = train_here(flags)
    assert result.status == 0 and "starts at step 0" in result.out and "held an earlier run, now in" in result.out
    assert (tmp_path / "run.1/metrics.jsonl").read_bytes() == rows
    assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(1, 7))


def test_learning_rate_flag_takes_effect_in_a_resumed_run(whole, whole_flags, tmp_path):
    out_dir = copy_checkpoint(whole, 35, tmp_path / "run")
    with settings_of_updates() as settings:
        assert_refused(train_here(whole_flags(out_dir, resume=True, max_lr=1e-4)), "max_lr was 0.001, is 0.0001")
        assert train_here(whole_flags(out_dir, resume=True, max_lr=1e-4, allow_config_change=True)).status == 0
    [change] = rows_of(out_dir, "config_change")
    assert change["step"] == 35 and change["config_change"] == {"max_lr": [1e-3, 1e-4]}
    last = rows_of(out_dir)[-1]
    assert last["lr"] == pytest.approx(1e-5)  # a tenth of the peak at the last step
    assert settings[-1][1]["lr"] == pytest.approx(last["lr"])


def test_best_checkpoint_has_the_lowest_validation_loss_even_after_a_resume(flags_for, tmp_path, monkeypatch):
    losses = iter([9.0, 3.0, 2.0, 2.5, 2.2, 2.1, 1.9])  # at steps 0 to 4, then at 5 and 6
    monkeypatch.setattr(train, "validate", lambda *args: ({"val_loss": next(losses), "val_bpb": 1.0}, 0))
    every_step = {"val_every": 1, "save_every": 1, "keep_checkpoints": 1, "allow_config_change": True}

    def best_step() -> int:
        return int((tmp_path / "checkpoints/best").read_text().removeprefix("step_"))

    assert train_here(flags_for(tmp_path, max_steps=4, **every_step)).status == 0
    kept = ["best", "step_00000002", "step_00000004"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == kept
    assert best_step() == 2
    assert train_here(flags_for(tmp_path, max_steps=5, resume=True, **every_step)).status == 0
    assert best_step() == 2
    assert train_here(flags_for(tmp_path, max_steps=6, resume=True, **every_step)).status == 0
    assert best_step() == 6


# ---------------------------------------------------------------- what a run leaves behind


def test_run_directory_holds_the_promised_files(whole):
    names = {path.name for path in whole.iterdir()}
    assert names >= {"config.json", "run.json", "metrics.jsonl", "samples.txt", "checkpoints", "report.html"}
    saved = {f"step_{step:08d}" for step in range(5, STEPS + 1, 5)}
    assert {path.name for path in (whole / "checkpoints").iterdir()} == saved | {"best"}
    assert not [path for path in whole.rglob("*") if path.name.startswith(".") or path.name.endswith(".tmp")]


def test_config_json_and_checkpoint_hold_the_configuration(whole, tiny_corpus):
    config = json.loads((whole / "config.json").read_text())
    assert config == checkpoint_of(whole, STEPS)["config"]
    assert config["data_root"] == str(tiny_corpus) and config["compile"] is False
    assert (config["max_steps"], config["optimizer"], config["model"]["dim"]) == (STEPS, "adamw", 32)


def test_run_json_says_when_the_run_began_on_what_and_how_large_it_is(whole):
    about, model = json.loads((whole / "run.json").read_text()), load_model(whole, torch.device("cpu"))[0]
    assert about["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    [start] = about["starts"]
    began = datetime.fromisoformat(start["time"])
    assert began.tzinfo and 0 <= (datetime.now().astimezone() - began).total_seconds() < 3600
    assert start["device"] == f"{device_name(torch.device('cpu'))}, {num_cores()} cores"
    assert (start["after_step"], start["processes"], start["torch"]) == (None, 1, torch.__version__)
    words = f"started {began:%Y-%m-%d %H:%M %Z} · device {start['device']} · parameters {about['parameters']:,}"
    page = re.sub("</?span>", "", (whole / "report.html").read_text())
    assert f">{STEPS} of {STEPS} steps, finished · {words}<" in page


@pytest.mark.parametrize(
    ("seconds", "pages"), [(0, ["val_loss"] * 3 + ["hellaswag_acc", "samples_end"]), (1, ["val_loss"])]
)
def test_the_page_is_written_after_each_evaluation_unless_it_takes_long(
    flags_for, tmp_path, monkeypatch, seconds, pages
):
    """Between evaluations the clock of records.py stands still. So any page that takes time takes too much of it."""
    clock, written = SimpleNamespace(now=0.0), []

    def write_report(folders, page, *, is_end):
        row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
        written.append(next(key for key in ("val_loss", "hellaswag_acc", "samples_end") if key in row))
        assert (folders, page) == ([tmp_path], tmp_path / "report.html")
        clock.now += seconds

    monkeypatch.setattr(records, "time", SimpleNamespace(perf_counter=lambda: clock.now, monotonic=time.monotonic))
    monkeypatch.setattr(records, "write_report", write_report)
    result = train_here(flags_for(tmp_path, max_steps=4, val_every=2, hellaswag_every=4, generate_every=4))
    assert result.status == 0, result.err
    assert written == [*pages, "samples_end"]  # the last one is the end's


def test_rows_of_metrics_count_completed_steps(whole):
    rows = rows_of(whole)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    fields = {"step", "tokens", "train_loss", "lr", "grad_norm", "tokens_per_sec", "mfu"}
    fields |= {"embedding_lr", "output_lr", "norm_lr"}
    for row in rows:
        assert row.keys() >= fields and all(math.isfinite(row[name]) for name in fields)
        assert row["tokens"] == row["step"] * TOKENS_PER_STEP
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] - 0.3
    # 4 steps of warm-up to 1e-3, then half a cosine to a tenth of it at the last step
    lr = {row["step"]: row["lr"] for row in rows}
    assert [lr[step] for step in (1, 4, 22, STEPS)] == pytest.approx([2.5e-4, 1e-3, 5.5e-4, 1e-4])


def test_optimizer_steps_with_the_learning_rate_of_the_row(whole):
    settings = json.loads((whole.parent / "settings.json").read_text())
    groups = 4  # a role each
    assert len(settings) == groups * STEPS
    for i, row in enumerate(rows_of(whole)):
        assert {group["lr"] for _, group in settings[groups * i : groups * (i + 1)]} == {row["lr"]}
        assert {row[f"{role}_lr"] for role in ("embedding", "output", "norm")} == {row["lr"]} and "muon_lr" not in row


def test_flags_set_the_schedule_and_its_decay_fraction(tuned):
    """The rate falls in a straight line over 3 of the 4 steps. It would be a tenth of the peak one step later."""
    assert [row["lr"] for row in rows_of(tuned)] == pytest.approx([factor * 0.03 for factor in FACTORS])


FACTORS = [1.0, 0.775, 0.55, 0.325]


def test_each_role_has_its_own_learning_rate_on_the_same_schedule(tuned):
    settings = json.loads((tuned.parent / "settings.json").read_text())
    for role, kind, peak in (("embedding", "AdamW", 0.3), ("output", "AdamW", 0.02), ("muon", "Muon", 0.03)):
        rates = [group["lr"] for name, group in settings if (name, group["name"]) == (kind, role)]
        assert rates == pytest.approx([factor * peak for factor in FACTORS])
        assert [row[f"{role}_lr"] for row in rows_of(tuned)] == rates


def test_flags_set_the_betas_and_the_weight_decay(tuned):
    settings = json.loads((tuned.parent / "settings.json").read_text())
    assert [group["betas"] for kind, group in settings if kind == "AdamW"] == [[0.7, 0.8]] * 12
    assert [group["weight_decay"] for kind, group in settings if kind == "AdamW"] == [0] * 12
    assert [group["weight_decay"] for kind, group in settings if kind == "Muon"] == [0.3] * 4


@pytest.mark.parametrize("grad_clip", [0, 0.25])
def test_gradient_is_clipped_to_the_norm_of_the_flag_and_0_turns_clipping_off(flags_for, tmp_path, grad_clip):
    seen = []

    def before_update(optimizer, args, kwargs):
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        seen.append(torch.nn.utils.get_total_norm(gradients).item())

    hook = register_optimizer_step_pre_hook(before_update)
    try:
        assert train_here(flags_for(tmp_path, max_steps=2, grad_clip=grad_clip)).status == 0
    finally:
        hook.remove()
    recorded = [row["grad_norm"] for row in rows_of(tmp_path)]
    assert min(recorded) > 0.5  # metrics.jsonl holds the norm before clipping
    assert seen == pytest.approx([grad_clip, grad_clip] if grad_clip else recorded, rel=1e-4)


def test_evaluation_rows_are_at_their_intervals(whole):
    evaluations = rows_of(whole, "val_loss")
    assert [row["step"] for row in evaluations] == [0, 10, 20, 30, STEPS]
    assert evaluations[0]["val_loss"] == pytest.approx(math.log(VOCAB), abs=0.1)  # the model knows nothing yet
    hellaswag = rows_of(whole, "hellaswag_acc")
    assert [row["step"] for row in hellaswag] == [20, STEPS]
    for row in evaluations:
        assert row.keys() >= {"step", "tokens", "val_loss", "val_bpb"} and row["tokens"] == row["step"] * 256
    for row in hellaswag:
        assert row.keys() >= {"step", "tokens", "hellaswag_acc_norm"} and row["hellaswag_examples"] == 4
        assert row["hellaswag_acc"] == 0.25  # the four rows differ only in the label


def test_checkpoint_of_a_step_is_the_model_that_was_validated_at_that_step(whole, tiny_corpus):
    """The original code saved before the update. Its checkpoint of step 10 would have the loss of step 9."""
    model, checkpoint = load_model(whole / "checkpoints/step_00000010", "cpu")
    assert checkpoint["step"] == 10
    stream = TokenStream(tiny_corpus, "val", vocab_size=VOCAB)
    with torch.inference_mode():
        losses = [model(x, y) for x, y in validation_batches([stream], BatchLayout(32, 1), max_tokens=512)]
    [row] = [row for row in rows_of(whole, "val_loss") if row["step"] == 10]
    assert torch.stack(losses).mean().item() == pytest.approx(row["val_loss"], abs=1e-5)
    assert len(losses) == 512 // 32


def test_bits_per_byte_is_the_loss_over_the_bytes_of_its_text(whole, tiny_corpus):
    stream = TokenStream(tiny_corpus, "val", vocab_size=VOCAB)
    lengths = torch.from_numpy(Tokenizer(vocab_size=VOCAB).token_byte_lengths())
    text_bytes = sum(
        lengths[y].sum().item() for _, y in validation_batches([stream], BatchLayout(32, 1), max_tokens=512)
    )
    row = rows_of(whole, "val_loss")[-1]
    assert row["val_bpb"] == pytest.approx(row["val_loss"] * 512 / math.log(2) / text_bytes)


def test_last_validation_batch_counts_by_its_windows(tuned, tiny_corpus):
    """The batches have 2, 2 and 1 windows. Each window has the same weight."""
    model, _ = load_model(tuned / "checkpoints/step_00000004", "cpu")
    stream = TokenStream(tiny_corpus, "val", vocab_size=VOCAB)
    with torch.inference_mode():
        losses = [model(x, y).item() for x, y in validation_batches([stream], BatchLayout(32, 1), max_tokens=160)]
    [row] = rows_of(tuned, "val_loss")
    assert len(losses) == 5
    assert row["val_loss"] == pytest.approx(sum(losses) / 5, abs=1e-5)
    as_if_full = (2 * sum(losses[:4]) + 4 * losses[4]) / 12
    assert abs(row["val_loss"] - as_if_full) > 1e-3  # the last loss differs so much that its weight shows


def test_evaluations_multiply_in_bf16_where_training_does(flags_for, tmp_path):
    """A hook sees the output of each linear layer: in training, in validation and in HellaSwag."""
    dtypes = {"training": set(), "validation": set(), "HellaSwag": set()}

    def note(layer, args, output):
        if isinstance(layer, torch.nn.Linear):
            full = output.shape[:2] == (2, 32)  # batch_size windows of max_seq_len; HellaSwag's rows are shorter
            kind = "training" if torch.is_grad_enabled() else "validation" if full else "HellaSwag"
            dtypes[kind].add(output.dtype)

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        result = train_here(flags_for(tmp_path, dtype="bfloat16", max_steps=1, hellaswag_every=1))
    finally:
        hook.remove()
    assert result.status == 0, result.err
    assert dtypes == {kind: {torch.bfloat16} for kind in dtypes}


def test_samples_continue_the_prompts_at_their_interval_and_at_the_end(whole):
    text = (whole / "samples.txt").read_text()
    assert re.findall(r"step (\d+)", text) == ["20", "40"]
    assert text.count("abc") >= 2 and text.count("the ") >= 2


def sample_at(out_dir: Path, step: int) -> str:
    """The samples of a step in samples.txt."""
    text = (out_dir / "samples.txt").read_text()
    return text.split(f"===== step {step}\n")[1].partition("\n\n=====")[0].strip()


def likeliest_sample(out_dir: Path, step: int) -> str:
    model, _ = load_model(out_dir / f"checkpoints/step_{step:08d}", "cpu")
    tokenizer = Tokenizer(vocab_size=VOCAB)
    texts = complete(model, tokenizer, ["abc", "the "], max_new_tokens=8, temperature=0, top_p=1, seed=0)
    return "\n\n".join(texts).strip()


def test_samples_are_drawn_at_the_temperature_of_the_flag(tuned, whole):
    """`tuned` has a temperature of 0, which takes the likeliest token. `whole` has 0.8."""
    assert sample_at(tuned, 4) == likeliest_sample(tuned, 4)
    assert sample_at(whole, STEPS) != likeliest_sample(whole, STEPS)


def test_printed_epochs_are_the_tokens_of_the_run_divided_by_those_of_the_corpus(whole, tiny_corpus):
    training_tokens = json.loads((tiny_corpus / "manifest.json").read_text())["shards"][1]["tokens"]
    [(epochs, tokens)] = re.findall(r"([\d.]+) epochs of ([\d,]+) tokens", (whole.parent / "stdout").read_text())
    assert tokens == f"{training_tokens:,}"
    assert float(epochs) == pytest.approx(STEPS * TOKENS_PER_STEP / training_tokens, abs=0.005)


def test_with_intervals_of_0_only_the_end_is_validated_and_saved(flags_for, tmp_path):
    off = {"val_every": 0, "save_every": 0, "hellaswag_every": 0, "generate_every": 0}
    result = train_here(flags_for(tmp_path / "run", max_steps=3, **off))
    assert result.status == 0, result.err
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], "val_loss" in row) for row in rows] == [(1, False), (2, False), (3, False), (3, True)]
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"best", "step_00000003"}
    assert not (tmp_path / "run/samples.txt").exists()


def test_end_is_evaluated_and_saved_even_between_intervals(flags_for, tmp_path):
    every_2 = {"val_every": 2, "save_every": 2, "hellaswag_every": 2, "generate_every": 2}
    result = train_here(flags_for(tmp_path / "run", max_steps=3, **every_2))
    assert result.status == 0, result.err
    assert [row["step"] for row in rows_of(tmp_path / "run", "val_loss")] == [0, 2, 3]
    assert [row["step"] for row in rows_of(tmp_path / "run", "hellaswag_acc")] == [2, 3]
    assert re.findall(r"step (\d+)", (tmp_path / "run/samples.txt").read_text()) == ["2", "3"]
    assert checkpoint_of(tmp_path / "run", 3)["step"] == 3


def test_only_the_newest_checkpoints_and_the_best_are_kept(flags_for, tmp_path):
    result = train_here(flags_for(tmp_path, max_steps=6, save_every=1, keep_checkpoints=2))
    assert result.status == 0, result.err
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["best", "step_00000005", "step_00000006"]


def test_fresh_run_in_a_used_folder_moves_the_whole_old_run_aside(flags_for, tmp_path):
    assert train_here(flags_for(tmp_path / "run", max_steps=1, seed=1)).status == 0
    first = files_in(tmp_path / "run")
    result = train_here(flags_for(tmp_path / "run", max_steps=1, seed=2))
    assert result.status == 0 and "run.1" in result.out
    second = files_in(tmp_path / "run")
    assert files_in(tmp_path / "run.1") == first != second
    assert train_here(flags_for(tmp_path / "run", max_steps=1, seed=3)).status == 0
    assert files_in(tmp_path / "run.1") == first
    assert files_in(tmp_path / "run.2") == second


def test_checkpoints_in_a_folder_without_metrics_are_not_lost_either(whole, flags_for, tmp_path):
    """Someone put a checkpoint there, or deleted the metrics. If the old step 40 counted as the newest, the new run
    would delete its own first checkpoints, or overwrite the old one."""
    old = files_in(copy_checkpoint(whole, STEPS, tmp_path / "run"))
    result = train_here(flags_for(tmp_path / "run", max_steps=3, save_every=1, keep_checkpoints=1))
    survivors = [contents for path in tmp_path.iterdir() for contents in files_in(path).values()]
    assert all(contents in survivors for contents in old.values())
    if result.status == 0:
        assert checkpoint_of(tmp_path / "run", 3)["step"] == 3


def test_tokens_per_second_leave_out_evaluating_and_saving(flags_for, tmp_path, monkeypatch):
    """Each reading moves the clock on by a millisecond, and each validation and save by a hundred seconds."""
    ticks, pauses = itertools.count(), []

    def slow(function):
        def pausing(*args, **kwargs):
            pauses.append(function)
            return function(*args, **kwargs)

        return pausing

    monkeypatch.setattr(train, "validate", slow(train.validate))
    monkeypatch.setattr(train.CheckpointSaver, "save", slow(train.CheckpointSaver.save))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) / 1000 + 100 * len(pauses))
    result = train_here(flags_for(tmp_path, max_steps=3, val_every=2, save_every=2))
    assert result.status == 0, result.err
    assert len(pauses) == 5  # validated at steps 0, 2 and 3, saved at 2 and 3
    for row in rows_of(tmp_path):
        assert TOKENS_PER_STEP / row["tokens_per_sec"] < 1, row


def test_tokens_per_second_are_the_tokens_of_a_step_over_its_seconds(clocked):
    for row in rows_of(clocked):
        assert row["tokens_per_sec"] == pytest.approx(TOKENS_PER_STEP / 2, rel=0.01)


def test_mfu_is_the_flops_of_a_second_divided_by_the_printed_peak(clocked):
    [teraflops] = re.findall(r"peak ([\d.]+) TFLOP/s", (clocked.parent / "stdout").read_text())
    for row in rows_of(clocked):
        expected = row["tokens_per_sec"] * FLOPS_PER_TOKEN / (float(teraflops) * 1e12)
        assert row["mfu"] == pytest.approx(expected, rel=0.01)


def test_peak_of_two_processes_is_twice_that_of_one(clocked, whole_of_two):
    """The clocks of both runs tick in the same way. Tokens a second divided by MFU is the peak in tokens a second."""
    [one], [two] = (
        {round(row["tokens_per_sec"] / row["mfu"]) for row in rows_of(run)} for run in (clocked, whole_of_two)
    )
    assert two == pytest.approx(2 * one, rel=1e-3)


def test_evaluations_never_run_compiled_code(flags_for, tmp_path, monkeypatch):
    """Evaluations have other shapes than training, so each shape would be compiled anew. The backend of this test
    compiles nothing. It notes whether gradients are on when its code reads weights. In training they are on."""
    compile_, with_gradients = torch.compile, []

    def backend(graph, inputs):
        def run(*args):
            if any(getattr(arg, "requires_grad", False) for arg in args):
                with_gradients.append(torch.is_grad_enabled())
            return graph.forward(*args)

        return run

    monkeypatch.setattr(torch, "compile", lambda model, **settings: compile_(model, **settings, backend=backend))
    torch._dynamo.reset()
    every_step = {"val_every": 1, "hellaswag_every": 1, "generate_every": 1}
    result = train_here(flags_for(tmp_path, compile=True, max_steps=1, **every_step))
    torch._dynamo.reset()
    assert result.status == 0, result.err
    assert with_gradients and all(with_gradients)


@pytest.mark.slow
def test_compiled_run_has_the_losses_of_the_uncompiled_one(flags_for, tmp_path):
    for compiled in (False, True):
        result = train_here(flags_for(tmp_path / str(compiled), max_steps=5, compile=compiled))
        assert result.status == 0, result.err
    for row, other in zip(rows_of(tmp_path / "True"), rows_of(tmp_path / "False"), strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], abs=1e-4)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_output_in_a_code_page_takes_the_samples_and_any_name(flags_for, tmp_path, encoding):
    """The first sample that this encoding cannot show would end the run, hours after its start."""
    out_dir = tmp_path / os.fsdecode("東京".encode() + b"\xff")  # the last byte is no text: Python shows a surrogate
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
    with redirect_stdout(out), redirect_stderr(err):
        status = train_in_these_streams(flags_for(out_dir, max_steps=2, generate_every=2, prompts=["東京"]))
        sys.stdout.flush()
    assert status == 0
    assert "??" in out.buffer.getvalue().decode(encoding)
    assert "東京" in (out_dir / "samples.txt").read_text(encoding="utf-8")
    assert (out_dir / "report.html").is_file()


# ---------------------------------------------------------------- the sample, when no data was prepared


def test_without_data_the_sample_is_prepared_trained_and_evaluated(tmp_path):
    small = ["--model.dim", "32", "--model.n_layers", "1", "--model.n_heads", "2", "--model.n_kv_heads", "1"]
    small += ["--total_batch_size", "512", "--batch_size", "4", "--val_tokens", "2048", "--hellaswag_limit", "8"]
    flags = ["--max_steps", "3", "--compile", "False", "--device", "cpu", *small]
    command = [sys.executable, str(TRAIN), *flags]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "data/sample/manifest.json").is_file()
    lines = (tmp_path / "data/sample/sample_continuations.jsonl").read_text().splitlines()
    assert len(lines) == 200 and json.loads(lines[0])["endings"]
    [evaluation] = rows_of(tmp_path / "runs/sample", "hellaswag_acc")
    assert evaluation["hellaswag_examples"] == 8
    assert [row["step"] for row in rows_of(tmp_path / "runs/sample")] == [1, 2, 3]
    assert [row["step"] for row in rows_of(tmp_path / "runs/sample", "val_loss")] == [0, 3]
    assert checkpoint_of(tmp_path / "runs/sample", 3)["config"]["model"]["vocab_size"] == 4096
    # The rows are not HellaSwag's, so nothing may call the result by that name.
    [accuracy] = [line for line in result.stdout.splitlines() if "acc_norm" in line]
    assert "sample continuations" in accuracy
    assert "hellaswag" not in result.stdout.lower() and "hellaswag" not in result.stderr.lower()


# ---------------------------------------------------------------- refusals


def assert_refused(result: Result, *words: str) -> None:
    assert result.status not in (0, None), result
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err, f"{word!r} is not in: {result.err}"


def test_mistyped_flag_is_refused_and_the_nearest_named(flags_for, tmp_path):
    assert_refused(train_here([*flags_for(tmp_path / "run"), "--max_step", "3"]), "--max_step", "--max_steps")
    assert_refused(train_here([*flags_for(tmp_path / "run"), "--model.n_layer", "3"]), "--model.n_layers")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_steps", "ten"), ("max_lr", "fast"), ("compile", "perhaps"), ("optimizer", "sgd"), ("model.dim", "3.5")],
)
def test_value_of_the_wrong_type_is_refused(flags_for, tmp_path, name, value):
    assert_refused(train_here(flags_for(tmp_path / "run", **{name: value})), f"{name}={value}: must be")
    assert not (tmp_path / "run").exists()


def test_all_bad_fields_are_named_at_once_with_value_and_cure(flags_for, tmp_path):
    bad = {"max_steps": 0, "batch_size": -2, "top_p": 1.5, "max_lr": -1.0, "save_every": -1, "keep_checkpoints": 0}
    bad |= {"grad_clip": math.nan, "device": "tpu", "model.n_heads": 5, "model.vocab_size": 300}
    bad |= {"data_root": tmp_path / "nowhere", "hellaswag_path": tmp_path / "nothing.jsonl", "hellaswag_every": 1}
    result = train_here(flags_for(tmp_path / "run", **bad))
    assert_refused(result)
    lines = result.err.splitlines()
    for name, value in (bad | {"model.dim": 32}).items():
        if name not in ("model.n_heads", "hellaswag_every"):  # model.dim reports the first; the second is valid
            [line] = [line for line in lines if f"{name}={value}:" in line]
            assert re.search(r"must|name auto|makes one|fetches", line), line
    assert not (tmp_path / "run").exists()


def test_total_batch_must_fit_batch_sequence_and_world_size(flags_for, tmp_path, monkeypatch):
    """192 tokens are 3 micro-steps of 2 x 32 on one process. On two processes they are one and a half."""
    flags = flags_for(tmp_path / "run", total_batch_size=192)
    assert read_config(flags, train.CONFIGS).total_batch_size == 192
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    result = train_here(flags)
    assert_refused(result, "total_batch_size=192", "batch_size=2", "2 processes", "max_seq_len=32", "128")
    [suggested] = re.findall(r"(\d+) would do", result.err)
    assert int(suggested) % 128 == 0
    assert not (tmp_path / "run").exists()


def test_data_root_given_by_flag_is_never_replaced_by_the_sample(flags_for, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for missing in ("elsewhere", "data/fineweb-edu-10BT"):  # the second is the default folder
        result = train_here(flags_for("run", data_root=missing))
        assert_refused(result, f"data_root={missing}", "load_fineweb_dataset.py")
    (tmp_path / "there").mkdir()
    (tmp_path / "there/manifest.json").touch()
    mixed = train_here(flags_for("run", data_root=["there", "elsewhere:2"]))
    assert_refused(mixed, "data_root=elsewhere: not a prepared folder")
    assert_refused(train_here(flags_for("run", data_root=["there", "there:2"])), "data_root: names there twice")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


class FeedForwardCasts(TorchDispatchMode):
    """Counts the casts to bfloat16 of w1 and w3, the matrices of shape (96, 32)."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.count += args[0].shape == (96, 32)
        return func(*args, **(kwargs or {}))


def test_weights_are_cast_once_for_all_micro_steps_of_an_update(flags_for, tmp_path):
    counts = {}
    for batch_size in (2, 8):  # 4 micro-steps, then 1
        with FeedForwardCasts() as casts:
            flags = flags_for(
                tmp_path / str(batch_size), batch_size=batch_size, dtype="bfloat16", max_steps=3, val_every=0
            )
            assert train_here(flags).status == 0
        counts[batch_size] = casts.count
    assert counts[2] == counts[8] >= 3 * 2 * 2  # 3 updates, w1 and w3, two blocks; validation adds casts


@pytest.mark.parametrize("has_bf16", [False, True])
def test_dtype_auto_is_bfloat16_only_where_the_hardware_multiplies_it(flags_for, tmp_path, monkeypatch, has_bf16):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bf16})
    cfg = read_config(flags_for(tmp_path / "run", dtype="auto"), train.CONFIGS)
    assert cfg.dtype == ("bfloat16" if has_bf16 else "float32")


def test_vocabulary_that_does_not_fit_the_data_is_refused(flags_for, tmp_path):
    result = train_here(flags_for(tmp_path / "run", model__vocab_size=1024))
    assert_refused(result, "512", "1024", "--model.vocab_size 512")
    assert not list((tmp_path / "run").rglob("step_*"))


def test_refused_run_leaves_an_earlier_run_where_it_is(flags_for, tmp_path):
    assert train_here(flags_for(tmp_path / "run", max_steps=1)).status == 0
    before = files_in(tmp_path)
    assert_refused(train_here(flags_for(tmp_path / "run", max_steps=1, model__vocab_size=1024)), "1024")
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 7}, ["seed"]),
        ({"total_batch_size": 512}, ["total_batch_size"]),
        ({"model__max_seq_len": 16}, ["max_seq_len"]),
        ({"model__dim": 64}, ["dim", "64"]),
        ({"model__n_layers": 3}, ["n_layers"]),
        ({"optimizer": "muon"}, ["optimizer", "adamw", "muon"]),
        ({"document_mask": True}, ["document_mask was False, is True"]),
    ],
    ids=lambda value: next(iter(value)),
)
def test_resume_refuses_flags_that_do_not_fit_the_checkpoint(whole, whole_flags, tmp_path, changes, words):
    out_dir = copy_checkpoint(whole, 20, tmp_path / "run")
    shutil.copyfile(whole / "metrics.jsonl", out_dir / "metrics.jsonl")
    before = files_in(out_dir)
    assert_refused(train_here(whole_flags(out_dir, resume=True, **changes)), *words)
    assert files_in(out_dir) == before


def test_damaged_newest_checkpoint_is_named_and_kept_aside(whole, whole_flags, tmp_path):
    out_dir = copy_checkpoint(whole, 20, tmp_path / "run")
    damaged = shutil.copytree(out_dir / "checkpoints/step_00000020", out_dir / "checkpoints/step_00000025")
    file = damaged / "training_state/optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    before = files_in(damaged)
    result = train_here(whole_flags(out_dir, resume=True))
    assert result.status == 0, result.err
    assert f"{damaged}: " in result.out and "trying the one before" in result.out
    assert files_in(out_dir / "checkpoints/aside/step_00000025") == before
    assert_same_bits(out_dir, whole, first_step=21)


def test_checkpoint_without_a_run_is_refused_by_resume(whole, whole_flags, tmp_path):
    """The folder holds a model, as another program writes it. The error is a sentence, not a KeyError."""
    path = copy_checkpoint(whole, 20, tmp_path / "run") / "checkpoints/step_00000020"
    shutil.rmtree(path / "training_state")
    mark = json.loads((path / "checkpoint.json").read_text())
    mark["files"] = {name: file for name, file in mark["files"].items() if "training_state" not in name}
    (path / "checkpoint.json").write_text(json.dumps(mark))
    assert_refused(train_here(whole_flags(tmp_path / "run", resume=True)), str(path), "no run to resume")


def test_a_run_begins_with_the_weights_of_another(whole, flags_for, tmp_path):
    """The model comes from the folder. At step 0 the new run has the validation loss that the other one ended with."""
    source = whole / f"checkpoints/step_{STEPS:08d}"
    flags = flags_for(tmp_path / "run", init_from=source, max_steps=2, val_every=1)
    places = [i for i, flag in enumerate(flags) if flag.startswith("--model.") and "max_seq_len" not in flag]
    flags = [flag for i, flag in enumerate(flags) if i not in places and i - 1 not in places]
    result = train_here(flags)
    assert result.status == 0, result.err
    [began] = [row["val_loss"] for row in rows_of(tmp_path / "run", "val_loss") if row["step"] == 0]
    ended = rows_of(whole, "val_loss")[-1]["val_loss"]
    assert began == pytest.approx(ended, abs=1e-6)
    config = json.loads((tmp_path / "run/config.json").read_text())["model"]
    assert config["dim"] == 32 and config["vocab_size"] == VOCAB
    assert (
        train_here(tiny_run.changed(flags, "--resume", "True", "--profile", "0")).status == 0
    )  # goes on with its own weights
    assert_refused(train_here([*flags, "--model.dim", "64"]), "model.dim=64", "has 32", "leave the flag out")
    assert_refused(
        train_here(tiny_run.changed(flags, "--model.max_seq_len", "64")), "model.max_seq_len=64", "only 32 positions"
    )
    assert_refused(
        train_here(tiny_run.changed(flags, "--init_from", "nowhere")), "init_from=nowhere", "no checkpoint there"
    )


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"top_p": 0}, "top_p"),
        ({"generate_tokens": -5}, "generate_tokens"),
        ({"prompts": ["ab" * 40]}, "prompts"),
        ({"prompts": []}, "prompts"),
        ({"betas": ["0.9", "1.5"]}, "betas"),
        ({"hellaswag_path": "empty.jsonl"}, "empty.jsonl"),
    ],
)
def test_flag_that_would_break_the_first_evaluation_is_refused_at_the_start(
    flags_for, tmp_path, monkeypatch, changes, word
):
    """With the default interval the first evaluation comes after 1,000 steps, hours into a run."""
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    result = train_here(flags_for("run", max_steps=2, generate_every=2, hellaswag_every=2, **changes))
    assert_refused(result, word)
    assert not Path("run").exists()


@pytest.fixture
def corpus_with_validation(tiny_corpus, tmp_path):
    """A function that copies the corpus and gives the copy other validation ids."""

    def change(ids: np.ndarray) -> Path:
        root = shutil.copytree(tiny_corpus, tmp_path / "corpus")
        manifest = json.loads((root / "manifest.json").read_text())
        manifest["tokens"] += len(ids) - manifest["shards"][0]["tokens"]
        manifest["shards"][0]["tokens"] = len(ids)
        (root / "manifest.json").write_text(json.dumps(manifest))
        np.save(root / manifest["shards"][0]["file"], ids.astype(manifest["dtype"]))
        return root

    return change


@pytest.mark.parametrize("tokens", [0, 1, 32])
@pytest.mark.parametrize("val_every", [0, 10])
def test_validation_data_shorter_than_a_sequence_is_refused_at_the_start(
    flags_for, tmp_path, corpus_with_validation, tokens, val_every
):
    """The end of a run is validated even if `val_every` is 0."""
    root = corpus_with_validation(np.zeros(tokens))
    result = train_here(flags_for(tmp_path / "run", data_root=root, val_every=val_every, max_steps=2))
    assert_refused(result, f"{root}: {tokens} validation tokens do not fill one sequence of 32", "--model.max_seq_len")
    assert len(result.err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_too_little_disk_for_the_checkpoints_is_refused_at_the_start(flags_for, tmp_path, monkeypatch):
    """The run needs room for the newest two, for the best one, and for the next one while it is written."""
    fields = {"max_steps": 40, "save_every": 5, "keep_checkpoints": 2, "val_every": 0, "allow_config_change": True}
    flags = flags_for(tmp_path / "run", **fields)
    assert train_here(tiny_run.changed(flags, "--max_steps", "5")).status == 0
    before, size = files_in(tmp_path), size_of(tmp_path / "run/checkpoints/step_00000005")
    usage = shutil.disk_usage(tmp_path)
    for extra, count, free in [
        (["--max_steps", "5"], 1, size // 2),
        ([], 4, 3 * size),
        (["--keep_checkpoints", "100"], 8, 7 * size),
        (["--resume", "True"], 3, 2 * size),  # one is there already
        (["--resume", "True", "--save_every", "0"], 1, size // 2),
    ]:
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        result = train_here(tiny_run.changed(flags, *extra))
        assert_refused(result, str(tmp_path / "run/checkpoints"), f"up to {count} checkpoint", f"has {free:,}")
        assert_refused(result, "--keep_checkpoints", "--out_dir")
        assert len(result.err.splitlines()) == 1
        assert files_in(tmp_path) == before  # the earlier run is still in its place
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3 * size))
    assert train_here(tiny_run.changed(flags, "--resume", "True", "--max_steps", "6")).status == 0


def test_folder_that_cannot_be_written_to_is_refused_at_the_start(flags_for, tmp_path, monkeypatch):
    """The first checkpoint may come hours later. Root may write everywhere, so here the system refuses new files."""
    run, real_open = tmp_path / "run", os.open
    flags = flags_for(run, max_steps=2, val_every=0)

    def open_elsewhere(path, *args, **kwargs):
        if run / "checkpoints" in (Path(os.fsdecode(path)), Path(os.fsdecode(path)).parent):
            raise PermissionError(errno.EACCES, "Permission denied", os.fsdecode(path))
        return real_open(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", open_elsewhere)
        results = [train_here(flags)]
    shutil.rmtree(run)
    run.mkdir()
    (run / "checkpoints").touch()  # a file where a folder should be
    results.append(train_here(flags))
    shutil.rmtree(run)
    run.touch()
    results.append(train_here(flags))
    reasons = ["Permission denied", "checkpoints is not a folder", "run is not a folder"]
    for result, reason in zip(results, reasons, strict=True):
        assert_refused(result, f"out_dir={run}: ", reason, "choose another --out_dir")
        assert len(result.err.splitlines()) == 1 and "step " not in result.out


def test_error_of_a_rank_that_is_not_the_first_is_printed(flags_for, tmp_path, monkeypatch):
    """Two processes share a machine with one GPU. Only rank 1 has no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(train, "start_process", lambda device: sys.exit("no error so far"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    said = ""
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        said += train_here(flags_for(tmp_path / "run", device="cuda")).err
    assert "device=cuda" in said and "1 are visible" in said


def test_error_that_only_another_node_finds_at_the_start_is_printed(flags_for, tmp_path):
    """Each rank has a node of its own, and only rank 1's node lacks the data. So each node's first rank must print, not
    rank 0 alone. Rank 0 waits until the test ends it."""
    port, missing = free_port(), tmp_path / "missing"
    data = ({}, {"data_root": missing})
    ranks = [
        start_rank(TRAIN, flags_for(tmp_path / "run", **data[rank]), port, rank, ranks=2, ranks_a_node=1)
        for rank in (0, 1)
    ]
    try:
        out, err = ranks[1].communicate(timeout=60)
    finally:
        for process in ranks:
            process.kill()
    joined = out + err + "".join(ranks[0].communicate())
    assert ranks[1].returncode not in (0, None)
    assert f"data_root={missing}: not a prepared folder" in joined


def test_error_that_all_ranks_of_a_node_find_is_printed_once(flags_for, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    said = ""
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        result = train_here(flags_for(tmp_path / "run", data_root=tmp_path / "missing"))
        assert result.status == 1
        said += result.err
    assert said.count(f"data_root={tmp_path / 'missing'}: not a prepared folder") == 1


# ---------------------------------------------------------------- a run that breaks


@contextmanager
def poisoned_update(number: int):
    """Update `number` sets a parameter to NaN."""
    updates = []

    def poison(optimizer, args, kwargs):
        updates.append(1)
        if len(updates) == number:
            optimizer.param_groups[0]["params"][0].data[:] = math.nan

    hook = register_optimizer_step_post_hook(poison)
    try:
        yield
    finally:
        hook.remove()


def test_loss_that_is_not_a_number_stops_the_run_and_leaves_a_good_checkpoint(flags_for, tmp_path):
    with poisoned_update(3):
        result = train_here(flags_for(tmp_path, max_steps=8, save_every=2, val_every=0))
    good = tmp_path / "checkpoints/step_00000002"
    assert_refused(result, "step 4", "rank 0", str(good))
    assert list((tmp_path / "checkpoints").glob("step_*")) == [good]
    checkpoint = read_checkpoint(good)
    assert all(value.isfinite().all() for value in checkpoint["model"].values())
    assert all(math.isfinite(row["train_loss"]) for row in rows_of(tmp_path))
    assert train_here(flags_for(tmp_path, max_steps=8, save_every=2, val_every=0, resume=True)).status == 0


def test_learning_rate_far_too_high_stops_the_run(flags_for, tmp_path):
    result = train_here(flags_for(tmp_path, max_lr=1e30, warmup_steps=0, val_every=0, save_every=0))
    assert_refused(result, "step", "not finite", "there is no checkpoint", "max_lr")
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert not list(tmp_path.rglob("step_*"))


def test_model_broken_by_its_last_update_is_not_saved_as_a_good_one(flags_for, tmp_path):
    """No later step can notice it. The validation at the end must."""
    with poisoned_update(3):
        result = train_here(flags_for(tmp_path, max_steps=3, save_every=2, val_every=0))
    assert_refused(result, "step 3", str(tmp_path / "checkpoints/step_00000002"))
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000002"]


def test_rank_whose_loss_is_not_a_number_is_named_and_both_ranks_stop(flags_for, tmp_path):
    flags = flags_for(tmp_path / "run", max_steps=8, save_every=2, val_every=0)
    results = launch(driver(tmp_path / "driver", POISON_RANK_1), flags, ranks=2)
    good = tmp_path / "run/checkpoints/step_00000002"
    assert [result.status for result in results] == [1, 1]
    assert_refused(results[0], "step 4", "rank 1", str(good))
    assert all(value.isfinite().all() for value in read_checkpoint(good)["model"].values())


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


def test_full_disk_gives_one_sentence_and_leaves_the_older_checkpoint_whole(flags_for, tmp_path):
    flags = flags_for(tmp_path, max_steps=4, save_every=2, val_every=0, allow_config_change=True)
    assert train_here(tiny_run.changed(flags, "--max_steps", "2")).status == 0
    older = tmp_path / "checkpoints/step_00000002"
    before = files_in(tmp_path / "checkpoints")
    with file_size_limit(100_000):
        result = train_here([*flags, "--resume", "True"])
    assert_refused(result, "step_00000004", "could not be written", "last good checkpoint is", str(older))
    assert len(result.err.strip().splitlines()) == 1
    assert files_in(tmp_path / "checkpoints") == before  # and no temporary file
    assert train_here([*flags, "--resume", "True"]).status == 0
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4]


def test_full_disk_gives_one_sentence_with_two_processes_too(flags_for, tmp_path):
    """Only rank 0 writes. It must tell the other rank, which would otherwise find the connection closed."""
    pytest.importorskip("resource")
    script = driver(tmp_path / "driver", "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))")
    results = launch(script, flags_for(tmp_path / "run", max_steps=2, val_every=0), ranks=2)
    assert [result.status for result in results] == [1, 1]
    assert_refused(results[0], "step_00000002", "could not be written")
    assert not results[1].err
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_failure_of_weights_and_biases_does_not_stop_training(flags_for, tmp_path, monkeypatch):
    class Run:
        def define_metric(self, *args, **kwargs): ...

        def log(self, *args, **kwargs):
            raise ConnectionResetError("the service is gone")

    module = SimpleNamespace(init=lambda **kwargs: Run(), Settings=lambda **kwargs: None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    result = train_here(flags_for(tmp_path, max_steps=3))
    assert result.status == 0, result.err
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3]
    assert len([line for line in (result.out + result.err).splitlines() if "service is gone" in line]) == 1
