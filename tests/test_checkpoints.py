"""checkpoints.py and model_folders.py: checkpoints are whole or absent, found and pruned, and no file is a pickle."""

import json
import math
import os
import stat
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import read_checkpoint, size_of
from safetensors import SafetensorError, safe_open
from test_model_utils import TIED, TINY

import checkpoints
import model_folders
from checkpoints import (
    CheckpointSaver,
    TrainState,
    checkpoint_bytes,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from config import config_as_dict
from model import Transformer
from model_folders import best_in, checkpoints_in, find_checkpoint, verify_checkpoint
from model_utils import load_model
from optimizers import build_optimizers, with_recipe
from train import ORIGINAL


class Windows:
    """Stands in for the training data."""

    def state(self) -> dict:
        return {"seed": 1}

    def check_state(self, state: dict) -> None:
        assert state == {"seed": 1}


def trained(optimizer: str = "adamw", config=TINY) -> tuple[TrainState, object]:
    """A run after two updates, and its configuration."""
    torch.manual_seed(0)
    cfg = with_recipe(replace(ORIGINAL, optimizer=optimizer, model=config, dtype="float32"))
    model = Transformer(config)
    optimizers = build_optimizers(model, cfg)
    for _ in range(2):
        update(model, optimizers)
    return TrainState(model, optimizers, Windows(), step=7, best_val_loss=2.5, run_id="abc"), cfg


def update(model, optimizers):
    tokens = torch.randint(512, (2, 16), generator=torch.Generator().manual_seed(1))
    model(tokens, tokens).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def save(folder: Path, step: int, *, keep: int = 100, is_best: bool = False) -> Path:
    torch.manual_seed(step)
    checkpoint = {"step": step, "model": Transformer(TINY).state_dict()}
    checkpoint |= {"config": {"model": config_as_dict(TINY), "dtype": "float32"}}
    return save_checkpoint(folder, checkpoint, keep=keep, is_best=is_best)


@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_holds_the_bits_of_the_saved_one(tmp_path, optimizer, config):
    state, cfg = trained(optimizer, config)
    path = save_checkpoint(tmp_path, state.as_checkpoint(cfg, "fingerprint"), keep=1, is_best=False)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    model = Transformer(config)
    fresh = TrainState(model, build_optimizers(model, cfg), Windows())
    fresh.resume(path, cfg)
    assert (fresh.step, fresh.best_val_loss, fresh.run_id) == (7, 2.5, "abc")
    assert torch.equal(torch.rand(3), drawn)
    for _ in range(2):
        for one in (state, fresh):
            update(one.model, one.optimizers)
        for (name, weight), other in zip(state.model.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(weight, other), name


def test_a_checkpoint_from_before_each_role_had_a_rate_is_compared_too(tmp_path):
    """It has none of the newer fields. AdamW never used the `muon_lr` that it holds."""
    state, cfg = trained()
    saved = state.as_checkpoint(cfg, "fingerprint")
    for name in ("embedding_lr", "output_lr", "norm_lr", "tf32"):
        del saved["config"][name]
    path = save_checkpoint(tmp_path, saved | {"config": saved["config"] | {"muon_lr": 0.02}}, keep=1, is_best=False)
    assert state.resume(path, cfg) == {}
    with pytest.raises(ValueError, match=r"embedding_lr was None, is 0\.3"):
        state.resume(path, replace(cfg, embedding_lr=0.3))
    with pytest.raises(ValueError, match="tf32 was False, is True"):
        state.resume(path, replace(cfg, tf32=True))


def test_moments_do_not_depend_on_the_order_of_the_parameters(tmp_path):
    state, cfg = trained()
    path = save_checkpoint(tmp_path, state.as_checkpoint(cfg, "fingerprint"), keep=1, is_best=False)
    model = Transformer(TINY)
    optimizer = torch.optim.AdamW(list(model.parameters())[::-1])
    checkpoints.load_moments(path, model, [optimizer])
    for name, parameter in model.named_parameters():
        saved = dict(state.model.named_parameters())[name]
        for key, value in state.optimizers[0].state[saved].items():
            assert torch.equal(optimizer.state[parameter][key], value), (name, key)


def test_no_best_loss_yet_is_not_infinity_in_json(tmp_path):
    state, cfg = trained()
    state.best_val_loss = math.inf
    path = save_checkpoint(tmp_path, state.as_checkpoint(cfg, "fingerprint"), keep=1, is_best=False)
    assert json.loads((path / "training_state/state.json").read_text(), parse_constant=pytest.fail)
    state.best_val_loss = 1.0
    state.resume(path, cfg)
    assert state.best_val_loss == math.inf


@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bytes_of_a_checkpoint_are_known_before_the_first_step(tmp_path, optimizer, config):
    state, cfg = trained(optimizer, config)
    expected = checkpoint_bytes(state.model, state.optimizers)
    path = save_checkpoint(tmp_path, state.as_checkpoint(cfg, "fingerprint"), keep=1, is_best=False)
    tokenizer = (path / "tokenizer.json").stat().st_size
    assert expected <= size_of(path) - tokenizer < expected + 60_000  # the files also hold names and random states


def test_a_checkpoint_holds_the_promised_files_with_plain_modes(tmp_path):
    state, cfg = trained()
    mask = os.umask(0o027)
    try:
        path = save_checkpoint(tmp_path, state.as_checkpoint(cfg, "fingerprint"), keep=1, is_best=True)
    finally:
        os.umask(mask)
    names = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    names |= {"training_state/optimizer.safetensors", "training_state/state.json"}
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    assert files.keys() == names | {"checkpoint.json"}
    assert json.loads(files["checkpoint.json"].read_text())["files"].keys() == names
    assert {stat.S_IMODE(file.stat().st_mode) for file in files.values()} == {0o640}
    with safe_open(path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.float32"}  # noqa: SIM118
    assert (tmp_path / "best").read_text() == "step_00000007\n" and best_in(tmp_path) == path
    assert read_checkpoint(path)["step"] == 7


def test_tied_weights_are_tied_after_loading(tmp_path):
    state, cfg = trained(config=TIED)
    path = save_checkpoint(tmp_path, state.as_checkpoint(cfg, "fingerprint"), keep=1, is_best=False)
    loaded, known = load_model(path, "cpu")
    assert loaded.output.weight is loaded.tok_embeddings.weight
    assert known == {"step": 7, "dtype": cfg.dtype} and not loaded.training


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    for step in (8, 9, 10, 11):
        save(tmp_path, step, keep=2, is_best=step == 8)
    kept = ["step_00000008", "step_00000010", "step_00000011"]
    assert [path.name for path in checkpoints_in(tmp_path)] == kept
    assert best_in(tmp_path).name == "step_00000008"
    save(tmp_path, 12, keep=2, is_best=True)
    kept = ["best", "step_00000011", "step_00000012"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    assert find_checkpoint(tmp_path / "best").name == "step_00000012"


def test_a_step_may_be_saved_again(tmp_path):
    save(tmp_path, 1)
    first = (tmp_path / "step_00000001/model.safetensors").stat().st_ino
    save(tmp_path, 1)
    assert (tmp_path / "step_00000001/model.safetensors").stat().st_ino != first
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


@pytest.mark.parametrize("place", ["model.safetensors", "optimizer.safetensors", "state.json", "rename"])
def test_a_failed_save_says_why_and_leaves_only_the_older_checkpoint(tmp_path, monkeypatch, place):
    older = save(tmp_path, 1, is_best=True)
    before = {path: path.read_bytes() for path in older.rglob("*") if path.is_file()}
    state, cfg = trained()

    def full(original, name):
        def write(*args, **kwargs):
            if any(name in str(arg) for arg in args if isinstance(arg, Path | str)):
                raise SafetensorError("I/O error: No space left on device (os error 28)")
            return original(*args, **kwargs)

        return write

    for module, function in ((checkpoints, "save_file"), (model_folders, "save_file"), (checkpoints, "write_json")):
        monkeypatch.setattr(module, function, full(getattr(module, function), place))
    if place == "rename":
        monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"00007: could not be written .*No space left.*last good checkpoint is .*00001"):
        save_checkpoint(tmp_path, state.as_checkpoint(cfg, "fingerprint"), keep=1, is_best=True)
    assert {path: path.read_bytes() for path in older.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step_00000001"]


def test_what_a_killed_save_left_is_cleared_and_never_found(tmp_path):
    left = tmp_path / ".step_00000002.123.tmp"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    (tmp_path / "step_00000003").mkdir()  # not whole: it has no checkpoint.json, and it is not ours to delete
    (tmp_path / "step_00000003/notes.txt").write_text("mine")
    assert checkpoints_in(tmp_path) == []
    save(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]


def test_checkpoint_is_found_by_folder_and_run(tmp_path):
    folder = tmp_path / "checkpoints"
    newest = [save(folder, step) for step in (9, 100, 20)][1]
    assert find_checkpoint(newest) == find_checkpoint(folder) == find_checkpoint(tmp_path) == newest
    with pytest.raises(FileNotFoundError, match="nowhere: no checkpoint"):
        find_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "training_state/state.json", "config.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_damaged_file_is_named(tmp_path, name, damage):
    path = save(tmp_path, 1)
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        (path / name).unlink()
    else:
        (path / name).write_bytes(content[:-10] if damage == "cut" else content)
    with pytest.raises(ValueError, match=rf"{name}: missing or changed; delete .*step_00000001 and use an older"):
        verify_checkpoint(path, training_state=True)
    if not name.startswith("training_state"):
        with pytest.raises(ValueError, match=f"{name}: missing or changed"):
            load_model(path, "cpu")
    else:
        verify_checkpoint(path, training_state=False)


def test_a_checkpoint_of_another_format_is_not_called_damaged(tmp_path):
    path = save(tmp_path, 1)
    mark = json.loads((path / "checkpoint.json").read_text())
    (path / "checkpoint.json").write_text(json.dumps(mark | {"format_version": 99}))
    with pytest.raises(ValueError, match=r"00001: of format 99, this code reads 2; take the code that wrote it"):
        load_model(path, "cpu")
    for garbage in ("{", "[]", '{"format_version": 2}'):
        (path / "checkpoint.json").write_text(garbage)
        with pytest.raises(ValueError, match=r"checkpoint\.json: damaged"):
            load_model(path, "cpu")


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path):
    """A pickle begins with byte 128, or is a zip archive of them."""
    state, cfg = trained()
    path = save_checkpoint(tmp_path, state.as_checkpoint(cfg, "fingerprint"), keep=1, is_best=False)
    for file in path.rglob("*"):
        if file.is_file():
            if file.suffix == ".safetensors":
                header = int(np.frombuffer(file.read_bytes()[:8], "<u8")[0])
                json.loads(file.read_bytes()[8 : 8 + header])
            else:
                json.loads(file.read_text(encoding="utf-8"))


# ---------------------------------------------------------------- saves in the background


def test_a_save_takes_what_the_tensors_were_when_it_began(tmp_path, monkeypatch):
    """Training goes on while the files are written."""
    state, cfg = trained()
    go_on, real = threading.Event(), checkpoints.save_checkpoint

    def waits(*args, **kwargs):
        assert go_on.wait(20)
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoints, "save_checkpoint", waits)
    before = {name: parameter.detach().clone() for name, parameter in state.model.named_parameters()}
    with CheckpointSaver(tmp_path, keep=2) as saver:
        saver.save(state.as_checkpoint(cfg, "tokens"), is_best=True)
        assert not checkpoints_in(tmp_path)  # save has returned, and nothing is written yet
        update(state.model, state.optimizers)
        go_on.set()
    [path] = checkpoints_in(tmp_path)
    saved = read_checkpoint(path)["model"]
    for name, weight in before.items():
        assert torch.equal(saved[name], weight) and not torch.equal(state.model.get_parameter(name), weight)


def test_the_next_save_waits_for_the_one_in_progress(tmp_path, monkeypatch):
    state, cfg = trained()
    running, real = [], checkpoints.save_checkpoint

    def slow(*args, **kwargs):
        running.append(1)
        assert len(running) == 1
        time.sleep(0.3)
        real(*args, **kwargs)
        running.pop()

    monkeypatch.setattr(checkpoints, "save_checkpoint", slow)
    with CheckpointSaver(tmp_path, keep=5) as saver:
        for step in (1, 2, 3):
            state.step = step
            saver.save(state.as_checkpoint(cfg, "tokens"), is_best=False)
    assert len(checkpoints_in(tmp_path)) == 3


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    state, cfg = trained()
    saver = CheckpointSaver(tmp_path, keep=1)
    saver.save(state.as_checkpoint(cfg, "tokens"), is_best=False)
    saver.finish()
    with torch.no_grad():
        state.model.layers[0].attention.wq.weight[0, 0] = math.inf
    state.step = 8
    with pytest.raises(ValueError, match=r"step 8: layers.0.attention.wq.weight holds numbers that .*step_00000007"):
        saver.save(state.as_checkpoint(cfg, "tokens"), is_best=False)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step_00000007"]


def test_the_random_state_survives_json():
    torch.manual_seed(3)
    state = json.loads(json.dumps(random_state()))
    drawn = torch.rand(3)
    restore_random_state(state)
    assert torch.equal(torch.rand(3), drawn)
