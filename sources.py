"""Where documents come from: data sets of the Hugging Face hub, files of your own, or the sample corpus.

A source numbers its documents from 0. Reading can start at any number. So a preparation goes on after a kill, and a
download goes on after a lost connection.
"""

import csv
import glob
import hashlib
import lzma
import math
import platform
import re
import sys
import sysconfig
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from functools import cached_property, partial
from pathlib import Path

from files import sha256_of
from hub import (
    DatasetName,
    HubFile,
    download,
    error_reason,
    failure,
    is_final,
    open_stream,
    parse_name,
    reach_hub,
    resolve,
)
from readers import BATCH_DOCUMENTS, COMPRESSIONS, FORMATS, SUFFIXES, Batch, Reader, file_format, read_ahead
from rows import ReadOptions, SourceError, listed

# 9,672,101 documents in 14 parquet files of 28.5 GB, about 10 billion tokens with Llama 3's whole vocabulary
FINEWEB = DatasetName("HuggingFaceFW/fineweb-edu", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9", folder="sample/10BT")
BYTES_A_TOKEN = {".parquet": 2.85, "": 4.4}  # FineWeb-Edu's parquet files; other files hold text as it is

# Installations differ in their tests. encodings/ and pydoc_data/ hold tables and prose. The others are not the library.
SAMPLE_EXCLUDED = {"test", "tests", "idle_test", "encodings", "pydoc_data"}
SAMPLE_EXCLUDED |= {"site-packages", "dist-packages", "__pycache__"}

SAVED_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # of `datasets`
RETRY_SECONDS = (1, 2, 4, 8, 16, 32)  # pauses after attempts that bring no new document; after the last, give up
DAMAGE = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, csv.Error)  # pyarrow's errors are ValueErrors


class Source:
    """The documents of one or more parts, one part after the other.

    A part has `name`, which says which documents it holds; `label`, a short name for folders; `place`, which no other
    part has; `revision`, which pins content and order; and `batches(reader)`, which yields its documents.
    """

    def __init__(self, parts: list, options: ReadOptions):
        self.parts, self.options = parts, options
        self.name = ", ".join(part.name for part in parts)
        self.label = re.sub(r"[^\w.-]+", "-", parts[0].label).strip(".-_") or "corpus"
        self.id = _digest([part.place for part in parts])[:8]

    @cached_property
    def revision(self) -> str:
        revisions = [part.revision for part in self.parts]
        return revisions[0] if len(revisions) == 1 else _digest(revisions)

    @property
    def hub_parts(self) -> list["HubDataset"]:
        return [part for part in self.parts if isinstance(part, HubDataset)]

    @property
    def pins(self) -> list[dict]:
        """The commit and the files of each data set of the hub. `open_source` takes them for a resumed run."""
        return [
            {"name": part.name, "commit": part.revision, "files": [astuple(file) for file in part.files]}
            for part in self.hub_parts
        ]

    def read(self, first: int = 0, digest: str = "", bad_rows: int = 0) -> Iterator[Batch]:
        """Yields the documents from number `first` on, in batches.

        Args:
            digest: `Batch.digest` that an earlier run saw at `first`. "" skips the comparison.
            bad_rows: how many broken rows it met before.

        Raises:
            SourceError: the source cannot be read, the reading failed before its end, or the rows before `first` have
                changed.
        """
        reader = Reader(self.options, first, bad_rows)
        batches = (batch for part in self.parts for batch in part.batches(reader))
        start = next(batches, None)
        if digest not in ("", reader.digest.hexdigest() if start is None else start.digest):
            raise SourceError(
                f"{self.name}: changed where an earlier run has read it already; choose another --out_dir, or delete it"
            )
        if start is not None:
            yield start
            yield from batches


def open_source(
    words: Sequence[str],
    options: ReadOptions | None = None,
    *,
    stream: bool = False,
    pins: Sequence[dict] = (),
    ignored: Sequence[Path] = (),
) -> Source:
    """Make the source for the words after --source.

    Args:
        words: ["sample"]; or any of fineweb-edu, OWNER/NAME[:CONFIG[:SPLIT]], hf://datasets/..., the address of a data
            set's page, folders, globs and files. An existing path wins over a name.
        stream: read the hub's files over the network, without a copy on the disk.
        pins: `Source.pins` of an earlier run. Data sets of these names are read at these commits.
        ignored: files to leave out of folders and globs.

    Raises:
        SourceError: a word names nothing that can be read, or `stream` is set where no part is on the hub, or offline.
    """
    options, ignored = options or ReadOptions(), [path.resolve() for path in ignored]
    if list(words) == ["sample"]:
        parts: list = [Sample()]
    else:
        parts = []
        for word in words:
            if (name := _hub_name(word)) is not None:
                pin = next((pin for pin in pins if pin["name"] == str(name)), None)
                parts.append(HubDataset(name, stream, pin))
                continue
            if not (parts and isinstance(parts[-1], Files)):
                parts.append(Files())
            parts[-1].places.append(Path(word).expanduser().resolve())
            parts[-1].paths += [path for path in _paths(word) if path.resolve() not in ignored]
    source = Source(parts, options)
    formats = {file_format(path.name)[0] for part in parts if isinstance(part, Files) for path in part.paths}
    if options.document_separator is not None and ".txt" not in formats and not source.hub_parts:
        raise SourceError(f"--document_separator divides .txt files; leave it out with --source {source.name}")
    if stream and not source.hub_parts:
        raise SourceError(f"--stream reads from the hub; leave it out with --source {source.name}")
    return source


def _hub_name(word: str) -> DatasetName | None:
    """The data set that a word names. None if the word is a path."""
    if Path(word).expanduser().exists():
        return None
    if word == "fineweb-edu":
        return FINEWEB
    if "://" not in word and (file_format(word) or word.startswith((".", "~"))):
        return None  # OWNER/NAME in its form, but meant as a file
    name = parse_name(word)
    if name is None and "://" in word:
        raise SourceError(f"{word}: not the address of a data set; give OWNER/NAME[:CONFIG[:SPLIT]]")
    return name


def _paths(word: str) -> list[Path]:
    """The files that a word names: a file, all files of a folder that can be read, or those that match a glob."""
    path = Path(word).expanduser()
    if path.is_file():
        if not file_format(path.name):
            raise SourceError(f"{path}: unknown format; give files that end in {SUFFIXES}")
        return [path]
    if path.is_dir():
        found = [entry for entry in path.rglob("*") if _is_corpus_file(entry.relative_to(path))]
    elif glob.has_magic(word):
        found = [Path(match) for match in glob.glob(str(path), recursive=True) if _is_corpus_file(Path(match))]
    else:
        raise SourceError(
            f"{word}: no such file or folder; give paths, OWNER/NAME of a data set of the hub, fineweb-edu, or sample "
            "alone"
        )
    found = sorted(entry for entry in found if entry.is_file())
    if not found:
        raise SourceError(f"{word}: holds no file that ends in {SUFFIXES}; give another folder or glob")
    return found


def _label(name: str) -> str:
    """A file's name without the suffixes that readers.py knows."""
    for suffixes in (COMPRESSIONS, FORMATS):
        if name.lower().endswith(suffixes):
            name = name[: name.rindex(".")]
    return name


def _is_corpus_file(path: Path) -> bool:
    hidden = any(part.startswith(".") and part.strip(".") for part in path.parts)
    return not hidden and path.name not in SAVED_METADATA and file_format(path.name) is not None


def _digest(words: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(words).encode("utf-8", "surrogateescape")).hexdigest()


class Sample:
    """The source code of Python's standard library: real text that every machine already has."""

    name = label = place = "sample"
    revision = f"Python {platform.python_version()}"

    def check(self, options: ReadOptions) -> None:
        pass

    def batches(self, reader: Reader) -> Iterator[Batch]:
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = [p.relative_to(root) for p in root.rglob("*.py")]
        names = sorted(path.as_posix() for path in paths if not SAMPLE_EXCLUDED & set(path.parts))
        texts = [(root / name).read_text(encoding="utf-8", errors="replace") for name in names]
        reader.digest.update(self.revision.encode())
        for first in range(reader.skip, len(texts), BATCH_DOCUMENTS):
            yield Batch(texts[first : first + BATCH_DOCUMENTS], reader.digest.hexdigest())


class Files:
    """Files of your own, one after the other. readers.py says what a document is in each format."""

    def __init__(self):
        self.places: list[Path] = []  # what the words name
        self.paths: list[Path] = []  # the files there

    @property
    def name(self) -> str:
        return listed(place.name for place in self.places)

    @property
    def label(self) -> str:
        return _label(self.places[0].name)

    @property
    def place(self) -> str:
        return "\n".join(map(str, self.places))

    @cached_property
    def digests(self) -> list[str]:
        return [sha256_of(path) for path in self.paths]

    @property
    def revision(self) -> str:
        return _digest(self.digests)

    def check(self, options: ReadOptions) -> None:
        """Raises SourceError if a file has no column of text."""
        for path in self.paths:
            with _named(path):
                Reader(options).check(str(path), partial(open, path, "rb"))

    def batches(self, reader: Reader) -> Iterator[Batch]:
        for path, digest in zip(self.paths, self.digests, strict=True):
            with _named(path):
                yield from reader.read(str(path), partial(open, path, "rb"), digest)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Make a SourceError that names the file of an error in reading it."""
    try:
        yield
    except DAMAGE as error:
        reason = " ".join(str(error).split())  # on one line
        raise SourceError(f"{path}: cannot be read ({reason}); replace the file") from error


class HubDataset:
    """A data set of the Hugging Face hub.

    If its client gives up, this class pauses and goes on after the last document. The pauses grow.
    """

    def __init__(self, dataset: DatasetName, stream: bool, pin: dict | None = None):
        self.dataset, self.stream, self.pin = dataset, stream, pin
        self.name = self.place = str(dataset)
        words = [dataset.repository.split("/")[1], *dataset.folder.split("/"), dataset.config, dataset.split]
        self.label = "-".join(word for word in words if word and word != "train")
        if dataset == FINEWEB:
            self.label = "fineweb-edu-10BT"

    @cached_property
    def _resolved(self) -> tuple[str, list[HubFile]]:
        if self.pin:
            return self.pin["commit"], [HubFile(*file) for file in self.pin["files"]]
        try:
            return resolve(self.dataset)
        except Exception as error:  # huggingface_hub, datasets, httpx and requests have no common error class
            raise failure(self.dataset, error) from error

    @property
    def revision(self) -> str:
        return self._resolved[0]

    @property
    def files(self) -> list[HubFile]:
        return self._resolved[1]

    def check(self, options: ReadOptions) -> None:
        """Raises SourceError if the hub cannot be reached, or --stream is set offline."""
        from huggingface_hub import constants

        if self.stream and constants.HF_HUB_OFFLINE:
            raise SourceError(
                f"{self.name}: --stream needs the network, but HF_HUB_OFFLINE is set; leave one of them out"
            )
        try:
            reach_hub()
        except Exception as error:  # as in _resolved
            raise failure(self.dataset, error) from error

    def batches(self, reader: Reader) -> Iterator[Batch]:
        reader.digest.update(f"{self.name} {self.revision}".encode())
        skip, bad_rows, pauses = reader.skip, reader.bad_rows, iter(RETRY_SECONDS)
        while True:
            try:
                for batch in self._batches(reader):
                    yield batch
                    skip, bad_rows = skip + len(batch.documents), reader.bad_rows
                    pauses = iter(RETRY_SECONDS)
                return
            except SourceError:
                raise
            except Exception as error:  # as in _resolved; fsspec and pyarrow have others
                pause = None if is_final(error) else next(pauses, None)
                if pause is None:
                    raise failure(self.dataset, error) from error
                print(f"{self.dataset.repository}: {error_reason(error)}; trying again in {pause} s", file=sys.stderr)
                time.sleep(pause)
                reader.skip, reader.bad_rows = skip, bad_rows

    def _batches(self, reader: Reader) -> Iterator[Batch]:
        files = list(self.files)
        while files and reader.skip and (rows := self._num_rows(files[0])) is not None and reader.skip >= rows:
            reader.skip -= rows
            del files[0]
        open_remote = partial(open_stream, self.dataset, self.revision)
        if self.stream:
            for file in files:
                yield from reader.read(self._title(file), partial(open_remote, file), None)
            return
        # The thread of read_ahead downloads the next file while this one is read.
        paths = filter(None, read_ahead(map(partial(download, self.dataset, self.revision), files), 1))
        for file, path in zip(files, paths, strict=True):
            yield from reader.read(self._title(file), partial(open, path, "rb"), None)

    def _title(self, file: HubFile) -> str:
        return f"{self.dataset.repository}/{file.path}"

    def _num_rows(self, file: HubFile) -> int | None:
        """The number of rows in the footer of a parquet file, so that the file need not be downloaded. Else None."""
        import pyarrow.parquet
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE or file_format(file.path) != (".parquet", ""):
            return None
        with open_stream(self.dataset, self.revision, file) as remote:
            return pyarrow.parquet.read_metadata(remote).num_rows

    def disk_needed(self, max_tokens: int | None) -> tuple[list[tuple[Path, int]], int]:
        """What a run until `max_tokens` (None: all) needs: pairs of a folder and bytes to be downloaded; and tokens."""
        from huggingface_hub import constants, try_to_load_from_cache

        expected = sum(
            file.size / BYTES_A_TOKEN.get(file_format(file.path)[0], BYTES_A_TOKEN[""]) for file in self.files
        )
        tokens = int(min(max_tokens or math.inf, expected))
        if self.stream:
            return [], tokens
        files = self.files[: math.ceil(tokens / max(1, expected) * len(self.files)) + 2]  # +2: one waits, one is coming
        cached = {"repo_id": self.dataset.repository, "revision": self.revision, "repo_type": "dataset"}
        missing = [file for file in files if not try_to_load_from_cache(filename=file.path, **cached)]
        return [(Path(constants.HF_HUB_CACHE), sum(file.size for file in missing))], tokens


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
