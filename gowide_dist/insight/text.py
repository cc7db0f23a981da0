"""Numbers and tables as lines of text."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,), markdown: bool = False
) -> str:
    """A table as text or in Markdown, without empty columns; columns `left` to the left, the others to the right."""
    columns = []
    for index in used_columns(head, rows):
        cells = [head[index], *(row[index] for row in rows)]
        width = max(map(len, cells))
        if markdown:
            cells.insert(1, "-" * width)
        columns.append([cell.ljust(width) if markdown or index in left else cell.rjust(width) for cell in cells])
    lines = zip(*columns, strict=True)
    return "\n".join(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip() for cells in lines)


def used_columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """The columns in which a row says anything; all, if there are no rows."""
    return [index for index in range(len(head)) if not rows or any(row[index] for row in rows)]


def listed(values: Mapping[str, str]) -> str:
    """Names and values, a line each."""
    width = max(map(len, values))
    return "\n".join(f"  {name:{width}}  {value}" for name, value in values.items())


def duration(hours: float) -> str:
    """In seconds, minutes or hours, whatever reads best."""
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{60 * hours:.3g} min" if hours >= 1 / 60 else f"{3600 * hours:.3g} s"


def gigabytes(num_bytes: float) -> str:
    """In GB of 10^9 bytes, three digits."""
    return f"{num_bytes / 1e9:.3g} GB"
