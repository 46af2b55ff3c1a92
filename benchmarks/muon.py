"""A step of Muon: our own, shared out over processes, and torch's.

    python benchmarks/muon.py                       the matrices of three shapes, two processes
    python benchmarks/muon.py --shapes sample --turns 20

Every process holds the same gradients, as under DDP. `each alone`: every process makes all matrices orthogonal.
`shared`: each makes its share so, and sends it to the others. `torch`: torch.optim.Muon, which each process steps
alone. The ways take turns. A turn begins when all processes are there, and counts until the last one is done.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from common import DEVICE, SHAPES, report

from hardware import fastest_dtype
from model import ModelConfig, Transformer
from optimizers import Muon
from train import SAMPLE

MATRICES = {name: ModelConfig(**fields) for name, fields in SHAPES.items()} | {"sample": SAMPLE.model}


def measure(rank: int, processes: int, shape: str, turns: int, folder: str) -> None:
    """One of the processes. Rank zero writes the seconds of each way into `folder`."""
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{folder}/store", rank=rank, world_size=processes)
    device = torch.device(DEVICE.type, rank) if DEVICE.type == "cuda" else DEVICE
    if DEVICE.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    with torch.device("meta"):
        model = Transformer(replace(MATRICES[shape], vocab_size=512))
    params = [torch.randn(p.shape, device=device) for p in model.layers.parameters() if p.dim() == 2]
    for p in params:
        p.grad = torch.randn_like(p)
    dtype = fastest_dtype(device)
    ways = {
        "each alone": Muon(params, 0.02, 0.0, dtype=dtype),
        "shared": Muon(params, 0.02, 0.0, dtype=dtype, ranks=(rank, processes)),
        "torch": torch.optim.Muon(params, lr=0.02, weight_decay=0.0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns + 1):
        for name, optimizer in ways.items():
            dist.barrier()
            began = time.perf_counter()
            optimizer.step()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            dist.barrier()
            seconds[name].append(time.perf_counter() - began)
    if rank == 0:
        medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
        Path(folder, "seconds.json").write_text(json.dumps(medians))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=MATRICES, default=list(MATRICES), help="models (default: all)")
    parser.add_argument("--processes", type=int, default=2, help="processes that share the work (default: 2)")
    parser.add_argument("--turns", type=int, default=7, help="steps of each way (default: 7)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()
    if DEVICE.type == "cuda" and torch.cuda.device_count() < args.processes:
        parser.error(f"--processes {args.processes}: this machine has {torch.cuda.device_count()} GPUs")
    result = {}
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            job = (args.processes, shape, args.turns, folder)
            torch.multiprocessing.spawn(measure, job, nprocs=args.processes)
            seconds = json.loads(Path(folder, "seconds.json").read_text())
        for way, value in seconds.items():
            result[f"{shape}, {way}"] = {"seconds": value, "of_shared": value / seconds["shared"]}
    columns = {
        "seconds a step": lambda row: f"{row['seconds']:.4f}",
        "times the shared one": lambda row: f"{row['of_shared']:.2f}",
    }
    report(f"{args.processes} processes", columns, result, args.json)


if __name__ == "__main__":
    main()
