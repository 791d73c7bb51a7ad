"""What a value that came from JSON or YAML is, and how an error echoes it."""

from __future__ import annotations

import math
import reprlib

_WIDTH = 80


class _Echo(reprlib.Repr):
    """A `repr` of bounded work: few items a level, few levels, and no long integers, which Python refuses to write."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = _WIDTH

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if value.bit_length() <= 256 else f"<integer of {value.bit_length()} bits>"


_ECHO = _Echo()


def is_number(value: object) -> bool:
    """Whether it is a finite number that a float can hold; true and false are none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def is_integer(value: object) -> bool:
    """Whether it is an integer; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def echo(value: object) -> str:
    """The value as Python writes it, in 80 characters at most, whatever its size and depth."""
    return shorten(_ECHO.repr(value))


def shorten(text: str, most: int = _WIDTH) -> str:
    """The text in one line, its middle left out where it is longer than `most` characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most // 2 - 2]}...{text[len(text) - most // 2 + 1 :]}"
