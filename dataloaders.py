"""Token shards -> batches: which windows a step trains on, and where a resumed run goes on.

A prepared folder holds `manifest.json` and the shards it lists; `load_fineweb_dataset.py` writes both. The
shards of a split are read as one long stream of N token ids, cut into (N - 1) // T windows of T inputs and their T
targets. Each epoch visits every window once, in an order that (seed, epoch) alone decides. Step s takes the
next total_batch_size / T windows of that endless sequence, however many processes share them, so the position
of a run is its step, and it may resume with another number of processes.

Of several folders, every thousand windows in a row hold each one's quota, shuffled; each folder goes through its own
epochs, in the order that it would have alone.

A window is cut wherever it falls, and documents lie in it end to end: `model.document_positions` keeps them apart.

Shape letters: B sequences of one micro-step in one process, T tokens of a window.
"""

import json
import math
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from files import MANIFEST, SHARD_FORMAT_VERSION, token_dtype

# At start the ids of a folder are compared with its vocabulary up to this many tokens, spread over its shards (all
# of a small folder, in a fraction of a second); the rest is compared as it is read.
CHECKED_TOKENS = 2**26

BLOCK = 1000  # windows in a row of a mixture that hold each folder's quota exactly


def folder_quotas(data_root: str | Sequence[str]) -> dict[str, int]:
    """Prepared folders and how many of every BLOCK windows each provides, from words `path` or `path:weight`.

    Raises:
        ValueError: no folder is named, one is named twice, or its weight is not above 0 or comes to no window.
    """
    weights: dict[str, float] = {}
    for word in [data_root] if isinstance(data_root, str) else data_root:
        path, weight = word, 1.0
        head, colon, number = word.rpartition(":")
        if colon:
            with suppress(ValueError):  # no number: a colon of the path's own, as in C:\\data
                path, weight = head, float(number)
        if not path or not 0 < weight < math.inf:
            raise ValueError(f"data_root: {word} is no path:weight with a weight above 0; give one, or leave it out")
        if Path(path) in map(Path, weights):
            raise ValueError(f"data_root: names {path} twice; give it once, with the sum of its weights")
        weights[path] = weight
    if not weights:
        raise ValueError("data_root: names no folder")
    # Largest remainders: whole numbers nearest to the weights that sum to BLOCK, ties to the folder named first.
    exact = {path: BLOCK * weight / sum(weights.values()) for path, weight in weights.items()}
    quotas = {path: math.floor(share) for path, share in exact.items()}
    for path in sorted(exact, key=lambda path: quotas[path] - exact[path])[: BLOCK - sum(quotas.values())]:
        quotas[path] += 1
    if empty := [path for path, quota in quotas.items() if not quota]:
        raise ValueError(
            f"data_root: the weight of {empty[0]} comes to less than one window in {BLOCK}; raise it, or leave it out"
        )
    return quotas


def open_streams(
    data_root: str | Sequence[str], split: str, *, vocab_size: int, fingerprint: str | None = None
) -> list["TokenStream"]:
    """The streams of the folders that `data_root` names. Raises what `folder_quotas` and `TokenStream` raise."""
    return [
        TokenStream(folder, split, vocab_size=vocab_size, fingerprint=fingerprint, quota=quota)
        for folder, quota in folder_quotas(data_root).items()
    ]


class TokenStream:
    """The shards of one split as one long sequence of ids, memory-mapped.

    Args:
        data_root: a prepared folder.
        split: "train" or "val".
        vocab_size: ids of the model; must be those of the folder.
        fingerprint: `Tokenizer.fingerprint` that the folder must have been written with; None skips that check.
        quota: windows of every BLOCK that come from here.

    Raises:
        FileNotFoundError, ValueError: the folder is not prepared, does not fit, or is damaged; the message
            names the file and the cure.
    """

    def __init__(
        self,
        data_root: str | Path,
        split: str,
        *,
        vocab_size: int,
        fingerprint: str | None = None,
        quota: int = BLOCK,
    ):
        self.root, self.quota = Path(data_root), quota
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
        self.ends = np.cumsum(counts)  # the stream position after each shard
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


def placed(number: np.ndarray, n: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Epochs of n that places `number` in an endless sequence lie in, and what the epochs' shuffles put there."""
    epoch, index = np.divmod(number, n)
    for e in np.unique(epoch):
        index[epoch == e] = shuffled(index[epoch == e], n, seed=seed, epoch=int(e))
    return epoch, index


class TrainWindows(Dataset):
    """Micro-step number -> its batch (x, y), each (B, T) int64, for one of `world_size` processes.

    Args:
        streams: training tokens, of one folder or of several whose quotas sum to BLOCK.
        seq_len: T.
        batch_size: B.
        accumulation: micro-steps in an optimizer step.
        seed: of the order.
    """

    def __init__(
        self,
        streams: Sequence[TokenStream],
        *,
        seq_len: int,
        batch_size: int,
        accumulation: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.streams, self.seq_len, self.batch_size = streams, seq_len, batch_size
        self.accumulation, self.seed, self.rank, self.world_size = accumulation, seed, rank, world_size
        self.num_windows = [(len(stream) - 1) // seq_len for stream in streams]
        for stream, n in zip(streams, self.num_windows, strict=True):
            if n < 1:
                raise ValueError(
                    f"{stream.root}: {len(stream)} training tokens do not fill one sequence of {seq_len} and its "
                    "target; prepare more data, or lower --model.max_seq_len"
                )

    def mixed(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Folders that the run's windows `number` come from, and their places in the folders' own endless sequences."""
        if len(self.streams) == 1:
            return np.zeros_like(number), number
        quotas = np.array([stream.quota for stream in self.streams])
        ends = quotas.cumsum()
        block, slot = placed(number, BLOCK, seed=self.seed)
        folder = np.searchsorted(ends, slot, side="right")
        return folder, block * quotas[folder] + slot - (ends - quotas)[folder]

    def windows(self, micro_step: int) -> tuple[np.ndarray, np.ndarray]:
        """Folders, and numbers within them, of the B windows that this process reads in a micro-step."""
        first = (micro_step * self.world_size + self.rank) * self.batch_size
        folder, window = self.mixed(np.arange(first, first + self.batch_size))
        for k in np.unique(folder):
            window[folder == k] = placed(window[folder == k], self.num_windows[k], seed=self.seed)[1]
        return folder, window

    def shares(self, step: int) -> dict[str, float]:
        """Each folder's share of the windows up to a step, by its path; of a single folder, nothing to tell."""
        windows = step * self.batch_size * self.accumulation * self.world_size
        if len(self.streams) == 1 or not windows:
            return {}
        whole = windows // BLOCK * BLOCK
        rest = Counter(self.mixed(np.arange(whole, windows))[0].tolist())
        counts = [whole // BLOCK * stream.quota + rest[k] for k, stream in enumerate(self.streams)]
        return {str(stream.root): count / windows for stream, count in zip(self.streams, counts, strict=True)}

    def __getitem__(self, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [
            self.streams[k].read(w * self.seq_len, (w + 1) * self.seq_len + 1)
            for k, w in zip(*self.windows(micro_step), strict=True)
        ]
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

    def state(self) -> dict[str, int | list[int]]:
        """What must be the same for a resumed run to see the windows that the first would have seen."""
        tokens, quotas = [len(stream) for stream in self.streams], [stream.quota for stream in self.streams]
        mixture = {"training tokens": tokens, "quotas": quotas}  # by place: a folder may have moved meanwhile
        return {
            "seed": self.seed,
            "max_seq_len": self.seq_len,
            "total_batch_size": self.seq_len * self.batch_size * self.accumulation * self.world_size,
            **(mixture if len(tokens) > 1 else {"training tokens": tokens[0]}),
        }

    def check_state(self, saved: dict) -> None:
        """Raises ValueError where a checkpoint's `state()` differs from this run's: its order cannot go on."""
        now = self.state()
        different = [
            f"{key} was {saved.get(key)}, is {now.get(key)}" for key in now | saved if saved.get(key) != now.get(key)
        ]
        if different:
            raise ValueError(f"cannot resume with another order of the data: {'; '.join(different)}; restore these")


def _leave_interrupts_to_parent(worker: int) -> None:
    """Ctrl-C and torchrun's SIGTERM reach these processes too, and the loop still needs batches to end its step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def validation_batches(
    streams: Sequence[TokenStream],
    *,
    seq_len: int,
    batch_size: int,
    max_tokens: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This process's share of the first max_tokens / T windows: batches (x, y), each (up to B, T) int64.

    Of several folders, each has its quota of these windows, and one at least.

    Raises:
        ValueError: a stream is shorter than one window.
    """
    windows = []
    for stream in streams:
        num_windows = min((len(stream) - 1) // seq_len, max(1, max_tokens * stream.quota // BLOCK // seq_len))
        if num_windows < 1:
            raise ValueError(
                f"{stream.root}: {len(stream)} validation tokens do not fill one sequence of {seq_len} and its target; "
                "prepare the folder with a larger --shard_size, or lower --model.max_seq_len"
            )
        windows += [(stream, w) for w in range(num_windows)]
    mine = windows[rank::world_size]
    for i in range(0, len(mine), batch_size):
        rows = [stream.read(w * seq_len, (w + 1) * seq_len + 1) for stream, w in mine[i : i + batch_size]]
        tokens = torch.from_numpy(np.stack(rows))
        yield tokens[:, :-1], tokens[:, 1:]
