"""HellaSwag: packed rows against one example at a time, Hugging Face, lm-evaluation-harness. Examples a second.

    python benchmarks/hellaswag.py                                  12 random rows of HellaSwag's lengths: 3 minutes
    python benchmarks/hellaswag.py --data hellaswag_val.jsonl --limit 100
    python benchmarks/hellaswag.py --shape small --rows 200

The ways, each on the same rows:

- ours: `hellaswag_utils.score`.
- one example at a time, on our model: the context with each of its four endings, padded, in one forward pass. It
  computes float32 logits of every position. The system that this project re-creates did this, and build-nanogpt does.
- Hugging Face, batched: LlamaForCausalLM with SDPA, texts sorted by length. It computes logits only from the end of
  the batch's shortest context on (`logits_to_keep`).
- Hugging Face, lm-evaluation-harness's way: a text for each ending, sorted by length, padded on the right, and
  log_softmax over the logits of all positions.

Weights are random. The first two ways share them, and must choose the same endings. The ways take turns. Figures are
medians. The share of the matmul rate counts all arithmetic that a way does, padding included. So it shows how well a
way uses the machine, not how little arithmetic the way needs. On a known GPU, in bfloat16, the rate is the published
peak, so the share is the MFU.
"""

import argparse
import random
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from common import DEVICE, SHAPES, Worker, hugging_face, medians, report, take_turns
from torch import Tensor

import hellaswag_utils
from hardware import dtype_name, fastest_dtype, keep_freed_memory
from hellaswag_utils import Example, choose, load_examples, score
from model import ModelConfig, Transformer
from model_utils import flops_per_token, place_model
from tokenizer import Tokenizer

# Tokens of WikiHow's rows, then of ActivityNet's: mean and deviation of a context, mean and deviation of an ending
LENGTHS = ((65, 11, 39, 10), (25, 8, 14, 6))


def made_up(count: int, vocab_size: int) -> list[Example]:
    """Rows of random ids. Of three rows, two have WikiHow's lengths and one has ActivityNet's, as in the real split."""
    rng = random.Random(0)

    def ids(mean: float, deviation: float) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(max(4, round(rng.gauss(mean, deviation))))]

    lengths = [LENGTHS[i % 3 == 2] for i in range(count)]
    return [Example(ids(c, c_dev), [ids(e, e_dev) for _ in range(4)], 0) for c, c_dev, e, e_dev in lengths]


class Arithmetic:
    """Counts the FLOP of a forward pass: the matrix products of the blocks in `body`, and of the output layer."""

    def __init__(self, config: ModelConfig, body: torch.nn.Module, output: torch.nn.Module):
        self.config, self.flops = config, 0
        with torch.device("meta"):
            model = Transformer(config)
        of_output = model.output.weight.numel()
        attention = 4 * config.n_layers * config.dim  # FLOP of one token for each position in its row
        of_body = flops_per_token(model) / 3 - attention * config.max_seq_len - 2 * of_output

        def count_body(module: torch.nn.Module, inputs: tuple) -> None:
            *_, T, _ = inputs[0].shape
            self.flops += inputs[0].numel() / config.dim * (of_body + attention * T) / config.n_layers

        def count_output(module: torch.nn.Module, inputs: tuple) -> None:
            self.flops += inputs[0].numel() / config.dim * 2 * of_output

        for block in body:
            block.register_forward_pre_hook(count_body)
        output.register_forward_pre_hook(count_output)
        self.count_output = count_output

    def way(self, choices: Callable[[], list[tuple[int, int]]], dtype: str) -> Callable[[], dict]:
        """A function that runs `choices` in `dtype`, and returns its result as "choices" and its FLOP as "flops"."""

        @torch.inference_mode()
        def run() -> dict:
            self.flops = 0
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                chosen = choices()
            return {"flops": self.flops, "choices": chosen}

        return run


def padded(texts: list[list[int]]) -> Tensor:
    """The ids of all texts on DEVICE, (texts, longest text), padded on the right."""
    tokens = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    return tokens.to(DEVICE)


def ours(config: ModelConfig, examples: list[Example], dtype: str) -> dict[str, Callable[[], dict]]:
    """The two ways on our model: packed rows, and one example at a time."""
    keep_freed_memory()  # as hellaswag_utils.py does; the peer's process does it too
    torch.manual_seed(0)
    model = place_model(Transformer(config), DEVICE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 3  # else all tokens are nearly equally likely, and the choices are noise
    arithmetic, token_losses = Arithmetic(config, model.layers, model.output), hellaswag_utils.token_losses

    def counted(*args: Tensor) -> Tensor:  # `score` does not call model.output, so the hook there does not count it
        arithmetic.count_output(model, args)
        return token_losses(*args)

    hellaswag_utils.token_losses = counted

    def packed() -> list[tuple[int, int]]:
        return [choose(e, log_probs) for e, log_probs in zip(examples, score(model, examples), strict=True)]

    def one_at_a_time() -> list[tuple[int, int]]:
        chosen = []
        for example in examples:
            tokens = padded([example.context + ending for ending in example.endings])
            logits = model(tokens)[:, :-1].float()
            losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            losses = losses.view(len(tokens), -1).cpu()
            start = len(example.context) - 1
            log_probs = [-row[start : start + len(e)] for row, e in zip(losses, example.endings, strict=True)]
            chosen.append(choose(example, log_probs))
        return chosen

    return {"ours": arithmetic.way(packed, dtype), "one example at a time": arithmetic.way(one_at_a_time, dtype)}


def theirs(config: ModelConfig, examples: list[Example], dtype: str, batch_size: int) -> dict:
    """The two ways on Hugging Face's model, with batches of `batch_size` texts."""
    keep_freed_memory()
    model = hugging_face(config).eval()
    arithmetic = Arithmetic(config, model.model.layers, model.lm_head)
    texts = [(i, j, e.context, ending) for i, e in enumerate(examples) for j, ending in enumerate(e.endings)]

    def batches(key: Callable) -> Iterator[list[tuple]]:
        ordered = sorted(texts, key=key, reverse=True)
        for start in range(0, len(ordered), batch_size):
            yield ordered[start : start + batch_size]

    def choices(key: Callable, log_probs_of: Callable[[list[tuple]], Iterator[Tensor]]) -> list[tuple[int, int]]:
        scores: list[list] = [[None] * len(e.endings) for e in examples]
        for batch in batches(key):
            for (i, j, *_), log_probs in zip(batch, log_probs_of(batch), strict=True):
                scores[i][j] = log_probs
        return [choose(e, log_probs) for e, log_probs in zip(examples, scores, strict=True)]

    def last_positions(batch: list[tuple]) -> Iterator[Tensor]:
        tokens = padded([context + ending[:-1] for *_, context, ending in batch])
        first = min(len(context) for *_, context, _ in batch) - 1
        logits = model(tokens, use_cache=False, logits_to_keep=tokens.shape[1] - first).logits.float()
        for row, (*_, context, ending) in zip(logits, batch, strict=True):
            start = len(context) - 1 - first
            targets = torch.tensor(ending, device=DEVICE)
            yield -F.cross_entropy(row[start : start + len(ending)], targets, reduction="none").cpu()

    def all_positions(batch: list[tuple]) -> Iterator[Tensor]:
        tokens = padded([context + ending[:-1] for *_, context, ending in batch])
        log_probs = F.log_softmax(model(tokens, use_cache=False).logits, dim=-1, dtype=torch.float32)
        for row, (*_, context, ending) in zip(log_probs, batch, strict=True):
            start = len(context) - 1
            targets = torch.tensor(ending, device=DEVICE)
            yield row[start : start + len(ending)].gather(1, targets[:, None])[:, 0].cpu()

    def total_length(text: tuple) -> int:
        return len(text[2]) + len(text[3])

    def context_then_ending(text: tuple) -> tuple[int, int]:
        return len(text[2]), len(text[3])

    return {
        "Hugging Face, batched": arithmetic.way(lambda: choices(context_then_ending, last_positions), dtype),
        "Hugging Face, lm-evaluation-harness's way": arithmetic.way(
            lambda: choices(total_length, all_positions), dtype
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="original", help="the model (default: original)")
    parser.add_argument("--data", help="a jsonl file in HellaSwag's format (default: random rows of its lengths)")
    parser.add_argument("--limit", type=int, help="take the first N rows of --data (default: all)")
    parser.add_argument("--rows", type=int, default=12, help="random rows, without --data (default: 12)")
    parser.add_argument("--batch_size", type=int, default=8, help="texts at once for Hugging Face (default: 8)")
    default = dtype_name(fastest_dtype(DEVICE))
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default=default,
        help=f"dtype of the matrix products (default: {default}, this device's fastest)",
    )
    parser.add_argument("--turns", type=int, default=3, help="runs of each way (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()
    config = ModelConfig(**SHAPES[args.shape])
    if args.data:
        examples = load_examples(args.data, Tokenizer(vocab_size=config.vocab_size), args.limit)
    else:
        examples = made_up(args.rows, config.vocab_size)
    job = config, examples, args.dtype
    workers = [Worker(ours, *job), Worker(theirs, *job, args.batch_size)]
    rows = {name: r[1:] for name, r in take_turns(workers, args.turns + 1).items()}  # the first warms up
    choices = {name: [row.pop("choices") for row in r] for name, r in rows.items()}
    result = medians(rows)
    same = sum(a == b for a, b in zip(choices["ours"][0], choices["one example at a time"][0], strict=True))
    for row in result.values():
        row["examples_per_sec"] = len(examples) / row["seconds"]
        row["times_one_at_a_time"] = result["one example at a time"]["seconds"] / row["seconds"]
        row["share_of_peak"] = row["flops"] / row["seconds"] / row["peak"]
    result["ours"]["same_choices"] = same
    columns = {
        "examples/s": lambda row: f"{row['examples_per_sec']:.2f}",
        "times one at a time": lambda row: f"{row['times_one_at_a_time']:.2f}",
        "TFLOP": lambda row: f"{row['flops'] / 1e12:.2f}",
        "of the matmul rate": lambda row: f"{row['share_of_peak']:.0%}",
        "peak memory, GiB": lambda row: f"{row['peak_gib']:.1f}",
    }
    title = f"{args.shape}, {len(examples)} rows, {args.dtype}, matmul rate {result['ours']['peak'] / 1e12:.2f} TFLOP/s"
    report(title, columns, result, args.json)
    print(
        f"ours and one at a time chose the same by acc and by acc_norm in {same} of {len(examples)} rows",
        file=sys.stderr,
    )
    if args.dtype == "float32" and same < len(examples):
        sys.exit("in float32 all choices must be the same")


if __name__ == "__main__":
    main()
