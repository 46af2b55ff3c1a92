"""What a run sends to Weights & Biases, from a thread of its own. A run never waits for it, and never ends with it."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from config import Config, config_as_dict

SECONDS = 20  # that the end of a run waits for the last rows
UPLOAD_SECONDS = 600  # and for the upload of a checkpoint
_open: list["WandbLog"] = []  # logs of this process that are not closed


class WandbLog:
    """A run of Weights & Biases. Rows wait in a queue until the thread has sent them.

    The first error is a printed line, and ends this log alone. Rows that come later are dropped.
    """

    def __init__(self, cfg: Config, run_id: str):
        self.tasks: SimpleQueue[Callable[[Any], None] | None] = SimpleQueue()  # None: the end of the run
        self.uploading, self.exit_code = False, 0
        self.thread = Thread(target=self._work, args=(cfg, run_id), name="wandb", daemon=True)
        self.thread.start()
        _open.append(self)

    def _work(self, cfg: Config, run_id: str) -> None:
        """Start the run, do the tasks in their order, and finish the run."""
        try:
            import wandb

            run = wandb.init(
                project=cfg.wandb_project,
                name=Path(cfg.out_dir).name,
                id=run_id,
                resume="allow",  # a resumed run goes on under its id
                config=config_as_dict(cfg),
                dir=cfg.out_dir,
                settings=wandb.Settings(console="off"),  # else each print() of the run would go through wandb
            )
            run.define_metric("tokens")
            run.define_metric("*", step_metric="tokens")
            while (task := self.tasks.get()) is not None:
                task(run)
            run.finish(exit_code=self.exit_code)
        except Exception as error:  # no account, no network, a wrong key: the run is worth more than its plots
            first_line = str(error).partition("\n")[0]
            print(f"Weights & Biases is off from here on ({type(error).__name__}: {first_line})", flush=True)

    def _add(self, task: Callable[[Any], None] | None) -> None:
        if self.thread.is_alive():  # else nobody would empty the queue
            self.tasks.put(task)

    def log(self, step: int, fields: dict) -> None:
        """Plot `fields` at `step`."""
        self._add(lambda run: run.log(fields, step=step))

    def samples(self, step: int, tokens: int, texts: list[str]) -> None:
        """Show texts as a table."""

        def log(run: Any) -> None:
            import wandb

            table = wandb.Table(columns=["step", "text"], data=[[step, text] for text in texts])
            run.log({"samples": table, "tokens": tokens}, step=step)

        self._add(log)

    def upload(self, checkpoint: Path, name: str) -> None:
        """Upload a checkpoint as an artifact. `close` waits for it."""

        def log(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(name, type="model")
            artifact.add_dir(str(checkpoint))
            run.log_artifact(artifact)
            self.uploading = True

        self._add(log)

    def close(self, exit_code: int = 0) -> None:
        """Finish the run, but wait no longer than SECONDS, or UPLOAD_SECONDS for a checkpoint. Ctrl-C ends the wait."""
        _open.remove(self)
        self.exit_code = exit_code
        self._add(None)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for number in handlers:
                signal.signal(number, signal.default_int_handler)
            self.thread.join(SECONDS)
            if self.uploading and self.thread.is_alive():
                print(
                    f"Weights & Biases uploads the checkpoint, for at most {UPLOAD_SECONDS} s; Ctrl-C ends the wait",
                    flush=True,
                )
                self.thread.join(UPLOAD_SECONDS)
        except KeyboardInterrupt:
            print("interrupted while Weights & Biases took the last rows; the run itself is whole")
            return
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.thread.is_alive():
            print("Weights & Biases does not answer, so it may lack the last rows; metrics.jsonl has them all")


def start_wandb(cfg: Config, run_id: str) -> WandbLog | None:
    """A log if WANDB_API_KEY is set or WANDB_MODE is offline, else None. Then wandb is not even imported."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") == "offline":
        return WandbLog(cfg, run_id)
    return None


def finish_after_error() -> None:
    """Finish the logs that are still open, as those of a failed run. Without this wandb would lose their last rows."""
    for log in list(_open):
        log.close(exit_code=1)


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one. Run train.py.")
