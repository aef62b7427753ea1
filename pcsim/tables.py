"""Rows as tables: as text for a terminal, as HTML for a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

MOST_ROWS = 40
"""A longer HTML table loses its middle."""


def text(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under their headings, columns padded to their widest cell.

    Args:
        headings: one per column.
        rows: cells, as many as there are headings in each.
    """
    every = [headings, *rows]
    widths = [max(len(row[column]) for row in every) for column in range(len(headings))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in every]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def html(headings: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str) -> str:
    """The same as HTML, whatever its cells hold; the middle of a long one is left out, with the number of its rows.

    Args:
        headings: one per column.
        rows: cells, as many as there are headings in each.
        caption: one line above the table.
    """
    lines = [_row(row, "td") for row in rows]
    if len(rows) > MOST_ROWS:
        half = MOST_ROWS // 2
        left_out = f'<tr><td colspan="{len(headings)}">… {len(rows) - 2 * half:,} more …</td></tr>'
        lines = [*lines[:half], left_out, *lines[-half:]]
    head = f"<caption>{escape(caption)}</caption><thead>{_row(headings, 'th')}</thead>"
    return f"<table>{head}<tbody>{''.join(lines)}</tbody></table>"


def _row(cells: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
