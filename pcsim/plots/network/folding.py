"""A network as columns from inputs to outputs, with runs of equal columns folded into one block.

Drawings and Graphviz source are made from this diagram; it needs the graph alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Sequence

import attrs
import networkx as nx

from pcsim.errors import GraphError
from pcsim.graph.edge import Edge
from pcsim.graph.levels import simple_graph
from pcsim.graph.network import Network
from pcsim.graph.node import Node
from pcsim.graph.rewrite import is_auxiliary

LARGE = 24
"""Networks with more nodes are folded unless said otherwise."""

LONGEST_BLOCK = 32
LEAST_SAVED = 2

KINDS = ("latent", "deterministic", "auxiliary", "clamped")


@attrs.frozen
class Box:
    """One node, or the same node of every copy of a block.

    Args:
        nodes: those it stands for, the first copy's first.
        kind: one of ``KINDS``.
        column: from 0, left to right, as drawn.
        row: from 0 in its column.
    """

    nodes: tuple[Node, ...]
    kind: str
    column: int
    row: int

    @property
    def names(self) -> tuple[str, ...]:
        """Lines of text that name it: the first node, and the last where it stands for several."""
        names = [node.name for node in self.nodes]
        return (names[0],) if len(names) == 1 else (f"{names[0]} …", names[-1])

    @property
    def shape(self) -> str:
        """Sizes of the value, such as 64x32x32."""
        return "x".join(map(str, self.nodes[0].shape)) or "1"


@attrs.frozen
class Arrow:
    """All edges from one box to another: parallel ones, and those of several copies of a block.

    Args:
        source: position of its box.
        target: position of its box.
        count: number of edges, at least 1.
        back: whether they lead from a node to itself or to one in an earlier column, and so close a cycle.
    """

    source: int
    target: int
    count: int
    back: bool


@attrs.frozen
class Block:
    """Columns that stand for several equal copies: ``first`` to ``last`` as drawn, ``copies`` times, at least 2."""

    first: int
    last: int
    copies: int


@attrs.frozen
class Diagram:
    """What is to be drawn of a network, column by column."""

    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]
    blocks: tuple[Block, ...]

    @property
    def columns(self) -> int:
        """Number of columns."""
        return 1 + max((box.column for box in self.boxes), default=-1)


@attrs.frozen
class _Run:
    """Columns ``start`` to ``start + period · copies`` of the network."""

    start: int
    period: int
    copies: int


def diagram(network: Network, *, clamped: Collection[Node | str] = (), fold: bool | None = None) -> Diagram:
    """Arrange a network in columns, and fold what repeats.

    A node's column is the largest number of edges on a path that leads to it, so that edges point to the right;
    a root stands just before the first node that reads it. An edge by which a depth-first walk, from the
    nodes in the order in which they were added, comes back to where it has come from closes a cycle, and does not
    count.

    Folding: two columns are equal if their nodes, one by one, have the same kind, shape, weight, energy, transfer and
    combination, and their incoming edges the same modules (as printed), gains, and sources counted in columns back
    and place in the column. From left to right, the run of at least two equal successive blocks of at most 32 columns
    that hides the most boxes (of several, the one with the shortest block) becomes one block, if it hides at least
    two. Edges between two copies are left out: they are as those that enter the block.

    Args:
        network: any.
        clamped: nodes to be marked as given, or their names.
        fold: whether to fold; None folds networks of more than 24 nodes.

    Raises:
        GraphError: a clamped node is not in the network.
    """
    for node in clamped:
        if node not in network:
            name = node if isinstance(node, str) else node.name
            raise GraphError(f"clamped: node {name!r} is not in the network; give its nodes, or their names")
    given = {node if isinstance(node, str) else node.name for node in clamped}
    kinds = {name: _kind(node, name in given) for name, node in network.nodes.items()}
    columns = _columns(network)
    folding = len(network.nodes) > LARGE if fold is None else fold
    runs = _runs(_signatures(network, columns, kinds), [len(column) for column in columns]) if folding else []
    return _diagram(network, columns, kinds, runs)


def _kind(node: Node, given: bool) -> str:
    if given or node.integers is not None:  # which always are
        return "clamped"
    return "auxiliary" if is_auxiliary(node) else "deterministic" if node.deterministic else "latent"


def _columns(network: Network) -> list[list[Node]]:
    graph = simple_graph(network, ((edge.source_name, edge.target_name) for edge in network.edges.values()))
    graph.remove_edges_from(_closing_edges(graph))
    column = {name: depth for depth, names in enumerate(nx.topological_generations(graph)) for name in names}
    for node in network.roots():
        if graph.out_degree(node.name):
            column[node.name] = min(column[reader] for reader in graph.successors(node.name)) - 1
    columns: list[list[Node]] = [[] for _ in range(1 + max(column.values(), default=-1))]
    for name, node in network.nodes.items():
        columns[column[name]].append(node)
    return columns


def _closing_edges(graph: nx.DiGraph) -> list[tuple[str, str]]:
    """Edges to a node from which a depth-first walk has come and to which it has not gone back yet."""
    open_nodes, closing = set(), []
    for source, target, kind in nx.dfs_labeled_edges(graph):
        if kind == "forward":
            open_nodes.add(target)
        elif kind == "reverse":
            open_nodes.discard(target)
        elif target in open_nodes:
            closing.append((source, target))
    return closing


def _signatures(network: Network, columns: Sequence[Sequence[Node]], kinds: dict[str, str]) -> list[int]:
    """A number for each column, equal for equal columns."""
    place = {node.name: (x, y) for x, column in enumerate(columns) for y, node in enumerate(column)}
    known: dict[Hashable, int] = {}

    def edge_signature(edge: Edge, x: int) -> Hashable:
        column, row = place[edge.source_name]
        return x - column, row, edge.gain, repr(edge.module)

    numbers = []
    for x, column in enumerate(columns):
        parts = []
        for node in column:
            own = (kinds[node.name], node.shape, node.energy_weight, type(node.energy_function), repr(node.transfer))
            rest = (repr(node.combine), node.prior is None, node.log_precision is None)
            parts.append((*own, *rest, tuple(edge_signature(edge, x) for edge in network.incoming(node))))
        numbers.append(known.setdefault(tuple(parts), len(known)))
    return numbers


def _runs(signatures: Sequence[int], sizes: Sequence[int]) -> list[_Run]:
    runs, start = [], 0
    while start < len(signatures):
        best, most = None, LEAST_SAVED - 1
        for period in range(1, min(LONGEST_BLOCK, (len(signatures) - start) // 2) + 1):
            end = start + period
            while end < len(signatures) and signatures[end] == signatures[end - period]:
                end += 1
            copies = (end - start) // period
            saved = (copies - 1) * sum(sizes[start : start + period])
            if saved > most:
                best, most = _Run(start, period, copies), saved
        if best is None:
            start += 1
        else:
            runs.append(best)
            start += best.period * best.copies
    return runs


def _diagram(
    network: Network, columns: Sequence[Sequence[Node]], kinds: dict[str, str], runs: Sequence[_Run]
) -> Diagram:
    boxes: list[Box] = []
    blocks: list[Block] = []
    box_of: dict[str, int] = {}
    copy_of: dict[str, tuple[int, int]] = {}
    """Run and copy of each node that is in a run."""
    starting = {run.start: run for run in runs}
    x = drawn = 0
    while x < len(columns):
        run = starting.get(x, _Run(x, 1, 1))
        for offset in range(run.period):
            copies = [columns[x + offset + copy * run.period] for copy in range(run.copies)]
            for row, nodes in enumerate(zip(*copies, strict=True)):
                for copy, node in enumerate(nodes):
                    box_of[node.name] = len(boxes)
                    if run.copies > 1:
                        copy_of[node.name] = run.start, copy
                boxes.append(Box(nodes, kinds[nodes[0].name], drawn + offset, row))
        if run.copies > 1:
            blocks.append(Block(drawn, drawn + run.period - 1, run.copies))
        x += run.period * run.copies
        drawn += run.period
    column = {node.name: number for number, nodes in enumerate(columns) for node in nodes}
    counts: Counter[tuple[int, int, bool]] = Counter()
    for edge in network.edges.values():
        start, end = copy_of.get(edge.source_name), copy_of.get(edge.target_name)
        if start and end and start[0] == end[0] and (start[1], end[1]) != (0, 0):
            continue
        back = column[edge.target_name] <= column[edge.source_name]
        counts[box_of[edge.source_name], box_of[edge.target_name], back] += 1
    return Diagram(tuple(boxes), tuple(Arrow(a, b, n, back) for (a, b, back), n in counts.items()), tuple(blocks))
