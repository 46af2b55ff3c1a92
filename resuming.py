"""Where a run begins: anew, or at a checkpoint that `resume` names. Damaged ones are passed over, and kept aside."""

import math
import os
import uuid
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from checkpoints import MOMENTS, TrainState, read_state
from config import Config
from files import sha256_of
from model_folders import (
    BEST,
    MARK,
    best_in,
    checkpoints_in,
    find_checkpoint,
    is_finite,
    load_weights,
    opened,
    verify_checkpoint,
)
from processes import Process, run_on_rank_zero
from records import Records, recorded_at, recorded_loss

ASIDE = "aside"


@dataclass
class Start:
    """Where a run begins. Rank zero finds it for all, so it is plain data."""

    checkpoint: str = ""  # to go on from; "": the run is new
    same_run: bool = False  # the checkpoint is in this run's own folder, so its records go on too
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])  # of a run that does not go on
    best_val_loss: float | None = None  # that the records have of the best checkpoint
    recorded: list[str] = field(default_factory=list)  # the evaluations that the records have of the checkpoint's step
    spoilt: list[str] = field(default_factory=list)  # newer checkpoints, which this run leaves
    notes: list[str] = field(default_factory=list)  # sentences to print
    changes: dict[str, list] = field(default_factory=dict)  # fields of the configuration: the old value, the new one

    def facts(self) -> dict:
        """What must be the same on all ranks: the checkpoint, as each sees it, with the digests of all of its files."""
        return {"checkpoint": sha256_of(Path(self.checkpoint) / MARK) if self.checkpoint else ""}


def find_start(cfg: Config) -> dict:
    """The `Start` of a run as plain data. Reads much, changes nothing; call it on rank zero alone.

    Raises:
        ValueError, OSError: `resume` names what is not there or holds no run, or all of its checkpoints are damaged.
    """
    folder = Path(cfg.out_dir) / "checkpoints"
    if not cfg.resume:
        return asdict(Start())
    candidates = candidates_for(cfg.resume, folder)
    if not candidates:
        return asdict(Start(notes=[f"--resume True: no checkpoint is in {folder}; the run starts at step 0"]))
    problems: dict[Path, str] = {}
    for path in candidates:
        problem = fault_of(path)
        if not problem:
            break
        problems[path] = problem
    else:
        raise ValueError(
            "no checkpoint to resume from is whole:\n"
            + "\n".join(f"{path}: {problem}" for path, problem in problems.items())
            + "\nRestore one from a copy; or give another --resume or --out_dir"
        )
    start = Start(str(path), path.resolve().parent == folder.resolve())
    start.notes = [f"{bad}: {problem}; trying the one before" for bad, problem in problems.items()]
    if start.same_run:
        start.spoilt = [str(other) for other in steps_in(folder) if other.name > path.name]
        start.best_val_loss = recorded_loss(Path(cfg.out_dir), best_in(folder))
        start.recorded = sorted(recorded_at(Path(cfg.out_dir), read_state(path)["step"]))
    return asdict(start)


def candidates_for(resume: bool | str, folder: Path) -> list[Path]:
    """The checkpoints that `resume` means, the first one to try first. `folder` holds those of the run itself.

    Raises:
        ValueError, OSError: it means none, and not because the run is new.
    """
    if resume is True:
        return steps_in(folder)[::-1]
    if resume == BEST:
        best = best_in(folder)
        if best is None:
            raise ValueError(f"resume=best: {folder / BEST} is not there; pass --resume True for the newest checkpoint")
        return [best]
    path = Path(resume)
    found = steps_in(path / "checkpoints")[::-1] or steps_in(path)[::-1]
    return found or [find_checkpoint(path)]


def steps_in(folder: Path) -> list[Path]:
    """All folders of checkpoints, oldest first, also those that have lost their mark."""
    return sorted(path for path in folder.glob("step_[0-9]*") if path.is_dir())


def fault_of(path: Path) -> str:
    """What keeps a run from going on with a checkpoint, as a sentence; "" if nothing does."""
    try:
        if not path.is_dir():
            return "is not there"
        files = [*sorted(path.glob("model*.safetensors")), path / MOMENTS]
        if not (path / MARK).is_file() and len(files) > 1 and not (path / MOMENTS).is_file():
            return "holds a model but no run to resume; --init_from begins a new run with its weights"
        if not (path / MARK).is_file():
            return f"{MARK} is missing"
        verify_checkpoint(path, training_state=True)
        step = read_state(path).get("step")
        if type(step) is not int:
            return "holds a model but no run to resume (step missing)"
        for file in files:
            if not file.is_file():
                return f"holds a model but no run to resume ({file.name} missing)"
            with opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    if not is_finite(tensors.get_tensor(name)):
                        return f"{file.name}: {name} holds numbers that are not finite"
    except (ValueError, OSError) as error:
        return str(error).removeprefix(f"{path}: ")
    return ""


def leave_spoilt(start: Start, folder: Path) -> bool:
    """Move the checkpoints that the run leaves into `folder/aside`. Nothing is deleted.

    Returns whether the run still has a best checkpoint.

    Raises:
        OSError: the folder cannot be written to.
    """
    for path in map(Path, start.spoilt):
        target = folder / ASIDE / path.name
        for i in range(1, 10**6):
            if not target.exists():
                break
            target = folder / ASIDE / f"{path.name}.{i}"
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
        print(f"{path} is now {target}")
    best = best_in(folder) if start.same_run else None
    if best is not None and best not in checkpoints_in(folder):
        (folder / BEST).unlink()
        return False
    return best is not None


def begin(state: TrainState, cfg: Config, process: Process) -> Start:
    """Load what the run begins with: a checkpoint to go on from, the weights that `init_from` names, or nothing.

    Raises:
        ValueError, OSError: it is not there, is damaged, or does not fit the configuration.
    """
    process.progress.doing("reading of the checkpoint")
    start = Start(**run_on_rank_zero(partial(find_start, cfg), process))
    if start.checkpoint:
        start.changes = state.resume(Path(start.checkpoint), cfg)
        if start.best_val_loss is not None:  # a validation that came after the save is not in the checkpoint
            state.best_val_loss = min(state.best_val_loss, start.best_val_loss)
        start.notes.append(f"resuming from {start.checkpoint} after step {state.step}")
    elif cfg.init_from:
        path = find_checkpoint(cfg.init_from)
        run_on_rank_zero(partial(verify_checkpoint, path, training_state=False), process)
        load_weights(path, state.model)
    if not start.same_run:
        state.run_id = start.run_id
    process.progress.doing("")
    return start


def open_records(state: TrainState, start: Start, cfg: Config, process: Process) -> Records:
    """Open the records of the run. They go on where the run goes on in its own folder."""
    process.progress.doing("opening of the records")
    if not run_on_rank_zero(partial(leave_spoilt, start, Path(cfg.out_dir) / "checkpoints"), process):
        state.best_val_loss = math.inf
    last_step = state.step if start.same_run else -1
    records = Records(state.model, cfg, process, state.run_id, last_step, goes_on=start.same_run or cfg.resume is True)
    if start.changes:
        lines = [f"{name} was {old}, is {new}" for name, (old, new) in start.changes.items()]
        records.write(state.step, {"config_change": start.changes}, "goes on with other settings:", *lines)
    return records


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one. Run train.py.")
