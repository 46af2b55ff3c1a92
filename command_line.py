"""The command line of a script: nothing is guessed, and all that is wrong with it is said in one message.

The scripts take FlagParser. train.py, whose flags are the fields of a dataclass, takes flags.py.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any, NoReturn

BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
LARGEST = 10**15  # of any whole number
MISSING = "the following arguments are required: "  # how argparse begins


# ---------------------------------------------------------------- words


def shown(value: Any) -> str:
    """`value` in a sentence: on one line, and cut where it is long."""
    text = str(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 200 else f"{text[:200]}..."


def joined(words: Sequence[str]) -> str:
    """One line for a shell."""
    return shlex.join(words) if os.name == "posix" else subprocess.list2cmdline(words)


def is_flag(word: str) -> bool:
    """Whether `word` is a flag. -5, -inf and "- a text" are values."""
    if re.fullmatch(r"-(inf|infinity|nan)", word, re.IGNORECASE):
        return False
    return word == "--" or (word.startswith("-") and word.lstrip("-")[:1].isalpha())


def nearest(name: str, known: Iterable[str]) -> str:
    """The one of the `known` names that `name` was meant to be; "" if none is near. --max_l is near to --max_lr."""
    name = name.lower().replace("-", "_").lstrip("_")
    by_spelling = {other.lstrip("-").replace("-", "_"): other for other in known}
    found = get_close_matches(name, by_spelling, n=1)
    if not found and len(name) > 1:
        found = [other for other in by_spelling if other.startswith(name)]
    return by_spelling[found[0]] if found else ""


def no_such_flag(words: str, meant: str, script: str) -> str:
    """The sentence for a flag that does not exist."""
    cure = f"`python {script} --help` lists them; a text that begins with - goes behind =, as in --flag=-text"
    return f"{shown(words)}: no such flag; {f'did you mean {meant}?' if meant else cure}"


# ---------------------------------------------------------------- types of flags


def boolean(text: str) -> bool:
    """True, true, 1, False, false or 0. Raises argparse.ArgumentTypeError for any other word."""
    if (value := BOOLEANS.get(text.lower())) is None:
        raise argparse.ArgumentTypeError(f"{shown(text)}: must be True or False")
    return value


# A flag that is off unless it is given: `add("--stream", **SWITCH, help=...)`. The bare flag means True.
SWITCH: dict[str, Any] = {"nargs": "?", "type": boolean, "const": True, "default": False, "metavar": "True"}


def at_least(least: int) -> Callable[[str], int]:
    """The type of a flag that takes a whole number, `least` or more. It raises argparse.ArgumentTypeError."""
    return partial(_whole_number, least)


def _whole_number(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)}: must be a whole number") from None
    if not least <= value <= LARGEST:
        limit = f"at least {least}" if value < least else f"at most {LARGEST:,}"
        raise argparse.ArgumentTypeError(f"{shown(text)}: must be {limit}")
    return value


def results_of(*calls: Callable[[], Any]) -> list[Any]:
    """What the `calls` return, in their order.

    Raises:
        ValueError: calls that raise a ValueError or an OSError, with the messages of all.
    """
    results, errors = [], []
    for call in calls:
        try:
            results.append(call())
        except (ValueError, OSError) as error:
            errors.append(str(error))
    if errors:
        raise ValueError("\n".join(errors))
    return results


# ---------------------------------------------------------------- argparse


class FlagParser(argparse.ArgumentParser):
    """argparse that takes no abbreviation, suggests the flag that was meant, and says all that is wrong at once.

    It goes on after a wrong value by two methods of argparse that are private. If a later Python renames them, the
    first wrong value alone is reported.
    """

    def __init__(self, **settings: Any):
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False} | settings)
        self.problems: dict[str, str] = {}  # of the last call: a sentence by the flag that it is about
        self.meant: set[str] = set()  # the flags that others were taken to be

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse all of `args`; a subcommand's parser gets what stands behind its name. Nothing is left over."""
        words, known = [], self._option_string_actions
        self.problems, self.meant = {}, set()
        args = sys.argv[1:] if args is None else list(args)
        for place, word in enumerate(args):
            name = word.partition("=")[0]
            if word == "--" or (self._subparsers and word in self._subparsers._group_actions[0].choices):
                words += args[place:]
                break
            if name in known or not is_flag(word):
                words.append(word)
                continue
            self.meant.add(meant := nearest(name, known))
            self.problems[name] = no_such_flag(word, meant, self.prog)
        found, rest = super().parse_known_args(words, namespace)
        if rest and not self.problems:  # beside an unknown flag, its value is left over
            self.problems["rest"] = f"{shown(' '.join(rest))}: belongs to no flag"
        if self.problems:
            self.error("")
        return found, []

    def _match_argument(self, action: argparse.Action, arg_strings_pattern: str) -> int:
        try:
            return super()._match_argument(action, arg_strings_pattern)
        except argparse.ArgumentError:
            if not action.option_strings:
                raise  # a missing word without a flag: `error` gets its name
            self.problems[name_of(action)] = f"{name_of(action)}: has no value; it must be {looks(action)}"
            return 0

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        name = name_of(action)
        if name in self.problems:
            return None
        try:
            return super()._get_values(action, arg_strings)
        except argparse.ArgumentError as error:
            text = shown(" ".join(arg_strings))
            self.problems[name] = f"{name} {text}: must be {looks(action)}"
            if isinstance(error.__context__, argparse.ArgumentTypeError):  # it has a sentence of its own
                self.problems[name] = f"{name} {error.message}"
            if isinstance(action, argparse._SubParsersAction):
                meant = nearest(arg_strings[0], action.choices)
                cure = f"did you mean {meant}?" if meant else f"there are {', '.join(action.choices)}"
                self.problems[name] = f"{shown(arg_strings[0])}: no such command; {cure}"
                self.error("")
            return None

    def error(self, message: str) -> NoReturn:
        """Print a sentence for all that is wrong, and end with status 2."""
        sentences = list(self.problems.values())
        if message.startswith(MISSING):
            needed = [name for name in message.removeprefix(MISSING).split(", ") if name not in self.meant]
            sentences += [f"{name}: must be given" for name in needed]
        elif message:
            sentences.append(message.removeprefix("argument "))
        self.exit(2, f"{self.prog}: " + "\n".join(sentences) + "\n")


def name_of(action: argparse.Action) -> str:
    """What a user calls it: --max_tokens, RUN_DIR."""
    return action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest)


def looks(action: argparse.Action) -> str:
    """What a value of the flag looks like, in words."""
    if action.choices:
        return " or ".join(map(str, action.choices))
    whole = action.type is int or getattr(action.type, "func", None) is _whole_number
    return "a whole number" if whole else "a number" if action.type is float else "a text, in quotes if it has spaces"


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
