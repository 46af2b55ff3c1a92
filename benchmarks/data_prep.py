"""Data preparation, from parquet to shards, against bare tiktoken on the same texts, in turns.

    python benchmarks/data_prep.py                            25 copies of the sample corpus: 250 MB of source code
    python benchmarks/data_prep.py --texts web.jsonl          your own texts: each line a JSON object with a "text"

One turn runs each way once. Figures are medians over the turns. The ways:
- bare tiktoken: `encode_ordinary` on texts in memory, with one process for each core. It runs once with the split
  pattern of Meta's class, and once with the pattern of tokenizer.py.
- the script load_fineweb_dataset.py, from its start to its end.
- the peer, as build-nanogpt does it: a `multiprocessing.Pool` maps a function over the rows of the same parquet file.
"""

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import tiktoken

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from threads import num_cores

from sources import open_source
from tokenizer import SPLIT_PATTERN, Tokenizer

ROOT = Path(__file__).resolve().parents[1]
SHARD_SIZE = 20_000_000  # tokens; the default corpus makes several shards


def write_corpus(texts_file: str | None, size: int, path: Path) -> int:
    """Write copies of the texts to a parquet file until there are `size` bytes of text. Returns the number of bytes.

    The first line of a text is the number of its copy, so no two copies are equal.
    """
    batches = open_source([texts_file] if texts_file else ["sample"]).read()
    texts, written = [text for batch in batches for text in batch.documents if text], 0
    schema = pyarrow.schema([("id", pyarrow.string()), ("text", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(path, schema) as file:
        for copy in range(10**6):
            for start in range(0, len(texts), 1000):
                chunk = [f"{copy}\n{text}" for text in texts[start : start + 1000]]
                file.write(pyarrow.table({"id": [str(copy)] * len(chunk), "text": chunk}, schema))
                written += sum(len(text.encode()) for text in chunk)
                if written >= size:
                    return written


def meta_encoding() -> tiktoken.Encoding:
    """tiktoken's encoder with Meta's own pattern, as Meta's class makes it."""
    ours = Tokenizer()
    ranks = {token: rank for rank, token in enumerate(ours._text_tokens)}
    return tiktoken.Encoding("metas", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=ours.special_tokens)


def bare(path: Path, rank: int, num_proc: int, meta_pattern: bool, barrier, queue) -> None:
    """Encode this process's share of the texts with tiktoken alone. Puts tokens a second into `queue`.

    All processes wait at `barrier`, so that they encode at the same time.
    """
    texts = pyarrow.parquet.read_table(path, columns=["text"])["text"][rank::num_proc].to_pylist()
    encoding = meta_encoding() if meta_pattern else Tokenizer()._encoding
    barrier.wait()
    start = time.perf_counter()
    tokens = sum(len(encoding.encode_ordinary(text)) for text in texts)
    queue.put(tokens / (time.perf_counter() - start))


def bare_rate(path: Path, num_proc: int, meta_pattern: bool) -> float:
    """Tokens a second of bare tiktoken, summed over `num_proc` processes."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(num_proc), context.Queue()
    processes = [
        context.Process(target=bare, args=(path, rank, num_proc, meta_pattern, barrier, queue))
        for rank in range(num_proc)
    ]
    for process in processes:
        process.start()
    rate = sum(queue.get() for _ in processes)
    for process in processes:
        process.join()
    return rate


def script(path: Path, num_proc: int) -> tuple[float, float]:
    """Run load_fineweb_dataset.py. Returns its tokens a second, and the sum of its processes' peak memory, in GiB."""
    with tempfile.TemporaryDirectory(dir=path.parent) as out:
        command = [sys.executable, ROOT / "load_fineweb_dataset.py", "--source", path, "--out_dir", f"{out}/shards"]
        command += ["--shard_size", str(SHARD_SIZE), "--num_proc", str(num_proc)]
        start, peaks = time.perf_counter(), {}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            for pid in [process.pid, *children(process.pid)]:
                peaks[pid] = max(peaks.get(pid, 0), peak_memory(pid))
            time.sleep(0.5)  # look seldom: the peaks only grow, and looking slows the script down
        seconds = time.perf_counter() - start
        assert process.returncode == 0
        return json.loads(Path(out, "shards/manifest.json").read_text())["tokens"] / seconds, sum(
            peaks.values()
        ) / 2**30


def children(pid: int) -> list[int]:
    """Ids of the child processes; empty where /proc does not list them."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def peak_memory(pid: int) -> int:
    """Largest resident memory of a process so far, in bytes; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


_encode = None  # set in each process of the pool


def _start_worker() -> None:
    global _encode
    _encode = meta_encoding().encode_ordinary


def _encode_row(row: dict) -> np.ndarray:
    return np.array(_encode(row["text"]), dtype=np.uint32)


def pool_of_rows(path: Path, num_proc: int) -> float:
    """Tokens a second of a pool that gets each row as a dictionary. This process writes each shard when it is full."""
    start, tokens, shard, filled = time.perf_counter(), 0, np.empty(SHARD_SIZE, np.uint32), 0
    with (
        tempfile.TemporaryDirectory(dir=path.parent) as out,
        multiprocessing.get_context("spawn").Pool(num_proc, _start_worker) as pool,
    ):
        rows = (row for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000) for row in batch.to_pylist())
        for ids in pool.imap(_encode_row, rows, chunksize=16):
            tokens += len(ids)
            while filled + len(ids) >= SHARD_SIZE:
                shard[filled:] = ids[: SHARD_SIZE - filled]
                np.save(f"{out}/{tokens}", shard)
                ids, filled = ids[SHARD_SIZE - filled :], 0
            shard[filled : filled + len(ids)] = ids
            filled += len(ids)
        np.save(f"{out}/rest", shard[:filled])
    return tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", help=".jsonl, .jsonl.gz or .parquet file (default: the sample corpus)")
    parser.add_argument("--megabytes", type=int, default=250, help="MB of text in the corpus (default: 250)")
    parser.add_argument("--num_proc", type=int, default=num_cores(), help="processes (default: one for each core)")
    parser.add_argument("--turns", type=int, default=5, help="turns of each way (default: 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "corpus.parquet")
        size = write_corpus(args.texts, args.megabytes * 10**6, path)
        rates, peaks = {"bare": [], "bare_grouped": [], "script": [], "pool": []}, []
        for _ in range(args.turns):
            rates["bare"].append(bare_rate(path, args.num_proc, meta_pattern=True))
            rates["bare_grouped"].append(bare_rate(path, args.num_proc, meta_pattern=False))
            rate, peak = script(path, args.num_proc)
            rates["script"].append(rate)
            peaks.append(peak)
            rates["pool"].append(pool_of_rows(path, args.num_proc))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    figures = {
        "megabytes": size / 1e6,
        "num_proc": args.num_proc,
        "bare_tokens_per_sec_per_core": medians["bare"] / args.num_proc,
        "bare_grouped_tokens_per_sec_per_core": medians["bare_grouped"] / args.num_proc,
        "script_tokens_per_sec": medians["script"],
        "pool_tokens_per_sec": medians["pool"],
        "script_over_bare": medians["script"] / medians["bare"],
        "script_over_bare_grouped": medians["script"] / medians["bare_grouped"],
        "script_over_pool": medians["script"] / medians["pool"],
        "script_peak_gib": max(peaks),
    }
    if args.json:
        print(json.dumps(figures))
        return
    print(f"{size / 1e6:.0f} MB of text, {args.num_proc} processes, medians of {args.turns} turns")
    for label, name in (
        ("bare tiktoken, Meta's pattern, all cores", "bare"),
        ("bare tiktoken, tokenizer.py's pattern", "bare_grouped"),
        ("load_fineweb_dataset.py, parquet to shards", "script"),
        ("a Pool over rows, parquet to shards", "pool"),
    ):
        print(f"{label:<45}{medians[name] / 1e6:>7.2f} Mtoken/s  {medians[name] / medians['bare']:>5.0%} of bare")
    print(f"peak memory of the script's processes together: {max(peaks):.2f} GiB")


if __name__ == "__main__":
    main()
