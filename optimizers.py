"""Which optimizer moves which parameter, and how fast at each step.

Parameters have four roles: the embedding, the output layer, the scales of the norms, and the matrices of the blocks.
RECIPES has what each optimizer does where the configuration says None. `docs/LOG.md` has the trials behind the numbers.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from command_line import shown
from config import Config
from model import Transformer

# ---------------------------------------------------------------- recipes

# The values of fields that are None. `warmup_fraction` is the share of the steps that warm up.
RECIPES: dict[str, dict[str, Any]] = {
    # That of GPT-3 Small (arXiv 2005.14165). It warmed up over 375 million tokens, which is 715 of our 19,073 steps.
    "adamw": {
        "max_lr": 6e-4,
        "betas": (0.9, 0.95),
        "weight_decay": 0.1,
        "schedule": "cosine",
        "warmup_fraction": 0.0375,
        "min_lr_fraction": 0.1,
        "decay_fraction": 0.2,  # with wsd
    },
    "muon": {
        "embedding_lr": 0.15,
        "output_lr": 0.02,  # at a width of WIDTH
        "norm_lr": 0.003,
        "muon_lr": 0.02,
        "betas": (0.8, 0.95),
        "weight_decay": 0.1,
        "schedule": "wsd",
        "warmup_fraction": 0.05,
        "min_lr_fraction": 0.0,
        "decay_fraction": 0.5,
    },
}
WIDTH = 256


def with_recipe(cfg: Config) -> Config:
    """`cfg` with a value for each field of the optimizer and the schedule that is None.

    Muon's steps have the same size in the spectral norm at every width (arXiv 2310.17813), so its rate is the same at
    every width. The logits are sums over `dim` products. AdamW moves each weight by about its rate, so the logits of a
    wider model move more. So the output layer's rate falls with the root of the width, as nanochat's does. (muP, arXiv
    2203.03466, has the width itself. The trials in docs/LOG.md cannot tell the two apart.)
    """
    values = dict(RECIPES[cfg.optimizer])
    warmup_fraction = values.pop("warmup_fraction")
    if "output_lr" in values:
        values["output_lr"] *= (WIDTH / cfg.model.dim) ** 0.5
        if cfg.model.tie_embeddings:  # what suits a look-up is too fast for an output layer
            values["embedding_lr"] = values.pop("output_lr")
    if cfg.max_lr is not None:  # build_optimizers takes it for each of these that is not given
        values |= dict.fromkeys(("embedding_lr", "output_lr", "norm_lr"))
    cfg = replace(cfg, **{name: value for name, value in values.items() if getattr(cfg, name) is None})
    if cfg.warmup_steps is None:
        room = 1 - cfg.decay_fraction if cfg.schedule == "wsd" else 1.0  # a warm-up ends before the decay begins
        cfg = replace(cfg, warmup_steps=round(min(warmup_fraction, room) * cfg.max_steps))
    return cfg


def misfits(cfg: Config) -> list[str]:
    """A sentence for every field that is given though nothing would use it: its name, its value, the cure."""
    schedule = cfg.schedule or RECIPES[cfg.optimizer]["schedule"]
    unused = {
        "muon_lr": cfg.optimizer == "adamw" and "optimizer=adamw has no Muon; give max_lr, or leave it out",
        "output_lr": cfg.model.tie_embeddings and "the output layer shares the embedding's weights; give embedding_lr",
        "decay_fraction": schedule == "cosine" and "schedule=cosine has none; pass --schedule wsd, or leave it out",
    }
    values = {name: (getattr(cfg, name), cure) for name, cure in unused.items() if cure}
    return [f"{name}={shown(value)}: {cure}" for name, (value, cure) in values.items() if value is not None]


# ---------------------------------------------------------------- Muon


def orthogonalise(matrices: Tensor) -> Tensor:
    """Replace the singular values of each of `matrices` (N, rows, columns) by values near 1.

    A matrix is U S V' in its singular value decomposition. The result is roughly U V', the nearest matrix with
    orthonormal rows or columns: its singular values lie between about 0.7 and 1.2 instead of all at 1. Five steps of a
    Newton-Schulz iteration find it. The coefficients of its quintic are those of Keller Jordan's Muon.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT  # so the products have the shorter side
    x = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrices else x.mT


class Muon(torch.optim.Optimizer):
    """Each matrix's step is its momentum, in Nesterov's manner, made orthogonal.

    Source: Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024). Without weight decay the
    steps are those of torch.optim.Muon, up to rounding. torch's goes matrix by matrix and always in bfloat16: on a CPU
    without bfloat16 it takes longer than the rest of an update. Here matrices of one shape share their products.

    Weight decay is cautious (arXiv 2510.12402): it shrinks only the numbers that the step makes smaller too. So it
    never works against the step.

    Args:
        dtype: of the products.
        ranks: this process's number, and how many there are. They all hold the same gradients. Each makes its share of
            the steps orthogonal and sends them to the others, so all take the same steps, to the last bit. Another
            number of processes may round a large matrix differently, because products of batches do.
    """

    LARGEST_BATCH = 2**26  # elements: bounds the memory that one process's copies of a large model's matrices take

    def __init__(
        self,
        params: Iterable[Tensor] | list[dict[str, Any]],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
        ranks: tuple[int, int] = (0, 1),
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype, self.ranks = dtype, ranks

    @torch.no_grad()
    def step(self) -> None:
        """One update of every matrix from its gradient.

        The attribute `found_inf`, a scalar 0 or 1 on the device, is 1 where a gradient is not finite. Then nothing
        changes, as with torch's fused optimizers.
        """
        is_left_out = getattr(self, "found_inf", torch.zeros((), device=self.param_groups[0]["params"][0].device))
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                lr = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                n = self.ranks[1] * max(1, self.LARGEST_BATCH // shape.numel())
                for chunk in (params[i : i + n] for i in range(0, len(params), n)):
                    for p, step in zip(chunk, self.steps_of(chunk, group["momentum"], is_left_out), strict=True):
                        if decay := group["lr"] * group["weight_decay"]:
                            p.sub_(decay * p * (p * step > 0))
                        p.add_(step, alpha=-lr)

    def steps_of(self, params: list[Tensor], momentum: float, is_left_out: Tensor) -> list[Tensor]:
        """The orthogonal steps of `params`, all of one shape; or zeros. This process computes those of its rank.

        Every process keeps all momenta, so any of them can write the checkpoint.
        """
        weight = (1 - momentum) * (1 - is_left_out)
        rank, world_size = self.ranks
        size = math.ceil(len(params) / world_size)  # of each share; zeros fill up the last one
        mine = torch.zeros(size, *params[0].shape, dtype=self.dtype, device=params[0].device)
        for place, p in enumerate(params):
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            grad = p.grad.where(is_left_out == 0, 0)  # NaN times 0 would be NaN
            buffer = self.state[p]["momentum_buffer"].lerp_(grad, weight)
            if place // size == rank:
                mine[place % size] = grad.lerp(buffer, momentum)  # the gradient that Nesterov's method expects next
        mine = orthogonalise(mine) * (1 - is_left_out)
        if world_size == 1:
            return list(mine)
        shares = [torch.empty(mine.shape, dtype=self.dtype, device=mine.device) for _ in range(world_size)]
        dist.all_gather(shares, mine.contiguous())
        return [matrix for share in shares for matrix in share][: len(params)]


# ---------------------------------------------------------------- groups


def build_optimizers(model: Transformer, cfg: Config, ranks: tuple[int, int] = (0, 1)) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters; or Muon for the matrices of the blocks, and AdamW for the rest.

    Each role has a group. A group has a `name`, and `initial_lr`, its learning rate where the schedule stands at 1.
    Weight decay acts on matrices alone, because a norm's scale has no reason to shrink; with Muon, on the blocks'
    matrices alone. All of Muon's steps have the same size in the spectral norm, so its rate is on another scale than
    AdamW's.

    Args:
        cfg: with a recipe.
        ranks: for `Muon`.
    """
    roles: dict[str, list[Tensor]] = {"embedding": [], "output": [], "norm": [], "matrix": []}
    for name, p in model.named_parameters():
        if p.dim() != 2:
            roles["norm"].append(p)
        elif name.startswith("tok_embeddings"):
            roles["embedding"].append(p)
        else:
            roles["output" if name.startswith("output") else "matrix"].append(p)
    rates = {"embedding": cfg.embedding_lr, "output": cfg.output_lr, "norm": cfg.norm_lr}
    matrices = roles.pop("matrix") if cfg.optimizer == "muon" else []
    groups = [
        {
            "name": role,
            "params": params,
            "lr": cfg.max_lr if rates.get(role) is None else rates[role],
            "weight_decay": 0.0 if role == "norm" or matrices else cfg.weight_decay,
        }
        for role, params in roles.items()
        if params  # the output layer has none of its own where embeddings are tied
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=cfg.betas, fused=True)]
    if matrices:
        group = {"name": "muon", "params": matrices}
        # Small gradients would be 0 in float16.
        dtype = torch.float32 if cfg.dtype == "float16" else getattr(torch, cfg.dtype)
        optimizers.append(Muon([group], cfg.muon_lr, cfg.weight_decay, dtype=dtype, ranks=ranks))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


# ---------------------------------------------------------------- schedules


def lr_factor(step: int, cfg: Config) -> float:
    """Share of the peak learning rates for update `step` (1 to max_steps).

    "cosine" (arXiv 1608.03983): linear warm-up, then half a cosine down to `min_lr_fraction` at the last step. "wsd"
    (arXiv 2404.06395): warm-up, stable at 1, then linear decay over the last `decay_fraction` of the steps. It would
    reach `min_lr_fraction` one step after the last: an update at a rate of 0 would be lost.
    """
    warm = min(1.0, step / max(1, cfg.warmup_steps))
    if cfg.schedule == "cosine":
        progress = max(0, step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        share = min(1.0, (cfg.max_steps + 1 - step) / (cfg.decay_fraction * cfg.max_steps + 1))
    return min(warm, cfg.min_lr_fraction + (1 - cfg.min_lr_fraction) * share)


def peak_of(cfg: Config) -> float:
    """The highest `lr_factor` of a run: below 1 where the warm-up outlasts the run, or overlaps with the decay."""
    steps = range(1, cfg.max_steps, max(1, cfg.max_steps // 1000))  # near enough
    return max(lr_factor(step, cfg) for step in (*steps, cfg.max_steps))


def momentum(step: int) -> float:
    """Muon's momentum for update `step`: it rises from 0.85 to 0.95 in 300 steps, as in modded-nanogpt.

    Early gradients soon point elsewhere, so a long memory of them would mislead.
    """
    return 0.85 + 0.10 * min(1.0, step / 300)


def set_schedules(optimizers: list[torch.optim.Optimizer], step: int, cfg: Config) -> dict[str, float]:
    """Set what update `step` needs in every group. Returns the learning rates by role, for the records.

    Weight decay needs no schedule: it is multiplied by the rate, and falls with it.
    """
    factor, rates = lr_factor(step, cfg), {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["initial_lr"]
            rates[group["name"]] = group["lr"]
            if "momentum" in group:
                group["momentum"] = momentum(step)
    return rates


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one. Run train.py.")
