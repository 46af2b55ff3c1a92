"""This program on the GPUs of a machine: tokens a second, MFU, peak memory, in tables to paste.

    python benchmarks/gpu.py                                              meant for 8 minutes on an H100, not yet tried
    python benchmarks/gpu.py --batch_sizes 2 4 8 --minutes 30             a smaller card, and more time
    python benchmarks/gpu.py --shape tiny --seq_len 64 --batch_sizes 1 2  the same code, also on a CPU: does it work?

A row is printed when it is measured, the most important rows first. So a run that is cut off is of use too.

1. One GPU, in its fastest dtype: an update of our model, compiled and not, and of Hugging Face's Llama, with AdamW. At
   the first batch size three ways of Hugging Face's have a short trial. The fastest takes turns with ours at every
   batch size. Its own ("eager") attention is not tried compiled, because that takes another minute.
2. `train.py` on 1, 2, 4 ... and all GPUs, with its own loader and optimizer, on the sample's text, at the batch size
   that was fastest alone. A GPU has as many tokens an update as one of eight has in the original configuration. Only
   updates count. Each run saves its model at its end: 3.6 GB in the folder for temporary files.
3. One GPU in float16. Hugging Face's Llama runs at the first batch size only.

In 1 and 3 the tokens are random, and both sides scale the loss in float16. Each side has a process of its own. Both
models stay on the GPU, but only one works at a time. A way that fails, because memory runs out for example, has a row
that says so, and does not try larger batches. Figures are medians. The first update compiles, so it has its own column.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

import torch
from common import DEVICE, SHAPES, Worker, WorkerEnded, machine, medians, try_ways
from data_parallel import SKIPPED, train
from train_step import STANCES, ours, theirs

from hardware import dtype_name, fastest_dtype, peak_flops
from model import ModelConfig, Transformer
from model_utils import flops_per_token
from preparation import prepare

TURNS = 3  # of each way
TURN = 128 if DEVICE.type == "cuda" else 4  # sequences of a turn, in 3 updates or more. The last update counts
UPDATE = 64  # sequences of a GPU in an update of train.py: an eighth of the original configuration's 512
UPDATES = 20  # of train.py that count
PEERS = (("eager", ""), ("sdpa", ""), ("sdpa", ", compiled"))  # Hugging Face's: the one that needs most memory first
COLUMNS = {
    "tokens/s": ("tokens_per_sec", ",.0f"),
    "MFU": ("share_of_peak", ".1%"),
    "peak memory, GiB": ("peak_gib", ".1f"),
    "first update, s": ("first_step_seconds", ".1f"),
}
FAILED = "failed; the reason is above, on stderr"


def said_by(*command: str) -> str:
    """The lines that a command prints, each once. "unknown" where it is missing or fails."""
    try:
        run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return "; ".join(dict.fromkeys(run.stdout.strip().splitlines()))


def facts() -> dict[str, str]:
    """The machine and the versions that figures depend on."""
    found = {"device": machine(), "commit": said_by("git", "describe", "--always", "--dirty")}
    peer = version("transformers") if find_spec("transformers") else "missing; pip install -r tests/requirements.txt"
    found |= {"python": platform.python_version(), "transformers": peer}
    if DEVICE.type == "cuda":
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        found["GPUs"] = "; ".join(f"{g.name}, {g.total_memory / 2**30:.1f} GiB, sm_{g.major}{g.minor}" for g in gpus)
        query = "--query-gpu=driver_version,power.limit", "--format=csv,noheader"
        found["driver, power limit"] = said_by("nvidia-smi", *query)
        found["CUDA"] = torch.version.cuda or f"HIP {torch.version.hip}"
        found["cuDNN"] = str(torch.backends.cudnn.version())
        has_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else "none"
    return found


@dataclass
class Page:
    """The tables. `rows` has the figures of each row, by its way and batch size."""

    file: TextIO
    seq_len: int
    flops: float  # of a token
    ends: float  # when no more rows begin, by time.monotonic()
    peak: float = 1.0  # FLOP/s of one GPU in the dtype of the table
    rows: dict[tuple[str, int], dict] = field(default_factory=dict)

    def say(self, text: str) -> None:
        print(text, file=self.file, flush=True)

    def table(self, title: str, dtype: str) -> None:
        self.peak, source = peak_flops(DEVICE, getattr(torch, dtype))
        peak = f"a peak of {self.peak / 1e12:.4g} TFLOP/s ({source})"
        self.say(f"\n{title}, {dtype}, {self.seq_len:,} tokens a sequence; {peak}\n")
        self.say(f"| way | batch size | {' | '.join(COLUMNS)} |\n{'| --- ' * (2 + len(COLUMNS))}|")

    def row(self, way: str, batch_size: int, figures: dict) -> None:
        """`figures` has "seconds" of an update on one GPU, or what COLUMNS name, or why it "failed"."""
        if "seconds" in figures:
            speed = batch_size * self.seq_len / figures["seconds"]
            figures = figures | {"tokens_per_sec": speed, "share_of_peak": speed * self.flops / self.peak}
        cells = [format(figures[key], form) if key in figures else "-" for key, form in COLUMNS.values()]
        cells[0] = figures.get("failed", cells[0])
        self.say(f"| {' | '.join([way, str(batch_size), *cells])} |")
        self.rows[way, batch_size] = figures

    def is_over(self, case: str) -> bool:
        """Whether the time is over. If it is, say that the table ends before `case`."""
        if over := time.monotonic() > self.ends:
            self.say(f"\nThe time is over, so {case} and what follows it is left out. --minutes gives more.")
        return over


def measure(ways: dict[str, tuple], workers: dict) -> dict[str, dict]:
    """Run `ways` in turns. Returns the medians of each, or why it failed.

    Args:
        ways: the arguments of a Worker by the name of the way. Ways with the same function share a Worker.
        workers: those that are there already, by their function. In the end all have ended.
    """
    rows: dict[str, list[dict]] = {name: [] for name in ways}
    failed: dict[str, dict] = {}
    for turn in range(TURNS):
        for name, maker in ways.items():
            if name in failed:
                continue
            try:
                if maker[0] not in workers:
                    workers[maker[0]] = Worker(*maker)
                worker = workers[maker[0]]
                row = worker.turn(name)
                rows[name].append(row | {"first_step_seconds": worker.first[name]["first_step_seconds"]})
                print(f"turn {turn}: {name}: {row['seconds']:.3f} s", file=sys.stderr, flush=True)
            except WorkerEnded as error:
                workers.pop(maker[0], None)  # the next way that needs it makes another one
                failed[name] = {"failed": "memory ran out" if error.no_memory else FAILED}
    for worker in workers.values():
        worker.end()
    figures = medians({name: r for name, r in rows.items() if name not in failed})
    return {name: failed.get(name) or figures[name] for name in ways}


def try_peers(page: Page, batch_size: int, job: tuple) -> Worker | None:
    """A short trial of each of PEERS. Returns the Worker of the fastest, or None if there is none."""
    try:
        (worker,), tried = try_ways([(theirs, *job, *peer) for peer in PEERS], first_counts=True)
    except SystemExit as error:
        page.row("Hugging Face", batch_size, {"failed": str(error)})
        return None
    for name, seconds in tried.items():
        if name not in worker.names:
            page.row(f"{name}, trial", batch_size, {"seconds": seconds} if seconds else {"failed": "memory ran out"})
    return worker


def one_gpu(
    page: Page, config: ModelConfig, dtype: str, batch_sizes: list[int], peer: tuple[str, str] | None
) -> tuple[str, str] | None:
    """The table of one GPU in `dtype`.

    `peer` is the one of PEERS that runs at the first batch size. If it is None, the fastest one is found there, runs at
    every batch size, and is returned.
    """
    is_first_dtype, failed = peer is None, set()
    page.table("One GPU", dtype)
    for size in batch_sizes:
        if page.is_over(f"batch size {size}"):
            break
        job, workers = (config, (size, page.seq_len), 1, [dtype], max(3, TURN // size)), {}
        if is_first_dtype and size == batch_sizes[0] and (worker := try_peers(page, size, job)):
            peer, workers = next(p for p in PEERS if worker.names[0].endswith("".join(p))), {theirs: worker}
        ways = {f"ours, {dtype}{how}": (ours, *job) for how in STANCES}
        if peer and (is_first_dtype or size == batch_sizes[0]):
            ways[f"Hugging Face, {dtype}, {''.join(peer)}"] = (theirs, *job, *peer)
        for name, row in measure({name: ways[name] for name in ways if name not in failed}, workers).items():
            page.row(name, size, row)
            failed |= {name} if "failed" in row else set()
    return peer


def all_gpus(page: Page, dtype: str, shape: str, batch_sizes: list[int]) -> None:
    """The table of train.py on 1, 2, 4 ... and all GPUs."""
    speeds = {
        size: row.get("tokens_per_sec", 0)
        for (way, size), row in page.rows.items()
        if way == f"ours, {dtype}, compiled"
    }
    size = max(speeds, key=speeds.get, default=batch_sizes[0])
    count = torch.cuda.device_count() or 1
    page.table("train.py", dtype)
    with tempfile.TemporaryDirectory() as data_root:
        prepare(["sample"], data_root, vocab_size=SHAPES[shape]["vocab_size"], show_progress=False)
        for processes in sorted({*(2**i for i in range(count.bit_length())), count}):
            way = f"train.py, {dtype}, {processes} process{'es' if processes > 1 else ''}"
            if page.is_over(way):
                break
            print(f"{way} ...", file=sys.stderr, flush=True)
            tokens = processes * size * max(1, UPDATE // size) * page.seq_len
            fields = {f"model.{name}": value for name, value in SHAPES[shape].items()} | {
                "model.max_seq_len": page.seq_len,
                "data_root": data_root,
                "dtype": dtype,
                "batch_size": size,
                "total_batch_size": tokens,
                "max_steps": SKIPPED + UPDATES,
                "val_tokens": page.seq_len * processes,
            }
            try:
                rows = train(processes, fields)
            except subprocess.CalledProcessError:
                page.row(way, size, {"failed": FAILED})
                continue
            figures = {"first_step_seconds": tokens / rows[0]["tokens_per_sec"]}
            for name, key in (("tokens_per_sec", "tokens_per_sec"), ("share_of_peak", "mfu")):
                figures[name] = statistics.median(row[key] for row in rows[SKIPPED:])
            page.row(way, size, figures)


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="original", help="the model (default: original)")
    parser.add_argument(
        "--batch_sizes", type=int, nargs="+", default=[8, 16, 32, 64], help="the smallest first (default: 8 16 32 64)"
    )
    parser.add_argument("--seq_len", type=int, default=1024, help="tokens a sequence (default: 1024)")
    dtypes = list(dict.fromkeys([dtype_name(fastest_dtype(DEVICE)), "float16"]))
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=("bfloat16", "float16", "float32"),
        default=dtypes,
        help=f"the most important one first (default here: {' '.join(dtypes)})",
    )
    parser.add_argument("--minutes", type=float, default=8, help="no row begins after this time (default: 8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and the tables on stderr")
    args = parser.parse_args()
    if DEVICE.type == "cpu" and args.shape == "original":
        sys.exit("torch finds no GPU on this machine; --shape tiny tries the same code on a CPU")
    config = ModelConfig(**SHAPES[args.shape], max_seq_len=args.seq_len)
    with torch.device("meta"):
        flops = flops_per_token(Transformer(config))
    page = Page(sys.stderr if args.json else sys.stdout, args.seq_len, flops, began + 60 * args.minutes)
    about = facts()
    page.say("\n".join(f"- {name}: {fact}" for name, fact in about.items()))
    peer = None
    for dtype in args.dtypes:
        peer = one_gpu(page, config, dtype, args.batch_sizes, peer)
        if dtype == args.dtypes[0]:
            all_gpus(page, dtype, args.shape, args.batch_sizes)
    page.say(f"\n{(time.monotonic() - began) / 60:.1f} minutes in all")
    if args.json:
        ways = {f"{way}, {size}": figures for (way, size), figures in page.rows.items()}
        print(json.dumps({"title": f"{args.shape}, GPUs", "machine": about, "ways": ways}))


if __name__ == "__main__":
    main()
