"""Where documents come from: FineWeb-Edu on the Hugging Face hub, files of your own, or the sample corpus.

A source numbers its documents from 0. Its `revision` pins their order. A source can be read from any number on, so a
preparation goes on after a kill, and a download after a lost connection.
"""

import errno
import gzip
import hashlib
import json
import math
import os
import platform
import sys
import sysconfig
import time
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import IO, TypeVar

from files import sha256_of

FINEWEB = "HuggingFaceFW/fineweb-edu"
FINEWEB_REVISION = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
FINEWEB_FOLDER = "sample/10BT"  # 9,672,101 documents in 14 parquet files of 28.5 GB
FINEWEB_TOKENS = 10_000_000_000  # about, in Llama 3's whole vocabulary

# Tests differ between installations. encodings/ and pydoc_data/ hold tables and prose. The others are not the library.
SAMPLE_EXCLUDED = {"test", "tests", "idle_test", "encodings", "pydoc_data"}
SAMPLE_EXCLUDED |= {"site-packages", "dist-packages", "__pycache__"}

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt")
BATCH_DOCUMENTS = 200  # that many web pages are nearly a megabyte
BATCH_BYTES = 2**20  # a batch of long documents holds fewer: a larger batch does not fit the processors' caches
STREAM_BLOCK = 2**24  # bytes of a request
RETRY_SECONDS = (1, 2, 4, 8, 16, 32)  # pauses between attempts that bring nothing new; after the last, give up

T = TypeVar("T")


class SourceError(Exception):
    """A source cannot be read. The message is one sentence with the cure."""


class Source:
    """Numbered documents. `name` says which they are, and `revision` pins their content and order."""

    name: str
    revision: str

    def read(self, first: int = 0) -> Iterator[Sequence]:
        """The documents from number `first` on, in batches: lists, or arrow arrays.

        A document is a str. A broken row may hold anything else.

        Raises:
            SourceError: the source cannot be read, or not to its end.
        """
        raise NotImplementedError


def open_source(words: list[str], *, stream: bool = False) -> Source:
    """The source that the words of --source name.

    Args:
        words: ["fineweb-edu"], ["sample"], or paths of .jsonl, .jsonl.gz, .parquet and .txt files.
        stream: read the hub's files over the network, without a copy on the disk.

    Raises:
        SourceError: there is no such file, or its format is not read here.
    """
    if words == ["fineweb-edu"]:
        return Hub(stream)
    if stream:
        raise SourceError(f"--stream reads from the hub, and --source {' '.join(words)} is not there; leave it out")
    if words == ["sample"]:
        return Sample()
    paths = [Path(word) for word in words]
    for path in paths:
        if not path.name.endswith(SUFFIXES):
            raise SourceError(f"{path}: name fineweb-edu or sample alone, or files that end in {', '.join(SUFFIXES)}")
        if not path.is_file():
            raise SourceError(f"{path}: no such file; give paths of existing files")
    return Files(paths)


# ---------------------------------------------------------------- the sample corpus


class Sample(Source):
    """The source code of Python's standard library: real text that is on every machine already."""

    name = "sample"
    revision = f"Python {platform.python_version()}"

    def read(self, first: int = 0) -> Iterator[Sequence]:
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = [p.relative_to(root) for p in root.rglob("*.py")]
        names = [path.as_posix() for path in paths if not SAMPLE_EXCLUDED & set(path.parts)]
        # The order of hashes is a shuffle that is the same on every machine. So the held-out shard is like the rest.
        names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
        texts = [(root / name).read_text(encoding="utf-8", errors="replace") for name in names]
        texts = list(dict.fromkeys(texts))  # a text that two files share must not be both held out and trained on
        yield from (texts[i : i + BATCH_DOCUMENTS] for i in range(first, len(texts), BATCH_DOCUMENTS))


# ---------------------------------------------------------------- files of your own


class Files(Source):
    """Files, one after the other. A .txt is one document. A .jsonl has a document a line, a .parquet one a row."""

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self.name = " ".join(path.name for path in paths)
        self.revision = hashlib.sha256("".join(sha256_of(path) for path in paths).encode()).hexdigest()

    def read(self, first: int = 0) -> Iterator[Sequence]:
        for path in self.paths:
            batches = {".txt": _text_batches, ".parquet": _parquet_batches}.get(path.suffix, _jsonl_batches)
            try:
                first = yield from batches(path, first)
            except (OSError, EOFError, ValueError, zlib.error) as error:  # pyarrow raises ValueErrors
                reason = " ".join(str(error).split())  # on one line
                raise SourceError(f"{path}: cannot be read ({reason}); replace the file") from error


# Each reader yields batches of a file's documents from number `first` on. If the file has fewer documents than `first`,
# the reader returns how many of the `first` remain to be skipped in the next files.


def _text_batches(path: Path, first: int) -> Generator[Sequence, None, int]:
    if not first:
        yield [path.read_text(encoding="utf-8", errors="replace")]
    return max(0, first - 1)


def _jsonl_batches(path: Path, first: int) -> Generator[Sequence, None, int]:
    batch, size = [], 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if first:
                first -= 1
                continue
            try:
                batch.append(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise SourceError(f'{path}, line {number}: not a JSON object with a "text"; mend the line') from error
            size += len(line)
            if len(batch) == BATCH_DOCUMENTS or size > BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
    return first


def _parquet_batches(path: str | Path, first: int, file: IO | None = None) -> Generator[Sequence, None, int]:
    """`file` holds the bytes if they are not in a local file `path`. Messages then still name `path`."""
    import pyarrow.parquet  # here, not above: the import is slow, and workers do not need it

    # Many small reads instead of whole row groups keep the memory the same for files of any shape.
    with pyarrow.parquet.ParquetFile(file or path, buffer_size=2**20, pre_buffer=False) as parquet:
        if "text" not in parquet.schema_arrow.names:
            names = ", ".join(parquet.schema_arrow.names)
            raise SourceError(f"{path}: no column 'text', only {names}; rename yours")
        groups = list(range(parquet.num_row_groups))
        while groups and first >= (rows := parquet.metadata.row_group(groups[0]).num_rows):
            first -= rows
            del groups[0]
        if not groups:
            return first
        group_bytes = sum(parquet.metadata.row_group(i).total_byte_size for i in range(parquet.num_row_groups))
        rows = BATCH_BYTES * parquet.metadata.num_rows // max(1, group_bytes)
        rows = max(1, min(rows, BATCH_DOCUMENTS))
        for batch in parquet.iter_batches(rows, row_groups=groups, columns=["text"]):
            column = batch.column(0)
            if first >= len(column):
                first -= len(column)
                continue
            if first or column.nbytes > 4 * BATCH_BYTES:
                yield from ([document] for document in column[first:].to_pylist())
                first = 0
            else:
                yield column  # as an arrow array: a worker receives it without a Python object for every document
    return 0


# ---------------------------------------------------------------- the Hugging Face hub


class Hub(Source):
    """FineWeb-Edu's 10-billion-token sample, through huggingface_hub.

    That client waits as a 429 asks for, repeats requests that fail with 5xx, and resumes a file that broke off. Where
    it gives up, this class tries again after the last document that came, with growing pauses.
    """

    name = f"{FINEWEB} {FINEWEB_FOLDER}"
    revision = FINEWEB_REVISION

    def __init__(self, stream: bool):
        self.stream = stream

    @cached_property
    def files(self) -> list:
        """The parquet files in order: `RepoFile`s with path, size and lfs.sha256."""
        import huggingface_hub

        files = huggingface_hub.HfApi().list_repo_tree(
            FINEWEB, FINEWEB_FOLDER, revision=self.revision, repo_type="dataset"
        )
        return sorted((file for file in files if file.path.endswith(".parquet")), key=lambda file: file.path)

    def read(self, first: int = 0) -> Iterator[Sequence]:
        pauses = iter(RETRY_SECONDS)
        while True:
            try:
                for batch in self._read(first):
                    yield batch
                    first += len(batch)
                    pauses = iter(RETRY_SECONDS)
                return
            except SourceError:
                raise
            except Exception as error:  # huggingface_hub, fsspec, httpx and pyarrow all raise errors of their own
                pause = None if _is_final(error) else next(pauses, None)
                if pause is None:
                    raise self._failure(error) from error
                print(f"{FINEWEB}: {error_reason(error)}; trying again in {pause} s", file=sys.stderr)
                time.sleep(pause)

    def _read(self, first: int) -> Iterator[Sequence]:
        files = list(self.files)
        while files and first:  # of whole files before `first`, only the footers are fetched
            rows = self._num_rows(files[0])
            if first < rows:
                break
            first -= rows
            del files[0]
        if self.stream:
            for file in files:
                with self._open(file) as remote:
                    first = yield from _parquet_batches(file.path, first, remote)
        else:
            # The next file is downloaded while this one is read.
            for path in filter(None, read_ahead(map(self._download, files), 1)):
                first = yield from _parquet_batches(path, first)

    def _open(self, file) -> IO:
        from huggingface_hub import HfFileSystem

        path = f"datasets/{FINEWEB}@{self.revision}/{file.path}"
        return HfFileSystem().open(path, block_size=STREAM_BLOCK, cache_type="readahead")

    def _num_rows(self, file) -> int:
        import pyarrow.parquet

        with self._open(file) as remote:
            return pyarrow.parquet.read_metadata(remote).num_rows

    def _download(self, file) -> str:
        """Fetch a file into the hub's cache, unless it is there. Return its path."""
        import huggingface_hub

        path = huggingface_hub.hf_hub_download(FINEWEB, file.path, repo_type="dataset", revision=self.revision)
        if os.path.getsize(path) != file.size or sha256_of(path) != file.lfs.sha256:
            os.remove(os.path.realpath(path))  # the cache holds a link to it
            raise OSError(f"{file.path} came damaged")
        return path

    def disk_needed(self, max_tokens: int | None) -> list[tuple[Path, int]]:
        """Pairs of a folder and the bytes that the download takes there before `max_tokens` are reached.

        Raises:
            SourceError: the hub cannot be reached, or does not have the files.
        """
        from huggingface_hub import constants, try_to_load_from_cache

        try:
            reach_hub()
            files = self.files
        except Exception as error:  # the same kinds as in read()
            raise self._failure(error) from error
        if self.stream:
            return []
        share = 1 if max_tokens is None else min(1, max_tokens / FINEWEB_TOKENS)
        files = files[: math.ceil(share * len(files)) + 2]  # and two files ahead: one waits, one is being downloaded
        cached = {"repo_id": FINEWEB, "revision": self.revision, "repo_type": "dataset"}
        missing = [f for f in files if not try_to_load_from_cache(filename=f.path, **cached)]
        return [(Path(constants.HF_HUB_CACHE), sum(file.size for file in missing))]

    def _failure(self, error: Exception) -> SourceError:
        from huggingface_hub import constants

        return SourceError(
            f"{constants.ENDPOINT}: could not read {FINEWEB} ({error_reason(error)}); check the network "
            "(and HF_ENDPOINT, if set) and run this again; --source sample needs no network"
        )


def reach_hub() -> None:
    """Ask the hub once, unless HF_HUB_OFFLINE is set. Without a network its client would retry for half a minute.

    Raises:
        requests.RequestException: nothing answers.
    """
    import requests
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        requests.head(constants.ENDPOINT, timeout=30)


def http_status(error: Exception) -> int | None:
    """The status of the HTTP response behind an error, None if no response came."""
    response = getattr(error, "response", None)
    if response is None:  # an error response is false
        response = getattr(error.__cause__, "response", None)
    return None if response is None else response.status_code


def _is_final(error: Exception) -> bool:
    """Whether trying again cannot help: the hub refuses, or the disk is full."""
    status = http_status(error)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 429)
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES)


def error_reason(error: Exception) -> str:
    """What went wrong on the way to the hub, in a few words."""
    import requests

    status = http_status(error)
    if status is not None:
        return f"status {status}"
    if isinstance(error, requests.RequestException):
        return type(error).__name__  # its message is a nest of objects
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def read_ahead(items: Iterable[T], size: int) -> Iterator[T | None]:
    """The items, which a thread draws up to `size` ahead of the consumer. Yields None for a second without an item."""
    queue: Queue = Queue(size)
    stopped = Event()

    def put(*entry) -> None:
        while not stopped.is_set():
            try:
                return queue.put(entry, timeout=0.1)
            except Full:
                continue

    def draw() -> None:
        try:
            for item in items:
                put(item, None)
                if stopped.is_set():
                    return
            put(None, StopIteration())
        except BaseException as error:
            put(None, error)

    Thread(target=draw, daemon=True).start()  # a daemon, so that Ctrl-C does not wait for a download
    try:
        while True:
            try:
                item, error = queue.get(timeout=1)
            except Empty:
                yield None
                continue
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stopped.set()


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
