"""One optimizer step against Hugging Face's Llama: tokens a second, share of the matmul rate, peak memory.

    python benchmarks/train_step.py                                   train.py's shape, 4 x 1,024 tokens: 20 minutes
    python benchmarks/train_step.py --shape small --batch_size 16 --seq_len 256
    python benchmarks/train_step.py --accumulation 4                  four micro-steps a step
    python benchmarks/train_step.py --cold                            compile anew, without the cache on the disk

Both models run in the dtype that this device multiplies fastest, uncompiled and compiled. Hugging Face's model runs
with its own loss, in one graph, with SDPA and with its own ("eager") attention. Both use fused AdamW, clip the
gradient's norm at 1, scale the loss in float16, and keep freed memory. Each of Hugging Face's ways has a short trial,
and the fastest of them takes turns with ours. Figures are medians. The first step compiles, so it has a column of its
own.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
from common import ATTENTION, DEVICE, SHAPES, Worker, hugging_face, medians, report, take_turns, try_ways

from hardware import dtype_name, fastest_dtype, keep_freed_memory
from model import ModelConfig, Transformer
from model_utils import MixedPrecision, autocast, compile_blocks, flops_per_token, place_model

# How each way compiles: the end of its name, and what torch.compiler.set_stance takes
STANCES = {", compiled": "default", "": "force_eager"}


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    """The optimizer of `--optimizer adamw`, for a model of any kind."""
    return torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def make_update(
    optimizer: torch.optim.Optimizer,
    losses: dict[str, Callable],
    config: ModelConfig,
    shape: tuple[int, int],
    accumulation: int,
) -> Callable[..., dict]:
    """A function that does one update as train.py does, on random tokens. It returns the seconds of the update.

    `losses` has a function for each dtype: tokens and targets, each of `shape` (B, T) -> loss.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    scalers = {dtype: torch.amp.GradScaler(DEVICE.type, enabled=dtype == "float16") for dtype in losses}

    def update(dtype: str, stance: str) -> dict[str, float]:
        began, scaler = time.perf_counter(), scalers[dtype]
        with torch.compiler.set_stance(stance):
            for _ in range(accumulation):
                tokens, targets = torch.randint(config.vocab_size, (2, *shape), device=DEVICE)
                loss = losses[dtype](tokens, targets)
                scaler.scale(loss / accumulation).backward()
        loss.item()  # waits until a GPU is done
        computed = time.perf_counter()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        end = time.perf_counter()
        return {"seconds": end - began, "optimizer_seconds": end - computed}

    return update


def ways(
    update: Callable[..., dict], names: dict[str, str], hows: Iterable[str], steps: int
) -> dict[str, Callable[[], dict]]:
    """A way for each dtype and each of `hows`, keys of STANCES. `names` has the first part of the way's name, by dtype.

    A turn does `steps` updates, and the last one counts. The updates before it bring memory to the state of a long run.
    """

    def turn(dtype: str, stance: str) -> dict[str, float]:
        results = [update(dtype, stance) for _ in range(steps)]
        return results[-1] | {"first_step_seconds": results[0]["seconds"]}

    return {f"{name}{how}": partial(turn, dtype, STANCES[how]) for dtype, name in names.items() for how in hows}


def ours(config: ModelConfig, shape: tuple[int, int], accumulation: int, dtypes: list[str], steps: int) -> dict:
    """The ways of our model."""
    keep_freed_memory()  # as train.py does
    model = place_model(Transformer(config), DEVICE)
    compile_blocks(model)
    optimizer = adamw(model)
    losses = {dtype: MixedPrecision(model, getattr(torch, dtype), [optimizer]) for dtype in dtypes}
    update = make_update(optimizer, losses, config, shape, accumulation)
    return ways(update, {dtype: f"ours, {dtype}" for dtype in dtypes}, STANCES, steps)


def theirs(
    config: ModelConfig,
    shape: tuple[int, int],
    accumulation: int,
    dtypes: list[str],
    steps: int,
    attention: str,
    how: str,
) -> dict:
    """The ways of Hugging Face's model with one kind of ATTENTION and one of STANCES."""
    keep_freed_memory()  # as ours, so that the peaks can be compared
    model = hugging_face(config, attention).train()

    @torch.compile(dynamic=False)
    def compiled(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return model(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False).loss

    def loss_of(dtype: str, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with autocast(DEVICE, getattr(torch, dtype)):
            return compiled(tokens, targets)

    losses = {dtype: partial(loss_of, dtype) for dtype in dtypes}
    update = make_update(adamw(model), losses, config, shape, accumulation)
    return ways(update, {dtype: f"Hugging Face, {dtype}, {attention}" for dtype in dtypes}, [how], steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="original", help="the model (default: original)")
    parser.add_argument("--batch_size", type=int, default=4, help="sequences a micro-step (default: 4)")
    parser.add_argument("--seq_len", type=int, default=1024, help="tokens a sequence (default: 1024)")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-steps a step (default: 1)")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=["float32", "bfloat16", "float16"],
        default=[dtype_name(fastest_dtype(DEVICE))],
        help="dtypes of the matrix products (default: the one that this device multiplies fastest)",
    )
    parser.add_argument("--steps", type=int, default=2, help="steps a turn, of which the last counts (default: 2)")
    parser.add_argument("--turns", type=int, default=3, help="turns of each way (default: 3)")
    parser.add_argument("--cold", action="store_true", help="compile anew, without the cache on the disk")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()
    config = ModelConfig(**SHAPES[args.shape], max_seq_len=args.seq_len)
    job = config, (args.batch_size, args.seq_len), args.accumulation, args.dtypes, args.steps
    tokens = args.batch_size * args.seq_len * args.accumulation
    with torch.device("meta"):
        flops = tokens * flops_per_token(Transformer(config))
    with tempfile.TemporaryDirectory() as cold:
        if args.cold:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cold
        makers = [(theirs, *job, attention, how) for how in reversed(STANCES) for attention in ATTENTION]
        # Only the first step compiles, and only the last step of a turn counts.
        peers, tried = try_ways(makers, first_counts=args.steps > 1, groups=args.dtypes)
        rows = take_turns([Worker(ours, *job), *peers], args.turns + 1)  # the first turn compiles
    result = medians({name: r[1:] for name, r in rows.items()})
    for name, row in result.items():
        row["first_step_seconds"] = rows[name][0]["first_step_seconds"]
        row["tokens_per_sec"] = tokens / row["seconds"]
        row["share_of_peak"] = flops / row["seconds"] / row["peak"]
    columns = {
        "tokens/s": lambda row: f"{row['tokens_per_sec']:,.0f}",
        "seconds": lambda row: f"{row['seconds']:.2f}",
        "of the matmul rate": lambda row: f"{row['share_of_peak']:.0%}",
        "peak memory, GiB": lambda row: f"{row['peak_gib']:.1f}",
        "optimizer, s": lambda row: f"{row['optimizer_seconds']:.2f}",
        "first step, s": lambda row: f"{row['first_step_seconds']:.0f}",
    }
    title = f"{args.shape}, {args.batch_size} x {args.seq_len} tokens x {args.accumulation} micro-steps"
    report(title, columns, result, args.json, tried)


if __name__ == "__main__":
    main()
