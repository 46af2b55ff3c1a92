"""JSON objects and names of files, from files that anyone may have written. What is odd about them is refused."""

import json
import math
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: there is no such file, or it cannot be read. The message names it.
        ValueError: the file holds something else. The message says what. The caller adds the name and the cure.
    """
    if path.exists() and not path.is_file():  # a folder, or a pipe that would keep us waiting
        raise OSError(f"{path}: not a file")
    return parse_object(path.read_bytes())


def parse_object(content: bytes) -> dict[str, Any]:
    """The JSON object in `content`.

    Raises:
        ValueError: it is not UTF-8, not JSON, not an object, nested too deep, or it has a key twice or a number that is
            not finite. `json.loads` takes the last two, and raises another error for the depth.
    """
    try:
        value = json.loads(content.decode(), object_pairs_hook=_distinct, parse_constant=_finite, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"has the key {shown(key)} twice")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"has the number {text[:20]}, which is not finite")
    return number


def check_values(found: Any, types: dict[str, type]) -> None:
    """Raises KeyError, ValueError or TypeError unless an object has values of these types. No number is negative."""
    for key, kind in types.items():
        value = found[key]
        if type(value) is not kind or (kind is int and not 0 <= value < 2**53):
            raise ValueError(f"{key} is {shown(value)}")


def is_plain_name(name: Any) -> bool:
    """Whether a value is the name of a file, without a path, on every operating system."""
    plain = isinstance(name, str) and len(name) < 256 and name.isprintable() and name.strip(". ") != ""
    return plain and not set(name) & set("/\\:")


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def shown(value: Any) -> str:
    """A value of a file as a message shows it: in one line, and cut where it is long or nested deep."""
    return _SHORT.repr(value)


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one; there is nothing to run here.")
