"""The cost of `document_mask`: training steps of the small shape with the mask and without it, in turns.

python benchmarks/document_mask.py                                    4 x 1,024 tokens
python benchmarks/document_mask.py --batch_size 16 --seq_len 256
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from common import DEVICE, SHAPES, Worker, medians, report, take_turns
from torch import Tensor
from train_step import adamw, make_update

from cuda_kernels import use_document_blocks
from hardware import dtype_name, fastest_dtype, keep_freed_memory
from model import ModelConfig, Transformer, document_positions
from model_utils import MixedPrecision, compile_blocks, place_model

BOS = 0  # any id would do, because all ids are random


def ways(shape: tuple[int, int], document_tokens: int) -> dict[str, Callable[[], dict]]:
    """Two ways of a training step on random tokens of `shape` (B, T): with the mask and without it.

    `document_tokens` is the average length of a document.
    """
    keep_freed_memory()  # as train.py does
    config = ModelConfig(**SHAPES["small"], max_seq_len=shape[1])
    model = place_model(Transformer(config), DEVICE)
    compile_blocks(model)
    if DEVICE.type == "cuda":
        use_document_blocks(model, fastest_dtype(DEVICE), partial(print, file=sys.stderr))
    optimizers = [adamw(model)]
    mixed = MixedPrecision(model, fastest_dtype(DEVICE), optimizers)
    dtype = dtype_name(fastest_dtype(DEVICE))

    def loss_of(masked: bool, tokens: Tensor, targets: Tensor) -> Tensor:
        tokens[torch.rand(shape, device=DEVICE) < 1 / document_tokens] = BOS
        return mixed(tokens, targets, positions=document_positions(tokens, BOS) if masked else None)

    def turn(update: Callable[..., dict]) -> dict:
        update(dtype, "default")  # does not count; it brings memory to the state of a long run
        return update(dtype, "default")

    return {
        name: partial(turn, make_update(*optimizers, {dtype: partial(loss_of, masked)}, config, shape, 1))
        for name, masked in (("without the mask", False), ("with the mask", True))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=4, help="sequences a step (default: 4)")
    parser.add_argument("--seq_len", type=int, default=1024, help="tokens a sequence (default: 1024)")
    parser.add_argument("--document_tokens", type=int, default=500, help="tokens a document, on average (default: 500)")
    parser.add_argument("--turns", type=int, default=15, help="steps of each kind (default: 15)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()
    shape = args.batch_size, args.seq_len
    rows = take_turns([Worker(ways, shape, args.document_tokens)], args.turns + 1)
    result = medians({name: r[1:] for name, r in rows.items()})  # the first turn compiles
    for row in result.values():
        row["tokens_per_sec"] = args.batch_size * args.seq_len / row["seconds"]
        row["of_unmasked"] = result["without the mask"]["seconds"] / row["seconds"]
    columns = {
        "tokens/s": lambda row: f"{row['tokens_per_sec']:,.0f}",
        "of the unmasked": lambda row: f"{row['of_unmasked']:.0%}",
        "peak memory, GiB": lambda row: f"{row['peak_gib']:.1f}",
    }
    title = f"small, {shape[0]} x {shape[1]} tokens, documents of {args.document_tokens} tokens"
    report(title, columns, result, args.json)


if __name__ == "__main__":
    main()
