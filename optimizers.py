"""Which optimizer moves which parameter, and how fast at each step."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from config import Config
from hardware import fastest_dtype
from model import Transformer


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
    """Each matrix's step is its momentum, made orthogonal. The momentum is 0.95, in Nesterov's manner.

    Source: Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024). The steps are those of
    torch.optim.Muon, up to rounding. torch's goes matrix by matrix and in bfloat16: on a CPU without bfloat16 it takes
    longer than the rest of an update. Here matrices of one shape share their products, in the dtype that the device
    multiplies fastest.
    """

    MOMENTUM = 0.95
    LARGEST_BATCH = 2**26  # elements: bounds the memory that the copies of a large model's matrices take

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """One update of every matrix from its gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                lr = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                n = max(1, self.LARGEST_BATCH // shape.numel())
                for chunk in (params[i : i + n] for i in range(0, len(params), n)):
                    for p, step in zip(chunk, orthogonalise(self.momenta(chunk)), strict=True):
                        p.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-lr)

    def momenta(self, params: list[Tensor]) -> Tensor:
        """Add the gradients of `params`, all of one shape, to their momenta. Return what the step takes, stacked."""
        device = params[0].device
        stacked = torch.empty(len(params), *params[0].shape, dtype=fastest_dtype(device), device=device)
        for p, out in zip(params, stacked, strict=True):
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momentum = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - self.MOMENTUM)
            out.copy_(p.grad.lerp(momentum, self.MOMENTUM))
        return stacked


def build_optimizers(model: Transformer, cfg: Config) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters; or Muon for the matrices of the blocks, and AdamW for the rest.

    Weight decay acts on matrices alone: a norm's scale has no reason to shrink. Each group carries `initial_lr`, its
    learning rate where the schedule stands at 1. All of Muon's steps have the same size in the spectral norm, so its
    rate is on another scale than AdamW's.
    """
    muon = [p for p in model.layers.parameters() if p.dim() == 2] if cfg.optimizer == "muon" else []
    rest = [p for p in model.parameters() if not any(p is q for q in muon)]
    groups = [
        {"params": [p for p in rest if p.dim() == 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in rest if p.dim() != 2], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=cfg.max_lr, betas=cfg.betas, fused=True)]
    if muon:
        optimizers.append(Muon(muon, lr=cfg.muon_lr, weight_decay=cfg.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def lr_factor(step: int, cfg: Config) -> float:
    """Share of the peak learning rate for update `step` (1 to max_steps).

    "cosine" (arXiv 1608.03983): linear warm-up, then half a cosine down to `min_lr_fraction` at the last step. "wsd"
    (arXiv 2404.06395): warm-up, stable at 1, then linear decay over the last `decay_fraction` of the steps.
    """
    if step < cfg.warmup_steps:
        return step / cfg.warmup_steps
    if cfg.schedule == "cosine":
        progress = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        share = min(1.0, (cfg.max_steps - step) / max(1, cfg.decay_fraction * cfg.max_steps))
    return cfg.min_lr_fraction + (1 - cfg.min_lr_fraction) * share


def set_learning_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set the learning rate of every group to `factor` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["initial_lr"]


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one. Run train.py.")
