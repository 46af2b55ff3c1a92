"""records.py: the rows of a run, its samples, and what TensorBoard gets."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from records import MetricsLog, drop_after, note_start, read_rows, recorded_at, start_tensorboard
from train import ORIGINAL


def test_metrics_are_written_at_once(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"step": 1, "train_loss": 2.5})
    log.write({"step": 2, "train_loss": 2.0})
    # The file is read before it is closed: a killed run must lose nothing.
    assert read_rows(tmp_path) == [{"step": 1, "train_loss": 2.5}, {"step": 2, "train_loss": 2.0}]
    log.close()


def test_rows_beyond_the_checkpoint_and_damaged_lines_are_dropped(tmp_path):
    rows = [json.dumps({"step": step}).encode() for step in (0, 1, 2, 2, 3, 4)]
    rows[1:1] = [b"[1]", b"7", b"null", b'{"val_loss": 1.0}', b'{"step": null}', b"\0\0\0\0", b"\xff\xfe{"]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(rows) + b'\n{"step": 5, "tra')
    drop_after(tmp_path, last_step=2)
    log = MetricsLog(tmp_path)
    log.write({"step": 3, "new": True})
    log.close()
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kept == [{"step": 0}, {"step": 1}, {"step": 2}, {"step": 2}, {"step": 3, "new": True}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_evaluations_that_were_recorded_at_a_step_are_known(tmp_path):
    assert recorded_at(tmp_path, 2) == set()
    log = MetricsLog(tmp_path)
    log.write({"step": 2, "val_loss": 2.0, "val_bpb": 1.0})
    log.write({"step": 2, "hellaswag_acc": 0.25})
    log.write({"step": 4, "val_loss": 2.0})
    log.samples(6, 60, ["abc"])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "val_loss": 2.0, "val_b')  # a kill cut this line short
    assert recorded_at(tmp_path, 1) == set()
    assert recorded_at(tmp_path, 2) == {"val_loss", "hellaswag_acc"}
    assert recorded_at(tmp_path, 4) == {"val_loss"}
    assert recorded_at(tmp_path, 6) == {"samples_end"}


def samples_of_steps(folder: Path) -> list[str]:
    lines = (folder / "samples.txt").read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("===== step ") for line in lines if line.startswith("=====")]


@pytest.mark.parametrize(("last_step", "kept"), [(6, ["2", "4"]), (4, ["2", "4"]), (3, ["2"]), (1, []), (-1, [])])
def test_samples_beyond_the_checkpoint_are_dropped(tmp_path, last_step, kept):
    log = MetricsLog(tmp_path)
    for step in (2, 4):
        log.samples(step, 10 * step, ["東京", "Once upon\na time"])
    log.close()
    drop_after(tmp_path, last_step)
    assert samples_of_steps(tmp_path) == kept
    log = MetricsLog(tmp_path)
    log.samples(8, 80, ["again"])
    log.close()
    assert samples_of_steps(tmp_path) == [*kept, "8"]
    assert read_rows(tmp_path)[-1]["samples_end"] == (tmp_path / "samples.txt").stat().st_size
    drop_after(tmp_path, 8)
    assert samples_of_steps(tmp_path) == [*kept, "8"]


def test_samples_that_a_kill_left_without_a_row_are_dropped(tmp_path):
    log = MetricsLog(tmp_path)
    log.samples(2, 20, ["a"])
    with open(tmp_path / "samples.txt", "a") as file:
        file.write("===== step 4\nhal")
    drop_after(tmp_path, 4)
    assert samples_of_steps(tmp_path) == ["2"] and recorded_at(tmp_path, 4) == set()


@pytest.mark.parametrize(("last_step", "kept"), [(4, ["2"]), (-1, [])], ids=["resumed", "begun anew"])
def test_samples_of_an_older_version_which_noted_no_sizes_stay_in_a_resumed_run(tmp_path, last_step, kept):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n')
    (tmp_path / "samples.txt").write_text("===== step 2\nabc\n\n")
    drop_after(tmp_path, last_step)
    assert samples_of_steps(tmp_path) == kept


def test_run_json_lists_the_starts_of_a_run_and_begins_anew_with_a_new_one(tmp_path):
    start = {"time": "2026-01-02T03:04:05+00:00", "device": "cpu", "processes": 1, "torch": "2.9.0"}
    first, second, third = (start | {"after_step": after} for after in (None, 5, 9))

    def starts_after(*noted):
        for start in noted:
            note_start(tmp_path, 1000, start)
        return json.loads((tmp_path / "run.json").read_text())

    assert starts_after(first, second, third) == {"parameters": 1000, "starts": [first, second, third]}
    assert starts_after(first) == {"parameters": 1000, "starts": [first]}
    (tmp_path / "run.json").unlink()  # a run of an older version has none
    assert starts_after(second) == {"parameters": 1000, "starts": [second]}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("text", ['{"name": "another program"}', '{"parameters": 10, "star', ""])
def test_a_run_json_that_no_run_has_written_is_left_alone(tmp_path, capsys, text):
    (tmp_path / "run.json").write_text(text)
    start = {"time": "2026-01-02T03:04:05+00:00", "device": "cpu", "processes": 1, "torch": "2.9.0"}
    note_start(tmp_path, 1000, start | {"after_step": None})
    assert (tmp_path / "run.json").read_text() == text
    err = capsys.readouterr().err
    assert err.startswith(f"{tmp_path / 'run.json'}: no run has written this file") and err.count("\n") == 1


def test_tensorboard_holds_every_metric_and_the_samples(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = replace(ORIGINAL, out_dir=str(tmp_path), tensorboard=True)
    for last_step, steps in ((-1, (1, 2, 3)), (1, (2,))):  # the second run goes on after step 1
        log = MetricsLog(tmp_path, tensorboard=start_tensorboard(cfg, last_step))
        for step in steps:
            log.write({"step": step, "tokens": 10 * step, "train_loss": 1.0 / step - last_step})
            log.write({"step": step, "config_change": {"max_lr": [0.1, 0.2]}, "shares": {}, "note": "text"})
        log.samples(steps[-1], 30, ["Once upon"])
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    rows = [(event.step, event.value) for event in events.Scalars("train_loss")]
    assert rows == [(1, 2.0), (2, -0.5)]
    assert [event.step for event in events.Tensors("sample 0/text_summary")][-1] == 2
    assert start_tensorboard(replace(cfg, tensorboard=False), 0) is None


def test_a_missing_tensorboard_is_said_before_the_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"tensorboard=True: .*; `pip install tensorboard`, or leave the flag out"):
        start_tensorboard(replace(ORIGINAL, tensorboard=True), 0)
