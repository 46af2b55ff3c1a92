"""Updates that wait for nothing: what the device leaves out, figures that come late, float16 with a loss scale."""

import json
import math
import shutil
import signal
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_run
import torch
from checkpoint_files import rewrite_state
from ranks import assert_same_bits, checkpoint_of, driver, launch, noted, rows_of
from test_train import RECORD, assert_refused, one_thread, plain_environment, train_here  # noqa: F401
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_pre_hook

import cuda_kernels
import loss
import records
import train
import updates
from model import Transformer
from model_utils import MixedPrecision
from optimizers import Muon, build_optimizers
from processes import Process
from run_config import read_config
from updates import Update

NAN, INF = math.nan, math.inf
ALONE = Process(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def flags_for(tmp_path_factory):
    """A function that returns flags, with the given changes, for a run into `out_dir` that takes a second."""
    corpus = tiny_run.tiny_corpus(tmp_path_factory.mktemp("corpus"))
    questions = tiny_run.write_questions(tmp_path_factory.mktemp("questions"))
    return partial(tiny_run.tiny_flags, corpus, questions)


@pytest.fixture(autouse=True, scope="module")
def known_peak():
    """A product in float16 takes seconds on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "peak_flops", lambda *args: (1e12, "measured"))
        yield


# ---------------------------------------------------------------- nothing waits


@pytest.mark.parametrize(("dtype", "optimizer"), [("bfloat16", "muon"), ("float16", "muon"), ("float32", "adamw")])
def test_an_update_reads_no_number_from_the_device(flags_for, tmp_path, monkeypatch, dtype, optimizer):
    """Fake tensors have no numbers. Whatever would wait for a GPU (item, tolist, bool, nonzero) raises with them."""
    flags = flags_for(tmp_path, dtype=dtype, optimizer=optimizer, max_lr=1e-3, document_mask=True)
    cfg = read_config(flags, train.CONFIGS, say=lambda line: None)
    monkeypatch.setattr(loss, "check_targets", lambda *args: None)  # it asserts on the device where that is a GPU
    with FakeTensorMode():
        model = Transformer(cfg.model)
        cuda_kernels.install(model)
        optimizers = build_optimizers(model, cfg)
        wrapped = MixedPrecision(model, getattr(torch, dtype), optimizers)
        batches = (torch.randint(512, (2, 2, 32)).unbind() for _ in range(6))
        scaler = torch.amp.GradScaler("cpu", enabled=dtype == "float16")
        step = partial(train.update, wrapped, optimizers, batches, cfg=cfg, accumulation=3, bos_id=0, scaler=scaler)
        process = Process(0, 1, torch.device("cpu"))
        step(1, process=process)
        done = step(2, process=process)
        assert next(batches, None) is None
        with pytest.raises(DataDependentOutputException):
            done.wait()  # here it would wait


class LateEvent:
    """A GPU's event, which is there when somebody has waited for it."""

    def __init__(self):
        self.is_there = False

    def record(self) -> None: ...

    def synchronize(self) -> None:
        self.is_there = True


@pytest.fixture
def one_update_late(monkeypatch):
    """Reads figures as from a GPU: one update late. Returns how many updates were not read at each `add`."""
    waiting = []

    class Late(updates.Updates):
        def __init__(self, *args):
            super().__init__(*args)
            self.ahead = 1

        def add(self, update, *, is_awaited):
            update._copied = LateEvent()
            super().add(update, is_awaited=is_awaited)
            waiting.append(sum(not update._copied.is_there for update in self.pending))

    monkeypatch.setattr(train, "Updates", Late)
    return waiting


def test_figures_that_come_late_are_the_same_and_none_is_lost(flags_for, tmp_path, one_update_late):
    changes = {"max_steps": 9, "val_every": 4, "save_every": 4, "log_every": 1}
    late = train_here(flags_for(tmp_path / "late", **changes))
    assert late.status == 0 and one_update_late == [1, 1, 1, 0, 1, 1, 1, 0, 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Updates", updates.Updates)
        assert train_here(flags_for(tmp_path / "at_once", **changes)).status == 0
    assert_same_bits(tmp_path / "late", tmp_path / "at_once", first_step=1, last_step=9)
    rows, others = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("late", "at_once")
    )
    # The rows come in the same order: an update is recorded before the evaluation of its step.
    assert [(row["step"], *row) for row in rows] == [(row["step"], *row) for row in others]
    assert all(0 < row["tokens_per_sec"] < INF for row in rows if "train_loss" in row)


@contextmanager
def broken_gradients(*steps: int, value: float = NAN):
    """The gradient of AdamW's first parameter is `value` in these updates."""
    count = 0

    def spoil(optimizer, args, kwargs):
        nonlocal count
        if isinstance(optimizer, torch.optim.AdamW):
            count += 1

    real = torch.nn.utils.clip_grad_norm_

    def clip(parameters, *args, **kwargs):
        parameters = list(parameters)
        if count + 1 in steps:
            parameters[0].grad[0, 0] = value
        return real(parameters, *args, **kwargs)

    hook = register_optimizer_step_pre_hook(spoil)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        try:
            yield
        finally:
            hook.remove()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_an_update_that_is_left_out_changes_no_bit(flags_for, tmp_path, one_update_late, optimizer, value):
    changes = {"max_steps": 5, "optimizer": optimizer, "warmup_steps": 0, "val_every": 0}
    with broken_gradients(3, value=value):
        result = train_here(flags_for(tmp_path / "run", skip_nonfinite=1, save_every=1, keep_checkpoints=5, **changes))
    assert result.status == 0 and "left out: a loss or the gradient is not finite; 1 in a row" in result.out
    assert rows_of(tmp_path / "run", "skipped")[0]["step"] == 3
    before, after = checkpoint_of(tmp_path / "run", 2), checkpoint_of(tmp_path / "run", 3)
    for part in ("model", "moments"):
        for name, tensor in before[part].items():
            assert torch.equal(tensor, after[part][name]), name
    assert not all(map(torch.equal, *(checkpoint_of(tmp_path / "run", n)["model"].values() for n in (3, 4))))


@contextmanager
def stop_at(step: int):
    """A stop signal comes before update `step`."""
    real = train.update

    def update(*args, process, **kwargs):
        if args[3] == step:
            process.watch.stop = 15
        return real(*args, process=process, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "update", update)
        yield


def test_a_broken_update_is_reported_one_late_and_stops_the_run_before_anything_is_saved(
    flags_for, tmp_path, one_update_late
):
    with broken_gradients(5):
        result = train_here(flags_for(tmp_path, max_steps=9, save_every=2, val_every=0))
    assert_refused(result, "step 5", "the gradient is nan", "step_00000004")
    assert len(one_update_late) == 6  # update 6 had been asked for
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4]
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*")) == ["step_00000002", "step_00000004"]


def test_a_step_that_is_due_for_a_save_is_checked_before_it_is_saved(flags_for, tmp_path, one_update_late):
    with broken_gradients(4):
        result = train_here(flags_for(tmp_path, max_steps=9, save_every=2, val_every=0))
    assert_refused(result, "step 4", "the gradient is nan", "step_00000002")
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000002"]


def test_a_stop_signal_loses_no_update_that_was_asked_for(flags_for, tmp_path, one_update_late):
    with stop_at(6):
        result = train_here(flags_for(tmp_path, max_steps=9, save_every=0, val_every=0, log_every=1))
    assert result.status == 128 + 15
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5]
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000005"]


def test_a_stop_signal_after_a_validation_keeps_the_mark_of_the_best(flags_for, tmp_path):
    """The signal is heard in update 5. Step 4, which is saved then, has just been validated."""
    flags = flags_for(tmp_path, max_steps=9, save_every=0, val_every=4)
    with stop_at(5):
        assert train_here(flags).status == 128 + 15
    assert (tmp_path / "checkpoints/best").read_text() == "step_00000004\n"


def test_a_validation_marks_no_later_step_as_the_best(flags_for, tmp_path):
    """Step 4 is validated, and step 6 is saved."""
    with stop_at(7):
        assert train_here(flags_for(tmp_path, max_steps=9, save_every=6, val_every=4)).status == 128 + 15
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000006"]


def test_after_a_stop_signal_no_further_micro_step_is_made(flags_for, tmp_path, monkeypatch):
    passes = []
    real = MixedPrecision.forward

    def forward(self, *args, **kwargs):
        passes.append(1)
        if len(passes) == 5 * 4 + 1:  # the first of four micro-steps of update 6
            signal.raise_signal(signal.SIGTERM)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MixedPrecision, "forward", forward)
    assert train_here(flags_for(tmp_path, max_steps=9, save_every=0, val_every=0)).status == 128 + 15
    assert len(passes) == 5 * 4 + 1


def made(step: int, began: float = 0.0) -> Update:
    return Update(step, began, {"matrix": 0.1}, torch.ones(1), torch.ones(()), torch.ones(()))


def test_the_wait_for_an_update_before_an_evaluation_is_part_of_it(one_update_late):
    """Otherwise the watch would call an update done that the device may still be busy with."""
    several = train.Updates(None, None, None, ALONE)
    for step, is_awaited in ((1, False), (2, False), (3, True)):
        several.add(made(step), is_awaited=is_awaited)
    assert one_update_late == [1, 1, 0]


@pytest.mark.parametrize(
    ("ahead", "begins", "ends", "seconds"),
    [
        (0, (0, 5, 12), (4, 9, 15), [4, 4, 3]),  # an evaluation lies between two updates
        (1, (0, 1, 5), (4, 8, 13), [4, 4, 5]),  # each is asked for while the device is busy with the one before
    ],
)
def test_an_update_takes_the_time_from_the_end_of_the_one_before(monkeypatch, ahead, begins, ends, seconds):
    recorded, clock = [], iter(ends)
    monkeypatch.setattr(updates.time, "perf_counter", lambda: next(clock))
    log = SimpleNamespace(training=lambda step, seconds, row, left_out: recorded.append(seconds))
    several = updates.Updates(log, None, SimpleNamespace(dtype="float32", skip_nonfinite=0), ALONE)
    several.ahead = ahead
    for step, began in enumerate(begins, start=1):
        several.add(made(step, began), is_awaited=False)
        several.record(everything=step == 3)
    assert recorded == seconds


def test_figures_leave_a_gpu_without_a_wait(monkeypatch):
    """The copy goes on beside the process, and an event says when it is there."""
    assert updates.Updates(None, None, None, replace(ALONE, device=torch.device("cuda", 0))).ahead == 1
    assert updates.Updates(None, None, None, ALONE).ahead == 0
    calls, real = [], torch.Tensor.to

    def to(tensor, *args, **kwargs):
        calls.append(("to", args, kwargs))
        return real(tensor, "cpu")

    class Event:
        def record(self):
            calls.append("record")

        def synchronize(self):
            calls.append("synchronize")

    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    update = made(1)
    assert calls == [("to", ("cpu",), {"non_blocking": True}), "record"]
    assert update.is_finite and calls[2:] == ["synchronize"]


# ---------------------------------------------------------------- Muon


def test_muon_without_the_flag_of_an_update_steps_as_with_one_that_is_0():
    steps = []
    for found_inf in (None, torch.zeros(())):
        p = torch.nn.Parameter(torch.arange(12.0).view(3, 4))
        p.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
        muon = Muon([p], lr=0.1, weight_decay=0.1)
        if found_inf is not None:
            muon.found_inf = found_inf
        muon.step()
        steps.append(p.detach().clone())
    assert torch.equal(*steps)


# ---------------------------------------------------------------- float16


@pytest.fixture(scope="module")
def half(flags_for, tmp_path_factory) -> Path:
    """A run in float16 whose loss scale begins so high that the first gradients overflow."""
    out_dir = tmp_path_factory.mktemp("half")
    with first_scale(2.0**30):
        assert train_here(flags_for(out_dir, dtype="float16", max_steps=16, val_every=8, save_every=8)).status == 0
    return out_dir


@contextmanager
def first_scale(scale: float, **changes):
    """Loss scales begin at `scale`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=scale, **changes))
        yield


def test_float16_leaves_overflows_out_and_halves_the_scale(half):
    rows = rows_of(half, "loss_scale")
    skipped = [row for row in rows if "skipped" in row]
    assert len(rows) == 16 and skipped and [row["skipped"] for row in skipped] == list(range(1, len(skipped) + 1))
    assert [row["loss_scale"] for row in skipped] == [2.0 ** (30 - i) for i in range(len(skipped))]
    assert not any("train_loss" in row for row in skipped)
    scales = {row["loss_scale"] for row in rows if "train_loss" in row}
    assert scales == {2.0 ** (30 - len(skipped))}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_float16_trains_what_float32_trains_whatever_the_scale(flags_for, tmp_path, optimizer):
    """The norm and Muon see the true gradient, and clipping acts on it."""
    changes = {"max_steps": 5, "val_every": 0, "save_every": 0, "grad_clip": 0.5, "optimizer": optimizer}
    runs = {}
    for name, dtype, scale in (("single", "float32", 1.0), ("half", "float16", 2.0**10), ("other", "float16", 2.0**14)):
        with first_scale(scale):
            assert train_here(flags_for(tmp_path / name, dtype=dtype, **changes)).status == 0
        runs[name] = [(row["train_loss"], row["grad_norm"]) for row in rows_of(tmp_path / name)]
        assert len(runs[name]) == 5
    torch.testing.assert_close(torch.tensor(runs["half"]), torch.tensor(runs["single"]), rtol=0.01, atol=0)
    torch.testing.assert_close(torch.tensor(runs["half"]), torch.tensor(runs["other"]), rtol=0.005, atol=0)


def test_muon_sees_gradients_that_are_0_in_float16(flags_for, tmp_path):
    cfg = read_config(flags_for(tmp_path, dtype="float16", optimizer="muon"), train.CONFIGS, say=lambda line: None)
    model = Transformer(cfg.model)
    muon = build_optimizers(model, cfg)[1]
    for p in model.parameters():
        p.grad = 1e-9 * torch.randn(p.shape)
    weight = model.layers[0].attention.wq.weight
    before = weight.detach().clone()
    muon.step()
    assert (weight - before).norm() > 0.1 * cfg.muon_lr


def test_float16_resumes_bit_for_bit_with_its_scale(half, flags_for, tmp_path):
    flags = flags_for(tmp_path / "run", dtype="float16", max_steps=16, val_every=8, save_every=8)
    with first_scale(2.0**30), stop_at(10):
        assert train_here(flags).status == 128 + 15
    assert train_here([*flags, "--resume", "True"]).status == 0
    assert_same_bits(half, tmp_path / "run", first_step=9, last_step=16)
    assert rows_of(half, "loss_scale")[-1]["loss_scale"] == rows_of(tmp_path / "run", "loss_scale")[-1]["loss_scale"]
    state = json.loads((tmp_path / "run/checkpoints/step_00000016/training_state/state.json").read_text())
    assert state["loss_scale"]["scale"] == rows_of(half, "loss_scale")[-1]["loss_scale"]


def test_ranks_agree_on_an_overflow(flags_for, tmp_path):
    scale = "import functools, torch, records\nrecords.peak_flops = lambda *args: (1e12, 'measured')\n"
    scale += "torch.amp.GradScaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**24)\n"
    script = driver(tmp_path / "driver", scale + RECORD)
    flags = flags_for(tmp_path / "run", dtype="float16", max_steps=8, val_every=0)
    results = launch(script, flags, ranks=2)
    assert [result.status for result in results] == [0, 0], results[1].err
    assert 1 < len(rows_of(tmp_path / "run", "skipped")) < 8
    hashes = [noted(script, "hashes", rank) for rank in range(2)]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 8


class Spoilt(torch.amp.GradScaler):
    """From the second update on, no scale keeps the gradient finite."""

    updates = 1

    def unscale_(self, optimizer):
        if self.updates >= 2:
            optimizer.param_groups[0]["params"][0].grad[0, 0] = INF
        super().unscale_(optimizer)

    def update(self):
        self.updates += 1
        super().update()


def test_a_gradient_that_no_scale_mends_stops_the_run(flags_for, tmp_path, monkeypatch):
    """The scale falls to 1. Then it is no overflow."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(Spoilt, init_scale=4.0))
    result = train_here(flags_for(tmp_path, dtype="float16", val_every=0))
    assert_refused(result, "step 4", "the gradient is inf")
    assert [row["loss_scale"] for row in rows_of(tmp_path, "skipped")] == [4.0, 2.0]


def test_a_norm_that_is_not_finite_although_the_gradient_is_stops_the_run(flags_for, tmp_path):
    """The scaler looks at the gradient alone, so it does not halve the scale."""
    with broken_gradients(*range(3, 40)), first_scale(8.0):
        result = train_here(flags_for(tmp_path, dtype="float16", val_every=0))
    assert_refused(result, "step 4", "the gradient is nan")
    assert [row["loss_scale"] for row in rows_of(tmp_path, "skipped")] == [8.0]


@pytest.mark.parametrize(
    "wrong",
    [{"scale": "8"}, {"scale": 8.0, "_growth_tracker": -1}, {"scale": 0.0, "_growth_tracker": 0}, [1], {"other": 1.0}],
)
def test_a_damaged_loss_scale_is_named(half, flags_for, tmp_path, wrong):
    shutil.copytree(half, tmp_path / "run")
    rewrite_state(tmp_path / "run/checkpoints/step_00000016", loss_scale=wrong)
    result = train_here(flags_for(tmp_path / "run", dtype="float16", max_steps=17, resume=True))
    assert_refused(result, "damaged", "loss_scale" if isinstance(wrong, list) else "")


def test_figures_of_an_update():
    one = torch.ones(())
    done = Update(3, 0.0, {"matrix": 0.1}, torch.tensor([1.0, 2.0]), 0.5 * one, 4 * one)
    assert (done.losses, done.grad_norm, done.loss_scale) == ([1.0, 2.0], 0.5, 4.0)
    assert done.is_finite and not done.has_overflowed and done.is_left_out == 0 and done.cause() == ""
    assert done.row(0, "float16") == {"train_loss": 1.5, "lr": 0.1, "loss_scale": 4.0, "grad_norm": 0.5}
    overflow = Update(3, 0.0, {"matrix": 0.1}, torch.tensor([1.0, 2.0]), INF * one, 4 * one)
    assert overflow.has_overflowed and overflow.is_left_out == 1 and "float16 at a loss scale of 4" in overflow.cause()
    for losses, scale in (([1.0, NAN], 4), ([1.0, 2.0], 1)):
        assert not Update(3, 0.0, {}, torch.tensor(losses), INF * one, scale * one).has_overflowed
