"""progress.py and next_commands.py: the bar, the lines, the answer to a stop signal, the end, and how to go on."""

import io
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from ranks import driver
from tiny_run import plain_environment, start_run, tiny_corpus, tiny_flags, write_questions

import next_commands
import progress
from next_commands import resume_command, talk_command
from progress import SAVING, SILENCE, Progress, decimals, duration, summary, way_on
from records import Records, folded
from train import ORIGINAL, SAMPLE

LARGEST = 9_999_999  # steps


@pytest.fixture
def clock(monkeypatch):
    """The time of progress.py. Set `clock.now`."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    return clock


def followed(out_dir: Path) -> Progress:
    """The progress of a run after step 7, without its thread. It has a checkpoint of step 5."""
    following = Progress(SimpleNamespace(stop=0, is_first_alive=lambda: True), is_shown=True)
    following.begin(replace(ORIGINAL, out_dir=str(out_dir), max_steps=LARGEST), step=5, saved=5)
    (out_dir / "checkpoints/step_00000005").mkdir(parents=True)
    following.updated(7)
    following.figures = ["loss 3.0568", "23.4k tokens/s", "4m05s left"]
    return following


def screen(text: str) -> list[str]:
    """The lines of a wide terminal that has got `text`, which moves the cursor by nothing but \\r and \\n."""
    assert "\x1b" not in text
    lines, column = [""], 0
    for part in re.findall(r"[\r\n]|[^\r\n]+", text):
        if part in "\r\n":
            column = 0
            lines += [""] if part == "\n" else []
        else:
            lines[-1] = lines[-1][:column] + part + lines[-1][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


# ---------------------------------------------------------------- figures and lines


def test_figures_stay_short():
    assert [duration(s) for s in (0, 59.6, 245, 3900, 86399, 1e6)] == [
        "0s",
        "1m00s",
        "4m05s",
        "1h05m",
        "23h59m",
        "11d13h",
    ]
    assert [decimals(x, 2) for x in (0.637, 99.4, -3.0, 123456.0)] == ["0.64", "99.40", "-3.00", "1.2e+05"]


def records_that_print(lines: list[str], cfg) -> Records:
    records = Records.__new__(Records)  # without a folder and a model
    records.cfg, records.metrics, records.first_step, records.since_line = cfg, None, None, []
    records.peak, records.flops = 1e12, 1e6

    def note(*words: str, sep: str = " ") -> None:
        lines.extend(sep.join(words).split("\n"))

    records.process = SimpleNamespace(print=note, progress=Progress())
    return records


@pytest.mark.parametrize("size", [1.0, 1e5])
def test_no_line_is_longer_than_80_columns(size):
    lines: list[str] = []
    cfg = replace(ORIGINAL, max_steps=LARGEST, log_every=1, total_batch_size=2**24)
    records = records_that_print(lines, cfg)
    row = {"train_loss": 12.3456 * size, "lr": 6e-4, "grad_norm": 12.34 * size}
    records.training(LARGEST - 500, 100.0, row)
    records.first_step = LARGEST - 500, time.perf_counter() - 86400  # a day a step
    records.training(LARGEST - 499, 17.0, row)
    records.training(LARGEST - 498, 17.0, {"skipped": 10})
    records.validation(
        LARGEST, {"val_loss": 12.34567 * size, "val_bpb": 5.4321 * size}, {"data/a": 0.75, "data/b": 0.25}
    )
    score = {"hellaswag_acc": 0.999, "hellaswag_acc_norm": 0.999}
    records.hellaswag(LARGEST, score | {"hellaswag_examples": 10_042}, "HellaSwag")
    records.hellaswag(999_999, score | {"hellaswag_examples": 200}, "sample continuations")
    assert len(lines) == 8 and max(map(len, lines)) <= 80, "\n".join(lines)
    assert lines[0].startswith(f"step {LARGEST - 500}  loss 1") and "tokens/s" in lines[0] and "left" in lines[1]
    assert lines[4].strip() == "75.0% of data/a"


def test_a_line_has_the_speed_since_the_last_line_and_the_first_one_is_shown():
    lines: list[str] = []
    records = records_that_print(lines, replace(SAMPLE, log_every=3, max_steps=100, total_batch_size=100))
    for step, seconds in ((1, 100.0), (2, 1.0), (3, 3.0), (4, 1.0), (5, 1.0), (6, 8.0)):
        records.training(step, seconds, {"train_loss": 2.0, "lr": 0.1, "grad_norm": 1.0})
    speeds = [re.search(r"step +(\d+) .*  (\S+) tokens/s", line).groups() for line in lines]
    assert speeds == [("1", "1.00"), ("3", "50.0"), ("6", "30.0")]


def test_samples_are_folded_and_cannot_move_the_cursor():
    text = folded("a\x1b[2Jb\tc\rnext " + "word " * 40)
    lines = text.split("\n")
    assert lines[0] == "a?[2Jb  c" and max(map(len, lines)) <= 80
    assert "".join(lines[1:]).split() == ["next", *["word"] * 40]
    assert folded("def f():\n    return 1") == "def f():\n    return 1"


# ---------------------------------------------------------------- the bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show_in(out: io.StringIO, monkeypatch, term: str = "xterm") -> io.StringIO:
    """Let `out` be standard output and standard error. A fixture would come before pytest's own streams."""
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setenv("TERM", term)
    return out


def test_lines_come_above_the_bar_and_the_bar_has_79_columns_at_most(monkeypatch, clock, tmp_path):
    terminal = show_in(Terminal(), monkeypatch)
    following = followed(tmp_path)
    print("before")
    print("a", "b", end=" ")
    print("c")
    sys.stderr.write("no newline")
    following.tick()
    following.micro_step(8, 4, 16)
    clock.now += 35
    following.tick()
    sys.stderr.write(", and now\nand more\n")
    *lines, last = screen(terminal.getvalue())
    assert lines == ["before", "a b c", "no newline, and now", "and more"]
    assert last.startswith(f"step 7/{LARGEST} ") and "loss 3.0568  23.4k tokens/s  4m05s left" in last
    assert last.endswith("micro-step 5/16 35s")
    following.figures = ["loss 12.3456", "12.3M tokens/s", "365d03h left"] * 2
    following.tick()
    assert max(map(len, screen(terminal.getvalue()))) == 79
    following.is_over = True
    sys.stdout.write("the end")
    following.close()
    assert sys.stdout is sys.stderr is terminal
    assert screen(terminal.getvalue()) == [*lines, "the end"]


@pytest.mark.parametrize(("out", "term"), [(io.StringIO, "xterm"), (Terminal, "dumb")])
def test_elsewhere_a_plain_line_ends_a_silence(monkeypatch, clock, tmp_path, out, term):
    written = show_in(out(), monkeypatch, term)
    following = followed(tmp_path)
    following.figures = ()
    following.micro_step(8, 0, 16)
    for part in range(1, 6):
        clock.now += 4.5
        following.micro_step(8, part, 16)
        following.tick()
    following.updated(8)
    following.figures = ["loss 3.0568", "12 tokens/s"]
    following.doing("validation", 0, 64)
    clock.now += SILENCE - 1
    following.doing("validation", 1, 64)
    following.tick()  # many things have happened in these seconds
    following.doing(SAVING)
    clock.now += SILENCE + 2
    following.tick()
    following.said()
    clock.now += SILENCE - 1
    following.tick()
    assert written.getvalue().splitlines() == [
        "step      8  micro-step 4 of 16, 14s so far",
        "step      8  loss 3.0568  12 tokens/s",
        "step      8  saving, 12s so far",
    ]


# ---------------------------------------------------------------- stopping


@pytest.mark.parametrize(
    ("step", "saved", "call", "words"),
    [
        (7, 5, ("micro_step", 8, 0, 1), "finishing step 8, then saving"),
        (7, 5, ("micro_step", 8, 15, 16), "finishing step 8, then saving"),
        (7, 5, ("micro_step", 8, 14, 16), "leaving step 8, then saving step 7"),
        (5, 5, ("micro_step", 6, 0, 16), "leaving step 6, step 5 is saved"),
        (6, 6, ("micro_step", 7, 0, 16), "leaving step 7, then ending the save"),  # its folder is not there yet
        (0, 0, ("micro_step", 1, 0, 16), "leaving step 1, nothing to save yet"),
        (0, 0, ("doing", "validation", 3, 64), "leaving the validation, nothing to save yet"),
        (7, 5, ("doing", "benchmark"), "leaving the benchmark, then saving step 7"),
        (5, -1, ("doing", "validation"), "leaving the validation, then saving step 5"),
        (7, 7, ("doing", SAVING), "saving step 7, then stopping"),
    ],
)
def test_a_stop_signal_is_answered_once_with_what_is_true(capsys, clock, tmp_path, step, saved, call, words):
    following = followed(tmp_path)
    following.step, following.saved = step, saved
    getattr(following, call[0])(*call[1:])
    following.watch.stop = signal.SIGINT
    following.tick()
    following.tick()
    assert capsys.readouterr().out == f"SIGINT: {words}; Ctrl-C again to stop now\n"


def test_the_answer_at_the_end_fits_into_80_columns(capsys, clock, tmp_path):
    following = followed(tmp_path)
    following.is_over, following.watch.stop = True, signal.SIGINT
    following.tick()
    assert "all steps are saved" in (line := capsys.readouterr().out) and len(line) <= 81


NO_BARS = """
import io, sys
from types import SimpleNamespace
from progress import Progress
class Terminal(io.StringIO):
    isatty = lambda self: True
out = sys.stdout = sys.stderr = Terminal()
following = Progress(SimpleNamespace(stop=0, is_first_alive=lambda: False), is_shown=True)
following.begin(SimpleNamespace(max_steps=5, out_dir="run", config=""), 0, 0)
print("a line")
following.tick()
following.close()
sys.exit("a line" not in out.getvalue())
"""


def test_a_switch_for_other_bars_does_not_break_this_one():
    """tqdm reads TQDM_DISABLE when it is imported."""
    environment = plain_environment(TQDM_DISABLE="1", TERM="xterm", PYTHONPATH=os.path.dirname(progress.__file__))
    run = subprocess.run([sys.executable, "-c", NO_BARS], env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


def test_ctrl_c_is_not_named_to_who_did_not_press_it(capsys, clock, tmp_path):
    following = followed(tmp_path)
    following.has_begun, following.watch.stop = False, signal.SIGTERM
    following.tick()
    assert capsys.readouterr().out == "SIGTERM: stopping before the first step\n"


# ---------------------------------------------------------------- the end


def test_the_summary_has_eight_lines_and_the_last_can_be_pasted(tmp_path):
    cfg = replace(SAMPLE, out_dir=str(tmp_path / "a run"), max_steps=300, prompts=("def main():\n", "-x", "it's "))
    for step in (200, 300):
        (folder := tmp_path / f"a run/checkpoints/step_{step:08d}").mkdir(parents=True)
        (folder / "checkpoint.json").touch()
    losses = {0: 8.3542, 100: 4.5, 200: 3.25, 300: 3.5}
    rows = [{"step": step, "val_loss": loss, "val_bpb": loss / 2} for step, loss in losses.items()]
    lines = summary(cfg, [{"step": 1}, *rows], 100, 245, has_report=True)
    assert len(lines) == 8 and max(len(line) for line in lines if str(tmp_path) not in line) <= 80
    assert lines[0] == "done: 300 steps; the last 200, 410k tokens in 4m05s"
    assert [re.findall(r"([\d.]+) nats.* ([\d.]+) bits.*step (\d+)", line) for line in lines[1:4]] == [
        [("8.3542", "4.1771", "0")],
        [("3.2500", "1.6250", "200")],
        [("3.5000", "1.7500", "300")],
    ]
    assert lines[4].endswith("a run/report.html") and lines[5].endswith("step_00000300")
    assert shlex.split(lines[7])[2:] == ["--checkpoint", cfg.out_dir, "--prompt", "it's "]


ALONE = [".venv/bin/python", "-u", "train.py"]
FLAGS = ["--prompts", "it's a", "b c", "--resume", "best", "--max_lr=1e-3"]
KEPT = ["--prompts", "it's a", "b c", "--max_lr=1e-3", "--resume", "True"]


@pytest.fixture
def started(monkeypatch):
    """A function that lets this process look as if a command had started it."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)

    def start(words: list[str], flags: list[str], parent: list[str] | None = None, ranks: int = 2) -> None:
        monkeypatch.setattr(sys, "orig_argv", [*words, *flags])
        monkeypatch.setattr(sys, "argv", [words[-1], *flags])
        if parent is not None:
            monkeypatch.setenv("WORLD_SIZE", str(ranks))
            monkeypatch.setattr(next_commands, "launcher_words", lambda: parent)

    return start


def test_the_command_that_resumes_is_the_one_typed_with_resume_true(started):
    started(ALONE, FLAGS)
    assert shlex.split(resume_command()) == [*ALONE, *KEPT]
    assert shlex.split(talk_command("runs/a", ["x y"])) == [
        *(".venv/bin/python", "generate.py", "--checkpoint", "runs/a", "--prompt", "x y")
    ]
    started(["python", "code/train.py"], ["--resume=True"])
    assert resume_command() == "python code/train.py --resume True"
    assert resume_command("sample") == "python code/train.py --config sample --resume True"
    assert talk_command("runs/a", ()) == "python code/generate.py --checkpoint runs/a"
    assert talk_command("runs/a", (), "cpu") == "python code/generate.py --checkpoint runs/a --device cpu"


@pytest.mark.parametrize(
    ("parent", "python"),
    [
        (["torchrun", "--nnodes", "2", "--rdzv_endpoint", "a:29500"], "python"),
        ([".venv/bin/torchrun", "--nproc_per_node", "8"], ".venv/bin/python"),
        (["py", "-m", "torch.distributed.run", "--standalone"], "py"),
    ],
)
def test_under_torchrun_its_words_stand_before_the_script(started, parent, python):
    started(["/x/python", "-u", "train.py"], FLAGS, [*parent, "train.py", *FLAGS])
    assert shlex.split(resume_command()) == [*parent, "train.py", *KEPT]
    assert talk_command("runs/a", ()).startswith(f"{python} generate.py ")


@pytest.mark.parametrize("flags", [["--config=original"], ["--data_root", "a"], ["--init_from", "b"]])
def test_the_configuration_is_named_unless_a_flag_settles_it(started, flags):
    started(["python", "train.py"], flags)
    assert shlex.split(resume_command("original")) == ["python", "train.py", *flags, "--resume", "True"]


def test_a_node_rank_is_said_to_be_the_nodes_own(started, monkeypatch):
    started(["/x/python", "train.py"], [], ["torchrun", "--nnodes=2", "--node-rank=0", "train.py"], ranks=16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert next_commands.on_which_machines() == " on each node, with its own --node_rank"


def test_under_an_unknown_launcher_torchrun_is_named(started):
    started(["/x/python", "train.py"], FLAGS, [], ranks=4)
    words = ["torchrun", "--standalone", "--nproc_per_node", "4", "train.py"]
    assert shlex.split(resume_command()) == [*words, *KEPT]


def test_torchrun_is_found_in_the_command_line_of_the_parent(tmp_path):
    """A script of that name starts a process, which prints the words."""
    torchrun, child = tmp_path / "torchrun", tmp_path / "child.py"
    child.write_text(
        f"import sys; sys.path.insert(0, {os.path.dirname(progress.__file__)!r})\n"
        "from next_commands import launcher_words; print(launcher_words())"
    )
    torchrun.write_text("import subprocess, sys; subprocess.run([sys.executable, sys.argv[-1]])")
    command = [sys.executable, str(torchrun), "--nproc_per_node", "2", str(child)]
    for path, first in ((str(tmp_path), "torchrun"), ("/nowhere", str(torchrun))):
        torchrun.chmod(0o755)
        out = subprocess.run(command, env=plain_environment(PATH=path), capture_output=True, text=True, timeout=60)
        assert out.stdout.strip() == str([first, *command[2:]]), out


def test_how_to_go_on_depends_on_what_is_saved(started, tmp_path, monkeypatch):
    started(["python", "train.py"], [])
    assert way_on(tmp_path) == "nothing was saved; the same command starts the run anew"
    (tmp_path / "step_00000005").mkdir()
    (tmp_path / "step_00000005/checkpoint.json").touch()
    saved, where, command = way_on(tmp_path).splitlines()
    assert saved.endswith("step_00000005") and where == "to go on from there:"
    assert command.strip() == "python train.py --resume True"
    assert "to go on from there, once the cause is gone:" in way_on(tmp_path, failed=True)
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert "to go on from there on each node:" in way_on(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for out, is_batch in ((io.StringIO(), True), (Terminal(), False)):
        monkeypatch.setattr(sys, "stdout", out)
        assert ("slurm.sbatch" in way_on(tmp_path)) is is_batch


# ---------------------------------------------------------------- runs

# Micro-step 3 of step 3 gets Ctrl-C, and lasts until that is answered, 30 seconds at most; in the first run alone.
SLOW = """
import signal, time, torch
import model, progress
answer, answered, passes, marker = progress.Progress.answer_to_stop, [], [], Path(__file__).with_name("answered.0")
def answering(self):
    answered.append(answer(self))
    return answered[0]
progress.Progress.answer_to_stop = answering
forward = model.Transformer.forward
def slow(self, *args, **kwargs):
    passes.append(torch.is_grad_enabled())
    if sum(passes) == 4 * 2 + 3 and not marker.exists():
        time.sleep(3)
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(300):
            time.sleep(0 if answered else 0.1)
        note("answered", len(answered))
    return forward(self, *args, **kwargs)
model.Transformer.forward = slow
"""


def assert_short(lines: list[str], path: str) -> None:
    """At most 80 columns. A path may be longer."""
    assert all(len(line) <= 80 for line in lines if path not in line), lines


@pytest.mark.skipif(os.name != "posix", reason="a terminal of POSIX")
def test_ctrl_c_in_a_long_micro_step_is_answered_and_the_printed_command_goes_on(tmp_path):
    """In a terminal of 80 columns. The resumed run writes to a file."""
    termios, fcntl = pytest.importorskip("termios"), pytest.importorskip("fcntl")
    fields = {"max_steps": 5, "generate_every": 5, "prompts": ["it's "]}
    flags = tiny_flags(tiny_corpus(tmp_path), write_questions(tmp_path), tmp_path / "a run", **fields)
    script, env = driver(tmp_path / "driver", SLOW), plain_environment(RANK="0", TERM="xterm", PYTHONIOENCODING="utf-8")
    master, console = os.openpty()
    fcntl.ioctl(console, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    run, seen = start_run(flags, script=script, env=env, stdout=console, stderr=console), b""
    os.close(console)
    with suppress(OSError):  # the run has ended
        while part := os.read(master, 10_000):
            seen += part
    os.close(master)
    lines = [line for line in screen(seen.decode()) if line]
    assert run.wait(60) == 128 + signal.SIGINT, lines
    assert script.with_name("answered.0").read_text() == "1\n"
    assert re.search(r"\rstep 2/5 .*loss .* tokens/s  .* left  micro-step 3/4 [23]s", seen.decode()), seen
    assert "SIGINT: leaving step 3, then saving step 2; Ctrl-C again to stop now" in lines
    assert "stopped after step 2 by SIGINT" in lines and lines[-3].endswith("checkpoints/step_00000002")
    assert_short([*lines, *re.findall(r"\r([^\r\n]*)", seen.decode())], str(tmp_path))

    result = subprocess.run(lines[-1], shell=True, env=env, capture_output=True, timeout=90)
    out = (result.stdout + result.stderr).decode()
    assert result.returncode == 0 and "after step 2" in out, out
    assert not set("\r\x1b") & set(out)
    lines = out.splitlines()
    assert_short(lines, str(tmp_path))
    assert [line.split()[1] for line in lines if "tokens/s" in line] == ["3", "5"]
    assert len(lines[lines.index(next(line for line in lines if line.startswith("done: "))) :]) <= 8
    words = shlex.split(lines[-1])
    assert words[0] == sys.executable and words[-2:] == ["--prompt", "it's "]
    talk = subprocess.run([*words, "--max_new_tokens", "3"], env=env, capture_output=True, text=True, timeout=60)
    assert talk.returncode == 0 and talk.stdout.startswith("it's "), talk


@pytest.mark.parametrize("status", ["broken", "refused"])
def test_a_crash_says_how_to_go_on_and_a_refusal_does_not(tmp_path, status):
    flags = tiny_flags(tiny_corpus(tmp_path), write_questions(tmp_path), tmp_path / "run", save_every=2, max_steps=6)
    patch = """
from torch.optim.optimizer import register_optimizer_step_pre_hook
updates = []
def fail(*args):
    updates.append(1)
    if len(updates) == 4:
        raise RuntimeError("it broke")
register_optimizer_step_pre_hook(fail)
"""
    extra = [] if status == "broken" else ["--resume", str(tmp_path / "nothing")]
    script = driver(tmp_path / "driver", patch)
    out, err = start_run([*flags, *extra], script=script, env=plain_environment(RANK="0")).communicate(timeout=60)
    if status == "refused":
        assert out == b"" and b"resume=" in err, (out, err)
        return
    assert b"RuntimeError: it broke" in err
    saved, _, command = out.decode().splitlines()[-3:]
    assert saved.endswith("step_00000002")
    assert shlex.split(command) == [sys.executable, str(script), *flags, "--resume", "True"]
