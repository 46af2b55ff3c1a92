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

import math
import os
import platform
import shutil
import sys
import threading
import uuid
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from config import FREE, LATER_FIELDS, Config, config_as_dict, flat
from dataloaders import TrainWindows
from files import atomic_folder, atomic_write, check_free_space, sha256_of
from json_files import check_values, read_object
from model import ModelConfig, Transformer
from model_folders import (
    BEST,
    CHECKPOINT_FORMAT_VERSION,
    MARK,
    best_in,
    checkpoints_in,
    is_finite,
    load_weights,
    opened,
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
            mark_best(folder, checkpoint["step"])
        for old in checkpoints_in(folder)[:-keep]:
            if old != best_in(folder):
                os.replace(old, old.with_name(f".{old.name}.{os.getpid()}.tmp"))
        _clear_leftovers(folder)
    except (OSError, SafetensorError) as error:
        last, size = checkpoints_in(folder), tensor_bytes(checkpoint)
        raise OSError(
            f"{path}: could not be written ({error}); it needs {size:,} bytes, and the disk has "
            f"{shutil.disk_usage(folder).free:,}; make room, or choose another --out_dir; "
            f"the last good checkpoint is {last[-1] if last else 'none'}"
        ) from error
    return path


def _clear_leftovers(folder: Path) -> None:
    """Delete what a killed save has left, and checkpoints that are no longer kept. Both have such names."""
    for leftover in folder.glob(".step_*.tmp"):
        whole = folder / leftover.name.split(".")[1]
        if ".old." in leftover.name and not whole.exists():
            os.replace(leftover, whole)  # a save of this step again was killed between its two renames
        elif leftover.is_symlink():
            leftover.unlink()
        else:
            shutil.rmtree(leftover)
    for leftover in folder.glob(f".{BEST}.*.tmp"):
        leftover.unlink()


def mark_best(folder: Path, step: int) -> None:
    """Let the file `best` name the checkpoint of `step`."""
    with atomic_write(folder / BEST, "w") as file:
        file.write(f"step_{step:08d}\n")


def tensor_bytes(checkpoint: dict) -> int:
    """The size of a checkpoint, up to a few names."""
    return sum(tensor.nbytes for part in ("model", "moments") for tensor in checkpoint.get(part, {}).values())


def _describe(folder: Path) -> dict[str, dict]:
    """Size and sha256 of each file of a folder, by its path there."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARK)
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in paths
    }


class CheckpointSaver:
    """Writes checkpoints to `folder` in the background, one at a time. Training waits for a copy in memory alone.

    A save that fails (a full disk) is printed, and the next one tries again: the run in memory is worth more than its
    end. Only when the last save of a run fails does `finish` raise. Leaving the `with` block waits for the save.
    """

    def __init__(self, folder: str | Path, keep: int):
        self.folder, self.keep = Path(folder), keep
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, checkpoint: dict, *, is_best: bool, is_last: bool = False) -> None:
        """Copy the tensors of `checkpoint`, and begin to write it as `save_checkpoint` does.

        An error of the last save of a run is for `finish` to raise.

        Raises:
            ValueError: a weight is not finite. Such a checkpoint would take the place of a healthy one.
        """
        self.wait()
        for name, weight in checkpoint["model"].items():
            if not is_finite(weight.detach()):
                raise ValueError(
                    f"step {checkpoint['step']}: {name} holds numbers that are not finite, so it is not saved; "
                    + ways_back(self.folder)
                )
        copies = {
            part: {name: tensor.detach().to("cpu", copy=True) for name, tensor in checkpoint[part].items()}
            for part in ("model", "moments")
        }
        self._thread = threading.Thread(target=self._write, args=(checkpoint | copies, is_best, is_last), name="save")
        self._thread.start()

    def _write(self, checkpoint: dict, is_best: bool, is_last: bool) -> None:
        try:
            save_checkpoint(self.folder, checkpoint, keep=self.keep, is_best=is_best)
            self._error = None
            print(f"step {checkpoint['step']:>6}  saved in {self.folder}", flush=True)
        except Exception as error:  # an error that nobody caught here would be lost, and the run would seem saved
            self._error = error
            if not is_last:
                words = f"train.py: {type(error).__name__}: {error}; training goes on, the next save tries again"
                print(words, file=sys.stderr, flush=True)

    def wait(self) -> None:
        """Wait until the save in progress has ended."""
        if self._thread:
            self._thread.join()

    def finish(self) -> None:
        """Wait for the last save.

        Raises:
            Exception: it failed.
        """
        self.wait()
        if self._error:
            raise self._error

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()


def ways_back(folder: Path) -> str:
    """The checkpoints of a run, newest first, and how to go on from an older one, for the message of a broken run."""
    if not (there := checkpoints_in(folder)[::-1]):
        return "there is no checkpoint; start again with a lower max_lr (with Muon: muon_lr too)"
    names = ", ".join(f"{path}{' (best)' if path == best_in(folder) else ''}" for path in there)
    return (
        f"checkpoints, newest first: {names}. Where the loss had risen for a while, the newest may be spoilt too: go "
        "on from an older one with --resume PATH, --allow_config_change and a lower --max_lr (with Muon: --muon_lr too)"
    )


# ---------------------------------------------------------------- the state of a run


@dataclass
class TrainState:
    """What a checkpoint holds of a run, and what a resumed run takes up again."""

    model: Transformer  # the bare model, not a wrapped one
    optimizers: list[torch.optim.Optimizer]
    windows: TrainWindows
    scaler: torch.amp.GradScaler = field(default_factory=partial(torch.amp.GradScaler, "cpu", enabled=False))
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
            "loss_scale": self.scaler.state_dict(),  # empty unless the run is in float16
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
        there = len(checkpoints_in(folder)) if self.step else 0  # if this run is new, an older run is moved aside
        count = max(1, checkpoints_at_once(cfg, self.step) - there)
        try:
            check_free_space([(folder, count * checkpoint_bytes(self.model, self.optimizers))])
        except OSError as error:
            raise OSError(
                f"{folder}: will get up to {count} checkpoint{'s' if count > 1 else ''}, so it {error.strerror}, lower "
                "--keep_checkpoints, or choose another --out_dir"
            ) from error

    def resume(self, path: Path, cfg: Config) -> dict[str, list]:
        """Take up the run that saved the checkpoint at `path`. `resuming.find_start` has verified it.

        Returns the fields of its configuration that differ and change the result: the old value and the new one.

        Raises:
            ValueError: the checkpoint holds no run, or a run with another model, optimizer or order of data; or fields
                differ and `cfg` does not allow that.
        """
        state = read_state(path)
        changes = check_run(path, state, cfg)
        self.windows.check_state(state["data"])
        load_weights(path, self.model)
        load_moments(path, self.model, self.optimizers)
        try:
            restore_random_state(state["random_state"])
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{path / STATE}: damaged (random_state: {error}); use an older checkpoint") from error
        if self.scaler.is_enabled() and (was := state.get("loss_scale")):
            kept = {key: was[key] for key in ("scale", "_growth_tracker")}
            self.scaler.load_state_dict(self.scaler.state_dict() | kept)
        best = state["best_val_loss"]
        self.step, self.best_val_loss, self.run_id = state["step"], math.inf if best is None else best, state["run_id"]
        return changes


def read_state(path: Path) -> dict:
    """The plain data of the run that saved a checkpoint. Empty for a folder of another program.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        if not (path / STATE).exists():
            return {}
        state = read_object(path / STATE)
        check_values(state, {"step": int, "config": dict})
        check_values(state["config"], {"model": dict})
        return state
    except (ValueError, KeyError) as error:
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


def checkpoints_at_once(cfg: Config, step: int = 0) -> int:
    """The most checkpoints that a run has on the disk after `step`: the newest ones, the best one, and the next one
    while it is written."""
    saves = math.ceil(cfg.max_steps / cfg.save_every) - step // cfg.save_every if cfg.save_every else 1
    return min(saves, cfg.keep_checkpoints + 2)


def check_run(path: Path, state: dict, cfg: Config) -> dict[str, list]:
    """Compare the run in a checkpoint with the one that is to go on from it.

    Returns the fields that differ and change the result: the old value and the new one.

    Raises:
        ValueError: the checkpoint holds no run; or fields differ that must not, or not without `allow_config_change`.
    """
    parts = {"step", "config", "data", "random_state", "best_val_loss", "run_id"}
    missing = parts - state.keys() | ({"optimizer"} if not (path / MOMENTS).is_file() else set())
    if missing:
        raise ValueError(f"{path}: holds a model but no run to resume ({', '.join(sorted(missing))} missing)")
    try:
        check_values(state, {"data": dict, "random_state": dict, "run_id": str})
        check_values(state["random_state"], {"torch": str})
        if state["best_val_loss"] is not None:
            check_values(state, {"best_val_loss": float})
        if state.get("loss_scale"):  # a run that was not in float16 has none, nor an older checkpoint
            check_values(state, {"loss_scale": dict})
            check_values(state["loss_scale"], {"scale": float, "_growth_tracker": int})
            if state["loss_scale"]["scale"] <= 0:
                raise ValueError(f"loss_scale is {state['loss_scale']['scale']}")
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path / STATE}: damaged ({error}); use an older checkpoint") from error
    was, now = LATER_FIELDS | flat(state["config"]), flat(config_as_dict(cfg))
    free = FREE | {"muon_lr"} if cfg.optimizer == "adamw" else FREE
    changes = {k: [was[k], v] for k, v in now.items() if k in was and was[k] != v and k not in free}
    lines = [f"{name} was {old}, is {new}" for name, (old, new) in changes.items()]
    if any(name == "optimizer" or name.startswith("model.") for name in changes):
        raise ValueError(f"{path}: cannot go on with another run's settings: {'; '.join(lines)}; restore these")
    if changes and not cfg.allow_config_change:
        raise ValueError(
            f"{path}: the run had other settings, which change its result: {'; '.join(lines)}; restore these, or pass "
            "--allow_config_change to go on with the new ones"
        )
    return changes


def random_state() -> dict:
    """State of torch's random generators in this process, as plain data. Nothing in a run draws from any other."""
    state = {"torch": torch.get_rng_state().numpy().tobytes().hex()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def restore_random_state(state: dict) -> None:
    """Put torch's random generators into the state that `random_state` returned."""
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch"]), dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(state["cuda"]), dtype=torch.uint8))


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
