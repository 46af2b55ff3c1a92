"""What `document_mask` costs: training steps of a small model with and without it, by turns.

python benchmarks/document_mask.py                                    4 x 1,024 tokens
python benchmarks/document_mask.py --batch_size 16 --seq_len 256
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model import ModelConfig, Transformer, document_positions
from model_utils import fastest_dtype
from optimizers import build_optimizers

VOCAB, BOS = 8192, 8000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=4, help="sequences a step (default: 4)")
    parser.add_argument("--seq_len", type=int, default=1024, help="tokens a sequence (default: 1024)")
    parser.add_argument("--document_tokens", type=int, default=500, help="tokens a document, on average (default: 500)")
    parser.add_argument("--turns", type=int, default=15, help="steps of each kind (default: 15)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the sentence")
    args = parser.parse_args()
    shape = args.batch_size, args.seq_len
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = ModelConfig(dim=256, n_layers=6, n_heads=4, n_kv_heads=2, vocab_size=VOCAB, max_seq_len=args.seq_len)
    model = Transformer(config).to(device)
    [optimizer] = build_optimizers(
        model, optimizer="adamw", max_lr=1e-3, muon_lr=0.0, weight_decay=0.1, betas=(0.9, 0.95)
    )
    model.compile_blocks()

    def step(masked: bool) -> float:
        tokens, targets = torch.randint(BOS, (2, *shape), device=device)
        tokens[torch.rand(shape, device=device) < 1 / args.document_tokens] = BOS
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=fastest_dtype(device) == torch.bfloat16):
            loss = model(tokens, targets, positions=document_positions(tokens, BOS) if masked else None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for a GPU
        return tokens.numel() / (time.perf_counter() - began)

    rates: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(args.turns + 2):  # the first two compile and warm up
        for masked in rates:
            rate = step(masked)
            if turn >= 2:
                rates[masked].append(rate)
    without, with_mask = (statistics.median(rates[masked]) for masked in (False, True))
    if args.json:
        print(json.dumps({"shape": shape, "tokens_per_sec": without, "masked_tokens_per_sec": with_mask}))
    else:
        print(
            f"{shape[0]} x {shape[1]}, documents of {args.document_tokens} tokens: {without:,.0f} tokens/s without"
            f" the mask, {with_mask:,.0f} with it, {with_mask / without:.0%}"
        )


if __name__ == "__main__":
    main()
