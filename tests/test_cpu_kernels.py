"""cpu_kernels.py: the same numbers as the plain layers."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_model import one_thread, random_model, random_tokens  # noqa: F401 (one_thread is autouse)

import cpu_kernels
import model as model_module
from cpu_kernels import FewRowsLinear, attend, attention, pieces, plain_attention
from model import KVCache, ModelConfig, Transformer, document_positions
from model_utils import autocast, place_model

# ---------------------------------------------------------------- products of a few rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2,), (4,), (5,), (32,), (33,), (1, 1), (4, 1), (4, 4)])
@pytest.mark.parametrize("width", [24, 64, 192])  # with and without whole slices
def test_a_linear_layer_equals_torchs_for_few_rows_and_for_many(shape, width, dtype):
    torch.manual_seed(0)
    layer = FewRowsLinear(16, width, bias=False).to(dtype)
    x = torch.randn(*shape, 16, dtype=dtype, requires_grad=True)
    results = []
    for y in (layer(x), F.linear(x, layer.weight)):
        gradients = torch.autograd.grad(y.square().sum(), (x, layer.weight))
        results.append((y, *gradients))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("casts", [False, True])
def test_products_in_bf16_are_torchs_own_with_and_without_autocast(rows, dtype, casts, monkeypatch):
    layer, x = FewRowsLinear(16, 64, bias=False).to(dtype), torch.randn(rows, 16, dtype=dtype)
    calls, linear = [], F.linear
    monkeypatch.setattr(cpu_kernels.functional, "linear", lambda x, W: calls.append(1) or linear(x, W))
    with autocast(torch.device("cpu"), torch.bfloat16 if casts else torch.float32):
        layer(x)
    assert len(calls) == (casts or dtype == torch.bfloat16)


def test_placing_a_model_on_the_cpu_keeps_its_parameters_and_its_logits():
    model = Transformer(ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=101, multiple_of=16))
    parameters, tokens = dict(model.named_parameters()), random_tokens(1, 5)  # five rows count as few
    with torch.no_grad():
        logits = model(tokens)
        placed = place_model(model, torch.device("cpu"))
        torch.testing.assert_close(placed(tokens), logits, rtol=1e-5, atol=1e-6)
    assert {type(module) for module in placed.modules() if isinstance(module, torch.nn.Linear)} == {FewRowsLinear}
    assert all(p is parameters[name] for name, p in placed.named_parameters())


# ---------------------------------------------------------------- attention in training


def random_inputs(B=2, H=4, G=2, T=130, K=8, S=None, dtype=torch.float32):
    """q (B, H, T, K), k and v (B, G, S, K), laid out as model.py lays them out; and a gradient of the result."""
    torch.manual_seed(0)
    lengths = ((H, T), (G, S or T), (G, S or T))
    q, k, v = (
        torch.randn(B, n, heads, K, dtype=dtype).transpose(1, 2).detach().requires_grad_() for heads, n in lengths
    )
    return q, k, v, torch.randn(B, T, H, K, dtype=dtype).transpose(1, 2)


def document_mask(B, T, starts):
    """The mask that model.hidden makes of documents that begin at `starts`; each row has them a little later."""
    tokens = torch.ones(B, T, dtype=torch.int64)
    for b in range(B):
        tokens[b, [(start + b) % T for start in starts]] = 0
    document = (document_positions(tokens, 0) == 0).cumsum(1)
    return (document[:, :, None] == document[:, None, :]).tril()[:, None]


def with_gradients(function, q, k, v, mask, grad):
    y = function(q, k, v, mask)
    return y, *torch.autograd.grad(y, (q, k, v), grad.to(y.dtype))


def in_float64(q, k, v, mask, grad):
    """What the result and the gradients should be."""
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    return with_gradients(plain_float64, *wide, mask, grad.double())


def plain_float64(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)


@pytest.mark.parametrize(
    "shape",
    [
        {"T": 1},
        {"T": 63},
        {"T": 64},
        {"T": 65, "H": 2},
        {"T": 130, "H": 4, "G": 1},
        {"T": 130, "H": 3, "G": 3, "B": 3},
        {"T": 300, "B": 1, "K": 6},
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", ["causal", "documents", "any"])
def test_attention_in_pieces_equals_the_plain_one(shape, mask, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "SCORES", 20_000)  # so that heads are divided too
    q, k, v, grad = random_inputs(**shape)
    B, _, T, _ = q.shape
    if mask == "any":
        chosen = (torch.rand(B, 1, T, T) < 0.3) | torch.eye(T, dtype=torch.bool)
    else:
        chosen = None if mask == "causal" else document_mask(B, T, (0, T // 3, T // 2))
    expected = in_float64(q, k, v, chosen, grad)
    for function in (attention, plain_attention):
        results = with_gradients(function, q, k, v, chosen, grad)
        for result, exact in zip(results, expected, strict=True):
            torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_keys_may_be_more_than_the_queries_and_a_mask_may_serve_all_rows():
    q, k, v, grad = random_inputs(T=256, S=300)
    mask = (torch.rand(1, 1, 256, 300) < 0.3) | torch.eye(256, 300, dtype=torch.bool)
    results, expected = with_gradients(attend, q, k, v, mask, grad), in_float64(q, k, v, mask, grad)
    for result, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_in_bfloat16_the_error_is_about_that_of_torchs_kernel(size, masked):
    q, k, v, grad = random_inputs(T=300, K=48, dtype=torch.bfloat16)
    q = (size * q).detach().requires_grad_()  # larger scores: a sharper softmax
    mask = document_mask(2, 300, (0, 100)) if masked else None
    expected = in_float64(q, k, v, mask, grad)

    def errors(function):
        results = with_gradients(function, q, k, v, mask, grad)
        return [((r.double() - e).norm() / e.norm()).item() for r, e in zip(results, expected, strict=True)]

    ours, torchs = errors(attention), errors(model_module.attend)
    assert all(a < 1.35 * b for a, b in zip(ours, torchs, strict=True)), (ours, torchs)
    assert math.hypot(*ours) < math.hypot(*torchs), (ours, torchs)


@pytest.mark.parametrize("masked", [False, True])
def test_the_gradients_are_the_slopes(masked):
    q, k, v, _ = random_inputs(B=2, T=5, K=2, dtype=torch.float64)
    mask = document_mask(2, 5, (0, 2)) if masked else None
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, mask), (q, k, v))


def test_pieces_skip_the_keys_of_other_documents_and_stay_small():
    q, k = torch.empty(2 * 2, 2, 1000, 8, dtype=torch.bfloat16), torch.empty(2 * 2, 1000, 8, dtype=torch.bfloat16)
    spans = {}
    for mask in (None, document_mask(2, 1000, (0, 500))):
        for heads, queries, keys, _ in pieces(q, k, mask):
            row = heads.start // 2 if mask is not None else 0
            spans[mask is not None, row, queries.start] = (keys.start, keys.stop)
            assert (heads.stop - heads.start) * 2 * (queries.stop - queries.start) * 1000 <= cpu_kernels.SCORES
    assert spans[False, 0, 896] == (0, 1000)
    assert spans[True, 0, 384] == (0, 512)
    assert spans[True, 0, 512] == (500, 640)
    assert spans[True, 1, 896] == (501, 1000)


def test_a_compiler_sees_one_operation():
    q, k, v, _ = random_inputs(T=33, dtype=torch.bfloat16)
    torch.library.opcheck(attention, (q, k, v, None))
    torch.library.opcheck(attention, (q, k, v, document_mask(2, 33, (0, 9))))


def test_a_block_is_compiled_without_a_break_for_each_length():
    """Compiled and not, under autocast, with a mask and without it: the same numbers as with the plain kernel."""
    model = random_model(n_layers=1, max_seq_len=64)
    for T, positions in ((32, None), (48, None), (48, document_positions(random_tokens(2, 48), 3))):
        losses = []
        for kernel, compiled in ((model_module.attend, False), (attend, False), (attend, True)):
            torch._dynamo.reset()
            layer = model.layers[0]
            layer.attention.attend = kernel
            layer._compiled_call_impl = None
            if compiled:
                layer.compile(backend="aot_eager", dynamic=False, fullgraph=True)  # inductor takes a minute
            model.zero_grad()
            with autocast(torch.device("cpu"), torch.bfloat16):
                loss = model(random_tokens(2, T), random_tokens(2, T, seed=1), positions=positions)
            loss.backward()
            losses.append((loss.detach(), *(p.grad.clone() for p in model.parameters())))
        for result in losses[1:]:
            torch.testing.assert_close(result, losses[0], rtol=0.05, atol=0.01)


def test_torchs_kernel_stays_where_it_is_faster_and_for_a_mask_without_gradients(monkeypatch):
    calls = []
    monkeypatch.setattr(model_module, "attend", lambda q, k, v, mask: calls.append("torch") or q)
    monkeypatch.setattr(cpu_kernels, "attention", lambda q, k, v, mask: calls.append("pieces") or q)
    bf16, f32, mask = torch.bfloat16, torch.float32, torch.ones(1, 1, 2000, 2000, dtype=torch.bool)
    for has_avx512, dtype, T, each_mask, expected in [
        (True, bf16, 31, None, "torch"),
        (True, bf16, 32, None, "pieces"),
        (True, bf16, 2000, mask, "pieces"),
        (True, f32, 255, None, "torch"),
        (True, f32, 256, None, "pieces"),
        (True, f32, 256, mask, "pieces"),
        (True, f32, 2000, None, "torch"),
        (True, f32, 2000, mask, "pieces"),
        (False, f32, 256, None, "torch"),
        (False, f32, 1023, mask, "torch"),
        (False, f32, 1024, mask, "pieces"),
    ]:
        monkeypatch.setattr(cpu_kernels, "HAS_AVX512", has_avx512)
        q = torch.ones(1, 1, T, 2, dtype=dtype, requires_grad=True)
        attend(q, q, q, each_mask)
        assert calls == [expected], (dtype, T)
        calls.clear()
        with torch.no_grad():
            attend(q, q, q, each_mask)
        attend(q.detach(), q, q, each_mask)
        assert calls == 2 * ["torch" if each_mask is not None else expected], (dtype, T)
        calls.clear()
    with autocast(torch.device("cpu"), bf16):
        attend(torch.ones(1, 1, 32, 2, requires_grad=True), torch.ones(1, 1, 32, 2), torch.ones(1, 1, 32, 2), None)
    assert calls == ["pieces"]


def test_a_cache_is_filled_the_same_with_gradients_on():
    model, tokens = random_model(max_seq_len=300), random_tokens(2, 300)
    with torch.no_grad():
        expected = model(tokens)
    cache = KVCache(model.config, 2, 300, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(model(tokens, cache=cache), expected, rtol=1e-4, atol=1e-4)


def test_autocast_casts_as_it_does_for_torchs_kernel():
    q, k, v, grad = random_inputs(T=40)
    with autocast(torch.device("cpu"), torch.bfloat16):
        ours, torchs = (with_gradients(f, q, k, v, None, grad) for f in (attend, model_module.attend))
    assert [t.dtype for t in ours] == [t.dtype for t in torchs]
    torch.testing.assert_close(ours, torchs, rtol=0.05, atol=0.05)


def test_the_precision_of_other_float32_products_stays():
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        q, k, v, _ = random_inputs(T=40, dtype=torch.bfloat16)
        attention(q, k, v, None)
        with pytest.raises(RuntimeError):
            attention(q, k[..., :4], v, None)
        assert matmul.fp32_precision == "ieee"
    finally:
        matmul.fp32_precision = before
