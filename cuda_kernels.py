"""The same numbers as model.py's plain layers, with less memory on a GPU. Whoever runs a model on CUDA or mps calls
`install`.

Shape letters: B batch, T queries, S keys, H query heads, G key/value heads, K width of a head.
"""

import torch
from torch import Tensor, nn

import model


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`model.attend` of q (B, H, T, K) over k and v (B, G, S, K). Repeats k and v to H heads where that saves memory.

    CUDA's kernels that take a mask, or float32, need as many key/value heads as query heads. Otherwise torch falls back
    to a kernel that holds all T x S scores (pytorch 139586, transformers 48633). One query has few scores.
    """
    if q.shape[2] > 1 and (mask is not None or q.dtype == torch.float32):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    return model.attend(q, k, v, mask)


def install(transformer: nn.Module) -> None:
    """Let every attention layer of `transformer` use `attend` above."""
    for module in transformer.modules():
        if isinstance(module, model.Attention):
            module.attend = attend


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
