"""Rows of a table as text, for a terminal, as HTML, for a notebook, and as Markdown, for a page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

MOST_ROWS = 40
"""A longer table loses its middle as HTML."""


def text(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as lines of text, its columns padded to their widest cell.

    Args:
        headings: one per column.
        rows: cells, as many as there are headings in each.
    """
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in (headings, rule, *rows)
    )


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown.

    Args:
        headings: one per column.
        rows: cells, as many as there are headings in each.
    """
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows))


def html(headings: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str) -> str:
    """A table as HTML, whatever its cells hold; the middle of a long one is left out, with the number of its rows.

    Args:
        headings: one per column.
        rows: cells, as many as there are headings in each.
        caption: one line above the table.
    """
    lines = [_html_row(cells, "td") for cells in rows]
    if len(rows) > MOST_ROWS:
        half = MOST_ROWS // 2
        left_out = f'<tr><td colspan="{len(headings)}">… {len(rows) - 2 * half:,} more …</td></tr>'
        lines = [*lines[:half], left_out, *lines[-half:]]
    head = f"<caption>{escape(caption)}</caption><thead>{_html_row(headings, 'th')}</thead>"
    return f"<table>{head}<tbody>{''.join(lines)}</tbody></table>"


def _html_row(cells: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
