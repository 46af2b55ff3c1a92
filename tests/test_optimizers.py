"""optimizers.py: schedules worked out by hand, the parameter groups, and Muon compared with torch's Muon."""

import math
from dataclasses import replace

import pytest
import torch
from test_model_utils import TIED, TINY

from model import Transformer
from optimizers import Muon, build_optimizers, lr_factor, orthogonalise
from train import ORIGINAL


def factor(step: int, **changes) -> float:
    fields = {"schedule": "cosine", "warmup_steps": 10, "max_steps": 110, "min_lr_fraction": 0.1, "decay_fraction": 0.2}
    return lr_factor(step, replace(ORIGINAL, **(fields | changes)))


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, 0.1),  # the first step of warm-up already learns
        (9, 0.9),
        (10, 1.0),
        (35, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2),  # a quarter of the way: cos 45 degrees
        (60, 0.55),  # the middle
        (85, 0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2),
        (110, 0.1),
    ],
)
def test_cosine_schedule_equals_the_one_worked_out_by_hand(step, expected):
    assert factor(step) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("step", "expected"), [(1, 0.1), (10, 1.0), (50, 1.0), (80, 1.0), (90, 0.55), (99, 0.145), (100, 0.1)]
)
def test_wsd_schedule_equals_the_one_worked_out_by_hand(step, expected):
    assert factor(step, schedule="wsd", max_steps=100) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_schedule_works_without_warm_up_and_for_a_single_step(schedule):
    assert factor(1, schedule=schedule, warmup_steps=0, max_steps=1000) == pytest.approx(1, abs=1e-4)
    assert 0 < factor(1, schedule=schedule, warmup_steps=0, max_steps=1) <= 1
    assert factor(5, schedule=schedule, warmup_steps=10, max_steps=5) == 0.5  # a smoke run that ends in its warm-up


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_learning_rates_are_plain_floats(schedule):
    """Rates are saved with the optimizers. `weights_only` refuses to load a checkpoint with a NumPy number."""
    assert {type(factor(step, schedule=schedule)) for step in (1, 10, 60, 110)} == {float}


def groups_by_name(model: Transformer, **changes) -> list[tuple[str, set[str], dict]]:
    """(optimizer, names of the parameters, the group) for every group."""
    fields = {"optimizer": "adamw", "max_lr": 1e-3, "muon_lr": 0.02, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        (type(optimizer).__name__, {names[id(p)] for p in group["params"]}, group)
        for optimizer in build_optimizers(model, replace(ORIGINAL, **(fields | changes)))
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_in_exactly_one_group(config, optimizer):
    model = Transformer(config)
    groups = groups_by_name(model, optimizer=optimizer)
    listed = [id(parameter) for _, _, group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(id(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_acts_only_on_matrices(optimizer):
    model = Transformer(TINY)
    decayed = set()
    for _, names, group in groups_by_name(model, optimizer=optimizer):
        assert group["weight_decay"] in (0, 0.1)
        decayed |= names if group["weight_decay"] else set()
    assert decayed == {name for name, parameter in model.named_parameters() if parameter.dim() == 2}
    assert not [name for name in decayed if "norm" in name]


def test_muon_moves_exactly_the_matrices_of_the_blocks():
    model = Transformer(TINY)
    groups = groups_by_name(model, optimizer="muon")
    muon = set().union(*(names for kind, names, _ in groups if kind == "Muon"))
    matrices = ("attention.wq", "attention.wk", "attention.wv", "attention.wo")
    matrices += ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    assert muon == {f"layers.{i}.{name}.weight" for i in (0, 1) for name in matrices}
    assert {kind for kind, _, _ in groups_by_name(model, optimizer="adamw")} == {"AdamW"}


def test_each_group_knows_the_peak_of_its_own_learning_rate():
    for kind, _, group in groups_by_name(Transformer(TINY), optimizer="muon"):
        assert group["lr"] == group["initial_lr"] == (0.02 if kind == "Muon" else 1e-3)
        if kind == "AdamW":
            assert tuple(group["betas"]) == (0.9, 0.95)


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8), (1, 16, 16)])
def test_orthogonalise_keeps_singular_vectors_and_makes_singular_values_near_1(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape) * torch.tensor([1e-3, 1.0, 1e3])[: shape[0], None, None]
    result = orthogonalise(matrices)
    assert result.shape == matrices.shape
    U, _, V = torch.linalg.svd(matrices, full_matrices=False)
    sizes = U.mT @ result @ V.mT  # in the basis of the singular vectors: diagonal, and near 1
    assert (sizes - torch.diag_embed(sizes.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3
    spread = sizes.diagonal(dim1=1, dim2=2)[:, : min(shape[1:]) * 3 // 4]  # the smallest may need more steps
    assert spread.min() > 0.6 and spread.max() < 1.3


@pytest.mark.parametrize("largest_batch", [Muon.LARGEST_BATCH, 900, 1])
def test_muon_takes_the_same_steps_as_torchs_muon(monkeypatch, largest_batch):
    """torch's Muon rounds to bfloat16 on the way, so the results agree to three digits."""
    monkeypatch.setattr(Muon, "LARGEST_BATCH", largest_batch)
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in [(16, 24), (40, 16), (16, 24), (16, 24), (16, 16)]]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    settings = {"lr": 0.02, "weight_decay": 0.1}
    optimizers = Muon(ours, **settings), torch.optim.Muon(theirs, momentum=0.95, **settings)
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q, before in zip(ours, theirs, start, strict=True):
        assert (p - q).norm() < 0.01 * (q - before).norm()
