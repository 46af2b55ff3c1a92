"""Checkpoints: written whole or not at all, found, pruned, and read without running any code in them."""

import math
import os
import random
import shutil
import uuid
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from config import Config, config_as_dict
from dataloaders import TrainWindows
from files import atomic_write, check_free_space
from model import Transformer
from optimizers import Muon, load_moments

CHECKPOINT_FORMAT_VERSION = 1


# ---------------------------------------------------------------- files


def checkpoints_in(folder: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(Path(folder).glob("step_*.pt"))


def save_checkpoint(folder: str | Path, checkpoint: dict, *, keep: int, is_best: bool) -> Path:
    """Write `folder/step_NNNNNNNN.pt` whole or not at all, then delete all but the newest `keep`. Return its path.

    With `is_best`, `folder/best.pt` becomes another name of the same file. It stays when the step is deleted.

    Raises:
        OSError: the file could not be written (a full disk). The older checkpoints are untouched.
    """
    path = Path(folder) / f"step_{checkpoint['step']:08d}.pt"
    for leftover in Path(folder).glob(".step_*.tmp"):  # from a save that was killed
        leftover.unlink()
    try:
        with atomic_write(path) as file:
            torch.save({"format_version": CHECKPOINT_FORMAT_VERSION, **checkpoint}, file)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        last = checkpoints_in(folder)
        reason = error if isinstance(error, OSError) else error.__cause__ or error.__context__ or error
        raise OSError(
            f"{path}: could not be written ({reason}); make room or choose another --out_dir; the last "
            f"good checkpoint is {last[-1] if last else 'none'}"
        ) from error
    if is_best:
        link = path.with_name(".best.pt.tmp")
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, link)
        os.replace(link, path.with_name("best.pt"))
    for old in checkpoints_in(folder)[:-keep]:
        old.unlink()
    return path


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint file `path`, or the newest one of a run directory or of its `checkpoints/`.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    found = checkpoints_in(path / "checkpoints") or checkpoints_in(path)
    if not found:
        raise FileNotFoundError(f"{path}: no checkpoint there; give a .pt file or a run directory that holds one")
    return found[-1]


def load_checkpoint(path: str | Path, device: torch.device | str) -> dict:
    """Read what `save_checkpoint` wrote, as plain data and tensors on `device`. No code in the file is run.

    Raises:
        ValueError: the file is damaged or not one of ours.
        OSError, MemoryError, torch.OutOfMemoryError: it could not be read, or does not fit.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the check sums
            if damaged := archive.testzip():
                raise ValueError(f"the check sum of {damaged} is wrong")
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        version = checkpoint["format_version"]
    except (OSError, MemoryError, torch.OutOfMemoryError):  # the file itself may be whole
        raise
    except Exception as error:  # the errors of zip, pickle and torch all mean the same to the user
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        if "allocate memory" in reason:  # torch's words for a CPU without memory
            raise MemoryError(f"{path}: does not fit into memory ({reason})") from error
        raise ValueError(
            f"{path}: not a readable checkpoint ({reason}); if it was one, delete it and use an older one"
        ) from error
    if version != CHECKPOINT_FORMAT_VERSION:
        raise ValueError(
            f"{path}: of format {version}, this code reads {CHECKPOINT_FORMAT_VERSION}; take the code that wrote it"
        )
    return checkpoint


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
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "config": config_as_dict(cfg),
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "data": self.windows.state(),
            "random_state": random_state(),
            "best_val_loss": self.best_val_loss,
            "run_id": self.run_id,
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

    def resume(self, path: Path, cfg: Config, device: torch.device) -> None:
        """Take up the run that saved the checkpoint at `path`.

        Raises:
            ValueError: the checkpoint holds no run, or a run with another model, optimizer, masking or order of data.
            Otherwise as `load_checkpoint`.
        """
        checkpoint = load_checkpoint(path, device)
        check_run(path, checkpoint, config_as_dict(cfg))
        self.windows.check_state(checkpoint["data"])
        self.model.load_state_dict(checkpoint["model"])
        load_moments(self.optimizers, checkpoint["optimizers"])
        restore_random_state(checkpoint["random_state"])
        self.step, self.best_val_loss, self.run_id = (checkpoint[k] for k in ("step", "best_val_loss", "run_id"))


def checkpoint_bytes(model: Transformer, optimizers: list[torch.optim.Optimizer]) -> int:
    """The size of a checkpoint, up to a few names: weights, two moments of AdamW for each, or one of Muon."""
    sizes = [sum(p.nbytes for p in model.parameters())]
    for optimizer in optimizers:
        moments = 1 if isinstance(optimizer, Muon) else 2
        sizes += [moments * p.nbytes for group in optimizer.param_groups for p in group["params"]]
    return sum(sizes)


def check_run(path: Path, checkpoint: dict, config: dict) -> None:
    """Raises ValueError unless a run with the configuration `config` can go on from `checkpoint`."""
    parts = {"step", "model", "optimizers", "config", "data", "random_state", "best_val_loss", "run_id"}
    if missing := parts - checkpoint.keys():
        raise ValueError(f"{path}: holds a model but no run to resume ({', '.join(sorted(missing))} missing)")
    was = {"document_mask": False} | checkpoint["config"]  # older runs did not have this field
    different = [f"{k} was {was[k]}, is {config[k]}" for k in ("optimizer", "document_mask") if was[k] != config[k]]
    different += [
        f"model.{k} was {was['model'].get(k)}, is {v}" for k, v in config["model"].items() if was["model"].get(k) != v
    ]
    if different:
        raise ValueError(f"{path}: cannot go on with another run's settings: {'; '.join(different)}; restore these")


def random_state() -> dict:
    """State of every random generator of this process, as plain data and tensors."""
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict) -> None:
    """Put the random generators of this process into the state that `random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
