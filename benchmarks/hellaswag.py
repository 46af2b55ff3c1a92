"""HellaSwag: packed rows against one example at a time, Hugging Face, lm-evaluation-harness. Examples a second.

    python benchmarks/hellaswag.py                                  12 random rows of HellaSwag's lengths: 3 minutes
    python benchmarks/hellaswag.py --data hellaswag_val.jsonl --limit 100
    python benchmarks/hellaswag.py --shape small --rows 200

The ways, each on the same rows:

- ours: `hellaswag_utils.score`.
- one example at a time, on our model: the context with each of its four endings, padded, in one forward pass. It
  computes float32 logits of every position. The system that this project re-creates did this, and build-nanogpt does.
- Hugging Face, batched: LlamaForCausalLM, texts sorted by length. It computes logits only from the end of the batch's
  shortest context on (`logits_to_keep`).
- Hugging Face, lm-evaluation-harness: the same model in the harness's own scorer, `HFLM`. It takes the log_softmax of
  the logits of all positions. This way needs `pip install lm_eval accelerate`.

Hugging Face's model has its faster attention of SDPA and eager, by a trial on one batch.

Weights are random. The first two ways share them, and must choose the same endings. So do the last two. The ways take
turns. Figures are medians. The share of the matmul rate counts all arithmetic that a way does, padding included. So it
shows how well a way uses the machine, not how little arithmetic the way needs. On a known GPU, in bfloat16, the rate is
the published peak, so the share is the MFU.
"""

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from common import DEVICE, SHAPES, Worker, hugging_face, medians, report, take_turns
from torch import Tensor

import hellaswag_utils
from hardware import dtype_name, fastest_dtype, keep_freed_memory
from hellaswag_utils import Example, choose, load_examples, score
from model import ModelConfig, Transformer
from model_utils import autocast, flops_per_token, place_model
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
            with autocast(DEVICE, getattr(torch, dtype)):
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
    """The ways on Hugging Face's model, with batches of `batch_size` texts."""
    keep_freed_memory()
    model = hugging_face(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 3  # as for our model
    take_faster_attention(model, examples, dtype, batch_size)
    arithmetic = Arithmetic(config, model.model.layers, model.lm_head)
    texts = [(i, j, e.context, ending) for i, e in enumerate(examples) for j, ending in enumerate(e.endings)]
    texts.sort(key=lambda text: (len(text[2]), len(text[3])), reverse=True)

    def last_positions(batch: list[tuple]) -> Iterator[Tensor]:
        tokens = padded([context + ending[:-1] for *_, context, ending in batch])
        first = min(len(context) for *_, context, _ in batch) - 1
        logits = model(tokens, use_cache=False, logits_to_keep=tokens.shape[1] - first).logits.float()
        for row, (*_, context, ending) in zip(logits, batch, strict=True):
            start = len(context) - 1 - first
            targets = torch.tensor(ending, device=DEVICE)
            yield -F.cross_entropy(row[start : start + len(ending)], targets, reduction="none").cpu()

    def batched() -> list[tuple[int, int]]:
        scores: list[list] = [[None] * len(e.endings) for e in examples]
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            for (i, j, *_), log_probs in zip(batch, last_positions(batch), strict=True):
                scores[i][j] = log_probs
        return [choose(e, log_probs) for e, log_probs in zip(examples, scores, strict=True)]

    ways = {"Hugging Face, batched": batched}
    if find_spec("lm_eval") and find_spec("accelerate"):
        ways["Hugging Face, lm-evaluation-harness"] = harness(model, examples, batch_size)
    else:
        print("lm-evaluation-harness's scorer is left out: pip install lm_eval accelerate", file=sys.stderr)
    return {name: arithmetic.way(choices, dtype) for name, choices in ways.items()}


def take_faster_attention(model: torch.nn.Module, examples: Sequence[Example], dtype: str, batch_size: int) -> None:
    """Set Hugging Face's attention to SDPA or eager, whichever takes less time for a batch of the longest texts."""
    texts = sorted((e.context + ending for e in examples for ending in e.endings), key=len, reverse=True)
    tokens, seconds = padded(texts[:batch_size]), {"sdpa": math.inf, "eager": math.inf}
    for name in 3 * list(seconds):  # the first times are slow, so the least counts
        model.set_attn_implementation(name)
        with torch.inference_mode(), autocast(DEVICE, getattr(torch, dtype)):
            began = time.perf_counter()
            model.model(tokens, use_cache=False)[0].sum().item()  # .item() waits for the device
        seconds[name] = min(seconds[name], time.perf_counter() - began)
    fastest = min(seconds, key=seconds.__getitem__)
    print(f"Hugging Face's attention: {fastest} of {seconds}", file=sys.stderr)
    model.set_attn_implementation(fastest)


def harness(model: torch.nn.Module, examples: Sequence[Example], batch_size: int) -> Callable[[], list]:
    """A function that lets lm-evaluation-harness score all texts. It returns the choices."""
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer as Vocabulary
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    # The texts are ids already, so a tokenizer of one token will do.
    vocabulary = Vocabulary(WordLevel({"<end>": 0}, unk_token="<end>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="<end>", pad_token="<end>")
    scorer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    # A request is a pair of texts, which is not read, and the ids of both.
    requests = [((str(i), str(j)), e.context, ids) for i, e in enumerate(examples) for j, ids in enumerate(e.endings)]

    def choices() -> list[tuple[int, int]]:
        sums = iter(scorer._loglikelihood_tokens(requests, disable_tqdm=True))  # a sum and a flag for each request
        chosen = []
        for e in examples:
            log_probs = [torch.tensor([next(sums)[0]]) for _ in e.endings]
            chosen.append(choose(replace(e, lengths=e.lengths or [len(ids) for ids in e.endings]), log_probs))
        return chosen

    return choices


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

    def count_same(a: str, b: str) -> int:
        return sum(x == y for x, y in zip(choices[a][0], choices[b][0], strict=True))

    same = count_same("ours", "one example at a time")
    peers = [name for name in result if name.startswith("Hugging Face")]
    same_of_peers = count_same(peers[0], peers[-1])
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
    print(f"and {' and '.join(peers)} in {same_of_peers}", file=sys.stderr)
    if args.dtype == "float32" and min(same, same_of_peers) < len(examples):
        sys.exit("in float32 all choices must be the same")


if __name__ == "__main__":
    main()
