"""The same numbers as model.py's plain layers, faster on a CPU. Whoever runs a model on a CPU calls `install`.

Shape letters: R rows of a matrix product, D its input width, F its output width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class FewRowsLinear(nn.Linear):
    """x @ W.T without a bias, where x (R, D) has few rows, as in a step of generation.

    Such a product takes as long as reading W (F, D) takes. For x @ W.T only one core reads. For W @ x.T the cores split
    W, but only if x has at least two rows. So a single row is taken twice.
    """

    MOST_ROWS = 8

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        if not 0 < rows <= self.MOST_ROWS or x.dtype != torch.float32:  # bf16 has a kernel of its own
            return functional.linear(x, self.weight)
        few = x.reshape(rows, -1) if rows > 1 else x.reshape(1, -1).expand(2, -1)
        return (self.weight @ few.T).T[:rows].reshape(*x.shape[:-1], -1)


def install(model: nn.Module) -> None:
    """Give the plain linear layers of `model` the forward pass above. Their parameters stay the same objects.

    Do not move the model to a GPU afterwards: there this forward pass is slower.
    """
    for module in model.modules():
        if type(module) is nn.Linear and module.bias is None:
            module.__class__ = FewRowsLinear


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
