"""Output to a console never ends a run: its reader dies, the terminal is lost, the disk behind it is full."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import ROOT, plain_environment, start_run, tiny_corpus, tiny_flags, write_questions

pytestmark = [pytest.mark.faults, pytest.mark.skipif(os.name != "posix", reason="pipes and terminals of POSIX")]


@pytest.fixture(scope="module")
def flags_for(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    corpus, questions = tiny_corpus(folder), write_questions(folder)

    def flags(out_dir: Path, **changes) -> list[str]:
        short = {"max_steps": 4, "save_every": 2, "val_every": 2, "generate_every": 2, "log_every": 1}
        return tiny_flags(corpus, questions, out_dir, **short | changes)

    return flags


def assert_finished(out_dir: Path, step: int = 4) -> None:
    assert (out_dir / f"checkpoints/step_{step:08d}/checkpoint.json").is_file()
    assert (out_dir / "report.html").is_file()


# ---------------------------------------------------------------- every way to write, in a process without torch

WRITERS = """
import faulthandler, logging, os, sys
sys.path.insert(0, {root!r})
from files import allow_any_text_in_output, let_output_fail
logging.basicConfig(stream=sys.stderr)
allow_any_text_in_output()
let_output_fail()
let_output_fail()
print("first", flush=True)
sys.stdin.readline()  # until the test has broken the console
from tqdm import tqdm
for stream in (sys.stdout, sys.stderr):
    for _ in range(3):
        print("x" * 20_000, file=stream)
        print("東京", file=stream, flush=True)
        stream.write("no newline")
        stream.flush()
    for _ in tqdm(range(3), file=stream, mininterval=0):
        pass
faulthandler.dump_traceback(file=sys.stderr)
logging.error("a line")
open({done!r}, "w").close()
print("left for the last flush", end="")
"""


def open_console(kind: str) -> tuple[int, list[int]]:
    """A console, and what to close so that it breaks."""
    if kind == "pty":  # without being anybody's controlling terminal, so that it sends no SIGHUP
        master, console = os.openpty()
        return console, [master]
    if kind == "full disk":
        return os.open("/dev/full", os.O_WRONLY), []
    reader, console = os.pipe()
    return console, [reader]


@pytest.mark.parametrize("kind", ["pipe", "pty", "full disk"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_every_way_to_write_survives_a_broken_console(tmp_path, kind, unbuffered):
    script = WRITERS.format(root=str(ROOT), done=str(tmp_path / "done"))
    console, others = open_console(kind)
    env = plain_environment(PYTHONUNBUFFERED=unbuffered)
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=console, stderr=console, env=env)
    os.close(console)
    for other in others:
        assert b"first" in os.read(other, 100)
        os.close(other)
    process.communicate(b"\n", timeout=60)
    assert process.returncode == 0  # and not 120, the interpreter's for a failed last flush
    assert (tmp_path / "done").exists()


def test_output_closed_before_the_start_is_no_error(tmp_path):
    script = WRITERS.format(root=str(ROOT), done=str(tmp_path / "done"))
    command = ["sh", "-c", 'exec "$0" -c "$1" >&- 2>&-', sys.executable, script]
    assert subprocess.run(command, input=b"\n", env=plain_environment(), timeout=60).returncode == 0
    assert (tmp_path / "done").exists()


def test_a_console_that_works_gets_every_byte(tmp_path):
    script = WRITERS.format(root=str(ROOT), done=str(tmp_path / "done"))
    command = [sys.executable, "-c", script]
    env = plain_environment(PYTHONIOENCODING="ascii")
    result = subprocess.run(command, input=b"\n", capture_output=True, env=env, timeout=60)
    assert result.returncode == 0
    assert result.stdout.startswith(b"first\n" + b"x" * 20_000 + b"\n??\nno newline")
    assert result.stdout.endswith(b"left for the last flush")
    assert b"\\u6771" in result.stderr and b"ERROR:root:a line" in result.stderr and b"most recent" in result.stderr


@pytest.mark.parametrize("slow_reader", [False, True])
def test_a_console_that_another_program_made_non_blocking_gets_every_byte(tmp_path, slow_reader):
    """A pipe that is full then answers EAGAIN. Without care this is an error, or text is lost."""
    reader, console = os.pipe()
    os.set_blocking(console, False)
    script = WRITERS.format(root=str(ROOT), done=str(tmp_path / "done"))
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=console, stderr=console)
    os.close(console)
    process.stdin.write(b"\n")
    process.stdin.close()
    if slow_reader:
        with pytest.raises(subprocess.TimeoutExpired):  # it waits, with the pipe full
            process.wait(timeout=1)
    with open(reader, "rb") as file:
        text = file.read()
    assert process.wait(timeout=60) == 0
    assert text.count(b"x" * 20_000) == 6 and b"left for the last flush" in text


# ---------------------------------------------------------------- runs


def test_run_piped_into_head_finishes(flags_for, tmp_path):
    run = start_run(flags_for(tmp_path), stderr=subprocess.STDOUT)
    head = subprocess.Popen(["head", "-n", "3"], stdin=run.stdout, stdout=subprocess.PIPE)
    run.stdout.close()
    assert len(head.communicate(timeout=90)[0].splitlines()) == 3
    assert run.wait(timeout=90) == 0
    assert_finished(tmp_path)


def test_ctrl_c_after_the_death_of_tee_saves_and_stops(flags_for, tmp_path):
    """Ctrl-C under `train.py | tee log` reaches both. tee dies first."""
    run = start_run(flags_for(tmp_path, max_steps=100_000, save_every=0, val_every=0, generate_every=0))
    while b"loss" not in run.stdout.readline():
        assert run.poll() is None
    run.stdout.close()
    run.stderr.close()
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=60) == 128 + signal.SIGINT
    [checkpoint] = (tmp_path / "checkpoints").glob("step_*")
    assert (checkpoint / "checkpoint.json").is_file()


def test_run_in_a_lost_terminal_finishes(flags_for, tmp_path):
    console, [master] = open_console("pty")
    run = start_run(flags_for(tmp_path), stdout=console, stderr=console)
    os.close(console)
    seen = b""
    while b"step" not in seen:
        seen += os.read(master, 1000)
    os.close(master)
    assert run.wait(timeout=90) == 0
    assert_finished(tmp_path)


def test_run_with_its_output_on_a_full_disk_and_error_that_is_closed_finishes(flags_for, tmp_path):
    with open("/dev/full", "wb") as full:
        run = start_run(flags_for(tmp_path), stdout=full)
        run.stderr.close()
        assert run.wait(timeout=90) == 0
    assert_finished(tmp_path)


def test_run_with_a_console_of_few_characters_finishes(flags_for, tmp_path):
    run = start_run(flags_for(tmp_path, prompts=["東京"]), env=plain_environment(PYTHONIOENCODING="ascii"))
    out, err = run.communicate(timeout=90)
    assert run.returncode == 0, err
    assert b"??" in out and "東京" in (tmp_path / "samples.txt").read_text(encoding="utf-8")
    assert_finished(tmp_path)
