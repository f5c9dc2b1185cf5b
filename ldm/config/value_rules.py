"""The kinds of values that a setting may take: numbers, lists, words; see `ranges`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class NumberRule:
    """The numbers of an interval; whole: only integers, which a float such as 1e3 is not."""

    interval: str  # "[0, 1)" holds 0 and not 1
    whole: bool = False

    def bounds(self) -> tuple[float, float]:
        """The two ends, which need not be in the interval."""
        ends = self.interval[1:-1].split(", ")
        low, high = (int(end) if end.lstrip("-").isdecimal() else float(end) for end in ends)
        return low, high

    def accepts(self, value: object) -> bool:
        """Whether a value is one of these numbers."""
        if type(value) is not int and (self.whole or type(value) is not float):
            return False
        low, high = self.bounds()
        above = low < value or (value == low and self.interval[0] == "[")
        return above and (value < high or (value == high and self.interval[-1] == "]"))

    def __str__(self) -> str:
        """In words, as in "a number from 0 to below 1"."""
        kind = "a whole number" if self.whole else "a number"
        low, high = map(_format_number, self.bounds())
        closed = self.interval[0] == "["
        if high == "inf":
            return f"{kind} from {low} on" if closed else f"{kind} above {low}"
        first, to = ("from", "to") if closed else ("above", "and up to")
        if self.interval[-1] == ")":
            to = "to below" if closed else "and below"
        return f"{kind} {first} {low} {to} {high}"


def _format_number(number: float) -> str:
    """1000000 and not 1e+06."""
    return str(int(number)) if math.isfinite(number) and number == int(number) else f"{number:g}"


@dataclass(frozen=True)
class ListRule:
    """A list of values, of one of these lengths; rising: each larger than the one before."""

    each: "NumberRule | ListRule"
    lengths: Sequence[int]
    rising: bool = False

    def accepts(self, value: object) -> bool:
        """Whether a value is such a list."""
        if not isinstance(value, list) or len(value) not in self.lengths:
            return False
        if not all(self.each.accepts(item) for item in value):
            return False
        return not self.rising or all(a < b for a, b in pairwise(value))

    def __str__(self) -> str:
        count = f"{min(self.lengths)} " if len(self.lengths) == 1 else ""
        rising = "rising " if self.rising else ""
        return f"a list [a,b,..] of {count}{rising}values, each {self.each}"


@dataclass(frozen=True)
class ExactRule:
    """One value that is not among the numbers of the other rules."""

    value: object

    def accepts(self, value: object) -> bool:
        """Whether it is this one."""
        return type(value) is type(self.value) and value == self.value

    def __str__(self) -> str:
        return format_setting_value(self.value)


@dataclass(frozen=True)
class ChoiceRule:
    """One of a few words."""

    words: tuple[str, ...]

    def accepts(self, value: object) -> bool:
        """Whether it is one of them; a number is its digits."""
        return isinstance(value, str | int) and str(value) in self.words

    def __str__(self) -> str:
        return f"one of {', '.join(self.words)}"


def integers(interval: str) -> NumberRule:
    """The integers of an interval."""
    return NumberRule(interval, whole=True)


SIDE = integers("[1, 16384]")  # pixels


def format_setting_value(value: object) -> str:
    """A value as a user writes it."""
    if isinstance(value, list):
        return f"[{','.join(map(format_setting_value, value))}]"
    plain = {None: "null", True: "true", False: "false"}
    return plain[value] if value is None or isinstance(value, bool) else str(value)
