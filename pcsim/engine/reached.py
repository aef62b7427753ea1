"""Which errors can have become other than zero, step by step, without a plan: the planner's oracle."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from torch import nn

from pcsim.engine.problem import Task


class Reached:
    """Which errors can have become other than zero, found by walking the graph step by step.

    It decides which parameters have a gradient and which have None: those to which no error has come (SPEC §4).
    """

    def __init__(self, task: Task) -> None:
        clamping, nodes = task.clamping, task.network.nodes
        self._task = task
        self._passing = clamping.deterministic | frozenset(task.following)
        """Nodes through which an error passes within a step."""
        self._live = {
            name
            for name in clamping.energetic
            if name in clamping.full | clamping.partial | clamping.placed
            or not nodes[name].energy_function.rests_at_prediction
        }
        """Nodes with an energy whose error may differ from zero."""
        self._at_start = set(self._live)
        self._moved: set[str] = set()

    def weighing(self) -> set[str]:
        """Nodes whose error may differ from zero and has a weight, precision left out."""
        return {name for name in self._live if self._task.network.nodes[name].energy_weight}

    def with_inner(self, names: set[str]) -> set[str]:
        """These nodes, and the deterministic ones through which their errors pass."""
        return names | self._inner_before(names, self._task.clamping.deterministic)

    def step(self, step: int) -> set[str]:
        """Take a step; the nodes whose parameters learn at it, where weights learn at every step."""
        task, nodes = self._task, self._task.network.nodes
        active = {name for name in self._live if self._counts(name) and task.scheduled(name, step)}
        if task.relaxation.multipliers:  # which count whatever the precision
            active |= self._live.intersection(task.clamping.multiplied)
        reading = active | self._inner_before(active, self._passing)
        moving = active | {edge.source_name for name in reading for edge in nodes[name].incoming}
        moving = set(task.clamping.free) & (moving if not task.relaxation.temperature else set(nodes))
        changed = set[str]()  # where predictions are held, nothing follows from a move
        if not task.held:
            changed = {edge.target_name for name in moving for edge in nodes[name].outgoing}
        if task.learns_each_step:
            learned = {parameter for name in reading for parameter in self._own_and_incoming(name)}
            changed |= {name for name in nodes if learned & self._own_and_incoming(name)}
            if learned:  # modules of a user's own may read weights that are not their own
                changed |= {name for name, node in nodes.items() if any(p.stochastic for p in (node, *node.incoming))}
        if not task.held:
            changed |= {edge.target_name for name in task.changing(step) for edge in nodes[name].outgoing}
        self._moved |= moving
        self._live |= (moving | (self._after(changed) - set(task.following))) & set(task.clamping.energetic)
        return reading

    def learning(self) -> set[str]:
        """The nodes whose parameters learn after the steps taken."""
        live = self._at_start | self._moved if self._task.learns_forward else self._live
        nodes = self._task.network.nodes
        active = {name for name in live & set(self._task.clamping.energetic) if nodes[name].energy_weight}
        return self.with_inner(active)

    def _counts(self, name: str) -> bool:
        """Whether a node's error weighs anything, by its weight and a precision that is a number."""
        node = self._task.network.nodes[name]
        return node.energy_weight != 0 and self._task.number(name) != 0

    def _own_and_incoming(self, name: str) -> set[nn.Parameter]:
        node = self._task.network.nodes[name]
        inner = name in self._task.clamping.deterministic  # has no energy, so nothing weighs its precision
        return {p for p in node.trainable if not (inner and p is node.log_precision)}

    def _inner_before(self, names: Iterable[str], inner: Collection[str]) -> set[str]:
        nodes = self._task.network.nodes
        return _walk(names, lambda name: [e.source_name for e in nodes[name].incoming if e.source_name in inner])

    def _after(self, names: Iterable[str]) -> set[str]:
        """These nodes, and all whose predictions change with theirs."""
        nodes, names = self._task.network.nodes, set(names)
        passing = self._passing
        return names | _walk(names, lambda n: [e.target_name for e in nodes[n].outgoing] if n in passing else [])


def _walk(names: Iterable[str], onwards: Callable[[str], list[str]]) -> set[str]:
    """All that is reached from these names, themselves only where they are reached."""
    found, frontier = set[str](), list(names)
    while frontier:
        new = [name for name in onwards(frontier.pop()) if name not in found]
        found.update(new)
        frontier += new
    return found
