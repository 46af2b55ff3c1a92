"""Shared by the benchmarks: worker processes that do the same work in several ways, in turns; and the peer model.

A way is one method of doing a benchmark's work. The ways take turns. Where the peer has many, `try_ways` finds its
fastest with a short trial of each, and only that one takes turns with ours.
"""

import contextlib
import ctypes
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import threads  # noqa: F401 (it sets how the threads of workers wait)

import torch

from hardware import device_name, dtype_name, fastest_dtype, peak_flops
from model import ModelConfig
from wheels import cause_of_unused_gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu" and multiprocessing.parent_process() is None and (cause := cause_of_unused_gpu()):
    print(f"on the CPU: {cause}", file=sys.stderr)
# The original shape, as in train.py's CONFIGURATION; a small shape that a laptop can train; a tiny one for tests.
SHAPES = {
    "original": {"dim": 768, "n_layers": 16, "n_heads": 16, "n_kv_heads": 8, "vocab_size": 128_256},
    "small": {"dim": 256, "n_layers": 6, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 8192},
    "tiny": {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "vocab_size": 512},
}


def machine() -> str:
    """This machine in one line: the GPU, or the processor with its cores and the instructions that matter; the fastest
    dtype, and the torch version. all.py has a table for each such line."""
    words = [device_name(DEVICE)]
    if DEVICE.type == "cpu":
        has = torch.cpu.get_capabilities()
        extensions = [extension for extension in ("avx512_bf16", "amx_bf16") if has.get(extension)]
        words += [f"{os.cpu_count()} cores", torch.backends.cpu.get_cpu_capability(), *extensions]
    return ", ".join([*words, dtype_name(fastest_dtype(DEVICE)), f"torch {torch.__version__}"])


# ---------------------------------------------------------------- turns


OUT_OF_MEMORY = 137  # the status of a Worker's process whose GPU has too little; -9: the system has ended it


class WorkerEnded(SystemExit):
    """The process of a Worker has ended. If nothing catches this, the benchmark ends with its message."""

    def __init__(self, status: int | None):
        super().__init__(f"a process of the benchmark ended with {status}; -9, {OUT_OF_MEMORY}: memory ran out")
        self.no_memory = status in (-9, OUT_OF_MEMORY)


class Worker:
    """A process that does some work in one or more ways. It sleeps between turns.

    It is a separate process so that its memory can be measured. `make(*args)` runs in it once, and returns a function
    for each way, by the name of the way. `names` lists the ways that take turns. `first` has the result of the first
    turn of each way that has had one.
    """

    def __init__(self, make: Callable[..., dict[str, Callable[[], dict]]], *args):
        context = multiprocessing.get_context("spawn")
        self.pipe, child_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(child_end, make, args), daemon=True)
        self.process.start()
        child_end.close()
        self.names: list[str] = self._receive()
        self.first: dict[str, dict] = {}

    def turn(self, name: str) -> dict:
        """Do the work once in the way `name`. Returns the function's dict, with "seconds" and "peak_gib" added.

        The function may return "seconds" itself. That value then counts.
        """
        with contextlib.suppress(BrokenPipeError):  # the process has ended: _receive says how
            self.pipe.send(name)
        result = self._receive()
        self.first.setdefault(name, result)
        return result

    def end(self) -> None:
        """End the process, and wait until its memory is free."""
        self.pipe.close()
        self.process.join()

    def _receive(self):
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            raise WorkerEnded(self.process.exitcode) from None


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
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()  # another process may need it
            elif platform.system() == "Linux":
                # Give freed memory back to the system, else it counts for the next way. This takes a second for
                # gigabytes. Do it before the answer: afterwards another process works, or the matmul rate is measured.
                ctypes.CDLL(None).malloc_trim(0)
            pipe.send(result)
    except EOFError:
        pass  # the pipe is closed: the benchmark is over
    except Exception as error:
        traceback.print_exc()
        os._exit(OUT_OF_MEMORY if isinstance(error, torch.OutOfMemoryError) else 1)


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


def _trial(worker: Worker, name: str, first_counts: bool) -> float:
    """The seconds of the fastest turn of a way: of one turn if it is long, of up to three if they are short.

    The fastest, because whatever disturbs a turn makes it slower.
    """
    first = worker.turn(name)["seconds"]
    counted = [first] if first_counts else []
    while not counted or (len(counted) < 3 and sum(counted) < 10):
        counted.append(worker.turn(name)["seconds"])
    return min(counted)


def try_ways(
    makers: Sequence[tuple], first_counts: bool = False, groups: Sequence[str] = ("",)
) -> tuple[list[Worker], dict[str, float | None]]:
    """Find the peer's fastest way, so that only this one takes turns with ours.

    Args:
        makers: the arguments of a Worker each. One Worker works at a time, and only the fastest stays. Begin with the
            one that needs most memory.
        first_counts: whether the first turn of a way counts. It does not where it compiles.
        groups: for each of these texts, the fastest of all ways with the text in their name stays.

    Returns:
        The workers that stay, with the fastest way of each group in `names`; and for each way that was tried the
        seconds of its fastest turn, or None where memory ran out. Raises SystemExit where it ran out in all of them.
    """
    workers: list[Worker] = []
    tried: dict[str, float | None] = {}
    for maker in makers:
        worker = Worker(*maker)
        workers.append(worker)
        try:
            for name in worker.names:
                tried[name] = _trial(worker, name, first_counts)
                print(f"tried: {name}: {tried[name]:.2f} s", file=sys.stderr, flush=True)
        except WorkerEnded as error:
            if not error.no_memory:
                raise
            print(f"tried: {name}: memory ran out", file=sys.stderr, flush=True)
            tried |= dict.fromkeys(worker.names)  # its other ways went with the process
        seconds = {name: value for name, value in tried.items() if value is not None}
        fastest = {min((n for n in seconds if group in n), key=seconds.get, default=None) for group in groups}
        for worker in workers:
            worker.names = [name for name in worker.names if name in fastest]
            if not worker.names:
                worker.end()
        workers = [worker for worker in workers if worker.names]
    if not workers:
        sys.exit(f"memory ran out in each of these ways: {'; '.join(tried)}; take a smaller shape")
    return workers, tried


def take_turns(workers: list[Worker], turns: int) -> dict[str, list[dict]]:
    """In each turn, run every way of every worker once. Returns the results of each way, one for each turn.

    A way that `try_ways` has tried has had its first turn: turn 0 has that result. Each result also has "peak": the
    device's matmul rate in its fastest dtype, in FLOP/s. For a known GPU this is the published rate. Otherwise the
    rate is measured before each way of a turn, and the largest value counts, because any disturbance lowers a
    measurement.
    """
    worker_of = {name: worker for worker in workers for name in worker.names}
    rows: dict[str, list[dict]] = {name: [] for name in worker_of}
    for turn in range(turns):
        results, peak = {}, 0.0
        for name, worker in worker_of.items():
            peak = max(peak, peak_flops(DEVICE, fastest_dtype(DEVICE))[0])
            results[name] = worker.first[name] if turn == 0 and name in worker.first else worker.turn(name)
            print(f"turn {turn}: {name}: {results[name]['seconds']:.2f} s", file=sys.stderr, flush=True)
        for name, result in results.items():
            rows[name].append(result | {"peak": peak})
    return rows


def medians(rows: dict[str, list[dict]]) -> dict[str, dict[str, float]]:
    """The median of each figure of each way over the turns."""
    return {name: {key: statistics.median(row[key] for row in r) for key in r[0]} for name, r in rows.items()}


def report(
    title: str,
    columns: dict[str, Callable[[dict], str]],
    result: dict[str, dict],
    as_json: bool,
    tried: dict[str, float | None] | None = None,
) -> None:
    """Print a Markdown table with a line for each way, or one JSON object. `columns` has a function for each cell.

    `tried` is what `try_ways` returns. It follows below the table.
    """
    if as_json:
        print(json.dumps({"title": title, "machine": machine(), "ways": result, "tried": tried or {}}))
        return
    print(f"{title}; {machine()}\n")
    print("| way | " + " | ".join(columns) + " |\n" + "| --- " * (1 + len(columns)) + "|")
    for name, row in result.items():
        print(f"| {name} | " + " | ".join(show(row) for show in columns.values()) + " |")
    if tried:
        print("\nThe peer's ways, each in a short trial; the fastest one took turns with ours:\n")
        for name, seconds in tried.items():
            print(f"- {name}: {'memory ran out' if seconds is None else f'{seconds:.2f} s'}")


# ---------------------------------------------------------------- the peer


ATTENTION = ("eager", "sdpa")  # Hugging Face's two ways on every device; the first one needs more memory


def hugging_face(config: ModelConfig, attention: str = "sdpa"):
    """Hugging Face's Llama of the shape of `config`, on DEVICE, with random weights and a kind of ATTENTION."""
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
        attn_implementation=attention,
    )
    return LlamaForCausalLM(llama_config).to(DEVICE)
