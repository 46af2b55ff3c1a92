"""Documents -> token shards: FineWeb-Edu's 10-billion-token sample, the sample corpus, or files of your own.

    python load_fineweb_dataset.py                                   FineWeb-Edu sample-10BT, from the Hugging Face hub
    python load_fineweb_dataset.py --stream                          the same, without a copy of its 28.5 GB on the disk
    python load_fineweb_dataset.py --max_tokens 300_000_000          its first 300 million tokens
    python load_fineweb_dataset.py --source sample                   Python's standard library; needs no network
    python load_fineweb_dataset.py --source a.jsonl.gz b.parquet c.txt --out_dir data/mine
    python load_fineweb_dataset.py --verify                          check every byte and id of a prepared folder
    python load_fineweb_dataset.py --stats                           what a prepared folder holds

Every document becomes <|begin_of_text|> text <|end_of_text|>. All documents, in order, form one stream of ids. The
stream is cut into shards of equal size. Shard 0 is for validation. The bytes of the shards depend only on the source,
the vocabulary, the shard size and --max_tokens. The number of processes and kills do not change them. After a kill, the
same command goes on after the last whole shard. `manifest.json` describes the folder. It is written last, so a folder
with a manifest is complete.
"""

import argparse
import json
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from files import FolderLocked, atomic_write, check_free_space, lock_folder
from shards import (
    MANIFEST,
    SHARD_FORMAT_VERSION,
    ShardWriter,
    id_blocks,
    is_prepared,
    read_manifest,
    shard_name,
    token_dtype,
    verify,
)
from sources import FINEWEB_TOKENS, Hub, Source, SourceError, open_source
from threads import num_cores
from tokenizer import Tokenizer
from workers import LEFT_OUT, tokenized

SAMPLE_ROOT = "data/sample"
SAMPLE_VOCAB_SIZE = 4096
SAMPLE_SHARD_SIZE = 2**17  # the validation shard is then 4% of a corpus of about 3 million tokens

PROGRESS = "progress.json"  # lists the whole shards and says where to go on; deleted after the manifest is written

QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
WINDOW = 100  # tokens in each window of text that --stats shows


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
    """Write the shards and the manifest of `source` into `out_dir`. Return the manifest.

    Whole shards of an earlier call stay, and this call goes on after them. A finished folder stays as it is.

    Args:
        source: ["fineweb-edu"], ["sample"], or paths of .jsonl, .jsonl.gz, .parquet and .txt files.
        vocab_size: number of ids, 512 to 128,256.
        shard_size: tokens in every shard but the last. None: 100 million (the sample: 2^17). With None, a corpus
            smaller than one shard is split: the first tenth for validation, the rest for training.
        max_tokens: stop after the document that reaches this many tokens. None: read all documents.
        num_proc: worker processes. With 1 this process does the work.
        stream: read the hub's files over the network, without a copy on the disk.

    Raises:
        SourceError: the source cannot be read or has no text, a worker died, `out_dir` holds other data or damaged
            shards, or another run is preparing it.
        OSError: the disk is full, or it has too little room for the hub's files and their shards.
        ValueError: `vocab_size` is out of range.
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
    try:
        with lock_folder(out_dir):
            if is_prepared(out_dir):  # the run that held the lock before has finished the folder
                return _read_json(out_dir / MANIFEST, recipe)
            try:
                manifest = _write_shards(opened, out_dir, tokenizer, recipe, num_proc, show_progress)
            except UnicodeDecodeError as error:  # a parquet file's bytes are not decoded before `tokenize`
                raise SourceError(f"{opened.name}: not UTF-8 ({error.reason}); replace the file") from error
            with atomic_write(out_dir / MANIFEST, "w") as file:
                json.dump(manifest, file, indent=1)
            (out_dir / PROGRESS).unlink(missing_ok=True)
            return manifest
    except FolderLocked as error:
        raise SourceError(f"{out_dir}: another run is preparing it; wait for its end") from error


@dataclass
class Progress:
    """Which shards are whole, and where to go on: at token `offset` of the document with number `document`."""

    document: int = 0
    offset: int = 0
    odd_documents: dict[str, int] = field(default_factory=dict)  # how many of each kind, before `document`
    shards: list[dict] = field(default_factory=list)  # ShardWriter's descriptions of the whole shards

    @property
    def tokens(self) -> int:
        """Number of tokens before `document`."""
        return sum(shard["tokens"] for shard in self.shards) - self.offset


def _write_shards(
    source: Source, out_dir: Path, tokenizer: Tokenizer, recipe: dict, num_proc: int, show_progress: bool
) -> dict:
    """Write the shards that are missing. Return the manifest."""
    progress, max_tokens = _load_progress(out_dir, recipe), recipe["max_tokens"]
    tokens = progress.tokens
    if isinstance(source, Hub):
        _check_disk(source, out_dir, recipe, tokens)
    shard_size = recipe["shard_size"] or (SAMPLE_SHARD_SIZE if source.name == "sample" else 100_000_000)
    with (
        ShardWriter(out_dir, shard_size, tokenizer, progress.shards) as writer,
        tqdm(total=max_tokens, initial=tokens, unit="token", unit_scale=True, disable=not show_progress) as bar,
        closing(tokenized(source, progress.document, tokenizer, num_proc)) as results,
    ):
        for ids, lengths, notes in results:
            if max_tokens is not None and tokens >= max_tokens:
                break
            ends = np.cumsum(lengths)
            if max_tokens is not None and tokens + len(ids) >= max_tokens:  # cut after the document that reaches it
                lengths = lengths[: np.searchsorted(ends, max_tokens - tokens) + 1]
                ends = ends[: len(lengths)]
                ids = ids[: ends[-1]]
            written = progress.offset  # how many tokens of this batch are in shards already
            while written < len(ids):
                piece = ids[written : written + shard_size - writer.filled]
                writer.add(piece)
                written += len(piece)
                if not writer.filled:  # the shard is full, and the writer has closed it
                    _save_progress(out_dir, recipe, _progress_at_border(progress, ends, notes, written))
            odd_documents = _count_odd_documents(progress, notes, len(lengths))
            progress = Progress(progress.document + len(lengths), 0, odd_documents, writer.shards)
            tokens += len(ids)
            bar.update(len(ids))
        if not tokens:
            raise SourceError(f"{source.name}: no document has any text; check the source")
        writer.close(split_single=recipe["shard_size"] is None)
    return {
        **recipe,
        "documents": sum(shard["documents"] for shard in writer.shards),
        "odd_documents": dict(sorted(progress.odd_documents.items())),
        "tokens": tokens,
        "shards": writer.shards,
    }


def _progress_at_border(progress: Progress, ends: np.ndarray, notes: dict[int, str], written: int) -> Progress:
    """The progress when a shard ends after `written` tokens of a batch. `progress` is from the start of the batch.

    ends: the number of tokens in the batch up to the end of each document. notes: those of `tokenize`.
    """
    k = int(np.searchsorted(ends, written))  # the shard ends inside document k of the batch, or with it
    if ends[k] == written:
        documents, offset = k + 1, 0
    else:
        documents, offset = k, written - (int(ends[k - 1]) if k else 0)
    odd_documents = _count_odd_documents(progress, notes, documents)
    # `progress.shards` is the writer's own list, so it has the new shard already.
    return Progress(progress.document + documents, offset, odd_documents, progress.shards)


def _count_odd_documents(progress: Progress, notes: dict[int, str], documents: int) -> dict[str, int]:
    """How many odd documents of each kind `progress` and the first `documents` of the batch have together."""
    return dict(Counter(progress.odd_documents) + Counter(kind for i, kind in notes.items() if i < documents))


def _check_disk(source: Hub, out_dir: Path, recipe: dict, tokens: int) -> None:
    """Raises OSError unless the disks have room for what this run still has to download and write."""
    # A smaller vocabulary makes more tokens of the same text. Expect up to a half more.
    expected = FINEWEB_TOKENS * 3 // 2 if recipe["dtype"] == "uint16" else FINEWEB_TOKENS
    expected = min(recipe["max_tokens"] or 10**15, expected)
    shard_bytes = (expected - tokens) * np.dtype(recipe["dtype"]).itemsize
    check_free_space([*source.disk_needed(recipe["max_tokens"]), (out_dir, shard_bytes)])


def _load_progress(out_dir: Path, recipe: dict) -> Progress:
    """The progress of an earlier run with the same recipe, or of a new run.

    Deletes temporary files and shards that progress.json does not list. The run writes those shards again.

    Raises:
        SourceError: the folder holds other data, or a listed shard is missing or damaged.
    """
    progress = Progress()
    if (out_dir / PROGRESS).is_file():
        content = _read_json(out_dir / PROGRESS, recipe)
        progress = Progress(**{name: content[name] for name in ("document", "offset", "odd_documents", "shards")})
        _check_shards(out_dir, progress.shards)
    # A kill may leave one shard that is not listed yet, or two if the run was splitting its only shard.
    leftovers = {path.name for path in out_dir.glob("edufineweb_*.npy")} - {shard["file"] for shard in progress.shards}
    next_shards = {shard_name(len(progress.shards)), shard_name(len(progress.shards) + 1)}
    if foreign := leftovers - next_shards:
        raise SourceError(f"{out_dir / min(foreign)}: not of this preparation; choose another --out_dir, or delete it")
    for path in [*map(out_dir.joinpath, leftovers), *out_dir.glob(".*.tmp")]:
        path.unlink()
    return progress


def _save_progress(out_dir: Path, recipe: dict, progress: Progress) -> None:
    with atomic_write(out_dir / PROGRESS, "w") as file:
        json.dump(recipe | asdict(progress), file, indent=1)


def _read_json(path: Path, recipe: dict) -> dict:
    """The manifest or the progress in the file `path`. Raises SourceError if it has another recipe."""
    try:
        content = {**json.loads(path.read_text())}
    except (ValueError, TypeError) as error:
        raise SourceError(f"{path}: not a JSON object; delete {path.parent} and run this again") from error
    differences = [f"{k} {content.get(k)} there, {now} asked" for k, now in recipe.items() if content.get(k) != now]
    if differences:
        raise SourceError(
            f"{path.parent}: holds other data ({'; '.join(differences)}); choose another --out_dir, or delete it"
        )
    return content


def _check_shards(out_dir: Path, shards: list[dict]) -> None:
    """Raises SourceError if a shard is missing or no longer has the length that it was written with."""
    for shard in shards:
        path = out_dir / shard["file"]
        try:
            tokens = len(np.load(path, mmap_mode="r"))
        except (OSError, ValueError, EOFError):
            tokens = None
        if tokens != shard["tokens"]:
            raise SourceError(f"{path}: missing or cut short since it was written; delete {out_dir} and run this again")


def stats(folder: str | Path) -> str:
    """A text about a prepared folder: its documents and their lengths, bytes per token, three random windows of text.

    Lengths are in tokens, with the two control ids.

    Raises:
        FileNotFoundError, ValueError: the folder is not prepared, or a file is damaged.
    """
    folder, manifest = Path(folder), read_manifest(folder)
    tokenizer = Tokenizer(vocab_size=manifest["vocab_size"])
    begins, position = [], 0
    for shard in manifest["shards"]:
        for ids in id_blocks(folder / shard["file"]):
            begins.append(np.flatnonzero(ids == tokenizer.bos_id) + position)
            position += len(ids)
    lengths = np.diff(np.concatenate([*begins, [position]]))
    text_bytes = sum(shard["text_bytes"] for shard in manifest["shards"])
    quantiles = zip(QUANTILES, np.quantile(lengths, QUANTILES), strict=True)
    lines = [
        f"{manifest.get('source')}, revision {manifest.get('revision')}",
        f"documents            {len(lengths):,}",
        *[f"  {kind:<18} {count:,}" for kind, count in manifest.get("odd_documents", {}).items()],
        f"tokens               {position:,} in {len(manifest['shards'])} shards, {tokenizer.vocab_size:,} ids",
        f"bytes a token        {text_bytes / position:.3f}",
        f"tokens a document    mean {lengths.mean():,.0f}, largest {lengths.max():,}",
        *[f"  {q:>4.0%} have at most  {n:,.0f}" for q, n in quantiles],
    ]
    rng = np.random.default_rng()
    for _ in range(3):
        shard = manifest["shards"][rng.integers(len(manifest["shards"]))]
        ids = np.load(folder / shard["file"], mmap_mode="r")
        start = int(rng.integers(max(1, len(ids) - WINDOW)))
        text = tokenizer.decode(ids[start : start + WINDOW].tolist())
        lines += ["", f"----- {shard['file']}, tokens {start:,} to {start + WINDOW:,}", text]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", nargs="+", default=["fineweb-edu"], help="fineweb-edu, sample, or paths (default: fineweb-edu)")
    add("--out_dir", help="folder for the shards (default: data/ and the source's name)")
    add("--vocab_size", type=int, help="number of ids, 512 to 128256 (default: 128256; the sample: 4096)")
    add("--shard_size", type=int, help="tokens in a shard (default: 100 million; the sample: 131072)")
    add("--max_tokens", type=int, help="stop after the document that reaches this many tokens (default: all)")
    add("--num_proc", type=int, default=num_cores(), help="worker processes (default: one a core)")
    add("--stream", action="store_true", help="read FineWeb-Edu over the network, without a copy on the disk")
    add(
        "--verify", action="store_true", help="only check every hash and id of --out_dir; exit status 1 if one is wrong"
    )
    add("--stats", action="store_true", help="only show the lengths and some text of --out_dir's documents")
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
            if args.verify:
                print(verify(out_dir))
            if args.stats:
                print(stats(out_dir))
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
