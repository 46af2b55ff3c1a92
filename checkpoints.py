"""A checkpoint is a folder that any program for Hugging Face's models reads as it lies there. No code in it is run.

    step_00001000/
        model.safetensors             weights in float32, with Hugging Face's names and order (layouts.py)
        config.json, generation_config.json, tokenizer.json, tokenizer_config.json
        training_state/
            optimizer.safetensors     the optimizers' moments, by the names of our parameters
            state.json                step, position in the data, random state, configuration, best loss, run id
        checkpoint.json               format version, size and sha256 of each file; a folder without it is not whole

The folder is written under another name and renamed when all of it is on the disk. The file `best` beside the
checkpoints holds the name of the one with the lowest validation loss.
"""

import json
import math
import os
import platform
import random
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from config import Config, config_as_dict
from dataloaders import TrainWindows
from files import atomic_folder, atomic_write, check_free_space, sha256_of
from model import ModelConfig, Transformer
from model_folders import (
    BEST,
    CHECKPOINT_FORMAT_VERSION,
    MARK,
    best_in,
    checkpoints_in,
    load_weights,
    opened,
    verify_checkpoint,
    write_json,
    write_model,
)
from optimizers import Muon

MOMENTS, STATE = "training_state/optimizer.safetensors", "training_state/state.json"


# ---------------------------------------------------------------- folders


def save_checkpoint(folder: str | Path, checkpoint: dict, *, keep: int, is_best: bool) -> Path:
    """Write `folder/step_NNNNNNNN` whole or not at all, then delete all but the newest `keep` and the best one.

    Sharded models would gather their tensors here, one at a time.

    Args:
        checkpoint: "step"; "config", a configuration as plain data; "model", the weights by our names; "moments", those
            of the optimizers by our names; anything else is plain data.

    Raises:
        OSError: the folder could not be written (a full disk). The older checkpoints are untouched.
    """
    folder, model = Path(folder), ModelConfig(**checkpoint["config"]["model"])
    path = folder / f"step_{checkpoint['step']:08d}"
    _clear_leftovers(folder)
    try:
        with atomic_folder(path) as temporary:
            write_model(temporary, checkpoint["model"], model)
            (temporary / STATE).parent.mkdir()
            if moments := checkpoint.get("moments"):
                save_file({name: tensor.contiguous() for name, tensor in moments.items()}, temporary / MOMENTS)
            state = {key: value for key, value in checkpoint.items() if key not in ("model", "moments")}
            write_json(temporary / STATE, state)
            write_json(temporary / MARK, {"format_version": CHECKPOINT_FORMAT_VERSION, "files": _describe(temporary)})
        if is_best:
            with atomic_write(folder / BEST, "w") as file:
                file.write(path.name + "\n")
    except (OSError, SafetensorError) as error:
        last = checkpoints_in(folder)
        raise OSError(
            f"{path}: could not be written ({error}); make room or choose another --out_dir; "
            f"the last good checkpoint is {last[-1] if last else 'none'}"
        ) from error
    for old in checkpoints_in(folder)[:-keep]:
        if old != best_in(folder):
            os.replace(old, old.with_name(f".{old.name}.{os.getpid()}.tmp"))
    _clear_leftovers(folder)
    return path


def _clear_leftovers(folder: Path) -> None:
    """Delete what a killed save has left, and checkpoints that are no longer kept. Both have such names."""
    for leftover in folder.glob(".step_*.tmp"):
        shutil.rmtree(leftover)


def _describe(folder: Path) -> dict[str, dict]:
    """Size and sha256 of each file of a folder, by its path there."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARK)
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in paths
    }


# ---------------------------------------------------------------- the state of a run


@dataclass
class TrainState:
    """What a checkpoint holds of a run, and what a resumed run takes up again."""

    model: Transformer  # the bare model, not a wrapped one
    optimizers: list[torch.optim.Optimizer]
    windows: TrainWindows
    step: int = 0  # completed updates
    best_val_loss: float = math.inf
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])

    def as_checkpoint(self, cfg: Config, tokenizer_fingerprint: str) -> dict:
        """The state as plain data and tensors, for `save_checkpoint`."""
        return {
            "step": self.step,
            "model": dict(self.model.named_parameters()),
            "moments": moments(self.model, self.optimizers),
            "config": config_as_dict(cfg),
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "data": self.windows.state(),
            "random_state": random_state(),
            "best_val_loss": None if math.isinf(self.best_val_loss) else self.best_val_loss,
            "run_id": self.run_id,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }

    def check_room(self, folder: Path, cfg: Config) -> None:
        """Raises OSError unless the disk has room for the checkpoints that the rest of the run will write to `folder`.

        At most it holds the newest ones, the best one, and the next one while it is written.
        """
        if self.step >= cfg.max_steps:
            return
        saves = math.ceil(cfg.max_steps / cfg.save_every) - self.step // cfg.save_every if cfg.save_every else 1
        there = len(checkpoints_in(folder)) if self.step else 0  # if this run is new, an older run is moved aside
        count = max(1, min(saves, cfg.keep_checkpoints + 2 - there))
        try:
            check_free_space([(folder, count * checkpoint_bytes(self.model, self.optimizers))])
        except OSError as error:
            raise OSError(
                f"{folder}: will get up to {count} checkpoint{'s' if count > 1 else ''}, so it {error.strerror}, lower "
                "--keep_checkpoints, or choose another --out_dir"
            ) from error

    def resume(self, path: Path, cfg: Config) -> None:
        """Take up the run that saved the checkpoint at `path`.

        Raises:
            ValueError: the checkpoint is damaged, or it holds no run, or a run with another model, optimizer, masking
                or order of data.
        """
        verify_checkpoint(path, training_state=True)
        state = read_state(path)
        check_run(path, state, config_as_dict(cfg))
        self.windows.check_state(state["data"])
        load_weights(path, self.model)
        load_moments(path, self.model, self.optimizers)
        restore_random_state(state["random_state"])
        best = state["best_val_loss"]
        self.step, self.best_val_loss, self.run_id = state["step"], math.inf if best is None else best, state["run_id"]


def read_state(path: Path) -> dict:
    """The plain data of the run that saved a checkpoint. Empty for a folder of another program.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return {**json.loads((path / STATE).read_text(encoding="utf-8"))} if (path / STATE).is_file() else {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path / STATE}: damaged ({error}); use an older checkpoint") from error


def moments(model: Transformer, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """What the optimizers hold of each parameter, by its name: `layers.0.attention.wq.weight:exp_avg` and so on."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}:{key}": value
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_moments(path: Path, model: Transformer, optimizers: list[torch.optim.Optimizer]) -> None:
    """Give the optimizers the moments in a checkpoint. Their settings stay: a flag given when resuming must count.

    Raises:
        ValueError: the file is damaged, or it lacks a parameter of an optimizer.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    with opened(path / MOMENTS) as file:
        keys = set(file.keys())
        for optimizer in optimizers:
            for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
                name = names[parameter]
                found = sorted(key for key in keys if key.startswith(f"{name}:"))
                if not found:
                    raise ValueError(f"{path / MOMENTS}: holds nothing of {name}; use an older checkpoint")
                optimizer.state[parameter] = {
                    key.partition(":")[2]: file.get_tensor(key).to(parameter.device, copy=True) for key in found
                }


def checkpoint_bytes(model: Transformer, optimizers: list[torch.optim.Optimizer]) -> int:
    """The size of a checkpoint, up to a few names: weights, two moments of AdamW for each, or one of Muon."""
    sizes = [sum(p.nbytes for p in model.parameters())]
    for optimizer in optimizers:
        moments = 1 if isinstance(optimizer, Muon) else 2
        sizes += [moments * p.nbytes for group in optimizer.param_groups for p in group["params"]]
    return sum(sizes)


def check_run(path: Path, state: dict, config: dict) -> None:
    """Raises ValueError unless a run with the configuration `config` can go on from a checkpoint with this state."""
    parts = {"step", "config", "data", "random_state", "best_val_loss", "run_id"}
    missing = parts - state.keys() | ({"optimizer"} if not (path / MOMENTS).is_file() else set())
    if missing:
        raise ValueError(f"{path}: holds a model but no run to resume ({', '.join(sorted(missing))} missing)")
    was = state["config"]
    different = [f"{k} was {was[k]}, is {config[k]}" for k in ("optimizer", "document_mask") if was[k] != config[k]]
    different += [
        f"model.{k} was {was['model'].get(k)}, is {v}" for k, v in config["model"].items() if was["model"].get(k) != v
    ]
    if different:
        raise ValueError(f"{path}: cannot go on with another run's settings: {'; '.join(different)}; restore these")


def random_state() -> dict:
    """State of every random generator of this process, as plain data."""
    state = {"python": random.getstate(), "torch": torch.get_rng_state().numpy().tobytes().hex()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def restore_random_state(state: dict) -> None:
    """Put the random generators of this process into the state that `random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch"]), dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(state["cuda"]), dtype=torch.uint8))


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
