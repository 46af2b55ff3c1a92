"""How threads wait for each other: a training step with OpenMP's settings, alone and beside a busy process.

    python benchmarks/waiting.py                                             the sample's shape: 6 minutes
    python benchmarks/waiting.py --shapes small original --turns 4

A step has thousands of operations that the threads of a process share. At the end of each they wait for the slowest
thread. By default they spin meanwhile: they keep their cores, so that they go on without a delay. If another process
needs a core, the slowest thread may not run, because the waiting ones hold the cores.

Each way is a process with variables of the environment that OpenMP reads when torch is imported. The ways take turns,
alone, and in every fourth turn also beside an endless loop. Figures are tokens a second, medians over the turns. In
each turn the speed of a way, alone, is divided by that of the first way. The last column is the median of these ratios.
"""

import argparse
import os
import statistics
import subprocess
import sys

from common import DEVICE, SHAPES, Worker, report
from train_step import ours

from hardware import dtype_name, fastest_dtype
from model import ModelConfig

SAMPLE = {"dim": 192, "n_layers": 4, "n_heads": 3, "n_kv_heads": 1, "vocab_size": 4096, "multiple_of": 64}
JOBS = {  # shape, sequences, tokens a sequence
    "sample": (SAMPLE, 16, 128),
    "small": (SHAPES["small"], 16, 256),
    "original": (SHAPES["original"], 1, 256),
}
WAYS = {"GOMP_SPINCOUNT=300000": {"GOMP_SPINCOUNT": "300000"}}  # the library's default
WAYS |= {f"GOMP_SPINCOUNT={n}": {"GOMP_SPINCOUNT": str(n)} for n in (10_000, 3000, 1000)}
WAYS |= {"OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"}}


def start(environment: dict[str, str], *job) -> Worker:
    """A process of our model with these variables, warmed up."""
    os.environ.pop("GOMP_SPINCOUNT", None)  # threads.py has set it
    os.environ.update(environment)
    worker = Worker(ours, *job)
    for name in environment:
        del os.environ[name]
    worker.turn(worker.names[0])
    return worker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=JOBS, default=["sample"], help="the models (default: sample)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="the settings (default: all)")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn, of which the last counts (default: 3)")
    parser.add_argument("--turns", type=int, default=12, help="turns of each way (default: 12)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()
    result: dict[str, dict[str, float]] = {}
    for name in args.shapes:
        shape, *batch = JOBS[name]
        config = ModelConfig(**shape, max_seq_len=batch[1])
        job = config, tuple(batch), 1, [dtype_name(fastest_dtype(DEVICE))], args.steps
        workers = {way: start(WAYS[way], *job) for way in args.ways}
        rates: dict[str, dict[str, list[float]]] = {way: {"alone": [], "beside a loop": []} for way in workers}

        def take_turn(column: str, workers=workers, rates=rates, batch=batch) -> None:
            for way, worker in workers.items():
                rates[way][column].append(batch[0] * batch[1] / worker.turn(worker.names[0])["seconds"])

        for turn in range(args.turns):
            take_turn("alone")
            if turn % 4 == 0:
                neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
                try:
                    take_turn("beside a loop")
                finally:
                    neighbour.kill()
        first = rates[args.ways[0]]["alone"]
        for way, row in rates.items():
            print(f"{name}, {way}: {row}", file=sys.stderr, flush=True)
            pairs = [own / other for own, other in zip(row["alone"], first, strict=True)]
            result[f"{name}, {way}"] = {column: statistics.median(r) for column, r in row.items()} | {
                "of the first": statistics.median(pairs)
            }
            workers[way].process.kill()
    columns = {column: (lambda row, column=column: f"{row[column]:,.0f}") for column in ("alone", "beside a loop")}
    report("training", columns | {"of the first": lambda row: f"{row['of the first']:.3f}"}, result, args.json)


if __name__ == "__main__":
    main()
