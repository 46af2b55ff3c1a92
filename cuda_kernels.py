"""The same numbers as model.py's plain layers, with less memory on a GPU. Whoever runs a model on CUDA or mps calls
`install`.

Shape letters: B batch, T queries, S keys, H query heads, G key/value heads, K width of a head.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import model

# ---------------------------------------------------------------- attention

# The kernels that may take a dense mask. cuDNN's, torch's first choice on an H100, is not among them, for two reasons.
# With a mask its gradients can be NaN where T mod 128 is 64 (pytorch 196678). And it makes a plan for each new shape,
# which takes tens of milliseconds: HellaSwag has hundreds of shapes, and each new token of a generation is another.
# Without a mask there are only the shapes of training and of validation, so there cuDNN may serve.
KERNELS_WITH_MASK = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None) -> Tensor:
    """`model.attend` of q (B, H, T, K) over k and v (B, G, S, K). Repeats k and v to H heads where that saves memory.

    CUDA's kernels that take a dense mask, or float32, need as many key/value heads as query heads. So do those of cards
    without bfloat16. Otherwise torch falls back to a kernel that holds all T x S scores (pytorch 139586, transformers
    48633). One query has few scores, so nothing is repeated for it; which is faster was not measured.
    """
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    if q.shape[2] > 1 and (mask is not None or q.dtype != torch.bfloat16):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    if mask is None:
        return model.attend(q, k, v, mask)
    with sdpa_kernel(KERNELS_WITH_MASK):
        return model.attend(q, k, v, mask)


# ---------------------------------------------------------------- documents in one row

BLOCK = 128  # sides of a block, in tokens: flex_attention's default


def document_blocks(positions: Tensor) -> Tensor | BlockMask:
    """`model.document_mask` of positions (B, T), in blocks: a compiled kernel skips those that join no document.

    Without gradients the mask is dense, because evaluations are not compiled: there `flex_attention` would hold all
    scores. It is also dense where T is not a multiple of 128: open bugs of torch's kernel are about such lengths
    (pytorch 153799).
    """
    T = positions.shape[1]
    if not torch.is_grad_enabled() or T % BLOCK:
        return model.document_mask(positions)
    document = (positions == 0).cumsum(1, dtype=torch.int32)  # (B, T), numbered in each row

    def sees(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document[b, query] == document[b, key]) & (query >= key)

    # torch's create_block_mask asks `sees` about all T x T pairs. That keeps the host busy 9 times as long, for each
    # micro-step. The ends of a row's N blocks tell as much, because the numbers never fall along a row.
    first, last = document[:, None, ::BLOCK], document[:, None, BLOCK - 1 :: BLOCK]  # (B, 1, N)
    same = torch.eye(T // BLOCK, dtype=torch.bool, device=positions.device)  # queries (last but one), keys (last)
    earlier = torch.ones_like(same).tril(-1)
    whole = earlier & (last[..., None] == first[..., None, :])  # all of these queries see all of these keys
    part = same | (earlier & (first[..., None] == last[..., None, :]) & ~whole)
    return BlockMask.from_kv_blocks(
        *in_order(part), *in_order(whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(T, T)
    )


def in_order(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row of `blocks` (B, 1, N, N), bool, has, and the numbers of all N, these first. int32."""
    order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int()


def use_document_blocks(transformer: nn.Module, dtype: torch.dtype, say: Callable[[str], None] = print) -> None:
    """Let compiled training steps of `transformer` in `dtype` mask documents by `document_blocks`, if that works here.

    If it does not work, `say` is told why, and the masks stay dense.
    """
    problem = problem_with_blocks(transformer, dtype)
    if problem:
        say(f"flex_attention does not work here ({problem}); document_mask takes a kernel that skips no blocks")
    else:
        transformer.document_mask = document_blocks


def problem_with_blocks(transformer: nn.Module, dtype: torch.dtype) -> str:
    """Why attention with `document_blocks` does not work on this card for these heads, or "".

    It needs Triton, heads of 16 or more, and more shared memory than some cards have for wide heads. No list of these
    is right for every card and version, so a layer's attention is compiled, and compared with that of a dense mask.
    """
    c, device = transformer.config, transformer.output.weight.device
    generator = torch.Generator().manual_seed(0)  # its own, so that the run's random state stays as it is
    T = c.max_seq_len
    shapes = [(2, T, heads, c.head_dim) for heads in (c.n_heads, c.n_kv_heads, c.n_kv_heads, c.n_heads)]
    q, k, v, grad = (torch.randn(s, generator=generator).to(device, dtype).transpose(1, 2) for s in shapes)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    positions = torch.stack((torch.arange(T) % (T // 3 + 1), torch.arange(T))).to(device)  # three documents, and one
    results = []
    try:
        blocks = document_blocks(positions)
        if not isinstance(blocks, BlockMask):
            return f"max_seq_len={T} is not a multiple of {BLOCK}"
        compiled = torch.compile(attend, dynamic=False, fullgraph=True)
        for kernel, mask in ((attend, model.document_mask(positions)), (compiled, blocks)):
            y = kernel(*inputs, mask)
            results.append([y.detach(), *torch.autograd.grad(y, inputs, grad)])
    except Exception as error:  # whatever the compiler says, training goes on without it
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    errors = [float((a - b).float().norm() / a.float().norm()) for a, b in zip(*results, strict=True)]
    return "" if all(error < 0.02 for error in errors) else f"its results are off by {max(errors):.2g}"


# ---------------------------------------------------------------- a model with these


def install(transformer: nn.Module) -> None:
    """Let every attention layer of `transformer` use `attend` above."""
    for module in transformer.modules():
        if isinstance(module, model.Attention):
            module.attend = attend


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
