"""What is exactly zero, and so need not be computed (SPEC §7): known before any tensor exists."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from pcsim.engine.engine import Problem


class Liveness:
    """Which errors can differ from zero, followed through the steps of a relaxation.

    An error is live once its node, or a node that its prediction reads, has moved since the feed-forward start, or
    its node is clamped; on a cycle, whose values do not start feed-forward, from the start.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        clamping = problem.clamping
        self.moved: set[str] = set()
        """Nodes whose value has moved since the start."""
        self.started: frozenset[str] = frozenset(
            name
            for name in clamping.energetic
            if name in clamping.full or name in clamping.partial or name in clamping.cyclic
        )
        """Nodes whose error is live from the start."""
        self.errors: set[str] = set(self.started)
        """Nodes whose error is live."""
        self._users = _users_of_parameters(problem) if problem.rule.every_step else {}

    def pushing(self, step: int) -> set[str]:
        """Nodes that pull on themselves and send messages at a step: a live error and a precision that is not zero."""
        return {name for name in self.errors if not self._problem.never_pushes(name, step)}

    def moving(self, pushing: Collection[str]) -> set[str]:
        """Nodes that move when those push: themselves, what they read, and what has momentum."""
        clamping = self._problem.clamping
        touched = set(pushing).union(*(clamping.feeders[name] for name in pushing))
        if self._problem.relaxation.momentum:
            touched |= self.moved
        return touched.intersection(clamping.free)

    def advance(self, moving: Collection[str], learned: Collection[str] = ()) -> None:
        """Account for one step, in which these nodes moved and the parameters behind ``learned`` changed."""
        clamping = self._problem.clamping
        self.moved.update(moving)
        for name in moving:
            self.errors |= clamping.readers[name]
        self.errors.update(set(moving).intersection(clamping.energetic))
        for changed in self._changed_by_learning(learned):
            self.errors |= clamping.readers[changed] if changed in clamping.deterministic else {changed}

    def _changed_by_learning(self, learned: Collection[str]) -> set[str]:
        nodes = self._problem.network.nodes
        touched = self.teaching(learned)
        parameters = {p for name in touched for p in local_parameters(self._problem, nodes[name].name)}
        return {user for parameter in parameters for user in self._users.get(parameter, ())}

    def learning(self) -> set[str]:
        """Nodes whose error the learning rule reads and that can differ from zero, once relaxed."""
        live = self.started | self.moved if self._problem.rule.at_forward else self.errors
        nodes = self._problem.network.nodes
        return {name for name in live if name in self._problem.clamping.energetic and nodes[name].weight != 0}

    def teaching(self, live: Collection[str]) -> set[str]:
        """Nodes whose incoming edges learn from the errors of ``live``: themselves and deterministic ones between."""
        clamping = self._problem.clamping
        return {f for name in live for f in clamping.feeders[name] if f in clamping.deterministic} | set(live)


def local_parameters(problem: Problem, node: str) -> list[nn.Parameter]:
    """Trainable parameters that make a node's prediction and weigh its error: of its incoming edges and its own."""
    own = problem.network.nodes[node]
    found = [p for edge in own.incoming for p in edge.parameters()] + list(own.parameters())
    return [p for p in dict.fromkeys(found) if p.requires_grad]


def _users_of_parameters(problem: Problem) -> dict[nn.Parameter, list[str]]:
    users: dict[nn.Parameter, list[str]] = {}
    for name in problem.network.nodes:
        for parameter in local_parameters(problem, name):
            users.setdefault(parameter, []).append(name)
    return users
