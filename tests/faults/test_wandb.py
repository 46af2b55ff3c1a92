"""Weights & Biases may not end, change or slow a run, whatever happens to it. Keys and tokens get nowhere.

All servers are on this machine. The runs have the real wandb.
"""

import json
import socket
import threading
import time
from pathlib import Path

import pytest
from hub_server import Hub
from ranks import Ranks, driver
from tiny_run import ROOT, TRAIN, plain_environment, start_run, tiny_corpus, tiny_flags, write_questions
from wandb_files import wandb_history, wandb_records

pytest.importorskip("wandb")
pytestmark = pytest.mark.faults

KEY = "c0ffee3b1f" * 4  # looks like a real one
TOKEN = "hf_canary3b1fcanary3b1fcanary3b1fcana"
PATCHED = """
import os, runpy, signal, sys, time
sys.path.insert(0, {root!r})
import wandb_log
wandb_log.SECONDS = {seconds}
{patch}
sys.argv[0] = {train!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# The third row is refused. What `raised` says shows that the patch was reached.
LOG_RAISES = """
import wandb.sdk.wandb_run
rows, log = 0, wandb.sdk.wandb_run.Run.log
def fail(self, *args, **kwargs):
    global rows
    rows += 1
    if rows == 3:
        raise ConnectionResetError("the service is gone")
    return log(self, *args, **kwargs)
wandb.sdk.wandb_run.Run.log = fail
"""

# Update 3 waits until the service runs and has begun its file, and then kills it.
KILL_SERVICE = """
from pathlib import Path
from torch.optim.optimizer import register_optimizer_step_post_hook
updates = 0
def kill_service(*args):
    global updates
    updates += 1
    deadline = time.monotonic() + 30
    while updates == 3 and time.monotonic() < deadline:
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                name, rest = stat.read_text().rsplit(")", 1)
            except OSError:
                continue
            is_service = "wandb-core" in name and int(rest.split()[1]) == os.getpid()
            if is_service and list(Path({out_dir!r}).rglob("*.wandb")):
                os.kill(int(stat.parent.name), signal.SIGKILL)
                print("killed the service", flush=True)
                return
        time.sleep(0.05)
register_optimizer_step_post_hook(kill_service)
"""


class Runs:
    """Starts runs that differ in their environment alone."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.corpus, self.questions = tiny_corpus(folder), write_questions(folder)

    def flags(self, name: str, **changes) -> list[str]:
        short = {"max_steps": 6, "save_every": 3, "val_every": 3, "generate_every": 3, "log_every": 1}
        return tiny_flags(self.corpus, self.questions, self.folder / name, **short | changes)

    def run(self, name: str, env: dict, patch: str = "", seconds: int = 1, **changes) -> tuple[int, str, str]:
        """Status, output and errors of a run into the folder `name`."""
        script = self.folder / f"{name}.py"
        script.write_text(PATCHED.format(root=str(ROOT), train=str(TRAIN), seconds=seconds, patch=patch))
        env = plain_environment(HOME=str(self.folder / "home"), **env)
        run = start_run(self.flags(name, **changes), script=script, env=env)
        out, err = run.communicate(timeout=120)
        return run.returncode, out.decode(), err.decode()


def rows_of(out_dir: Path) -> list[dict]:
    """The rows without what depends on the clock."""
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("tokens_per_sec", "mfu")} for row in rows]


def bits_of(out_dir: Path) -> dict[str, bytes]:
    """All tensors of all checkpoints, and the samples."""
    files = [*out_dir.glob("checkpoints/*/**/*.safetensors"), out_dir / "samples.txt"]
    return {str(path.relative_to(out_dir)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("wandb"))


@pytest.fixture(scope="module")
def plain(runs):
    """A run without Weights & Biases: its rows and bits."""
    status, _, err = runs.run("plain", {})
    assert status == 0, err
    assert len(bits_of(runs.folder / "plain")) == 5  # the weights and moments of two checkpoints, the samples
    return rows_of(runs.folder / "plain"), bits_of(runs.folder / "plain")


@pytest.fixture
def deaf_server():
    """Accepts connections and never answers. Yields its address."""
    listener, connections = socket.create_server(("127.0.0.1", 0)), []

    def accept() -> None:
        while True:
            try:
                connections.append(listener.accept()[0])
            except OSError:  # the test is over
                return

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()
    for connection in connections:
        connection.close()
    assert connections  # else wandb was not there


def holding(folder: Path, secret: str) -> list[str]:
    """The files below `folder` that hold `secret`, or whose names do."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [str(path) for path in files if secret in str(path) or secret.encode() in path.read_bytes()]


def assert_unharmed(runs: Runs, name: str, plain: tuple, result: tuple[int, str, str]) -> None:
    status, out, err = result
    assert status == 0, err
    assert (rows_of(runs.folder / name), bits_of(runs.folder / name)) == plain
    assert "Traceback" not in out + err
    assert KEY not in out + err and not holding(runs.folder / name, KEY)


def test_an_offline_run_has_every_row_in_order_and_so_has_its_resumed_part(runs, plain):
    offline = {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}
    result = runs.run("offline", offline, seconds=20)
    assert_unharmed(runs, "offline", plain, result)
    assert "Weights & Biases" not in result[1]
    status, _, err = runs.run("offline", offline, seconds=20, max_steps=8, resume=True, allow_config_change=True)
    assert status == 0, err
    files = sorted((runs.folder / "offline").glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and files[0].name == files[1].name  # the same id
    for path, steps in zip(files, (range(7), (7, 8)), strict=True):
        records = wandb_records(path)
        assert records[-1].WhichOneof("record_type") == "exit"  # the file is whole
        rows = wandb_history(records)
        assert [row["_step"] for row in rows if row["_step"] in steps] == list(steps)
        by_step = {row["_step"]: row for row in rows}
        for row in rows_of(runs.folder / "offline"):
            if row["step"] in steps and "train_loss" in row:
                assert by_step[row["step"]]["train_loss"] == row["train_loss"]
            if row["step"] in steps and "val_loss" in row:
                assert by_step[row["step"]]["val_loss"] == row["val_loss"]


def test_a_run_that_fails_is_a_failed_run_there_with_every_row(runs):
    fields = {"max_lr": 1e30, "warmup_steps": 0, "save_every": 0, "val_every": 0, "generate_every": 0}
    status, _, err = runs.run("diverged", {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}, seconds=20, **fields)
    assert status == 1 and "is not finite" in err
    [path] = (runs.folder / "diverged").glob("wandb/offline-run-*/*.wandb")
    records = wandb_records(path)
    assert records[-1].exit.exit_code == 1
    losses = {row["step"]: row["train_loss"] for row in rows_of(runs.folder / "diverged") if "train_loss" in row}
    assert losses
    assert {row["_step"]: row["train_loss"] for row in wandb_history(records) if "train_loss" in row} == losses


def test_a_port_that_refuses(runs, plain):
    env = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:1"}
    result = runs.run("refused", env)
    assert_unharmed(runs, "refused", plain, result)
    assert "Weights & Biases does not answer" in result[1]


def test_a_server_that_never_answers(runs, plain, deaf_server):
    result = runs.run("deaf", {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": deaf_server})
    assert_unharmed(runs, "deaf", plain, result)
    assert "Weights & Biases does not answer" in result[1]


def test_ranks_wait_for_the_last_rows_longer_than_for_a_lost_rank(runs, deaf_server, tmp_path):
    """Rank zero waits for 12 seconds. The other rank must not take that for a failure."""
    variables = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": deaf_server}
    patch = f"import wandb_log\nwandb_log.SECONDS = 12\nos.environ |= {variables}"
    flags = runs.flags("two ranks", timeout=4)
    with Ranks(driver(tmp_path / "driver", patch), flags, 2) as ranks:
        assert ranks.wait(60) == [0, 0], ranks.text("err", 1)
        assert "Weights & Biases does not answer" in ranks.text("out") and "done: " in ranks.text("out")


@pytest.mark.slow
def test_a_server_that_never_answers_adds_30_seconds_at_most(runs, plain, deaf_server):
    began = time.monotonic()
    assert runs.run("timed plain", {}, seconds=20)[0] == 0
    alone, began = time.monotonic() - began, time.monotonic()
    env = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": deaf_server}
    assert_unharmed(runs, "timed", plain, runs.run("timed", env, seconds=20))
    assert time.monotonic() - began < alone + 30


def test_a_log_that_raises_is_one_line(runs, plain):
    result = runs.run("raising", {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}, LOG_RAISES)
    assert_unharmed(runs, "raising", plain, result)
    assert [line for line in result[1].splitlines() if "Weights & Biases" in line] == [
        "Weights & Biases is off from here on (ConnectionResetError: the service is gone)"
    ]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the patch finds the service in /proc")
def test_a_service_that_is_killed(runs, plain):
    patch = KILL_SERVICE.replace("{out_dir!r}", repr(str(runs.folder / "killed")))
    result = runs.run("killed", {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}, patch)
    assert "killed the service" in result[1]
    assert_unharmed(runs, "killed", plain, result)
    assert result[1].count("Weights & Biases") == 1


@pytest.mark.parametrize("key", ["canary-3b1f", KEY + " with blanks"], ids=["short", "blanks"])
def test_a_key_that_is_none_is_not_shown(runs, plain, key):
    name = f"key of {len(key)}"
    result = runs.run(name, {"WANDB_API_KEY": key, "WANDB_BASE_URL": "http://127.0.0.1:1"})
    assert_unharmed(runs, name, plain, result)
    assert "Weights & Biases" in result[1]
    assert "3b1f" not in result[1] + result[2] and not holding(runs.folder / name, "3b1f")


def test_a_run_that_fails_shows_no_key_and_no_token(runs):
    env = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:1", "HF_TOKEN": TOKEN}
    patch = "import torch\ntorch.nn.utils.clip_grad_norm_ = None  # a bug, so that a traceback is printed"
    status, out, err = runs.run("failing", env, patch)
    assert status == 1 and "Traceback" in err
    for secret in (KEY, TOKEN):
        assert secret not in out + err and not holding(runs.folder / "failing", secret)


@pytest.mark.parametrize("trouble", [False, True], ids=["works", "fails"])
def test_preparing_a_data_set_of_the_hub_shows_no_token(tmp_path, trouble):
    lines = "".join(json.dumps({"text": f"Text number {i} of the hub."}) + "\n" for i in range(50))
    hub = Hub({"data/train.jsonl": lines.encode()}, "owner/name", "a" * 40)
    if trouble:
        hub.trouble = lambda handler, number: handler.answer(403, b"no") or True
    seen = []
    answer = hub.RequestHandlerClass.send_response
    handler = type("Noting", (hub.RequestHandlerClass,), {})
    handler.send_response = lambda self, *rest: seen.append(self.headers.get("Authorization")) or answer(self, *rest)
    hub.RequestHandlerClass = handler
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    env = plain_environment(HF_TOKEN=TOKEN, HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}", HOME=str(tmp_path))
    env |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    flags = ["--source", "owner/name", "--out_dir", str(tmp_path / "out"), "--vocab_size", "512", "--num_proc", "1"]
    script = ROOT / "load_fineweb_dataset.py"
    process = start_run(flags, script=script, env=env, cwd=tmp_path)
    out, err = (text.decode() for text in process.communicate(timeout=100))
    hub.shutdown()
    hub.server_close()
    assert (process.returncode != 0) == trouble, err
    assert f"Bearer {TOKEN}" in seen  # the hub got it, and nobody else
    (tmp_path / "a file").write_text("so that there is one")
    assert TOKEN not in out + err and not holding(tmp_path, TOKEN)
