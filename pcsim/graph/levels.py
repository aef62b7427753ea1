"""Levels: how many latent hops an error travels to each node."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from heapq import heappop, heappush
from typing import TYPE_CHECKING

import networkx as nx
import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

if TYPE_CHECKING:
    from pcsim.graph.network import Network


def levels_to(
    network: Network, targets: Collection[str], deterministic: Collection[str] | None = None
) -> dict[str, int]:
    """Latent-to-latent hops from each node to the targets, along the longest path (SPEC §2, Arrival).

    In a cycle: along the longest path of the components' graph, counting shortest hops inside a component.

    Args:
        network: the network.
        targets: names of the nodes with level 0.
        deterministic: names of the nodes that do not count as a hop; those built so by default.

    Returns:
        Level by node name; a node that reaches no target is left out.
    """
    if deterministic is None:
        deterministic = {name for name, node in network.nodes.items() if node.deterministic} - set(targets)
    ends = frozenset(targets)
    edges = [(e.source_name, e.target_name) for e in network.edges.values() if e.source_name not in ends]
    successors: dict[str, list[str]] = {name: [] for name in network.nodes}
    predecessors: dict[str, list[str]] = {name: [] for name in network.nodes}
    for source, target in edges:
        successors[source].append(target)
        predecessors[target].append(source)
    hop = {name: 0 if name in deterministic else 1 for name in network.nodes}
    level = dict.fromkeys(ends, 0)
    for component in reversed(components(network, edges)):
        if ends.issuperset(component):
            continue
        members = frozenset(component)
        exits = {
            name: max(level[after] + hop[after] for after in outside)
            for name in members
            if (outside := [after for after in successors[name] if after not in members and after in level])
        }
        for exit_name, beyond in exits.items():
            for name, hops in _hops_back(exit_name, members, predecessors, hop).items():
                level[name] = max(level.get(name, 0), hops + beyond)
    return {name: level[name] for name in network.nodes if name in level}


def _hops_back(
    end: str, members: Collection[str], predecessors: Mapping[str, list[str]], hop: Mapping[str, int]
) -> dict[str, int]:
    """Fewest latent hops from each member to ``end`` inside one component."""
    hops = {end: 0}
    queue = deque([end])
    while queue:
        name = queue.popleft()
        for before in predecessors[name]:
            length = hops[name] + hop[name]
            if before in members and length < hops.get(before, len(hop) + 1):
                hops[before] = length
                (queue.append if hop[name] else queue.appendleft)(before)
    return hops


def components(network: Network, edges: Iterable[tuple[str, str]]) -> list[tuple[str, ...]]:
    """Strongly connected components, each after those that it reads.

    Where several may come next, the one with the node that was added first does; members are in that order too.

    Args:
        network: whose nodes are joined.
        edges: (source, target) by name.
    """
    names = list(network.nodes)
    place = {name: position for position, name in enumerate(names)}
    ends = np.array([(place[source], place[target]) for source, target in edges], np.intp).reshape(-1, 2)
    joined = coo_matrix((np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), shape=(len(names), len(names)))
    count, labels = connected_components(joined, connection="strong")
    first = np.unique(labels, return_index=True)[1]
    component = np.argsort(np.argsort(first))[labels]  # numbered by their first members
    members: list[list[str]] = [[] for _ in range(count)]
    for name, number in zip(names, component.tolist(), strict=True):
        members[number].append(name)
    between = component[ends][component[ends[:, 0]] != component[ends[:, 1]]]
    readers: list[list[int]] = [[] for _ in range(count)]
    for source, target in between.tolist():
        readers[source].append(target)
    awaited = np.bincount(between[:, 1], minlength=count).tolist()
    ready, ordered = [number for number in range(count) if not awaited[number]], []
    while ready:
        number = heappop(ready)
        ordered.append(tuple(members[number]))
        for reader in readers[number]:
            awaited[reader] -= 1
            if not awaited[reader]:
                heappush(ready, reader)
    return ordered


def simple_graph(network: Network, edges: Iterable[tuple[str, str]]) -> nx.DiGraph:
    """The nodes, in insertion order, joined by these edges; parallel ones count once."""
    graph = nx.DiGraph()
    graph.add_nodes_from(network.nodes)
    graph.add_edges_from(edges)
    return graph
