"""Documents -> token shards: FineWeb-Edu's 10-billion-token sample, the sample corpus, or files of your own.

    python load_fineweb_dataset.py                                   FineWeb-Edu sample-10BT, from the Hugging Face hub
    python load_fineweb_dataset.py --max_tokens 300_000_000          its first 300 million tokens
    python load_fineweb_dataset.py --source sample                   Python's standard library; needs no network
    python load_fineweb_dataset.py --source a.jsonl.gz b.parquet c.txt --out_dir data/mine

Every document becomes <|begin_of_text|> text <|end_of_text|>; all of them, in order, form one stream of ids, cut
into shards of equal size. Shard 0 is for validation. The bytes depend on the source, the vocabulary and the shard
size alone, not on the number of processes. `manifest.json`, written last, describes the folder and makes it complete.
"""

import argparse
import gzip
import hashlib
import json
import os
import platform
import signal
import sys
import sysconfig
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from files import MANIFEST, SHARD_FORMAT_VERSION, atomic_write, is_prepared, sha256_of, shard_name, token_dtype
from tokenizer import Tokenizer

FINEWEB = "HuggingFaceFW/fineweb-edu"
FINEWEB_SUBSET = "sample-10BT"  # 9,672,101 documents in 14 parquet files of 28.5 GB
FINEWEB_REVISION = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"

SAMPLE_ROOT = "data/sample"
SAMPLE_VOCAB_SIZE = 4096
SAMPLE_SHARD_SIZE = 2**17  # so that the validation shard is 4% of a corpus of about 3 million tokens
# Tests differ between installations, encodings/ and pydoc_data/ hold tables and prose, the rest is not the library.
SAMPLE_EXCLUDED = {"test", "tests", "idle_test", "encodings", "pydoc_data"}
SAMPLE_EXCLUDED |= {"site-packages", "dist-packages", "__pycache__"}

CHUNK_CHARS = 1_000_000  # text handed to a worker at once: large against the cost of handing over
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt")


class SourceError(Exception):
    """A source that cannot be read; the message is one sentence with the cure."""


# ---------------------------------------------------------------- sources: iterators over documents


@dataclass(frozen=True)
class Source:
    name: str
    revision: str  # pins the content
    documents: Iterable  # str, or whatever else a broken row holds


def open_source(source: list[str]) -> Source:
    """The documents behind the words of --source.

    Raises:
        SourceError: nothing there, or not a format that is read here.
    """
    if source == ["fineweb-edu"]:
        return Source(f"{FINEWEB} {FINEWEB_SUBSET}", FINEWEB_REVISION, _fineweb_documents())
    if source == ["sample"]:
        return Source("sample", f"Python {platform.python_version()}", _sample_documents())
    paths = [Path(p) for p in source]
    for path in paths:
        if not path.name.endswith(SUFFIXES):
            raise SourceError(f"{path}: name 'fineweb-edu', 'sample', or files that end in {', '.join(SUFFIXES)}")
        if not path.is_file():
            raise SourceError(f"{path}: no such file; give paths of existing files")
    revision = hashlib.sha256("".join(sha256_of(p) for p in paths).encode()).hexdigest()
    return Source(" ".join(p.name for p in paths), revision, _file_documents(paths))


def _fineweb_documents() -> Iterator:
    import datasets  # here, not above: they take seconds, and only this source needs them
    import huggingface_hub
    import requests

    try:
        # One request of our own first: without a network the clients below retry for half a minute.
        requests.head(huggingface_hub.constants.ENDPOINT, timeout=30)
        rows = datasets.load_dataset(
            FINEWEB, name=FINEWEB_SUBSET, split="train", revision=FINEWEB_REVISION, streaming=True
        )
        for batch in rows.select_columns("text").iter(batch_size=1000):
            yield from batch["text"]
    except Exception as error:  # datasets, huggingface_hub and httpx each raise their own
        raise SourceError(
            f"{huggingface_hub.constants.ENDPOINT}: could not read {FINEWEB} ({type(error).__name__}); "
            "check the network (and HF_ENDPOINT, if set) and run this again; --source sample needs no network"
        ) from error


def _sample_documents() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [p.relative_to(root) for p in root.rglob("*.py") if not SAMPLE_EXCLUDED & set(p.relative_to(root).parts)]
    # In the order of their hashes: shuffled, so that the held-out shard is like the rest, and the same everywhere.
    texts = [
        (root / name).read_text(encoding="utf-8", errors="replace")
        for name in sorted(names, key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    ]
    yield from dict.fromkeys(texts)  # a file that is there twice must not be both held out and trained on


def _file_documents(paths: list[Path]) -> Iterator:
    for path in paths:
        try:
            if path.suffix == ".txt":
                yield path.read_text(encoding="utf-8", errors="replace")
            elif path.suffix == ".parquet":
                yield from _parquet_documents(path)
            else:
                yield from _jsonl_documents(path)
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())  # pyarrow's have several lines
            raise SourceError(f"{path}: cannot be read ({reason}); replace the file") from error


def _parquet_documents(path: Path) -> Iterator:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise SourceError(f"{path}: no column 'text', only {', '.join(file.schema_arrow.names)}; rename yours")
            for batch in file.iter_batches(batch_size=1000, columns=["text"]):
                yield from batch.column(0).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise SourceError(f"{path}: not a whole parquet file ({error}); replace the file") from error


def _jsonl_documents(path: Path) -> Iterator:
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)["text"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise SourceError(f'{path}, line {number}: not a JSON object with a "text"; mend the line') from error


def _chunks(documents: Iterable) -> Iterator[list]:
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(document) if isinstance(document, str) else 0
        if size >= CHUNK_CHARS or len(chunk) >= 10_000:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


# ---------------------------------------------------------------- documents -> ids, in worker processes

_tokenizer: Tokenizer | None = None  # one in each worker


def _start_worker(vocab_size: int, in_pool: bool = True) -> None:
    global _tokenizer
    if in_pool:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent answers it
    _tokenizer = Tokenizer(vocab_size=vocab_size)


def _tokenize(documents: list) -> tuple[np.ndarray, list[int]]:
    """Ids of the documents, one behind the other; and for each that is empty or no text, and is left out, how many
    others come before it."""
    texts, skipped = [], []
    for document in documents:
        if isinstance(document, str) and document:
            texts.append(document)
        else:
            skipped.append(len(texts))
    ids = [_tokenizer.encode_document(text) for text in texts]
    dtype = token_dtype(_tokenizer.vocab_size)
    return np.concatenate(ids or [[]], dtype=dtype, casting="unsafe"), skipped


def _tokenized(chunks: Iterator[list], vocab_size: int, num_proc: int) -> Iterator[tuple[np.ndarray, list[int]]]:
    """`_tokenize` over the chunks in `num_proc` processes, results in the chunks' order, a few chunks ahead."""
    if num_proc == 1:
        _start_worker(vocab_size, in_pool=False)
        yield from map(_tokenize, chunks)
        return
    pool = ProcessPoolExecutor(num_proc, initializer=_start_worker, initargs=(vocab_size,))
    try:
        ahead: deque = deque()
        for chunk in chunks:
            ahead.append(pool.submit(_tokenize, chunk))
            if len(ahead) > 2 * num_proc:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except BrokenProcessPool as error:
        raise SourceError(
            "a worker process died, most likely for want of memory; run the same command with a smaller --num_proc"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------- ids -> shards


class ShardWriter:
    """Cuts a stream of ids into shards of `shard_size` and describes each for the manifest."""

    def __init__(self, out_dir: Path, shard_size: int, tokenizer: Tokenizer):
        self.out_dir, self.tokenizer = out_dir, tokenizer
        self.byte_lengths = tokenizer.token_byte_lengths()
        self.buffer = np.empty(shard_size, dtype=token_dtype(tokenizer.vocab_size))
        self.filled = 0
        self.shards: list[dict] = []

    def add(self, ids: np.ndarray) -> None:
        while len(ids):
            piece = ids[: len(self.buffer) - self.filled]
            self.buffer[self.filled : self.filled + len(piece)] = piece
            self.filled += len(piece)
            ids = ids[len(piece) :]
            if self.filled == len(self.buffer):
                self.write(self.buffer)
                self.filled = 0

    def close(self, split_single: bool) -> None:
        """Write what is left. A corpus that fits one shard has no training data: with `split_single`, its first tenth
        becomes the validation shard and the rest a training shard."""
        rest = self.buffer[: self.filled]
        if split_single and not self.shards:
            self.write(rest[: len(rest) // 10])
            rest = rest[len(rest) // 10 :]
        if len(rest):
            self.write(rest)

    def write(self, ids: np.ndarray) -> None:
        name = shard_name(len(self.shards))
        with atomic_write(self.out_dir / name) as file:
            np.save(file, ids)
        blocks = range(0, len(ids), 2**20)  # so that the look-up of byte lengths takes no second shard's memory
        self.shards.append(
            {
                "file": name,
                "split": "train" if self.shards else "val",
                "tokens": len(ids),
                "documents": int(np.count_nonzero(ids == self.tokenizer.bos_id)),  # those that begin here
                "text_bytes": int(sum(self.byte_lengths[ids[i : i + 2**20]].sum() for i in blocks)),
                "sha256": sha256_of(self.out_dir / name),
            }
        )


def prepare(
    source: list[str],
    out_dir: str | Path,
    *,
    vocab_size: int,
    shard_size: int | None = None,
    max_tokens: int | None = None,
    num_proc: int = 1,
    show_progress: bool = True,
) -> dict:
    """Write the shards and the manifest of `source` into `out_dir`; return the manifest.

    Args:
        source: ["fineweb-edu"], ["sample"], or paths of .jsonl, .jsonl.gz, .parquet and .txt files.
        shard_size: tokens in every shard but the last. None: 100 million (the sample: 2^17), and a corpus
            smaller than that is split a tenth to nine tenths.
        max_tokens: stop behind the document that reaches this many tokens.
        num_proc: worker processes; 1 works in this one.

    Raises:
        SourceError: the source cannot be read, or `out_dir` holds other data. What this call wrote is removed.
    """
    tokenizer, out_dir = Tokenizer(vocab_size=vocab_size), Path(out_dir)
    opened = open_source(source)
    recipe = {
        "format_version": SHARD_FORMAT_VERSION,
        "source": opened.name,
        "revision": opened.revision,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": vocab_size,
        "dtype": token_dtype(vocab_size).name,
        "shard_size": shard_size,
        "max_tokens": max_tokens,
    }
    if is_prepared(out_dir):
        try:
            manifest = {**json.loads((out_dir / MANIFEST).read_text())}
        except (ValueError, TypeError) as error:
            raise SourceError(f"{out_dir / MANIFEST}: not a manifest; delete {out_dir} and run this again") from error
        different = [f"{k} {manifest.get(k)} there, {now} asked" for k, now in recipe.items() if manifest.get(k) != now]
        if different:
            raise SourceError(f"{out_dir}: holds other data ({'; '.join(different)}); choose another --out_dir")
        return manifest
    out_dir.mkdir(parents=True, exist_ok=True)
    # Of a run that was killed: without a manifest it is no data.
    for leftover in [*out_dir.glob("edufineweb_*.npy"), *out_dir.glob(".edufineweb_*.tmp")]:
        leftover.unlink()

    size = shard_size or (SAMPLE_SHARD_SIZE if source == ["sample"] else 100_000_000)
    writer = ShardWriter(out_dir, size, tokenizer)
    tokens, skipped = 0, 0
    try:
        with (
            tqdm(total=max_tokens, unit="token", unit_scale=True, disable=not show_progress) as progress,
            closing(_tokenized(_chunks(opened.documents), vocab_size, num_proc)) as results,
        ):
            for ids, left_out in results:
                if max_tokens is not None and tokens + len(ids) >= max_tokens:
                    ends = np.flatnonzero(ids == tokenizer.eos_id) + 1
                    last = np.searchsorted(ends, max_tokens - tokens)
                    ids, left_out = ids[: ends[last]], [i for i in left_out if i <= last]
                skipped += len(left_out)
                writer.add(ids)
                tokens += len(ids)
                progress.update(len(ids))
                if max_tokens is not None and tokens >= max_tokens:
                    break
        if not tokens:
            raise SourceError(f"{opened.name}: no document has any text; check the source")
        writer.close(split_single=shard_size is None)
        manifest = {
            **recipe,
            "documents": sum(shard["documents"] for shard in writer.shards),
            "skipped_documents": skipped,
            "tokens": tokens,
            "shards": writer.shards,
        }
        with atomic_write(out_dir / MANIFEST, "w") as file:
            json.dump(manifest, file, indent=1)
    except BaseException:
        for shard in out_dir.glob("edufineweb_*.npy"):
            shard.unlink()
        if not any(out_dir.iterdir()):
            out_dir.rmdir()
        raise
    return manifest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", nargs="+", default=["fineweb-edu"], help="fineweb-edu, sample, or paths (default: fineweb-edu)")
    add("--out_dir", help="folder for the shards (default: data/ and the source's name)")
    add("--vocab_size", type=int, help="ids, 512 to 128256 (default: 128256; the sample: 4096)")
    add("--shard_size", type=int, help="tokens in a shard (default: 100 million; the sample: 131072)")
    add("--max_tokens", type=int, help="stop behind the document that reaches this many tokens (default: all)")
    add("--num_proc", type=int, default=os.cpu_count(), help="worker processes (default: one a core)")
    args = parser.parse_args()
    for name in ("shard_size", "max_tokens", "num_proc"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    is_sample = args.source == ["sample"]
    default_name = "fineweb-edu-10BT" if args.source == ["fineweb-edu"] else Path(args.source[0]).name.split(".")[0]
    out_dir = args.out_dir or f"data/{default_name}"

    began, was_prepared = time.perf_counter(), is_prepared(out_dir)
    try:
        manifest = prepare(
            args.source,
            out_dir,
            vocab_size=args.vocab_size or (SAMPLE_VOCAB_SIZE if is_sample else 128_256),
            shard_size=args.shard_size,
            max_tokens=args.max_tokens,
            num_proc=args.num_proc,
        )
    except (SourceError, ValueError, OSError) as error:
        print(f"load_fineweb_dataset.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("load_fineweb_dataset.py: stopped; the unfinished folder was cleared", file=sys.stderr)
        return 130
    seconds, shards, tokens = time.perf_counter() - began, manifest["shards"], manifest["tokens"]
    print(
        f"{out_dir}: {'already prepared, ' if was_prepared else ''}{manifest['documents']:,} documents "
        f"({manifest['skipped_documents']} without text left out), {tokens:,} tokens in {len(shards)} shards "
        f"({shards[0]['tokens']:,} for validation), {sum(s['text_bytes'] for s in shards) / tokens:.2f} bytes a token; "
        f"{seconds:.1f} s"
    )
    if len(shards) == 1:
        print("All of it fits the validation shard: for training data, choose a smaller --shard_size.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
