"""Tables for people: at most 100 columns, on a terminal and in a pipe alike, and nothing cut off. Pure.

Columns have the width of what they hold. What people wrote (reasons, messages) and long lists may wrap; ids never do.
Where the columns that may not wrap need more room than there is, each row becomes a block of lines instead.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 100
GAP = "  "
WRAPPED_WIDTH_MIN = 16
"""A column that wraps gets at least so much room, else the table becomes blocks."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column."""

    title: str
    wrap: bool = False
    """True when its text may go on in the next line."""
    right: bool = False
    """True for figures, which line up on the right."""


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int = WIDTH) -> str:
    """The table's lines, the titles first, each at most `width` wide; the titles alone when there is no row."""
    widths = _widths(columns, rows, width)
    if widths is None:
        return _blocks(columns, rows, width)
    lines = [_line([column.title for column in columns], columns, widths)]
    for row in rows:
        cells = [
            _wrapped(cell, cell_width) if column.wrap else [cell]
            for column, cell, cell_width in zip(columns, row, widths, strict=True)
        ]
        height = max(len(cell) for cell in cells)
        lines += [
            _line([cell[index] if index < len(cell) else "" for cell in cells], columns, widths)
            for index in range(height)
        ]
    return "\n".join(lines)


def facts(pairs: Sequence[tuple[str, str]], width: int = WIDTH) -> str:
    """Names and values below each other, the values lined up and wrapped."""
    name_width = max((len(name) for name, _ in pairs), default=0)
    lines = []
    for name, value in pairs:
        wrapped = _wrapped(value, max(WRAPPED_WIDTH_MIN, width - name_width - len(GAP)))
        lines += [
            f"{name if index == 0 else '':<{name_width}}{GAP}{part}".rstrip() for index, part in enumerate(wrapped)
        ]
    return "\n".join(lines)


def paragraph(text: str, first: str = "", width: int = WIDTH) -> str:
    """Text wrapped to the width, with `first` before its first line and as much room before the others."""
    return "\n".join(_fold(text, width, first, " " * len(first)))


def _widths(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> list[int] | None:
    natural = [
        max([len(column.title), *(len(row[index]) for row in rows)]) for index, column in enumerate(columns)
    ]
    longest_word = [
        max((len(word) for row in rows for word in row[index].split()), default=0) for index in range(len(columns))
    ]
    over = sum(natural) + len(GAP) * (len(columns) - 1) - width
    # The widest column gives first, so that a short list stays on one line beside a long sentence.
    while over > 0:
        giving = [
            index
            for index, column in enumerate(columns)
            if column.wrap and natural[index] > max(WRAPPED_WIDTH_MIN, longest_word[index])
        ]
        if not giving:
            return None
        widest = max(giving, key=lambda index: natural[index])
        natural[widest] -= 1
        over -= 1
    return natural


def _line(cells: Sequence[str], columns: Sequence[Column], widths: Sequence[int]) -> str:
    padded = [
        f"{cell:>{width}}" if column.right else f"{cell:<{width}}"
        for cell, column, width in zip(cells, columns, widths, strict=True)
    ]
    return GAP.join(padded).rstrip()


def _wrapped(text: str, width: int) -> list[str]:
    return [line for part in text.splitlines() or [""] for line in _fold(part, width, "", "") or [""]]


def _fold(text: str, width: int, first: str, others: str) -> list[str]:
    # A word longer than the line goes over the edge rather than in two: it may be an id.
    return textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _blocks(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> str:
    titles = [column.title for column in columns]
    return "\n\n".join(facts(list(zip(titles, row, strict=True)), width) for row in rows) or GAP.join(titles)
