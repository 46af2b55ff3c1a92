"""Token shards -> batches: which windows a step trains on, and where a resumed run goes on.

The shards of a split are read as one long stream of N token ids. It is cut into (N - 1) // T windows of T inputs and
their T targets. Each epoch visits every window once, in an order that depends on (seed, epoch) alone. Step s takes the
next total_batch_size / T windows of that endless sequence, however many processes share them. So the position of a run
is its step, and a run may resume with another number of processes.

With several folders, every thousand windows in a row hold the quota of each folder, shuffled. Each folder goes through
its own epochs, in the order that it would have alone.

A window is cut wherever it falls, and documents lie in it end to end. `model.document_positions` keeps them apart.

Shape letters: B sequences of one micro-step in one process, T tokens of a window.
"""

import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shards import BLOCK, TokenStream

READ_AHEAD = 4  # batches


@dataclass(frozen=True)
class BatchLayout:
    """How the windows of a step are shared out over micro-steps and processes."""

    seq_len: int  # T
    batch_size: int  # B
    accumulation: int = 1  # micro-steps in an optimizer step
    rank: int = 0
    world_size: int = 1

    @property
    def windows_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.world_size


# ---------------------------------------------------------------- folders


def folder_quotas(data_root: str | Sequence[str]) -> dict[str, int]:
    """Prepared folders, and how many of every BLOCK windows each provides, from words `path` or `path:weight`.

    Raises:
        ValueError: no folder is named, one is named twice, or its weight is not above 0 or comes to no window.
    """
    weights: dict[str, float] = {}
    for word in [data_root] if isinstance(data_root, str) else data_root:
        path, weight = word, 1.0
        head, colon, number = word.rpartition(":")
        if colon:
            with suppress(ValueError):  # without a number the colon belongs to the path, as in C:\\data
                path, weight = head, float(number)
        if not path or not 0 < weight < math.inf:
            raise ValueError(f"data_root: {word} is no path:weight with a weight above 0; give one, or leave it out")
        if Path(path) in map(Path, weights):
            raise ValueError(f"data_root: names {path} twice; give it once, with the sum of its weights")
        weights[path] = weight
    if not weights:
        raise ValueError("data_root: names no folder")
    # Largest remainders: the whole numbers nearest to the weights whose sum is BLOCK. The folder named first wins ties.
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
) -> list[TokenStream]:
    """One split of the folders that `data_root` names. Raises what `folder_quotas` and `TokenStream` raise."""
    return [
        TokenStream(folder, split, vocab_size=vocab_size, fingerprint=fingerprint, quota=quota)
        for folder, quota in folder_quotas(data_root).items()
    ]


def digest_of(stream: TokenStream) -> str:
    """A digest of the contents of all shards of a stream, as its manifest has them."""
    of_files = {shard["file"]: shard["sha256"] for shard in stream.manifest["shards"]}
    return sha256("".join(of_files[file] for file in stream.files).encode()).hexdigest()


# ---------------------------------------------------------------- order


def shuffled(index: np.ndarray, n: int, *, seed: int, epoch: int) -> np.ndarray:
    """Where `index` (any shape, values 0 to n - 1) goes in a random permutation of range(n), one for each epoch.

    It is a Feistel network with cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Each
    value is computed on its own, so ten million windows need no table in memory, and a run starts at any step at once.
    The arithmetic is our own, so the order never changes with the version of a library.
    """
    half_bits = max(1, (int(n - 1).bit_length() + 1) // 2)
    half, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(8, np.uint64)
    value = np.asarray(index).astype(np.uint64)
    walking = np.ones(value.shape, dtype=bool)
    while walking.any():  # the network permutes up to 4 n values; a value that lands outside goes through it again
        left, right = value[walking] >> half, value[walking] & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # the mixing step of splitmix64
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        value[walking] = (left << half) | right
        walking = value >= n
    return value.astype(np.int64)


def shuffled_epochs(number: np.ndarray, n: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Epochs, and items, at the places `number` of an endless sequence of epochs, each a shuffle of range(n)."""
    epoch, index = np.divmod(number, n)
    for e in np.unique(epoch):
        index[epoch == e] = shuffled(index[epoch == e], n, seed=seed, epoch=int(e))
    return epoch, index


# ---------------------------------------------------------------- batches


class TrainWindows:
    """The batches that one of the processes trains on.

    Args:
        streams: training tokens, of one folder or of several whose quotas sum to BLOCK.
        seed: of the order.

    Raises:
        ValueError: a stream is shorter than one window.
    """

    def __init__(self, streams: Sequence[TokenStream], layout: BatchLayout, *, seed: int):
        self.streams, self.layout, self.seed = streams, layout, seed
        self.num_windows = [(len(stream) - 1) // layout.seq_len for stream in streams]
        for stream, n in zip(streams, self.num_windows, strict=True):
            if n < 1:
                raise ValueError(
                    f"{stream.root}: {len(stream)} training tokens do not fill one sequence of {layout.seq_len} and "
                    "its target; prepare more data, or lower --model.max_seq_len"
                )

    def mixed(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The folders that the run's windows `number` come from, and their places in each folder's own sequence."""
        if len(self.streams) == 1:
            return np.zeros_like(number), number
        quotas = np.array([stream.quota for stream in self.streams])
        ends = quotas.cumsum()
        block, slot = shuffled_epochs(number, BLOCK, seed=self.seed)
        folder = np.searchsorted(ends, slot, side="right")
        return folder, block * quotas[folder] + slot - (ends - quotas)[folder]

    def windows(self, micro_step: int) -> tuple[np.ndarray, np.ndarray]:
        """The B windows that this process reads in a micro-step: their folders, and their numbers in the folders."""
        B = self.layout.batch_size
        first = (micro_step * self.layout.world_size + self.layout.rank) * B
        folder, window = self.mixed(np.arange(first, first + B))
        for k in np.unique(folder):
            window[folder == k] = shuffled_epochs(window[folder == k], self.num_windows[k], seed=self.seed)[1]
        return folder, window

    def shares(self, step: int) -> dict[str, float]:
        """The share of each folder, by its path, in the windows up to a step. Empty where there is a single folder."""
        windows = step * self.layout.windows_per_step
        if len(self.streams) == 1 or not windows:
            return {}
        whole = windows // BLOCK * BLOCK
        rest = Counter(self.mixed(np.arange(whole, windows))[0].tolist())
        counts = [whole // BLOCK * stream.quota + rest[k] for k, stream in enumerate(self.streams)]
        return {str(stream.root): count / windows for stream, count in zip(self.streams, counts, strict=True)}

    def batch(self, micro_step: int, pinned: bool = False) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a micro-step, each (B, T) int64; `pinned`: in memory that a GPU reads by itself."""
        B, T = self.layout.batch_size, self.layout.seq_len
        rows = [self.streams[k].read(w * T, (w + 1) * T + 1) for k, w in zip(*self.windows(micro_step), strict=True)]
        tokens = np.stack(rows)  # (B, T + 1)
        x, y = (torch.empty(B, T, dtype=torch.int64, pin_memory=pinned) for _ in range(2))
        x.numpy()[:], y.numpy()[:] = tokens[:, :-1], tokens[:, 1:]  # torch would wake all cores for a large copy
        return x, y

    def batches(self, start_step: int, end_step: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the micro-steps of optimizer steps start_step + 1 to end_step, pinned for CUDA.

        A thread reads READ_AHEAD batches ahead. What it raises is raised here, in place of the batch. It is no process:
        a fork after CUDA's start may hang, and a process may be left over.
        """
        on_gpu = device.type == "cuda"
        # A new thread is on GPU 0, where pinning would take memory.
        reader = ThreadPoolExecutor(1, "loader", *((torch.cuda.set_device, (device,)) if on_gpu else ()))
        todo = iter(range(start_step * self.layout.accumulation, end_step * self.layout.accumulation))
        try:
            ahead = deque(reader.submit(self.batch, micro_step, on_gpu) for micro_step in islice(todo, READ_AHEAD))
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(reader.submit(self.batch, micro_step, on_gpu) for micro_step in islice(todo, 1))
                yield batch
        finally:  # nobody wants more
            reader.shutdown(wait=False, cancel_futures=True)

    def state(self) -> dict[str, int | list[int]]:
        """What must be the same for a resumed run to see the windows that the first run would have seen."""
        tokens, quotas = [len(stream) for stream in self.streams], [stream.quota for stream in self.streams]
        digests = [digest_of(stream) for stream in self.streams]
        mixture = {"training tokens": tokens, "quotas": quotas}  # by place: a folder may have moved meanwhile
        return {
            "seed": self.seed,
            "max_seq_len": self.layout.seq_len,
            "total_batch_size": self.layout.seq_len * self.layout.windows_per_step,
            **(mixture if len(tokens) > 1 else {"training tokens": tokens[0]}),
            "digests of the shards": digests,
        }

    def check_state(self, saved: dict) -> None:
        """Raises ValueError where a checkpoint's `state()` differs from this run's, which cannot go on in its order."""
        now = self.state()
        different = [
            f"{key} was {saved.get(key)}, is {now.get(key)}" for key in now | saved if saved.get(key) != now.get(key)
        ]
        if different:
            raise ValueError(f"cannot resume with another order of the data: {'; '.join(different)}; restore these")


def validation_batches(
    streams: Sequence[TokenStream], layout: BatchLayout, *, max_tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of the first max_tokens / T windows: batches (x, y), each (up to B, T) int64.

    Each of several folders has its quota of these windows, and at least one window.

    Raises:
        ValueError: a stream is shorter than one window.
    """
    T, windows = layout.seq_len, []
    for stream in streams:
        num_windows = min((len(stream) - 1) // T, max(1, max_tokens * stream.quota // BLOCK // T))
        if num_windows < 1:
            raise ValueError(
                f"{stream.root}: {len(stream)} validation tokens do not fill one sequence of {T} and its target; "
                "prepare the folder with more documents or a larger --val_fraction, or lower --model.max_seq_len"
            )
        windows += [(stream, w) for w in range(num_windows)]
    mine = windows[layout.rank :: layout.world_size]
    for i in range(0, len(mine), layout.batch_size):
        rows = [stream.read(w * T, (w + 1) * T + 1) for stream, w in mine[i : i + layout.batch_size]]
        tokens = torch.from_numpy(np.stack(rows))
        yield tokens[:, :-1], tokens[:, 1:]


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one. Run train.py.")
