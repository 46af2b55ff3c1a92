"""sampling.py: compared with Hugging Face's, and with nuclei worked out by hand."""

import pytest
import torch
from test_model import hf_twin, one_thread, random_model  # noqa: F401 (one_thread is autouse)
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import sampling
from cpu_kernels import FewRowsLinear
from model import KVCache, Transformer
from model_utils import place_model
from sampling import (
    CANDIDATES,
    Sampling,
    drop_oldest,
    generate,
    next_ids,
    nucleus,
    penalize_repeats,
    sample_next,
    seeded,
    stream_ids,
)

CPU, GREEDY = torch.device("cpu"), Sampling(temperature=0)
PROMPTS = [[5, 17, 3, 99, 42, 8, 8], [1], [60, 2, 71], list(range(100, 60, -1))]


def hf_greedy(model, prompt, max_new_tokens, stop_tokens=(), **settings):
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
                **settings,
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


def without_a_cache(model, prompt, count, penalty=1.0):
    """Greedy ids by a loop that computes the whole text for each id."""
    ids = list(prompt)
    while len(ids) < min(len(prompt) + count, model.config.max_seq_len):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[:, -1]
        ids.append(int(RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits).argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("rows", [1, 4, 5, 16, 33])  # cpu_kernels.py has a product for each of these numbers of rows
def test_with_the_kernels_of_the_cpu_the_ids_are_those_of_the_plain_layers_without_a_cache(rows, penalty):
    """The prompts have different lengths. Their rows end at the end of the context, or after 30 ids."""
    placed = random_model(vocab_size=128, max_seq_len=48)  # 128 ids are whole slices of the output layer
    assert type(placed.output) is FewRowsLinear
    plain = Transformer(placed.config).eval()
    plain.load_state_dict(placed.state_dict())
    generator = torch.Generator().manual_seed(1)
    lengths = [(1, 7, 20, 47)[i % 4] for i in range(rows)]
    prompts = [torch.randint(128, (length,), generator=generator).tolist() for length in lengths]
    ours = generate(placed, prompts, max_new_tokens=30, temperature=0, repetition_penalty=penalty)
    assert ours == [without_a_cache(plain, prompt, 30, penalty) for prompt in prompts]
    assert [len(row) for row in ours] == [min(30, 48 - length) for length in lengths]


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_a_model_that_has_been_trained_between_two_generations_gives_the_ids_of_its_new_weights(rows):
    model = random_model(vocab_size=128)
    prompts = (PROMPTS * 4)[:rows]
    before = generate(model, prompts, max_new_tokens=12, temperature=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    tokens = torch.randint(100, (2, 20), generator=torch.Generator().manual_seed(0))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    after = generate(model, prompts, max_new_tokens=12, temperature=0)
    assert after == [without_a_cache(model, prompt, 12) for prompt in prompts]
    assert after != before


def test_a_stop_token_changes_nothing_but_where_a_row_ends():
    model = random_model(max_seq_len=32)
    for prompts in (PROMPTS[:1], PROMPTS[:3]):
        for settings in ({"temperature": 0}, {"temperature": 1.0, "top_p": 0.9}):

            def rows(stop_tokens, prompts=prompts, settings=settings):
                settings = {**settings, "stop_tokens": stop_tokens, "generator": seeded(0, CPU)}
                return generate(model, prompts, max_new_tokens=40, **settings)

            free = rows(())
            assert rows([1000]) == free  # an id that no row draws
            for stop in free[0][:9]:
                assert rows([stop]) == [row[: row.index(stop)] if stop in row else row for row in free]


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

    monkeypatch.setattr(sampling, "KVCache", allocate)
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


def test_greedy_generation_asks_the_device_for_no_number():
    """A tensor on the meta device has no numbers: whoever asks for one, and so would make a GPU wait, gets an error."""
    model = place_model(Transformer(random_model().config), torch.device("meta"))
    steps = next_ids(model, [[1, 2, 3], [4]], max_new_tokens=3, sampling=GREEDY, stop_tokens=(), generator=None)
    assert [(*ids.shape, *logits.shape) for ids, logits in steps] == [(2, 2, model.config.vocab_size)] * 3


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


# ---------------------------------------------------------------- all settings of a draw


def hf_shares(logits, temperature, top_k, top_p):
    """The probabilities of a draw by transformers' own steps, in its order."""
    steps = [TemperatureLogitsWarper(temperature)]
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    for step in steps:
        logits = step(None, logits)
    return logits.softmax(-1)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("top_p", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 2, 5, 12, 50])
def test_ids_are_drawn_with_the_probabilities_of_transformers_steps(temperature, top_p, top_k):
    logits = 2 * torch.randn(1, 12, generator=torch.Generator().manual_seed(top_k))
    expected = hf_shares(logits, temperature, top_k, top_p)[0]
    ids = sample_next(logits.expand(20_000, -1), temperature, top_p, torch.Generator().manual_seed(0), top_k)
    shares = torch.bincount(ids, minlength=12) / 20_000
    assert not shares[expected == 0].any()
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.015)  # 4 standard errors


def test_ids_as_likely_as_the_last_of_top_k_are_drawn_too_as_transformers_does():
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]])
    assert (hf_shares(logits, 1.0, 2, 1.0) > 0).tolist() == [[True, True, True, True, False]]
    ids = sample_next(logits.expand(2000, -1), 1.0, 1.0, torch.Generator().manual_seed(0), 2)
    assert ids.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-20, 1e-3])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_temperature_as_low_as_a_float_can_be_takes_the_likeliest(temperature, top_p, dtype):
    logits = (1e4 * torch.randn(50, 30, generator=torch.Generator().manual_seed(1))).to(dtype)
    ids = sample_next(logits, temperature, top_p, torch.Generator().manual_seed(0), 20)
    assert torch.equal(ids, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e20, 1e300, 1.7e308])
def test_a_temperature_as_high_as_a_float_can_be_makes_all_ids_equally_likely(temperature):
    ids = sample_next(torch.tensor([[9.0, 1, 0, -9]]).expand(20_000, -1), temperature, 1.0, seeded(0, CPU))
    torch.testing.assert_close(torch.bincount(ids) / 20_000, torch.full((4,), 0.25), rtol=0, atol=0.015)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 20.0])
def test_repeats_are_penalized_as_transformers_does(penalty):
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(30, (3, 9), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(3, 30, dtype=torch.bool).scatter_(1, ids, True)
    before = logits.clone()
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    assert torch.equal(penalize_repeats(logits, seen, penalty), expected)
    assert torch.equal(logits, before)
    assert not torch.equal(expected, before)


@pytest.mark.parametrize("penalty", [0.8, 1.2, 3.0])
def test_greedy_ids_with_a_penalty_equal_hugging_faces(penalty):
    """The padding of a batch has the id 0. It must not count as an id of the text."""
    model = random_model()
    ours = generate(model, PROMPTS, max_new_tokens=24, temperature=0, repetition_penalty=penalty)
    assert ours == [hf_greedy(model, prompt, 24, repetition_penalty=penalty) for prompt in PROMPTS]
    assert ours != generate(model, PROMPTS, max_new_tokens=24, temperature=0)


def test_generate_draws_from_top_k_ids():
    model = random_model(vocab_size=7)
    with torch.no_grad():
        likeliest = model(torch.tensor([[1, 2, 3]]))[0, -1].topk(2).indices.tolist()
    rows = generate(model, [[1, 2, 3]] * 500, max_new_tokens=1, top_k=2, generator=seeded(0, CPU))
    assert {row[0] for row in rows} == set(likeliest)


@pytest.mark.parametrize("seed", [-(10**40), -(2**63) - 1, -1, 0, 2**31, 2**63, 2**64 - 1, 2**64, 10**40])
def test_every_whole_number_is_a_seed(seed):
    draws = [torch.rand(3, generator=seeded(seed, CPU)) for _ in range(2)]
    assert torch.equal(*draws)


def test_small_seeds_draw_what_torch_draws_from_them():
    for seed in (0, 1, 1234):
        expected = torch.rand(3, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(torch.rand(3, generator=seeded(seed, CPU)), expected)


# ---------------------------------------------------------------- ids as they come


def streamed(model, prompt, count, settings=GREEDY, stop_tokens=(), **more):
    generator = seeded(0, CPU)
    steps = stream_ids(
        model, prompt, max_new_tokens=count, sampling=settings, stop_tokens=stop_tokens, generator=generator, **more
    )
    return [token for token, _ in steps]


@pytest.mark.parametrize("settings", [GREEDY, Sampling(), Sampling(0.7, 0.9, 20, 1.2)], ids=["greedy", "plain", "all"])
@pytest.mark.parametrize("count", [1, 20, 1000])
def test_streamed_ids_are_those_of_generate(settings, count):
    """1,000 ids do not fit the context of 64: both end where it is full."""
    model = random_model()
    for prompt in PROMPTS:
        expected = generate(model, [prompt], max_new_tokens=count, generator=seeded(0, CPU), **vars(settings))
        assert [streamed(model, prompt, count, settings)] == expected
        assert expected[0]


def test_streamed_ids_end_before_a_stop_token():
    model = random_model()
    free = streamed(model, PROMPTS[0], 20)
    assert streamed(model, PROMPTS[0], 20, stop_tokens=[free[6]]) == free[: free.index(free[6])]


def test_streamed_ids_come_one_by_one():
    model, passes = random_model(), []
    model.tok_embeddings.register_forward_hook(lambda *_: passes.append(1))
    steps = stream_ids(model, [1, 2], max_new_tokens=9, sampling=GREEDY, stop_tokens=(), generator=None)
    for count, _ in enumerate(steps, start=1):
        assert len(passes) == count


def test_the_logits_that_come_with_an_id_are_the_models_own():
    model = random_model()
    steps = stream_ids(
        model, [1, 2], max_new_tokens=9, sampling=Sampling(2.0, 0.9, 9, 1.5), stop_tokens=(), generator=seeded(0, CPU)
    )
    ids = [1, 2]
    for token, logits in steps:
        with torch.no_grad():
            torch.testing.assert_close(logits, model(torch.tensor([ids]))[0, -1], rtol=1e-4, atol=1e-4)
        ids.append(token)


@pytest.mark.parametrize("context", [2, 3, 16, 17])
def test_continuous_text_goes_on_from_the_newest_half_of_the_context(context):
    model = random_model(max_seq_len=context)
    new = streamed(model, [7], 3 * context + 1, continuous=True)
    assert len(new) == 3 * context + 1
    ids, expected = [7], []
    while len(expected) < len(new):
        expected += generate(model, [ids], max_new_tokens=context, temperature=0)[0]
        text = [7, *expected]
        ids = [7, *text[len(text) - ((context + 1) // 2 - 1) :]]
    assert new == expected[: len(new)]


def test_continuous_text_ends_at_a_stop_token_and_is_the_same_while_the_context_lasts():
    model = random_model(max_seq_len=16)
    free = streamed(model, [7, 8], 60, continuous=True)
    assert free[:14] == streamed(model, [7, 8], 60)
    stop = next(token for token in free[20:] if token not in free[:20])
    assert streamed(model, [7, 8], 60, continuous=True, stop_tokens=[stop]) == free[: free.index(stop)]


def test_the_first_id_and_the_newest_are_kept():
    assert drop_oldest([9, 1, 2, 3, 4], 3) == [9, 3, 4]
    assert drop_oldest([9, 1, 2, 3, 4], 1) == [9]
