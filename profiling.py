"""Where the time and the memory of a training step go."""

from pathlib import Path

import torch

from model_utils import Process


class NullProfiler:
    """Stands in for a profiler and does nothing."""

    def step(self) -> None: ...


class StepProfiler:
    """Records `steps` steps behind the first two, which compile and warm up.

    Then it prints the ten costliest operations and leaves `trace.json`, for chrome://tracing or ui.perfetto.dev, in
    `folder`; on CUDA also `memory.pickle`, every allocation of the recorded steps, for pytorch.org/memory_viz.
    """

    SKIPPED = 2

    def __init__(self, steps: int, folder: Path, device: torch.device):
        self.folder, self.device, self.steps, self.done = folder, device, steps, 0
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=activities, profile_memory=True)

    def step(self) -> None:
        """To be called behind every step."""
        self.done += 1
        if self.done == self.SKIPPED:
            if self.device.type == "cuda":
                torch.cuda.memory._record_memory_history()
            self.profiler.start()
        elif self.done == self.SKIPPED + self.steps:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.profiler.stop()
            self.report()

    def report(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.profiler.export_chrome_trace(str(self.folder / "trace.json"))
        kind = "cuda" if self.device.type == "cuda" else "cpu"
        table = self.profiler.key_averages().table(
            sort_by=f"self_{kind}_time_total", row_limit=10, max_name_column_width=50
        )
        print(f"The ten costliest operations of {self.steps} steps; {self.folder / 'trace.json'} has them all\n{table}")
        if self.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self.folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)


def start_profiler(steps: int, folder: Path, process: Process) -> StepProfiler | NullProfiler:
    """A profiler in the main process if `steps` is not 0."""
    return StepProfiler(steps, folder, process.device) if steps and process.is_main else NullProfiler()
