"""processes.py, watch.py: what ranks agree on, how they wait for one another, and how they end."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import free_port
from test_model_utils import set_ranks

import processes
import watch
from processes import Process, agree_on_stop, gather, named_ranks, run_on_rank_zero, start_process, sum_over_processes
from watch import SIGNALS, Watch

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def watching():
    """A watch in this process, which is closed at the end."""
    watch = Watch()
    watch.start()
    yield watch
    watch.close()


# ---------------------------------------------------------------- one process


def test_processes_share_the_cores_that_they_may_use(monkeypatch):
    """A container or a batch job has only a part of the machine's cores."""
    set_ranks(monkeypatch, 1, 2)
    threads = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(processes, "own_store", lambda limit: torch.distributed.HashStore())
    process = start_process(CPU)
    process.watch.close()
    assert process.world_size == 2
    assert threads == [3]


def test_process_on_a_cpu_keeps_freed_memory(monkeypatch):
    """A stand-in for the C library notes the two switches: M_MMAP_MAX and M_TRIM_THRESHOLD."""
    switches = {}
    library = SimpleNamespace(mallopt=switches.__setitem__)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    start_process(CPU).watch.close()
    assert switches == {-4: 0, -1: -1}


def test_only_the_main_process_prints(capsys):
    for rank in (0, 1):
        Process(rank, 2, CPU).print("rank", rank)
    assert capsys.readouterr().out == "rank 0\n"


def test_one_process_agrees_with_itself():
    process = Process(0, 1, CPU)
    assert sum_over_processes([1.5, 2.0], process) == [1.5, 2.0]
    assert gather(3.0, process) == [3.0] and agree_on_stop(process) == 0
    assert run_on_rank_zero(lambda: {"a": 1}, process) == {"a": 1}


@pytest.mark.parametrize(
    ("ranks", "words"), [([3], "rank 3"), ([0, 1, 2, 5], "ranks 0-2, 5"), ([0, 2, 4, 5], "ranks 0, 2, 4-5")]
)
def test_ranks_are_named_in_runs(ranks, words):
    assert named_ranks(ranks) == words


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number", SIGNALS)
def test_a_stop_signal_is_noted_and_its_handler_restored(number):
    before = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored, and the watch leaves it so
    watch = Watch()
    watch.start()
    try:
        assert watch.stop == 0
        os.kill(os.getpid(), number)
        time.sleep(0.05)
        assert watch.stop == number
        assert Process(0, 1, CPU, watch).is_told_to_stop() and agree_on_stop(Process(0, 1, CPU, watch)) == number
    finally:
        watch.close()
        restored = signal.signal(number, before)
    assert restored == signal.SIG_DFL


def test_the_first_signal_counts_and_one_soon_after_is_the_same_wish(watching):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.1)
    assert watching.stop == signal.SIGTERM


def test_a_signal_is_heard_while_the_main_thread_is_in_c_code():
    """As in a long product: the handler in Python cannot run. The child's `beat` shows that the watch has heard."""
    code = """
        import os, signal, threading, time
        from watch import Watch
        heard = []
        watch = Watch()
        watch._hear = lambda number: heard.append((number, time.monotonic()))
        watch.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        began = time.monotonic()
        import ctypes
        ctypes.CDLL(None).usleep.restype = ctypes.c_int
        while time.monotonic() - began < 2:
            ctypes.CDLL(None).usleep(2_000_000)
        print(heard[0][0], heard[0][1] - began < 1.5)
        watch.close()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == [str(int(signal.SIGTERM)), "True"], done


@pytest.mark.parametrize(("pause", "status"), [(0.2, 0), (2.5, 128 + signal.SIGTERM)])
def test_a_second_signal_much_later_ends_the_process_at_once(pause, status):
    code = f"""
        import os, signal, time
        from watch import Watch
        watch = Watch()
        watch.start()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep({pause})
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        watch.close()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == status, done
    assert ("ends at once" in done.stderr) == (status != 0)


def test_an_ignored_hang_up_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    watch = Watch()
    try:
        watch.start()
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.05)
        assert watch.stop == 0
        watch.close()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_step_far_longer_than_usual_prints_the_stacks_once(watching, monkeypatch, capfd):
    monkeypatch.setattr(watch, "LEAST_SLOW", 0.5)
    monkeypatch.setattr(watch, "PERIOD", 0.1)
    watching._wake()
    for step in range(4):
        watching.begin(step)
        watching.end("")
    assert "takes more than" not in capfd.readouterr().err
    watching.begin(4)
    time.sleep(1.5)
    watching.end("")
    err = capfd.readouterr().err
    assert err.count("step 4 takes more than 10 times the usual") == 1
    assert "test_a_step_far_longer_than_usual" in err  # in the stack of the main thread


# ---------------------------------------------------------------- several ranks
# They share a real store. Each is a watch in this process, or a process of its own.


@pytest.fixture
def store():
    return torch.distributed.TCPStore("127.0.0.1", free_port(), is_master=True, timeout=timedelta(seconds=20))


def record_of(rank: int, **changes) -> str:
    record = {
        "host": socket.gethostname(),
        "pid": 2**22 + 1,
        "mark": "",
        "beat": 1,
        "at": "step 7",
        "failed": "",
        "stop": 0,
    }
    return json.dumps(record | changes)


def test_a_signal_to_one_rank_reaches_the_other(store, monkeypatch):
    monkeypatch.setattr(watch, "PERIOD", 0.05)
    store.set("rank/1", record_of(1))
    other = Watch(0, 2, store)
    other.start()
    try:
        time.sleep(0.2)
        assert other.stop == 0
        store.set("rank/1", record_of(1, stop=int(signal.SIGUSR1)))
        time.sleep(0.3)
        assert other.stop == signal.SIGUSR1
        assert json.loads(store.get("rank/0"))["stop"] == signal.SIGUSR1
    finally:
        other.close()
    assert json.loads(store.get("rank/0"))["ended"] is True


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"failed": "OSError: the disk is full"}, "rank 1 has failed at step 7: OSError: the disk is full"),
        ({}, "at step 7) has given no sign of life for 0.5 seconds"),
    ],
)
def test_a_rank_that_has_failed_or_fallen_silent_ends_the_others(store, monkeypatch, capfd, changes, words):
    """The main thread may wait in a collective for ever. So the watch ends the process."""
    ends, waited = [], []
    monkeypatch.setattr(watch, "PERIOD", 0.05)
    monkeypatch.setattr(watch, "LAST_SECONDS", 0.3)
    monkeypatch.setattr(os, "_exit", lambda status: ends.append(status))
    store.set("rank/1", record_of(1, **changes))
    other = Watch(0, 2, store, timeout=0.5)
    other.before_end = lambda: waited.append(1)
    other.start()
    try:
        deadline = time.monotonic() + 10
        while not ends and time.monotonic() < deadline:
            time.sleep(0.05)
        assert ends and ends[0] == 1 and waited
        assert words.partition(" for 0.5")[0] in other.failures(0)
    finally:
        other.close()
    err = capfd.readouterr().err
    assert err.count("so this rank ends too") == 1 and words in err


@pytest.mark.parametrize("stop", [0, int(signal.SIGTERM)])
def test_a_stop_signal_shortens_the_wait_for_a_silent_rank(store, monkeypatch, stop):
    """torchrun stops the others when one rank has died, and kills after 30 seconds what still waits for it."""
    ends = []
    monkeypatch.setattr(watch, "PERIOD", 0.05)
    monkeypatch.setattr(watch, "STOP_TIMEOUT", 0.5)
    monkeypatch.setattr(watch, "LAST_SECONDS", 0.1)
    monkeypatch.setattr(os, "_exit", ends.append)
    store.set("rank/1", record_of(1, stop=stop))
    other = Watch(0, 2, store, timeout=600)
    other.start()
    time.sleep(2)
    other.close()
    assert set(ends) == ({1} if stop else set())


def test_only_the_process_of_the_record_is_killed():
    """The number of a process may have been given to another one, or be that of another container."""
    mine = watch.mark_of(os.getpid())
    assert mine and mine == watch.mark_of(os.getpid()) != watch.mark_of(os.getppid()) != ""
    assert watch.mark_of(2**22 + 1) == ""
    killed, other = [], Watch(0, 2, None, timeout=0.1)
    for mark in (mine, mine.replace("pid:", "pid:1"), "", watch.mark_of(os.getppid())):
        other._others[1] = {"failed": "", "pid": os.getpid(), "mark": mark}
        other._changed[1] = 0.0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "kill", lambda pid, number, mark=mark: killed.append(mark))
            other._kill_silent_ranks()
    assert killed == [mine]


def test_a_fault_of_a_chore_does_not_silence_the_rank(store, monkeypatch, capfd):
    monkeypatch.setattr(watch, "PERIOD", 0.05)
    store.set("rank/1", record_of(1))
    other = Watch(0, 2, store)
    other.chores.append(lambda: 1 / 0)
    other.start()
    time.sleep(0.5)
    beats = [json.loads(store.get("rank/0"))["beat"]]
    time.sleep(0.5)
    beats.append(json.loads(store.get("rank/0"))["beat"])
    other.close()
    assert beats[1] > beats[0] + 2
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_rank_that_has_ended_may_be_silent(store, monkeypatch):
    monkeypatch.setattr(watch, "PERIOD", 0.05)
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("ended"))
    store.set("rank/1", record_of(1, ended=True))
    other = Watch(0, 2, store, timeout=0.2)
    other.start()
    time.sleep(1)
    other.close()


def test_the_first_rank_that_is_alive_speaks_for_all():
    now = time.monotonic()
    for silent, is_first in (((0, 1), True), ((0,), False), ((1,), False)):
        third = Watch(2, 3, store="there")
        third._changed = {rank: now - 10 * (rank in silent) for rank in (0, 1)}
        assert third.is_first_alive() is is_first
    for record in ({"failed": "a cause"}, {"failed": "", "ended": True}):  # that rank has spoken for itself
        second = Watch(1, 2, store="there")
        second._changed, second._others = {0: now - 10}, {0: record}
        assert not second.is_first_alive()
    assert not Watch(2, 3, store="there").is_first_alive()  # nothing is known of the others yet
    assert Watch(0, 3).is_first_alive() and not Watch(2, 3).is_first_alive()  # the store is gone


def test_the_other_ranks_hear_of_a_failure_before_it_is_printed_how_to_go_on():
    calls = []
    watching = SimpleNamespace(fail=lambda cause: calls.append(cause), close=lambda: calls.append("closed"))
    speaking = SimpleNamespace(close=lambda: calls.append("printed"))
    processes.end_process(Process(0, 1, torch.device("cpu"), watching, speaking), "a cause")
    assert calls == ["a cause", "printed", "closed"]


def test_last_words_that_are_held_or_fail_do_not_keep_the_process(monkeypatch):
    """As where standard output is a pipe that nobody reads."""
    monkeypatch.setattr(watch, "LAST_SECONDS", 0.2)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    ended, reader = [], threading.Event()
    monkeypatch.setattr(os, "_exit", ended.append)
    for last_words in (reader.wait, lambda: 1 / 0):
        alone = Watch()
        alone.last_words = last_words
        alone._end(130, "a sentence")
    reader.set()
    assert ended == [130, 130]


def test_a_store_that_is_gone_asks_the_run_to_stop(monkeypatch, capfd):
    """torchrun hosts it. Killed alone, it would leave processes that nobody could stop."""

    class Gone:
        def set(self, key, value):
            if self.sets > 2:
                raise torch.distributed.DistNetworkError("Connection reset by peer")
            self.sets += 1

        def multi_get(self, keys):
            return [record_of(1) for _ in keys]

        sets = 0

    monkeypatch.setattr(watch, "PERIOD", 0.05)
    other = Watch(0, 2, Gone())
    other.start()
    time.sleep(0.5)
    other.close()
    other.tell("key")
    assert other.wait_for("key") is False  # and does not wait
    assert other.stop == signal.SIGTERM
    assert capfd.readouterr().err.count("torchrun is gone, so this run saves and stops") == 1


RANKS = """
import os, sys, time, torch
from datetime import timedelta
from processes import *
{before}
process = start_process(torch.device("cpu"), timeout=20)
cause = ""
try:
{body}
except Exception as error:
    cause = f"{{type(error).__name__}}: {{error}}"
    print(cause)
end_process(process, cause)
"""


def ranks(tmp_path: Path, body: str, count: int = 2, *, before: str = "", port: int = 0) -> list[str]:
    """What processes of `count` ranks print that run `body`. `before` comes before they meet, in a store at `port`."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(body=textwrap.indent(textwrap.dedent(body), "    "), before=textwrap.dedent(before)))
    port = port or free_port()
    env = os.environ | {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "PYTHONPATH": str(ROOT)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        return [process.communicate(timeout=90)[0] for process in started]
    finally:
        for process in started:
            process.kill()


def test_between_gpus_nccl_sends_and_gloo_agrees(monkeypatch):
    """A number that processes agree on must not wait for a GPU."""
    set_ranks(monkeypatch, 1, 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(processes, "own_store", lambda limit: torch.distributed.HashStore())
    started, sums = [], []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: started.append((args, kwargs)))
    monkeypatch.setattr(Watch, "start", lambda self: None)
    device = torch.device("cuda", 1)
    start_process(device, 60)
    [((backend,), place)] = started
    assert backend == "cpu:gloo,cuda:nccl" and place["device_id"] == device and place["timeout"] == timedelta(minutes=1)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: sums.append(tensor.device.type))
    assert sum_over_processes([1.0], Process(1, 2, device)) == [1.0] and sums == ["cpu"]


def test_ranks_agree_learn_of_failures_and_compare_what_they_have(tmp_path):
    body = """
        assert gather(process.rank + 1.5, process) == [1.5, 2.5]
        if process.rank:
            process.watch.stop = 10
        assert agree_on_stop(process) == 10
        assert gather_on_device(torch.tensor(process.rank + 0.5), process).tolist() == [0.5, 1.5]
        assert run_on_rank_zero(lambda: time.sleep(1) or {"found": [1]}, process) == {"found": [1]}
        compare_ranks({"seed": 1, "data": {"a": 2}}, process)
        try:
            compare_ranks({"seed": process.rank, "data": [1], "step": process.rank * 7}, process)
        except ValueError as error:
            print(error)
        run_on_rank_zero(lambda: 1 / 0, process)
    """
    outputs = ranks(tmp_path, body)
    for output in outputs:
        assert "seed: 0 on rank 0; 1 on rank 1" in output and "step: 0 on rank 0; 7 on rank 1" in output
        assert "data: " not in output
    assert "ZeroDivisionError" in outputs[0] and "RankZeroFailed" in outputs[1]


def test_work_of_rank_zero_may_take_longer_than_a_collective(tmp_path):
    """The others do not wait in a collective, whose time is limited."""
    body = """
        import torch.distributed as dist
        dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))._set_default_timeout(timedelta(seconds=1))
        print(run_on_rank_zero(lambda: time.sleep(4), process), sum_over_processes([1.0], process))
    """
    assert [output.strip() for output in ranks(tmp_path, body)] == ["None [2.0]"] * 2


def test_a_restart_does_not_read_what_the_ranks_before_have_left_in_the_store(store, tmp_path, monkeypatch):
    """torchrun's store outlives its ranks. Here rank 1 starts first, while all keys of the time before are there."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    body = """
        print(sum_over_processes([process.rank + 1.0], process))
    """
    assert ranks(tmp_path, body, port=store.port) == ["[3.0]\n"] * 2
    keys = store.num_keys()
    late = """
        if os.environ["RANK"] == "0":
            time.sleep(3)
    """
    assert ranks(tmp_path, body, before=late, port=store.port) == ["[3.0]\n"] * 2
    assert store.num_keys() > keys
    assert json.loads(store.get("numbers"))[1] == store.get("number 1").decode()


def test_a_rank_that_never_starts_is_named(tmp_path, monkeypatch):
    """Rank 1 of 3 does not start, so rank zero ends after the time limit."""
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    set_ranks(monkeypatch, 0, 3)
    with pytest.raises(torch.distributed.DistError, match="ranks 1-2 did not start within 1 seconds"):
        processes.own_store(timedelta(seconds=1))
