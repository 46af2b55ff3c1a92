"""optimizers.py: schedules worked out by hand, the parameter groups, and Muon compared with torch's Muon."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from test_model_utils import TIED, TINY

from config import Config
from model import Transformer
from optimizers import (
    RECIPES,
    Muon,
    build_optimizers,
    lr_factor,
    misfits,
    momentum,
    orthogonalise,
    peak_of,
    set_schedules,
    with_recipe,
)
from train import ORIGINAL


def schedule(**changes) -> Config:
    fields = {"schedule": "cosine", "warmup_steps": 10, "max_steps": 110, "min_lr_fraction": 0.1, "decay_fraction": 0.2}
    return replace(ORIGINAL, **(fields | changes))


def factor(step: int, **changes) -> float:
    return lr_factor(step, schedule(**changes))


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
    ("step", "expected"),
    [
        (1, 0.1),
        (10, 1.0),
        (50, 1.0),
        (80, 1.0),
        (90, 0.1 + 0.9 * 11 / 21),
        (99, 0.1 + 0.9 * 2 / 21),
        (100, 0.1 + 0.9 / 21),
    ],
)
def test_wsd_schedule_equals_the_one_worked_out_by_hand(step, expected):
    assert factor(step, schedule="wsd", max_steps=100) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_schedule_works_without_warm_up_and_for_a_single_step(schedule):
    assert factor(1, schedule=schedule, warmup_steps=0, max_steps=1000) == pytest.approx(1, abs=1e-4)
    assert 0 < factor(1, schedule=schedule, warmup_steps=0, max_steps=1) <= 1
    assert factor(1, schedule="wsd", warmup_steps=0, max_steps=1, min_lr_fraction=0.0, decay_fraction=0.6) == 0.625
    assert factor(5, schedule="cosine", warmup_steps=10, max_steps=5) == 0.5  # a smoke run that ends in its warm-up


def test_rate_does_not_jump_where_warm_up_and_decay_overlap():
    rates = [factor(s, schedule="wsd", warmup_steps=500, max_steps=700, decay_fraction=1.0) for s in range(1, 701)]
    assert max(abs(b - a) for a, b in pairwise(rates)) < 0.01
    assert max(rates) == pytest.approx(0.608, abs=0.001)  # s / 500 = 0.1 + 0.9 (700 - s) / 700 at s = 304


@pytest.mark.parametrize(
    ("changes", "peak"),
    [
        ({}, 1.0),
        ({"schedule": "wsd", "max_steps": 100}, 1.0),
        ({"warmup_steps": 220}, 0.5),  # the run ends in the middle of its warm-up
        ({"schedule": "wsd", "warmup_steps": 100, "max_steps": 100, "decay_fraction": 1.0, "min_lr_fraction": 0}, 0.5),
        ({"max_steps": 1_000_000, "warmup_steps": 2_000_000}, 0.5),
    ],
)
def test_peak_of_a_schedule_equals_the_one_worked_out_by_hand(changes, peak):
    assert peak_of(schedule(**changes)) == pytest.approx(peak, abs=0.002)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_learning_rates_are_plain_floats(schedule):
    """Rates are saved with the optimizers. `weights_only` refuses to load a checkpoint with a NumPy number."""
    assert {type(factor(step, schedule=schedule)) for step in (1, 10, 60, 110)} == {float}


# ---------------------------------------------------------------- recipes


def recipe(**changes) -> Config:
    return with_recipe(replace(ORIGINAL, dtype="float32", **changes))


def test_adamw_alone_restores_the_recipe_of_gpt_3_small():
    cfg = recipe(optimizer="adamw")
    groups = [group for optimizer in build_optimizers(Transformer(TINY), cfg) for group in optimizer.param_groups]
    assert len(groups) == 4 and {group["lr"] for group in groups} == {6e-4} and cfg.muon_lr is None
    assert (cfg.betas, cfg.weight_decay, cfg.grad_clip) == ((0.9, 0.95), 0.1, 1.0)
    assert (cfg.schedule, cfg.warmup_steps, cfg.max_steps, cfg.min_lr_fraction) == ("cosine", 715, 19_073, 0.1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_recipe_leaves_no_field_open_and_keeps_what_is_given(optimizer):
    names = [*(name for name in RECIPES[optimizer] if name != "warmup_fraction"), "warmup_steps"]
    assert all(getattr(ORIGINAL, name) is None for name in names)
    assert None not in [getattr(recipe(optimizer=optimizer), name) for name in names]
    given = dict.fromkeys(names, 0.25) | {"betas": (0.1, 0.2), "schedule": "cosine", "warmup_steps": 0}
    cfg = recipe(optimizer=optimizer, **given)
    assert {name: getattr(cfg, name) for name in given} == given


def test_warm_up_follows_the_length_of_the_run_and_ends_before_the_decay_begins():
    for optimizer in RECIPES:
        share = RECIPES[optimizer]["warmup_fraction"]
        assert recipe(optimizer=optimizer, max_steps=1000).warmup_steps == round(1000 * share) > 0
        assert recipe(optimizer=optimizer, max_steps=6).warmup_steps <= 1
        assert recipe(optimizer=optimizer, max_steps=1000, warmup_steps=300).warmup_steps == 300
        for max_steps in (20, 100, 19_073):
            assert peak_of(recipe(optimizer=optimizer, max_steps=max_steps)) > 0.99
    assert recipe(optimizer="muon", max_steps=1000, decay_fraction=1.0).warmup_steps == 0
    assert recipe(optimizer="muon", max_steps=1000, decay_fraction=0.99).warmup_steps == 10


def test_single_rate_of_adamw_moves_all_that_has_no_rate_of_its_own():
    cfg = recipe(optimizer="muon", max_lr=0.25, norm_lr=0.5)
    groups = [group for optimizer in build_optimizers(Transformer(TINY), cfg) for group in optimizer.param_groups]
    rates = {"embedding": 0.25, "output": 0.25, "norm": 0.5, "muon": recipe(optimizer="muon").muon_lr}
    assert {group["name"]: group["lr"] for group in groups} == rates


def test_rates_follow_the_width():
    narrow, wide = (recipe(optimizer="muon", model=replace(ORIGINAL.model, dim=dim)) for dim in (192, 768))
    assert narrow.output_lr == pytest.approx(2 * wide.output_lr)
    assert (narrow.embedding_lr, narrow.norm_lr, narrow.muon_lr) == (wide.embedding_lr, wide.norm_lr, wide.muon_lr)


# ---------------------------------------------------------------- groups

RATES = {"embedding_lr": 0.3, "output_lr": 0.02, "norm_lr": 0.01, "muon_lr": 0.04, "max_lr": 1e-3, "weight_decay": 0.1}


def groups_by_name(model: Transformer, **changes) -> list[tuple[str, set[str], dict]]:
    """(optimizer, names of the parameters, the group) for every group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    fields = {"optimizer": "muon", "betas": (0.9, 0.95)} | RATES | changes
    return [
        (type(optimizer).__name__, {names[id(p)] for p in group["params"]}, group)
        for optimizer in build_optimizers(model, recipe(**fields))
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
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() == 2}
    assert decayed == (matrices if optimizer == "adamw" else MATRICES) and not [n for n in decayed if "norm" in n]


MATRICES = ("attention.wq", "attention.wk", "attention.wv", "attention.wo")
MATRICES += ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
MATRICES = {f"layers.{i}.{name}.weight" for i in (0, 1) for name in MATRICES}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_role_has_a_group_of_its_own_that_knows_the_peak_of_its_rate(optimizer):
    found = {
        group["name"]: (kind, names, group)
        for kind, names, group in groups_by_name(Transformer(TINY), optimizer=optimizer)
    }
    of_matrices = "muon" if optimizer == "muon" else "matrix"
    assert {name: names for name, (_, names, _) in found.items() if name != "norm"} == {
        "embedding": {"tok_embeddings.weight"},
        "output": {"output.weight"},
        of_matrices: MATRICES,
    }
    assert found["norm"][1] == {name for name, p in Transformer(TINY).named_parameters() if p.dim() == 1}
    rates = {"embedding": 0.3, "output": 0.02, "norm": 0.01, "muon": 0.04, "matrix": 1e-3}
    for name, (kind, _, group) in found.items():
        assert kind == ("Muon" if name == "muon" else "AdamW")
        assert group["lr"] == group["initial_lr"] == rates[name]
        assert kind == "Muon" or tuple(group["betas"]) == (0.9, 0.95)


def test_tied_embeddings_have_one_group_and_the_output_layers_rate():
    groups = {group["name"]: names for _, names, group in groups_by_name(Transformer(TIED), output_lr=None)}
    assert groups["embedding"] == {"tok_embeddings.weight"} and "output" not in groups
    tied, untied = (recipe(optimizer="muon", model=config) for config in (TIED, replace(TIED, tie_embeddings=False)))
    assert (tied.embedding_lr, tied.output_lr) == (untied.output_lr, None)
    assert untied.embedding_lr == RECIPES["muon"]["embedding_lr"]


def test_momentum_rises_for_300_steps():
    assert [momentum(step) for step in (1, 150, 300, 5000)] == pytest.approx([0.85 + 0.1 / 300, 0.9, 0.95, 0.95])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"optimizer": "adamw", "muon_lr": 0.1}, "muon_lr=0.1: optimizer=adamw has no Muon; "),
        ({"optimizer": "muon", "output_lr": 0.1, "model": TIED}, "output_lr=0.1: the output layer shares "),
        ({"optimizer": "adamw", "decay_fraction": 0.1}, "decay_fraction=0.1: schedule=cosine has none; "),
        ({"optimizer": "muon", "schedule": "cosine", "decay_fraction": 0.1}, "decay_fraction=0.1: schedule=cosine"),
    ],
)
def test_what_nothing_would_use_is_refused(fields, sentence):
    [found] = misfits(replace(ORIGINAL, **fields))
    assert found.startswith(sentence)
    for name in ("muon_lr", "output_lr", "decay_fraction"):
        fields = fields | {name: None}
    assert misfits(replace(ORIGINAL, **fields)) == []


def test_schedules_set_every_group_and_return_the_rates():
    cfg = recipe(optimizer="muon", max_steps=100, schedule="wsd", warmup_steps=0, decay_fraction=0.5, **RATES)
    cfg = replace(cfg, min_lr_fraction=0.0)
    optimizers = build_optimizers(Transformer(TINY), cfg)
    rates = set_schedules(optimizers, 75, cfg)
    peaks = {"embedding": 0.3, "output": 0.02, "norm": 0.01, "muon": 0.04}
    assert rates == pytest.approx({name: peak * 26 / 51 for name, peak in peaks.items()})
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            assert group["lr"] == rates[group["name"]]
            assert group.get("momentum", momentum(75)) == momentum(75)


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
    """torch's Muon rounds to bfloat16 on the way, so the results agree to two digits."""
    monkeypatch.setattr(Muon, "LARGEST_BATCH", largest_batch)
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in [(16, 24), (40, 16), (16, 24), (16, 24), (16, 16)]]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    settings = {"lr": 0.02, "weight_decay": 0.0}
    optimizers = Muon(ours, **settings), torch.optim.Muon(theirs, momentum=0.95, **settings)
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q, before in zip(ours, theirs, start, strict=True):
        assert (p - q).norm() < 0.02 * (q - before).norm()


def test_weight_decay_shrinks_only_what_the_step_makes_smaller():
    torch.manual_seed(0)
    p, q = (torch.nn.Parameter(torch.ones(8, 8)) for _ in range(2))
    p.grad = q.grad = torch.randn(8, 8)
    Muon([p], lr=0.5, weight_decay=0.0).step()
    Muon([q], lr=0.5, weight_decay=0.1).step()
    falls = p < 1
    assert 0 < falls.sum() < falls.numel()
    torch.testing.assert_close(q, torch.where(falls, p - 0.5 * 0.1, p).detach())


SHAPES = [(16, 24), (40, 16), (16, 24), (16, 24), (16, 16), (24, 16)]  # shares of 2 and 1; and of 1 and none


def matrices_after_updates(rank: int, world_size: int, folder: str) -> dict[torch.dtype, list[torch.Tensor]]:
    """Four updates by Muon, in two dtypes, as one of `world_size` processes. Their result is in `folder` too."""
    if world_size > 1:
        torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
        optimizer = Muon(params, lr=0.02, weight_decay=0.1, dtype=dtype, ranks=(rank, world_size))
        for _ in range(4):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        results[dtype] = [p.detach() for p in params]
    torch.save(results, f"{folder}/{rank}.pt")
    return results


def test_processes_that_share_muons_work_take_the_same_steps_to_the_last_bit(tmp_path):
    alone = matrices_after_updates(0, 1, str(tmp_path))
    torch.multiprocessing.spawn(matrices_after_updates, (2, str(tmp_path)), nprocs=2)
    for rank in (0, 1):
        shared = torch.load(tmp_path / f"{rank}.pt")
        for dtype, matrices in alone.items():
            assert all(map(torch.equal, matrices, shared[dtype]))


def test_muons_products_have_the_dtype_that_it_is_given(monkeypatch):
    seen = []
    monkeypatch.setattr("optimizers.orthogonalise", lambda x: seen.append(x.dtype) or orthogonalise(x))
    for dtype in ("float32", "bfloat16"):
        model = Transformer(TINY)
        muon = build_optimizers(model, with_recipe(replace(ORIGINAL, optimizer="muon", dtype=dtype)))[1]
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        muon.step()
    assert set(seen[: len(seen) // 2]) == {torch.float32} and set(seen[len(seen) // 2 :]) == {torch.bfloat16}
