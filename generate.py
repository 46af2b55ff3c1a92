"""Continue a text with the model of a checkpoint, in a terminal.

python generate.py --checkpoint runs/sample --prompt "def main("
"""

import argparse
import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from files import allow_any_text_in_output
from hardware import pick_device
from model import KVCache, Transformer
from model_utils import load_model
from tokenizer import Tokenizer

CANDIDATES = 1024  # likeliest ids to search first for a nucleus; a trained model's nucleus has tens or hundreds


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


def sample_next(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Choose next ids (B,) from logits (B, V): the likeliest at temperature 0, else random draws from the nucleus."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        ids, kept = nucleus(probabilities, top_p)
        return ids.gather(-1, torch.multinomial(kept, 1, generator=generator)).squeeze(-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_tokens: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Continue prompts of any lengths in one batch. Returns the new ids of each prompt, without the stop token.

    A row ends at a stop token, after `max_new_tokens` ids, or when its prompt and new ids fill `max_seq_len`. The cache
    has the dtype of the weights.

    Raises:
        ValueError: a prompt is empty, or it leaves no room in the model's context.
    """
    context_len = model.config.max_seq_len
    for prompt in prompts:
        if not 0 < len(prompt) < context_len:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens: give 1 to {context_len - 1}, the model's context less one"
            )
    weight = model.output.weight
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=weight.device)
    padded = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64, device=weight.device)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    cache_len = min(context_len, padded.shape[1] + max_new_tokens)
    cache = KVCache(model.config, len(prompts), cache_len, weight.device, weight.dtype)

    stop = torch.tensor(list(stop_tokens), dtype=torch.int64, device=weight.device)
    hidden = model.hidden(padded, cache=cache)[torch.arange(len(prompts)), lengths - 1]  # (B, D), the last token's
    new = [sample_next(model.output(hidden), temperature, top_p, generator)]
    ended = torch.isin(new[0], stop) | (lengths == context_len - 1)
    while len(new) < max_new_tokens and not ended.all():
        # A row that has ended runs on until all have ended. `clamp` keeps it inside the cache. The code after the loop
        # cuts its surplus ids off.
        hidden = model.hidden(new[-1][:, None], cache=cache, start=lengths.clamp(max=cache_len - 1))
        lengths = lengths + 1
        new.append(sample_next(model.output(hidden[:, 0]), temperature, top_p, generator))
        ended |= torch.isin(new[-1], stop) | (lengths >= context_len - 1)
    continuations = []
    for prompt, ids in zip(prompts, torch.stack(new, dim=1).tolist(), strict=True):
        ids = ids[: min(max_new_tokens, context_len - len(prompt))]
        continuations.append(ids[: next((i for i, token in enumerate(ids) if token in stop_tokens), len(ids))])
    return continuations


def complete(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> list[str]:
    """Continue each prompt. Returns prompt and continuation as one text. The same seed gives the same texts.

    Raises what `generate` raises.
    """
    encoded = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    continuations = generate(
        model,
        encoded,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop_tokens=tokenizer.stop_tokens,
        generator=torch.Generator(model.output.weight.device).manual_seed(seed),
    )
    return [tokenizer.decode(prompt[1:] + ids) for prompt, ids in zip(encoded, continuations, strict=True)]


def main() -> int:
    allow_any_text_in_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = "a checkpoint, a run directory for its newest one, or a Llama 3 in Hugging Face's layout"
    parser.add_argument("--checkpoint", required=True, help=words)
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="tokens (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest id (default: 0.8)")
    parser.add_argument("--top_p", type=float, default=0.95, help="probability of the nucleus, 0 to 1 (default: 0.95)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed, the same text (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    args = parser.parse_args()
    if args.max_new_tokens < 1 or not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        parser.error("--max_new_tokens must be at least 1, --temperature 0 or more, --top_p above 0 and at most 1")
    try:
        device = pick_device(args.device)
        model, _ = load_model(args.checkpoint, device)
        tokenizer = Tokenizer(vocab_size=model.config.vocab_size)
        [text] = complete(
            model,
            tokenizer,
            [args.prompt],
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
        )
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 1
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
