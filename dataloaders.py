"""Token shards -> batches: which windows a step trains on, and where a resumed run goes on.

A prepared folder holds `manifest.json` and the shards it lists; `load_fineweb_dataset.py` writes both. The
shards of a split are read as one long stream of N token ids, cut into (N - 1) // T windows of T inputs and their T
targets. Each epoch visits every window once, in an order that (seed, epoch) alone decides. Step s takes the
next total_batch_size / T windows of that endless sequence, however many processes share them, so the position
of a run is its step, and it may resume with another number of processes.

A window is cut wherever it falls, and documents lie in it end to end: `model.document_positions` keeps them apart.

Shape letters: B sequences of one micro-step in one process, T tokens of a window.
"""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from files import MANIFEST, SHARD_FORMAT_VERSION, token_dtype

# At start the ids of a folder are compared with its vocabulary up to this many tokens, spread over its shards (all
# of a small folder, in a fraction of a second); the rest is compared as it is read.
CHECKED_TOKENS = 2**26


class TokenStream:
    """The shards of one split as one long sequence of ids, memory-mapped.

    Args:
        data_root: a prepared folder.
        split: "train" or "val".
        vocab_size: ids of the model; must be those of the folder.
        fingerprint: `Tokenizer.fingerprint` that the folder must have been written with; None skips that check.

    Raises:
        FileNotFoundError, ValueError: the folder is not prepared, does not fit, or is damaged; the message
            names the file and the cure.
    """

    def __init__(self, data_root: str | Path, split: str, *, vocab_size: int, fingerprint: str | None = None):
        self.root = Path(data_root)
        path = self.root / MANIFEST
        prepare = f"`python load_fineweb_dataset.py --out_dir {self.root} --vocab_size {vocab_size}` prepares it"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found, so {self.root} is not a prepared data folder; {prepare}")
        try:
            self.manifest = json.loads(path.read_text())
            version, dtype = self.manifest["format_version"], self.manifest["dtype"]
            folder_vocab, folder_fingerprint = self.manifest["vocab_size"], self.manifest["tokenizer_fingerprint"]
            shards = [shard for shard in self.manifest["shards"] if shard["split"] == split]
            self.files = [shard["file"] for shard in shards]
            counts = [int(shard["tokens"]) for shard in shards]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: not a manifest ({type(error).__name__}: {error}); delete {self.root} and prepare it anew"
            ) from error
        if version != SHARD_FORMAT_VERSION:
            raise ValueError(f"{path}: format {version}, this code reads {SHARD_FORMAT_VERSION}; prepare it anew")
        if folder_vocab != vocab_size:
            raise ValueError(
                f"{path}: the data has a vocabulary of {folder_vocab}, the model one of {vocab_size}; "
                f"pass --model.vocab_size {folder_vocab}, or prepare another folder with --vocab_size {vocab_size}"
            )
        if fingerprint is not None and folder_fingerprint != fingerprint:
            raise ValueError(f"{path}: written with another tokenizer than tokenizer.model; prepare the folder anew")
        if dtype != token_dtype(vocab_size).name:
            raise ValueError(
                f"{path}: dtype {dtype} does not fit {vocab_size} ids, which take {token_dtype(vocab_size).name}; "
                "prepare the folder anew"
            )
        if not shards:
            raise ValueError(f"{path}: lists no {split} shard; prepare the folder anew, with a smaller --shard_size")

        self.dtype, self.vocab_size = np.dtype(dtype), vocab_size
        self.ends = np.cumsum(counts)  # the stream position behind each shard
        self._shards: list[np.ndarray] | None = None
        for index, count in enumerate(counts):
            self._check(index, count, CHECKED_TOKENS // len(counts))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict:
        """Loader processes map the files themselves: a pickled memory map would be a copy of the whole corpus."""
        return {**self.__dict__, "_shards": None}

    @property
    def shards(self) -> list[np.ndarray]:
        if self._shards is None:
            self._shards = [np.lib.format.open_memmap(self.root / file, mode="r") for file in self.files]
        return self._shards

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids at stream positions start to stop - 1, over shard borders, as int64.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        pieces = []
        for index in range(np.searchsorted(self.ends, start, side="right"), len(self.ends)):
            begin = self.ends[index] - len(self.shards[index])
            if begin >= stop:
                break
            piece = self.shards[index][max(start - begin, 0) : stop - begin]
            self._check_ids(index, piece)
            pieces.append(piece)
        return np.concatenate(pieces, dtype=np.int64)

    def _check(self, index: int, count: int, checked_tokens: int) -> None:
        path = self.root / self.files[index]
        if not path.is_file():
            raise FileNotFoundError(f"{path}: listed in the manifest but missing; prepare the folder anew")
        try:
            shard = np.lib.format.open_memmap(path, mode="r")
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{path}: damaged or cut short ({error}); prepare the folder anew") from error
        if shard.dtype != self.dtype or shard.shape != (count,):
            raise ValueError(
                f"{path}: holds {shard.dtype} {shard.shape}, the manifest says {self.dtype} ({count},); "
                "prepare the folder anew"
            )
        self._check_ids(index, shard[:checked_tokens])

    def _check_ids(self, index: int, ids: np.ndarray) -> None:
        if len(ids) and (largest := int(ids.max())) >= self.vocab_size:
            raise ValueError(
                f"{self.root / self.files[index]}: holds id {largest}, the vocabulary ends at {self.vocab_size - 1}; "
                "prepare the folder anew"
            )


def shuffled(index: np.ndarray, n: int, *, seed: int, epoch: int) -> np.ndarray:
    """Where `index` (any shape, values 0 to n - 1) goes in a random permutation of range(n), one for each epoch.

    A Feistel network with cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): each
    value is computed on its own, so ten million windows need no table in memory and a run starts at any step at
    once. It is our own arithmetic, so the order never changes with a library's version.
    """
    half_bits = max(1, (int(n - 1).bit_length() + 1) // 2)
    half, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(8, np.uint64)
    value = np.asarray(index).astype(np.uint64)
    walking = np.ones(value.shape, dtype=bool)
    while walking.any():  # the network permutes up to 4 n values; those that land outside go round again
        left, right = value[walking] >> half, value[walking] & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # the mixing step of splitmix64
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        value[walking] = (left << half) | right
        walking = value >= n
    return value.astype(np.int64)


class TrainWindows(Dataset):
    """Micro-step number -> its batch (x, y), each (B, T) int64, for one of `world_size` processes.

    Args:
        stream: training tokens.
        seq_len: T.
        batch_size: B.
        accumulation: micro-steps in an optimizer step.
        seed: of the order.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        seq_len: int,
        batch_size: int,
        accumulation: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.stream, self.seq_len, self.batch_size = stream, seq_len, batch_size
        self.accumulation, self.seed, self.rank, self.world_size = accumulation, seed, rank, world_size
        self.num_windows = (len(stream) - 1) // seq_len
        if self.num_windows < 1:
            raise ValueError(
                f"{stream.root}: {len(stream)} training tokens do not fill one sequence of {seq_len} and its target; "
                "prepare more data, or lower --model.max_seq_len"
            )

    def windows(self, micro_step: int) -> np.ndarray:
        """Numbers of the B windows that this process reads in a micro-step."""
        first = (micro_step * self.world_size + self.rank) * self.batch_size
        epoch, index = np.divmod(np.arange(first, first + self.batch_size), self.num_windows)
        return np.concatenate(
            [shuffled(index[epoch == e], self.num_windows, seed=self.seed, epoch=int(e)) for e in np.unique(epoch)]
        )

    def __getitem__(self, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [self.stream.read(w * self.seq_len, (w + 1) * self.seq_len + 1) for w in self.windows(micro_step)]
        tokens = torch.from_numpy(np.stack(rows))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def batches(self, start_step: int, end_step: int, device: torch.device) -> Iterator:
        """Batches of the micro-steps of optimizer steps start_step + 1 to end_step. On a GPU, worker processes read
        ahead into pinned memory; on a CPU, reading a batch costs microseconds and stays in line."""
        on_gpu = device.type == "cuda"
        return iter(
            DataLoader(
                self,
                batch_size=None,  # a sample is a whole batch already
                sampler=range(start_step * self.accumulation, end_step * self.accumulation),
                num_workers=2 if on_gpu else 0,
                prefetch_factor=4 if on_gpu else None,
                pin_memory=on_gpu,
                worker_init_fn=_leave_interrupts_to_parent,
            )
        )

    def state(self) -> dict[str, int]:
        """What must be the same for a resumed run to see the windows that the first would have seen."""
        return {
            "seed": self.seed,
            "max_seq_len": self.seq_len,
            "total_batch_size": self.seq_len * self.batch_size * self.accumulation * self.world_size,
            "training tokens": len(self.stream),
        }

    def check_state(self, saved: dict[str, int]) -> None:
        """Raises ValueError where a checkpoint's `state()` differs from this run's: its order cannot go on."""
        now = self.state()
        different = [f"{key} was {saved.get(key)}, is {now[key]}" for key in now if saved.get(key) != now[key]]
        if different:
            raise ValueError(f"cannot resume with another order of the data: {'; '.join(different)}; restore these")


def _leave_interrupts_to_parent(worker: int) -> None:
    """Ctrl-C and torchrun's SIGTERM reach these processes too, and the loop still needs batches to end its step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def validation_batches(
    stream: TokenStream, *, seq_len: int, batch_size: int, max_tokens: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This process's share of the first max_tokens / T windows: batches (x, y), each (up to B, T) int64.

    Raises:
        ValueError: the stream is shorter than one window.
    """
    num_windows = min((len(stream) - 1) // seq_len, max(1, max_tokens // seq_len))
    if num_windows < 1:
        raise ValueError(
            f"{stream.root}: {len(stream)} validation tokens do not fill one sequence of {seq_len} and its target; "
            "prepare the folder with a larger --shard_size, or lower --model.max_seq_len"
        )
    mine = range(rank, num_windows, world_size)
    for i in range(0, len(mine), batch_size):
        rows = [stream.read(w * seq_len, (w + 1) * seq_len + 1) for w in mine[i : i + batch_size]]
        tokens = torch.from_numpy(np.stack(rows))
        yield tokens[:, :-1], tokens[:, 1:]
