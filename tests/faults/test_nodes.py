"""launch/slurm.sbatch, run by bash with a stand-in for Slurm: two torchrun agents on this machine are two nodes."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from ranks import Ranks, assert_same_bits, descendants, driver, is_running, rows_of, wait_until
from tiny_run import ROOT, STEPS, changed, plain_environment, tiny_corpus, tiny_flags, write_questions

SCRIPT = ROOT / "launch/slurm.sbatch"
TIMEOUT = 20
in_short_form, in_long_form = (partial(pytest.param, marks=mark) for mark in (pytest.mark.faults, pytest.mark.slow))

# Starts the command on each "node", which has one core. Passes SIGUSR1 on to the first of them, or to all.
SRUN = """#!{python}
import json, os, signal, subprocess, sys
from pathlib import Path
folder = Path({folder!r})
command = sys.argv[sys.argv.index("torchrun"):]
(folder / "command").write_text(json.dumps(command))
nodes = []
cores = sorted(os.sched_getaffinity(0))
for node in range(int(os.environ["SLURM_NNODES"])):
    os.sched_setaffinity(0, [cores[node % len(cores)]])
    with open(folder / f"node.{{node}}", "ab") as log:
        nodes.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
(folder / "agents").write_text(json.dumps([node.pid for node in nodes]))
count = int((folder / "signalled").read_text())
signal.signal(signal.SIGUSR1, lambda *_: [node.send_signal(signal.SIGUSR1) for node in nodes[:count]])
statuses = [node.wait() for node in nodes]
sys.exit(max(128 - status if status < 0 else status for status in statuses))
"""
SCONTROL = """#!/bin/bash
if [ "$1 $2" = "show hostnames" ]; then printf '127.0.0.1\\n127.0.0.1\\n'; else echo "$*" >> '{folder}/scontrol'; fi
"""
SLOWED = """
import time
from torch.optim.optimizer import register_optimizer_step_post_hook
note("pids", os.getpid())
register_optimizer_step_post_hook(lambda *_: time.sleep(0.05))
"""
SLOW_SYNC = """
fsync = os.fsync
os.fsync = lambda fd: (time.sleep(0.03), fsync(fd))
"""


class Cluster:
    """A folder with stand-ins for srun and scontrol, and a slowed train.py."""

    def __init__(self, folder: Path, flags: list[str], *, srun: str = SRUN, signalled: int = 2):
        self.folder, self.out_dir, self.flags = folder, folder / "run", flags
        script = driver(folder / "work", SLOWED)
        self.work = script.rename(script.with_name("train.py")).parent
        for name, text in (("srun", srun), ("scontrol", SCONTROL)):
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text.format(python=sys.executable, folder=str(folder)))
            path.chmod(0o755)
        (folder / "signalled").write_text(str(signalled))

    def submit(self) -> subprocess.Popen:
        """Start the script as Slurm does."""
        path = os.pathsep.join([str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
        env = plain_environment(PATH=path, OUT_DIR=str(self.out_dir), **slurm)
        with open(self.folder / "log", "ab") as log:
            return subprocess.Popen(["bash", str(SCRIPT), *self.flags], cwd=self.work, env=env, stdout=log, stderr=log)

    def train(self) -> int:
        """Run the script to its end. Returns its status."""
        job = self.submit()
        try:
            return job.wait(90)
        finally:
            job.kill()

    def text(self) -> str:
        return "".join(path.read_text() for path in [self.folder / "log", *sorted(self.folder.glob("node.*"))])

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: (self.out_dir / "metrics.jsonl").is_file() and len(rows_of(self.out_dir)) >= step, 60)

    def requeued(self) -> list[str]:
        path = self.folder / "scontrol"
        return path.read_text().splitlines() if path.is_file() else []

    def worker(self, rank: int) -> int:
        return int((self.work / f"pids.{rank}").read_text().split()[-1])

    def assert_nobody_left(self) -> None:
        assert not [rank for rank in (0, 1) if is_running(self.worker(rank))]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags without --out_dir, which the script gives."""
    folder = tmp_path_factory.mktemp("corpus")
    words = tiny_flags(tiny_corpus(folder), write_questions(folder), Path(), save_every=5, timeout=TIMEOUT)
    place = words.index("--out_dir")
    return words[:place] + words[place + 2 :]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> Path:
    """An uninterrupted run of two ranks on one node."""
    folder = tmp_path_factory.mktemp("whole")
    with Ranks(driver(folder / "driver", ""), [*flags, "--out_dir", str(folder / "run")], 2) as ranks:
        assert ranks.wait(90) == [0, 0], ranks.text("err")
    return folder / "run"


@pytest.mark.faults
def test_two_nodes_train_what_two_ranks_of_one_node_train(flags, whole, tmp_path):
    cluster = Cluster(tmp_path, flags)
    assert cluster.train() == 0, cluster.text()
    assert_same_bits(cluster.out_dir, whole, first_step=1)
    assert not cluster.requeued()


@pytest.mark.parametrize("signalled", [in_short_form(1), in_long_form(2)])
def test_the_signal_before_the_time_limit_saves_and_requeues(flags, whole, tmp_path, signalled):
    """Slurm signals all nodes. If only one hears of it, the other one stops all the same."""
    cluster = Cluster(tmp_path, flags, signalled=signalled)
    job = cluster.submit()
    cluster.wait_for_step(7)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 0, cluster.text()
    assert cluster.requeued() == [f"requeue {os.getpid()}"]
    cluster.assert_nobody_left()
    steps = len(rows_of(cluster.out_dir))
    assert 7 <= steps < STEPS
    assert f"stopped after step {steps} by SIGUSR1" in cluster.text()
    assert (cluster.out_dir / f"checkpoints/step_{steps:08d}/checkpoint.json").is_file()
    assert cluster.train() == 0, cluster.text()  # as Slurm starts it again
    assert_same_bits(cluster.out_dir, whole, first_step=1)
    assert len(cluster.requeued()) == 1


@pytest.mark.parametrize("lost", [in_short_form(0), in_long_form(1)])
def test_a_lost_node_ends_the_other_one_and_the_next_job_goes_on(flags, whole, tmp_path, lost):
    cluster = Cluster(tmp_path, flags)
    job = cluster.submit()
    cluster.wait_for_step(12)
    agents = json.loads((tmp_path / "agents").read_text())
    agent = next(pid for pid in agents if cluster.worker(lost) in descendants(pid))
    for pid in (cluster.worker(lost), agent):
        os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    assert job.wait(TIMEOUT + 30) != 0
    assert time.monotonic() - began < TIMEOUT + 5, cluster.text()
    cluster.assert_nobody_left()
    assert f"rank {lost} (process {cluster.worker(lost)} on " in cluster.text()
    assert not cluster.requeued()  # Slurm's own --requeue does this when a node fails
    assert cluster.train() == 0, cluster.text()
    assert_same_bits(cluster.out_dir, whole, first_step=1)


ENDED_BY_SIGNAL = """#!/bin/bash
trap 'exit 1' USR1
touch '{folder}/started'
while true; do sleep 0.05; done
"""


@pytest.mark.faults
def test_a_job_that_saves_nothing_does_not_go_back_into_the_queue(tmp_path):
    """Else a run that cannot save would fill the queue for ever."""
    cluster = Cluster(tmp_path, [], srun=ENDED_BY_SIGNAL)
    job = cluster.submit()
    wait_until((tmp_path / "started").exists)
    time.sleep(0.2)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 1
    assert not cluster.requeued() and "has saved no checkpoint" in cluster.text()


@pytest.mark.faults
def test_the_status_of_a_failure_is_that_of_the_job(tmp_path):
    cluster = Cluster(tmp_path, [], srun="#!/bin/bash\nexit 7\n")
    assert cluster.train() == 7
    assert not cluster.requeued()


@pytest.mark.faults
def test_a_signal_that_ends_torchrun_alone_still_ends_the_run(flags, whole, tmp_path):
    """Without --signals-to-handle SIGUSR1 kills torchrun. Its ranks have sessions of their own and would train on.

    Saves are slow here, so rank 1 mostly waits for rank zero, and the store where it waits goes with torchrun.
    """
    words = changed([*flags, "--out_dir", str(tmp_path / "run")], "--save_every", "1")
    with Ranks(driver(tmp_path / "driver", SLOWED + SLOW_SYNC), words, 2, torchrun=True) as ranks:
        wait_until(lambda: (tmp_path / "run/metrics.jsonl").is_file() and len(rows_of(tmp_path / "run")) >= 7, 60)
        pids = [int(ranks.text("pids", rank)) for rank in (0, 1)]
        ranks.processes[0].send_signal(signal.SIGUSR1)
        assert ranks.wait(10) == [-signal.SIGUSR1]
        try:
            wait_until(lambda: not any(map(is_running, pids)), 20)
        finally:
            for pid in filter(is_running, pids):
                os.kill(pid, signal.SIGKILL)
        assert "torchrun is gone, so this run saves and stops" in ranks.text("err")
        assert " by SIGTERM\n" in ranks.text("out") and "--resume True\n" in ranks.text("out"), ranks.text("err")
    steps = len(rows_of(tmp_path / "run"))
    assert (tmp_path / f"run/checkpoints/step_{steps:08d}/checkpoint.json").is_file()
    with Ranks(driver(tmp_path / "plain", ""), changed(words, "--resume", "True", "--save_every", "5"), 2) as ranks:
        assert ranks.wait(90) == [0, 0], ranks.text("err")
    assert_same_bits(tmp_path / "run", whole, first_step=1)
