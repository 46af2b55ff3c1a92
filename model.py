"""Llama 3, written by hand: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Papers: "The Llama 3 Herd of Models" (arXiv 2407.21783) section 3.2 and, for the parts, RMSNorm (1910.07467),
RoPE (2104.09864), grouped-query attention (2305.13245), SwiGLU (2002.05202). Parameters have the names of Meta's
checkpoints, so an official `consolidated.00.pth` loads as it is.

Shape letters: B batch, T tokens of one call, S positions held in the cache, D model width, H query heads,
G key/value heads, K width of a head, F feed-forward width, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loss import OutputLoss


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
    rope_theta: float = 500_000.0  # base of the rotary wavelengths: a higher base makes them longer
    rope_scale: float = 1.0  # context extension of Llama 3.1: 8 (3.1), 32 (3.2 1B and 3B); 1 is off
    max_seq_len: int = 1024  # positions of the rotary tables; in training, tokens a sequence
    tie_embeddings: bool = False  # the output layer reuses the embedding's weights, as Llama 3.2 1B and 3B do

    @property
    def head_dim(self) -> int:
        """K, width of a head."""
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        """F, the feed-forward width. SwiGLU has three matrices where others have two, so F is two thirds of 4 D."""
        width = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return self.multiple_of * math.ceil(width / self.multiple_of)


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last dimension, then scale. The arithmetic is in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


# ---------------------------------------------------------------- rotary positions


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's rotation angles, each (max_seq_len, K / 2) in float32.

    Pair i turns by theta^(-2i/K) radians a position. Llama 3.1 extends the context with rope_scale > 1. The first
    training had 8,192 positions. Pairs whose wavelength is longer than that are slowed down by rope_scale. Pairs that
    turn at least 4 times within it are left alone. Between these two the frequencies are blended.
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
    """The position of each token in its own document, (B, T).

    A document begins at a `bos_id`. The first document of a row may have begun before the row: its positions count
    from the start of the row.
    """
    index = torch.arange(tokens.shape[1], device=tokens.device)
    return index - torch.where(tokens == bos_id, index, 0).cummax(1).values


def document_mask(positions: Tensor) -> Tensor:
    """Which tokens (last) each token (last but one) sees: those of its own document, up to itself. (B, 1, T, T) bool.

    `positions` (B, T) are those of `document_positions`.
    """
    document = (positions == 0).cumsum(1)  # (B, T), numbered in each row
    return (document[:, :, None] == document[:, None, :]).tril()[:, None]


# ---------------------------------------------------------------- the block


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k' / sqrt(K)) v of queries (B, H, T, K) over keys and values (B, G, S, K); returns (B, H, T, K).

    `mask` (B, 1, T, S), bool, says which position (last) each query (last but one) sees. None is the causal mask.
    """
    # Ask for causal attention by name where we can: with a mask tensor, torch does not take its flash kernels.
    # enable_gqa lets H / G query heads share a key/value head without copying it.
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)


class Attention(nn.Module):
    """Grouped-query attention: several query heads share a head of keys and values."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)
        self.attend = attend  # cpu_kernels.py and cuda_kernels.py put another kernel in its place

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cached: "tuple[KVCache, Tensor] | None"
    ) -> Tensor:
        q = apply_rope(self.wq(x).unflatten(-1, (-1, self.head_dim)), *rope)  # (B, T, H, K)
        k = apply_rope(self.wk(x).unflatten(-1, (-1, self.head_dim)), *rope)  # (B, T, G, K)
        v = self.wv(x).unflatten(-1, (-1, self.head_dim))  # (B, T, G, K)
        if cached is not None:
            cache, positions = cached
            k, v = cache.update(self.layer, k, v, positions)  # (B, S, G, K)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # heads before positions
        y = self.attend(q, k, v, mask)  # (B, H, T, K)
        return self.wo(y.transpose(1, 2).flatten(2))  # (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1(x)) * w3(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)  # gate
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)  # down
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)  # up

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
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cached: "tuple[KVCache, Tensor] | None"
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, mask, cached)
        return x + self.feed_forward(self.ffn_norm(x))


# ---------------------------------------------------------------- the model


class Transformer(nn.Module):
    """Llama 3. Raises ValueError for a configuration that `model_errors` refuses."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        if errors := model_errors(config):
            raise ValueError("; ".join(errors))
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(TransformerBlock(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        # Tied weights need no memory of their own.
        device = "meta" if config.tie_embeddings else None
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False, device=device)
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.loss = OutputLoss()
        self.document_mask = document_mask  # cuda_kernels.py may put another form of it in its place
        cos, sin = rope_tables(config)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the weights as GPT-2 does (Radford et al. 2019, section 2.3, and its code). Meta has not published
        Llama 3's way.

        All matrices are normal with a deviation of 0.02. Two matrices of each block write to the residual stream, so
        there are 2 n_layers writes. These matrices are smaller by sqrt(2 n_layers), so that the variance of the stream
        does not grow with the depth.
        """
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
        cache: "KVCache | None" = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of `tokens` (B, T) int64; with `targets` (B, T), their scalar mean loss in nats instead.

        Targets of -100 do not count.

        Args:
            positions: (B, T), from `document_positions`. Attention then stays within each document, and rotations
                begin at 0 in each, as in Llama 3's training (section 3.2).
            cache: holds the tokens before these. `start` (B,) int64 says how many each row holds (None: none).

        Raises:
            ValueError: more tokens than max_seq_len; or both positions and a cache, which counts its own.
            IndexError: a target is neither an id nor -100. (On CUDA a device assertion fails instead.)
        """
        x = self.hidden(tokens, positions=positions, cache=cache, start=start)
        return self.output(x) if targets is None else self.loss(x, self.output.weight, targets)

    def hidden(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: "KVCache | None" = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """The residual stream after the last block, normalised: (B, T, D), what the output layer reads.

        `mask` (B, 1, T, T), bool, says which token (last) each token (last but one) sees. Without it, `positions`
        separate documents that follow one another.
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
            mask = self.document_mask(positions)  # (B, 1, T, T)
        if positions is None:
            rope = (self.rope_cos[:T, None], self.rope_sin[:T, None])  # (T, 1, K / 2)
        else:
            rope = (self.rope_cos[positions][:, :, None], self.rope_sin[positions][:, :, None])  # (B, T, 1, K / 2)
        x = self.tok_embeddings(tokens)  # (B, T, D)
        for layer in self.layers:
            x = layer(x, rope, mask, cached)
        return self.norm(x)


# ---------------------------------------------------------------- generation: keys and values are computed once


class KVCache:
    """Keys and values of the positions seen so far, each (n_layers, B, S, G, K), allocated once.

    Rows may hold prompts of different lengths, padded on the right. The padding of a row lies behind its last position.
    A query of that row looks there only after a real token has overwritten the padding.
    """

    def __init__(self, config: ModelConfig, batch_size: int, max_len: int, device: torch.device, dtype: torch.dtype):
        if max_len > config.max_seq_len:
            raise ValueError(f"a cache of {max_len} positions exceeds max_seq_len={config.max_seq_len}")
        shape = (config.n_layers, batch_size, max_len, config.n_kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.rows = torch.arange(batch_size, device=device)[:, None]  # (B, 1)
        self.length = 0  # S so far: the longest row holds this many positions, and attention reads no further

    def extend(self, positions: Tensor) -> Tensor:
        """Make room for `positions` (B, T). Return which stored positions each of them may see, (B, 1, T, S) bool."""
        self.length = min(self.length + positions.shape[1], self.keys.shape[2])
        return (torch.arange(self.length, device=positions.device) <= positions[..., None])[:, None]

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, T, G, K) at `positions` (B, T). Return all that is stored, each (B, S, G, K)."""
        self.keys[layer][self.rows, positions] = k
        self.values[layer][self.rows, positions] = v
        return self.keys[layer, :, : self.length], self.values[layer, :, : self.length]


# ---------------------------------------------------------------- configurations that cannot be honoured


def model_errors(config: ModelConfig) -> list[str]:
    """One sentence for every field that cannot be honoured: its name, its value, the cure."""
    c = config
    positive = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len")
    multiplier = c.ffn_dim_multiplier
    # Sizes beyond 2^24 would overflow the 64 bits that count the bytes of a tensor.
    found = [
        f"{name}={value}: must be 1 to {2**24:,}" for name in positive if not 1 <= (value := getattr(c, name)) <= 2**24
    ]
    found += [
        f"{name}={getattr(c, name)}: {sentence}"
        for name, is_right, sentence in (
            (
                "ffn_dim_multiplier",
                multiplier is None or 0 < multiplier <= 1000,
                "must be above 0 and at most 1000",
            ),
            ("norm_eps", 0 < c.norm_eps < 1, "must be above 0 and below 1"),
            ("rope_theta", 0 < c.rope_theta < math.inf, "must be positive, and finite"),
            ("rope_scale", 1 <= c.rope_scale < math.inf, "must be 1 (off) or more, and finite"),
        )
        if not is_right
    ]
    if found:
        return found  # the next checks divide by these fields
    if c.ffn_dim < 1:
        found.append(f"ffn_dim_multiplier={multiplier}: leaves no feed-forward; raise it")
    if c.dim % c.n_heads:
        found.append(f"dim={c.dim}: must be a multiple of n_heads={c.n_heads}")
    elif c.head_dim % 2:
        found.append(f"dim={c.dim}: dim / n_heads = {c.head_dim} must be even, for rotary pairs")
    if c.n_heads % c.n_kv_heads:
        found.append(f"n_kv_heads={c.n_kv_heads}: must divide n_heads={c.n_heads}")
    return found


if __name__ == "__main__":
    with torch.device("meta"):  # shapes alone, no memory
        count = sum(parameter.numel() for parameter in Transformer(ModelConfig()).parameters())
    print(f"The default Llama 3 has {count:,} parameters. `python train.py` trains one.")
