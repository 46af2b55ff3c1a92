"""What a folder of prepared token shards holds, and whether it is still what was written.

`python load_fineweb_dataset.py --verify` and `--stats` show both.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from files import MANIFEST, SHARD_FORMAT_VERSION, sha256_of, shard_name, token_dtype
from tokenizer import Tokenizer

BLOCK = 2**22  # ids looked at together
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
WINDOW = 100  # tokens of a window for the eye


def read_manifest(folder: str | Path) -> dict:
    """Raises ValueError where there is none, or where it lacks what is needed here."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{path}: not found; the folder is prepared to its end when it is there")
    try:
        manifest = json.loads(path.read_text())
        for key in ("format_version", "vocab_size", "dtype", "tokenizer_fingerprint", "documents", "tokens"):
            manifest[key]
        for shard in manifest["shards"]:
            for key in ("file", "split", "tokens", "documents", "text_bytes", "sha256"):
                shard[key]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a manifest ({type(error).__name__}: {error}); prepare the folder anew"
        ) from error
    return manifest


def _blocks(path: Path) -> Iterator[np.ndarray]:
    ids = np.load(path, mmap_mode="r")
    for start in range(0, len(ids), BLOCK):
        yield np.asarray(ids[start : start + BLOCK])


def verify(folder: str | Path, manifest: dict) -> str:
    """Compare every byte and every count with the manifest; return the totals in a sentence.

    Raises:
        ValueError: a file differs; the message names the first.
    """
    folder = Path(folder)
    tokenizer = Tokenizer(vocab_size=manifest["vocab_size"])
    if manifest["tokenizer_fingerprint"] != tokenizer.fingerprint:
        raise ValueError(f"{folder / MANIFEST}: written with another tokenizer than tokenizer.model; prepare it anew")
    dtype = token_dtype(tokenizer.vocab_size)
    for key, due in (("format_version", SHARD_FORMAT_VERSION), ("dtype", dtype.name)):
        if manifest[key] != due:
            raise ValueError(f"{folder / MANIFEST}: {key} {manifest[key]} where {due} is due; prepare the folder anew")
    byte_lengths = tokenizer.token_byte_lengths().astype(np.uint8)
    totals = {"tokens": 0, "documents": 0, "text_bytes": 0}
    for index, shard in enumerate(tqdm(manifest["shards"], unit="shard")):
        path = folder / shard_name(index)
        counted = {"tokens": 0, "documents": 0, "text_bytes": 0}
        try:
            if (shard["file"], shard["split"]) != (path.name, "train" if index else "val"):
                raise ValueError(f"the manifest has {shard['file']} of split {shard['split']} in its place")
            if sha256_of(path) != shard["sha256"]:
                raise ValueError("its sha256 is not the manifest's")
            if np.load(path, mmap_mode="r").dtype != dtype:
                raise ValueError(f"its ids are not {dtype}")
            for ids in _blocks(path):
                if (largest := ids.max()) >= tokenizer.vocab_size:
                    raise ValueError(f"id {largest} is outside the vocabulary of {tokenizer.vocab_size}")
                counted["tokens"] += len(ids)
                counted["documents"] += int(np.count_nonzero(ids == tokenizer.bos_id))
                counted["text_bytes"] += int(byte_lengths.take(ids).sum(dtype=np.int64))
            for key, count in counted.items():
                if count != shard[key]:
                    raise ValueError(f"{count:,} {key} where the manifest says {shard[key]:,}")
                totals[key] += count
        except (ValueError, EOFError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise ValueError(f"{path}: {reason}; delete the folder and prepare it anew") from error
    for key in ("tokens", "documents"):
        if totals[key] != manifest[key]:
            raise ValueError(f"{folder / MANIFEST}: {manifest[key]:,} {key} where its shards have {totals[key]:,}")
    unlisted = {path.name for path in folder.glob("*.npy")} - {shard["file"] for shard in manifest["shards"]}
    if unlisted:
        raise ValueError(f"{folder / min(unlisted)}: not in the manifest; delete it")
    return (
        f"{folder}: whole; {len(manifest['shards'])} shards, {totals['documents']:,} documents, "
        f"{totals['tokens']:,} tokens, {totals['text_bytes']:,} bytes of text, as the manifest says"
    )


def stats(folder: str | Path, manifest: dict) -> str:
    """How many documents of which lengths, how many bytes a token, and three random windows of text."""
    folder, tokenizer = Path(folder), Tokenizer(vocab_size=manifest["vocab_size"])
    begins, position = [], 0
    for shard in manifest["shards"]:
        for ids in _blocks(folder / shard["file"]):
            begins.append(np.flatnonzero(ids == tokenizer.bos_id) + position)
            position += len(ids)
    lengths = np.diff(np.concatenate([*begins, [position]]))
    text_bytes = sum(shard["text_bytes"] for shard in manifest["shards"])
    odd = manifest.get("odd_documents", {})
    quantiles = zip(QUANTILES, np.quantile(lengths, QUANTILES), strict=True)
    lines = [
        f"{manifest.get('source')}, revision {manifest.get('revision')}",
        f"documents            {len(lengths):,}",
        *[f"  {kind:<18} {count:,}" for kind, count in odd.items()],
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
