"""Where the time and the memory of a training step go."""

import atexit
from pathlib import Path

import torch

from model_utils import Process


class NullProfiler:
    """Stands in for a profiler and does nothing."""

    def step(self) -> None: ...

    def finish(self) -> None: ...


class StepProfiler:
    """Records `steps` steps, and what happens between them. The first two are left out: they compile and warm up.

    At the end it prints the ten costliest operations. It leaves `trace.json` in `folder`, for ui.perfetto.dev or
    chrome://tracing. On CUDA it also leaves `memory.pickle` with every allocation, for pytorch.org/memory_viz.
    """

    SKIPPED = 2

    def __init__(self, steps: int, folder: Path, device: torch.device):
        self.folder, self.device, self.last = folder, device, self.SKIPPED + steps
        self.done, self.finished = 0, False

    def step(self) -> None:
        """Call this after every step."""
        self.done += 1
        if self.done == self.SKIPPED:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
                torch.cuda.memory._record_memory_history()
            self.profiler = torch.profiler.profile(activities=activities)
            self.profiler.start()
            atexit.register(self.finish)  # also if the run fails: a running profiler crashes the interpreter at exit
        elif self.done == self.last:
            self.finish()

    def finish(self) -> None:
        """Call this after the run, which may end before all steps are recorded."""
        if self.finished:
            return
        self.finished, recorded = True, self.done - self.SKIPPED
        if recorded >= 0:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.profiler.stop()
        if recorded <= 0:
            print(f"nothing was profiled: the run has to go on for more than {self.SKIPPED} steps")
            return
        kind = "cuda" if self.device.type == "cuda" else "cpu"
        self.folder.mkdir(exist_ok=True)
        self.profiler.export_chrome_trace(str(self.folder / "trace.json"))
        operations = self.profiler.key_averages()
        print(f"the ten costliest operations of {recorded} steps; {self.folder / 'trace.json'} has them all")
        print(operations.table(sort_by=f"self_{kind}_time_total", row_limit=10, max_name_column_width=50))
        if kind == "cuda":
            torch.cuda.memory._dump_snapshot(str(self.folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)


def start_profiler(steps: int, folder: Path, process: Process) -> StepProfiler | NullProfiler:
    """A profiler in the main process if `steps` is not 0."""
    return StepProfiler(steps, folder, process.device) if steps and process.is_main else NullProfiler()


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
