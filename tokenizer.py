"""Llama 3's tokenizer: text <-> token ids, byte-pair encoding over `tokenizer.model` with tiktoken.

`tokenizer.model` is Meta's file: 128,000 byte sequences, one a line, in the order in which they were merged. 256
control ids follow them. The first merges of that order are a complete, smaller tokenizer: a vocabulary of N ids keeps
the first N - 256 merges and puts the same control ids after them.

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

# Text is cut into pieces before any merge: contractions, words with one leading character, up to three digits,
# punctuation, line ends, white space. A merge never crosses the border of a piece.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
)
_SPACES = r"\s+(?!\S)|\s+"
SPLIT_PATTERN = f"{_WORDS}|{_SPACES}"
# The same pattern, faster. Because of the look-ahead in _SPACES, tiktoken matches the alternatives one by one, by
# backtracking. A group without a look-ahead goes to a faster automaton as a whole. That makes 1.2 to 1.3 times the
# tokens a second (benchmarks/data_prep.py).
_GROUPED_PATTERN = f"(?:{_WORDS})|{_SPACES}"

NUM_SPECIAL_TOKENS = 256
VOCAB_SIZES = range(256 + NUM_SPECIAL_TOKENS, 128_000 + NUM_SPECIAL_TOKENS + 1)  # from bare bytes to all merges
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

# tiktoken panics on longer texts. Its time grows with the square of a run of characters that the pattern cannot cut.
MAX_ENCODE_CHARS = 400_000
MAX_RUN_CHARS = 25_000


class Tokenizer:
    """Llama 3's tokenizer, whole or cut down to its first merges.

    Args:
        path: Meta's `tokenizer.model`.
        vocab_size: number of ids, 512 to 128,256, with the 256 control ids. None keeps all.

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
        """Built at first use, in a third of a second. A process that leaves encoding to workers never needs it."""
        return tiktoken.Encoding(
            name=f"llama3-{self.vocab_size}",
            pat_str=_GROUPED_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(self._text_tokens)},
            special_tokens=self.special_tokens,
        )

    @property
    def fingerprint(self) -> str:
        """Sha256 of everything that decides which ids a text becomes. Equal fingerprints mean equal ids."""
        parts = (MODEL_SHA256, SPLIT_PATTERN, *SPECIAL_TOKENS, str(self.vocab_size))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`, with the begin id before and the end id after them if asked for.

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

        The pieces are those of `split_long`, nearly always one. No Python object is made for an id, and nothing is
        copied.

        Raises:
            UnicodeEncodeError: the text holds lone surrogates. Only `encode` replaces them.
        """
        ids = [self._encoding.encode_to_numpy(piece, disallowed_special=()) for piece in split_long(text)]
        return [np.array([self.bos_id], np.uint32), *ids, np.array([self.eos_id], np.uint32)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`. Control ids appear by name. Bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        outside = [i for i in ids if not 0 <= i < self.vocab_size]
        if outside:
            raise ValueError(f"id {outside[0]} is outside the vocabulary of {self.vocab_size}")
        return self._encoding.decode(ids)

    def token_byte_lengths(self) -> np.ndarray:
        """Bytes of text of each id, (V,) int64; 0 for control ids. With it nats a token become bits a byte."""
        return np.array([len(token) for token in self._text_tokens] + [0] * NUM_SPECIAL_TOKENS)


def split_long(text: str) -> Iterator[str]:
    """Cut `text` into pieces of at most MAX_ENCODE_CHARS, without runs longer than MAX_RUN_CHARS.

    A run is white space alone, or anything else without white space. Nearly all texts need no cut, and cost only a look
    at a few characters.
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
    """Whether `block` may hold a run of more than MAX_RUN_CHARS: it would fill one of the stretches whole."""
    size = MAX_RUN_CHARS // 2
    stretches = (block[i : i + size] for i in range(0, len(block) - size + 1, size))
    return any(stretch.isspace() or not re.search(r"\s", stretch) for stretch in stretches)


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
