"""Which optimizer moves which parameter, and how fast at each step."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from model import Transformer
from model_utils import fastest_dtype


def orthogonalise(matrices: Tensor) -> Tensor:
    """For each of `matrices` (N, rows, columns) roughly the nearest with orthonormal rows or columns: of its singular
    value decomposition U S V', U V' with singular values between about 0.7 and 1.2 instead of all 1.

    Five steps of a Newton-Schulz iteration, whose quintic's coefficients are those of Keller Jordan's Muon.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT  # the products' side is the shorter one
    x = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrices else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum of 0.95 in Nesterov's manner, made orthogonal, is each matrix's step: Keller Jordan, "Muon: An optimizer
    for hidden layers in neural networks" (2024).

    The steps are torch.optim.Muon's, up to rounding. That one goes matrix by matrix and in bfloat16, which takes a CPU
    without it longer than all the rest of an update; here matrices of one shape share their products, in the dtype
    that the device is fast in.
    """

    MOMENTUM = 0.95
    LARGEST_BATCH = 2**26  # elements: bounds the memory that a large model's copies take

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                lr = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                n = max(1, self.LARGEST_BATCH // shape.numel())
                for some in (params[i : i + n] for i in range(0, len(params), n)):
                    for p, step in zip(some, orthogonalise(self.momenta(some)), strict=True):
                        p.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-lr)

    def momenta(self, params: list[Tensor]) -> Tensor:
        """Take up the gradients of `params`, all of one shape; return their momenta, stacked."""
        stacked = torch.empty(
            len(params), *params[0].shape, dtype=fastest_dtype(params[0].device), device=params[0].device
        )
        for p, out in zip(params, stacked, strict=True):
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momentum = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - self.MOMENTUM)
            out.copy_(p.grad.lerp(momentum, self.MOMENTUM))
        return stacked


def build_optimizers(
    model: Transformer,
    *,
    optimizer: str,
    max_lr: float,
    muon_lr: float,
    weight_decay: float,
    betas: tuple[float, float],
) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the rest.

    Weight decay acts on matrices alone: a norm's scale has no reason to shrink. Each group carries `initial_lr`,
    its learning rate where the schedule stands at 1. Muon's steps all have one size in the spectral norm, so its rate
    is on another scale than AdamW's.
    """
    muon = [p for p in model.layers.parameters() if p.dim() == 2] if optimizer == "muon" else []
    rest = [p for p in model.parameters() if not any(p is q for q in muon)]
    groups = [
        {"params": [p for p in rest if p.dim() == 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.dim() != 2], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=max_lr, betas=betas, fused=True)]
    if muon:
        optimizers.append(Muon(muon, lr=muon_lr, weight_decay=weight_decay))
    for opt in optimizers:
        for group in opt.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def load_moments(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load a saved `state_dict()`, but keep this run's settings: a flag given when resuming must count."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)


def lr_factor(
    step: int, *, schedule: str, warmup_steps: int, max_steps: int, min_factor: float, decay_fraction: float
) -> float:
    """Share of the peak learning rate for update `step` (1 to max_steps).

    "cosine" (arXiv 1608.03983): linear warm-up, then half a cosine down to `min_factor` at the last step. "wsd"
    (arXiv 2404.06395): warm-up, stable at 1, then linear decay over the last `decay_fraction` of the steps.
    """
    if step < warmup_steps:
        return step / warmup_steps
    if schedule == "cosine":
        progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
        return min_factor + (1 - min_factor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    left = (max_steps - step) / max(1, decay_fraction * max_steps)
    return min_factor + (1 - min_factor) * min(1.0, left)
