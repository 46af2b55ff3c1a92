"""generate.py: texts, compared with Hugging Face's, and the script as a user types it."""

import io
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from test_model import TINY, one_thread, random_model  # noqa: F401 (one_thread is autouse)
from test_sampling import hf_greedy

import generate as script
from checkpoints import save_checkpoint
from generate import complete, generate
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


# ---------------------------------------------------------------- the command line


def checkpoint_of(model):
    """A checkpoint as train.py saves it. Generation reads only the model and its configuration."""
    return {
        "step": 7,
        "model": model.state_dict(),
        "optimizers": [],
        "config": {"model": asdict(model.config), "seed": 1},
        "tokenizer_fingerprint": Tokenizer(vocab_size=512).fingerprint,
        "data": {},
        "random_state": {},
        "best_val_loss": 1.0,
        "run_id": "abcd",
    }


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


def test_command_line_without_a_checkpoint_says_so_in_one_sentence(tmp_path):
    missing = tmp_path / "nowhere"
    assert_one_sentence(*in_a_shell("--checkpoint", missing, "--prompt", "Hi"), missing, "no checkpoint")


def test_command_line_with_half_a_checkpoint_says_so_in_one_sentence(run_dir, tmp_path):
    whole = (run_dir / "checkpoints" / "step_00000007.pt").read_bytes()
    half = tmp_path / "half.pt"
    half.write_bytes(whole[: len(whole) // 2])
    assert_one_sentence(*in_a_shell("--checkpoint", half, "--prompt", "Hi"), half, "not a readable checkpoint")


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step_00000007.pt"])
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


def test_a_prompt_longer_than_the_context_is_refused_in_one_sentence(run_dir, in_process):
    assert_one_sentence(*in_process("--checkpoint", run_dir, "--prompt", "x" * 64), "65 tokens", "63")


@pytest.mark.parametrize(
    "contents", [b"", b"not a checkpoint", b"PK\x03\x04" + b"\0" * 500], ids=["empty", "text", "like a zip"]
)
def test_a_file_that_is_no_checkpoint_is_refused_in_one_sentence(contents, tmp_path, in_process):
    path = tmp_path / "step_00000001.pt"
    path.write_bytes(contents)
    assert_one_sentence(*in_process("--checkpoint", tmp_path, "--prompt", "Hi"), path)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.999])
def test_a_checkpoint_cut_short_anywhere_is_refused_in_one_sentence(share, run_dir, tmp_path, in_process):
    whole = (run_dir / "checkpoints" / "step_00000007.pt").read_bytes()
    path = tmp_path / "cut.pt"
    path.write_bytes(whole[: int(share * len(whole))])
    assert_one_sentence(*in_process("--checkpoint", path, "--prompt", "Hi"), path)


def test_a_flipped_bit_in_the_weights_is_noticed(run_dir, tmp_path, in_process):
    """torch.load does not compare the check sums that torch.save writes."""
    contents = bytearray((run_dir / "checkpoints" / "step_00000007.pt").read_bytes())
    contents[len(contents) // 2] ^= 64
    path = tmp_path / "flipped.pt"
    path.write_bytes(contents)
    assert_one_sentence(*in_process("--checkpoint", path, "--prompt", "Hi"), path)


@pytest.mark.parametrize(
    "saved",
    [
        {"weights": torch.ones(3)},
        [1, 2, 3],
        {"format_version": 1, "step": 1},
        {"format_version": 1, "step": 1, "model": {}, "config": {"model": TINY}},
        {"format_version": 1, "step": 1, "model": {}, "config": {"model": {**TINY, "width": 64}}},
        {"format_version": 999, "step": 1},
    ],
    ids=["other data", "a list", "no model", "no weights", "unknown field", "later format"],
)
def test_a_torch_file_that_is_no_usable_checkpoint_is_refused_in_one_sentence(saved, tmp_path, in_process):
    path = tmp_path / "other.pt"
    torch.save(saved, path)
    assert_one_sentence(*in_process("--checkpoint", path, "--prompt", "Hi"), path)


def test_weights_that_do_not_fit_the_configuration_are_refused_in_one_sentence(model_of_bytes, tmp_path, in_process):
    checkpoint = checkpoint_of(model_of_bytes)
    checkpoint["config"]["model"]["n_kv_heads"] = 4
    path = save_checkpoint(tmp_path, checkpoint, keep=1, is_best=False)
    assert_one_sentence(*in_process("--checkpoint", path, "--prompt", "Hi"), path)


def test_a_vocabulary_size_that_no_tokenizer_has_is_refused_in_one_sentence(tmp_path, in_process):
    path = save_checkpoint(tmp_path, checkpoint_of(random_model(vocab_size=300)), keep=1, is_best=False)
    assert_one_sentence(*in_process("--checkpoint", path, "--prompt", "Hi"), "vocab_size=300")


class Trap:
    """What an attacker would pickle: loading it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_not_run(tmp_path, in_process):
    path = tmp_path / "trap.pt"
    torch.save({"format_version": 1, "model": Trap(tmp_path / "sprung")}, path)
    assert_one_sentence(*in_process("--checkpoint", path, "--prompt", "Hi"), path)
    assert not (tmp_path / "sprung").exists()


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
    ],
)
def test_flags_out_of_range_are_refused_by_name(flag, value, run_dir, in_process):
    status, out, err = in_process("--checkpoint", run_dir, "--prompt", "Hi", flag, value)
    assert (status, out) == (2, "")
    assert flag in err.splitlines()[-1]


def test_an_unknown_device_is_refused_in_one_sentence(run_dir, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--checkpoint", str(run_dir), "--prompt", "x", "--device", "tpu9"])
    assert_one_sentence(script.main(), *capsys.readouterr(), "tpu9")
