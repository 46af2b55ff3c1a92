"""The flags of a command line, read into dataclasses. All that is wrong with them is said at once.

tyro reads them. It stops at the first word that it refuses. So when it refuses, each flag is tried alone.
"""

import io
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, is_dataclass
from functools import partial
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from command_line import BOOLEANS, is_flag, nearest, no_such_flag, shown

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


def split_flags(args: list[str], types: dict[str, Any]) -> list[Flag]:
    """The flags in `args`. `types` are those of the fields, by name.

    A boolean may be True, true or 1, False, false or 0. It may stand without a value, which means True.
    """
    starts = [place for place, word in enumerate(args) if place == 0 or is_flag(word)]
    flags = []
    for start, end in pairwise([*starts, len(args)]):
        words = tuple(args[start:end])
        if not is_flag(words[0]):
            flags.append(Flag(words, "", words))
            continue
        head, equals, value = words[0].partition("=")
        name, values = head.lstrip("-").replace("-", "_"), ((value,) if equals else ()) + words[1:]
        if bool in (hint := types.get(name), *get_args(hint)):
            spelled = values or ("true",)
            if len(spelled) == 1 and spelled[0].lower() in BOOLEANS:
                words, values = (head, str(BOOLEANS[spelled[0].lower()])), values or ("True",)
        flags.append(Flag(words, name, values))
    return flags


def read_flags(flags: list[Flag], default: T, types: dict[str, Any], description: str = "") -> tuple[T, dict[str, str]]:
    """`default`, a dataclass, with the `flags` that can be read. `types` are those of its fields.

    Returns it, and a sentence for each flag that cannot be read, by its name.

    Raises:
        ValueError: tyro refuses the flags together, and none of them alone.
        SystemExit: --help was asked for, and has been printed.
    """
    parse = partial(
        tyro.cli, type(default), use_underscores=True, config=(tyro.conf.FlagConversionOff,), default=default
    )
    if any(flag.name in ("h", "help") or flag.name.startswith("tyro_") for flag in flags):  # tyro_: shell completion
        lines = [f" {line}".rstrip() for line in description.splitlines()]  # tyro would join lines without an indent
        parse(args=words_of(flags), description="\n".join(lines))
    wrong = {flag.name: unknown(flag, types) for flag in flags if flag.name not in types or flag.words[0][:2] != "--"}
    for name in dict.fromkeys(flag.name for flag in flags if flag.name not in wrong):
        given = [" ".join(flag.values) for flag in flags if flag.name == name]
        if len(given) > 1:
            wrong[name] = f"{name}={' and '.join(map(shown, given))}: given {len(given)} times; give it once"
    good = [flag for flag in flags if flag.name not in wrong]
    if refusal(parse, good):
        wrong |= {flag.name: mistyped(flag, types[flag.name]) for flag in good if refusal(parse, [flag])}
        good = [flag for flag in good if flag.name not in wrong]
        if words := refusal(parse, good):
            raise ValueError(words)
    return parse(args=words_of(good)), wrong


def refusal(parse: partial, flags: list[Flag]) -> str:
    """What tyro prints when it refuses `flags`; "" when it takes them."""
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            parse(args=words_of(flags))
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
    meant = known.get(nearest(flag.name, known), "")
    return no_such_flag(" ".join(flag.words), meant and f"--{meant}", "train.py")


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


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
