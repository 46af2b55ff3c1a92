"""Shards of token ids and their manifest: how they lie on the disk, the writer, the reader, the check.

A prepared folder holds shards and `manifest.json`. A shard is a NumPy file with one row of token ids, in the narrowest
unsigned type that holds the vocabulary. Shard 0 is the validation split, all others are the training split. The
manifest is written last, so a folder with a manifest is complete.
"""

import io
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from threading import Lock

import numpy as np
from tqdm import tqdm

from files import atomic_write, replace_synced, sha256_of
from json_files import check_values, read_object, shown
from tokenizer import VOCAB_SIZES, Tokenizer

SHARD_FORMAT_VERSION = 1
MANIFEST = "manifest.json"
COUNTS = ("tokens", "documents", "text_bytes")  # what the manifest counts in each shard
MANIFEST_TYPES = {"vocab_size": int, "documents": int, "tokens": int, "tokenizer_fingerprint": str, "shards": list}
SHARD_TYPES = {"file": str, "split": str, "sha256": str, **dict.fromkeys(COUNTS, int)}
VAL_TEMPORARY = ".edufineweb_val_000000.npy.part"

# TokenStream compares this many ids of a folder with the vocabulary when it opens: all ids of a small folder, in a
# fraction of a second. It compares the other ids when it reads them.
CHECKED_TOKENS = 2**26

IDS_AT_ONCE = 2**22  # where a whole shard is read
BLOCK = 1000  # windows in a row of a mixture that hold the quota of each folder; see dataloaders.py


# ---------------------------------------------------------------- layout


def shard_name(index: int) -> str:
    """File name of shard `index`. Shard 0 is the validation split, all others are training data."""
    return f"edufineweb_{'train' if index else 'val'}_{index:06d}.npy"


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest unsigned type that holds the ids 0 to vocab_size - 1."""
    return np.min_scalar_type(vocab_size - 1)


def is_prepared(data_root: str | Path) -> bool:
    """Whether a folder of shards is complete: its manifest is written last."""
    return (Path(data_root) / MANIFEST).is_file()


def read_manifest(folder: str | Path, flags: str = "") -> dict:
    """The manifest of a prepared folder. `flags` are those that would prepare it, besides --out_dir.

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: the file is not a manifest that this code can use. The message names the cure.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        command = f"python load_fineweb_dataset.py --out_dir {folder}{flags}"
        raise FileNotFoundError(f"{path}: not found, so {folder} is not a prepared folder; `{command}` prepares it")
    try:
        manifest = read_object(path)
        version, dtype = manifest["format_version"], manifest.get("dtype")
        if version == SHARD_FORMAT_VERSION:
            check_values(manifest, MANIFEST_TYPES)
            check_values(odd := manifest.get("odd_documents", {}), dict.fromkeys(odd, int))
            check_shard_list(manifest["shards"], first=0)
            for key in ("tokens", "documents"):
                if (total := sum(shard[key] for shard in manifest["shards"])) != manifest[key]:
                    raise ValueError(f"{manifest[key]:,} {key} where its shards have {total:,}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a manifest ({type(error).__name__}: {error}); delete {folder} and prepare it anew"
        ) from error
    if version != SHARD_FORMAT_VERSION:
        version = shown(version)
        raise ValueError(f"{path}: format {version}, this code reads {SHARD_FORMAT_VERSION}; prepare it anew")
    if dtype != (due := token_dtype(manifest["vocab_size"]).name):
        raise ValueError(f"{path}: dtype {shown(dtype)} where {due} is due; prepare the folder anew")
    return manifest


def check_shard_list(shards: list, first: int) -> None:
    """Raises KeyError, ValueError or TypeError unless these describe shards, each once, from number `first` on."""
    for index, shard in enumerate(shards, start=first):
        check_values(shard, SHARD_TYPES)
        if (shard["file"], shard["split"]) != (shard_name(index), "train" if index else "val"):
            name, split = map(shown, (shard["file"], shard["split"]))
            raise ValueError(f"it has {name} of split {split} in the place of {shard_name(index)}")


def open_shard(path: Path) -> np.ndarray:
    """The ids of a shard, memory-mapped. No code in the file is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a NumPy file with one row of numbers, or it has another length than its header says.
    """
    if not path.is_file():  # or it is a folder, or a pipe that would keep us waiting
        raise FileNotFoundError(f"{path}: listed in the manifest but missing; prepare the folder anew")
    try:
        with np.errstate(over="ignore"):
            shard = np.lib.format.open_memmap(path, mode="r")
        if shard.ndim != 1 or shard.offset + shard.nbytes != path.stat().st_size:
            raise ValueError(f"shape {shard.shape}, {path.stat().st_size:,} bytes")
    except Exception as error:  # NumPy has no error of its own for a bad header: IndexError, TokenError, MemoryError
        raise ValueError(f"{path}: damaged or cut short ({shown(error)}); prepare the folder anew") from error
    return shard


def count_ids(ids: np.ndarray, bos_id: int, byte_lengths: np.ndarray) -> dict[str, int]:
    """What the manifest counts, of some ids. A document counts where it begins."""
    documents, text_bytes = np.count_nonzero(ids == bos_id), byte_lengths.take(ids).sum(dtype=np.int64)
    return {"tokens": len(ids), "documents": int(documents), "text_bytes": int(text_bytes)}


# ---------------------------------------------------------------- writer


class ShardWriter:
    """Cuts a stream of ids into training shards of `shard_size` ids, and describes each shard for the manifest.

    Args:
        shards: descriptions of the training shards that are in the folder already.
    """

    def __init__(self, out_dir: Path, shard_size: int, tokenizer: Tokenizer, shards: list[dict]):
        self.out_dir, self.shard_size, self.shards = out_dir, shard_size, shards
        self.bos_id, self.byte_lengths = tokenizer.bos_id, byte_lengths(tokenizer)
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.filled = 0  # ids in the open shard
        self._open = ExitStack()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception) -> None:
        self._open.__exit__(*exception)

    def add(self, ids: np.ndarray) -> None:
        """Append ids, at most as many as the open shard has room for. A full shard is closed."""
        if not self.filled:
            name = shard_name(len(self.shards) + 1)
            self._file = self._open.enter_context(atomic_write(self.out_dir / name))
            self._digest = sha256()
            self._write(_header(self.dtype, self.shard_size))
            self._shard, self._counts = {"file": name, "split": "train"}, Counter(dict.fromkeys(COUNTS, 0))
        self._write(np.ascontiguousarray(ids).data)
        self._counts.update(count_ids(ids, self.bos_id, self.byte_lengths))
        self.filled += len(ids)
        if self.filled == self.shard_size:
            self._end(self._digest.hexdigest())

    def close(self) -> None:
        """Close the last shard, which may be short."""
        if not self.filled:
            return
        self._file.seek(0)
        self._file.write(_header(self.dtype, self.filled))  # NumPy pads headers: this one has the length of the first
        self._file.flush()
        self._end(sha256_of(self._file.name))

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)

    def _end(self, digest: str) -> None:
        self._open.close()  # the file reaches the disk and takes its name
        self.shards.append({**self._shard, **self._counts, "sha256": digest})
        self.filled = 0


class ValidationShard:
    """Shard 0, which grows along the run under a temporary name and takes its own name at the end.

    Args:
        counts: what an earlier run has written. The file is cut back to it.

    Raises:
        ValueError: the file is shorter than that.
    """

    def __init__(self, out_dir: Path, tokenizer: Tokenizer, counts: dict[str, int]):
        self.path, self.temporary = out_dir / shard_name(0), out_dir / VAL_TEMPORARY
        self.bos_id, self.byte_lengths = tokenizer.bos_id, byte_lengths(tokenizer)
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.counts = Counter(dict.fromkeys(COUNTS, 0) | counts)
        header = _header(self.dtype, 0)
        length = len(header) + self.counts["tokens"] * self.dtype.itemsize
        goes_on = self.counts["tokens"] > 0
        if goes_on and (not self.temporary.is_file() or self.temporary.stat().st_size < length):
            raise ValueError(
                f"{self.temporary}: missing or cut short since it was written; delete {out_dir} and run this again"
            )
        self._file = open(self.temporary, "r+b" if goes_on else "w+b")  # noqa: SIM115, __exit__ closes it
        self._file.write(header)
        self._file.truncate(length)
        self._file.seek(length)

    def __enter__(self) -> "ValidationShard":
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    def add(self, ids: np.ndarray) -> None:
        """Append the ids of whole documents."""
        self._file.write(np.ascontiguousarray(ids).data)
        self.counts.update(count_ids(ids, self.bos_id, self.byte_lengths))

    def sync(self) -> None:
        """Bring all ids to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> dict:
        """Give the file its name. Returns its description for the manifest."""
        self._file.seek(0)
        self._file.write(_header(self.dtype, self.counts["tokens"]))
        self.sync()
        self._file.close()
        replace_synced(self.temporary, self.path)
        return {"file": self.path.name, "split": "val", **self.counts, "sha256": sha256_of(self.path)}


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """The number of bytes of each id. A token has at most 128, so a uint8 does: the table fits a processor's cache."""
    return tokenizer.token_byte_lengths().astype(np.uint8)


def _header(dtype: np.dtype, tokens: int) -> bytes:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (tokens,)}
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


# ---------------------------------------------------------------- reader


class TokenStream:
    """The shards of one split as one long sequence of ids. Threads may share it.

    Args:
        data_root: a prepared folder.
        split: "train" or "val".
        vocab_size: ids of the model. The folder must have the same number.
        fingerprint: `Tokenizer.fingerprint` that the folder must have been written with. None skips that check.
        quota: how many windows of every BLOCK come from this folder, where dataloaders.py mixes several.

    Raises:
        FileNotFoundError, ValueError: the folder is not prepared, does not fit, or is damaged. The message names the
            file and the cure.
    """

    def __init__(
        self, data_root: str | Path, split: str, *, vocab_size: int, fingerprint: str | None = None, quota: int = BLOCK
    ):
        self.root, self.quota = Path(data_root), quota
        path = self.root / MANIFEST
        self.manifest = read_manifest(self.root, f" --vocab_size {vocab_size}")
        folder_vocab = self.manifest["vocab_size"]
        if folder_vocab != vocab_size:
            raise ValueError(
                f"{path}: the data has a vocabulary of {folder_vocab}, the model one of {vocab_size}; "
                f"pass --model.vocab_size {folder_vocab}, or prepare another folder with --vocab_size {vocab_size}"
            )
        if fingerprint is not None and self.manifest["tokenizer_fingerprint"] != fingerprint:
            raise ValueError(f"{path}: written with another tokenizer than tokenizer.model; prepare the folder anew")
        shards = [shard for shard in self.manifest["shards"] if shard["split"] == split]
        if not shards:
            change = "larger" if split == "val" else "smaller"
            raise ValueError(f"{path}: lists no {split} shard; prepare the folder anew with a {change} --val_fraction")

        self.dtype, self.vocab_size = np.dtype(self.manifest["dtype"]), vocab_size
        self.files = [shard["file"] for shard in shards]
        self.ends = np.cumsum(counts := [shard["tokens"] for shard in shards])  # the stream position after each shard
        self._lock = Lock()  # of the files' positions
        self._open_files = [self._open(index, n, CHECKED_TOKENS // len(shards)) for index, n in enumerate(counts)]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids at stream positions start to stop - 1, over shard borders, as int64.

        Raises:
            ValueError: an id is outside the vocabulary, or a file cannot be read any more.
        """
        pieces = [np.empty(0, dtype=np.int64)]
        for index in range(np.searchsorted(self.ends, start, side="right"), len(self.ends)):
            begin = self.ends[index - 1] if index else 0
            if begin >= stop:
                break
            pieces.append(self._read(index, max(start - begin, 0), min(stop, self.ends[index]) - begin))
        return np.concatenate(pieces, dtype=np.int64)

    def _read(self, index: int, first: int, last: int) -> np.ndarray:
        """Ids first to last - 1 of a shard. A memory map would read far more, and end the process at an error."""
        ids, (file, offset) = np.empty(last - first, dtype=self.dtype), self._open_files[index]
        try:
            with self._lock:
                file.seek(offset + first * ids.itemsize)
                if file.readinto(ids) < ids.nbytes:
                    raise EOFError("it has become shorter")
        except (OSError, EOFError) as error:
            raise ValueError(f"{self.root / self.files[index]}: cannot be read any more ({error})") from error
        self._check_ids(index, ids)
        return ids

    def _open(self, index: int, count: int, checked_tokens: int) -> tuple[io.FileIO, int]:
        """Check the shape of a shard and its first ids. Returns the open file, and where its ids begin, in bytes."""
        shard = open_shard(path := self.root / self.files[index])
        if shard.dtype != self.dtype or len(shard) != count:
            raise ValueError(
                f"{path}: {len(shard)} ids of {shard.dtype}, not {count} of {self.dtype}; prepare the folder anew"
            )
        self._check_ids(index, shard[:checked_tokens])
        return open(path, "rb", buffering=0), shard.offset

    def _check_ids(self, index: int, ids: np.ndarray) -> None:
        if len(ids) and (largest := int(ids.max())) >= self.vocab_size:
            raise ValueError(
                f"{self.root / self.files[index]}: holds id {largest}, the vocabulary ends at {self.vocab_size - 1}; "
                "prepare the folder anew"
            )


def id_blocks(path: Path, vocab_size: int) -> Iterator[np.ndarray]:
    """The ids of a shard, a block at a time. Raises ValueError, without the name of the file, for other ids."""
    ids = open_shard(path)
    for start in range(0, len(ids), IDS_AT_ONCE):
        block = np.asarray(ids[start : start + IDS_AT_ONCE])
        if (largest := block.max()) >= vocab_size:
            raise ValueError(f"id {largest} is outside the vocabulary of {vocab_size}")
        yield block


# ---------------------------------------------------------------- check


def verify(folder: str | Path) -> str:
    """Compare every byte and every count of a folder with its manifest. Return the totals in a sentence.

    Raises:
        FileNotFoundError, ValueError: a file is missing or differs. The message names the first one.
    """
    folder, manifest = Path(folder), read_manifest(folder)
    tokenizer = tokenizer_of(folder, manifest)
    totals = dict.fromkeys(COUNTS, 0)
    for index, shard in enumerate(tqdm(manifest["shards"], unit="shard")):
        path = folder / shard_name(index)
        dtype = open_shard(path).dtype
        try:
            if sha256_of(path) != shard["sha256"]:
                raise ValueError("its sha256 is not the manifest's")
            if dtype != manifest["dtype"]:
                raise ValueError(f"its ids are not {manifest['dtype']}")
            for key, count in _recount(path, tokenizer).items():
                if count != shard[key]:
                    raise ValueError(f"{count:,} {key} where the manifest says {shard[key]:,}")
                totals[key] += count
        except ValueError as error:
            raise ValueError(f"{path}: {error}; delete the folder and prepare it anew") from error
    unlisted = {path.name for path in folder.glob("*.npy")} - {shard["file"] for shard in manifest["shards"]}
    if unlisted:
        raise ValueError(f"{folder / min(unlisted)}: not in the manifest; delete it")
    return (
        f"{folder}: whole; {len(manifest['shards'])} shards, {totals['documents']:,} documents, "
        f"{totals['tokens']:,} tokens, {totals['text_bytes']:,} bytes of text, as the manifest says"
    )


def tokenizer_of(folder: Path, manifest: dict) -> Tokenizer:
    """The tokenizer that a folder was written with. Raises ValueError if it is not a part of `tokenizer.model`."""
    vocab_size = manifest["vocab_size"]
    if vocab_size in VOCAB_SIZES:
        tokenizer = Tokenizer(vocab_size=vocab_size)
        if manifest["tokenizer_fingerprint"] == tokenizer.fingerprint:
            return tokenizer
    raise ValueError(f"{folder / MANIFEST}: written with another tokenizer than tokenizer.model; prepare it anew")


def _recount(path: Path, tokenizer: Tokenizer) -> dict[str, int]:
    """Tokens, documents and bytes of text of a shard. Raises ValueError for ids that the tokenizer cannot have made."""
    lengths, counted = byte_lengths(tokenizer), Counter(dict.fromkeys(COUNTS, 0))
    for ids in id_blocks(path, tokenizer.vocab_size):
        counted.update(count_ids(ids, tokenizer.bos_id, lengths))
    return counted


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one. `python load_fineweb_dataset.py` prepares a folder.")
