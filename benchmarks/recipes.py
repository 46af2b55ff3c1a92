"""Recipes against each other: held-out bits a byte that train.py reaches with different flags.

    python benchmarks/recipes.py --data_root data/prose                  400 steps of 4,096 tokens for each recipe
    python benchmarks/recipes.py --data_root data/prose --seconds 150    as many steps as fit into 150 seconds
    python benchmarks/recipes.py --data_root data/prose --recipes ours nanoGPT --seeds 1 2 3
    python benchmarks/recipes.py --data_root data/prose --try "--muon_lr 0.03" --flags "--model.dim 128"

The recipes take turns, once for each seed. The seconds are those of the updates, the first one with its compiling too;
evaluations do not count. With --seconds, a short run of each recipe tells how long an update takes.
"""

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import DEVICE, report

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
ADAMW = "--optimizer adamw"
REST = "--betas 0.8 0.95 --schedule wsd --min_lr_fraction 0 --weight_decay 0"
RECIPES = {
    "ours": "",  # what optimizers.RECIPES has
    "GPT-3": ADAMW,  # the original's
    # The AdamW of nanoGPT's README and train.py, with the rate that its configurations for small models have
    "nanoGPT": f"{ADAMW} --max_lr 1e-3 --betas 0.9 0.95 --weight_decay 0.1 --schedule cosine --min_lr_fraction 0.1",
    "AdamW at 3e-3": f"{ADAMW} --max_lr 3e-3",
    # One rate for all that AdamW moves
    "Muon, one rate": f"--max_lr 2e-2 --muon_lr 0.03 --decay_fraction 0.7 {REST}",
}
# Unless --flags says otherwise: 5.5 million parameters in matrix products
SHAPE = {
    "model.dim": 256,
    "model.n_layers": 6,
    "model.n_heads": 4,
    "model.n_kv_heads": 2,
    "model.vocab_size": 4096,
    "model.multiple_of": 64,
    "model.max_seq_len": 256,
    "batch_size": 16,
    "total_batch_size": 4096,
    "max_steps": 400,
}
QUIET = {"val_every": 0, "hellaswag_every": 0, "generate_every": 0, "save_every": 0, "log_every": 1000}
TRIAL_STEPS = 50


def flags_of(text: str) -> dict[str, list[str]]:
    """The flags in a text, by name: the words of each."""
    flags: dict[str, list[str]] = {}
    for word in shlex.split(text):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags[name] = [value] if equals else []
        else:
            list(flags.values())[-1].append(word)
    return flags


def train(flags: dict[str, list[str]]) -> dict[str, float]:
    """Run train.py. Returns figures of the run, NaN where it failed."""
    words = [word for name, values in flags.items() for word in (f"--{name}", *values)]
    with tempfile.TemporaryDirectory() as out_dir:
        command = [sys.executable, str(TRAIN), *words, "--out_dir", out_dir]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:  # it has said why
            return dict.fromkeys(("bpb", "steps", "tokens", "seconds", "first_seconds", "step_seconds"), math.nan)
        rows = [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]
    updates = [row for row in rows if "train_loss" in row]
    tokens = updates[0]["tokens"]  # of a step
    seconds = [tokens / row["tokens_per_sec"] for row in updates]
    return {
        "bpb": rows[-1]["val_bpb"],
        "steps": len(updates),
        "tokens": updates[-1]["tokens"],
        "seconds": sum(seconds),
        "first_seconds": seconds[0],
        "step_seconds": statistics.median(seconds[1:] or seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", required=True, help="prepared folder")
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=[], help="those of this file to run")
    parser.add_argument(
        "--try", nargs="+", default=[], dest="tried", help="further recipes, each the flags of train.py"
    )
    parser.add_argument("--flags", default="", help="flags of train.py for all recipes, in one text")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="a run of each recipe for each (default: 1)")
    parser.add_argument("--seconds", type=float, help="let every recipe train for so long, instead of max_steps")
    parser.add_argument("--val_tokens", type=int, default=2**20, help="held-out tokens (default: 2^20, or all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()
    recipes = {name: RECIPES[name] for name in args.recipes or ([] if args.tried else RECIPES)}
    recipes |= {f"`{flags}`": flags for flags in args.tried}
    fields = SHAPE | QUIET | {"data_root": args.data_root, "val_tokens": args.val_tokens, "device": DEVICE.type}
    common = {name: [str(value)] for name, value in fields.items()} | flags_of(args.flags)
    flags = {name: common | flags_of(text) for name, text in recipes.items()}
    for name in recipes if args.seconds else ():
        trial = train(flags[name] | {"max_steps": [str(TRIAL_STEPS)], "val_tokens": ["1"]})
        if math.isnan(trial["bpb"]):
            sys.exit(f"{name}: train.py has failed, and said why above")
        steps = (args.seconds - trial["first_seconds"]) / trial["step_seconds"] + 1
        flags[name]["max_steps"] = [str(max(1, int(steps)))]
    results: dict[str, list[dict]] = {name: [] for name in recipes}
    for seed in args.seeds:
        for name, runs in results.items():
            runs.append(train(flags[name] | {"seed": [str(seed)]}))
            print(f"seed {seed}: {name}: {runs[-1]['bpb']:.4f} bits a byte", file=sys.stderr, flush=True)
    result = {}
    for name, runs in results.items():
        result[name] = {key: statistics.fmean(run[key] for run in runs) for key in runs[0]}
        result[name]["spread"] = max(run["bpb"] for run in runs) - min(run["bpb"] for run in runs)
    columns = {
        "bits a byte": lambda row: f"{row['bpb']:.4f}",
        "largest less smallest": lambda row: f"{row['spread']:.4f}",
        "steps": lambda row: f"{row['steps']:,.0f}",
        "tokens, millions": lambda row: f"{row['tokens'] / 1e6:.2f}",
        "seconds": lambda row: f"{row['seconds']:.0f}",
        "seconds a step": lambda row: f"{row['step_seconds']:.3f}",
    }
    report(f"{args.data_root}, seeds {' '.join(map(str, args.seeds))} {args.flags}", columns, result, args.json)


if __name__ == "__main__":
    main()
