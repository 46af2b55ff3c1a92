"""cpu_kernels.py: the same numbers as the plain layers."""

import pytest
import torch
import torch.nn.functional as F
from test_model import one_thread, random_model, random_tokens  # noqa: F401 (one_thread is autouse)

from cpu_kernels import FewRowsLinear
from model import ModelConfig, Transformer
from model_utils import place_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2,), (8,), (9,), (1, 1), (4, 1), (3, 3)])
def test_a_linear_layer_equals_torchs_for_few_rows_and_for_many(shape, dtype):
    torch.manual_seed(0)
    layer = FewRowsLinear(16, 24, bias=False).to(dtype)
    x = torch.randn(*shape, 16, dtype=dtype, requires_grad=True)
    results = []
    for y in (layer(x), F.linear(x, layer.weight)):
        gradients = torch.autograd.grad(y.square().sum(), (x, layer.weight))
        results.append((y, *gradients))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_placing_a_model_on_the_cpu_keeps_its_parameters_and_its_logits():
    model = Transformer(ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=101, multiple_of=16))
    parameters, tokens = dict(model.named_parameters()), random_tokens(1, 5)  # five rows count as few
    with torch.no_grad():
        logits = model(tokens)
        placed = place_model(model, torch.device("cpu"))
        torch.testing.assert_close(placed(tokens), logits, rtol=1e-5, atol=1e-6)
    assert {type(module) for module in placed.modules() if isinstance(module, torch.nn.Linear)} == {FewRowsLinear}
    assert all(p is parameters[name] for name, p in placed.named_parameters())
