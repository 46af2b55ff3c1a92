"""cuda_kernels.py: the same numbers as the plain layers. All of it runs on the CPU.

torch refuses gradients of `flex_attention` on a CPU, though it can compute them. The fixture `flex` lets them pass.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from test_model import TINY, assert_close, random_model, random_tokens
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import cpu_kernels
import cuda_kernels
import model as model_module
import model_utils
from cuda_kernels import document_blocks, problem_with_blocks, use_document_blocks
from evaluation import eager_mode
from model import ModelConfig, Transformer, document_mask, document_positions
from model_utils import MixedPrecision, compile_blocks, place_model, wrap_model
from processes import Process
from train import ORIGINAL

BOS, LONG = 100, {"max_seq_len": 256, "dim": 64}  # two blocks of 128 tokens a row; heads of 16
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def flex(monkeypatch):
    """`flex_attention` with gradients on a CPU. Torch's tracers run, and the operations run one by one: no C++."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def documents(seed=0, rows=3, T=256):
    """Rows of documents. They end within blocks, at borders of blocks, and with the row. The first rows begin inside a
    document; the last row is one document."""
    tokens = random_tokens(rows, T, vocab_size=BOS, seed=seed)
    for row, begins in zip(tokens, ((5 + seed, 6 + seed, 200), (127, 128, T - 1)), strict=False):
        row[list(begins)] = BOS
    tokens[-1, 0] = BOS
    return tokens


def gpu_model(**changes):
    """A random model on the CPU with the kernels of a GPU."""
    model = random_model(**{**LONG, **changes})
    cuda_kernels.install(model)
    return model


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_for_cuda_has_the_numbers_of_the_plain_one(queries, masked):
    torch.manual_seed(0)
    q = torch.randn(2, 6, queries, 8)
    k, v = torch.randn(2, 2, 2, 7 if masked else queries, 8).unbind()
    mask = torch.rand(2, 1, queries, 7) > 0.3 if masked else None
    expected = model_module.attend(q, k, v, mask)
    torch.testing.assert_close(cuda_kernels.attend(q, k, v, mask), expected)


def test_attention_for_cuda_repeats_heads_where_the_kernels_need_it(monkeypatch):
    heads = []
    monkeypatch.setattr(model_module, "attend", lambda q, k, v, mask: heads.append(k.shape[1]) or q)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for dtype, each_mask in [(bf16, None), (bf16, mask), (fp32, None), (fp16, None)]:
        q, k = torch.ones(1, 6, 4, 8, dtype=dtype), torch.ones(1, 2, 4, 8, dtype=dtype)
        cuda_kernels.attend(q, k, k, each_mask)
    cuda_kernels.attend(torch.ones(1, 6, 1, 8), torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4, 8), mask[:, :, :1])
    assert heads == [2, 6, 6, 6, 2]
    model = random_model()
    cuda_kernels.install(model)
    assert all(layer.attention.attend is cuda_kernels.attend for layer in model.layers)


def test_cudnn_never_gets_a_mask(monkeypatch):
    seen = []

    def plain(q, k, v, mask):
        seen.append((torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()))
        if len(q) == 2:
            raise RuntimeError("out of memory")
        return q

    monkeypatch.setattr(model_module, "attend", plain)
    one, two = torch.ones(1, 2, 4, 8), torch.ones(2, 2, 4, 8)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    cuda_kernels.attend(one, one, one, mask)
    with pytest.raises(RuntimeError, match="out of memory"):
        cuda_kernels.attend(two, two, two, mask)
    cuda_kernels.attend(one, one, one, None)
    assert seen == [(False, True), (False, True), (True, True)]


def test_each_device_gets_its_own_kernels():
    model = Transformer(ModelConfig(**TINY))
    assert model.layers[0].attention.attend is model_module.attend
    assert place_model(model, CPU).layers[0].attention.attend is cpu_kernels.attend
    assert place_model(model, torch.device("meta")).layers[0].attention.attend is cuda_kernels.attend
    assert model.document_mask is model_module.document_mask  # until its blocks are compiled


# ---------------------------------------------------------------- documents in one row


def test_blocks_are_the_dense_mask_and_leave_out_what_joins_no_document():
    tokens = documents(rows=9, T=640)
    tokens[2:8][torch.rand(6, 640, generator=torch.Generator().manual_seed(0)) < 0.004] = BOS
    positions = document_positions(tokens, BOS)
    blocks, dense = document_blocks(positions), document_mask(positions)
    index = torch.arange(640)
    b, query, key = torch.arange(9)[:, None, None], index[:, None], index
    assert torch.equal(blocks.mask_mod(b, None, query, key), dense[:, 0])
    expected = create_block_mask(blocks.mask_mod, 9, None, 640, 640, device="cpu")
    for one, other in zip(blocks.as_tuple(), expected.as_tuple(), strict=True):
        assert one.equal(other) if isinstance(one, torch.Tensor) else callable(one) or one == other
    assert blocks.to_dense()[1, 0, :, 0].tolist() == [1, 0, 0, 0, 0]  # its next document begins with the second block
    assert blocks.full_kv_num_blocks[1].tolist() == [[0, 0, 1, 2, 0]]  # the last block holds its last document too


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(4, 4, 16), (6, 2, 48), (4, 1, 8)])
def test_attention_in_blocks_has_the_numbers_of_the_dense_mask(heads, key_heads, width):
    torch.manual_seed(0)
    positions = document_positions(documents(), BOS)
    q, (k, v) = torch.randn(3, heads, 256, width), torch.randn(2, 3, key_heads, 256, width)
    y = cuda_kernels.attend(q, k, v, document_blocks(positions))
    torch.testing.assert_close(y, model_module.attend(q, k, v, document_mask(positions)))


def test_only_training_on_whole_blocks_has_blocks():
    positions = document_positions(documents(), BOS)
    assert isinstance(document_blocks(positions), BlockMask)
    odd = document_blocks(positions[:, :200])
    assert torch.equal(odd, document_mask(positions[:, :200]))
    with torch.no_grad():
        assert torch.equal(document_blocks(positions), document_mask(positions))


def test_making_blocks_asks_the_device_for_no_number():
    """A tensor on the meta device has no numbers: whoever asks for one gets an error."""
    tokens = torch.zeros(2, 256, dtype=torch.int64, device="meta")
    assert document_blocks(document_positions(tokens, BOS)).kv_indices.shape == (2, 1, 2, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_blocks_has_the_loss_and_gradients_of_the_dense_mask(flex, dtype):
    tokens, targets = documents(), random_tokens(3, 256, seed=2)
    positions, losses, gradients = document_positions(tokens, BOS), [], []
    for in_blocks in (False, True):
        model = gpu_model()
        if in_blocks:
            compile_blocks(model)
            use_document_blocks(model, dtype, pytest.fail)
            assert model.document_mask is document_blocks
        loss = MixedPrecision(model, dtype, [])(tokens, targets, positions=positions)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # a dense mask in bfloat16 is as far from float32
    assert_close(losses[1], losses[0], tolerance)
    assert (gradients[1] - gradients[0]).norm() < tolerance * gradients[0].norm()


@pytest.mark.parametrize("kernels", ["none", "dense", "blocks"])
def test_five_updates_and_an_evaluation_compile_once_and_break_no_graph(flex, kernels):
    model = gpu_model()
    compile_blocks(model)
    if kernels == "blocks":
        model.document_mask = document_blocks
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    mixed, graphs = MixedPrecision(model, torch.bfloat16, [optimizer]), []
    for seed in range(5):
        for micro_step in range(2):
            tokens = documents(2 * seed + micro_step)
            positions = None if kernels == "none" else document_positions(tokens, BOS)
            mixed(tokens, tokens, positions=positions).backward()
        optimizer.step()
        optimizer.zero_grad()
        with eager_mode(CPU, torch.bfloat16):
            model(tokens[:2], tokens[:2], positions=None if positions is None else positions[:2])
            model.hidden(tokens[:, :77], mask=torch.ones(3, 1, 77, 77, dtype=torch.bool).tril())  # as HellaSwag does
        graphs.append(flex["stats"]["unique_graphs"])
    assert graphs == graphs[:1] * 5
    assert not flex["graph_break"]


# ---------------------------------------------------------------- where blocks do not work


def test_where_flex_attention_does_not_work_the_mask_stays_dense():
    model, said = gpu_model(), []
    use_document_blocks(model, torch.float32, said.append)  # no gradients on a CPU
    assert model.document_mask is document_mask
    assert said[0].startswith("flex_attention does not work here (Unsupported: ")
    assert "max_seq_len=64 is not a multiple of 128" in problem_with_blocks(random_model(), torch.float32)


def test_flex_attention_with_wrong_numbers_is_not_taken(flex, monkeypatch):
    model, before = gpu_model(), torch.get_rng_state()
    assert problem_with_blocks(model, torch.bfloat16) == ""
    assert torch.equal(torch.get_rng_state(), before)
    right = cuda_kernels.flex_attention
    for wrong in (1.05, float("nan")):
        torch._dynamo.reset()
        monkeypatch.setattr(cuda_kernels, "flex_attention", lambda *a, wrong=wrong, **k: right(*a, **k) * wrong)
        assert "its results are off by" in problem_with_blocks(model, torch.bfloat16)


@pytest.mark.parametrize(("device", "masks", "compiles"), [(CUDA, 1, 1), (CUDA, 0, 1), (CUDA, 1, 0), (CPU, 1, 1)])
def test_a_compiled_run_on_cuda_that_masks_documents_tries_blocks(monkeypatch, device, masks, compiles):
    calls = []
    monkeypatch.setattr(model_utils, "compile_blocks", lambda model: None)
    monkeypatch.setattr(cuda_kernels, "use_document_blocks", lambda model, dtype, say: calls.append(dtype))
    cfg = replace(ORIGINAL, dtype="bfloat16", compile=bool(compiles), document_mask=bool(masks))
    wrap_model(random_model(), [], cfg, Process(0, 1, device))
    assert calls == [torch.bfloat16] * (device == CUDA and masks and compiles)
