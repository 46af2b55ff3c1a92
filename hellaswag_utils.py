"""HellaSwag, and files in its format: iterate over the rows, render them to ids, score a model.

    python hellaswag_utils.py --checkpoint runs/mine --data data/hellaswag/hellaswag_val.jsonl

A language model answers by the ending that it finds likeliest behind the context. `acc` takes the highest sum of the
ending's log-probabilities; `acc_norm` the highest mean a token, as reproductions of GPT-2 report it, so that
short endings have no advantage.

Shape letters: B texts of one batch (four a row), T tokens of the longest.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from model import Transformer
from model_utils import load_model, pick_device
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Example:
    context: list[int]  # ids, the begin-of-text id first, as every training document has it
    endings: list[list[int]]
    label: int  # the true ending's place


def iterate_rows(path: str | Path) -> Iterator[dict]:
    """Rows of a jsonl file in HellaSwag's format.

    Raises:
        ValueError: a line is no row; the message names file and line.
    """
    with open(path, "rb") as file:  # json decodes, and answers bytes that are no UTF-8 as it does all else
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                valid = isinstance(row["ctx"], str) and isinstance(row["endings"], list)
                valid = valid and all(isinstance(ending, str) for ending in row["endings"])
                valid = valid and int(row["label"]) in range(len(row["endings"]))
            except (ValueError, KeyError, TypeError, OverflowError):  # the last: a label of Infinity
                valid = False
            if not valid:
                raise ValueError(f"{path}, line {number}: not a row of HellaSwag (ctx, endings, label); mend the line")
            yield row


def render(row: dict, tokenizer: Tokenizer) -> Example:
    """Ids of a row; a space joins context and ending, and belongs to the ending's first token."""
    endings = [tokenizer.encode(" " + ending) for ending in row["endings"]]
    return Example(tokenizer.encode(row["ctx"], bos=True), endings, int(row["label"]))


def load_examples(path: str | Path, tokenizer: Tokenizer, limit: int | None = None) -> list[Example]:
    """The first `limit` rows of a file (None: all), rendered.

    Raises:
        ValueError: there are none, or a line is no row.
    """
    examples = [render(row, tokenizer) for row in islice(iterate_rows(path), limit)]
    if not examples:
        raise ValueError(f"{path}: holds no rows; load_hellaswag_dataset.py fetches them")
    return examples


def benchmark_name(path: str | Path) -> str:
    """What to call results on this file: HellaSwag is only HellaSwag's own."""
    stem = Path(path).stem
    return "HellaSwag" if stem.lower().startswith("hellaswag") else stem.replace("_", " ")


def ending_log_probs(model: Transformer, texts: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
    """Log-probability of each ending token, for (context, ending) pairs; texts too long lose their beginning."""
    device, longest = model.output.weight.device, model.config.max_seq_len + 1
    texts = [((context + ending)[-longest:], min(len(ending), longest - 1)) for context, ending in texts]
    tokens = torch.zeros(len(texts), max(len(ids) for ids, _ in texts) - 1, dtype=torch.int64)
    rows, columns, targets = [], [], []
    for row, (ids, ending_len) in enumerate(texts):
        tokens[row, : len(ids) - 1] = torch.tensor(ids[:-1])  # padding follows, where causal attention never looks
        rows += [row] * ending_len
        columns += range(len(ids) - 1 - ending_len, len(ids) - 1)
        targets += ids[-ending_len:]
    # The output layer, most of the arithmetic at 128,256 ids, runs at the endings' positions alone.
    hidden = model.hidden(tokens.to(device))[rows, columns]  # (endings' tokens, D)
    logits = model.output(hidden).float()
    log_probs = -F.cross_entropy(logits, torch.tensor(targets, device=device), reduction="none").cpu()
    return list(log_probs.split([ending_len for _, ending_len in texts]))


@torch.inference_mode()
def count_correct(
    model: Transformer,
    examples: Sequence[Example],
    *,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 16,
    show_progress: bool = False,
) -> list[float]:
    """[right by acc, right by acc_norm, examples] over this process's share, every `world_size`-th example.

    The sum over all processes, divided by its last element, is the result. `batch_size` is in examples.
    """
    # By length, so that a batch has little padding; longest first, so that memory runs out at once or never.
    mine = sorted(examples[rank::world_size], key=lambda e: -len(e.context) - max(map(len, e.endings)))
    counts = [0.0, 0.0, 0.0]
    for i in tqdm(range(0, len(mine), batch_size), disable=not show_progress, unit="batch"):
        batch = mine[i : i + batch_size]
        scores = iter(ending_log_probs(model, [(e.context, ending) for e in batch for ending in e.endings]))
        for example in batch:
            log_probs = [next(scores) for _ in example.endings]
            by_sum = max(range(len(log_probs)), key=lambda j: log_probs[j].sum().item())
            by_mean = max(range(len(log_probs)), key=lambda j: log_probs[j].mean().item())
            right = (by_sum == example.label, by_mean == example.label, True)
            counts = [count + one for count, one in zip(counts, right, strict=True)]
    return counts


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
    parser.add_argument("--batch_size", type=int, default=16, help="rows scored at once (default: 16)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    args = parser.parse_args()
    if args.batch_size < 1 or (args.limit is not None and args.limit < 1):
        parser.error("--limit and --batch_size must be at least 1")
    try:
        device = pick_device(args.device)
        model, checkpoint = load_model(args.checkpoint, device)
        examples = load_examples(args.data, Tokenizer(vocab_size=model.config.vocab_size), args.limit)
    except (ValueError, OSError) as error:
        print(f"hellaswag_utils.py: {error}", file=sys.stderr)
        return 1
    with torch.autocast(device.type, torch.bfloat16, enabled=checkpoint["config"]["dtype"] == "bfloat16"):
        counts = count_correct(model, examples, batch_size=args.batch_size, show_progress=True)
    print(json.dumps({"benchmark": benchmark_name(args.data), "step": checkpoint["step"], **as_metrics(counts)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
