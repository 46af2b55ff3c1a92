"""checkpoints.py: checkpoints are whole or absent, found and pruned, and code in them does not run."""

import os
import pickle
import random
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_model_utils import TIED, TINY

from checkpoints import (
    checkpoint_bytes,
    checkpoints_in,
    find_checkpoint,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from config import config_as_dict
from model import Transformer
from model_utils import load_model
from optimizers import build_optimizers
from train import ORIGINAL

FULL, BROKEN = OSError(28, "No space left on device"), RuntimeError("unexpected pos 6784 vs 6678")


def checkpoint_at(step: int, model: Transformer | None = None) -> dict:
    model = model or Transformer(TINY)
    return {"step": step, "model": model.state_dict(), "config": {"model": config_as_dict(model.config)}}


def save(folder: Path, step: int, *, keep: int = 100, is_best: bool = False) -> Path:
    return save_checkpoint(folder, {"step": step, "tensor": torch.full((1000,), step)}, keep=keep, is_best=is_best)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_checkpoint_brings_back_model_optimizers_and_random_state(tmp_path, optimizer):
    model = Transformer(TINY)
    fields = {"max_lr": 1e-3, "muon_lr": 0.02, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    cfg = replace(ORIGINAL, optimizer=optimizer, **fields)
    optimizers = build_optimizers(model, cfg)
    tokens = torch.randint(512, (2, 16))
    model(tokens, tokens).backward()
    for one in optimizers:
        one.step()
    extra = {"optimizers": [one.state_dict() for one in optimizers], "random_state": random_state()}
    path = save_checkpoint(tmp_path, checkpoint_at(7, model) | extra, keep=1, is_best=False)
    drawn = torch.rand(3), random.random()

    loaded, rest = load_model(path, "cpu")
    assert rest.keys() == checkpoint_at(7, model).keys() - {"model"} | {"format_version", "random_state"}
    checkpoint = load_checkpoint(path, "cpu")
    assert checkpoint["step"] == 7 and loaded.config == TINY and not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    fresh = build_optimizers(loaded, cfg)
    for one, state, saved in zip(fresh, checkpoint["optimizers"], extra["optimizers"], strict=True):
        one.load_state_dict(state)
        torch.testing.assert_close(one.state_dict()["state"], saved["state"], rtol=0, atol=0)
    restore_random_state(checkpoint["random_state"])
    assert torch.equal(torch.rand(3), drawn[0]) and random.random() == drawn[1]


@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bytes_of_a_checkpoint_are_known_before_the_first_step(tmp_path, optimizer, config):
    model = Transformer(config)
    cfg = replace(ORIGINAL, optimizer=optimizer, model=config)
    optimizers = build_optimizers(model, cfg)
    expected = checkpoint_bytes(model, optimizers)
    tokens = torch.randint(512, (2, 16))
    model(tokens, tokens).backward()
    for one in optimizers:
        one.step()
    extra = {"optimizers": [one.state_dict() for one in optimizers]}
    size = save_checkpoint(tmp_path, checkpoint_at(7, model) | extra, keep=1, is_best=False).stat().st_size
    assert expected <= size < expected + 40_000  # the file also holds names


def test_tied_weights_are_tied_after_loading(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint_at(1, Transformer(TIED)), keep=1, is_best=False)
    loaded, _ = load_model(path, "cpu")
    assert loaded.output.weight is loaded.tok_embeddings.weight


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    for step in (8, 9, 10, 11):
        save(tmp_path, step, keep=2, is_best=step == 8)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step_00000010.pt", "step_00000011.pt"]
    assert load_checkpoint(tmp_path / "best.pt", "cpu")["step"] == 8
    save(tmp_path, 12, keep=2, is_best=True)
    assert load_checkpoint(tmp_path / "best.pt", "cpu")["step"] == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "step_00000011.pt", "step_00000012.pt"]


def test_best_is_a_copy_where_links_are_not_possible(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError("this file system has no hard links")

    monkeypatch.setattr(os, "link", refuse)
    save(tmp_path, 1, is_best=True)
    assert load_checkpoint(tmp_path / "best.pt", "cpu")["step"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "step_00000001.pt"]


def chained(error: Exception, context: Exception | None) -> Exception:
    error.__context__ = context
    return error


@pytest.mark.parametrize(
    "failure",
    [
        chained(OSError(*FULL.args), None),
        chained(RuntimeError(*BROKEN.args), FULL),  # torch's writer notices it when it ends
        chained(OSError(*FULL.args), chained(RuntimeError(*BROKEN.args), FULL)),  # and closing the file fails too
    ],
    ids=["plain", "from torch's writer", "from closing the file"],
)
def test_failed_save_says_why_and_leaves_only_the_older_checkpoint(tmp_path, monkeypatch, failure):
    older = save(tmp_path, 1, is_best=True)
    before = older.read_bytes()

    def half_a_file(checkpoint, file):
        file.write(b"x" * 100)
        raise failure

    monkeypatch.setattr(torch, "save", half_a_file)
    with pytest.raises(OSError, match=r"00002.pt: could not be written .*last good checkpoint is .*00001.pt") as told:
        save(tmp_path, 2, keep=1)
    assert "No space left" in str(told.value) and "unexpected pos" not in str(told.value)
    assert older.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "step_00000001.pt"]


def test_checkpoint_is_found_by_file_folder_and_run(tmp_path):
    folder = tmp_path / "checkpoints"
    newest = [save(folder, step) for step in (9, 100, 20)][1]
    assert find_checkpoint(newest) == newest
    assert find_checkpoint(folder) == find_checkpoint(tmp_path) == newest
    with pytest.raises(FileNotFoundError, match="nowhere: no checkpoint"):
        find_checkpoint(tmp_path / "nowhere")


class Harmful:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    torch.save({"format_version": 1, "step": 1, "model": Harmful(tmp_path / "ran")}, tmp_path / "step_00000001.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Harmful(tmp_path / "ran"), protocol=2))
    for name in ("step_00000001.pt", "bare.pt"):
        with pytest.raises(ValueError, match=f"{name}: not a readable checkpoint"):
            load_checkpoint(tmp_path / name, "cpu")
        assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "step_00000001.pt", weights_only=False)  # this shows that the code can run
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("cut", [0, 10, 2000, -1], ids=lambda cut: f"to {cut} bytes")
def test_checkpoint_cut_short_is_refused_by_name(tmp_path, cut):
    path = save(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"step_00000001.pt: not a readable checkpoint .*older one"):
        load_checkpoint(path, "cpu")


def test_checkpoint_with_a_flipped_bit_is_refused(tmp_path):
    """The bit is in the middle of a tensor, where only the check sum can tell."""
    path = save(tmp_path, 1)
    contents = bytearray(path.read_bytes())
    tensor = contents.find(struct.pack("<q", 1) * 1000)
    contents[tensor + 4000] ^= 1
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=r"step_00000001.pt: not a readable checkpoint .*older one"):
        load_checkpoint(path, "cpu")


@pytest.mark.parametrize("content", [{"step": 1}, [1, 2]])
def test_other_torch_files_are_no_checkpoints(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: not a readable checkpoint"):
        load_checkpoint(tmp_path / "other.pt", "cpu")


def test_checkpoint_of_another_format_is_not_called_damaged(tmp_path):
    torch.save({"format_version": 99}, tmp_path / "newer.pt")
    with pytest.raises(ValueError, match=r"newer\.pt: of format 99, this code reads 1; take the code that wrote it"):
        load_checkpoint(tmp_path / "newer.pt", "cpu")


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, PermissionError])
def test_trouble_with_the_machine_is_not_taken_for_a_damaged_file(tmp_path, monkeypatch, error):
    """A user who is told to delete the file would lose a good one."""
    path = save(tmp_path, 1)

    def load(*args, **kwargs):
        raise error("no room")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(error, match="no room"):
        load_checkpoint(path, "cpu")


def test_a_cpu_without_memory_is_not_taken_for_a_damaged_file(tmp_path, monkeypatch):
    path = save(tmp_path, 1)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: torch.empty(2**60, dtype=torch.uint8))
    with pytest.raises(MemoryError, match=r"step_00000001.pt: does not fit into memory .*allocate memory"):
        load_checkpoint(path, "cpu")


def test_missing_checkpoint_raises_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none.pt", "cpu")
