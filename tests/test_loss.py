"""loss.py: the loss in slices compared with the plain loss and with torch's cross-entropy, also in bfloat16."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_model import assert_close, one_thread, random_model, random_tokens  # noqa: F401 (one_thread is autouse)

import loss as loss_module
from loss import IGNORED, OutputLoss, plain_loss, token_losses


@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (3, 7), (5, 33)])
def test_loss_is_the_mean_cross_entropy_of_the_logits(shape):
    model = random_model()
    tokens, targets = random_tokens(*shape), random_tokens(*shape, seed=2)
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    assert_close(model(tokens, targets), expected, 1e-5)


def test_loss_counts_only_targets_that_are_ids():
    model = random_model()
    tokens, targets = random_tokens(2, 20), random_tokens(2, 20, seed=2)
    targets[0, 3:] = -100
    log_probabilities = model(tokens).log_softmax(-1)
    counted = [(b, t) for b in range(2) for t in range(20) if targets[b, t] != -100]
    expected = -sum(log_probabilities[b, t, targets[b, t]] for b, t in counted) / len(counted)
    assert_close(model(tokens, targets), expected, 1e-5)


def test_gradients_of_a_scaled_loss_are_scaled():
    """Accumulation divides the loss. A loss that computes its own gradients must divide them too."""
    model = random_model()
    tokens, targets = random_tokens(2, 20), random_tokens(2, 20, seed=2)
    whole = torch.autograd.grad(model(tokens, targets), list(model.parameters()))
    quarter = torch.autograd.grad(model(tokens, targets) / 4, list(model.parameters()))
    for a, b in zip(whole, quarter, strict=True):
        torch.testing.assert_close(a / 4, b, rtol=1e-5, atol=1e-8)


def test_gradients_accumulate_over_backward_passes():
    model = random_model()
    tokens, targets = random_tokens(4, 20), random_tokens(4, 20, seed=2)
    model(tokens, targets).backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for rows in (slice(0, 2), slice(2, 4)):
        (model(tokens[rows], targets[rows]) / 2).backward()
    for gradient, parameter in zip(whole, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_loss_without_gradients_is_the_same(mode):
    model = random_model()
    tokens, targets = random_tokens(2, 20), random_tokens(2, 20, seed=2)
    with mode():
        loss = model(tokens, targets)
    assert not loss.requires_grad
    assert_close(loss, model(tokens, targets).detach(), 1e-6)


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("size", [1, 7, 32, 63, 64, 65])
def test_a_loss_in_slices_has_the_value_and_the_gradients_of_the_whole_loss(monkeypatch, size, tie_embeddings):
    """Some of the 64 tokens do not count. The last slice may be short. A slice may have no token that counts."""
    monkeypatch.setattr(loss_module, "SLICE", size)
    model = random_model(tie_embeddings=tie_embeddings)
    tokens, targets = random_tokens(2, 32), random_tokens(2, 32, seed=2)
    targets[0, :9] = targets[1, 20] = -100
    parameters = list(model.parameters())
    whole = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    expected = torch.autograd.grad(3 * whole, parameters)
    sliced = model(tokens, targets)
    torch.testing.assert_close(sliced, whole)
    for (name, _), a, b in zip(
        model.named_parameters(), torch.autograd.grad(3 * sliced, parameters), expected, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, targets), whole)


def test_slices_under_bf16_autocast_add_up_in_float32(monkeypatch):
    """There are 512 slices. A sum in bfloat16 loses each term that is smaller than a 256th of the sum."""
    monkeypatch.setattr(loss_module, "SLICE", 1)
    model = random_model()
    weight = model.output.weight
    x, targets = torch.randn(16, 32, model.config.dim), random_tokens(16, 32, seed=2)
    [exact] = torch.autograd.grad(F.cross_entropy(model.output(x).flatten(0, 1), targets.flatten()), weight)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(x, model.output.weight, targets)
    [rough] = torch.autograd.grad(loss, weight)
    assert (rough - exact).norm() < 0.01 * exact.norm()


def test_a_mean_of_many_tokens_has_a_gradient_in_float16():
    """A probability of 1/8192, over 4,096 tokens, is 0 in float16. The loss scale comes later, in the backward pass."""
    torch.manual_seed(0)
    x, weight = torch.randn(1, 4096, 16), (0.02 * torch.randn(8192, 16)).requires_grad_()
    targets = torch.randint(50, (1, 4096))
    [exact] = torch.autograd.grad(F.cross_entropy((x @ weight.T).flatten(0, 1), targets.flatten()), weight)
    with torch.autocast("cpu", torch.float16):
        loss = OutputLoss()(x, weight, targets)
    [rough] = torch.autograd.grad(loss, weight)
    never = slice(50, None)  # ids that are no target: their logits get small gradients alone
    assert (rough - exact)[never].norm() < 0.01 * exact[never].norm()


GIB = 2**30


@pytest.mark.parametrize(
    ("memory", "vocab_size", "rows"), [(80, 128_256, 4096), (16, 128_256, 1024), (80, 4096, 2**17), (2, 128_256, 1024)]
)
def test_slices_on_a_gpu_are_a_64th_of_its_memory_and_no_smaller_than_on_a_cpu(monkeypatch, memory, vocab_size, rows):
    properties = SimpleNamespace(total_memory=memory * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert loss_module.slice_size(torch.device("cuda", 0), 2 * vocab_size) == rows
    assert rows == loss_module.SLICE or rows * 2 * vocab_size <= memory * GIB / 64 < 4 * rows * vocab_size
    assert loss_module.slice_size(torch.device("cpu"), 2 * vocab_size) == loss_module.SLICE


def test_a_target_that_is_nearly_certain_keeps_its_gradient_in_bf16():
    """If p were rounded to bfloat16 before 1 is subtracted, the gradient would be 0 or far too large."""
    model = random_model()
    targets = random_tokens(1, 12)
    with torch.no_grad():
        model.output.weight.copy_(model.output.weight.bfloat16())
        x = (6 * F.normalize(model.output.weight[targets]) + 0.5).bfloat16().float().requires_grad_()
    logits = model.output(x)
    assert logits.softmax(-1).amax() > 0.99
    [exact] = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), targets.flatten()), x)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(x, model.output.weight, targets)
    [rough] = torch.autograd.grad(loss, x)
    assert ((rough - exact).norm(dim=-1) < 0.05 * exact.norm(dim=-1)).all()


def test_a_loss_goes_backward_only_once_and_says_so():
    model = random_model()
    tokens = random_tokens(1, 8)
    loss = model(tokens, tokens)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_loss_is_nan_if_no_target_counts():
    """torch's own cross-entropy does the same."""
    model = random_model()
    assert model(random_tokens(1, 8), torch.full((1, 8), -100)).isnan()


def test_loss_and_gradients_under_bf16_autocast_are_near_float32():
    model = random_model()
    tokens, targets = random_tokens(4, 32), random_tokens(4, 32, seed=2)
    loss = model(tokens, targets)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(tokens, targets)
    rough_gradients = torch.autograd.grad(rough, list(model.parameters()))
    assert rough.dtype == torch.float32
    assert abs(rough - loss) < 0.02 * loss
    for (name, _), a, b in zip(model.named_parameters(), gradients, rough_gradients, strict=True):
        assert b.dtype == torch.float32
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.98, name


# ---------------------------------------------------------------- the plain loss, and what it refuses


@pytest.mark.parametrize("size", [1, 7, 64])
def test_the_slices_compute_what_the_plain_loss_computes(monkeypatch, size):
    monkeypatch.setattr(loss_module, "SLICE", size)
    torch.manual_seed(0)
    x, weight = torch.randn(2, 16, 24, requires_grad=True), torch.randn(50, 24, requires_grad=True)
    targets = torch.randint(50, (2, 16))
    targets[0, 3:9] = IGNORED
    plain = plain_loss(x.flatten(0, 1), weight, targets.flatten())
    sliced = OutputLoss()(x, weight, targets)
    torch.testing.assert_close(sliced, plain)
    for a, b in zip(torch.autograd.grad(sliced, (x, weight)), torch.autograd.grad(plain, (x, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    losses = token_losses(x.flatten(0, 1), weight, targets.flatten())
    torch.testing.assert_close(losses.sum() / (targets != IGNORED).sum(), plain)
    assert (losses[3:9] == 0).all()


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("target", [-1, -99, -101, 101, 10**6])
def test_a_target_that_is_no_id_is_refused_with_gradients_and_without(target, with_gradients):
    """Only -100 is left out. In an earlier version other negative targets counted as id 0 if gradients were on."""
    model, targets = random_model(), random_tokens(2, 8, seed=2)
    targets[1, 3] = target
    with torch.set_grad_enabled(with_gradients), pytest.raises(IndexError, match=rf"0 to 100, or -100.*found {target}"):
        model(random_tokens(2, 8), targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [1, 7, 50, 64])
def test_losses_do_not_depend_on_the_blocks_of_the_vocabulary(monkeypatch, block, dtype):
    """Logits of 100 are far apart, and e^100 is more than float32 holds."""
    monkeypatch.setattr(loss_module, "SLICE", 5)
    monkeypatch.setattr(loss_module, "BLOCK", block)
    torch.manual_seed(0)
    x, weight = 20 * torch.randn(16, 24, dtype=dtype), torch.randn(50, 24)
    targets = torch.randint(50, (16, 3))  # several ids for each token
    targets[2] = targets[3:9, 1] = IGNORED
    targets[0], targets[1] = torch.tensor([0, 49, IGNORED]), torch.tensor([6, 7, 8])
    log_p = (x @ weight.to(dtype).T).double().log_softmax(-1)
    assert log_p.min() < -200
    expected = -log_p.gather(1, targets.clamp(min=0)) * (targets != IGNORED)
    losses = token_losses(x, weight, targets)
    assert losses.dtype == torch.float32
    # bfloat16 logits may differ by a rounding, because another block takes another kernel
    tolerance = {"rtol": 1e-6, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.01, "atol": 1}
    torch.testing.assert_close(losses.double(), expected, **tolerance)
    torch.testing.assert_close(token_losses(x, weight, targets[:, 0]).double(), expected[:, 0], **tolerance)


def test_no_tokens_have_no_losses():
    for shape in ((0,), (0, 3)):
        assert token_losses(torch.zeros(0, 8), torch.zeros(16, 8), torch.zeros(shape, dtype=torch.int64)).shape == shape


@pytest.mark.usefixtures("compiler")
def test_the_compiled_kernel_needs_no_second_buffer_of_logits():
    logits, targets, shares = torch.randn(64, 2048), torch.randint(2048, (64,)), torch.rand(64)  # any factors
    kernel = torch.compile(loss_module.losses_and_gradient, dynamic=False)
    kernel(logits.clone(), targets, shares)  # compiles
    expected = logits.softmax(-1) * shares[:, None], F.cross_entropy(logits, targets, reduction="none")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        losses = kernel(logits, targets, shares)
    torch.testing.assert_close((logits, losses), expected)
    sizes = [event.cpu_memory_usage for event in profile.events()]
    assert 0 < max(sizes) < logits.nbytes / 4
