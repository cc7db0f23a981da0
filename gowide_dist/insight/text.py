"""Numbers and tables as lines of text."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def listed(values: Mapping[str, str]) -> str:
    """Names and values, a line each."""
    width = max(map(len, values))
    return "\n".join(f"  {name:{width}}  {value}" for name, value in values.items())


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, left: Collection[int] = (0,), markdown: bool = False
) -> str:
    """A table as text or in Markdown, without empty columns; columns `left` to the left, the others to the right."""
    rows = list(rows)
    used = used_columns(head, rows)
    lines = [[line[index] for index in used] for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if markdown:
        lines.insert(1, ["-" * width for width in widths])
    padded = [
        [
            cell.ljust(width) if index in left or markdown else cell.rjust(width)
            for index, cell, width in zip(used, line, widths, strict=True)
        ]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip() for cells in padded)


def used_columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """The columns in which a row says anything; all, if there are no rows."""
    return [index for index in range(len(head)) if not rows or any(row[index] for row in rows)]


def columns(lines: Sequence[tuple[str, ...]], left: tuple[int, ...]) -> str:
    """Lines of cells, those of columns `left` to the left, the rest to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def rendered(*tables: Table, width: int = 130) -> str:
    """Tables as text, in which nothing is taken for markup: class names and paths may hold anything."""
    from rich.console import Console

    with io.StringIO() as text:
        Console(file=text, width=width, markup=False, emoji=False, highlight=False).print(*tables)
        return text.getvalue().rstrip()


def duration(hours: float) -> str:
    """In seconds, minutes or hours, whatever reads best."""
    if hours == 0:
        return "0"
    if hours < 1:
        return f"{3600 * hours:.3g} s" if hours < 1 / 60 else f"{60 * hours:.3g} min"
    return f"{hours:,.1f} h"


def gigabytes(num_bytes: float) -> str:
    """In GB of 10^9 bytes, three digits."""
    return f"{num_bytes / 1e9:.3g} GB"
