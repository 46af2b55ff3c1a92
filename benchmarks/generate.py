"""Text generation against Hugging Face's `generate`: tokens a second, shares of the machine's limits, peak memory.

    python benchmarks/generate.py                          4 prompts, 128 new tokens each: 10 minutes on two cores
    python benchmarks/generate.py --batch_size 1 --new_tokens 32 --sampling greedy
    python benchmarks/generate.py --dtypes bfloat16 --new_tokens 8 --turns 1     for hardware without bf16

The prompts have 16, 32, ... tokens and form one batch. No row ends early. Hugging Face's model uses SDPA and its own
("eager") attention, each with its dynamic cache, and also with its static cache and a compiled step. The ways take
turns. Figures are medians. The first turn compiles, so it has a column of its own.

Prefill is the time until the first id of all rows. Decoding is the rest, a step for each further id.

There are two limits: the speed of matrix products, and the speed of memory. A step reads all weights once, except the
embedding's. The table shows this reading, while decoding, as a share of the memory's rate. The script measures that
rate right after each way, with a sum over the weights of the output layer.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from common import DEVICE, Worker, hugging_face, medians, report, take_turns

from generate import generate
from hardware import dtype_name, fastest_dtype
from model import ModelConfig, Transformer
from model_utils import cast_parameters, place_model

SAMPLING = {"greedy": {"temperature": 0.0}, "sampled": {"temperature": 0.8, "top_p": 0.95}}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CONFIG = ModelConfig(dim=512, n_layers=8, n_heads=8, n_kv_heads=4, vocab_size=128_256)


@dataclass
class Job:
    """What each worker generates."""

    dtype: str  # of weights and cache
    sampling: list[str]
    new_tokens: int
    batch_size: int

    def prompts(self) -> list[list[int]]:
        """Prompts of 16, 32, ... random ids, the same at every call."""
        generator = torch.Generator().manual_seed(0)
        lengths = range(16, 16 * self.batch_size + 1, 16)
        return [torch.randint(CONFIG.vocab_size, (length,), generator=generator).tolist() for length in lengths]


def sharpen(output: torch.nn.Linear) -> None:
    """Scale the logits to a standard deviation of 4, as in a trained model. Random weights make such similar
    logits that the nucleus would be nine tenths of the vocabulary instead of tens of ids."""
    with torch.no_grad():
        output.weight.mul_(4 / (0.02 * output.in_features**0.5))


class Clock:
    """Notes when the first id of all rows is there."""

    def __init__(self):
        self.began, self.first = now(), 0.0

    def note(self) -> bool:
        """Call this after each id. Returns False: generation shall go on."""
        self.first = self.first or now() - self.began
        return False


def now() -> float:
    """The time when all work so far is done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measured(work: Callable[[Clock], None], weight: torch.Tensor) -> dict[str, float]:
    """The "seconds" of `work`, the "prefill_seconds" of them, and the memory's "read_rate" in bytes a second, measured
    right after on `weight`."""
    clock = Clock()
    work(clock)
    result = {"seconds": now() - clock.began, "prefill_seconds": clock.first}
    words = weight.detach().view(torch.float32)  # bf16 in pairs, so that reading takes the time, not adding
    reads = []
    for _ in range(5):
        began = now()
        words.sum()
        reads.append(now() - began)
    return result | {"read_rate": words.nbytes / min(reads)}


def ours(job: Job) -> dict[str, Callable[[], dict]]:
    """Our ways: one for each sampling."""
    model = place_model(Transformer(CONFIG), DEVICE).eval()
    cast_parameters(model, DTYPES[job.dtype])
    sharpen(model.output)
    prompts = job.prompts()

    def work(settings: dict, clock: Clock) -> None:
        rows = generate(model, prompts, max_new_tokens=job.new_tokens, is_stopped=clock.note, **settings)
        assert [len(row) for row in rows] == [job.new_tokens] * job.batch_size

    return {
        f"ours, {job.dtype}, {name}": partial(measured, partial(work, SAMPLING[name]), model.output.weight)
        for name in job.sampling
    }


def theirs(job: Job, attention: str) -> dict[str, Callable[[], dict]]:
    """Hugging Face's ways with one kind of attention: one for each sampling and each cache. Prompts are padded on the
    left."""
    from transformers import CompileConfig

    model = hugging_face(CONFIG).to(DTYPES[job.dtype]).eval()
    model.set_attn_implementation(attention)
    sharpen(model.lm_head)
    prompts = job.prompts()
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=DEVICE)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=DEVICE)
    compiled = CompileConfig(mode="default" if DEVICE.type == "cpu" else "reduce-overhead")
    compiled._compile_all_devices = True  # without this it compiles only on GPUs
    caches = {
        "dynamic cache": {},
        "static cache, compiled": {"cache_implementation": "static", "compile_config": compiled},
    }

    def work(settings: dict, cache: dict, clock: Clock) -> None:
        draw = {"do_sample": True, "top_k": 0, **settings} if settings["temperature"] else {"do_sample": False}
        ids = model.generate(
            padded,
            attention_mask=mask,
            max_new_tokens=job.new_tokens,
            pad_token_id=0,
            stopping_criteria=[lambda ids, scores, **_: torch.full((len(ids),), clock.note(), device=DEVICE)],
            **draw,
            **cache,
        )
        assert ids.shape == (job.batch_size, longest + job.new_tokens)

    return {
        f"Hugging Face, {job.dtype}, {name}, {attention}, {kind}": partial(
            measured, partial(work, SAMPLING[name], cache), model.lm_head.weight
        )
        for name in job.sampling
        for kind, cache in caches.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=4, help="prompts (default: 4)")
    parser.add_argument("--new_tokens", type=int, default=128, help="new tokens for each prompt (default: 128)")
    fastest = dtype_name(fastest_dtype(DEVICE))
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=[fastest], help=f"of weights and cache (default: {fastest})"
    )
    parser.add_argument(
        "--sampling",
        nargs="+",
        choices=SAMPLING,
        default=list(SAMPLING),
        help="how ids are chosen (default: both)",
    )
    parser.add_argument("--turns", type=int, default=2, help="turns of each way (default: 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()
    if args.new_tokens < 2:
        parser.error(f"--new_tokens {args.new_tokens}: must be at least 2, because the first one is the prefill's")
    jobs = [Job(dtype, args.sampling, args.new_tokens, args.batch_size) for dtype in args.dtypes]
    workers = [Worker(*make) for job in jobs for make in ((ours, job), (theirs, job, "sdpa"), (theirs, job, "eager"))]
    rows = take_turns(workers, args.turns + 1)  # the first turn compiles
    result = medians({name: r[1:] for name, r in rows.items()})
    with torch.device("meta"):
        model = Transformer(CONFIG)
    weights = sum(p.numel() for p in model.parameters()) - model.tok_embeddings.weight.numel()
    for name, row in result.items():
        size = 4 if "float32" in name else 2  # bytes
        row["first_turn_seconds"] = rows[name][0]["seconds"]
        row["tokens_per_sec"] = args.batch_size * args.new_tokens / row["seconds"]
        row["step_seconds"] = (row["seconds"] - row["prefill_seconds"]) / (args.new_tokens - 1)
        row["share_of_read_rate"] = size * weights / row["step_seconds"] / row["read_rate"]
        row["share_of_peak"] = 2 * weights * row["tokens_per_sec"] / row["peak"]
    columns = {
        "tokens/s": lambda row: f"{row['tokens_per_sec']:,.0f}",
        "prefill, ms": lambda row: f"{row['prefill_seconds'] * 1000:.0f}",
        "a step, ms": lambda row: f"{row['step_seconds'] * 1000:.1f}",
        "of the memory's rate": lambda row: f"{row['share_of_read_rate']:.0%} of {row['read_rate'] / 1e9:.0f} GB/s",
        "of the matmul rate": lambda row: f"{row['share_of_peak']:.0%}",
        "peak memory, GiB": lambda row: f"{row['peak_gib']:.1f}",
        "first turn, s": lambda row: f"{row['first_turn_seconds']:.0f}",
    }
    title = f"dim {CONFIG.dim}, {CONFIG.n_layers} layers, {args.batch_size} x {args.new_tokens} tokens"
    report(title, columns, result, args.json)


if __name__ == "__main__":
    main()
