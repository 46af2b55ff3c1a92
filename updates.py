"""What an update has come to, and when that is known.

A GPU works behind the process that asks it for work. If the process waited for the figures of every update, the GPU
would wait for the next one to be asked for. So the process asks for update s + 1, and then reads the figures of s.
"""

import math
import time
from collections import deque
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from checkpoints import CheckpointSaver, ways_back
from config import Config
from processes import Process, run_on_rank_zero
from records import Records


class Update:
    """What all ranks know of update number `step`. The figures come from the device, so reading them waits for it.

    Args:
        began: when this process began to ask for the update, by time.perf_counter.
        rates: learning rates by the role of the parameters.
        losses: of each rank, (world_size,), on the device.
        grad_norm: of the whole gradient before clipping, a scalar on the device.
        loss_scale: the factor of a loss in float16, a scalar on the device. It is 1 in other dtypes.
    """

    def __init__(
        self, step: int, began: float, rates: dict[str, float], losses: Tensor, grad_norm: Tensor, loss_scale: Tensor
    ):
        self.step, self.began, self.rates = step, began, rates
        figures = torch.cat([losses, torch.stack([grad_norm, loss_scale])])
        self.is_left_out = (~figures.isfinite().all()).float()  # 1 or 0, on the device
        self._figures, self._copied, self.done = figures, None, math.nan  # done: when the figures were there
        if figures.is_cuda:
            self._figures = figures.to("cpu", non_blocking=True)  # torch takes pinned memory for it
            self._copied = torch.cuda.Event()
            self._copied.record()

    @cached_property
    def _values(self) -> list[float]:
        if self._copied:
            self._copied.synchronize()
        self.done = time.perf_counter()
        return self._figures.tolist()

    def wait(self) -> None:
        """Wait until the device has made the update."""
        _ = self._values

    @property
    def losses(self) -> list[float]:
        return self._values[:-2]

    @property
    def grad_norm(self) -> float:
        return self._values[-2]

    @property
    def loss_scale(self) -> float:
        return self._values[-1]

    @property
    def is_finite(self) -> bool:
        """Whether the update was made. Otherwise parameters and moments have not been touched."""
        return all(map(math.isfinite, self._values))

    @property
    def has_overflowed(self) -> bool:
        """Whether a smaller loss scale may be the cure. The scaler halves it after such an update."""
        return self.loss_scale > 1 and all(map(math.isfinite, self.losses)) and not self.is_finite

    def cause(self) -> str:
        """Why the update was left out; "" if it was made."""
        if self.has_overflowed:
            return f"the gradient overflows float16 at a loss scale of {self.loss_scale:g}"
        return "" if self.is_finite else "a loss or the gradient is not finite"

    def row(self, skipped: int, dtype: str) -> dict:
        """The row of metrics.jsonl. An update that was left out has neither loss nor norm: JSON has no word for NaN.

        "lr" is the rate of the blocks' matrices. `skipped` updates in a row were left out, this one included.
        """
        rates = dict(self.rates)
        row = {"lr": rates["muon"] if "muon" in rates else rates.pop("matrix")}
        row |= {f"{role}_lr": rate for role, rate in rates.items()}
        if dtype == "float16":
            row["loss_scale"] = self.loss_scale
        if skipped:
            return row | {"skipped": skipped}
        return {"train_loss": sum(self.losses) / len(self.losses)} | row | {"grad_norm": self.grad_norm}

    def fault(self, folder: Path) -> str:
        """Says which loss or gradient is not finite, and how to go on. `folder` holds the checkpoints."""
        named = {f"loss on rank {rank}": loss for rank, loss in enumerate(self.losses)} | {"gradient": self.grad_norm}
        culprits = ", ".join(f"the {name} is {figure}" for name, figure in named.items() if not math.isfinite(figure))
        return (
            f"step {self.step}: {culprits}, which is not finite, so the run stops before this update; "
            f"{ways_back(folder)}; --skip_nonfinite N leaves up to N such updates out"
        )


class Updates:
    """Waits for the updates of a run in their order, and records each.

    `add` waits, and writes nothing: the watch times it. `record` writes.
    """

    def __init__(self, records: Records, saver: CheckpointSaver, cfg: Config, process: Process):
        self.records, self.saver, self.cfg, self.process = records, saver, cfg, process
        self.ahead = 1 if process.device.type == "cuda" else 0  # updates that the device may still be busy with
        self.pending: deque[Update] = deque()
        self.skipped = self.broken = 0  # updates in a row that were left out; those that no smaller loss scale mends
        self.scale_of_skipped = 0.0  # the loss scale of the last of them
        self.last = 0.0  # when the last recorded update was done

    def add(self, update: Update, *, is_awaited: bool) -> None:
        """Wait for the updates that are not ahead; for this one too if it `is_awaited`."""
        self.pending.append(update)
        self.process.progress.updated(update.step)
        for one in islice(self.pending, max(0, len(self.pending) - (0 if is_awaited else self.ahead))):
            one.wait()

    def record(self, *, everything: bool) -> None:
        """Record the updates that are there; with `everything`, wait for all of them.

        Raises:
            ValueError: more updates in a row than `skip_nonfinite` were left out, on all ranks alike. Overflows of
                float16 that a smaller loss scale may mend do not count.
        """
        while len(self.pending) > (0 if everything else self.ahead):
            update = self.pending.popleft()
            update.wait()
            seconds, self.last = update.done - max(update.began, self.last), update.done
            if update.is_finite:
                self.skipped, self.broken, self.scale_of_skipped = 0, 0, 0.0
            else:
                self.skipped += 1
                self.broken += not update.has_overflowed or update.loss_scale == self.scale_of_skipped
                self.scale_of_skipped = update.loss_scale
            if self.broken > self.cfg.skip_nonfinite:
                run_on_rank_zero(self.saver.wait, self.process)  # the message lists what is saved
                raise ValueError(update.fault(self.saver.folder))
            self.records.training(update.step, seconds, update.row(self.skipped, self.cfg.dtype), update.cause())


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one. Run train.py.")
