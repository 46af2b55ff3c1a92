"""model.py compared with Hugging Face's Llama with the same weights, with published counts, and with itself."""

import itertools
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from model import KVCache, ModelConfig, Transformer, apply_rope, document_positions, model_errors, rope_tables
from model_utils import MixedPrecision, compile_blocks, place_model

TINY = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 101,
    "multiple_of": 16,
    "max_seq_len": 64,
}

CONFIGS = {
    "as many key/value heads as heads": {"n_kv_heads": 4},
    "two heads a key/value head": {"n_kv_heads": 2},
    "four heads a key/value head": {"n_kv_heads": 1},
    "eight heads a key/value head": {"dim": 64, "n_heads": 8, "n_kv_heads": 1},
    "eight heads, two groups": {"dim": 48, "n_heads": 8, "n_kv_heads": 2, "n_layers": 3},
    "one head, one layer": {"dim": 16, "n_heads": 1, "n_kv_heads": 1, "n_layers": 1},
    "heads of two": {"dim": 8, "n_heads": 4, "n_kv_heads": 2, "n_layers": 5},
    "tied": {"tie_embeddings": True},
    "wider feed-forward": {"ffn_dim_multiplier": 1.3, "multiple_of": 8},
    "narrower feed-forward": {"ffn_dim_multiplier": 0.4, "multiple_of": 1},
    "short wavelengths": {"rope_theta": 100.0},
    "large epsilon": {"norm_eps": 0.1},
    "rope scaled by 8": {"dim": 128, "rope_scale": 8.0, "rope_theta": 10_000.0},
    "rope scaled by 32, tied": {"dim": 128, "rope_scale": 32.0, "tie_embeddings": True},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """A second thread does not speed up small matrices. On a busy machine waiting for it takes longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_model(seed=0, **changes):
    """A model with large weights. With the initial deviation of 0.02 all logits are near zero and hide defects."""
    model = place_model(Transformer(ModelConfig(**{**TINY, **changes})), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            mean, std = (1.0, 0.3) if parameter.dim() == 1 else (0.0, model.config.dim**-0.5)
            parameter.normal_(mean, std, generator=generator)
    return model.eval()


def random_tokens(*shape, vocab_size=TINY["vocab_size"], seed=1):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def halves_first(weight, n_heads):
    """Rows of wq or wk in Hugging Face's order: in each head the even rows come first, then the odd rows. Hugging Face
    rotates the pairs (i, i + K/2); Meta rotates the pairs (2i, 2i + 1)."""
    head_dim = len(weight) // n_heads
    order = [*range(0, head_dim, 2), *range(1, head_dim, 2)]
    return torch.cat([weight[head * head_dim : (head + 1) * head_dim][order] for head in range(n_heads)])


def under_hf_names(tensors, config):
    """Rename weights, or their gradients, from our names to Hugging Face's."""
    names = {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "tok_embeddings": "model.embed_tokens",
        "norm": "model.norm",
        "output": "lm_head",
    }
    heads = {"attention.wq": config.n_heads, "attention.wk": config.n_kv_heads}
    renamed = {}
    for name, tensor in tensors.items():
        prefix, part = "", name.removesuffix(".weight")
        if part.startswith("layers."):
            _, layer, part = part.split(".", 2)
            prefix = f"model.layers.{layer}."
        renamed[f"{prefix}{names[part]}.weight"] = halves_first(tensor, heads[part]) if part in heads else tensor
    return renamed


def hf_config(config):
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scale > 1:
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope_scale,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        rope_parameters=rope,
        attn_implementation="eager",  # matrix products and a mask, not the attention kernel that our model calls
    )


def hf_twin(model):
    """Hugging Face's Llama with the weights of `model`."""
    twin = LlamaForCausalLM(hf_config(model.config)).eval()
    twin.load_state_dict(under_hf_names(model.state_dict(), model.config))
    return twin


def assert_close(ours, expected, tolerance=1e-4):
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


# ---------------------------------------------------------------- logits, loss and gradients equal Hugging Face's


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_hugging_faces(name):
    model = random_model(**CONFIGS[name])
    tokens = random_tokens(3, 50)
    with torch.no_grad():
        logits, expected = model(tokens), hf_twin(model)(tokens).logits
    assert logits.shape == (3, 50, 101)
    assert logits.dtype == torch.float32
    assert logits.std() > 0.5
    assert_close(logits, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_every_gradient_equal_hugging_faces(name):
    model = random_model(**CONFIGS[name])
    twin = hf_twin(model)
    tokens, targets = random_tokens(3, 50), random_tokens(3, 50, seed=2)
    targets[0, 10:20] = -100
    targets[2] = -100
    loss = model(tokens, targets)
    loss.backward()
    expected = twin(tokens, labels=targets, shift_labels=targets).loss
    expected.backward()
    assert loss.shape == ()
    assert_close(loss, expected)
    gradients = under_hf_names({name: p.grad for name, p in model.named_parameters()}, model.config)
    expected_gradients = {name: p.grad for name, p in twin.named_parameters()}
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert expected_gradients[name].abs().max() > 1e-4, name
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-5, msg=name)


# ---------------------------------------------------------------- half precision


def test_logits_in_bf16_are_near_float32():
    model = random_model()
    tokens = random_tokens(2, 20)
    with torch.no_grad():
        logits = model(tokens)
        rough = model.bfloat16()(tokens)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - logits).std() < 0.05 * logits.std()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_large_half_precision_numbers_have_the_bits_of_hugging_faces(dtype):
    """The square of 300 is too large for float16, so the norm computes in float32. It rounds, then scales."""
    norm = random_model(dim=64).norm.to(dtype)
    peer = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    peer.load_state_dict(norm.state_dict())
    x = 1000 * torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        normed = norm(x)
        assert normed.dtype == dtype
        assert torch.equal(normed, peer(x))
    assert normed.abs().max() > 1


# ---------------------------------------------------------------- what a position may see


def test_a_later_token_never_changes_earlier_logits():
    model = random_model()
    tokens = random_tokens(1, 40)
    with torch.no_grad():
        logits = model(tokens)
        for changed in (1, 17, 39):
            other = tokens.clone()
            other[0, changed] = (other[0, changed] + 1) % 101
            others = model(other)
            assert_close(others[:, :changed], logits[:, :changed], 1e-6)
            assert (others[:, changed:] - logits[:, changed:]).abs().amax(-1).min() > 1e-3


def test_rows_of_a_batch_do_not_see_each_other():
    model = random_model()
    tokens = random_tokens(3, 30)
    with torch.no_grad():
        assert_close(model(tokens), torch.cat([model(row[None]) for row in tokens]), 1e-5)


def test_more_tokens_than_positions_are_refused():
    model = random_model()
    assert model(random_tokens(1, 64)).shape == (1, 64, 101)
    with pytest.raises(ValueError, match=r"65 .*max_seq_len=64"):
        model(random_tokens(1, 65))


# ---------------------------------------------------------------- documents in one row

BOS = 100
LENGTHS = [
    (7, 20, 1, 12),
    (40,),
    (1, 1, 38),
]  # of the documents in three rows of 40 tokens; the first row begins inside a document


def packed(seed=1):
    """Rows of documents. Each document begins with a BOS, except the very first: the window cut off its beginning."""
    tokens = random_tokens(3, 40, vocab_size=BOS, seed=seed)
    for row, lengths in zip(tokens, LENGTHS, strict=True):
        row[list(itertools.accumulate(lengths))[:-1]] = BOS
    tokens[1:, 0] = BOS
    return tokens


def documents():
    """(row, slice) of every document of `packed`."""
    for row, lengths in enumerate(LENGTHS):
        for end, length in zip(itertools.accumulate(lengths), lengths, strict=True):
            yield row, slice(end - length, end)


def test_positions_count_from_each_documents_beginning():
    positions = document_positions(packed(), BOS)
    assert positions.tolist() == [[i for length in lengths for i in range(length)] for lengths in LENGTHS]
    assert document_positions(torch.full((1, 5), 7), BOS).tolist() == [[0, 1, 2, 3, 4]]
    assert document_positions(torch.full((1, 5), BOS), BOS).tolist() == [[0] * 5]


@pytest.mark.parametrize("name", ["as many key/value heads as heads", "eight heads, two groups", "rope scaled by 8"])
def test_packed_documents_have_the_logits_loss_and_gradients_of_each_one_alone(name):
    model, tokens = random_model(**CONFIGS[name]), packed()
    targets = random_tokens(3, 40, seed=2)
    targets[0, 3:9] = -100
    with torch.no_grad():
        logits = model(tokens, positions=document_positions(tokens, BOS))
        for row, place in documents():
            assert_close(logits[row, place], model(tokens[row, place][None])[0], 1e-5)
        assert (logits - model(tokens)).abs().max() > 0.1  # without positions the documents see each other
    packed_loss = model(tokens, targets, positions=document_positions(tokens, BOS))
    packed_loss.backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    counted, alone = (targets != -100).sum(), 0
    for row, place in documents():
        if n := (targets[row, place] != -100).sum():
            alone = alone + model(tokens[row, place][None], targets[row, place][None]) * n / counted
    alone.backward()
    assert_close(packed_loss, alone, 1e-5)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        assert_close(gradient, parameter.grad, 1e-5)


def test_rotations_begin_anew_with_each_document():
    """Attention sees only distances, so the logits alone cannot show this. NaN beyond the longest document can."""
    model, tokens = random_model(), packed()[:1]
    with torch.no_grad():
        logits = model(tokens, positions=document_positions(tokens, BOS))
        model.rope_cos[20:] = math.nan
        assert torch.equal(model(tokens, positions=document_positions(tokens, BOS)), logits)


def test_changing_a_document_changes_no_bit_of_the_others():
    model, tokens = random_model(), packed()
    with torch.no_grad():
        logits = model(tokens, positions=document_positions(tokens, BOS))
        for row, place in documents():
            other = tokens.clone()
            last = other[row, place.stop - 1]
            other[row, place] = torch.where(other[row, place] == BOS, BOS, (other[row, place] + 1) % BOS)
            if last == BOS:
                continue  # the document is a BOS alone
            changed = (model(other, positions=document_positions(other, BOS)) != logits).any(-1)
            assert changed[row, place.stop - 1]
            changed[row, place] = False
            assert not changed.any()


def test_packed_documents_have_hugging_faces_logits_and_gradients():
    model, tokens, targets = random_model(), packed(), random_tokens(3, 40, seed=2)
    twin, positions = hf_twin(model), document_positions(tokens, BOS)
    seen = torch.zeros(3, 1, 40, 40, dtype=torch.bool)
    for row, place in documents():
        seen[row, 0, place, place] = torch.ones(place.stop - place.start, place.stop - place.start).tril().bool()
    mask = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
    there = twin(tokens, position_ids=positions, attention_mask=mask, labels=targets, shift_labels=targets)
    assert_close(model(tokens, positions=positions), there.logits)
    model(tokens, targets, positions=positions).backward()
    there.loss.backward()
    gradients = under_hf_names({name: p.grad for name, p in model.named_parameters()}, model.config)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_positions_and_a_cache_are_refused_together():
    model, tokens = random_model(), packed()
    cache = KVCache(model.config, 3, 40, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="positions: a cache counts its own"):
        model(tokens, positions=document_positions(tokens, BOS), cache=cache)


# ---------------------------------------------------------------- key/value cache

CACHED = {
    "grouped": {},
    "tied, one group": {"n_kv_heads": 1, "tie_embeddings": True},
    "rope scaled": {"rope_scale": 8.0, "rope_theta": 10_000.0, "dim": 128},
}


CHUNKS = {
    "all at once": [40],
    "token by token": [1] * 40,
    "prompt, then token by token": [25] + [1] * 15,
    "in chunks": [7, 13, 1, 19],
    "one, then the rest": [1, 39],
}


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_cached_logits_equal_uncached(chunks, name):
    model = random_model(**CACHED[name])
    tokens = random_tokens(3, 40)
    cache = KVCache(model.config, 3, 40, torch.device("cpu"), torch.float32)
    logits, done = [], 0
    with torch.no_grad():
        for chunk in chunks:
            start = torch.full((3,), done) if done else None
            logits.append(model(tokens[:, done : done + chunk], cache=cache, start=start))
            done += chunk
        assert_close(torch.cat(logits, dim=1), model(tokens), 1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 10])
def test_cached_logits_of_right_padded_prompts_equal_those_of_each_row(chunk):
    model = random_model()
    lengths, more = torch.tensor([5, 23, 1, 14]), 30
    rows = [random_tokens(1, length + more, seed=length) for length in lengths.tolist()]
    padded = torch.zeros(4, 23, dtype=torch.int64)
    for i, length in enumerate(lengths):
        padded[i, :length] = rows[i][0, :length]
    cache = KVCache(model.config, 4, 23 + more, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        expected = [model(row)[0] for row in rows]
        logits = model(padded, cache=cache)
        for i, length in enumerate(lengths):
            assert_close(logits[i, :length], expected[i][:length], 1e-5)
        for done in range(0, more, chunk):
            start = lengths + done
            tokens = torch.cat([row[:, at : at + chunk] for row, at in zip(rows, start, strict=True)])
            logits = model(tokens, cache=cache, start=start)
            for i, at in enumerate(start):
                assert_close(logits[i], expected[i][at : at + chunk], 1e-5)


def test_cached_loss_equals_uncached():
    model = random_model()
    tokens, targets = random_tokens(2, 20), random_tokens(2, 20, seed=2)
    cache = KVCache(model.config, 2, 20, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        assert_close(model(tokens, targets, cache=cache), model(tokens, targets), 1e-5)


def test_a_cache_may_have_room_to_spare_but_not_exceed_the_context():
    model = random_model()
    tokens = random_tokens(2, 9)
    cache = KVCache(model.config, 2, 64, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        assert_close(model(tokens, cache=cache), model(tokens), 1e-5)
    with pytest.raises(ValueError, match="max_seq_len=64"):
        KVCache(model.config, 2, 65, torch.device("cpu"), torch.float32)


def test_hidden_states_are_what_the_output_layer_reads():
    model = random_model()
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        assert_close(model.output(model.hidden(tokens)), model(tokens), 1e-6)


# ---------------------------------------------------------------- rotary positions


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("scale", [1.0, 8.0, 32.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rope_tables_equal_hugging_faces_far_beyond_the_first_context(head_dim, scale, theta):
    config = ModelConfig(
        dim=2 * head_dim, n_heads=2, n_kv_heads=1, n_layers=1, rope_scale=scale, rope_theta=theta, max_seq_len=20_000
    )
    cos, sin = rope_tables(config)
    frequency = LlamaRotaryEmbedding(hf_config(config)).inv_freq.double()
    position = torch.arange(20_000, dtype=torch.float64)[:, None]
    angle = position * frequency
    tolerance = 1e-6 + position * frequency * 3e-7  # float32 rounds the frequency, the angle, and their product
    assert cos.shape == sin.shape == (20_000, head_dim // 2)
    assert ((cos - angle.cos()).abs() < tolerance).all()
    assert ((sin - angle.sin()).abs() < tolerance).all()
    if scale > 1:  # the scaling makes a large difference
        plain, _ = rope_tables(ModelConfig(**{**vars(config), "rope_scale": 1.0}))
        assert (plain - cos).abs().max() > 1


@pytest.mark.parametrize("scale", [8.0, 32.0])
def test_rope_scaling_leaves_short_wavelengths_and_stretches_long_ones(scale):
    config = ModelConfig(dim=256, n_heads=2, rope_scale=scale, max_seq_len=2)
    cos, sin = rope_tables(config)
    plain = 500_000.0 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    slower = plain / torch.atan2(sin[1], cos[1]).double()  # the angle at position 1 is the frequency
    wavelength = 2 * math.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    assert short.sum() > 10
    assert long.sum() > 10
    assert_close(slower[short], torch.ones_like(slower[short]), 1e-4)
    torch.testing.assert_close(slower[long], torch.full_like(slower[long], scale), rtol=1e-4, atol=0)
    between = slower[~short & ~long]
    assert len(between) > 1
    assert ((between > 1) & (between < scale)).all()
    assert (slower.diff() > -1e-4).all()


def test_rope_is_metas_complex_multiplication_of_neighbouring_pairs():
    config = ModelConfig(dim=48, n_heads=3, n_kv_heads=3, max_seq_len=20)
    cos, sin = rope_tables(config)
    x = torch.randn(2, 20, 3, 16, generator=torch.Generator().manual_seed(0))
    turns = torch.polar(torch.ones_like(cos), torch.atan2(sin, cos))[:, None]
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (8, 2))) * turns).flatten(-2)
    assert_close(apply_rope(x, cos[:, None], sin[:, None]), expected, 1e-5)


def rotated_in_float32(x, cos, sin):
    even, odd = x.float()[..., 0::2], x.float()[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rotated_in_float32_and_rounded_once(dtype):
    cos, sin = (table[:, None] for table in rope_tables(ModelConfig(**TINY)))
    x = torch.randn(3, 64, 4, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(apply_rope(x, cos, sin), rotated_in_float32(x, cos, sin).to(dtype))


@pytest.mark.parametrize("packed_documents", [False, True])
def test_queries_and_keys_under_bf16_autocast_are_rotated_in_float32(monkeypatch, packed_documents):
    model, tokens = random_model(n_layers=1, n_kv_heads=4), packed()
    positions = document_positions(tokens, BOS) if packed_documents else None
    places = positions if packed_documents else torch.arange(40).expand(3, 40)
    cos, sin = (table[places][:, :, None] for table in rope_tables(model.config))
    projected, rotated = [], []
    attention = model.layers[0].attention
    attend = attention.attend

    def note(q, k, v, mask):
        rotated.extend(t.transpose(1, 2) for t in (q, k))
        return attend(q, k, v, mask)

    monkeypatch.setattr(attention, "attend", note)
    for layer in (attention.wq, attention.wk):
        layer.register_forward_hook(lambda layer, args, output: projected.append(output.unflatten(-1, (4, 8))))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(tokens, positions=positions)
    assert len(projected) == len(rotated) == 2
    for before, after in zip(projected, rotated, strict=True):
        assert before.dtype == after.dtype == torch.bfloat16
        assert torch.equal(after, rotated_in_float32(before, cos, sin).bfloat16())


def test_attention_sees_distances_not_places():
    config = ModelConfig(dim=32, n_heads=1, n_kv_heads=1, max_seq_len=64)
    cos, sin = rope_tables(config)
    q, k = torch.randn(2, 1, 1, 1, 32, generator=torch.Generator().manual_seed(0)).unbind()

    def score(query_at, key_at):
        return (apply_rope(q, cos[query_at], sin[query_at]) * apply_rope(k, cos[key_at], sin[key_at])).sum()

    assert_close(score(50, 43), score(7, 0), 1e-4)
    assert abs(score(50, 43) - score(50, 42)) > 1e-3


# ---------------------------------------------------------------- names, shapes, counts


@pytest.mark.parametrize("tied", [False, True])
def test_parameter_names_and_shapes_are_metas(tied):
    config = ModelConfig(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=101, multiple_of=16, tie_embeddings=tied
    )
    assert {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()} == {
        "tok_embeddings.weight": (101, 32),
        "layers.0.attention.wq.weight": (32, 32),
        "layers.0.attention.wk.weight": (16, 32),
        "layers.0.attention.wv.weight": (16, 32),
        "layers.0.attention.wo.weight": (32, 32),
        "layers.0.feed_forward.w1.weight": (96, 32),
        "layers.0.feed_forward.w3.weight": (96, 32),
        "layers.0.feed_forward.w2.weight": (32, 96),
        "layers.0.attention_norm.weight": (32,),
        "layers.0.ffn_norm.weight": (32,),
        "layers.1.attention.wq.weight": (32, 32),
        "layers.1.attention.wk.weight": (16, 32),
        "layers.1.attention.wv.weight": (16, 32),
        "layers.1.attention.wo.weight": (32, 32),
        "layers.1.feed_forward.w1.weight": (96, 32),
        "layers.1.feed_forward.w3.weight": (96, 32),
        "layers.1.feed_forward.w2.weight": (32, 96),
        "layers.1.attention_norm.weight": (32,),
        "layers.1.ffn_norm.weight": (32,),
        "norm.weight": (32,),
        "output.weight": (101, 32),
    }


def test_tied_embeddings_are_one_parameter_that_sums_both_gradients():
    model = random_model(tie_embeddings=True)
    assert model.output.weight is model.tok_embeddings.weight
    assert "output.weight" not in dict(model.named_parameters())
    untied = random_model()
    untied.load_state_dict(model.state_dict())
    tokens, targets = random_tokens(2, 20), random_tokens(2, 20, seed=2)
    model(tokens, targets).backward()
    untied(tokens, targets).backward()
    both = untied.tok_embeddings.weight.grad + untied.output.weight.grad
    torch.testing.assert_close(model.output.weight.grad, both, rtol=1e-4, atol=1e-6)


# From Meta's params.json files: dim, layers, heads, key/value heads, multiplier, multiple_of
META = {
    "Llama 3 8B": ((4096, 32, 32, 8, 1.3, 1024), False, 14_336, 8_030_261_248),
    "Llama 3 70B": ((8192, 80, 64, 8, 1.3, 4096), False, 28_672, 70_553_706_496),
    "Llama 3.2 1B": ((2048, 16, 32, 8, 1.5, 256), True, 8192, 1_235_814_400),
    "Llama 3.2 3B": ((3072, 28, 24, 8, 1.0, 256), True, 8192, 3_212_749_824),
}


@pytest.mark.parametrize("name", META)
def test_feed_forward_width_and_parameter_count_of_metas_models(name):
    (dim, n_layers, n_heads, n_kv_heads, multiplier, multiple_of), tied, ffn_dim, count = META[name]
    config = ModelConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        ffn_dim_multiplier=multiplier,
        multiple_of=multiple_of,
        tie_embeddings=tied,
    )
    assert config.ffn_dim == ffn_dim
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(config).parameters()) == count


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "width"),
    [
        (768, 256, None, 2048),
        (96, 256, None, 256),
        (96, 1, None, 256),
        (97, 1, None, 258),
        (98, 4, None, 264),
        (768, 256, 1.0, 2048),
        (768, 256, 1.01, 2304),
        (768, 1, 1.5, 3072),
        (768, 1, 0.1, 204),
    ],
)
def test_feed_forward_width_is_rounded_up(dim, multiple_of, multiplier, width):
    assert ModelConfig(dim=dim, multiple_of=multiple_of, ffn_dim_multiplier=multiplier).ffn_dim == width


def test_default_model_has_300_million_parameters():
    with torch.device("meta"):
        count = sum(p.numel() for p in Transformer(ModelConfig()).parameters())
    block = 2 * 768 * 768 + 2 * 768 * 384 + 3 * 768 * 2048 + 2 * 768  # 8 key/value heads of 48: 384 wide
    assert count == 2 * 128_256 * 768 + 16 * block + 768
    assert round(count / 1e6, 1) == 300.8


# ---------------------------------------------------------------- initialisation


@pytest.mark.parametrize("n_layers", [1, 8])
def test_initial_weights_have_the_deviations_of_the_docstring(n_layers):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(dim=128, n_layers=n_layers, n_heads=4, n_kv_heads=4, vocab_size=512))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
            continue
        to_residual = name.endswith(("wo.weight", "w2.weight"))
        expected = 0.02 / math.sqrt(2 * n_layers) if to_residual else 0.02
        assert abs(parameter.std() / expected - 1) < 0.03, name
        assert abs(parameter.mean()) < expected * 0.05, name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vocab_size", [512, 8192])
def test_initial_loss_is_that_of_a_uniform_guess(vocab_size, tied):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**TINY, "vocab_size": vocab_size, "dim": 64, "tie_embeddings": tied}))
    tokens = random_tokens(8, 64, vocab_size=vocab_size)
    targets = random_tokens(8, 64, vocab_size=vocab_size, seed=2)
    with torch.no_grad():
        assert abs(model(tokens, targets) - math.log(vocab_size)) < 0.05


def test_the_same_seed_gives_the_same_weights():
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(Transformer(ModelConfig(**TINY)).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not torch.equal(models[0]["output.weight"], models[2]["output.weight"])


# ---------------------------------------------------------------- configurations that are refused


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((f, v) for f in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of") for v in (0, -1)),
        ("max_seq_len", 0),
        ("ffn_dim_multiplier", 0.0),
        ("ffn_dim_multiplier", -1.3),
        ("ffn_dim_multiplier", math.nan),
        ("norm_eps", 0.0),
        ("norm_eps", math.nan),
        ("rope_theta", -1.0),
        ("rope_theta", math.nan),
        ("rope_scale", 0.5),
        ("rope_scale", math.nan),
        ("dim", 33),  # not a multiple of n_heads
        ("dim", 36),  # heads of 9, which cannot be split into pairs
        ("n_heads", 3),
        ("n_kv_heads", 3),
        ("n_kv_heads", 8),
    ],
)
def test_an_invalid_field_is_refused_by_name_and_value(field, value):
    config = ModelConfig(**{**TINY, field: value})
    assert any(f"{field}={value}" in error for error in model_errors(config))
    with pytest.raises(ValueError, match=f"{field}={value}"):
        Transformer(config)


def test_all_wrong_fields_are_named_at_once():
    config = ModelConfig(**{**TINY, "n_layers": 0, "norm_eps": -1.0, "rope_scale": 0.0, "vocab_size": -5})
    assert len(model_errors(config)) == 4
    with pytest.raises(ValueError, match=r"n_layers=0.*vocab_size=-5.*norm_eps=-1\.0.*rope_scale=0\.0"):
        Transformer(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_work_have_no_errors(name):
    assert model_errors(ModelConfig(**{**TINY, **CONFIGS[name]})) == []
    assert model_errors(ModelConfig()) == []


@pytest.mark.parametrize("multiplier", [1e-9, math.inf])
def test_a_multiplier_that_makes_the_feed_forward_empty_or_endless_is_refused(multiplier):
    config = ModelConfig(**{**TINY, "ffn_dim_multiplier": multiplier})
    assert any(f"ffn_dim_multiplier={multiplier}" in error for error in model_errors(config))


# ---------------------------------------------------------------- compiled


@pytest.mark.slow
def test_compiled_blocks_treat_documents_as_uncompiled_ones_do_and_compile_once():
    model, twin = random_model(), random_model()
    torch._dynamo.reset()
    compile_blocks(model)
    for seed in range(3):
        tokens, targets = packed(seed), random_tokens(3, 40, seed=seed + 5)
        tokens[0, 5 * seed + 5] = BOS  # the documents end at other places each time
        stance = "default" if seed == 0 else "fail_on_recompile"
        losses = []
        for each in (model, twin):
            each.zero_grad(set_to_none=True)
            with torch.compiler.set_stance(stance):
                losses.append(each(tokens, targets, positions=document_positions(tokens, BOS)))
            losses[-1].backward()
        assert_close(losses[0], losses[1], 1e-5)
        for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5, msg=name)
    graphs = torch._dynamo.explain(twin.layers[0].forward)(
        torch.randn(3, 40, 32), tuple(torch.randn(3, 40, 1, 4) for _ in "cs"), torch.ones(3, 1, 40, 40) > 0, None
    )
    assert graphs.graph_break_count == 0


@pytest.mark.slow
def test_compiled_blocks_have_the_loss_and_gradients_of_uncompiled_ones():
    tokens, targets = random_tokens(2, 64), random_tokens(2, 64, seed=2)
    targets[0, :9] = -100
    losses, gradients = [], []
    for compiled in (False, True):
        model = random_model()
        if compiled:
            compile_blocks(model)
        loss = model(tokens, targets)
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert_close(losses[1], losses[0], 1e-5)
    assert gradients[0].keys() == gradients[1].keys()  # compiling renames nothing
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.slow
def test_compiling_changes_neither_the_names_of_the_weights_nor_the_logits():
    model = random_model()
    names, tokens = list(model.state_dict()), random_tokens(2, 64)
    with torch.no_grad():
        logits = model(tokens)
        compile_blocks(model)
        assert list(model.state_dict()) == names
        assert_close(model(tokens), logits, 1e-5)


@pytest.mark.usefixtures("compiler")
def test_of_compiled_blocks_the_backward_pass_computes_swiglus_products_again_but_no_attention():
    """A block keeps two of the feed-forward's three activations. The third is the product of these two."""
    model = random_model()
    compile_blocks(model)
    mixed, tokens = MixedPrecision(model, torch.bfloat16, []), random_tokens(2, 64)
    mixed(tokens, tokens).backward()  # compiles, which calls operations too
    kept: dict[int, torch.Size] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.shape
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = mixed(tokens, tokens)
    wide = [shape for shape in kept.values() if shape.numel() == tokens.numel() * model.config.ffn_dim]
    assert len(wide) == 2 * model.config.n_layers
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss.backward()
    names = [event.name for event in profile.events()]
    assert names.count("cpu_kernels::attention_backward") == model.config.n_layers
    assert "cpu_kernels::attention" not in names
