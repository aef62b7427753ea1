"""Tables: rows as text, as Markdown and as HTML, whatever their cells hold."""

from __future__ import annotations

from xml.etree import ElementTree

from pcsim import tables


def test_text_pads_each_column_to_its_widest_cell() -> None:
    shown = tables.text(("a", "long heading", "c"), [("wider", "x", ""), ("", "y", "z")])
    assert shown.splitlines() == [
        "a      long heading  c",
        "-----  ------------  -",
        "wider  x",
        "       y             z",
    ]


def test_text_without_rows_is_its_headings() -> None:
    assert tables.text(("node", "kind"), []) == "node  kind\n----  ----"


def test_markdown_is_a_line_each() -> None:
    shown = tables.markdown(["n", "m"], [["1", "2"], ["3", ""]])
    assert shown.splitlines() == ["| n | m |", "| --- | --- |", "| 1 | 2 |", "| 3 |  |"]


def test_html_escapes_and_loses_the_middle_of_a_long_table() -> None:
    rows = [(str(number), "<b>&") for number in range(41)]
    tree = ElementTree.fromstring(tables.html(("n", "<i>"), rows, caption="a < b"))
    assert tree.findtext("caption") == "a < b"
    cells = [["".join(cell.itertext()) for cell in row] for row in tree.iter("tr")]
    assert cells[0] == ["n", "<i>"]
    assert cells[1:21] == [list(row) for row in rows[:20]]
    assert cells[21] == ["… 1 more …"]
    assert cells[22:] == [list(row) for row in rows[-20:]]
