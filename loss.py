"""The output layer and the cross-entropy loss in one, from hidden states to a number.

`plain_loss` is what everything here computes. At 128,256 ids its logits, and their gradient, would take more memory
than the rest of a training step. So `OutputLoss` computes the same a slice of the tokens at a time.

Shape letters: B batch, T tokens of a sequence, N = B T tokens of one call, C tokens of a slice, D model width,
V vocabulary.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # a target that does not count, as in torch.nn.functional.cross_entropy
SLICE = 1024  # C on a CPU: enough tokens for a matrix product at full speed; the least on a GPU, see `slice_size`
BLOCK = 1024  # ids whose logits a CPU computes at once without gradients: 1,024 x 1,024 logits are 4 MiB in float32


def plain_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, in nats: the negative logarithm of the probability that the model gives to the true next id.

    x (N, D), weight (V, D), targets (N,) -> scalar. Targets of IGNORED do not count.
    """
    logits = F.linear(x, weight).float()  # (N, V)
    log_p = logits.log_softmax(-1)
    counted = targets != IGNORED
    losses = -log_p.gather(1, targets.where(counted, 0)[:, None])[:, 0]  # (N,)
    return losses[counted].mean()


# ---------------------------------------------------------------- the same in slices


class OutputLoss(nn.Module):
    """`plain_loss` in slices. It has no parameters: the output layer's weight is the model's."""

    def __init__(self):
        super().__init__()
        self.kernel = losses_and_gradient  # model_utils.py puts the compiled function in its place

    def forward(self, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of hidden states x (B, T, D) against targets (B, T). Raises what `check_targets` raises.

        Unless gradients are off, the forward pass computes them too: evaluate under `torch.no_grad`.
        """
        x, targets = x.flatten(0, 1), targets.flatten()
        if torch.is_grad_enabled():
            return SlicedLoss.apply(x, weight, targets, self.kernel)
        return token_losses(x, weight, targets).sum() / (targets != IGNORED).sum()


class SlicedLoss(torch.autograd.Function):
    """Computes the gradients of a slice while its logits are there, in the forward pass. So nothing is computed twice.

    Source: Liger Kernel, arXiv 2410.10989, section 3.2.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, kernel) -> Tensor:
        """x (N, D), weight (V, D), targets (N,) -> scalar loss. Slices are added up in float32."""
        check_targets(targets, len(weight))
        counted = (targets != IGNORED).float()  # 1 or 0
        targets = targets.where(targets != IGNORED, 0)
        x_cast, weight_cast = x.to(product_dtype(x)), weight.to(product_dtype(x))
        x_grad, weight_grad = torch.empty_like(x_cast), torch.empty_like(weight, dtype=torch.float32)
        total = torch.zeros((), device=x.device)
        for chunk, logits in logit_slices(x_cast, weight_cast):
            losses = kernel(logits, targets[chunk], counted[chunk])
            total += (losses * counted[chunk]).sum()
            # The gradient is the softmax, less 1 at the target. Compute p - 1 with expm1: in bfloat16 a p near 1 rounds
            # to 1, and p - 1 would be 0.
            at_target = torch.expm1(-losses) * counted[chunk]
            logits_grad = logits.scatter_(1, targets[chunk, None], at_target[:, None].to(logits.dtype))
            torch.mm(logits_grad, weight_cast, out=x_grad[chunk])
            add_product(weight_grad, logits_grad.T, x_cast[chunk], is_first=chunk.start == 0)
        # They are those of the sum. `backward` divides: before, the parts of a mean would be too small for float16.
        ctx.gradients = x_grad.to(x.dtype), weight_grad.to(weight.dtype), counted.sum()
        return total / counted.sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the mean, times `grad`. They are handed on without a copy, so only once."""
        if ctx.gradients is None:
            raise RuntimeError("this loss goes backward only once, because it hands its gradients on without a copy")
        x_grad, weight_grad, count = ctx.gradients
        ctx.gradients = None
        return x_grad.mul_(grad / count), weight_grad.mul_(grad / count), None, None


@torch.no_grad()
def token_losses(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropies in nats, in float32, of hidden states x (N, D) against targets (N,), or (N, K) for K ids each.

    They have the shape of `targets`, and are 0 where IGNORED. On a CPU the logits are computed a block of the
    vocabulary at a time, so that they stay in the caches.
    """
    check_targets(targets, len(weight))
    x = x.to(product_dtype(x))
    ids = targets if targets.dim() == 2 else targets[:, None]  # (N, K)
    width = BLOCK if x.device.type == "cpu" else len(weight)
    log_sums, logits_of_ids = [], torch.zeros_like(ids, dtype=torch.float32)
    for start in range(0, len(weight), width):
        block = weight[start : start + width].to(x.dtype)
        log_sums.append(x.new_empty(len(x), dtype=torch.float32))  # of the exponentials of these logits
        for chunk, logits in logit_slices(x, block):
            # logsumexp is no faster on a CPU. On a GPU it is several kernels, and log_softmax is one.
            log_sums[-1][chunk] = logits[:, 0].float() - logits.log_softmax(-1, dtype=torch.float32)[:, 0]
            columns = ids[chunk] - start
            found = logits.gather(1, columns.clamp(0, len(block) - 1)).float()
            logits_of_ids[chunk] += found.where((columns >= 0) & (columns < len(block)), 0)
    losses = torch.stack(log_sums, 1).logsumexp(1, keepdim=True) - logits_of_ids
    return losses.where(ids != IGNORED, 0).view(targets.shape)


def losses_and_gradient(logits: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Cross-entropies (C,) of logits (C, V) against targets (C,). Overwrites the logits: softmax times `counted` (C,).

    Compiled, it needs no second buffer of logits. It would need one if it also wrote to the targets' places.
    """
    log_p = logits.float().log_softmax(-1)
    losses = -log_p.gather(1, targets[:, None])
    logits.copy_(log_p.exp_().mul_(counted[:, None]))
    return losses[:, 0]


def logit_slices(x: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The slices of x (N, D), each with its logits (C, V). All slices share one buffer for their logits."""
    size = slice_size(x.device, len(weight) * x.element_size())
    buffer = x.new_empty(min(len(x), size), len(weight))
    for start in range(0, len(x), size):
        chunk = slice(start, min(start + size, len(x)))
        yield chunk, torch.mm(x[chunk], weight.T, out=buffer[: chunk.stop - start])


def slice_size(device: torch.device, row_bytes: int) -> int:
    """C, for logits of `row_bytes` a token. On CUDA a power of two, for a 64th of the GPU's memory, or SLICE.

    Each slice reads and writes the gradient of the whole weight, so a GPU should have few. The size depends on the
    whole memory and not on what is free: the sums of a resumed run are then rounded as before.
    """
    if device.type != "cuda":
        return SLICE
    rows = torch.cuda.get_device_properties(device).total_memory // 64 // row_bytes
    return max(SLICE, 2 ** (rows.bit_length() - 1)) if rows else SLICE


def add_product(total: Tensor, a: Tensor, b: Tensor, is_first: bool) -> None:
    """Add a @ b, a product in the dtype of a, to `total` in float32. The first product overwrites `total`."""
    if a.dtype == torch.float32:
        total.addmm_(a, b, beta=0 if is_first else 1)
    elif a.is_cuda and is_first:
        torch.mm(a, b, out_dtype=torch.float32, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    elif is_first:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a matrix product of x has: autocast's, where autocast is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def check_targets(targets: Tensor, vocab_size: int) -> None:
    """Raises IndexError for a target that is neither an id nor IGNORED. On CUDA a device assertion fails later."""
    wrong = (targets != IGNORED) & ((targets < 0) | (targets >= vocab_size))
    message = f"targets: must be ids from 0 to {vocab_size - 1}, or {IGNORED} for those that do not count"
    if targets.is_cuda:
        torch._assert_async(~wrong.any(), message)  # does not wait for the GPU
    elif wrong.any():
        raise IndexError(f"{message}; found {targets[wrong][0].item()}")


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nmodel.py imports this file. Run train.py.")
