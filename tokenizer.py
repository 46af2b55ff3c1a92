"""Llama 3's tokenizer: text <-> token ids, byte-pair encoding over `tokenizer.model` with tiktoken.

`tokenizer.model` is Meta's file: 128,000 byte sequences, one a line, in the order in which they were merged. 256
control ids come after them. The first byte sequences alone are a complete, smaller tokenizer. So a vocabulary of N ids
keeps the first N - 256 byte sequences, and puts the same control ids after them.

Reference: the class `Tokenizer` in Meta's `llama_models/llama3/tokenizer.py`. The tests compare with it.
"""

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken

MODEL_SHA256 = "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"
DEFAULT_PATH = Path(__file__).with_name("tokenizer.model")

# This pattern cuts text into pieces before any merge: contractions, words with one leading character, up to three
# digits, punctuation, line ends, white space. A merge never joins bytes of two pieces.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
)
_SPACES = r"\s+(?!\S)|\s+"
SPLIT_PATTERN = f"{_WORDS}|{_SPACES}"
# The same pattern, but 1.2 to 1.3 times as fast (benchmarks/data_prep.py). The look-ahead in _SPACES makes tiktoken
# match the alternatives one by one, with backtracking. A group has no look-ahead, so a faster automaton matches it as a
# whole.
_GROUPED_PATTERN = f"(?:{_WORDS})|{_SPACES}"

NUM_SPECIAL_TOKENS = 256
VOCAB_SIZES = range(256 + NUM_SPECIAL_TOKENS, 128_000 + NUM_SPECIAL_TOKENS + 1)  # from single bytes to all merges
_NAMED_SPECIAL_TOKENS = (  # Meta's positions, as of Llama 3.2; the rest of the 256 are reserved
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)
SPECIAL_TOKENS = _NAMED_SPECIAL_TOKENS + tuple(
    f"<|reserved_special_token_{i + 2}|>" for i in range(NUM_SPECIAL_TOKENS - len(_NAMED_SPECIAL_TOKENS))
)

# split_long keeps to these limits. tiktoken panics on longer texts. If the pattern cannot cut a run of characters,
# tiktoken's time grows with the square of the run's length.
MAX_ENCODE_CHARS = 400_000
MAX_RUN_CHARS = 25_000


class Tokenizer:
    """Llama 3's tokenizer, whole or cut down to its first merges.

    Args:
        path: Meta's `tokenizer.model`.
        vocab_size: number of ids, 512 to 128,256, including the 256 control ids. None keeps all.

    Raises:
        FileNotFoundError: there is no file at `path`.
        ValueError: the file is not Meta's, or `vocab_size` is out of range.
    """

    def __init__(self, path: str | Path = DEFAULT_PATH, vocab_size: int | None = None):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such tokenizer file; `git checkout tokenizer.model` restores it")
        contents = self.path.read_bytes()
        if hashlib.sha256(contents).hexdigest() != MODEL_SHA256:
            raise ValueError(
                f"{self.path}: not Llama 3's tokenizer (its sha256 is not {MODEL_SHA256[:12]}...); "
                "`git checkout tokenizer.model` restores it"
            )
        self.vocab_size = VOCAB_SIZES[-1] if vocab_size is None else vocab_size
        if self.vocab_size not in VOCAB_SIZES:
            raise ValueError(f"vocab_size={vocab_size}: must be {VOCAB_SIZES[0]} to {VOCAB_SIZES[-1]}")

        num_text_tokens = self.vocab_size - NUM_SPECIAL_TOKENS
        lines = contents.splitlines()[:num_text_tokens]
        self._text_tokens = [base64.b64decode(line.split()[0]) for line in lines]
        self.special_tokens = {name: num_text_tokens + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.bos_id = self.special_tokens["<|begin_of_text|>"]
        self.eos_id = self.special_tokens["<|end_of_text|>"]
        self.pad_id = self.special_tokens["<|finetune_right_pad_id|>"]
        self.stop_tokens = [self.eos_id, self.special_tokens["<|eom_id|>"], self.special_tokens["<|eot_id|>"]]

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        """tiktoken's encoder. Building it takes 0.3 s, and a process that leaves encoding to workers never needs it."""
        return tiktoken.Encoding(
            name=f"llama3-{self.vocab_size}",
            pat_str=_GROUPED_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(self._text_tokens)},
            special_tokens=self.special_tokens,
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the ids of a text. Equal fingerprints mean equal ids."""
        parts = (MODEL_SHA256, SPLIT_PATTERN, *SPECIAL_TOKENS, str(self.vocab_size))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`. `bos` puts the begin-of-text id before them, `eos` puts the end-of-text id after them.

        Text that looks like a control token is encoded as plain characters. Lone surrogates, which UTF-8 cannot hold,
        become U+FFFD.
        """
        ids = [self.bos_id] if bos else []
        for piece in split_long(text):
            ids.extend(self._encoding.encode_ordinary(piece))
        if eos:
            ids.append(self.eos_id)
        return ids

    def encode_document(self, text: str) -> list[np.ndarray]:
        """`encode(text, bos=True, eos=True)` as uint32 arrays: the begin id, the ids of each piece, the end id.

        `split_long` makes the pieces, nearly always one. This is faster than `encode`: it makes no Python object for
        each id, and copies nothing.

        Raises:
            UnicodeEncodeError: the text holds lone surrogates. Only `encode` replaces them.
        """
        ids = [self._encoding.encode_to_numpy(piece, disallowed_special=()) for piece in split_long(text)]
        return [np.array([self.bos_id], np.uint32), *ids, np.array([self.eos_id], np.uint32)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`. Control ids appear as their names. Bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        outside = [i for i in ids if not 0 <= i < self.vocab_size]
        if outside:
            raise ValueError(f"id {outside[0]} is outside the vocabulary of {self.vocab_size}")
        return b"".join([self.tokens[i] for i in ids]).decode("utf-8", errors="replace")

    @cached_property
    def tokens(self) -> list[bytes]:
        """The bytes of each id; of a control id, those of its name."""
        return [*self._text_tokens, *(name.encode() for name in self.special_tokens)]

    def token_byte_lengths(self) -> np.ndarray:
        """Number of bytes of each id, (V,) int64; 0 for control ids. Converts nats a token to bits a byte."""
        return self._byte_lengths

    @cached_property
    def _byte_lengths(self) -> np.ndarray:
        return np.array([len(token) for token in self._text_tokens] + [0] * NUM_SPECIAL_TOKENS)


def split_long(text: str) -> Iterator[str]:
    """Cut `text` into pieces of at most MAX_ENCODE_CHARS characters. No piece has a run longer than MAX_RUN_CHARS.

    A run has either only white space or no white space. Nearly all texts need no cut. To see this, the function looks
    at only a few characters.
    """
    for start in range(0, len(text), MAX_ENCODE_CHARS):
        block = text[start : start + MAX_ENCODE_CHARS]
        if not _may_hold_long_run(block):
            yield block
            continue
        cut = 0
        for run in re.finditer(r"\s+|\S+", block):
            for end in range(run.start() + MAX_RUN_CHARS, run.end(), MAX_RUN_CHARS):
                yield block[cut:end]
                cut = end
        yield block[cut:]


def _may_hold_long_run(block: str) -> bool:
    """Whether `block` may hold a run longer than MAX_RUN_CHARS. It would fill a whole stretch of half that length."""
    size = MAX_RUN_CHARS // 2
    stretches = (block[i : i + size] for i in range(0, len(block) - size + 1, size))
    return any(stretch.isspace() or not re.search(r"\s", stretch) for stretch in stretches)


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
