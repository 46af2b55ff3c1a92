"""Where documents come from: FineWeb-Edu on the Hugging Face hub, files of your own, or the sample corpus.

A source numbers its documents from 0. Its `revision` pins their order. Reading can start at any number. So a
preparation goes on after a kill, and a download goes on after a lost connection.
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
FINEWEB_TOKENS = 10_000_000_000  # about, with Llama 3's whole vocabulary

# Installations differ in their tests. encodings/ and pydoc_data/ hold tables and prose. The others are not the library.
SAMPLE_EXCLUDED = {"test", "tests", "idle_test", "encodings", "pydoc_data"}
SAMPLE_EXCLUDED |= {"site-packages", "dist-packages", "__pycache__"}

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt")
BATCH_DOCUMENTS = 200  # most documents in a batch: 200 web pages are nearly a megabyte
BATCH_BYTES = 2**20  # long documents make shorter batches, because larger ones do not fit the processors' caches
STREAM_BLOCK = 2**24  # bytes per request
RETRY_SECONDS = (1, 2, 4, 8, 16, 32)  # pauses after attempts that bring no new document; after the last, give up

T = TypeVar("T")


class SourceError(Exception):
    """A source cannot be read. The message is one sentence and names the cure."""


class Source:
    """Documents, numbered from 0. `name` says which documents they are. `revision` pins their content and order."""

    name: str
    revision: str

    def read(self, first: int = 0) -> Iterator[Sequence]:
        """Yields the documents from number `first` on, in batches. A batch is a list or an arrow array.

        A document is a str. A broken row may hold anything else.

        Raises:
            SourceError: the source cannot be read, or the reading failed before its end.
        """
        raise NotImplementedError


def open_source(words: list[str], *, stream: bool = False) -> Source:
    """Make the source for the words after --source.

    Args:
        words: ["fineweb-edu"], ["sample"], or paths of .jsonl, .jsonl.gz, .parquet and .txt files.
        stream: read the hub's files over the network, without a copy on the disk.

    Raises:
        SourceError: a file is missing or has an unknown suffix, or `stream` is set and the source is not the hub.
    """
    if words == ["fineweb-edu"]:
        return Hub(stream)
    if stream:
        raise SourceError(f"--stream reads from the hub; leave it out with --source {' '.join(words)}")
    if words == ["sample"]:
        return Sample()
    paths = [Path(word) for word in words]
    for path in paths:
        if not path.name.endswith(SUFFIXES):
            raise SourceError(f"{path}: give fineweb-edu or sample alone, or files that end in {', '.join(SUFFIXES)}")
        if not path.is_file():
            raise SourceError(f"{path}: no such file; give paths of existing files")
    return Files(paths)


# ---------------------------------------------------------------- the sample corpus


class Sample(Source):
    """The source code of Python's standard library: real text that every machine already has."""

    name = "sample"
    revision = f"Python {platform.python_version()}"

    def read(self, first: int = 0) -> Iterator[Sequence]:
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = [p.relative_to(root) for p in root.rglob("*.py")]
        names = [path.as_posix() for path in paths if not SAMPLE_EXCLUDED & set(path.parts)]
        # Shuffle the files, so that the held-out shard is like the others. Hashes give every machine the same order.
        names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
        texts = [(root / name).read_text(encoding="utf-8", errors="replace") for name in names]
        texts = list(dict.fromkeys(texts))  # drop copies: a held-out text must not be in the training shards too
        yield from (texts[i : i + BATCH_DOCUMENTS] for i in range(first, len(texts), BATCH_DOCUMENTS))


# ---------------------------------------------------------------- files of your own


class Files(Source):
    """Files, one after the other. A document is a whole .txt file, a line of a .jsonl, or a row of a .parquet."""

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self.name = " ".join(path.name for path in paths)
        self.revision = hashlib.sha256("".join(sha256_of(path) for path in paths).encode()).hexdigest()

    def read(self, first: int = 0) -> Iterator[Sequence]:
        for path in self.paths:
            batches = {".txt": _text_batches, ".parquet": _parquet_batches}.get(path.suffix, _jsonl_batches)
            try:
                first = yield from batches(path, first)
            except (OSError, EOFError, ValueError, zlib.error) as error:  # ValueError: pyarrow's ArrowInvalid is one
                reason = " ".join(str(error).split())  # on one line
                raise SourceError(f"{path}: cannot be read ({reason}); replace the file") from error


# Each reader yields the documents of a file in batches, without the first `skip` documents. It returns how many
# documents the next files must skip: more than 0 if this file has fewer than `skip`.


def _text_batches(path: Path, skip: int) -> Generator[Sequence, None, int]:
    if not skip:
        yield [path.read_text(encoding="utf-8", errors="replace")]
    return max(0, skip - 1)


def _jsonl_batches(path: Path, skip: int) -> Generator[Sequence, None, int]:
    batch, size = [], 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if skip:
                skip -= 1
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
    return skip


def _parquet_batches(path: str | Path, skip: int, file: IO | None = None) -> Generator[Sequence, None, int]:
    """Read the local file `path`, or `file` if it is given. Error messages name `path` in both cases."""
    import pyarrow.parquet  # here, not above: the import is slow, and workers do not need it

    # Many small reads, not whole row groups: so the memory needed does not depend on the size of the row groups.
    with pyarrow.parquet.ParquetFile(file or path, buffer_size=2**20, pre_buffer=False) as parquet:
        if "text" not in parquet.schema_arrow.names:
            names = ", ".join(parquet.schema_arrow.names)
            raise SourceError(f"{path}: no column 'text', only {names}; rename the column of texts")
        groups = list(range(parquet.num_row_groups))
        while groups and skip >= (rows := parquet.metadata.row_group(groups[0]).num_rows):
            skip -= rows
            del groups[0]
        if not groups:
            return skip
        group_bytes = sum(parquet.metadata.row_group(i).total_byte_size for i in range(parquet.num_row_groups))
        rows = BATCH_BYTES * parquet.metadata.num_rows // max(1, group_bytes)  # rows of average size in BATCH_BYTES
        rows = max(1, min(rows, BATCH_DOCUMENTS))
        for batch in parquet.iter_batches(rows, row_groups=groups, columns=["text"]):
            column = batch.column(0)
            if skip >= len(column):
                skip -= len(column)
                continue
            if skip or column.nbytes > 4 * BATCH_BYTES:  # a part of a batch, or documents far above the average size
                yield from ([document] for document in column[skip:].to_pylist())
                skip = 0
            else:
                yield column  # not a list: an arrow array reaches a worker without a Python object per document
    return 0


# ---------------------------------------------------------------- the Hugging Face hub


class Hub(Source):
    """FineWeb-Edu's 10-billion-token sample, read with huggingface_hub.

    That client waits as long as a status 429 asks for, repeats requests that fail with a 5xx status, and resumes a
    broken download. If the client gives up, this class pauses and goes on after the last document. The pauses grow.
    """

    name = f"{FINEWEB} {FINEWEB_FOLDER}"
    revision = FINEWEB_REVISION

    def __init__(self, stream: bool):
        self.stream = stream

    @cached_property
    def files(self) -> list:
        """The hub's list of the parquet files, in order: `RepoFile`s with path, size and lfs.sha256."""
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
            except Exception as error:  # huggingface_hub, fsspec, httpx and pyarrow have no common error class
                pause = None if _is_final(error) else next(pauses, None)
                if pause is None:
                    raise self._failure(error) from error
                print(f"{FINEWEB}: {error_reason(error)}; trying again in {pause} s", file=sys.stderr)
                time.sleep(pause)

    def _read(self, skip: int) -> Iterator[Sequence]:
        files = list(self.files)
        while files and skip:  # fetch only the footers of files to be skipped: they have the numbers of rows
            rows = self._num_rows(files[0])
            if skip < rows:
                break
            skip -= rows
            del files[0]
        if self.stream:
            for file in files:
                with self._open(file) as remote:
                    skip = yield from _parquet_batches(file.path, skip, remote)
        else:
            # The thread of read_ahead downloads the next files while this one is read.
            for path in filter(None, read_ahead(map(self._download, files), 1)):
                skip = yield from _parquet_batches(path, skip)

    def _open(self, file) -> IO:
        from huggingface_hub import HfFileSystem

        path = f"datasets/{FINEWEB}@{self.revision}/{file.path}"
        return HfFileSystem().open(path, block_size=STREAM_BLOCK, cache_type="readahead")

    def _num_rows(self, file) -> int:
        import pyarrow.parquet

        with self._open(file) as remote:
            return pyarrow.parquet.read_metadata(remote).num_rows

    def _download(self, file) -> str:
        """Download a file into huggingface_hub's cache, unless it is there. Return its path. OSError: it is damaged."""
        import huggingface_hub

        path = huggingface_hub.hf_hub_download(FINEWEB, file.path, repo_type="dataset", revision=self.revision)
        if os.path.getsize(path) != file.size or sha256_of(path) != file.lfs.sha256:
            os.remove(os.path.realpath(path))  # `path` may be a link: remove the file itself
            raise OSError(f"{file.path} came damaged")
        return path

    def disk_needed(self, max_tokens: int | None) -> list[tuple[Path, int]]:
        """Pairs of a folder and the bytes to be downloaded into it until `max_tokens` are read (None: all tokens).

        Raises:
            SourceError: the hub cannot be reached, or it does not list the files.
        """
        from huggingface_hub import constants, try_to_load_from_cache

        try:
            reach_hub()
            files = self.files
        except Exception as error:  # as in read(), no common error class
            raise self._failure(error) from error
        if self.stream:
            return []
        share = 1 if max_tokens is None else min(1, max_tokens / FINEWEB_TOKENS)
        files = files[: math.ceil(share * len(files)) + 2]  # +2: one file waits, one is being downloaded
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
    """Send the hub one request, unless HF_HUB_OFFLINE is set. huggingface_hub would retry for about 30 s.

    Raises:
        requests.RequestException: no answer came. An answer with an error status raises nothing.
    """
    import requests
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        requests.head(constants.ENDPOINT, timeout=30)


def http_status(error: Exception) -> int | None:
    """The status of the HTTP response that caused an error. None if no response came."""
    response = getattr(error, "response", None)
    if response is None:  # not `or`: a response with an error status is falsy
        response = getattr(error.__cause__, "response", None)
    return None if response is None else response.status_code


def _is_final(error: Exception) -> bool:
    """Whether another attempt cannot help: the hub refuses, the disk is full, or a file may not be written."""
    status = http_status(error)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 429)
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES)


def error_reason(error: Exception) -> str:
    """A few words that say why the hub could not be read: a status, or the kind of error."""
    import requests

    status = http_status(error)
    if status is not None:
        return f"status {status}"
    if isinstance(error, requests.RequestException):
        return type(error).__name__  # its message is a long chain of nested errors
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def read_ahead(items: Iterable[T], size: int) -> Iterator[T | None]:
    """Yields the items, which a thread reads ahead: `size` items wait, and the thread reads one more.

    After each second without an item it yields None, so that the caller can do something else. Raises what `items`
    raises.
    """
    queue: Queue = Queue(size)
    stopped = Event()

    def put(*entry) -> None:
        while not stopped.is_set():
            try:
                return queue.put(entry, timeout=0.1)
            except Full:
                continue

    def fill_queue() -> None:
        try:
            for item in items:
                put(item, None)
                if stopped.is_set():
                    return
            put(None, StopIteration())
        except BaseException as error:
            put(None, error)

    Thread(target=fill_queue, daemon=True).start()  # a daemon: Ctrl-C does not wait for a download
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
        stopped.set()  # ends the thread, even if the caller stops early


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
