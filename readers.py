"""The bytes of a file -> batches of documents: JSON, CSV, Parquet, Arrow and plain text, compressed or not.

A row is a line of JSON, an element of a JSON array, a line of CSV, a row of Parquet or Arrow, or a text. Each row is
one document. The readers are our own. Those of `datasets` do not name a broken line, turn dates in JSON into
timestamps, and are slower on Parquet (docs/LOG.md, 2026-11-27).
"""

import bz2
import csv
import gzip
import hashlib
import lzma
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import IO, Any, NamedTuple, TypeVar

from rows import BLOCK_BYTES, BadRowError, ReadOptions, SourceError, listed, no_column, open_rows

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".arrow", ".txt")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
SUFFIXES = f"{', '.join(FORMATS)}, or one of them and {', '.join(COMPRESSIONS)}"

BATCH_DOCUMENTS = 200  # most documents in a batch: 200 web pages are nearly a megabyte
BATCH_BYTES = 2**20  # long documents make shorter batches, because larger ones do not fit the processors' caches


DAMAGE = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, csv.Error)
DAMAGE += (NotImplementedError, KeyError, SystemError)  # pyarrow raises these too, besides ValueErrors

T = TypeVar("T")


class BadRow:
    """Stands in a batch for a row that cannot be read and is skipped."""


class Batch(NamedTuple):
    """Documents, and digests of all rows before them and up to their end. A resumed run compares the digests.

    `documents` is a list or an arrow array. A document is a str. A row without text may hold anything else.
    """

    documents: Sequence
    digest: str
    end_digest: str


def file_format(name: str) -> tuple[str, str] | None:
    """The format and the compression ("" for none) that a file's suffixes name, in small letters. None: unknown."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return (suffixes[-1], compression) if suffixes and suffixes[-1] in FORMATS else None


class Reader:
    """Reads files one after the other. Keeps a digest of the rows that it has read, and counts the broken ones.

    Args:
        skip: number of documents to leave out at the beginning. The attribute counts those that are still to come.
        bad_rows: how many broken rows an earlier run has met among them.
        border: number of documents after these at which a batch ends, so that digests there can be compared.
    """

    def __init__(self, options: ReadOptions, skip: int = 0, bad_rows: int = 0, border: int = 0):
        self.options, self.skip, self.bad_rows, self.border = options, skip, bad_rows, border
        self.digest = hashlib.sha256()

    def read(self, name: str, open_file: Callable[[], IO[bytes]], fingerprint: str | None) -> Iterator[Batch]:
        """Yields the documents of a file.

        Args:
            name: the file's path, for its suffixes and for messages.
            open_file: opens its bytes.
            fingerprint: the sha256 of the file. None: the file cannot change, so the digest leaves it out.

        Raises:
            SourceError: there is no column of text, there are too many broken rows, or the text has another encoding.
            OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, csv.Error: the file is damaged.
        """
        suffix, compression = file_format(name)
        in_columns = suffix in COLUMN_FORMATS
        with open_file() as file, _decompressed(file, compression, seekable=in_columns) as content, _text_named(name):
            if not in_columns:
                yield from self._row_batches(name, content, suffix, fingerprint is not None)
                return
            if fingerprint is not None:
                self.digest.update(fingerprint.encode())
            yield from self._column_batches(COLUMN_FORMATS[suffix](content, name, self.options))

    def check(self, name: str, open_file: Callable[[], IO[bytes]]) -> None:
        """Raises what `read` raises if the file names its columns, and none of them is the column of text."""
        suffix, compression = file_format(name)
        if compression or suffix not in (".csv", *COLUMN_FORMATS):
            return
        with open_file() as content, _text_named(name):
            if suffix == ".csv":
                open_rows(content, name, suffix, self.options)
            else:
                next(COLUMN_FORMATS[suffix](content, name, self.options), None)

    def _row_batches(self, name: str, content: IO[bytes], suffix: str, hashed: bool) -> Iterator[Batch]:
        rows, parse, unit = open_rows(content, name, suffix, self.options)
        for _, row in islice(rows, self.skip):
            self.skip -= 1
            if hashed:
                self._hash(row)
        documents, size, digest = [], 0, self.digest.hexdigest()
        for number, row in rows:
            try:
                document = parse(row)
            except BadRowError as error:
                document = BadRow()
                self._count_bad_row(f"{name}, {unit} {number}: {error}")
            if hashed:
                self._hash(row)
            documents.append(document)
            size += len(document) if isinstance(document, str) else 0
            self.border -= 1
            if len(documents) == BATCH_DOCUMENTS or size > BATCH_BYTES or self.border == 0:
                yield Batch(documents, digest, digest := self.digest.hexdigest())
                documents, size = [], 0
        if documents:
            yield Batch(documents, digest, self.digest.hexdigest())

    def _column_batches(self, parts: Iterable[tuple[int, Callable]]) -> Iterator[Batch]:
        """`parts`: of each part of the file the number of rows, and a function that reads them as arrow arrays."""
        digest = self.digest.hexdigest()
        for num_rows, read_part in parts:
            if self.skip >= num_rows:
                self.skip -= num_rows
                continue
            for column in read_part():
                first, self.skip = self.skip, max(0, self.skip - len(column))
                self.border -= max(0, len(column) - first)
                for documents in _array_slices(column, first):
                    yield Batch(documents, digest, digest)

    def _hash(self, row: Any) -> None:
        self.digest.update(row if isinstance(row, bytes) else repr(row).encode("utf-8", "backslashreplace"))

    def _count_bad_row(self, message: str) -> None:
        self.bad_rows += 1
        limit = self.options.skip_bad_rows
        if self.bad_rows > limit:
            more = f" (after {limit} others)" if limit else ""
            raise SourceError(f"{message}{more}; mend it, or pass --skip_bad_rows {self.bad_rows} or more")
        print(f"skipped: {message}", file=sys.stderr)


@contextmanager
def _decompressed(file: IO[bytes], compression: str, seekable: bool) -> Iterator[IO[bytes]]:
    """The bytes inside a compressed file. With `seekable` they are unpacked into a temporary file first."""
    if compression == ".zst":
        import pyarrow  # here, not above: the import is slow, and workers do not need it

        stream = pyarrow.CompressedInputStream(file, "zstd")
    elif compression:
        stream = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[compression].open(file)
    else:
        yield file
        return
    with stream:
        if not seekable:
            yield stream
            return
        with tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(stream, unpacked, BLOCK_BYTES)
            unpacked.seek(0)
            yield unpacked


@contextmanager
def _text_named(name: str) -> Iterator[None]:
    """Make a SourceError that names the file of bytes that are no text in its encoding."""
    try:
        yield
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise SourceError(
            f"{name}: not {error.encoding} (byte 0x{byte:02x}: {error.reason}); "
            "pass --encoding (latin-1, gbk, utf-16, ...), or leave the file out if it is no text"
        ) from error


# ---------------------------------------------------------------- columns: Parquet, Arrow


def _parquet_parts(content: IO[bytes], name: str, options: ReadOptions) -> Iterator[tuple[int, Callable]]:
    """Of each row group: its number of rows, and a function that reads its documents."""
    import pyarrow.parquet

    # Many small reads, not whole row groups: so the memory needed does not depend on the size of the row groups.
    with pyarrow.parquet.ParquetFile(content, buffer_size=BLOCK_BYTES, pre_buffer=False) as parquet:
        check_column(parquet.schema_arrow, name, options.text_column)
        for i in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(i)
            rows = BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)  # of average size in BATCH_BYTES
            batches = partial(
                parquet.iter_batches,
                max(1, min(rows, BATCH_DOCUMENTS)),
                row_groups=[i],
                columns=[options.text_column],
            )
            yield group.num_rows, lambda batches=batches: (_as_text(batch.column(0)) for batch in batches())


def _arrow_parts(content: IO[bytes], name: str, options: ReadOptions) -> Iterator[tuple[int, Callable]]:
    """Of each record batch: its number of rows, and a function that returns its documents."""
    import pyarrow

    is_file = content.read(6) == b"ARROW1"  # Arrow has two formats: files, and streams, which `datasets` writes
    content.seek(0)
    with (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(content) as arrow:
        check_column(arrow.schema, name, options.text_column)
        batches = (arrow.get_batch(i) for i in range(arrow.num_record_batches)) if is_file else arrow
        for batch in batches:
            yield batch.num_rows, lambda batch=batch: [_as_text(batch.column(options.text_column))]


COLUMN_FORMATS = {".parquet": _parquet_parts, ".arrow": _arrow_parts}


def check_column(schema: Any, name: str, column: str) -> None:
    """Raises SourceError unless the arrow schema of the file `name` has a column of text of this name."""
    texts = [field.name for field in schema if _is_text(field.type)]
    if schema.names.count(column) != 1:
        raise no_column(name, column, schema.names, texts)
    if column not in texts:
        raise SourceError(
            f"{name}: column {column!r} holds {schema.field(column).type}, not text; "
            f"name another with --text_column{f' ({listed(texts)})' if texts else ', or leave the file out'}"
        )


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    tests += (types.is_binary, types.is_large_binary, types.is_binary_view)
    return any(test(kind) for test in tests)


def _as_text(column: Any) -> Any:
    """An array of strings. Raises pyarrow.ArrowInvalid if the column is damaged or holds bytes that are not UTF-8."""
    import pyarrow
    from pyarrow import types

    column.validate(full=True)  # else damaged offsets end the process with a segmentation fault
    is_text = types.is_string(column.type) or types.is_large_string(column.type)
    return column if is_text else column.cast(pyarrow.string())


def _array_slices(column: Any, first: int) -> Iterator[Sequence]:
    """The array from row `first` on: in one piece, or in lists if it is much larger than a batch or cut."""
    if not first and len(column) <= BATCH_DOCUMENTS and column.nbytes <= 4 * BATCH_BYTES:
        yield column  # an arrow array reaches a worker without a Python object per document
        return
    rows = max(1, min(BATCH_DOCUMENTS, BATCH_BYTES * len(column) // max(1, column.nbytes)))
    for start in range(first, len(column), rows):
        yield column[start : start + rows].to_pylist()


@contextmanager
def named_damage(path: Path | str) -> Iterator[None]:
    """Make a SourceError that names the file of an error in reading it."""
    try:
        yield
    except DAMAGE as error:
        reason = " ".join(str(error).split())  # on one line
        raise SourceError(f"{path}: cannot be read ({reason}); replace the file") from error


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
