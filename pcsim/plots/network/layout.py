"""Where the parts of a drawn network stand: boxes in columns and bands, and the ways of the edges between them.

All lengths are inches; x grows to the right, y upwards, from the top left corner.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import attrs

from pcsim.plots.network.folding import Arrow, Block, Box, Diagram

LINE, LETTER, MOST_LETTERS = 0.155, 0.08, 18
GAP, ROW_GAP, MARGIN = 0.45, 0.2, 0.35
BAND = 14.5
"""Length of a band that fits on a page; longer in networks of so many columns that the drawing would be narrow."""

CLEARANCE, LANE = 0.14, 0.09
PADDING = 0.17
"""Between the boxes of a block and its frame."""

MOST_PARALLEL = 3

Point = tuple[float, float]


@attrs.frozen
class Line:
    """One edge as drawn.

    Args:
        points: corners of its way, from its source to its target; corners are to be rounded.
        back: whether it closes a cycle.
        count: edges that it stands for, at least 1.
    """

    points: tuple[Point, ...]
    back: bool
    count: int


@attrs.frozen
class Frame:
    """The frame of a block, by two opposite corners, and the number of its copies."""

    left: float
    bottom: float
    right: float
    top: float
    copies: int


@attrs.frozen
class Layout:
    """Where everything stands.

    Args:
        size: of the drawing, width and height.
        box: width and height of every box.
        centres: of the boxes, in the diagram's order.
        lines: the edges.
        frames: the blocks.
    """

    size: Point
    box: Point
    centres: tuple[Point, ...]
    lines: tuple[Line, ...]
    frames: tuple[Frame, ...]


def label_lines(box: Box) -> tuple[str, ...]:
    """What is written into a box; a long name loses its middle."""
    return tuple(map(_shortened, (*box.names, box.shape)))


def _shortened(text: str) -> str:
    text = " ".join(text.split()) or "?"
    if len(text) <= MOST_LETTERS:
        return text
    half = (MOST_LETTERS - 1) // 2
    return f"{text[: MOST_LETTERS - 1 - half]}…{text[-half:]}"


def place(diagram: Diagram, band: float = BAND) -> Layout:
    """Place boxes column by column, in bands, and lead the edges around boxes.

    Edges to the next column are straight. All others run through the gaps between columns, and above or below what
    lies between: those to the right above, those that close a cycle below, and those to another band between the
    bands.

    Args:
        diagram: with at least one box.
        band: about how long a band may be, in inches; blocks are not broken.
    """
    return _Placing(diagram, band).layout()


@attrs.define
class _Band:
    """A band of columns, ``first`` to ``last``; heights are over its middle.

    Args:
        first: its first column.
        last: its last column.
        top: of what stands or runs in it.
        bottom: of the same.
        lanes: horizontal pieces that run in it: columns from and to, and height.
    """

    first: int
    last: int
    top: float = 0.0
    bottom: float = 0.0
    lanes: list[tuple[float, float, float]] = attrs.field(factory=list)

    def lane(self, start: float, end: float, base: float, side: int) -> float:
        """The height of a new piece, beyond ``base`` and all pieces that run by its way on its side."""
        passed = [y for left, right, y in self.lanes if y * side > 0 and left <= end and right >= start]
        height = side * max([abs(base) + CLEARANCE, *(abs(y) + LANE for y in passed)])
        self.lanes.append((start, end, height))
        self.top, self.bottom = max(self.top, height), min(self.bottom, height)
        return height


class _Placing:
    def __init__(self, diagram: Diagram, length: float) -> None:
        self.diagram = diagram
        labels = [label_lines(box) for box in diagram.boxes]
        longest = max(len(line) for lines in labels for line in lines)
        self.width = max(0.7, longest * LETTER + 0.18)
        self.height = max(map(len, labels)) * LINE + 0.14
        self.columns: list[list[int]] = [[] for _ in range(diagram.columns)]
        for number, box in enumerate(diagram.boxes):
            self.columns[box.column].append(number)
        framed = {c for block in diagram.blocks for c in range(block.first, block.last + 1)}
        self.tops = [self._half(len(boxes)) + PADDING * (c in framed) for c, boxes in enumerate(self.columns)]
        self.offset = self._order_rows()
        """Height of each box over the middle of its band."""
        self.bands = [_Band(*ends) for ends in self._bands(length)]
        self.band_of = {c: band for band in self.bands for c in range(band.first, band.last + 1)}
        for band in self.bands:
            band.top = max(self.tops[band.first : band.last + 1])
            band.bottom = -band.top

    def _half(self, rows: int) -> float:
        return (rows * (self.height + ROW_GAP) - ROW_GAP) / 2

    def _order_rows(self) -> list[float]:
        """From left to right, the boxes of a column in the order of the mean height of what they read."""
        sources: dict[int, list[int]] = {}
        for arrow in self.diagram.arrows:
            if not arrow.back:
                sources.setdefault(arrow.target, []).append(arrow.source)
        offset = [0.0] * len(self.diagram.boxes)
        for column in self.columns:
            read = {box: sources.get(box, [box]) for box in column}
            mean = {box: sum(offset[source] for source in boxes) / len(boxes) for box, boxes in read.items()}
            column.sort(key=mean.__getitem__, reverse=True)
            for row, box in enumerate(column):
                offset[box] = self._half(len(column)) - self.height / 2 - row * (self.height + ROW_GAP)
        return offset

    def _bands(self, length: float) -> Iterator[tuple[int, int]]:
        """First and last columns: bands end where the fewest boxes are read from beyond, and not inside a block."""
        count, first = len(self.columns), 0
        most = max(int(length / (self.width + GAP)), math.ceil(math.sqrt(0.8 * count)))
        alike = math.ceil(count / math.ceil(count / most))
        inside = {c for block in self.diagram.blocks for c in range(block.first, block.last)}
        read_beyond: list[set[int]] = [set() for _ in range(count)]
        for arrow in self.diagram.arrows:
            ends = sorted(self.diagram.boxes[box].column for box in (arrow.source, arrow.target))
            for column in range(*ends):
                read_beyond[column].add(arrow.source)
        while count - first > most:
            latest = first + min(most, alike + 1) - 1
            possible = [c for c in range(latest, first, -1) if c not in inside]
            near = [c for c in possible if c > latest - 4] or possible[:1]
            if near:
                last = min(near, key=lambda c: len(read_beyond[c]))
            else:
                last = next(c for c in range(latest, count) if c not in inside)
            yield first, last
            first = last + 1
        if first < count:
            yield first, count - 1

    def x(self, column: int) -> float:
        """Middle of a column."""
        return MARGIN + self.width / 2 + (column - self.band_of[column].first) * (self.width + GAP)

    def layout(self) -> Layout:
        boxes = self.diagram.boxes
        ways = [way for arrow in sorted(self.diagram.arrows, key=self._reach) for way in self._ways(arrow)]
        frames = [(block, *self._extent(block)) for block in self.diagram.blocks]
        middle, y = {}, -MARGIN
        for band in self.bands:
            middle[band.first] = y - band.top
            y = middle[band.first] + band.bottom - 2 * CLEARANCE
        longest = max(band.last - band.first + 1 for band in self.bands)

        def height(column: int, offset: float) -> float:
            return middle[self.band_of[column].first] + offset

        return Layout(
            (2 * MARGIN + longest * (self.width + GAP) - GAP, MARGIN - 2 * CLEARANCE - y),
            (self.width, self.height),
            tuple((self.x(box.column), height(box.column, self.offset[n])) for n, box in enumerate(boxes)),
            tuple(
                Line(tuple((x, height(column, offset)) for x, column, offset in way), arrow.back, count)
                for arrow, count, way in ways
            ),
            tuple(
                Frame(
                    self.x(block.first) - self.width / 2 - PADDING,
                    height(block.first, bottom),
                    self.x(block.last) + self.width / 2 + PADDING,
                    height(block.first, top),
                    block.copies,
                )
                for block, bottom, top in frames
            ),
        )

    def _reach(self, arrow: Arrow) -> int:
        return abs(self.diagram.boxes[arrow.target].column - self.diagram.boxes[arrow.source].column)

    def _extent(self, block: Block) -> tuple[float, float]:
        """Bottom and top of a block's frame: around its boxes and the edges between them."""
        columns = range(block.first, block.last + 1)
        top, bottom = max(self.tops[c] for c in columns), -max(self.tops[c] for c in columns)
        for start, end, y in self.band_of[block.first].lanes:
            if block.first <= start and end <= block.last:
                top, bottom = max(top, y + LANE / 2), min(bottom, y - LANE / 2)
        return bottom, top

    def _ways(self, arrow: Arrow) -> Iterator[tuple[Arrow, int, list[tuple[float, int, float]]]]:
        """The ways of one arrow's edges, by (x, column, height over the middle of the column's band)."""
        source, target = (self.diagram.boxes[box].column for box in (arrow.source, arrow.target))
        drawn = 1 if arrow.count > MOST_PARALLEL else arrow.count
        for number in range(drawn):
            if target == source + 1 and self.band_of[source] is self.band_of[target]:
                way = self._straight(arrow, number - (drawn - 1) / 2)
            else:
                way = self._around(arrow)
            yield arrow, arrow.count if drawn == 1 else 1, way

    def _straight(self, arrow: Arrow, place: float) -> list[tuple[float, int, float]]:
        source, target = (self.diagram.boxes[box].column for box in (arrow.source, arrow.target))
        shift = place * self.height / 3
        start = self.x(source) + self.width / 2, source, self.offset[arrow.source] + shift
        return [start, (self.x(target) - self.width / 2, target, self.offset[arrow.target] + shift)]

    def _around(self, arrow: Arrow) -> list[tuple[float, int, float]]:
        source, target = (self.diagram.boxes[box].column for box in (arrow.source, arrow.target))
        start, end = self.offset[arrow.source], self.offset[arrow.target]
        bands = self.band_of[source], self.band_of[target]
        band = min(bands, key=lambda one: one.first)
        if bands[0] is not bands[1]:
            side, passed, base = -1, (band.first, band.last), band.bottom
        else:
            # Lanes are told apart by the columns that they pass; to the right, those between the two.
            passed = (target, source) if arrow.back else (source + 1, target - 1)
            side = -1 if arrow.back or start + end < 0 else 1
            base = max(self.tops[passed[0] : passed[1] + 1])
        height = band.lane(*passed, base, side)
        turn = GAP * (0.3 + 0.1 * (len(band.lanes) % 4))
        left, right = self.x(source) + self.width / 2, self.x(target) - self.width / 2
        port = side * self.height / 4
        return [
            (left, source, start + port),
            (left + turn, source, start + port),
            (left + turn, band.first, height),
            (right - turn, band.first, height),
            (right - turn, target, end + port),
            (right, target, end + port),
        ]
