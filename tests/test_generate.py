"""generate.py: texts, compared with Hugging Face's, and the script as a user types it."""

import copy
import io
import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from test_model import TINY, one_thread, random_model  # noqa: F401 (one_thread is autouse)
from test_sampling import hf_greedy

import generate as script
import hardware
from checkpoints import save_checkpoint
from generate import TextStream, complete, generate
from tokenizer import Tokenizer

# ---------------------------------------------------------------- texts


@pytest.fixture(scope="module")
def model_of_bytes():
    return random_model(vocab_size=512, max_seq_len=64)


def test_texts_are_completed_by_the_ids_of_their_bytes(model_of_bytes):
    tokenizer = Tokenizer(vocab_size=512)
    texts = ["Once", "naïve <|end_of_text|>", ""]
    prompts = [tokenizer.encode(text, bos=True) for text in texts]
    new = [hf_greedy(model_of_bytes, prompt, 20, tokenizer.stop_tokens) for prompt in prompts]
    completed = complete(model_of_bytes, tokenizer, texts, max_new_tokens=20, temperature=0, top_p=1.0, seed=0)
    assert completed == [text + tokenizer.decode(ids) for text, ids in zip(texts, new, strict=True)]


@pytest.mark.parametrize("name", ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"])
def test_a_text_ends_at_each_of_the_stop_tokens(name):
    tokenizer = Tokenizer(vocab_size=512)
    model = random_model(vocab_size=512)
    settings = {"max_new_tokens": 12, "temperature": 0, "top_p": 1.0, "seed": 0}
    prompt = tokenizer.encode("Once", bos=True)
    [free] = generate(model, [prompt], max_new_tokens=12, temperature=0)
    stop, taken = tokenizer.special_tokens[name], free[6]
    with torch.no_grad():  # the stop token becomes the likeliest where `taken` was
        model.output.weight[[stop, taken]] = model.output.weight[[taken, stop]]
    expected = "Once" + tokenizer.decode(free[: free.index(taken)])
    assert complete(model, tokenizer, ["Once"], **settings) == [expected]


def test_the_same_seed_gives_the_same_texts(model_of_bytes):
    settings = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 0.95}
    tokenizer = Tokenizer(vocab_size=512)
    first, second, other = (complete(model_of_bytes, tokenizer, ["a"], **settings, seed=seed) for seed in (0, 0, 1))
    assert first == second != other


# ---------------------------------------------------------------- texts as they come


SCRIPTS = "naïve 東京は雨 👩‍👩‍👧‍👦🇨🇭 ✨ Ελλάδα مرحبا"  # of 512 ids each is a byte, so tokens cut these characters


def pieces(ids, stop_texts=()):
    """What a TextStream gives for each id, and at the end."""
    stream = TextStream(Tokenizer(vocab_size=512), stop_texts)
    return [stream.add(token) for token in ids] + [stream.finish()]


def test_characters_that_are_cut_over_tokens_come_whole_with_their_last_byte():
    ids = Tokenizer(vocab_size=512).encode(SCRIPTS)
    assert len(ids) == len(SCRIPTS.encode())
    assert [piece for piece in pieces(ids) if piece] == list(SCRIPTS)


@pytest.mark.parametrize("seed", range(30))
def test_the_pieces_of_any_ids_join_to_their_decoded_text_at_every_token(seed):
    """Random ids, and in their middle a text that begins and ends within a character."""
    tokenizer = Tokenizer(vocab_size=512)
    ids = torch.randint(512, (60,), generator=torch.Generator().manual_seed(seed)).tolist()
    ids[20:40] = tokenizer.encode(SCRIPTS)[seed : seed + 20]
    came = pieces(ids)
    assert "".join(came) == tokenizer.decode(ids)
    for count in range(len(ids)):
        sure, whole = "".join(came[:count]), tokenizer.decode(ids[:count])
        assert whole.startswith(sure)
        assert set(whole[len(sure) :]) <= {"\ufffd"}  # only part of a character is held back


def before_stop(text, stop_texts):
    """`text` up to the stop text that ends first, and whether there is one."""
    for end in range(len(text) + 1):
        if lengths := [len(stop) for stop in stop_texts if text[:end].endswith(stop)]:
            return text[: end - max(lengths)], True
    return text, False


@pytest.mark.parametrize(
    "stop_texts",
    [["b"], ["ab"], ["aab"], ["abab", "bb"], ["aaaa", "ab", "ba"], ["東京", "京a"], ["東"], ["cab", "abc"], ["zzz"]],
)
@pytest.mark.parametrize("vocab_size", [512, 20_000])  # tokens of one byte, and of several characters
def test_no_part_of_a_stop_text_comes_wherever_tokens_cut_it(stop_texts, vocab_size):
    tokenizer = Tokenizer(vocab_size=vocab_size)
    for seed in range(40):
        letters = torch.randint(5, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
        text = "".join("abc東京"[i] for i in letters)
        expected, stops = before_stop(text, stop_texts)
        stream, came = TextStream(tokenizer, stop_texts), ""
        for token in tokenizer.encode(text):
            came += stream.add(token)
            assert expected.startswith(came)
        assert (came + stream.finish(), stream.stopped) == (expected, stops)


def test_text_that_only_begins_like_a_stop_text_comes_when_that_is_certain():
    assert pieces(Tokenizer(vocab_size=512).encode("see en"), ["end"]) == ["s", "", "e", "e ", "", "", "en"]


# ---------------------------------------------------------------- the command line


def checkpoint_of(model, dtype="float32"):
    """A checkpoint as train.py saves it. Generation reads only the model and its configuration."""
    return {"step": 7, "model": model.state_dict(), "config": {"model": asdict(model.config), "dtype": dtype}}


@pytest.fixture(scope="module")
def run_dir(model_of_bytes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(folder / "checkpoints", checkpoint_of(model_of_bytes), keep=1, is_best=False)
    return folder


def in_a_shell(*arguments):
    """Run `python generate.py` outside the repository. Return its exit status, stdout and stderr."""
    path = Path(script.__file__).resolve()
    done = subprocess.run(
        [sys.executable, path, *map(str, arguments), "--device", "cpu"],
        capture_output=True,
        cwd=path.anchor,
        env={**os.environ, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def in_process(monkeypatch, capsys):
    """Like `in_a_shell`, but in this process, which saves another import of torch."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments), "--device", "cpu"])
        try:
            status = script.main()
        except SystemExit as error:  # argparse raises it
            status = error.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


def assert_one_sentence(status, out, err, *words):
    assert status == 1
    assert out == ""
    assert err.startswith("generate.py: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert all(str(word) in err for word in words), err


def test_command_line_prints_the_prompt_and_hugging_faces_greedy_text(run_dir, model_of_bytes):
    tokenizer = Tokenizer(vocab_size=512)
    prompt = "<|eot_id|> Café"  # text, although it looks like a control token
    ids = hf_greedy(model_of_bytes, tokenizer.encode(prompt, bos=True), 20, tokenizer.stop_tokens)
    status, out, err = in_a_shell(
        "--checkpoint", run_dir, "--prompt", prompt, "--max_new_tokens", 20, "--temperature", 0
    )
    assert status == 0
    assert re.fullmatch(r"\d+\.\d tokens/s \(20 in \d+\.\d\d s\)\n", err)
    assert out == prompt + tokenizer.decode(ids) + "\n"
    assert ids


@pytest.mark.parametrize("trained_in", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("has_it", [False, True])
def test_a_model_generates_in_the_dtype_that_it_was_trained_in_where_hardware_has_it(
    trained_in, has_it, model_of_bytes, in_process, tmp_path, monkeypatch
):
    save_checkpoint(tmp_path / "checkpoints", checkpoint_of(model_of_bytes, trained_in), keep=1, is_best=False)
    monkeypatch.setattr(hardware, "has_in_hardware", lambda device, dtype: has_it)
    models, stream_ids = [], script.stream_ids
    monkeypatch.setattr(script, "stream_ids", lambda model, *a, **k: models.append(model) or stream_ids(model, *a, **k))
    status, out, err = in_process("--checkpoint", tmp_path, "--prompt", "Hi", "--temperature", 0, "--max_new_tokens", 9)
    assert status == 0, err
    dtype = getattr(torch, trained_in) if has_it else torch.float32
    assert {parameter.dtype for parameter in models[0].parameters()} == {dtype}
    assert models[0].rope_cos.dtype == models[0].rope_sin.dtype == torch.float32
    expected = copy.deepcopy(model_of_bytes)
    for parameter in expected.parameters():
        parameter.data = parameter.data.to(dtype)
    settings = {"max_new_tokens": 9, "temperature": 0, "top_p": 1, "seed": 0}
    assert out == complete(expected, Tokenizer(vocab_size=512), ["Hi"], **settings)[0] + "\n"


def test_command_line_without_a_checkpoint_says_so_in_one_sentence(tmp_path):
    missing = tmp_path / "nowhere"
    assert_one_sentence(*in_a_shell("--checkpoint", missing, "--prompt", "Hi"), missing, "no checkpoint")


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step_00000007"])
def test_checkpoint_may_be_a_file_or_a_run_directory(place, run_dir, in_process):
    status, out, err = in_process("--checkpoint", run_dir / place, "--prompt", "Hi", "--max_new_tokens", 3)
    assert status == 0, err
    assert out.startswith("Hi")


def test_command_line_draws_the_same_text_from_the_same_seed(run_dir, in_process):
    texts = [in_process("--checkpoint", run_dir, "--prompt", "Hi", "--seed", seed)[1] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0] == in_process("--checkpoint", run_dir, "--prompt", "Hi")[1]  # 0 is the default


@pytest.mark.parametrize("prompt", ["", "\n", "naïve 中文 👩‍👩‍👧‍👦", "<|end_of_text|>"], ids=ascii)
def test_prompts_come_back_as_typed(prompt, run_dir, in_process):
    status, out, _ = in_process("--checkpoint", run_dir, "--prompt", prompt, "--max_new_tokens", 2)
    assert status == 0
    assert out.startswith(prompt)


def test_a_prompt_whose_bytes_are_not_utf8_is_continued(run_dir, in_process):
    """A shell may pass any bytes. Python shows a byte that is not UTF-8 as a lone surrogate."""
    status, out, _ = in_process("--checkpoint", run_dir, "--prompt", "a\udcffb", "--max_new_tokens", 2)
    assert status == 0
    assert out.startswith("a\ufffdb")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_terminal_that_lacks_a_character_shows_a_question_mark(run_dir, monkeypatch, encoding):
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", out)
    arguments = ["--checkpoint", str(run_dir), "--prompt", "in 東京", "--max_new_tokens", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
    assert script.main() == 0
    out.flush()
    assert out.buffer.getvalue().startswith(b"in ??")


def test_streamed_text_is_the_text_that_complete_returns(run_dir, model_of_bytes, in_process):
    tokenizer = Tokenizer(vocab_size=512)
    for seed, temperature in ((0, 0), (0, 1.5), (-3, 0.9), (10**30, 1e-40), (7, 1e300)):
        settings = {"max_new_tokens": 40, "temperature": temperature, "top_p": 0.9, "seed": seed}
        flags = [f"--{name}={value}" for name, value in settings.items()]
        status, out, err = in_process("--checkpoint", run_dir, "--prompt", "東京 ✨", *flags)
        assert status == 0, err
        assert out == complete(model_of_bytes, tokenizer, ["東京 ✨"], **settings)[0] + "\n"


def test_top_k_and_the_penalty_reach_the_draws(run_dir, in_process):
    """Of one likeliest id there is no choice, whatever the temperature."""
    greedy = in_process("--checkpoint", run_dir, "--prompt", "Hi", "--temperature", 0)[1]
    assert in_process("--checkpoint", run_dir, "--prompt", "Hi", "--top_k", 1, "--temperature", 5)[1] == greedy
    penalty = ("--repetition_penalty", 5)
    assert in_process("--checkpoint", run_dir, "--prompt", "Hi", "--temperature", 0, *penalty)[1] != greedy


def test_text_ends_before_the_first_stop_text(run_dir, in_process):
    flags = ("--checkpoint", run_dir, "--prompt", "Hi", "--max_new_tokens", 30)
    free = in_process(*flags)[1].removesuffix("\n")
    first, second = free[8:11], free[12:15]  # three characters are several tokens
    status, out, err = in_process(*flags, "--stop", second, "--stop", first)
    assert status == 0
    assert out == free[: free.index(first, 2)] + "\n"
    assert "context" not in err
    assert in_process(*flags, "--stop", free[:4])[1] == free + "\n"  # it would begin in the prompt


def test_a_stop_text_may_hold_a_line_end_that_is_typed_as_two_characters():
    assert script.parse_setting("stop", r"\n\n") == "\n\n"


def test_samples_are_divided_by_a_line_and_the_first_is_that_of_a_single_one(run_dir, in_process):
    flags = ("--checkpoint", run_dir, "--prompt", "Hi", "--max_new_tokens", 9, "--seed", 3)
    single = in_process(*flags)[1]
    status, out, err = in_process(*flags, "--num_samples", 3)
    first, second, third = re.split(r"----- sample \d of 3\n", out)
    assert (status, first) == (0, single)
    assert len({first, second, third}) == 3
    assert second.startswith("Hi") and third.endswith("\n")
    assert err.count("tokens/s") == 3
    assert in_process(*flags, "--num_samples", 3)[1] == out


@pytest.mark.parametrize("flag", ["--cut_prompt", "--continuous"])
def test_a_prompt_longer_than_the_context_is_cut_from_the_left_by_flag(flag, run_dir, model_of_bytes, in_process):
    """The text holds the whole prompt. The model sees the newest half of its context."""
    tokenizer, prompt = Tokenizer(vocab_size=512), "".join(map(str, range(60)))
    flags = ("--temperature", 0, "--max_new_tokens", 32, flag)
    status, out, err = in_process("--checkpoint", run_dir, "--prompt", prompt, *flags)
    [new] = generate(
        model_of_bytes,
        [[tokenizer.bos_id, *tokenizer.encode(prompt)[-31:]]],
        max_new_tokens=32,
        temperature=0,
        stop_tokens=tokenizer.stop_tokens,
    )
    assert (status, out) == (0, prompt + tokenizer.decode(new) + "\n")
    assert "111 tokens; the model sees the last 32" in err


def test_a_cut_prompt_leaves_room_for_few_tokens_only_if_few_are_asked_for(run_dir, in_process):
    flags = ("--checkpoint", run_dir, "--prompt", "x" * 200, "--cut_prompt", "--max_new_tokens", 4)
    assert "201 tokens; the model sees the last 60" in in_process(*flags)[2]


def test_the_end_of_the_context_is_said_and_continuous_text_goes_beyond_it(run_dir, in_process):
    flags = ("--checkpoint", run_dir, "--prompt", "Hi", "--temperature", 0)
    full, count = "the context of 64 tokens is full", 64 - 3
    status, out, err = in_process(*flags)
    assert status == 0 and full in err and "--continuous" in err and f"({count} in" in err
    assert full not in in_process(*flags, "--max_new_tokens", count)[2]
    status, longer, err = in_process(*flags, "--continuous")
    assert status == 0 and full not in err and "(200 in" in err
    assert longer.startswith(out.removesuffix("\n"))


def test_beliefs_are_listed_on_standard_error(run_dir, model_of_bytes, in_process):
    """They are the model's own probabilities, before temperature, penalty and top-k."""
    flags = ("--checkpoint", run_dir, "--prompt", "Hi", "--max_new_tokens", 6, "--temperature", 0)
    plain = in_process(*flags)[1]
    status, out, err = in_process(*flags, "--logprobs", "list")
    assert (status, out) == (0, plain)
    lines = err.splitlines()[:-1]
    assert len(lines) == 6
    tokenizer = Tokenizer(vocab_size=512)
    with torch.no_grad():
        believed = model_of_bytes(torch.tensor([tokenizer.encode("Hi", bos=True)]))[0, -1].log_softmax(-1)
    logprob, probability, _, _, likeliest, share = lines[0].split()[:6]
    assert float(logprob) == pytest.approx(float(believed.max()), abs=0.001)
    assert probability == share.rstrip(",") == f"{float(believed.max().exp()):.1%}"
    assert likeliest == repr(tokenizer.decode([int(believed.argmax())]))


def test_colours_are_refused_where_there_is_no_terminal(run_dir, in_process):
    status, out, err = in_process("--checkpoint", run_dir, "--prompt", "Hi", "--logprobs", "colour")
    assert (status, out) == (2, "")
    assert "--logprobs list" in err.splitlines()[-1]


def test_the_prompt_may_be_a_file_without_its_last_line_end(run_dir, in_process, tmp_path):
    path = tmp_path / "prompt.txt"
    flags = ("--checkpoint", run_dir, "--max_new_tokens", 5)
    for contents, prompt in (
        (b"a\nb\n", "a\nb"),
        (b"\xef\xbb\xbfa\r\n", "a"),
        (b"a\n\n", "a\n"),
        (b"a\xff", "a\ufffd"),
    ):
        path.write_bytes(contents)
        status, out, err = in_process(*flags, "--prompt_file", path)
        assert status == 0, err
        assert out == in_process(*flags, "--prompt", prompt)[1]


def test_a_prompt_file_that_cannot_be_read_is_refused_in_one_sentence(run_dir, in_process, tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        assert_one_sentence(*in_process("--checkpoint", run_dir, "--prompt_file", path), "--prompt_file", path)


def test_two_prompts_are_refused_by_name(run_dir, in_process):
    status, out, err = in_process("--checkpoint", run_dir, "--prompt", "a", "--prompt_file", "b")
    assert (status, out) == (2, "")
    assert "--prompt_file" in err.splitlines()[-1]


@pytest.mark.parametrize("flags", [(), ("--prompt", "-")])
def test_piped_text_is_the_prompt(flags, run_dir, in_process, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("東京\n".encode()), "ascii"))
    status, out, err = in_process("--checkpoint", run_dir, *flags, "--max_new_tokens", 5)
    assert status == 0, err
    assert out == in_process("--checkpoint", run_dir, "--prompt", "東京", "--max_new_tokens", 5)[1]


def test_nothing_piped_is_refused_in_one_sentence(run_dir, in_process, monkeypatch):
    for stdin in (io.TextIOWrapper(io.BytesIO()), None):  # Python has no sys.stdin if it was closed
        monkeypatch.setattr(sys, "stdin", stdin)
        assert_one_sentence(*in_process("--checkpoint", run_dir), "standard input is empty", "--prompt")


def start(run_dir, *flags, **streams):
    """A process that continues "Hi" without end."""
    path = Path(script.__file__).resolve()
    endless = ["--temperature", "0", "--continuous", "--max_new_tokens", "1000000000"]
    return subprocess.Popen(
        [sys.executable, path, "--checkpoint", run_dir, "--device", "cpu", *endless, *flags],
        env={**os.environ, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"},
        **streams,
    )


def test_text_comes_while_it_is_generated_and_ctrl_c_ends_it(run_dir):
    with start(run_dir, "--prompt", "Hi", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        began = process.stdout.read(2000)  # and the process goes on
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    text = (began + out).decode()
    assert text.startswith("Hi") and text.endswith("\n")
    assert re.fullmatch(rb"\d+\.\d tokens/s .*\n", err)


def test_a_reader_that_goes_away_ends_it_without_a_traceback(run_dir):
    with start(run_dir, "--prompt", "Hi", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.wait(timeout=60) == 141  # as of a program that SIGPIPE ends
        assert process.stderr.read() == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a disk that is always full")
def test_a_full_disk_is_said_in_one_sentence(run_dir):
    with (
        open("/dev/full", "wb") as full,
        start(run_dir, "--prompt", "Hi", stdout=full, stderr=subprocess.PIPE) as process,
    ):
        _, err = process.communicate(timeout=60)
    assert_one_sentence(process.returncode, "", err.decode(), "standard output", "No space left")


def test_a_prompt_longer_than_the_context_is_refused_in_one_sentence(run_dir, in_process):
    assert_one_sentence(*in_process("--checkpoint", run_dir, "--prompt", "x" * 64), "65 tokens", "63", "--cut_prompt")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_checkpoint_is_refused_in_one_sentence(run_dir, tmp_path, in_process, name):
    path = shutil.copytree(run_dir / "checkpoints/step_00000007", tmp_path / "damaged")
    (path / name).write_bytes((path / name).read_bytes()[:-5])
    assert_one_sentence(*in_process("--checkpoint", path, "--prompt", "Hi"), path / name)


def test_a_model_of_another_kind_is_refused_in_one_sentence(run_dir, tmp_path, in_process):
    path = shutil.copytree(run_dir / "checkpoints/step_00000007", tmp_path / "other")
    (path / "checkpoint.json").unlink()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    assert_one_sentence(*in_process("--checkpoint", path, "--prompt", "Hi"), path, "model_type is 'gpt2'")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--max_new_tokens", 0),
        ("--max_new_tokens", "many"),
        ("--temperature", -0.1),
        ("--temperature", math.nan),
        ("--top_p", 0),
        ("--top_p", 1.01),
        ("--top_p", math.nan),
        ("--temperature", math.inf),
        ("--top_k", -1),
        ("--top_k", 2.5),
        ("--repetition_penalty", 0),
        ("--repetition_penalty", math.nan),
        ("--num_samples", 0),
        ("--seed", "seven"),
        ("--stop", ""),
        ("--logprobs", "all"),
    ],
)
def test_flags_out_of_range_are_refused_by_name(flag, value, run_dir, in_process):
    status, out, err = in_process("--checkpoint", run_dir, "--prompt", "Hi", flag, value)
    assert (status, out) == (2, "")
    assert flag in err.splitlines()[-1] and str(value) in err.splitlines()[-1]


def test_an_unknown_device_is_refused_in_one_sentence(run_dir, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--checkpoint", str(run_dir), "--prompt", "x", "--device", "tpu9"])
    assert_one_sentence(script.main(), *capsys.readouterr(), "tpu9")


# ---------------------------------------------------------------- the interactive loop


class Terminal:
    """`generate.py` in a terminal of its own. Everything that it shows, on both streams, is in `shown`."""

    def __init__(self, run_dir, *flags, **streams):
        import fcntl
        import pty
        import termios

        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 500))  # wide enough that readline breaks no line
        streams = {"stdin": slave, "stdout": slave, "stderr": slave, **streams}
        self.process = subprocess.Popen(
            [sys.executable, Path(script.__file__).resolve(), "--checkpoint", run_dir, "--device", "cpu", *flags],
            env={**os.environ, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", "TERM": "dumb"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches the process
            **streams,
        )
        os.close(slave)
        self.shown = ""
        self.wait_for("> ")

    def wait_for(self, pattern):
        """Read until `pattern` matches what is shown after the last match. Return what was shown until then."""
        limit, start = time.monotonic() + 60, len(self.shown)
        while not (found := re.search(pattern, self.shown[start:])):
            assert time.monotonic() < limit, self.shown[start:]
            assert select.select([self.master], [], [], 60)[0], self.shown[start:]
            self.shown += os.read(self.master, 1 << 16).decode(errors="replace").replace("\r\n", "\n")
        return self.shown[start : start + found.end()]

    def type(self, keys):
        """Type `keys`, and return what is shown until the next prompt."""
        os.write(self.master, keys if isinstance(keys, bytes) else keys.encode())
        return self.wait_for(r"(?<=\n)> $")

    def end(self, keys):
        os.write(self.master, keys)
        return self.process.wait(timeout=60)


@pytest.fixture
def terminal(run_dir):
    pytest.importorskip("termios")
    opened = []

    def open_one(*flags, **streams):
        opened.append(Terminal(run_dir, *flags, **streams))
        return opened[-1]

    yield open_one
    for each in opened:
        each.process.kill()
        each.process.wait()
        os.close(each.master)


CTRL_C, CTRL_D, UP = b"\x03", b"\x04", b"\x1b[A"


def test_a_session_continues_lines_changes_settings_and_ends_with_ctrl_d(terminal, run_dir, model_of_bytes):
    session = terminal("--max_new_tokens", "5", "--temperature", "0")
    assert "/help" in session.shown and "Ctrl-D" in session.shown
    tokenizer = Tokenizer(vocab_size=512)

    def expected(prompt, **changes):
        settings = {"max_new_tokens": 5, "temperature": 0, "top_p": 1, "seed": 0, **changes}
        return complete(model_of_bytes, tokenizer, [prompt], **settings)[0]

    shown = session.type("東京\n")
    assert expected("東京") + "\n" in shown and "tokens/s (5 in" in shown
    shown = session.type(UP + b"!\n")  # the history
    assert expected("東京!") in shown
    assert session.type("/max_tokens 2\n").count("\n") == 1  # the echo alone
    assert "tokens/s (2 in" in session.type("Hi\n")
    shown = session.type("/top_p 2\n")
    assert "/top_p '2': must be above 0 and at most 1" in shown
    shown = session.type("/colour red\n")
    assert "/colour: no such command" in shown and "/temperature" in shown and "/quit" in shown
    shown = session.type("/help\n")
    assert all(f"/{name}" in shown for name in script.SETTINGS) and re.search(r"/max_new_tokens +2 ", shown)
    session.type("/temperature 1\n"), session.type("/top_p 0.5\n"), session.type("/max_new_tokens 9\n")
    drawn = expected("Hi", max_new_tokens=9, temperature=1, top_p=0.5, seed=-7)
    for _ in range(2):  # a seed begins the draws anew
        session.type("/seed -7\n")
        assert drawn in session.type("Hi\n")
    assert drawn not in session.type("Hi\n")
    assert session.end(CTRL_D) == 0
    assert "Traceback" not in session.shown


def test_stop_texts_are_set_and_removed_in_a_session(terminal, run_dir, in_process):
    free = in_process("--checkpoint", run_dir, "--prompt", "Hi", "--max_new_tokens", 9, "--temperature", 0)[1]
    session = terminal("--max_new_tokens", "9", "--temperature", "0", "--stop", free[5])
    assert free not in session.type("Hi\n")
    session.type("/stop\n")
    assert free in session.type("Hi\n")
    session.type(f"/stop {free[6]}\n")
    assert free not in session.type("Hi\n")
    assert session.end(b"/quit\n") == 0


def test_ctrl_c_ends_the_answer_and_not_the_session(terminal):
    session = terminal("--continuous", "--max_new_tokens", "1000000000", "--temperature", "0", "--num_samples", "3")
    os.write(session.master, b"Hi\n")
    session.wait_for(r"Hi\nHi(.|\n){300}")
    shown = session.type(CTRL_C)
    assert re.search(r"\n\d+\.\d tokens/s .*\n> $", shown)
    assert "sample 2" not in shown
    os.write(session.master, b"half a line")
    session.wait_for("half a line")
    time.sleep(0.3)  # Python misses a signal in the instant before it waits for the next key
    session.type(CTRL_C)  # at the prompt it drops the line
    session.type("/max_tokens 3\n")
    assert session.type("Hi\n").count("tokens/s (3 in") == 3
    assert session.end(CTRL_D) == 0
    assert "Traceback" not in session.shown


def test_a_session_survives_long_prompts_and_bytes_that_are_not_utf8(terminal):
    session = terminal("--max_new_tokens", "2")
    assert "65 tokens" in session.type("x" * 64 + "\n")
    assert "tokens/s (2 in" in session.type(b"a\xffb\n")
    assert session.type("\n").count("\n") == 1  # an empty line asks for nothing
    assert " /usr" in session.type(" /usr\n")
    assert session.end(b"/quit\n") == 0


def test_in_a_session_only_text_goes_to_a_file(terminal, run_dir, in_process, tmp_path):
    with open(tmp_path / "text", "wb") as file:
        session = terminal("--max_new_tokens", "5", stdout=file)
        session.type("Hi\n")
        assert session.end(CTRL_D) == 0
    once = in_process("--checkpoint", run_dir, "--prompt", "Hi", "--max_new_tokens", 5)[1]
    assert (tmp_path / "text").read_text(encoding="utf-8") == once


def test_colours_show_what_the_model_believed(terminal, run_dir, in_process):
    flags = ("--max_new_tokens", "9", "--temperature", "0")
    text = in_process("--checkpoint", run_dir, "--prompt", "Hi", *flags)[1]
    session = terminal(*flags, "--logprobs", "colour")
    shown = session.type("Hi\n")
    assert re.search("\x1b\\[31m.+?\x1b\\[0m", shown)  # a random model believes little
    assert text in re.sub("\x1b\\[\\d+m", "", shown)
    assert [script.coloured("a", 0, torch.tensor([p, 1 - p]).log())[:5] for p in (0.6, 0.2, 0.05)] == [
        "\x1b[32m",
        "\x1b[33m",
        "\x1b[31m",
    ]
