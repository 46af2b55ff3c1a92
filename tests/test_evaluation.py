"""evaluation.py: the state in which a run is evaluated. test_train.py looks at the rows of whole runs."""

from dataclasses import replace

import pytest
import torch

from evaluation import draw_samples, eager_mode
from model import ModelConfig, Transformer
from processes import Process
from tokenizer import Tokenizer
from train import SAMPLE

CPU = torch.device("cpu")
TINY = ModelConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=512, multiple_of=32, max_seq_len=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluations_multiply_in_the_dtype_without_gradients(dtype):
    weight = torch.ones(4, 4, requires_grad=True)
    with eager_mode(CPU, dtype):
        product = weight @ weight
    assert product.dtype == dtype and not product.requires_grad
    assert (weight @ weight).requires_grad and not torch.is_autocast_enabled("cpu")


def test_evaluations_do_not_run_compiled_code():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    function = torch.compile(lambda x: x + 1, backend=backend)
    with eager_mode(CPU, torch.float32):
        function(torch.ones(3))
    assert not compiled
    function(torch.ones(3))
    assert len(compiled) == 1


def test_the_step_decides_which_samples_are_drawn():
    torch.manual_seed(0)
    cfg = replace(SAMPLE, prompts=("abc", "the "), generate_tokens=8, temperature=1.0, model=TINY)
    model, tokenizer = Transformer(TINY).eval(), Tokenizer(vocab_size=512)
    rows = [draw_samples(model, tokenizer, cfg, Process(0, 1, CPU), step)[0] for step in (5, 5, 6)]
    assert rows[0] == rows[1] != rows[2]
    assert [text[:3] for text in rows[0]["samples"]] == ["abc", "the"]
