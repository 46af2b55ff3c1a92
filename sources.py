"""Where documents come from: data sets of the Hugging Face hub, files of your own, or the sample corpus.

A source numbers its documents from 0. Reading can start at any number. So a preparation goes on after a kill, and a
download goes on after a lost connection.
"""

import glob
import hashlib
import itertools
import os
import platform
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple
from functools import cached_property, partial
from pathlib import Path

from files import sha256_of
from hub import DatasetName, parse_name
from hub_dataset import FINEWEB, HubDataset
from readers import BATCH_DOCUMENTS, COMPRESSIONS, FORMATS, SUFFIXES, Batch, Reader, file_format, named_damage
from rows import ReadOptions, SourceError, listed

# Installations differ in their tests. encodings/ and pydoc_data/ hold tables and prose. The others are not the library.
SAMPLE_EXCLUDED = {"test", "tests", "idle_test", "encodings", "pydoc_data"}
SAMPLE_EXCLUDED |= {"site-packages", "dist-packages", "__pycache__"}

SAVED_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # of `datasets`


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

    def read(self, first: int = 0, before: tuple[str, str, int] | None = None, bad_rows: int = 0) -> Iterator[Batch]:
        """Yields the documents from number `first` on, in batches.

        Args:
            before: of the batch that an earlier run saw at `first`: its two digests, and its number of documents. The
                rows must still be the same. None skips the comparison.
            bad_rows: how many broken rows it met before.

        Raises:
            SourceError: the source cannot be read, the reading failed before its end, or rows that the earlier run
                has read have changed.
        """
        digest, end_digest, length = before or ("", "", 0)
        reader, seen = Reader(self.options, first, bad_rows, border=length), 0
        changed = SourceError(
            f"{self.name}: changed where an earlier run has read it already; choose another --out_dir, or delete it"
        )
        for batch in (batch for part in self.parts for batch in part.batches(reader)):
            if before and not seen and batch.digest != digest:
                raise changed
            seen += len(batch.documents)
            if before and seen == length and batch.end_digest != end_digest:
                raise changed
            yield batch
        if seen < length:
            raise changed


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
        SourceError: a word names nothing that can be read.
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
    for part in parts:
        if isinstance(part, Files):
            part.drop_repetitions()
    return source


def check_flags(sources: Sequence[Source], stream: bool) -> None:
    """Raises SourceError if a flag has no use for any of the sources."""
    parts = [part for source in sources for part in source.parts]
    on_hub = any(isinstance(part, HubDataset) for part in parts)
    names = " ".join(source.name for source in sources)
    formats = {file_format(path.name)[0] for part in parts if isinstance(part, Files) for path in part.paths}
    if sources[0].options.document_separator is not None and ".txt" not in formats and not on_hub:
        raise SourceError(f"--document_separator divides .txt files; leave it out with {names}")
    if stream and not on_hub:
        raise SourceError(f"--stream reads from the hub; leave it out with {names}")


def _hub_name(word: str) -> DatasetName | None:
    """The data set that a word names. None if the word is a path."""
    if not word:
        raise SourceError("--source has an empty word; name a data set, a folder or a file")
    if word.startswith("~") and not word.startswith("~/"):
        raise SourceError(f"{word}: no such file or folder; give a path without ~")
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
        found = [entry for entry in _walk(path) if _is_corpus_file(entry.relative_to(path))]
    elif glob.has_magic(word):
        fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        matches = (Path(match) for match in glob.glob(str(path), recursive=True))
        found = [match for match in matches if _is_corpus_file(match.relative_to(fixed)) and not match.is_dir()]
    else:
        raise SourceError(
            f"{word}: no such file or folder; give paths, OWNER/NAME of a data set of the hub, fineweb-edu, or sample "
            "alone"
        )
    if odd := [entry for entry in found if not entry.is_file()]:
        raise SourceError(f"{odd[0]}: a broken link, or not a regular file; remove or rename it")
    found = sorted(found)
    if not found:
        raise SourceError(f"{word}: holds no file that ends in {SUFFIXES}; give another folder or glob")
    return found


def _walk(folder: Path) -> Iterator[Path]:
    """All that lies in a folder and its subfolders, folders aside. Links are followed, but no folder is entered twice.

    Raises:
        SourceError: a subfolder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise SourceError(f"{error.filename}: cannot be read ({error.strerror}); give another folder, or allow it")

    seen = set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        seen.add(os.path.realpath(root))
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(root, name)) not in seen]
        yield from (Path(root, name) for name in names)


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
        digest = reader.digest.hexdigest()
        for first in range(reader.skip, len(texts), BATCH_DOCUMENTS):
            yield Batch(texts[first : first + BATCH_DOCUMENTS], digest, digest)


class Files:
    """Files of your own, one after the other. readers.py says what a document is in each format."""

    def __init__(self):
        self.places: list[Path] = []  # what the words name
        self.paths: list[Path] = []  # the files there

    def drop_repetitions(self) -> None:
        """Read a file that is named twice, or reached over two links, only once."""
        once = list({path.resolve(): path for path in reversed(self.paths)}.values())[::-1]
        if len(once) < len(self.paths):
            print(
                f"{self.name}: {len(self.paths) - len(once)} files are named twice; each is read once", file=sys.stderr
            )
        self.paths = once

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
    def stamps(self) -> list[tuple[int, int]]:
        """Size and time of the last change of each file."""
        return [_stamp(path) for path in self.paths]

    @cached_property
    def digests(self) -> list[str]:
        self.stamps  # noqa: B018 (before the first byte is read)
        return [sha256_of(path) for path in self.paths]

    @property
    def revision(self) -> str:
        return _digest(self.digests)

    def check(self, options: ReadOptions) -> None:
        """Raises SourceError if a file has no column of text."""
        for path in self.paths:
            with named_damage(path):
                Reader(options).check(str(path), partial(open, path, "rb"))

    def batches(self, reader: Reader) -> Iterator[Batch]:
        for path, digest, stamp in zip(self.paths, self.digests, self.stamps, strict=True):
            with named_damage(path):
                yield from reader.read(str(path), partial(open, path, "rb"), digest)
                if _stamp(path) != stamp:
                    raise SourceError(f"{path}: changed while it was read; run this again when it no longer changes")


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
