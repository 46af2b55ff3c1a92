"""Which optimizer moves which parameter, and how fast at each step."""

import math

import torch

from model import Transformer


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
    its learning rate where the schedule stands at 1. Muon: Keller Jordan, "Muon: An optimizer for hidden layers in
    neural networks" (2024); it takes its step in the spectral norm, so its rate is on another scale than AdamW's.
    """
    muon = [p for p in model.layers.parameters() if p.dim() == 2] if optimizer == "muon" else []
    rest = [p for p in model.parameters() if not any(p is q for q in muon)]
    groups = [
        {"params": [p for p in rest if p.dim() == 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.dim() != 2], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=max_lr, betas=betas, fused=True)]
    if muon:
        optimizers.append(torch.optim.Muon(muon, lr=muon_lr, weight_decay=weight_decay, momentum=0.95))
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
