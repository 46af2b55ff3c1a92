"""Llama 3, written by hand: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Papers: "The Llama 3 Herd of Models" (arXiv 2407.21783) section 3.2 and, for the parts, RMSNorm (1910.07467),
RoPE (2104.09864), grouped-query attention (2305.13245), SwiGLU (2002.05202). Parameter names are those of
Meta's checkpoints, so that an official `consolidated.00.pth` loads as it is.

Shape letters: B batch, T tokens of one call, S positions held in the cache, D model width, H query heads,
G key/value heads, K width of a head, F feed-forward width, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    dim: int = 768  # D, width of the residual stream
    n_layers: int = 16
    n_heads: int = 16  # H, query heads; a head is dim / n_heads wide
    n_kv_heads: int = 8  # G, key/value heads, each shared by n_heads / n_kv_heads query heads
    vocab_size: int = 128_256  # V
    multiple_of: int = 256  # the feed-forward width is rounded up to a multiple of this
    ffn_dim_multiplier: float | None = None  # scales the feed-forward width; Llama 3 8B and 70B use 1.3
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0  # base of the rotary wavelengths: higher, longer
    rope_scale: float = 1.0  # context extension of Llama 3.1: 8 (3.1), 32 (3.2 1B and 3B); 1 is off
    max_seq_len: int = 1024  # positions of the rotary tables; in training, tokens a sequence
    tie_embeddings: bool = False  # the output layer reuses the embedding's weights, as Llama 3.2 1B and 3B do

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        """Feed-forward width F: two thirds of 4 D, because SwiGLU has three matrices where others have two."""
        width = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return self.multiple_of * math.ceil(width / self.multiple_of)

    def errors(self) -> list[str]:
        """One sentence for every field that cannot be honoured: its name, its value, the cure."""
        found = [
            f"{name}={getattr(self, name)}: must be at least 1"
            for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len")
            if getattr(self, name) < 1
        ]
        if self.ffn_dim_multiplier is not None and not 0 < self.ffn_dim_multiplier < math.inf:
            found.append(f"ffn_dim_multiplier={self.ffn_dim_multiplier}: must be positive, or None for 1")
        for name in ("norm_eps", "rope_theta"):
            if not getattr(self, name) > 0:
                found.append(f"{name}={getattr(self, name)}: must be positive")
        if not self.rope_scale >= 1:
            found.append(f"rope_scale={self.rope_scale}: must be 1 (off) or more")
        if found:
            return found  # what follows divides by these
        if self.ffn_dim < 1:
            found.append(f"ffn_dim_multiplier={self.ffn_dim_multiplier}: leaves no feed-forward; raise it")
        if self.dim % self.n_heads:
            found.append(f"dim={self.dim}: must be a multiple of n_heads={self.n_heads}")
        elif self.head_dim % 2:
            found.append(f"dim={self.dim}: dim / n_heads = {self.head_dim} must be even, for rotary pairs")
        if self.n_heads % self.n_kv_heads:
            found.append(f"n_kv_heads={self.n_kv_heads}: must divide n_heads={self.n_heads}")
        return found


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's rotation angles, each (max_seq_len, K / 2) in float32.

    Pair i turns by theta^(-2i/K) radians a position. Llama 3.1's extension (rope_scale > 1) slows the pairs whose
    wavelength exceeds the 8,192 positions of the first training, leaves the fast ones, and blends between.
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    frequency = 1.0 / config.rope_theta ** (half / config.head_dim)
    if config.rope_scale > 1:
        # Llama 3.1's constants: 8,192 positions at first, low_freq_factor 1, high_freq_factor 4
        turns = 8192 * frequency / (2 * math.pi)  # full rotations within the original context
        keep = ((turns - 1) / (4 - 1)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / config.rope_scale
    angle = torch.outer(torch.arange(config.max_seq_len, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x0, x1), (x2, x3), ... of each head: Meta's interleaved order, in real numbers.

    x is (B, T, heads, K); cos and sin broadcast to (B, T, 1, K / 2).
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


def document_positions(tokens: Tensor, bos_id: int) -> Tensor:
    """Each token's place in its own document, (B, T): counted from the last `bos_id` at or before it, or from the
    start of the row, where a document goes on that began before it."""
    index = torch.arange(tokens.shape[1], device=tokens.device)
    return index - torch.where(tokens == bos_id, index, 0).cummax(1).values


class KVCache:
    """Keys and values of the positions seen so far, each (n_layers, B, S, G, K), allocated once.

    Rows may hold prompts of different lengths, padded on the right: a row's padding lies behind its last position,
    where no query of that row looks before a real token has overwritten it.
    """

    def __init__(self, config: ModelConfig, batch_size: int, max_len: int, device: torch.device, dtype: torch.dtype):
        if max_len > config.max_seq_len:
            raise ValueError(f"a cache of {max_len} positions exceeds max_seq_len={config.max_seq_len}")
        shape = (config.n_layers, batch_size, max_len, config.n_kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0  # S so far: no row holds more positions; attention reads no further

    def extend(self, positions: Tensor) -> Tensor:
        """Make room for `positions` (B, T); return which stored positions each may look at, (B, 1, T, S) bool."""
        self.length = min(self.length + positions.shape[1], self.keys.shape[2])
        return (torch.arange(self.length, device=positions.device) <= positions[..., None])[:, None]

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, T, G, K) at `positions` (B, T); return all that is stored, each (B, S, G, K)."""
        rows = torch.arange(len(k), device=k.device)[:, None]
        self.keys[layer][rows, positions] = k
        self.values[layer][rows, positions] = v
        return self.keys[layer, :, : self.length], self.values[layer, :, : self.length]


def softmax_(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Overwrite logits (C, V) by the gradient of their cross-entropies against targets (C,), summed with `weights`
    (C,): the softmax, at the target less 1, times the weight. Return the cross-entropies (C,), in nats."""
    log_p = logits.float().log_softmax(-1)
    nats = -log_p.gather(1, targets[:, None])
    logits.copy_(log_p.exp_().mul_(weights[:, None]))
    # p - 1 in one: of a target that is nearly certain, p rounded to bfloat16 is 1, and nothing would be left to learn.
    logits.scatter_(1, targets[:, None], (torch.expm1(-nats) * weights[:, None]).to(logits.dtype))
    return nats[:, 0]


class OutputLoss(torch.autograd.Function):
    """The output layer and the mean cross-entropy in one, a slice of the tokens at a time: at 128,256 ids the logits
    of all tokens, and their gradient, would take more memory than the rest of the training step.

    A slice's gradients are computed while its logits are there, in the forward pass already, so that nothing is
    computed twice (as in Liger Kernel, arXiv 2410.10989). The logits' one buffer serves all slices.
    """

    SLICE = 1024  # C, tokens: enough for a matrix product at a CPU's full speed; not measured on GPUs

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, softmax_: Callable) -> Tensor:
        """x (N, D), weight (V, D), targets (N,) -> scalar loss; the products are in `dtype`, their sums in float32."""
        counted = targets != -100
        shares, targets = counted / counted.sum(), targets.clamp(min=0)
        x_cast, weight_cast = x.to(dtype), weight.to(dtype)
        x_grad = torch.empty_like(x_cast)
        weight_grad = torch.empty_like(weight, dtype=torch.float32)
        buffer = x_cast.new_empty(min(len(x), OutputLoss.SLICE), len(weight))
        loss = torch.zeros((), device=x.device)
        for start in range(0, len(x), OutputLoss.SLICE):
            some = slice(start, start + OutputLoss.SLICE)
            logits = torch.mm(x_cast[some], weight_cast.T, out=buffer[: len(x_cast[some])])  # (C, V)
            loss += (softmax_(logits, targets[some], shares[some]) * shares[some]).sum()
            torch.mm(logits, weight_cast, out=x_grad[some])  # the logits are their gradient now
            if dtype == torch.float32:
                weight_grad.addmm_(logits.T, x_cast[some], beta=min(start, 1))  # 0 overwrites
            else:
                product = logits.T @ x_cast[some]
                weight_grad = weight_grad.add_(product) if start else weight_grad.copy_(product)
        ctx.gradients = x_grad.to(x.dtype), weight_grad.to(weight.dtype)
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the loss has handed its gradients on, not copied them: it goes backward only once")
        x_grad, weight_grad = ctx.gradients
        ctx.gradients = None
        return x_grad.mul_(grad), weight_grad.mul_(grad), None, None, None


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a matrix product of x would be in: autocast's, where that is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Linear(nn.Linear):
    """A matrix product, x @ W.T, without a bias.

    For the few rows of a step of generation it takes as long as reading W does, and on a CPU one core alone reads. Of
    W @ x.T the cores share W, if x is a matrix: a single row is taken twice.
    """

    FEW = 8

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        if not 0 < rows <= self.FEW or x.device.type != "cpu" or x.dtype != torch.float32:
            return F.linear(x, self.weight)
        few = x.reshape(rows, -1) if rows > 1 else x.reshape(1, -1).expand(2, -1)
        return (self.weight @ few.T).T[:rows].reshape(*x.shape[:-1], -1)


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last dimension, then scale; the arithmetic is in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.wq = Linear(config.dim, config.n_heads * config.head_dim)
        self.wk = Linear(config.dim, config.n_kv_heads * config.head_dim)
        self.wv = Linear(config.dim, config.n_kv_heads * config.head_dim)
        self.wo = Linear(config.n_heads * config.head_dim, config.dim)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cached: tuple[KVCache, Tensor] | None
    ) -> Tensor:
        q = apply_rope(self.wq(x).unflatten(-1, (-1, self.head_dim)), *rope)  # (B, T, H, K)
        k = apply_rope(self.wk(x).unflatten(-1, (-1, self.head_dim)), *rope)  # (B, T, G, K)
        v = self.wv(x).unflatten(-1, (-1, self.head_dim))  # (B, T, G, K)
        if cached is not None:
            cache, positions = cached
            k, v = cache.update(self.layer, k, v, positions)  # (B, S, G, K)
        elif mask is not None or (q.is_cuda and q.dtype == torch.float32):
            # CUDA's kernels that take a mask, or float32, want as many key/value heads as heads, else they give way to
            # one that holds all T x T scores (pytorch 139586, transformers 48633).
            k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
        # is_causal, not a mask, where documents need none: a mask of our own turns the flash kernels off. enable_gqa
        # lets H / G query heads share a key/value head without copying it.
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # heads before positions
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return self.wo(y.transpose(1, 2).flatten(2))  # (B, H, T, K) -> (B, T, D)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1 = Linear(config.dim, config.ffn_dim)  # gate
        self.w2 = Linear(config.ffn_dim, config.dim)  # down
        self.w3 = Linear(config.dim, config.ffn_dim)  # up

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cached: tuple[KVCache, Tensor] | None
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, mask, cached)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        if errors := config.errors():
            raise ValueError("; ".join(errors))
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(TransformerBlock(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Linear(config.dim, config.vocab_size)
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        cos, sin = rope_tables(config)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.softmax_ = softmax_
        self.init_weights()

    def init_weights(self) -> None:
        """GPT-2's initialisation (Radford et al. 2019, section 2.3, and its code): normal with deviation 0.02; the two
        matrices of a block that write to the residual stream are smaller by sqrt(2 n_layers), the number of
        such writes, so that the stream's variance does not grow with depth. Meta has not published Llama 3's."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes_residual = name.endswith(("attention.wo.weight", "feed_forward.w2.weight"))
                std = 0.02 / math.sqrt(2 * self.config.n_layers) if writes_residual else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of `tokens` (B, T) int64; with `targets` (B, T), their scalar mean loss in nats instead.

        Targets of -100 do not count. With `positions` (B, T), from `document_positions`, each document in a row is on
        its own: attention does not leave it, and its rotations begin at 0, as in Llama 3's training (section 3.2).
        With `cache`, the tokens follow the `start` (B,) int64 positions that each row already holds there (None: none).

        Raises:
            ValueError: more tokens than max_seq_len; or both positions and a cache, which counts its own.
        """
        x = self.hidden(tokens, positions=positions, cache=cache, start=start)
        return self.output(x) if targets is None else self.loss(x, targets)

    def hidden(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """The residual stream after the last block, (B, T, D), normalised: what the output layer reads.

        `mask` (B, 1, T, T), bool, says which tokens (last) each token (last but one) sees, where `positions` are not
        those of documents one after the other.
        """
        T = tokens.shape[1]
        cached = None
        if cache is not None:
            if positions is not None:
                raise ValueError("positions: a cache counts its own, and holds one document a row; pass one of the two")
            positions = torch.arange(T, device=tokens.device).expand_as(tokens)
            if start is not None:
                positions = positions + start[:, None]
            mask, cached = cache.extend(positions), (cache, positions)
        elif tokens.shape[1] > self.config.max_seq_len:
            raise ValueError(f"{T} tokens exceed max_seq_len={self.config.max_seq_len}")
        elif positions is not None and mask is None:
            document = (positions == 0).cumsum(1)  # (B, T), numbered in each row
            mask = (document[:, :, None] == document[:, None, :]).tril()[:, None]  # (B, 1, T, T)
        if positions is None:
            rope = (self.rope_cos[:T, None], self.rope_sin[:T, None])  # (T, 1, K / 2)
        else:
            rope = (self.rope_cos[positions][:, :, None], self.rope_sin[positions][:, :, None])  # (B, T, 1, K / 2)
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, rope, mask, cached)
        return self.norm(x)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, in nats, of hidden states (B, T, D) against targets (B, T).

        Unless gradients are off, they are computed on the way, by OutputLoss: evaluate under `torch.no_grad`.
        """
        x, targets = x.flatten(0, 1), targets.flatten()
        if not torch.is_grad_enabled():
            return self.nats(x, targets).sum() / (targets != -100).sum()
        return OutputLoss.apply(x, self.output.weight, targets, product_dtype(x), self.softmax_)

    @torch.no_grad()
    def nats(self, x: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropies (N,), in nats and float32, of hidden states (N, D) against targets (N,); 0 for a target of
        -100. As in OutputLoss, one buffer holds the logits, a slice of the tokens at a time."""
        dtype, size = product_dtype(x), OutputLoss.SLICE
        weight = self.output.weight.to(dtype)
        buffer = weight.new_empty(min(len(x), size), len(weight))
        nats = []
        for some, answers in zip(x.to(dtype).split(size), targets.split(size), strict=True):
            logits = torch.mm(some, weight.T, out=buffer[: len(some)])
            nats.append(F.cross_entropy(logits.float(), answers, reduction="none"))
        return torch.cat(nats)

    def compile_blocks(self) -> None:
        """Compile each block, and the loss, instead of the whole: as fast a step, and half as long to wait for.

        The blocks share their code, so the first one's is compiled for all; and the gradients of a block are there when
        its backward is done, not at the end of one big graph, so that data parallelism can send them meanwhile.
        """
        torch._dynamo.config.optimize_ddp = False  # it would cut the blocks' graphs again, by size
        for layer in self.layers:
            layer.compile(dynamic=False)
        self.softmax_ = torch.compile(softmax_, dynamic=False)
