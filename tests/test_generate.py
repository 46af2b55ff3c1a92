"""generate.py: compared with Hugging Face's, with nuclei worked out by hand, and run as a user types it."""

import io
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from test_model import TINY, hf_twin, one_thread, random_model  # noqa: F401 (one_thread is autouse)

import generate as script
from checkpoints import save_checkpoint
from generate import CANDIDATES, complete, generate, nucleus, sample_next
from model import KVCache
from tokenizer import Tokenizer

PROMPTS = [[5, 17, 3, 99, 42, 8, 8], [1], [60, 2, 71], list(range(100, 60, -1))]


def hf_greedy(model, prompt, max_new_tokens, stop_tokens=()):
    """New ids of one prompt by Hugging Face's own loop, without the stop token."""
    with torch.no_grad():
        ids = (
            hf_twin(model)
            .generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=list(stop_tokens) or None,
                bos_token_id=None,
                pad_token_id=0,
            )[0, len(prompt) :]
            .tolist()
        )
    return ids[:-1] if ids[-1] in stop_tokens else ids


# ---------------------------------------------------------------- greedy


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_kv_heads": 1, "tie_embeddings": True, "seed": 3}, {"n_kv_heads": 4, "rope_scale": 32.0, "dim": 128}],
    ids=["grouped", "tied, one group", "rope scaled"],
)
def test_greedy_ids_of_a_batch_equal_hugging_faces_of_each_prompt(changes):
    model = random_model(**changes)
    ours = generate(model, PROMPTS, max_new_tokens=24, temperature=0)
    assert ours == [hf_greedy(model, prompt, 24) for prompt in PROMPTS]
    assert all(len(set(row)) > 5 for row in ours)  # one id over and over would show nothing


def test_greedy_ids_equal_those_of_a_loop_without_a_cache():
    model = random_model()
    for prompt in PROMPTS:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(20):
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert generate(model, [prompt], max_new_tokens=20, temperature=0) == [ids[len(prompt) :]]


def test_a_batch_equals_its_prompts_alone_in_any_order():
    model = random_model()
    alone = [generate(model, [prompt], max_new_tokens=20, temperature=0)[0] for prompt in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=20, temperature=0) == alone
    assert generate(model, PROMPTS[::-1], max_new_tokens=20, temperature=0) == alone[::-1]
    assert generate(model, PROMPTS + PROMPTS, max_new_tokens=20, temperature=0) == alone + alone


@pytest.mark.parametrize("count", [1, 2, 7])
def test_generate_returns_as_many_new_ids_as_asked_for(count):
    rows = generate(random_model(), PROMPTS, max_new_tokens=count, generator=torch.Generator().manual_seed(0))
    assert [len(row) for row in rows] == [count] * len(PROMPTS)
    assert all(type(token) is int and 0 <= token < 101 for row in rows for token in row)


def test_generate_returns_no_new_ids_if_none_are_asked_for():
    assert generate(random_model(), PROMPTS, max_new_tokens=0, temperature=0) == [[] for _ in PROMPTS]


def test_the_model_and_the_prompts_stay_as_they_were():
    model, prompts = random_model().train(), [list(prompt) for prompt in PROMPTS]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generate(model, prompts, max_new_tokens=5, temperature=0)
    assert prompts == PROMPTS
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()  # training goes on after a sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_is_allocated_once_for_just_the_positions_needed(dtype, monkeypatch):
    model, caches, held, seen = random_model().to(dtype), [], [], []

    def allocate(*args):
        caches.append(KVCache(*args))
        held.append((caches[-1].keys, caches[-1].values))  # so that no later tensor gets their addresses
        return caches[-1]

    def note(*_):
        [cache] = caches
        seen.append((cache.keys.data_ptr(), cache.values.data_ptr(), cache.keys.shape, cache.values.shape))

    monkeypatch.setattr(script, "KVCache", allocate)
    model.tok_embeddings.register_forward_hook(note)
    generate(model, PROMPTS, max_new_tokens=20, temperature=0)
    config, longest = model.config, max(map(len, PROMPTS))
    assert len(seen) == 20
    assert set(seen) == {(keys.data_ptr(), values.data_ptr(), keys.shape, values.shape) for keys, values in held}
    assert caches[0].keys.shape == (config.n_layers, 4, longest + 20, config.n_kv_heads, config.head_dim)
    assert caches[0].keys.dtype == caches[0].values.dtype == dtype


def test_a_model_in_bf16_takes_the_ids_that_are_likeliest_without_a_cache():
    """The ids are the likeliest up to rounding: the cache adds in another order, and each sum is rounded to 8 bits."""
    model = random_model().to(torch.bfloat16)
    for prompt, new in zip(PROMPTS, generate(model, PROMPTS, max_new_tokens=12, temperature=0), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1].float()
        taken = logits.gather(1, torch.tensor(new)[:, None])[:, 0]
        torch.testing.assert_close(taken, logits.amax(-1), rtol=0, atol=0.03 * float(logits.std()))


# ---------------------------------------------------------------- where a row ends


def test_a_stop_token_ends_only_its_own_row_and_is_not_returned():
    model = random_model()
    free = generate(model, PROMPTS, max_new_tokens=20, temperature=0)
    stop = free[0][6]
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    assert len(expected[0]) < 20
    assert any(len(row) == 20 for row in expected)
    assert generate(model, PROMPTS, max_new_tokens=20, temperature=0, stop_tokens=[stop]) == expected


def test_several_stop_tokens_end_rows_where_hugging_face_ends_them():
    model = random_model()
    free = generate(model, PROMPTS, max_new_tokens=20, temperature=0)
    stops = [row[4 + 3 * i] for i, row in enumerate(free)]
    ours = generate(model, PROMPTS, max_new_tokens=20, temperature=0, stop_tokens=stops)
    assert ours == [hf_greedy(model, prompt, 20, stops) for prompt in PROMPTS]
    assert all(len(row) < 20 for row in ours)


def test_a_row_that_begins_with_a_stop_token_is_empty():
    model = random_model()
    free = generate(model, PROMPTS, max_new_tokens=20, temperature=0)
    rows = generate(model, PROMPTS, max_new_tokens=20, temperature=0, stop_tokens=[free[1][0]])
    assert rows[1] == []
    assert any(rows)


def test_a_stop_token_in_the_prompt_ends_nothing():
    model = random_model()
    [free] = generate(model, [[7, 8, 9]], max_new_tokens=10, temperature=0)
    stop = next(token for token in range(101) if token not in free)
    [plain] = generate(model, [[7, stop, 9]], max_new_tokens=10, temperature=0)
    [stopped] = generate(model, [[7, stop, 9]], max_new_tokens=10, temperature=0, stop_tokens=[stop])
    assert stopped == (plain[: plain.index(stop)] if stop in plain else plain)
    assert stopped


def test_rows_end_where_the_context_is_full_and_shorter_ones_go_on():
    model = random_model(max_seq_len=16)
    prompts = [[1, 2, 3], list(range(10)), list(range(15)), [9]]
    ours = generate(model, prompts, max_new_tokens=100, temperature=0)
    assert [len(row) for row in ours] == [13, 6, 1, 15]
    assert ours == [hf_greedy(model, prompt, 16 - len(prompt)) for prompt in prompts]


def test_nothing_is_computed_after_all_rows_have_ended():
    model = random_model(max_seq_len=16)
    passes = []
    model.tok_embeddings.register_forward_hook(lambda *_: passes.append(1))

    def count(prompts, **settings):
        passes.clear()
        generate(model, prompts, max_new_tokens=8, temperature=0, **settings)
        return len(passes)

    [row] = generate(model, [[1, 2, 3]], max_new_tokens=8, temperature=0)
    assert count([[1, 2, 3]]) == 8
    assert count([[1, 2, 3], [1, 2, 3]], stop_tokens=[row[4]]) == row.index(row[4]) + 1
    assert count([[1, 2, 3], [1, 2, 3]], stop_tokens=[row[0]]) == 1
    assert count([[1] * 15]) == 1
    assert count([[1] * 14, [1] * 12]) == 4


@pytest.mark.parametrize("length", [0, 16, 17, 1000])
def test_a_prompt_that_is_empty_or_fills_the_context_is_refused_by_its_length(length):
    model = random_model(max_seq_len=16)
    for prompts in ([[1] * length], [[1, 2], [1] * length]):
        with pytest.raises(ValueError, match=f"{length} tokens"):
            generate(model, prompts, max_new_tokens=5)


# ---------------------------------------------------------------- drawing

PROBABILITIES = [0.05, 0.4, 0.1, 0.2, 0.25]  # ids in falling order: 1, 4, 3, 2, 0


def draws(probabilities, temperature, top_p, count=20_000):
    """How often each id is drawn, as shares."""
    logits = torch.tensor(probabilities).log().expand(count, -1)
    ids = sample_next(logits, temperature, top_p, torch.Generator().manual_seed(0))
    assert ids.shape == (count,)
    return torch.bincount(ids, minlength=len(probabilities)) / count


@pytest.mark.parametrize(
    ("top_p", "nucleus"),
    [
        (0.01, {1}),
        (0.39, {1}),
        (0.41, {1, 4}),
        (0.64, {1, 4}),
        (0.66, {1, 4, 3}),
        (0.84, {1, 4, 3}),
        (0.86, {1, 4, 3, 2}),
        (0.94, {1, 4, 3, 2}),
        (0.96, {0, 1, 2, 3, 4}),
        (1.0, {0, 1, 2, 3, 4}),
    ],
)
def test_ids_are_drawn_from_the_nucleus_in_proportion_to_their_probabilities(top_p, nucleus):
    shares = draws(PROBABILITIES, 1.0, top_p)
    kept = torch.tensor([p if i in nucleus else 0.0 for i, p in enumerate(PROBABILITIES)])
    assert set(shares.nonzero().flatten().tolist()) == nucleus
    torch.testing.assert_close(shares, kept / kept.sum(), rtol=0, atol=0.015)  # 4 standard errors


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_probabilities_are_raised_to_1_over_the_temperature(temperature):
    expected = torch.tensor(PROBABILITIES) ** (1 / temperature)
    torch.testing.assert_close(draws(PROBABILITIES, temperature, 1.0), expected / expected.sum(), rtol=0, atol=0.015)


def test_the_nucleus_is_taken_after_the_temperature_is_applied():
    # Squared and normalised they are 0.53, 0.3, 0.13, 0.03, so two of them reach 0.8. Without squaring, three do.
    assert set(draws([0.4, 0.3, 0.2, 0.1], 0.5, 0.8).nonzero().flatten().tolist()) == {0, 1}
    assert set(draws([0.4, 0.3, 0.2, 0.1], 1.0, 0.8).nonzero().flatten().tolist()) == {0, 1, 2}


def test_every_row_has_its_own_nucleus():
    logits = torch.tensor([[0.9, 0.05, 0.05], [0.05, 0.5, 0.45], [0.3, 0.3, 0.4]]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([sample_next(logits, 1.0, 0.8, generator) for _ in range(300)], dim=1)
    assert [set(row.tolist()) for row in drawn] == [{0}, {1, 2}, {0, 1, 2}]


@pytest.mark.parametrize("top_p", [0.01, 0.5, 1.0])
def test_temperature_zero_takes_the_likeliest_and_draws_nothing(top_p):
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert torch.equal(sample_next(logits, 0, top_p, generator), logits.argmax(-1))
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_a_very_low_temperature_takes_the_likeliest(top_p):
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    ids = sample_next(logits, 1e-6, top_p, torch.Generator().manual_seed(0))
    assert torch.equal(ids, logits.argmax(-1))


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_ids_are_drawn_from_logits_in_bf16(top_p):
    logits = torch.tensor([PROBABILITIES]).log().bfloat16().expand(2000, -1)
    assert len(sample_next(logits, 1.0, top_p, torch.Generator().manual_seed(0)).unique()) >= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nucleus_of_half_a_large_vocabulary_is_that_half(dtype):
    """A sum of a hundred thousand small numbers must not lose them."""
    logits = torch.where(torch.arange(128_256) < 64_128, 2**-6, 0.0).to(dtype).expand(40, -1)
    ids = sample_next(logits, 1.0, 0.5, torch.Generator().manual_seed(0))
    assert ids.max() < 64_128
    assert len(ids.unique()) > 30


def nucleus_by_sorting(probabilities, top_p):
    """The likeliest ids of a row that reach `top_p`, and their probabilities. Of equal ids the lower comes first."""
    ranked, ids = probabilities.sort(descending=True, stable=True)
    size = int((ranked.cumsum(-1) - ranked < top_p).sum())
    return ids[:size].tolist(), ranked[:size].tolist()


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.8, 0.95, 0.999])
@pytest.mark.parametrize("spread", [0.0, 0.3, 2.0, 5.0, 50.0])  # from all ids equally likely to one certain id
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])  # bf16 and int64 give equal logits
def test_the_nucleus_among_candidates_is_that_of_the_whole_vocabulary(top_p, spread, dtype):
    logits = (spread * torch.randn(3, 3000, generator=torch.Generator().manual_seed(0))).to(dtype).float()
    logits[1] /= 3
    probabilities = logits.softmax(-1)
    for candidates in (1, 2, 30, 1000, 3000, 5000):
        ids, kept = nucleus(probabilities, top_p, candidates)
        found = [(i[k > 0].tolist(), k[k > 0].tolist()) for i, k in zip(ids, kept, strict=True)]
        assert found == [nucleus_by_sorting(row, top_p) for row in probabilities]


def test_ids_as_likely_as_the_last_candidate_are_not_lost():
    """The ids 2 to 9 are equally likely. The nucleus needs two of them: 2 and 3, for any number of candidates."""
    probabilities = torch.tensor([[0.1] + [0.3] + [0.075] * 8])
    for candidates in range(1, 11):
        ids, kept = nucleus(probabilities, 0.5, candidates)
        assert ids[kept > 0].tolist() == [1, 0, 2, 3]


def test_a_vocabulary_is_sorted_only_if_the_candidates_are_too_few():
    logits = torch.randn(2, 128_256, generator=torch.Generator().manual_seed(0))
    assert nucleus((6 * logits).softmax(-1), 0.95)[0].shape == (2, CANDIDATES)
    assert nucleus(logits.softmax(-1), 0.95)[0].shape == (2, 128_256)
    logits[0] *= 6  # one row that needs all ids is enough
    assert nucleus(logits.softmax(-1), 0.95)[0].shape == (2, 128_256)


def sampled(model, seed, **changes):
    settings = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 0.95, **changes}
    return generate(model, PROMPTS, **settings, generator=torch.Generator().manual_seed(seed))


def test_the_same_seed_draws_the_same_ids_and_another_seed_draws_others():
    model = random_model()
    assert sampled(model, 0) == sampled(model, 0)
    assert sampled(model, 0) != sampled(model, 1)
    assert sampled(model, 0) != sampled(model, 0, temperature=0)


def test_a_generator_that_is_passed_in_leaves_the_global_one_alone():
    """Training must draw the same numbers whether or not it makes samples on the way."""
    before = torch.get_rng_state()
    sampled(random_model(), 0)  # random_model() draws its initial weights from the global one
    torch.set_rng_state(before)
    model = random_model()
    before = torch.get_rng_state()
    sampled(model, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_sampled_ids_follow_the_models_distribution():
    model = random_model(vocab_size=7)
    with torch.no_grad():
        expected = model(torch.tensor([[1, 2, 3]]))[0, -1].softmax(-1)
    rows = generate(model, [[1, 2, 3]] * 8000, max_new_tokens=1, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(torch.tensor(rows).flatten(), minlength=7) / 8000
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.025)


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
    return {"step": 7, "model": model.state_dict(), "config": {"model": asdict(model.config), "dtype": "float32"}}


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
    assert (status, err) == (0, "")
    assert out == prompt + tokenizer.decode(ids) + "\n"
    assert ids


def test_command_line_without_a_checkpoint_says_so_in_one_sentence(tmp_path):
    missing = tmp_path / "nowhere"
    assert_one_sentence(*in_a_shell("--checkpoint", missing, "--prompt", "Hi"), missing, "no checkpoint")


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step_00000007"])
def test_checkpoint_may_be_a_folder_or_a_run_directory(place, run_dir, in_process):
    status, out, err = in_process("--checkpoint", run_dir / place, "--prompt", "Hi", "--max_new_tokens", 3)
    assert (status, err) == (0, "")
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
    ],
)
def test_flags_out_of_range_are_refused_by_name(flag, value, run_dir, in_process):
    status, out, err = in_process("--checkpoint", run_dir, "--prompt", "Hi", flag, value)
    assert (status, out) == (2, "")
    assert flag in err.splitlines()[-1]


def test_an_unknown_device_is_refused_in_one_sentence(run_dir, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--checkpoint", str(run_dir), "--prompt", "x", "--device", "tpu9"])
    assert_one_sentence(script.main(), *capsys.readouterr(), "tpu9")
