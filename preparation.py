"""A source -> a folder of shards: which documents are held out, what is written when, and how a killed run goes on.

A hash of its text decides whether a document is held out for validation. So the choice does not depend on the order of
the documents, on the number of processes or on kills, and equal documents are never on both sides. Held-out documents
form shard 0, whole. All others, in order, form one stream of ids, which is cut into shards of equal size.

progress.json is the mark on a folder that is not finished yet. It is written before the first shard and after each
whole one. The next run goes on at the first document of the batch in which that shard ended. `manifest.json` is
written last.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from files import FolderLocked, atomic_write, check_free_space, full_disk_named, lock_folder, replace_synced
from held_out import IN_VAL_SOURCE, LEFT_OUT, TRAIN, VAL, HeldOut, ids_of, write_val_source
from json_files import check_values, read_object
from rows import ReadOptions, SourceError
from shards import (
    COUNTS,
    MANIFEST,
    SHARD_FORMAT_VERSION,
    VAL_TEMPORARY,
    ShardWriter,
    ValidationShard,
    check_shard_list,
    is_prepared,
    open_shard,
    read_manifest,
    shard_name,
    token_dtype,
)
from sources import Sample, Source, check_flags, open_source
from tokenizer import Tokenizer
from workers import Tokenized, tokenized

SHARD_SIZE = 100_000_000
SAMPLE_SHARD_SIZE = 2**17
VAL_FRACTION = 0.01
SAMPLE_VAL_FRACTION = 0.04  # of about 3 million tokens: nearly a shard

PROGRESS = "progress.json"
OWN_TEMPORARY = (".edufineweb_*.tmp", f".{PROGRESS}.*.tmp", f".{MANIFEST}.*.tmp")


def prepare(
    source: list[str],
    out_dir: str | Path,
    *,
    vocab_size: int,
    shard_size: int | None = None,
    max_tokens: int | None = None,
    num_proc: int = 1,
    stream: bool = False,
    options: ReadOptions | None = None,
    val_fraction: float | None = None,
    val_source: list[str] | None = None,
    show_progress: bool = True,
) -> dict:
    """Write the shards and the manifest of `source` into `out_dir`. Return the manifest.

    Whole shards of an earlier call stay, and this call goes on after them. A finished folder stays as it is.

    Args:
        source: the words after --source, as `open_source` takes them.
        vocab_size: number of ids, 512 to 128,256.
        shard_size: tokens in every training shard but the last, and most tokens in the validation shard. None: 100
            million (the sample: 2^17).
        max_tokens: stop after the document that reaches this many tokens, held-out ones included. None: read all.
        num_proc: worker processes. With 1 this process does the work.
        stream: read the hub's files over the network, without a copy on the disk.
        options: how files are read.
        val_fraction: share of the documents to hold out for validation. None: 0.01 (the sample: 0.04).
        val_source: separate documents for validation, named as in `source`. Then none of `source` is held out.

    Raises:
        SourceError: the source cannot be read or has no text, a worker died, `out_dir` holds other data or damaged
            shards, or another run is preparing it.
        OSError: the disk is full, or it has too little room for the hub's files and their shards.
        ValueError: `vocab_size` or `val_fraction` is out of range.
    """
    tokenizer, out_dir, options = Tokenizer(vocab_size=vocab_size), Path(out_dir), options or ReadOptions()
    if val_source and val_fraction is not None:
        raise ValueError("--val_fraction and --val_source exclude each other; leave one of them out")
    default = SAMPLE_VAL_FRACTION if source == ["sample"] else VAL_FRACTION
    val_fraction = default if val_fraction is None else val_fraction
    if not 0 <= val_fraction < 1:
        raise ValueError(f"--val_fraction {val_fraction}: must be at least 0 and less than 1")
    pins = read_mark(out_dir).get("hub", [])
    own_files = [out_dir / MANIFEST, out_dir / PROGRESS]  # `out_dir` may lie in a folder of the source
    opened = open_source(source, options, stream=stream, pins=pins, ignored=own_files)
    val_opened = open_source(val_source, options, stream=stream, pins=pins, ignored=own_files) if val_source else None
    check_flags([opened, val_opened] if val_opened else [opened], stream)
    recipe = _recipe(opened, val_opened, tokenizer, shard_size, max_tokens, None if val_source else val_fraction)
    if is_prepared(out_dir):
        return _finished(out_dir, recipe)
    try:
        with lock_folder(out_dir):
            if is_prepared(out_dir):  # the run that held the lock before has finished the folder
                return _finished(out_dir, recipe)
            return _write_folder(opened, val_opened, out_dir, tokenizer, recipe, num_proc, show_progress)
    except UnicodeDecodeError as error:  # the bytes of an arrow array are not decoded before `tokenize`
        raise SourceError(f"{opened.name}: not UTF-8 ({error.reason}); replace the file") from error
    except FolderLocked as error:
        raise SourceError(f"{out_dir}: another run is preparing it; wait for its end") from error


def _recipe(
    source: Source,
    val_source: Source | None,
    tokenizer: Tokenizer,
    shard_size: int | None,
    max_tokens: int | None,
    val_fraction: float | None,
) -> dict[str, Any]:
    """What decides the bytes of the folder. The manifest and progress.json begin with it."""
    return {
        "format_version": SHARD_FORMAT_VERSION,
        "source": source.name,
        "revision": source.revision,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "shard_size": shard_size,
        "max_tokens": max_tokens,
        "text_column": source.options.text_column,
        "encoding": source.options.encoding,
        "document_separator": source.options.document_separator,
        "val_fraction": val_fraction,
        "val_source": val_source.name if val_source else None,
        "val_revision": val_source.revision if val_source else None,
    }


# ---------------------------------------------------------------- the folder


@dataclass
class Progress:
    """Which shards are whole, and where to go on: at document number `document`, the first one of a batch."""

    document: int = 0
    batch: tuple[str, str, int] = ("", "", 0)  # its digests and its number of documents: its rows must stay the same
    tokens: int = 0  # of the source before `document`, without documents left out
    train_tokens: int = 0  # of these, the tokens for training; the whole shards may hold more
    val: dict[str, int] = field(default_factory=dict)  # what the validation shard holds of the documents before
    odd_documents: dict[str, int] = field(default_factory=dict)  # how many of each kind, before `document`
    shards: list[dict] = field(default_factory=list)  # ShardWriter's descriptions of the whole shards


def _write_folder(
    source: Source,
    val_source: Source | None,
    out_dir: Path,
    tokenizer: Tokenizer,
    recipe: dict,
    num_proc: int,
    show_progress: bool,
) -> dict:
    """Write the shards that are missing, and the manifest. Return the manifest."""
    progress = _load_progress(out_dir, recipe)
    shard_size = recipe["shard_size"] or (SAMPLE_SHARD_SIZE if isinstance(source.parts[0], Sample) else SHARD_SIZE)
    about = {"source_id": source.id, "hub": source.pins + (val_source.pins if val_source else [])}
    try:
        for part in source.parts + (val_source.parts if val_source else []):
            part.check(source.options)
        _check_disk(source, out_dir, recipe, progress.tokens)
        if not progress.shards:
            _save_progress(out_dir, recipe | about, progress)
        with full_disk_named(out_dir), ValidationShard(out_dir, tokenizer, {} if val_source else progress.val) as val:
            held_out = HeldOut(recipe["val_fraction"])
            if val_source:
                held_out = HeldOut(None, write_val_source(val_source, val, tokenizer, num_proc, shard_size))
            before = tuple(progress.batch) if progress.shards else None
            batches = source.read(progress.document, before, progress.odd_documents.get("broken", 0))
            with (
                ShardWriter(out_dir, shard_size, tokenizer, progress.shards) as writer,
                closing(tokenized(batches, tokenizer, num_proc)) as results,
                tqdm(total=recipe["max_tokens"], unit="token", unit_scale=True, disable=not show_progress) as bar,
            ):
                save = partial(_save_progress, out_dir, recipe | about, progress)
                _write_shards(results, progress, held_out, writer, val, recipe["max_tokens"], save, bar)
                writer.close()
            if not progress.tokens:
                in_val_source = progress.odd_documents.get(IN_VAL_SOURCE)
                what = "all documents are in the validation source" if in_val_source else "no document has any text"
                raise SourceError(f"{source.name}: {what}; check the source")
            shards = [val.close(), *writer.shards]
    except BaseException:
        if not progress.shards:  # nothing to go on with: leave no mark
            (out_dir / VAL_TEMPORARY).unlink(missing_ok=True)
            (out_dir / PROGRESS).unlink(missing_ok=True)
        raise
    totals = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens")}
    manifest = recipe | about | {"odd_documents": dict(sorted(progress.odd_documents.items()))} | totals
    manifest["shards"] = shards
    with atomic_write(out_dir / MANIFEST, "w") as file:
        json.dump(manifest, file, indent=1)
    (out_dir / PROGRESS).unlink(missing_ok=True)
    return manifest


def _write_shards(
    results: Iterator[tuple[Tokenized, tuple[str, str]]],
    progress: Progress,
    held_out: HeldOut,
    writer: ShardWriter,
    val: ValidationShard,
    max_tokens: int | None,
    save: Callable[[], None],
    bar: tqdm,
) -> None:
    """Write the batches of `results` into shards, and keep `progress`. `save` writes it into the folder."""
    bar.update(progress.tokens)
    skip = sum(shard["tokens"] for shard in progress.shards) - progress.train_tokens  # written before the kill
    for batch, digests in results:
        progress.batch = (*digests, len(batch.lengths))
        if max_tokens is not None and progress.tokens >= max_tokens:
            return
        parts, notes = held_out.assign(batch, writer.shard_size - val.counts["tokens"])
        tokens = np.where(parts == LEFT_OUT, 0, batch.lengths).cumsum()
        if max_tokens is not None and progress.tokens + tokens[-1] >= max_tokens:  # cut after the document that does it
            parts = parts[: np.searchsorted(tokens, max_tokens - progress.tokens) + 1]
        documents = len(parts)
        train, held_out_ids = (ids_of(batch, parts, part) for part in (TRAIN, VAL))
        written = min(skip, len(train))
        skip -= written
        while written < len(train):
            piece = train[written : written + writer.shard_size - writer.filled]
            writer.add(piece)
            written += len(piece)
            if not writer.filled:  # the shard is full, and the writer has closed it
                val.sync()
                save()
        val.add(held_out_ids)
        bar.update(int(tokens[documents - 1]))
        progress.document += documents
        progress.tokens += int(tokens[documents - 1])
        progress.train_tokens += len(train)
        progress.val = dict(val.counts)
        odd_documents = Counter(kind for i, kind in notes.items() if i < documents)
        progress.odd_documents = dict(Counter(progress.odd_documents) + odd_documents)


def _check_disk(source: Source, out_dir: Path, recipe: dict, tokens: int) -> None:
    """Raises OSError unless the disks have room for what this run still has to download and write."""
    needed, itemsize = [], np.dtype(recipe["dtype"]).itemsize
    for part in source.hub_parts:
        downloads, expected = part.disk_needed(recipe["max_tokens"])
        # A smaller vocabulary makes more tokens of the same text. Expect up to a half more.
        expected = min(recipe["max_tokens"] or math.inf, expected * 3 // 2 if itemsize == 2 else expected)
        needed += [*downloads, (out_dir, max(0, expected - tokens) * itemsize)]
    check_free_space(needed)


def _load_progress(out_dir: Path, recipe: dict) -> Progress:
    """The progress of an earlier run with the same recipe, or of a new run.

    Deletes what that run has left and progress.json does not list. The run writes those shards again.

    Raises:
        SourceError: the folder holds other data, or a listed shard is missing or damaged.
    """
    progress, mark = Progress(), read_mark(out_dir)
    if mark.get("shards"):
        # Not the revision: the rows that are read already must be the same, and Source.read compares their digest.
        _compared(mark, {key: value for key, value in recipe.items() if key != "revision"}, out_dir)
        try:
            progress = Progress(**{name: mark[name] for name in Progress.__dataclass_fields__})
            if [type(value) for value in asdict(progress).values()] != [int, list, int, int, dict, dict, list]:
                raise TypeError("a value has another type")
            check_values(mark, dict.fromkeys(("document", "tokens", "train_tokens"), int))
            check_values(progress.val, dict.fromkeys(COUNTS if progress.val else (), int))
            check_values(progress.odd_documents, dict.fromkeys(progress.odd_documents, int))
            check_shard_list(progress.shards, first=1)
        except (ValueError, KeyError, TypeError) as error:
            raise SourceError(
                f"{out_dir / PROGRESS}: damaged ({error}); delete {out_dir} and run this again"
            ) from error
        _check_shards(out_dir, progress.shards)
    leftovers = {path.name for path in out_dir.glob("edufineweb_*.npy")} - {shard["file"] for shard in progress.shards}
    if (out_dir / VAL_TEMPORARY).is_symlink():  # writing into it would write elsewhere
        raise SourceError(f"{out_dir / VAL_TEMPORARY}: a link, not a file of this program; delete it")
    if (out_dir / VAL_TEMPORARY).exists() and not mark:
        leftovers.add(VAL_TEMPORARY)
    # Where our mark is, two files that it does not list are ours: the next shard, and the validation shard.
    own = {shard_name(len(progress.shards) + 1), shard_name(0)} if mark else set()
    if foreign := leftovers - own:
        raise SourceError(f"{out_dir / min(foreign)}: not of this preparation; choose another --out_dir, or move it")
    if shard_name(0) in leftovers and progress.shards:  # the kill came after the last shard: it grows once more
        replace_synced(out_dir / shard_name(0), out_dir / VAL_TEMPORARY)
        leftovers.remove(shard_name(0))
    for path in [*map(out_dir.joinpath, leftovers), *(path for form in OWN_TEMPORARY for path in out_dir.glob(form))]:
        path.unlink()
    return progress


def _save_progress(out_dir: Path, recipe: dict, progress: Progress) -> None:
    with atomic_write(out_dir / PROGRESS, "w") as file:
        json.dump(recipe | asdict(progress), file, indent=1)


def read_mark(out_dir: Path) -> dict[str, Any]:
    """The manifest of a folder, or the progress of an unfinished one. Empty if it has neither.

    Raises:
        SourceError: the file is not a JSON object, or not of this program.
    """
    path = out_dir / MANIFEST
    if out_dir.exists() and not out_dir.is_dir():
        raise SourceError(f"{out_dir}: a file, not a folder; choose another --out_dir")
    if not path.is_file():
        path = out_dir / PROGRESS
        if not path.is_file():
            return {}
    try:
        mark = read_object(path)
    except ValueError as error:
        raise SourceError(f"{path}: not a JSON object; delete {path.parent} and run this again") from error
    shards, hub = mark.get("shards"), mark.get("hub", [])
    own = "tokenizer_fingerprint" in mark and isinstance(shards, list) and isinstance(hub, list)
    if not own or not all(isinstance(pin, dict) and pin.keys() == {"name", "commit", "files"} for pin in hub):
        raise SourceError(f"{path}: not of this program; choose another --out_dir, or move the file")
    return mark


def _finished(out_dir: Path, recipe: dict) -> dict:
    """The manifest of a folder. Raises SourceError if it has another recipe, and what `read_manifest` raises."""
    _compared(read_mark(out_dir), recipe, out_dir)
    return read_manifest(out_dir)


def _compared(mark: dict, recipe: dict, out_dir: Path) -> dict:
    """`mark`, if it has this recipe. Raises SourceError if not."""
    differences = [
        f"{key} {str(mark.get(key))[:40]} there, {str(now)[:40]} asked"
        for key, now in recipe.items()
        if mark.get(key) != now
    ]
    if differences:
        raise SourceError(
            f"{out_dir}: holds other data ({'; '.join(differences)}); choose another --out_dir, or delete it"
        )
    return mark


def _check_shards(out_dir: Path, shards: list[dict]) -> None:
    """Raises SourceError if a shard is missing or no longer has the length that it was written with."""
    for shard in shards:
        path = out_dir / shard["file"]
        try:
            tokens = len(open_shard(path))
        except (OSError, ValueError):
            tokens = None
        if tokens != shard["tokens"]:
            raise SourceError(f"{path}: missing or cut short since it was written; delete {out_dir} and run this again")


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one. `python load_fineweb_dataset.py` prepares a folder.")
