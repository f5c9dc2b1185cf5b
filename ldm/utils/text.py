"""Cleans untrusted text for networks, terminals and spreadsheets."""

import re
import sys
import unicodedata
from collections.abc import Sequence

# Characters that change the direction of a line, so that it looks like another text.
BIDI_CONTROLS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
CONTROL_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")  # of Unicode: controls, surrogates, line ends
# A spreadsheet runs such cells as formulas: OWASP, "CSV Injection".
FORMULA_PREFIXES = ("=", "+", "-", "@", "\t", "\r")


def replace_invalid_bytes(text: str) -> str:
    """Replaces bytes of the command line that are no UTF-8 by U+FFFD; not for paths."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def escape_control_characters(text: str, *, keep: str = "") -> str:
    """Escapes control characters, as `\\x1b`: a terminal would execute them."""
    return "".join(
        letter.encode("unicode_escape").decode()
        if letter not in keep
        and (letter in BIDI_CONTROLS or unicodedata.category(letter) in CONTROL_CATEGORIES)
        else letter
        for letter in text
    )


def format_csv_cell(value: object) -> object:
    """Returns a value for a CSV file; an apostrophe before a text stops it from being a formula."""
    if not isinstance(value, str):
        return value
    is_number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-](inf|nan)", value, re.I)
    text = value if is_number or not value.startswith(FORMULA_PREFIXES) else f"'{value}"
    return escape_control_characters(text, keep="\n\t")


def format_table(
    rows: Sequence[Sequence[str]], *, align: str, widths: Sequence[int] = (), gap: str = "  "
) -> str:
    """Returns rows of cells as lines, each column as wide as its widest cell.

    align: `<` or `>` for each column; the last letter stands for all further ones. widths: the
    least width of each column. gap: what separates two columns.
    """
    least = [*widths, *[0] * len(rows[0])]
    columns = zip(*rows, strict=True)
    fits = [max(least[i], *map(len, column)) for i, column in enumerate(columns)]
    ways = [str.rjust if way == ">" else str.ljust for way in align.ljust(len(fits), align[-1])]
    cells = ([way(*pair) for way, *pair in zip(ways, row, fits, strict=True)] for row in rows)
    return "\n".join(gap.join(line).rstrip() for line in cells)


def get_progress_interval() -> float:
    """Returns the seconds between updates of a progress bar: in a file, each is a new line."""
    return 0.1 if sys.stderr.isatty() else 15.0
