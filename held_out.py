"""Which documents are held out for validation, and which are left out.

A hash of its text decides. So the choice does not depend on the order of the documents, on the number of processes or
on kills, and equal documents are never on both sides.
"""

from contextlib import closing

import numpy as np

from shards import ValidationShard
from sources import Source
from tokenizer import Tokenizer
from workers import Tokenized, tokenized

TRAIN, VAL, LEFT_OUT = range(3)  # what becomes of a document
BEYOND_SHARD = "held out beyond the validation shard"
IN_VAL_SOURCE = "also in the validation source"


class HeldOut:
    """Says of each document whether it is for training, for validation, or left out.

    Args:
        fraction: share of the documents whose hash selects them for validation.
        hashes: those of the documents of a separate validation source, sorted. Such documents are left out.
    """

    def __init__(self, fraction: float | None, hashes: np.ndarray | None = None):
        self.limit, self.hashes = np.uint64(int((fraction or 0) * 2**64)), hashes

    def assign(self, batch: Tokenized, room: int) -> tuple[np.ndarray, dict[int, str]]:
        """Returns TRAIN, VAL or LEFT_OUT for each document (D,), and the batch's notes, with one for each left out.

        Args:
            room: tokens that the validation shard has room for. A document goes there whole, or not at all.
        """
        parts, notes = np.full(len(batch.lengths), TRAIN, dtype=np.int8), dict(batch.notes)
        if self.hashes is not None:
            places = np.searchsorted(self.hashes, batch.hashes).clip(max=max(0, len(self.hashes) - 1))
            known = self.hashes[places] == batch.hashes if len(self.hashes) else np.zeros(len(parts), dtype=bool)
            left_out, reason = np.flatnonzero(known & (batch.lengths > 0)), IN_VAL_SOURCE
        else:
            left_out, reason = [], BEYOND_SHARD
            for i in np.flatnonzero((batch.hashes < self.limit) & (batch.lengths > 0)):
                if batch.lengths[i] <= room:
                    parts[i] = VAL
                    room -= batch.lengths[i]
                else:
                    left_out.append(i)
        parts[left_out] = LEFT_OUT
        return parts, notes | {int(i): reason for i in left_out}


def ids_of(batch: Tokenized, parts: np.ndarray, part: int) -> np.ndarray:
    """The ids of the documents of one part, for the first `len(parts)` documents. Slices are faster than a mask."""
    ends = np.cumsum(batch.lengths[: len(parts)])
    borders = np.flatnonzero(np.diff(parts)) + 1  # the documents that begin a run of documents of another part
    runs = np.split(batch.ids[: ends[-1]], ends[borders - 1])
    return np.concatenate(
        [batch.ids[:0], *(run for run, i in zip(runs, [0, *borders], strict=True) if parts[i] == part)]
    )


def write_val_source(
    source: Source, val: ValidationShard, tokenizer: Tokenizer, num_proc: int, shard_size: int
) -> np.ndarray:
    """Write the first documents of a source into the validation shard, until one does not fit. Returns their hashes."""
    hashes = [np.empty(0, np.uint64)]
    with closing(tokenized(source.read(), tokenizer, num_proc)) as results:
        for batch, _ in results:
            ends = np.cumsum(batch.lengths)
            documents = int(np.searchsorted(ends, shard_size - val.counts["tokens"], side="right"))
            val.add(batch.ids[: ends[documents - 1] if documents else 0])
            hashes.append(batch.hashes[:documents][batch.lengths[:documents] > 0])
            if documents < len(batch.lengths):
                break
    val.sync()
    return np.unique(np.concatenate(hashes))


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one. `python load_fineweb_dataset.py` prepares a folder.")
