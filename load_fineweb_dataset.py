"""Documents -> token shards: FineWeb-Edu's 10-billion-token sample, the sample corpus, or files of your own.

    python load_fineweb_dataset.py                                   FineWeb-Edu sample-10BT, from the Hugging Face hub
    python load_fineweb_dataset.py --stream                          the same, without a copy of its 28.5 GB on the disk
    python load_fineweb_dataset.py --max_tokens 300_000_000          its first 300 million tokens
    python load_fineweb_dataset.py --source sample                   Python's standard library; needs no network
    python load_fineweb_dataset.py --source a.jsonl.gz b.parquet c.txt --out_dir data/mine
    python load_fineweb_dataset.py --verify                          check a prepared folder, to the last id
    python load_fineweb_dataset.py --stats                           what a prepared folder holds

Every document becomes <|begin_of_text|> text <|end_of_text|>; all of them, in order, form one stream of ids, cut
into shards of equal size. Shard 0 is for validation. The bytes depend on the source, the vocabulary and the shard
size alone, not on the number of processes, nor on how often the work was killed and started again: the same command
goes on after the last whole shard. `manifest.json`, written last, describes the folder and makes it complete.
"""

import argparse
import io
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from hashlib import sha256
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

import inspect_data
from files import (
    MANIFEST,
    SHARD_FORMAT_VERSION,
    atomic_write,
    check_free_space,
    is_prepared,
    sha256_of,
    shard_name,
    token_dtype,
)
from sources import FINEWEB_TOKENS, Hub, Source, SourceError, open_source
from tokenizer import Tokenizer
from workers import LEFT_OUT, num_cores, tokenized

SAMPLE_ROOT = "data/sample"
SAMPLE_VOCAB_SIZE = 4096
SAMPLE_SHARD_SIZE = 2**17  # so that the validation shard is 4% of a corpus of about 3 million tokens

PROGRESS = "progress.json"  # beside the shards until the manifest takes its place: what is whole, where to go on


class ShardWriter:
    """Cuts a stream of ids into shards of `shard_size`, written as they come, and describes each for the manifest.

    Args:
        shards: descriptions of those that are there already.
    """

    def __init__(self, out_dir: Path, shard_size: int, tokenizer: Tokenizer, shards: list[dict]):
        self.out_dir, self.shard_size, self.shards = out_dir, shard_size, shards
        self.bos_id, self.dtype = tokenizer.bos_id, token_dtype(tokenizer.vocab_size)
        self.byte_lengths = tokenizer.token_byte_lengths().astype(np.uint8)  # at most 128; small, for the cache
        self.filled = 0  # tokens in the open shard
        self._open = ExitStack()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception) -> None:
        self._open.__exit__(*exception)

    def add(self, ids: np.ndarray) -> None:
        """Append ids, at most as many as the open shard has room for; a full shard is closed."""
        if not self.filled:
            name = shard_name(len(self.shards))
            self._file = self._open.enter_context(atomic_write(self.out_dir / name))
            self._digest = sha256()
            self._write(self._header(self.shard_size))
            self._shard = {"file": name, "split": "train" if self.shards else "val"}
            self._shard |= {"tokens": 0, "documents": 0, "text_bytes": 0}
        self._write(np.ascontiguousarray(ids).data)
        self._shard["documents"] += int(np.count_nonzero(ids == self.bos_id))  # those that begin here
        self._shard["text_bytes"] += int(self.byte_lengths.take(ids).sum(dtype=np.int64))
        self.filled += len(ids)
        if self.filled == self.shard_size:
            self._end(self._digest.hexdigest())

    def close(self, split_single: bool) -> None:
        """Close the last shard, short as it is. A corpus that fits one shard has no training data: with `split_single`,
        its first tenth becomes the validation shard and the rest a training shard."""
        if self.filled:
            self._file.seek(0)
            self._file.write(self._header(self.filled))  # as long as the one before: numpy pads it
            self._file.flush()
            self._end(sha256_of(self._file.name))
            if split_single and len(self.shards) == 1:
                ids = np.load(self.out_dir / self.shards.pop()["file"])
                for self.shard_size in (len(ids) // 10, len(ids) - len(ids) // 10):
                    piece, ids = ids[: self.shard_size], ids[self.shard_size :]
                    self.add(piece)

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)

    def _header(self, tokens: int) -> bytes:
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (tokens,)}
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, header)
        return file.getvalue()

    def _end(self, digest: str) -> None:
        self._open.close()  # to the disk, under its name
        self.shards.append({**self._shard, "tokens": self.filled, "sha256": digest})
        self.filled = 0


def prepare(
    source: list[str],
    out_dir: str | Path,
    *,
    vocab_size: int,
    shard_size: int | None = None,
    max_tokens: int | None = None,
    num_proc: int = 1,
    stream: bool = False,
    show_progress: bool = True,
) -> dict:
    """Write the shards and the manifest of `source` into `out_dir`, after those that are there; return the manifest.

    Args:
        source: ["fineweb-edu"], ["sample"], or paths of .jsonl, .jsonl.gz, .parquet and .txt files.
        shard_size: tokens in every shard but the last. None: 100 million (the sample: 2^17), and a corpus
            smaller than that is split a tenth to nine tenths.
        max_tokens: stop after the document that reaches this many tokens.
        num_proc: worker processes; 1 works in this one.
        stream: read the hub's files over the network, without a copy on the disk.

    Raises:
        SourceError: the source cannot be read, a worker died, or `out_dir` holds other data or another run's work.
            Whole shards stay, and the same call goes on after them.
        OSError: the disk is full, or will not hold what this needs.
    """
    tokenizer, out_dir, opened = Tokenizer(vocab_size=vocab_size), Path(out_dir), open_source(source, stream=stream)
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
        return _read_json(out_dir / MANIFEST, recipe)
    with _locked(out_dir):
        if is_prepared(out_dir):  # by the run that held the lock
            return _read_json(out_dir / MANIFEST, recipe)
        try:
            manifest = _write_shards(opened, out_dir, tokenizer, recipe, num_proc, show_progress)
        except UnicodeDecodeError as error:  # of a parquet file: its bytes are first looked at in the workers
            raise SourceError(f"{opened.name}: not UTF-8 ({error.reason}); replace the file") from error
        with atomic_write(out_dir / MANIFEST, "w") as file:
            json.dump(manifest, file, indent=1)
        (out_dir / PROGRESS).unlink(missing_ok=True)
    return manifest


def _write_shards(
    source: Source, out_dir: Path, tokenizer: Tokenizer, recipe: dict, num_proc: int, show_progress: bool
) -> dict:
    """Returns the manifest."""
    max_tokens = recipe["max_tokens"]
    shard_size = recipe["shard_size"] or (SAMPLE_SHARD_SIZE if source.name == "sample" else 100_000_000)

    # Where to go on: at token `offset` of document number `document`, with the shards and the odd documents before it.
    progress = {"document": 0, "offset": 0, "odd_documents": {}, "shards": []}
    if (out_dir / PROGRESS).is_file():
        progress = _read_json(out_dir / PROGRESS, recipe)
        _check_shards(out_dir, progress["shards"])
    document, offset, shards = progress["document"], progress["offset"], progress["shards"]
    odd_documents = Counter(progress["odd_documents"])
    # Half a shard, or one whose progress was not noted, or the two of a single one that was split: written again.
    leftovers = {path.name for path in out_dir.glob("edufineweb_*.npy")} - {shard["file"] for shard in shards}
    if foreign := leftovers - {shard_name(len(shards)), shard_name(len(shards) + 1)}:
        raise SourceError(f"{out_dir / min(foreign)}: not of this preparation; choose another --out_dir, or delete it")
    for path in [*map(out_dir.joinpath, leftovers), *out_dir.glob(".*.tmp")]:
        path.unlink()
    tokens = sum(shard["tokens"] for shard in shards) - offset  # up to the beginning of the document

    if isinstance(source, Hub):
        few = recipe["dtype"] == "uint16"  # a smaller vocabulary makes more tokens of a text, up to a half more
        expected = min(max_tokens or 10**15, FINEWEB_TOKENS * 3 // 2 if few else FINEWEB_TOKENS)
        shard_bytes = (expected - tokens) * np.dtype(recipe["dtype"]).itemsize
        check_free_space([*source.disk_needed(max_tokens), (out_dir, shard_bytes)])

    with (
        ShardWriter(out_dir, shard_size, tokenizer, shards) as writer,
        tqdm(total=max_tokens, initial=tokens, unit="token", unit_scale=True, disable=not show_progress) as bar,
        closing(tokenized(source, document, tokenizer, num_proc)) as results,
    ):
        for ids, lengths, odd in results:
            if max_tokens is not None and tokens >= max_tokens:
                break
            ends = np.cumsum(lengths)
            if max_tokens is not None and tokens + len(ids) >= max_tokens:
                lengths = lengths[: np.searchsorted(ends, max_tokens - tokens) + 1]
                ends = ends[: len(lengths)]
                ids = ids[: ends[-1]]
            written = offset  # tokens of this batch that are in shards
            while written < len(ids):
                piece = ids[written : written + shard_size - writer.filled]
                writer.add(piece)
                written += len(piece)
                if not writer.filled:
                    # The border is in document k of the batch, or after it.
                    k = int(np.searchsorted(ends, written))
                    begin = int(ends[k] - lengths[k])
                    position = (k + 1, 0) if ends[k] == written else (k, written - begin)
                    before = Counter(kind for i, kind in odd.items() if i < position[0])
                    progress = {"document": document + position[0], "offset": position[1]}
                    progress |= {"odd_documents": odd_documents + before, "shards": writer.shards}
                    with atomic_write(out_dir / PROGRESS, "w") as file:
                        json.dump(recipe | progress, file, indent=1)
            odd_documents.update(kind for i, kind in odd.items() if i < len(lengths))
            document, offset, tokens = document + len(lengths), 0, tokens + len(ids)
            bar.update(len(ids))
        if not tokens:
            raise SourceError(f"{source.name}: no document has any text; check the source")
        writer.close(split_single=recipe["shard_size"] is None)
    return {
        **recipe,
        "documents": sum(shard["documents"] for shard in shards),
        "odd_documents": dict(sorted(odd_documents.items())),
        "tokens": tokens,
        "shards": shards,
    }


def _read_json(path: Path, recipe: dict) -> dict:
    """The manifest or the progress at `path`. Raises SourceError unless it is of this recipe."""
    try:
        content = {**json.loads(path.read_text())}
    except (ValueError, TypeError) as error:
        raise SourceError(f"{path}: not JSON as this writes it; delete {path.parent} and run this again") from error
    different = [f"{k} {content.get(k)} there, {now} asked" for k, now in recipe.items() if content.get(k) != now]
    if different:
        raise SourceError(
            f"{path.parent}: holds other data ({'; '.join(different)}); choose another --out_dir, or delete it"
        )
    return content


def _check_shards(out_dir: Path, shards: list[dict]) -> None:
    for shard in shards:
        path = out_dir / shard["file"]
        try:
            tokens = len(np.load(path, mmap_mode="r"))
        except (OSError, ValueError, EOFError):
            tokens = None
        if tokens != shard["tokens"]:
            raise SourceError(f"{path}: missing or cut short since it was written; delete {out_dir} and run this again")


@contextmanager
def _locked(out_dir: Path) -> Iterator[None]:
    """Keeps a second run out of the folder; leaves none behind where nothing was written."""
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / ".lock"
    try:
        with FileLock(path, timeout=0):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    except Timeout as error:
        raise SourceError(f"{out_dir}: another run is preparing it; wait for its end") from error
    finally:
        if not any(out_dir.iterdir()):
            out_dir.rmdir()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", nargs="+", default=["fineweb-edu"], help="fineweb-edu, sample, or paths (default: fineweb-edu)")
    add("--out_dir", help="folder for the shards (default: data/ and the source's name)")
    add("--vocab_size", type=int, help="ids, 512 to 128256 (default: 128256; the sample: 4096)")
    add("--shard_size", type=int, help="tokens in a shard (default: 100 million; the sample: 131072)")
    add("--max_tokens", type=int, help="stop after the document that reaches this many tokens (default: all)")
    add("--num_proc", type=int, default=num_cores(), help="worker processes (default: one a core)")
    add("--stream", action="store_true", help="read FineWeb-Edu over the network, without a copy on the disk")
    add(
        "--verify", action="store_true", help="only re-hash every shard of --out_dir and check every id; 1 if not whole"
    )
    add("--stats", action="store_true", help="only show what the documents of --out_dir are like")
    args = parser.parse_args()
    for name in ("shard_size", "max_tokens", "num_proc"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    is_sample = args.source == ["sample"]
    default_name = "fineweb-edu-10BT" if args.source == ["fineweb-edu"] else Path(args.source[0]).name.split(".")[0]
    out_dir = args.out_dir or f"data/{default_name}"

    began, was_prepared = time.perf_counter(), is_prepared(out_dir)
    try:
        if args.verify or args.stats:
            manifest = inspect_data.read_manifest(out_dir)
            if args.verify:
                print(inspect_data.verify(out_dir, manifest))
            if args.stats:
                print(inspect_data.stats(out_dir, manifest))
            return 0
        manifest = prepare(
            args.source,
            out_dir,
            vocab_size=args.vocab_size or (SAMPLE_VOCAB_SIZE if is_sample else 128_256),
            shard_size=args.shard_size,
            max_tokens=args.max_tokens,
            num_proc=args.num_proc,
            stream=args.stream,
        )
    except (SourceError, ValueError, OSError) as error:
        print(f"load_fineweb_dataset.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("load_fineweb_dataset.py: stopped; the same command goes on after the last whole shard", file=sys.stderr)
        return 130
    seconds, shards, tokens = time.perf_counter() - began, manifest["shards"], manifest["tokens"]
    left_out = sum(manifest.get("odd_documents", {}).get(kind, 0) for kind in LEFT_OUT)
    print(
        f"{out_dir}: {'already prepared, ' if was_prepared else ''}{manifest['documents']:,} documents "
        f"({left_out:,} without text left out), {tokens:,} tokens in {len(shards)} shards "
        f"({shards[0]['tokens']:,} for validation), {sum(s['text_bytes'] for s in shards) / tokens:.2f} bytes a token; "
        f"{seconds:.1f} s"
    )
    if len(shards) == 1:
        print("All of it fits the validation shard: for training data, choose a smaller --shard_size.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
