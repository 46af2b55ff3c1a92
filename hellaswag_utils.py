"""HellaSwag, and files in the same format: read the rows, encode them, score a model.

    python hellaswag_utils.py --checkpoint runs/mine --data data/hellaswag/hellaswag_val.jsonl
    python hellaswag_utils.py --checkpoint runs/mine --data data/hellaswag/hellaswag_val.jsonl --style lm-eval

A model chooses the ending that is most probable after the context. For `acc`, an ending's score is the sum of the
log-probabilities of its tokens. `acc_norm` divides this sum by the length of the ending, so that short endings have no
advantage. There are two styles:

- `gpt2`, as reproductions of GPT-2 report it (build-nanogpt, llm.c). The context is the row's `ctx`, unchanged. The
  length of an ending is its number of tokens.
- `lm-eval`, as EleutherAI's lm-evaluation-harness 0.4 reports it. The activity label comes before the context.
  WikiHow's bracketed marks are removed. The length of an ending is its number of characters, without the space before
  it. (The harness also has `acc_bytes`, with lengths in bytes. Its hellaswag task does not report it.) Two things
  differ from the harness on purpose. First, text that looks like a control token stays text here, but Hugging Face's
  tokenizers would make it a control token. Second, if an ending is longer than the model's context, this script scores
  its last tokens, but the harness stops.

Both styles put the begin-of-text id first, as every training document and Llama 3's published tokenizer do.

Shape letters: B rows of a batch, T tokens of its longest row, N tokens to score, D model width, V vocabulary.
"""

import codecs
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import threads  # noqa: F401 (it sets how threads wait)

import torch
from torch import Tensor
from tqdm import tqdm

from command_line import FlagParser, at_least, results_of
from files import allow_any_text_in_output
from hardware import dtype_as_trained, keep_freed_memory, pick_device
from json_files import parse_object, shown
from loss import IGNORED, token_losses
from model import Transformer
from model_folders import find_checkpoint
from model_utils import autocast, load_model
from tokenizer import Tokenizer

NUM_ENDINGS = 4
STYLES = {"gpt2": ("ctx",), "lm-eval": ("activity_label", "ctx_a", "ctx_b")}  # a row's text fields, by style
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Example:
    """A row, encoded as token ids."""

    context: list[int]  # the begin-of-text id comes first
    endings: list[list[int]]
    label: int  # index of the true ending
    lengths: list[int] | None = None  # acc_norm divides by these; None: by each ending's number of scored tokens


# ---------------------------------------------------------------- rows and their ids


def iterate_rows(path: str | Path, style: str = "gpt2") -> Iterator[dict]:
    """Yield the rows of a jsonl file in HellaSwag's format. Each row has the fields that `style` reads.

    Blank lines and a byte order mark at the beginning are skipped.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not such a row. The message names the file and the line.
    """
    with open(path, "rb") as file:  # parse_object decodes each line, so the try below also catches a decoding error
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)  # some editors write this mark
            if not line.strip():
                continue
            try:
                row = parse_object(line)
                check_row(row, style)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not a row of HellaSwag ({error}); mend the line") from error
            yield row


def check_row(row: dict, style: str) -> None:
    """Raises ValueError unless an object is a row of HellaSwag, with the fields that `style` reads.

    An ending may be empty. The label is a whole number, or that number in a string, as in the hub's file.
    """
    if missing := [name for name in (*STYLES[style], "endings", "label") if name not in row]:
        raise ValueError(f"{missing[0]} is missing")
    endings, label = row["endings"], row["label"]
    if not isinstance(endings, list) or len(endings) != NUM_ENDINGS:
        raise ValueError(f"endings is {shown(endings)}, not a list of {NUM_ENDINGS} texts")
    for text in (*(row[name] for name in STYLES[style]), *endings):
        if not isinstance(text, str):
            raise ValueError(f"{shown(text)} is not a text")
        text.encode()  # a lone surrogate is half of a character, and a UnicodeEncodeError is a ValueError
    if str(label) not in map(str, range(NUM_ENDINGS)):  # not so for 1.0 and true
        raise ValueError(f"label is {shown(label)}, not 0 to {NUM_ENDINGS - 1}")


def render(row: dict, tokenizer: Tokenizer, style: str = "gpt2") -> Example:
    """Encode a row in `style`. A space joins the context and each ending, and is part of the ending's first token."""
    label = int(row["label"])
    if style == "gpt2":
        endings = [tokenizer.encode(" " + ending) for ending in row["endings"]]
        return Example(tokenizer.encode(row["ctx"], bos=True), endings, label)
    text = _without_brackets(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    # White space at the end of the context belongs to the ending. Encode the context alone to count its tokens. Then
    # encode context and ending together, and drop that many tokens: the rest is the ending.
    context = tokenizer.encode(text.rstrip(), bos=True)
    endings = [_without_brackets(ending) for ending in row["endings"]]
    ids = [tokenizer.encode(f"{text} {ending}", bos=True)[len(context) :] for ending in endings]
    return Example(context, ids, label, lengths=[len(ending) for ending in endings])


def _without_brackets(text: str) -> str:
    """Remove WikiHow's marks, such as [header]. Handles marks and spaces exactly as lm-evaluation-harness does."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def load_examples(
    path: str | Path, tokenizer: Tokenizer, limit: int | None = None, style: str = "gpt2"
) -> list[Example]:
    """Read and encode the first `limit` rows of a file (None: all rows).

    Raises:
        OSError: the file cannot be read.
        ValueError: the file has no rows, or a line is not a row.
    """
    examples = [render(row, tokenizer, style) for row in islice(iterate_rows(path, style), limit)]
    if not examples:
        raise ValueError(f"{path}: holds no rows; load_hellaswag_dataset.py fetches them")
    return examples


def benchmark_name(path: str | Path) -> str:
    """The name for results on this file: HellaSwag if the file's name begins so, else that name as words."""
    stem = Path(path).stem
    return "HellaSwag" if stem.lower().startswith("hellaswag") else stem.replace("_", " ")


# ---------------------------------------------------------------- scores


@dataclass
class PackedRow:
    """A context and several endings. The endings do not see each other, so the model computes the context only once."""

    context: list[int]
    endings: list[list[int]] = field(default_factory=list)
    # For each ending: the index of its example, and the index of the ending in that example
    places: list[tuple[int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        """Number of tokens that the model reads. It predicts the last token of an ending, but does not read it."""
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


def pack(examples: Sequence[Example], max_len: int) -> list[PackedRow]:
    """Pack each example into one row, or into several rows if one would exceed `max_len` tokens.

    If the context with a single ending is too long, the context loses its first tokens. If the ending alone is too
    long, the ending loses its first tokens too. An ending without a token to predict is left out.
    """
    rows = []
    for i, example in enumerate(examples):
        row = None
        for j, ending in enumerate(example.endings):
            ids = (example.context + ending)[-max_len - 1 :]
            start = max(len(ids) - len(ending), 1)  # no earlier token predicts the first one
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
    """Log-probabilities of the tokens of all endings, in order: a float32 tensor on the CPU for each ending."""
    B, T, device = len(rows), max(map(len, rows)), model.output.weight.device
    # Padding comes after the tokens. No token sees a later one, so padding changes no result.
    tokens, positions, segments = torch.zeros(3, B, T, dtype=torch.int64)  # segment 0: the context; 1, 2, ...: endings
    predictors, targets = [], []  # which of the B x T tokens predict, and the ids that each of them should predict
    for b, row in enumerate(rows):
        start = len(row.context)
        tokens[b, :start] = torch.tensor(row.context)
        positions[b, :start] = torch.arange(start)
        predictors.append(b * T + start - 1)  # the context's last token predicts the first token of every ending
        targets.append([ending[0] for ending in row.endings])
        for segment, ending in enumerate(row.endings, start=1):
            end = start + len(ending) - 1
            tokens[b, start:end] = torch.tensor(ending[:-1])
            positions[b, start:end] = len(row.context) + torch.arange(end - start)
            segments[b, start:end] = segment
            predictors += range(b * T + start, b * T + end)
            targets += [[target] for target in ending[1:]]
            start = end
    tokens, positions, segments = tokens.to(device), positions.to(device), segments.to(device)
    seen = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    hidden = model.hidden(tokens, positions=positions, mask=seen.tril()[:, None]).flatten(0, 1)
    # At 128,256 ids the output layer is half of the arithmetic. So run it only where it predicts a token of an ending.
    most = max(map(len, targets))
    padded = torch.tensor([ids + [IGNORED] * (most - len(ids)) for ids in targets], device=device)  # (N, most)
    log_probs = -token_losses(hidden[predictors], model.output.weight, padded).cpu()
    return _by_ending(rows, log_probs)


def _by_ending(rows: Sequence[PackedRow], log_probs: Tensor) -> list[Tensor]:
    """The log-probabilities of each ending, from those of all predictors (N, endings of a row)."""
    endings, end = [], 0
    for row in rows:
        first, end = log_probs[end], end + 1
        for j, ending in enumerate(row.endings):
            start, end = end, end + len(ending) - 1
            endings.append(torch.cat((first[j : j + 1], log_probs[start:end, 0])))
    return endings


@torch.inference_mode()
def score(
    model: Transformer,
    examples: Sequence[Example],
    *,
    batch_tokens: int = BATCH_TOKENS,
    show_progress: bool = False,
    is_stopped: Callable[[], bool] = lambda: False,
) -> list[list[Tensor]]:
    """Log-probabilities of the tokens of each ending of each example, as float32 tensors on the CPU.

    A batch has at most `batch_tokens` tokens, padding included, but at least one row. Where `is_stopped` says True
    between two batches, the rest of the scores stays empty.
    """
    scores = [[torch.empty(0)] * len(example.endings) for example in examples]
    # Rows of similar length need little padding. The longest rows come first: if memory runs out, it does so early.
    rows = sorted(pack(examples, model.config.max_seq_len), key=len, reverse=True)
    with tqdm(total=len(rows), disable=not show_progress, unit="row") as progress:
        while rows and not is_stopped():
            batch = rows[: max(1, batch_tokens // len(rows[0]))]
            batch = [row for row in batch if len(row) >= 0.9 * len(batch[0])]  # shorter rows wait: too much padding
            rows = rows[len(batch) :]
            places = [place for row in batch for place in row.places]
            for (i, j), log_probs in zip(places, ending_log_probs(model, batch), strict=True):
                scores[i][j] = log_probs
            progress.update(len(batch))
    return scores


def choose(example: Example, log_probs: Sequence[Tensor]) -> tuple[int, int]:
    """Index of the ending with the highest sum of `log_probs`, and of the ending with the highest sum / length.

    The length is that of `example.lengths`, or else the number of log-probabilities. Length 0 counts as the lowest.
    """
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
    is_stopped: Callable[[], bool] = lambda: False,
) -> list[float]:
    """Count the right choices in this process's share of the examples: every `world_size`-th, from number `rank`.

    Returns [right by acc, right by acc_norm, examples]. To get the accuracies, sum these over all processes, and divide
    the first two sums by the third. If `is_stopped` has said True, they mean nothing.
    """
    share = examples[rank::world_size]
    scores = score(model, share, batch_tokens=batch_tokens, show_progress=show_progress, is_stopped=is_stopped)
    chosen = [choose(example, log_probs) for example, log_probs in zip(share, scores, strict=True)]
    right = [sum(pair[k] == example.label for pair, example in zip(chosen, share, strict=True)) for k in (0, 1)]
    return [*map(float, right), float(len(share))]


def as_metrics(counts: list[float]) -> dict:
    """Turn the counts of `count_correct`, summed over all processes, into fields for a row of `metrics.jsonl`."""
    correct, correct_norm, examples = counts
    return {
        "hellaswag_acc": correct / examples,
        "hellaswag_acc_norm": correct_norm / examples,
        "hellaswag_examples": int(examples),
    }


def check_file(path: str) -> None:
    """Raises FileNotFoundError if there is no file at `path`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; `python load_hellaswag_dataset.py` fetches HellaSwag")


def command_line() -> FlagParser:
    parser = FlagParser(description=__doc__)
    words = "a checkpoint, a run directory for its newest one, or a Llama 3 in Hugging Face's layout"
    parser.add_argument("--checkpoint", required=True, help=words)
    parser.add_argument("--data", required=True, help="a jsonl file in HellaSwag's format")
    parser.add_argument("--limit", type=at_least(1), help="score the first N rows (default: all)")
    parser.add_argument("--style", choices=STYLES, default="gpt2", help="gpt2 or lm-eval, as above (default: gpt2)")
    parser.add_argument(
        "--batch_tokens",
        type=at_least(1),
        default=BATCH_TOKENS,
        help="tokens computed at once (default: %(default)s)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    return parser


def main() -> int:
    allow_any_text_in_output()
    args = command_line().parse_args()
    try:
        device, *_ = results_of(
            partial(pick_device, args.device), partial(find_checkpoint, args.checkpoint), partial(check_file, args.data)
        )
        model, checkpoint = load_model(args.checkpoint, device)
        examples = load_examples(args.data, Tokenizer(vocab_size=model.config.vocab_size), args.limit, args.style)
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"hellaswag_utils.py: {error}", file=sys.stderr)
        return 1
    if device.type == "cpu":
        keep_freed_memory()
    try:
        with autocast(device, dtype_as_trained(device, checkpoint["dtype"])):
            counts = count_correct(model, examples, batch_tokens=args.batch_tokens, show_progress=True)
    except torch.OutOfMemoryError as error:
        print(f"hellaswag_utils.py: {error} Halve --batch_tokens; the scores stay the same", file=sys.stderr)
        return 1
    source = {"benchmark": benchmark_name(args.data), "style": args.style, "step": checkpoint["step"]}
    print(json.dumps(source | as_metrics(counts)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
