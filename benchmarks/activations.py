"""What --activation_checkpointing saves and costs: the peak memory and the time of a training step with each value.

    python benchmarks/activations.py                                    the small shape, 32 x 256 tokens: a minute
    python benchmarks/activations.py --shape original --batch_size 4 --seq_len 1024

The peer is `none`. Each value has a process of its own, and they take turns. All are compiled, in the dtype that this
device multiplies fastest. Figures are medians.
"""

import argparse

import torch
from common import DEVICE, SHAPES, Worker, medians, report, take_turns
from train_step import adamw, make_update, ways

from hardware import dtype_name, fastest_dtype, keep_freed_memory
from model import ModelConfig, Transformer
from model_utils import MixedPrecision, checkpoint_activations, compile_blocks, place_model

VALUES = ("none", "blocks", "all")


def make_ways(config: ModelConfig, shape: tuple[int, int], value: str, steps: int) -> dict:
    """The way of one value of the flag: updates of the model on tokens of `shape` (B, T)."""
    keep_freed_memory()  # as train.py does
    dtype = dtype_name(fastest_dtype(DEVICE))
    model = place_model(Transformer(config), DEVICE)
    compile_blocks(model)
    checkpoint_activations(model, value)
    optimizer = adamw(model)
    losses = {dtype: MixedPrecision(model, getattr(torch, dtype), [optimizer])}
    update = make_update(optimizer, losses, config, shape, accumulation=1)
    return ways(update, {dtype: value}, [", compiled"], steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small", help="the model (default: small)")
    parser.add_argument("--batch_size", type=int, default=32, help="sequences a step (default: 32)")
    parser.add_argument("--seq_len", type=int, default=256, help="tokens a sequence (default: 256)")
    parser.add_argument("--steps", type=int, default=2, help="steps a turn, of which the last counts (default: 2)")
    parser.add_argument("--turns", type=int, default=3, help="turns of each value (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()
    config = ModelConfig(**SHAPES[args.shape], max_seq_len=args.seq_len)
    job = config, (args.batch_size, args.seq_len)
    rows = take_turns([Worker(make_ways, *job, value, args.steps) for value in VALUES], args.turns + 1)
    result = medians({name: r[1:] for name, r in rows.items()})  # the first turn compiles
    first = next(iter(result.values()))  # none
    columns = {
        "seconds": lambda row: f"{row['seconds']:.2f}",
        "of none": lambda row: f"{row['seconds'] / first['seconds']:.2f}",
        "peak memory, GiB": lambda row: f"{row['peak_gib']:.2f}",
        "of none's": lambda row: f"{row['peak_gib'] / first['peak_gib']:.2f}",
    }
    report(f"{args.shape}, {args.batch_size} x {args.seq_len} tokens", columns, result, args.json)


if __name__ == "__main__":
    main()
