"""The same numbers as model.py's plain layers, faster on a CPU. Whoever runs a model on a CPU calls `install`.

Shape letters of products: R rows, D input width, F output width. Of attention: B batch, T queries, S keys, H query
heads, G key/value heads, J = H / G query heads that share a key/value head, K width of a head. A piece has P of the B G
key/value heads and Q = J t rows, for t queries.
"""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

import model
from loss import product_dtype

# ---------------------------------------------------------------- products of a few rows


class FewRowsLinear(nn.Linear):
    """x @ W.T without a bias, where x (R, D) has few rows, as in a step of generation.

    Such a product should take as long as reading W (F, D) takes. In float32 `functional.linear` took 3 times as long
    for one row of 128,256 logits, and 6 times for 4 rows. W @ x.T is fastest for 2 to 4 rows. For other numbers, up to
    MOST_ROWS, W is read in slices, as a batch of small products that the cores share. That needs an F that is a
    multiple of SLICE: without it one row takes `functional.linear`, and several take W @ x.T.
    """

    MOST_ROWS = 32
    SLICE = 64  # rows of W: 128 KiB at a width of 512, so a slice stays in a core's cache

    def forward(self, x: Tensor) -> Tensor:
        rows, W = x.shape[:-1].numel(), self.weight
        if product_dtype(x) != torch.float32 or not 0 < rows <= self.MOST_ROWS:
            return functional.linear(x, W)  # bf16 has a kernel of its own
        few = x.reshape(rows, -1)
        if (rows == 1 or rows > 4) and len(W) % self.SLICE == 0:
            slices = W.unflatten(0, (-1, self.SLICE))  # (F / 64, 64, D)
            y = torch.bmm(few.expand(len(slices), -1, -1), slices.mT).transpose(0, 1)  # (R, F / 64, 64)
        elif rows > 1:
            y = (W @ few.T).T
        else:
            y = functional.linear(few, W)
        return y.reshape(*x.shape[:-1], -1)


# ---------------------------------------------------------------- attention in training

SCORES = 2**20  # of a piece, unless one head has more: 4 MiB in float32, so they stay in the caches
HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What all attention here computes: softmax(q k' / sqrt(K)) v, with the arguments of `model.attend`."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))  # (B, H, S, K)
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    scores = (q @ k.mT).float() / math.sqrt(q.shape[-1])  # (B, H, T, S)
    return scores.masked_fill(~mask, -math.inf).softmax(-1).to(q.dtype) @ v


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`model.attend` of q (B, H, T, K) over k and v (B, G, S, K), in pieces where these are faster.

    A mask without gradients comes from generation or from HellaSwag. Torch's kernel takes it. In training each query
    of a mask must see at least one key; the result of a query that sees none is not a number.
    """
    trains = torch.is_grad_enabled() and q.requires_grad
    if (trains or mask is None) and pieces_are_faster(q, mask):
        q, k, v = (t.to(product_dtype(t)) for t in (q, k, v))
        return attention(q, k, v, mask if mask is None else mask.expand(len(q), -1, -1, -1))
    return model.attend(q, k, v, mask)


def pieces_are_faster(q: Tensor, mask: Tensor | None) -> bool:
    """Whether pieces are faster than torch's kernel, by the tables in benchmarks/README.md."""
    queries, dtype = q.shape[2], product_dtype(q)
    if dtype == torch.bfloat16:
        return queries >= 32
    if dtype != torch.float32:
        return False
    if mask is not None:
        return queries >= (256 if HAS_AVX512 else 1024)
    return HAS_AVX512 and 256 <= queries <= 1024


# A compiler sees one operation here. So it can compile the block around it, and the keys that a piece reads may depend
# on where documents begin.
@torch.library.custom_op("cpu_kernels::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`plain_attention`, a few heads and queries at a time, so that the scores stay in the caches.

    The rows of the J heads that share keys are rows of one product. So keys and values are not repeated.
    """
    out = empty_for_heads(q)
    q, k, v = by_key_head(q, k.shape[1]), k.flatten(0, 1), v.flatten(0, 1)
    y = torch.empty_like(q)
    for heads, queries, keys, bias in pieces(q, k, mask):
        p = probabilities(q[heads, :, queries].flatten(1, 2), k[heads, keys], bias)
        y[heads, :, queries] = torch.bmm(p.to(q.dtype), v[heads, keys]).unflatten(1, (q.shape[1], -1))
    return out.copy_(y.view(out.shape))


@torch.library.custom_op("cpu_kernels::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, in the same pieces. The probabilities are computed again."""
    outs = [empty_for_heads(t) for t in (q, k, v)]
    q, grad, k, v = by_key_head(q, k.shape[1]), by_key_head(grad, k.shape[1]), k.flatten(0, 1), v.flatten(0, 1)
    q_grad = torch.empty_like(q)
    k_grad, v_grad = (torch.zeros_like(t, dtype=sum_dtype(t)) for t in (k, v))
    for heads, queries, keys, bias in pieces(q, k, mask):
        q_piece, grad_piece = q[heads, :, queries].flatten(1, 2), grad[heads, :, queries].flatten(1, 2)  # (P, R, K)
        p = probabilities(q_piece, k[heads, keys], bias)
        v_grad[heads, keys] += torch.bmm(p.to(q.dtype).mT, grad_piece)
        p_grad = wide_product(grad_piece, v[heads, keys].mT)
        s_grad = torch._softmax_backward_data(p_grad, p, -1, p.dtype, grad_input=p_grad).to(q.dtype)  # in place
        q_grad[heads, :, queries] = torch.bmm(s_grad, k[heads, keys]).unflatten(1, (q.shape[1], -1))
        k_grad[heads, keys] += torch.bmm(s_grad.mT, q_piece)
    scale = 1 / math.sqrt(q.shape[-1])
    totals = q_grad.mul_(scale), k_grad.mul_(scale), v_grad
    return tuple(out.copy_(total.view(out.shape)) for out, total in zip(outs, totals, strict=True))


def pieces(q: Tensor, k: Tensor, mask: Tensor | None) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """The pieces of q (B G, J, T, K) and k (B G, S, K): slices of heads, of queries, and of the keys that these see.

    The last part of a piece is a bias to the scores of its last keys: 0, or minus infinity where a query does not see a
    key.
    """
    (N, J, T, _), B = q.shape, 1 if mask is None else len(mask)
    zero = q.new_zeros((), dtype=sum_dtype(q))
    most = 128 if q.dtype == torch.bfloat16 else 64
    causal = zero.masked_fill(torch.ones(most, most, dtype=torch.bool).triu(1), -math.inf)
    for start, b in itertools.product(range(0, T, most), range(B)):
        queries = slice(start, min(start + most, T))
        t = queries.stop - start
        if mask is None:
            keys, bias = slice(0, queries.stop), causal[:t, :t]
        else:
            seen = mask[b, 0, queries]  # (t, S)
            some = seen.view(torch.uint8).amax(0).nonzero()  # the keys that at least one of these queries sees
            keys = slice(int(some[0]), int(some[-1]) + 1) if len(some) else slice(0, k.shape[1])
            bias = zero.masked_fill(~seen[:, keys], -math.inf)
        P = max(1, SCORES // (J * t * (keys.stop - keys.start)))
        end = (b + 1) * N // B
        for head in range(b * N // B, end, P):
            yield slice(head, min(head + P, end)), queries, keys, bias


def probabilities(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k' / sqrt(K) + bias) (P, R, S) of a piece: q (P, R, K), k (P, S, K), bias (t, last of S)."""
    scores = wide_product(q, k.mT, 1 / math.sqrt(q.shape[-1]))
    t, last = bias.shape
    scores.unflatten(1, (-1, t))[..., -last:].add_(bias)
    return torch.softmax(scores, -1, out=scores)


def wide_product(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """The products scale a @ b of a (P, R, K) and b (P, K, S), not rounded to bfloat16 but in `sum_dtype`."""
    out = a.new_empty(len(a), a.shape[1], b.shape[2], dtype=sum_dtype(a))
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    if a.dtype == torch.bfloat16:
        matmul.fp32_precision = "bf16"  # nothing is lost, because a and b are bfloat16, and it takes half as long
    try:
        return torch.baddbmm(out, a.to(out.dtype), b.to(out.dtype), beta=0, alpha=scale, out=out)
    finally:
        matmul.fp32_precision = before


def sum_dtype(t: Tensor) -> torch.dtype:
    """The dtype of sums of products in the dtype of t: float32 for bfloat16."""
    return torch.promote_types(t.dtype, torch.float32)


def by_key_head(t: Tensor, G: int) -> Tensor:
    """t (B, H, T, K) as (B G, J, T, K)."""
    return t.unflatten(1, (G, -1)).flatten(0, 1)


def empty_for_heads(t: Tensor) -> Tensor:
    """Memory for a tensor like t (B, H, T, K), with positions before heads as in the layers around attention."""
    return t.new_empty(t.transpose(1, 2).shape).transpose(1, 2)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return empty_for_heads(q)


@attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    return empty_for_heads(q), empty_for_heads(k), empty_for_heads(v)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    q, k, v, ctx.mask = inputs
    ctx.save_for_backward(q, k, v)


def _gradients(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *attention_backward(grad, *ctx.saved_tensors, ctx.mask), None


attention.register_autograd(_gradients, setup_context=_save)


# ---------------------------------------------------------------- a model with these


def install(transformer: nn.Module) -> None:
    """Give the layers of `transformer` the forward passes above. Their parameters stay the same objects.

    Do not move the model to a GPU afterwards: there these forward passes are slower.
    """
    for module in transformer.modules():
        if type(module) is nn.Linear and module.bias is None:
            module.__class__ = FewRowsLinear
        elif isinstance(module, model.Attention):
            module.attend = attend


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
