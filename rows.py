"""The rows of JSON, CSV and plain text files, and what is said about a row that is broken."""

import codecs
import csv
import io
import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from json.decoder import WHITESPACE as SPACE
from typing import IO, Any

BLOCK_BYTES = 2**20  # bytes or characters read at once
MAX_SHOWN = 20  # names in a message

# The longer marks come first: that of UTF-32 begins with that of UTF-16.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
JSON_TYPES = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "a truth value"}
JSON_TYPES[type(None)] = "null"


class SourceError(Exception):
    """A source cannot be read. The message is one sentence and names the cure."""


class BadRowError(Exception):
    """A row cannot be read. The message says what was found in its place."""


@dataclass(frozen=True)
class ReadOptions:
    """How files are read; the same names as the flags of load_fineweb_dataset.py."""

    text_column: str = "text"
    encoding: str | None = None  # of .txt, .csv and JSON files. None: that of the byte order mark, or UTF-8
    document_separator: str | None = None  # between the documents of a .txt file. None: a file is one document
    skip_bad_rows: int = 0  # how many rows may be broken

    def __post_init__(self) -> None:
        if self.encoding is not None:
            try:
                "".encode(self.encoding)
            except LookupError:
                raise ValueError(f"--encoding {self.encoding}: unknown; utf-8, latin-1 and gbk are known") from None
        if self.document_separator == "":
            raise ValueError("--document_separator is empty; give the text that stands between two documents")


def open_rows(
    content: IO[bytes], name: str, suffix: str, options: ReadOptions
) -> tuple[Iterator[tuple[int, Any]], Callable[[Any], Any], str]:
    """The rows of a file with their numbers, a function from a row to its document, and what the numbers count."""
    content = io.BufferedReader(content, BLOCK_BYTES)
    head = content.peek(4)[:4]
    encoding = _encoding(head, options.encoding)
    if options.encoding is None and encoding == "utf-8" and b"\0" in head:
        raise nul_error(name)
    if suffix == ".txt":
        guessed = options.encoding is None and encoding == "utf-8"
        return _texts(content, name, encoding, options.document_separator, guessed), lambda text: text, "document"
    if suffix == ".csv":
        return *_csv_rows(content, name, encoding, options.text_column), "line"
    if suffix == ".json" and content.peek().decode(encoding, "ignore").lstrip().startswith("["):
        text = io.TextIOWrapper(content, encoding)
        return _array_elements(text, name), partial(_text_of, column=options.text_column), "element"
    if encoding == "utf-8-sig":
        content.read(len(codecs.BOM_UTF8))  # then lines of bytes, so that a broken one can be named and skipped
    elif encoding != "utf-8":
        content = io.TextIOWrapper(content, encoding, newline="\n")
    rows = ((number, line) for number, line in enumerate(content, start=1) if line.strip())
    return rows, partial(_text_of_line, column=options.text_column), "line"


def _encoding(first_bytes: bytes, chosen: str | None) -> str:
    """The encoding of a file: the chosen one, or that of its byte order mark, or UTF-8."""
    marked = next((name for mark, name in BYTE_ORDER_MARKS.items() if first_bytes.startswith(mark)), None)
    if chosen is None:
        return marked or "utf-8"
    same = marked is not None and codecs.lookup(chosen).name.startswith(marked.removesuffix("-sig"))
    return marked if same else chosen  # the codec of the mark leaves the mark out of the text


def _texts(
    content: IO[bytes], name: str, encoding: str, separator: str | None, guessed: bool
) -> Iterator[tuple[int, str]]:
    """The documents of a .txt file: all of it, or its parts between separators, without line ends around them."""
    text = io.TextIOWrapper(content, encoding)
    if separator is None:
        documents = iter([text.read()])
    else:
        documents = (part.strip("\n") for part in _split(text, separator) if part.strip())
    for number, document in enumerate(documents, start=1):
        if guessed and "\0" in document:
            raise nul_error(name)
        yield number, document


def nul_error(name: str) -> SourceError:
    return SourceError(
        f"{name}: holds NUL characters, as binary files and UTF-16 without a byte order mark do; "
        "pass --encoding, or leave the file out if it is no text"
    )


def _split(text: IO[str], separator: str) -> Iterator[str]:
    rest = ""
    while block := text.read(max(BLOCK_BYTES, len(rest))):  # a long rest is not copied for each small block
        *parts, rest = (rest + block).split(separator)
        yield from parts
    yield rest


def _csv_rows(
    content: IO[bytes], name: str, encoding: str, column: str
) -> tuple[Iterator[tuple[int, Any]], Callable[[Any], Any]]:
    csv.field_size_limit(2**31 - 1)  # the default, 131,072 characters, is less than many documents have
    lines = csv.reader(io.TextIOWrapper(content, encoding, newline=""), strict=True)
    header = next(lines, [])
    separator = next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), None)
    if separator is not None:
        raise SourceError(f"{name}: its values are separated by {separator!r}, not by commas; convert the file")
    if header.count(column) != 1:
        raise no_column(name, column, header, header)
    index = header.index(column)

    def rows() -> Iterator[tuple[int, Any]]:
        while True:
            begin = lines.line_num + 1
            try:
                row = next(lines, None)
            except csv.Error as error:
                if "unexpected end of data" in str(error):  # every row after the quote is in this one
                    raise SourceError(f"{name}, line {begin}: a quote opens and never closes; mend it") from error
                row = str(error)
            if row is None:
                return
            if row:
                yield begin, (index, row)  # the index too: a digest of the rows must notice another order of columns

    def parse(numbered_row: tuple[int, list[str] | str]) -> str:
        index, row = numbered_row
        if isinstance(row, str):
            raise BadRowError(f"no CSV ({row})")
        if len(row) != len(header):
            raise BadRowError(f"{len(row)} values where the first line has {len(header)} names")
        return row[index]

    return rows(), parse


def _array_elements(text: IO[str], name: str) -> Iterator[tuple[int, Any]]:
    """The elements of one JSON array, read a block at a time, because the array may be larger than memory."""
    decoder, buffer, number = json.JSONDecoder(), text.read(BLOCK_BYTES), 0
    position = buffer.index("[") + 1
    while True:
        position = SPACE.match(buffer, position).end()
        try:
            if buffer[position : position + 1] == "]":
                if (buffer[position + 1 :] + text.read()).strip():
                    raise SourceError(f"{name}: something follows the array; put all objects into one array")
                return
            if number:
                if buffer[position : position + 1] != ",":
                    raise json.JSONDecodeError("Expecting ',' or ']'", buffer, position)
                element, end = decoder.raw_decode(buffer, SPACE.match(buffer, position + 1).end())
            else:
                element, end = decoder.raw_decode(buffer, position)
        except (ValueError, RecursionError) as error:
            # The element may go on in the next block, unless the error lies well before the end of this one.
            at_end = isinstance(error, json.JSONDecodeError) and (
                error.msg.startswith("Unterminated string") or error.pos > len(buffer) - 32
            )
            block = text.read(max(BLOCK_BYTES, len(buffer))) if at_end else ""
            if not block:
                reason = getattr(error, "msg", "nested too deep, or a number with too many digits")
                raise SourceError(
                    f"{name}, element {number + 1} of the array: not whole ({reason}); mend it"
                ) from error
            buffer, position = buffer[position:] + block, 0
            continue
        number += 1
        yield number, element
        position = end


def _text_of_line(line: bytes | str, column: str) -> Any:
    """The document in a line of JSON."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRowError(_found(line, error)) from error
    return _text_of(row, column)


def _text_of(row: Any, column: str) -> Any:
    if not isinstance(row, dict):
        raise BadRowError(f"{JSON_TYPES[type(row)]} where an object with {column!r} is due")
    if column not in row:
        texts = [key for key, value in row.items() if isinstance(value, str)]
        cure = f"pass --text_column {shlex.quote(texts[0])}" if len(texts) == 1 else "--text_column names another"
        raise BadRowError(f"no {column!r} in the object, only {listed(row)} ({cure})")
    return row[column]


def _found(line: bytes | str, error: Exception) -> str:
    """What a line holds that is not JSON, in a few words."""
    if "\0" in line if isinstance(line, str) else b"\0" in line:
        return "NUL characters"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte 0x{error.object[error.start]:02x}); --encoding names another encoding"
    if isinstance(error, RecursionError):
        return "JSON that is nested too deep"
    if not isinstance(error, json.JSONDecodeError):
        return f"a value that Python does not read ({error})"
    text = (line if isinstance(line, str) else line.decode("utf-8", "replace")).strip().lstrip("\ufeff")
    if error.msg.startswith("Extra data"):
        rest = text[error.pos :].lstrip(" ,")
        return "two objects on one line" if rest.startswith("{") else "an object and something after it"
    if text.startswith("{'"):
        return "single quotes where JSON has double quotes"
    if text.startswith("<"):
        return "HTML or XML where a JSON object is due"
    if text in ("{", "["):
        return "JSON that is spread over several lines; each line must hold a whole object"
    if error.msg.startswith("Unterminated string") or error.pos >= len(text):
        return "JSON that does not end on its line"
    return f"no whole JSON object ({error.msg} at character {error.colno})"


def no_column(name: str, column: str, columns: Sequence[str], texts: Sequence[str]) -> SourceError:
    """The error for a file without the column of text. `texts`: the columns that could be meant."""
    cure = f"pass --text_column {shlex.quote(texts[0])}" if len(texts) == 1 else "name one with --text_column"
    if column in columns:
        return SourceError(f"{name}: has several columns {column!r}; rename them, or {cure}")
    return SourceError(f"{name}: no column {column!r}, only {listed(columns)}; {cure}")


def listed(names: Iterable[str]) -> str:
    """The first names of a list, for a message."""
    names = list(names)
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return ", ".join(map(str, names[:MAX_SHOWN])) + more if names else "nothing"


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
