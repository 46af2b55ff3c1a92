"""New ids from a model: how one is chosen from its logits, and how prompts are continued with a cache.

The settings of a draw apply in this order: repetition penalty, temperature, top-k, top-p. Hugging Face's order is the
same.

Shape letters: B rows of a batch, T tokens, V vocabulary, D model width, C candidates.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model import KVCache, Transformer

# ---------------------------------------------------------------- one id

CANDIDATES = 1024  # likeliest ids to search first for a nucleus; a trained model's nucleus has tens or hundreds


@dataclass(frozen=True)
class Sampling:
    """The settings of a draw."""

    temperature: float = 1.0  # 0 takes the likeliest id
    top_p: float = 1.0  # draw from the likeliest ids whose probabilities sum to this; 1 is off
    top_k: int = 0  # draw from so many of the likeliest ids; 0 is off
    repetition_penalty: float = 1.0  # above 1, ids that the text already holds become less likely; 1 is off


def seeded(seed: int, device: torch.device) -> torch.Generator:
    """A random generator for draws on `device`. Every whole number is a seed; torch itself takes only 64 bits."""
    return torch.Generator(device).manual_seed(seed % 2**64)


def penalize_repeats(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the ids of `seen` (B, V), bool, less likely in `logits` (B, V).

    CTRL (arXiv 1909.05858, section 4.1) divides their logits by `penalty`. That would make an id with a negative logit
    likelier. So negative logits are multiplied instead, as in transformers' RepetitionPenaltyLogitsProcessor.
    """
    logits = logits.float()
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def nucleus(probabilities: Tensor, top_p: float, candidates: int = CANDIDATES) -> tuple[Tensor, Tensor]:
    """The smallest set of ids in each row whose probabilities sum to at least `top_p` (arXiv 1904.09751).

    Takes probabilities (B, V). Returns ids (B, C), the likeliest first, and their probabilities (B, C). Ids outside the
    set have probability 0. Of two equally likely ids, the lower comes first. C is `candidates`, or V if a row may need
    more ids or V is smaller.
    """
    vocab_size = probabilities.shape[-1]
    if candidates < vocab_size:  # sorting all 128,256 ids takes as long as running a small model
        ids = probabilities.topk(candidates, sorted=False).indices.sort().values
    else:
        ids = torch.arange(vocab_size, device=probabilities.device).expand_as(probabilities)
    ranked, order = probabilities.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked  # sum over the ids before this one; 0 for the first id, so it is always kept
    kept = before < top_p
    # A kept id is only as likely as the last candidate. So ids outside the candidates may belong to the set.
    if candidates < vocab_size and (kept & (ranked == ranked[:, -1:])).any():
        return nucleus(probabilities, top_p, vocab_size)
    return ids.gather(-1, order), ranked.where(kept, 0)


def sample_next(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None, top_k: int = 0
) -> Tensor:
    """Choose next ids (B,) from logits (B, V): the likeliest at temperature 0, else random draws.

    The draws are from the `top_k` likeliest ids (0: from all; ids as likely as the last one count too), and of those
    from the nucleus.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    # The largest logit becomes 0, so no quotient overflows. float32 holds both limits. At the lower limit the likeliest
    # id has probability 1, and at the upper limit all ids are equally likely: beyond them nothing would change.
    temperature = min(max(temperature, 1e-30), 1e30)
    scaled = logits - logits.amax(-1, keepdim=True)
    scaled /= temperature  # in place: fresh memory for 128,256 logits a row takes longer than dividing them
    probabilities = torch.softmax(scaled, dim=-1)
    if top_p < 1:
        ids, kept = nucleus(probabilities, top_p)
        return ids.gather(-1, torch.multinomial(kept, 1, generator=generator)).squeeze(-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


# ---------------------------------------------------------------- many ids


@torch.inference_mode()
def next_ids(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_tokens: Sequence[int],
    generator: torch.Generator | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the next ids (B,) of all rows, and the logits (B, V) of the model for them, until all rows have ended.

    A row ends as in `generate`. It runs on until all have ended, and its surplus ids mean nothing.
    """
    context_len = model.config.max_seq_len
    for prompt in prompts:
        if not 0 < len(prompt) < context_len:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens: give 1 to {context_len - 1}, the model's context less one"
            )
    weight = model.output.weight
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=weight.device)
    padded = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(weight.device)
    shortest = min(map(len, prompts))  # its context is full last
    penalty, seen = sampling.repetition_penalty, None
    if penalty != 1:
        seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=weight.device)
        for row, prompt in zip(seen, prompts, strict=True):
            row[torch.tensor(prompt, device=weight.device)] = True
    cache_len = min(context_len, padded.shape[1] + max_new_tokens)
    cache = KVCache(model.config, len(prompts), cache_len, weight.device, weight.dtype)

    stop = torch.tensor(list(stop_tokens), dtype=torch.int64, device=weight.device)
    hidden = model.hidden(padded, cache=cache)[cache.rows[:, 0], lengths - 1]  # (B, D), the last token's
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=weight.device)
    for count in range(1, max(1, max_new_tokens) + 1):
        logits = model.output(hidden)
        scores = logits if seen is None else penalize_repeats(logits, seen, penalty)
        ids = sample_next(scores, sampling.temperature, sampling.top_p, generator, sampling.top_k)
        yield ids, logits
        if count >= max_new_tokens or shortest + count >= context_len:
            return
        if stop_tokens:  # only they make the host wait for the ids
            ended |= torch.isin(ids, stop) | (lengths >= context_len - 1)
            if ended.all():
                return
        if seen is not None:
            seen.scatter_(1, ids[:, None], True)
        # `clamp` keeps the rows that have ended inside the cache.
        hidden = model.hidden(ids[:, None], cache=cache, start=lengths.clamp(max=cache_len - 1))[:, 0]
        lengths = lengths + 1


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    stop_tokens: Sequence[int] = (),
    generator: torch.Generator | None = None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> list[list[int]]:
    """Continue prompts of any lengths in one batch. Returns the new ids of each prompt, without the stop token.

    A row ends at a stop token, after `max_new_tokens` ids, or when its prompt and new ids fill `max_seq_len`. All end
    where `is_stopped` says True after an id. The cache has the dtype of the weights.

    Raises:
        ValueError: a prompt is empty, or it leaves no room in the model's context.
    """
    steps = next_ids(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_p, top_k, repetition_penalty),
        stop_tokens=stop_tokens,
        generator=generator,
    )
    drawn = []
    for ids, _ in steps:
        drawn.append(ids)
        if is_stopped():
            break
    new = torch.stack(drawn, dim=1)  # (B, T)
    continuations = []
    for prompt, ids in zip(prompts, new.tolist(), strict=True):
        ids = ids[: min(max_new_tokens, model.config.max_seq_len - len(prompt))]
        continuations.append(ids[: next((i for i, token in enumerate(ids) if token in stop_tokens), len(ids))])
    return continuations


def stream_ids(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_tokens: Sequence[int],
    generator: torch.Generator | None,
    continuous: bool = False,
) -> Iterator[tuple[int, Tensor]]:
    """Yield each new id of one prompt as it comes, with the logits (V,) of the model. The ids are `generate`'s.

    With `continuous` the text goes on when the context is full: without its oldest part, so that half of the context is
    free again. The first id stays (begin of text), because models rest much of their attention on it (arXiv
    2309.17453).
    """
    context_len, ids, new = model.config.max_seq_len, list(prompt), 0
    while True:
        steps = next_ids(
            model,
            [ids],
            max_new_tokens=max_new_tokens - new,
            sampling=sampling,
            stop_tokens=stop_tokens,
            generator=generator,
        )
        for drawn, logits in steps:
            token = int(drawn)
            if token in stop_tokens:
                return
            ids.append(token)
            new += 1
            yield token, logits[0]
        if not continuous or new >= max_new_tokens:
            return
        ids = drop_oldest(ids, (context_len + 1) // 2)


def drop_oldest(ids: Sequence[int], length: int) -> list[int]:
    """The first id and the newest ones, `length` in all."""
    return [*ids[:1], *ids[len(ids) - (length - 1) :]]


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one. Run generate.py.")
