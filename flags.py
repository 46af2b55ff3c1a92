"""The flags of a command line, read into dataclasses. All that is wrong with them is said at once.

tyro reads them. It stops at the first word that it refuses. So when it refuses, each flag is tried alone.
"""

import io
import re
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, is_dataclass
from difflib import get_close_matches
from functools import partial
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

T = TypeVar("T")

# What a value of a type looks like, in words.
LOOKS: dict[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "one text, in quotes if it has spaces",
    NoneType: "None",
    tuple[float, float]: "two numbers",
    tuple[str, ...]: "texts, in quotes if they have spaces",
}


@dataclass(frozen=True)
class Flag:
    words: tuple[str, ...]  # as typed: the flag, and what stands before the next one
    name: str  # as the field spells it: max_lr for --max-lr=1; "" for words before the first flag
    values: tuple[str, ...]


def split_flags(args: list[str], orders: tuple[str, ...] = ()) -> list[Flag]:
    """The flags in `args`. One of the `orders` without a value gets True: `--dry_run` means `--dry_run True`."""
    starts = [place for place, word in enumerate(args) if place == 0 or is_flag(word)]
    flags = []
    for start, end in pairwise([*starts, len(args)]):
        words = tuple(args[start:end])
        if not is_flag(words[0]):
            flags.append(Flag(words, "", words))
            continue
        head, equals, value = words[0].partition("=")
        name, values = head.lstrip("-").replace("-", "_"), ((value,) if equals else ()) + words[1:]
        if name in orders and not values:
            words, values = (*words, "True"), ("True",)
        flags.append(Flag(words, name, values))
    return flags


def is_flag(word: str) -> bool:
    """Whether tyro takes `word` for a flag. -5, -inf and "- a text" are values."""
    if re.fullmatch(r"-(inf|infinity|nan)", word, re.IGNORECASE):
        return False
    return word == "--" or (word.startswith("-") and word.lstrip("-")[:1].isalpha())


def read_flags(flags: list[Flag], defaults: list[T], description: str | None = None) -> tuple[list[T], dict[str, str]]:
    """`defaults`, instances of one dataclass, with the `flags` that can be read.

    Returns them, and a sentence for each flag that cannot be read, by its name.

    Raises:
        ValueError: tyro refuses the flags together, and none of them alone.
        SystemExit: --help was asked for, and has been printed.
    """
    cls = type(defaults[0])
    parse = partial(tyro.cli, cls, use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    if any(flag.name in ("h", "help") or flag.name.startswith("tyro_") for flag in flags):  # tyro_: shell completion
        parse(args=words_of(flags), default=defaults[0], description=description)
    types = dict(field_types(cls))
    wrong = {flag.name: unknown(flag, types) for flag in flags if flag.name not in types or flag.words[0][:2] != "--"}
    for name in dict.fromkeys(flag.name for flag in flags if flag.name not in wrong):
        given = [" ".join(flag.values) for flag in flags if flag.name == name]
        if len(given) > 1:
            wrong[name] = f"{name}={' and '.join(map(shown, given))}: given {len(given)} times; give it once"
    good = [flag for flag in flags if flag.name not in wrong]
    if refusal(parse, good, defaults[0]):
        wrong |= {flag.name: mistyped(flag, types[flag.name]) for flag in good if refusal(parse, [flag], defaults[0])}
        good = [flag for flag in good if flag.name not in wrong]
        if words := refusal(parse, good, defaults[0]):
            raise ValueError(words)
    return [parse(args=words_of(good), default=default) for default in defaults], wrong


def refusal(parse: partial, flags: list[Flag], default: Any) -> str:
    """What tyro prints when it refuses `flags`; "" when it takes them."""
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            parse(args=words_of(flags), default=default)
    except SystemExit:
        return printed.getvalue() or "the flags cannot be read"
    return ""


def words_of(flags: list[Flag]) -> list[str]:
    return [word for flag in flags for word in flag.words]


def field_types(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and types of the fields of a dataclass. Those of a dataclass in it are `model.dim` and so on."""
    for name, hint in get_type_hints(cls).items():
        yield from field_types(hint, f"{prefix}{name}.") if is_dataclass(hint) else [(prefix + name, hint)]


# ---------------------------------------------------------------- sentences


def unknown(flag: Flag, types: dict[str, Any]) -> str:
    """A sentence for a flag that does not exist, with the nearest that does."""
    if not flag.name:
        return f"{shown(' '.join(flag.words))}: belongs to no flag; write --FIELD VALUE"
    known = {name.rpartition(".")[2]: name for name in types} | {name: name for name in types}
    nearest = get_close_matches(flag.name.lower(), known, n=1)
    cure = "`python train.py --help` lists them; a text that begins with - goes behind =, as in --out_dir=-text"
    if nearest:
        cure = f"did you mean --{known[nearest[0]]}?"
    return f"{shown(' '.join(flag.words))}: no such flag; {cure}"


def mistyped(flag: Flag, hint: Any) -> str:
    """A sentence for a value of the wrong type."""
    if not flag.values:
        return f"{flag.name}: has no value; it must be {looks(hint)}"
    return f"{flag.name}={shown(' '.join(flag.values))}: must be {looks(hint)}"


def looks(hint: Any) -> str:
    """What a value of the type `hint` looks like, in words."""
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(looks, get_args(hint)))
    return LOOKS.get(hint, str(hint))


def shown(value: Any) -> str:
    """`value` in a sentence: on one line, and cut where it is long."""
    text = str(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 200 else f"{text[:200]}..."


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
