"""cuda_kernels.py: the same numbers as the plain layers. All of it runs on the CPU."""

import pytest
import torch
from test_model import TINY, random_model

import cpu_kernels
import cuda_kernels
import model as model_module
from model import ModelConfig, Transformer
from model_utils import place_model


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
    for queries, dtype, each_mask in [(4, torch.bfloat16, None), (4, torch.bfloat16, mask), (4, torch.float32, None)]:
        q, k = torch.ones(1, 6, queries, 8, dtype=dtype), torch.ones(1, 2, 4, 8, dtype=dtype)
        cuda_kernels.attend(q, k, k, each_mask)
    cuda_kernels.attend(torch.ones(1, 6, 1, 8), torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4, 8), mask[:, :, :1])
    assert heads == [2, 6, 6, 2]
    model = random_model()
    cuda_kernels.install(model)
    assert all(layer.attention.attend is cuda_kernels.attend for layer in model.layers)


def test_each_device_gets_its_own_kernels():
    model = Transformer(ModelConfig(**TINY))
    assert model.layers[0].attention.attend is model_module.attend
    assert place_model(model, torch.device("cpu")).layers[0].attention.attend is cpu_kernels.attend
    assert place_model(model, torch.device("meta")).layers[0].attention.attend is cuda_kernels.attend
