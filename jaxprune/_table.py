"""Rows of cells as plain text or HTML."""

import html
from collections.abc import Container, Sequence

Rows = Sequence[Sequence[str]]


def text(rows: Rows, left: Container[int], feet: int = 1) -> str:
    """Aligned columns, those in ``left`` to the left; rules under the head and over the feet."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:-feet], rule, *lines[-feet:]])


def markup(rows: Rows, notes: Sequence[str] = ()) -> str:
    """An HTML table, the first row its head, and notes below."""
    head, *body = rows
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body
    )
    below = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>{below}"
