"""Shared by the benchmarks: worker processes that do the same work in several ways, in turns; and the peer model."""

import ctypes
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import threads  # noqa: F401 (it sets how the threads of workers wait)

from hardware import dtype_name, fastest_dtype, peak_flops
from model import ModelConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The original shape, as in train.py's CONFIGURATION, and a small shape that a laptop can train.
SHAPES = {
    "original": {"dim": 768, "n_layers": 16, "n_heads": 16, "n_kv_heads": 8, "vocab_size": 128_256},
    "small": {"dim": 256, "n_layers": 6, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 8192},
}


def machine() -> str:
    """This machine in one line: the GPU or processor, its cores, the fastest dtype, the torch version."""
    if DEVICE.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    dtype = dtype_name(fastest_dtype(DEVICE))
    return (
        f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, {dtype}, torch {torch.__version__}"
    )


# ---------------------------------------------------------------- turns


class Worker:
    """A process that does some work in one or more ways. It sleeps between turns.

    It is a separate process so that its memory can be measured. `make(*args)` runs in it once, and returns a function
    for each way, by the name of the way. `names` lists these names.
    """

    def __init__(self, make: Callable[..., dict[str, Callable[[], dict]]], *args):
        context = multiprocessing.get_context("spawn")
        self.pipe, child_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(child_end, make, args), daemon=True)
        self.process.start()
        child_end.close()
        self.names: list[str] = self._receive()

    def turn(self, name: str) -> dict:
        """Do the work once in the way `name`. Returns the function's dict, with "seconds" and "peak_gib" added.

        The function may return "seconds" itself. That value then counts.
        """
        self.pipe.send(name)
        return self._receive()

    def _receive(self):
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            sys.exit(f"a process of the benchmark ended with {self.process.exitcode}; -9: memory ran out")


def _serve(pipe, make: Callable, args: tuple) -> None:
    """The loop of a Worker's process: receive the name of a way, call it, send its result."""
    try:
        ways = make(*args)
        pipe.send(list(ways))
        while True:
            name = pipe.recv()
            _reset_peak_memory()
            began = time.perf_counter()
            result = ways[name]()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            result = {"seconds": time.perf_counter() - began, "peak_gib": _peak_memory()} | result
            if platform.system() == "Linux":
                # Give freed memory back to the system, else it counts for the next way. This takes a second for
                # gigabytes. Do it before the answer: afterwards another process works, or the matmul rate is measured.
                ctypes.CDLL(None).malloc_trim(0)
            pipe.send(result)
    except EOFError:
        pass  # the pipe is closed: the benchmark is over
    except Exception:
        traceback.print_exc()
        os._exit(1)


def _reset_peak_memory() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # 5 resets VmHWM, see proc(5)


def _peak_memory() -> float:
    """Peak memory since the last reset, in GiB: of the GPU, or without one of this process. NaN if it is unknown."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if not Path("/proc/self/status").exists():
        return float("nan")
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**20


def take_turns(workers: list[Worker], turns: int) -> dict[str, list[dict]]:
    """In each turn, run every way of every worker once. Returns the results of each way, one for each turn.

    Each result also has "peak": the device's matmul rate in its fastest dtype, in FLOP/s. For a known GPU this is the
    published rate. Otherwise the rate is measured before each way of a turn, and the largest value counts, because
    any disturbance lowers a measurement.
    """
    worker_of = {name: worker for worker in workers for name in worker.names}
    rows: dict[str, list[dict]] = {name: [] for name in worker_of}
    for turn in range(turns):
        results, peak = {}, 0.0
        for name, worker in worker_of.items():
            peak = max(peak, peak_flops(DEVICE, fastest_dtype(DEVICE)))
            results[name] = worker.turn(name)
            print(f"turn {turn}: {name}: {results[name]['seconds']:.2f} s", file=sys.stderr, flush=True)
        for name, result in results.items():
            rows[name].append(result | {"peak": peak})
    return rows


def medians(rows: dict[str, list[dict]]) -> dict[str, dict[str, float]]:
    """The median of each figure of each way over the turns."""
    return {name: {key: statistics.median(row[key] for row in r) for key in r[0]} for name, r in rows.items()}


def report(title: str, columns: dict[str, Callable[[dict], str]], result: dict[str, dict], as_json: bool) -> None:
    """Print a Markdown table with a line for each way, or one JSON object. `columns` has a function for each cell."""
    if as_json:
        print(json.dumps({"title": title, "machine": machine(), "ways": result}))
        return
    print(f"{title}; {machine()}\n")
    print("| way | " + " | ".join(columns) + " |\n" + "| --- " * (1 + len(columns)) + "|")
    for name, row in result.items():
        print(f"| {name} | " + " | ".join(show(row) for show in columns.values()) + " |")


# ---------------------------------------------------------------- the peer


def hugging_face(config: ModelConfig):
    """Hugging Face's Llama of the shape of `config`, on DEVICE, with random weights and SDPA attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    llama_config = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(llama_config).to(DEVICE)
