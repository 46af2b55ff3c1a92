"""Profiles training steps: shows where their time and their memory go."""

import atexit
from pathlib import Path

import torch

from processes import Process


class NullProfiler:
    """Has the methods of StepProfiler, but does nothing: for runs that are not profiled."""

    def step(self) -> None: ...

    def finish(self) -> None: ...


class StepProfiler:
    """Records `steps` training steps, and the work between them. It skips the first two, which compile and warm up.

    At the end it prints the ten costliest operations. It writes `trace.json` to `folder`, for ui.perfetto.dev or
    chrome://tracing. On CUDA it also writes `memory.pickle` with every allocation, for pytorch.org/memory_viz.
    """

    SKIPPED = 2

    def __init__(self, steps: int, folder: Path, device: torch.device):
        self.folder, self.device, self.last = folder, device, self.SKIPPED + steps
        self.done, self.finished = 0, False

    def step(self) -> None:
        """Start or stop recording when it is time. Call this after every training step."""
        self.done += 1
        if self.done == self.SKIPPED:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
                torch.cuda.memory._record_memory_history()
            self.profiler = torch.profiler.profile(activities=activities)
            self.profiler.start()
            atexit.register(self.finish)  # also if the run fails: a running profiler crashes Python at exit
        elif self.done == self.last:
            self.finish()

    def finish(self) -> None:
        """Stop recording, print the table, and write the files. Call this after the run, even if the run ends early."""
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
    """A StepProfiler in the main process if `steps` is not 0, else a NullProfiler. It writes to `folder`."""
    return StepProfiler(steps, folder, process.device) if steps and process.is_main else NullProfiler()


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
