"""HellaSwag, and files in its format: iterate over the rows, render them to ids, score a model.

    python hellaswag_utils.py --checkpoint runs/mine --data data/hellaswag/hellaswag_val.jsonl
    python hellaswag_utils.py --checkpoint runs/mine --data data/hellaswag/hellaswag_val.jsonl --style lm-eval

A language model answers with the ending that it finds likeliest after the context. `acc` takes the highest sum of the
log-probabilities of an ending's tokens. `acc_norm` divides the sum by the ending's length first, so that short endings
have no advantage. There are two styles:

- `gpt2`, as reproductions of GPT-2 report it (build-nanogpt, llm.c). The context is the row's `ctx` as it stands. An
  ending's length is its tokens.
- `lm-eval`, as EleutherAI's lm-evaluation-harness 0.4 reports it. The activity's label comes before the context, and
  WikiHow's brackets are taken out. An ending's length is its characters, without the space before it. (The harness
  calls a length in bytes `acc_bytes`. Its hellaswag task does not report that.) Two things differ on purpose.
  Text that looks like a control token stays text here; Hugging Face's tokenizers would parse it. An ending that is
  longer than the model's context is scored by its last tokens here; the harness stops.

In both styles the begin-of-text id comes first, as in every training document and in Llama 3's published tokenizer.

Shape letters: B rows of one batch, T tokens of the longest, N tokens to score, D model width, V vocabulary.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from hardware import fastest_dtype, keep_freed_memory, pick_device
from loss import token_losses
from model import Transformer
from model_utils import autocast, load_model
from tokenizer import Tokenizer

STYLES = {"gpt2": ("ctx",), "lm-eval": ("activity_label", "ctx_a", "ctx_b")}  # the fields that each style reads
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Example:
    context: list[int]  # ids, the begin-of-text id first
    endings: list[list[int]]
    label: int  # the true ending's place
    lengths: list[int] | None = None  # of each ending, for acc_norm to divide by; None: its scored tokens


# ---------------------------------------------------------------- rows and their ids


def iterate_rows(path: str | Path, style: str = "gpt2") -> Iterator[dict]:
    """Rows of a jsonl file in HellaSwag's format, with the fields that `style` reads.

    Raises:
        ValueError: a line is not such a row. The message names file and line.
    """
    with open(path, "rb") as file:  # json decodes the bytes, and raises a ValueError if they are not UTF-8
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                valid = all(isinstance(row[name], str) for name in STYLES[style]) and isinstance(row["endings"], list)
                valid = valid and all(isinstance(ending, str) for ending in row["endings"])
                valid = valid and int(row["label"]) in range(len(row["endings"]))
            except (ValueError, KeyError, TypeError, OverflowError):  # OverflowError: a label of Infinity
                valid = False
            if not valid:
                needed = ", ".join((*STYLES[style], "endings", "label"))
                raise ValueError(f"{path}, line {number}: not a row of HellaSwag ({needed}); mend the line")
            yield row


def render(row: dict, tokenizer: Tokenizer, style: str = "gpt2") -> Example:
    """Ids of a row. A space joins context and ending. It belongs to the ending's first token."""
    label = int(row["label"])
    if style == "gpt2":
        endings = [tokenizer.encode(" " + ending) for ending in row["endings"]]
        return Example(tokenizer.encode(row["ctx"], bos=True), endings, label)
    text = _without_brackets(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    # White space at the end of the context belongs to the ending. Context and ending are encoded together. The context
    # alone has a number of tokens; the ending is what follows that many.
    context = tokenizer.encode(text.rstrip(), bos=True)
    endings = [_without_brackets(ending) for ending in row["endings"]]
    ids = [tokenizer.encode(f"{text} {ending}", bos=True)[len(context) :] for ending in endings]
    return Example(context, ids, label, lengths=[len(ending) for ending in endings])


def _without_brackets(text: str) -> str:
    """Take out WikiHow's marks, such as [header], exactly as lm-evaluation-harness does, spaces included."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def load_examples(
    path: str | Path, tokenizer: Tokenizer, limit: int | None = None, style: str = "gpt2"
) -> list[Example]:
    """The first `limit` rows of a file (None: all), rendered.

    Raises:
        ValueError: the file has no rows, or a line is not a row.
    """
    examples = [render(row, tokenizer, style) for row in islice(iterate_rows(path, style), limit)]
    if not examples:
        raise ValueError(f"{path}: holds no rows; load_hellaswag_dataset.py fetches them")
    return examples


def benchmark_name(path: str | Path) -> str:
    """What to call results on this file. Only HellaSwag's own file is called HellaSwag."""
    stem = Path(path).stem
    return "HellaSwag" if stem.lower().startswith("hellaswag") else stem.replace("_", " ")


# ---------------------------------------------------------------- scores


@dataclass
class PackedRow:
    """A context, and endings after it that do not see each other. So the context is computed once for all."""

    context: list[int]
    endings: list[list[int]] = field(default_factory=list)
    places: list[tuple[int, int]] = field(
        default_factory=list
    )  # of each ending: the number of its example, and its number there

    def __len__(self) -> int:
        """Tokens that the model reads. The last token of an ending is predicted, but not read."""
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


def pack(examples: Sequence[Example], max_len: int) -> list[PackedRow]:
    """A row for each example, or several rows if one would exceed `max_len` tokens.

    If a context with a single ending is too long, the context loses its beginning. If the ending alone is too long, it
    loses its beginning too. An ending of which no token is predicted is in no row.
    """
    rows = []
    for i, example in enumerate(examples):
        row = None
        for j, ending in enumerate(example.endings):
            ids = (example.context + ending)[-max_len - 1 :]
            start = max(len(ids) - len(ending), 1)  # nothing predicts the very first token
            context, ending = ids[:start], ids[start:]
            if not ending:
                continue
            if row is None or row.context != context or len(row) + len(ending) - 1 > max_len:
                row = PackedRow(context)
                rows.append(row)
            row.endings.append(ending)
            row.places.append((i, j))
    return rows


def ending_log_probs(model: Transformer, rows: Sequence[PackedRow]) -> list[Tensor]:
    """Log-probabilities of the tokens of each ending, row after row: a float32 tensor on the CPU for each ending."""
    B, T, device = len(rows), max(map(len, rows)), model.output.weight.device
    # Padding follows the tokens, and no token sees what follows it.
    tokens, positions, segments = torch.zeros(3, B, T, dtype=torch.int64)  # segment 0: the context; 1, 2, ...: endings
    predictors, targets = [], []  # positions in the B x T tokens, and the ids that follow them
    for b, row in enumerate(rows):
        start = len(row.context)
        tokens[b, :start] = torch.tensor(row.context)
        positions[b, :start] = torch.arange(start)
        for segment, ending in enumerate(row.endings, start=1):
            end = start + len(ending) - 1
            tokens[b, start:end] = torch.tensor(ending[:-1])
            positions[b, start:end] = len(row.context) + torch.arange(end - start)
            segments[b, start:end] = segment
            predictors += [b * T + len(row.context) - 1, *range(b * T + start, b * T + end)]
            targets += ending
            start = end
    tokens, positions, segments = tokens.to(device), positions.to(device), segments.to(device)
    seen = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    hidden = model.hidden(tokens, positions=positions, mask=seen.tril()[:, None]).flatten(0, 1)
    # The output layer is half of the arithmetic at 128,256 ids. It runs only where a token of an ending is predicted.
    losses = token_losses(hidden[predictors], model.output.weight, torch.tensor(targets, device=device))  # (N,)
    return list((-losses).cpu().split([len(ending) for row in rows for ending in row.endings]))


@torch.inference_mode()
def score(
    model: Transformer, examples: Sequence[Example], *, batch_tokens: int = BATCH_TOKENS, show_progress: bool = False
) -> list[list[Tensor]]:
    """Log-probabilities of the tokens of each ending of each example. Computes at most `batch_tokens` at once."""
    scores = [[torch.empty(0)] * len(example.endings) for example in examples]
    # Sorted by length, a batch has little padding. Longest first, memory runs out at the beginning or never.
    rows = sorted(pack(examples, model.config.max_seq_len), key=len, reverse=True)
    with tqdm(total=len(rows), disable=not show_progress, unit="row") as progress:
        while rows:
            batch = rows[: max(1, batch_tokens // len(rows[0]))]
            batch = [row for row in batch if len(row) >= 0.9 * len(batch[0])]  # shorter ones wait: too much padding
            rows = rows[len(batch) :]
            places = [place for row in batch for place in row.places]
            for (i, j), log_probs in zip(places, ending_log_probs(model, batch), strict=True):
                scores[i][j] = log_probs
            progress.update(len(batch))
    return scores


def choose(example: Example, log_probs: Sequence[Tensor]) -> tuple[int, int]:
    """The ending with the highest sum of `log_probs`, and the ending with the highest sum divided by its length."""
    sums = [ending.sum().item() for ending in log_probs]
    lengths = example.lengths or [len(ending) for ending in log_probs]
    norms = [total / length if length else -math.inf for total, length in zip(sums, lengths, strict=True)]
    return sums.index(max(sums)), norms.index(max(norms))


def count_correct(
    model: Transformer,
    examples: Sequence[Example],
    *,
    rank: int = 0,
    world_size: int = 1,
    batch_tokens: int = BATCH_TOKENS,
    show_progress: bool = False,
) -> list[float]:
    """[right by acc, right by acc_norm, examples] of this process's share, which is every `world_size`-th example.

    Sum them over all processes. The first two divided by the last are the accuracies.
    """
    share = examples[rank::world_size]
    scores = score(model, share, batch_tokens=batch_tokens, show_progress=show_progress)
    chosen = [choose(example, log_probs) for example, log_probs in zip(share, scores, strict=True)]
    right = [sum(by[k] == example.label for by, example in zip(chosen, share, strict=True)) for k in (0, 1)]
    return [*map(float, right), float(len(share))]


def as_metrics(counts: list[float]) -> dict:
    """Counts summed over all processes -> the fields of a row in `metrics.jsonl`."""
    correct, correct_norm, examples = counts
    return {
        "hellaswag_acc": correct / examples,
        "hellaswag_acc_norm": correct_norm / examples,
        "hellaswag_examples": int(examples),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a .pt file, or a run directory for its newest checkpoint")
    parser.add_argument("--data", required=True, help="a jsonl file in HellaSwag's format")
    parser.add_argument("--limit", type=int, help="score the first N rows (default: all)")
    parser.add_argument("--style", choices=STYLES, default="gpt2", help="gpt2 or lm-eval, as above (default: gpt2)")
    parser.add_argument(
        "--batch_tokens", type=int, default=BATCH_TOKENS, help=f"tokens computed at once (default: {BATCH_TOKENS})"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    args = parser.parse_args()
    if args.batch_tokens < 1 or (args.limit is not None and args.limit < 1):
        parser.error("--limit and --batch_tokens must be at least 1")
    try:
        device = pick_device(args.device)
        model, checkpoint = load_model(args.checkpoint, device)
        examples = load_examples(args.data, Tokenizer(vocab_size=model.config.vocab_size), args.limit, args.style)
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"hellaswag_utils.py: {error}", file=sys.stderr)
        return 1
    if device.type == "cpu":
        keep_freed_memory()
    dtype = fastest_dtype(device) if checkpoint["config"]["dtype"] == "bfloat16" else torch.float32
    try:
        with autocast(device, dtype):
            counts = count_correct(model, examples, batch_tokens=args.batch_tokens, show_progress=True)
    except torch.OutOfMemoryError as error:
        print(f"hellaswag_utils.py: {error} Halve --batch_tokens; the scores stay the same", file=sys.stderr)
        return 1
    named = {"benchmark": benchmark_name(args.data), "style": args.style, "step": checkpoint["step"]}
    print(json.dumps(named | as_metrics(counts)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
