"""train.py in two processes against one process: tokens a second, and the last loss of each.

    python benchmarks/data_parallel.py                 dim 256, 6 layers, 8,192 ids, 4,096 tokens a step: 3 minutes
    python benchmarks/data_parallel.py --processes 8   one GPU for each process; without GPUs they share the cores

Both runs train the same model on the same windows of the sample corpus, in turns. The difference in speed is the cost
of data parallelism: the processes exchange gradients, and the backward pass hides only part of that time. With a GPU
for each process, the script compares tokens a second for each GPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import DEVICE, SHAPES, report

from hardware import fastest_dtype, peak_flops
from model import ModelConfig, Transformer
from model_utils import flops_per_token
from preparation import prepare

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
TOKENS = 16 * 256  # of a step, over all processes
SKIPPED = 3  # first steps, which compile


def train(processes: int, fields: dict) -> list[dict]:
    """Run train.py with the values of `fields`, and with nothing along the way but its updates.

    Returns metrics.jsonl's rows of the updates. Raises subprocess.CalledProcessError if train.py fails. It says why.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    with tempfile.TemporaryDirectory() as out_dir:
        fields = {
            "out_dir": out_dir,
            "val_every": 0,
            "hellaswag_every": 0,
            "generate_every": 0,
            "save_every": 0,
        } | fields
        flags = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, *(torchrun if processes > 1 else []), str(TRAIN), *flags]
        environment = {name: value for name, value in os.environ.items() if name != "WANDB_API_KEY"}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        lines = (Path(out_dir) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "tokens_per_sec" in row]


def run(processes: int, data_root: str, steps: int) -> dict:
    """Train for SKIPPED + `steps` steps. Returns the tokens a second of the median step, and the last loss."""
    fields = {f"model.{name}": value for name, value in SHAPES["small"].items()} | {
        "model.max_seq_len": 256,
        "data_root": data_root,
        "batch_size": TOKENS // 256 // processes,
        "total_batch_size": TOKENS,
        "max_steps": SKIPPED + steps,
        "optimizer": "adamw",  # muon.py measures the other
        "warmup_steps": SKIPPED,
        "val_tokens": TOKENS,
    }
    rows = train(processes, fields)
    return {
        "tokens_per_sec": statistics.median(row["tokens_per_sec"] for row in rows[SKIPPED:]),
        "last_loss": rows[-1]["train_loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="processes to compare with one (default: 2)")
    parser.add_argument("--steps", type=int, default=20, help="steps of each in a turn (default: 20)")
    parser.add_argument("--turns", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()
    if DEVICE.type == "cuda" and torch.cuda.device_count() < args.processes:
        parser.error(f"--processes {args.processes}: this machine has {torch.cuda.device_count()} GPUs")
    with torch.device("meta"):
        flops = flops_per_token(Transformer(ModelConfig(**SHAPES["small"], max_seq_len=256)))
    rows: dict[int, list[dict]] = {1: [], args.processes: []}
    with tempfile.TemporaryDirectory() as data_root:
        prepare(["sample"], data_root, vocab_size=SHAPES["small"]["vocab_size"], show_progress=False)
        for _ in range(args.turns):
            for processes, results in rows.items():
                peak, _ = peak_flops(DEVICE, fastest_dtype(DEVICE))
                results.append(run(processes, data_root, args.steps) | {"peak": peak})
    result = {}
    for processes, results in rows.items():
        row = {key: statistics.median(r[key] for r in results) for key in results[0]}
        devices = processes if DEVICE.type == "cuda" else 1
        row["share_of_peak"] = row["tokens_per_sec"] * flops / row["peak"] / devices
        row["tokens_per_sec_a_device"] = row["tokens_per_sec"] / devices
        row["of_one"] = row["tokens_per_sec_a_device"] / statistics.median(r["tokens_per_sec"] for r in rows[1])
        result[f"{processes} process{'es' if processes > 1 else ''}"] = row
    columns = {
        "tokens/s": lambda row: f"{row['tokens_per_sec']:,.0f}",
        "of one process": lambda row: f"{row['of_one']:.0%}",
        "of the matmul rate": lambda row: f"{row['share_of_peak']:.0%}",
        "last loss": lambda row: f"{row['last_loss']:.4f}",
    }
    report(f"small, 16 x 256 tokens a step, {DEVICE.type}", columns, result, args.json)


if __name__ == "__main__":
    main()
