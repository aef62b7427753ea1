"""The trace of a relaxation: its steps and, where asked for, the energy of every node at each of them."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
from torch import Tensor

from pcsim import tables
from pcsim.engine.probe import PARTS, Recording
from pcsim.errors import StateError
from pcsim.graph.node import Node


@attrs.frozen(eq=False, repr=False)
class Trace:
    """What one relaxation did.

    Args:
        steps: inference steps taken.
        nodes: names of the nodes with an energy, in the order of ``energies``.
        levels: level by node name, of the nodes that reach a target.
        energies: E_n before precision, in the state before each step and after the last,
            (steps + 1, nodes, batch); None unless recorded.
        error_norms: ‖ε_n‖ of the same states, (steps + 1, nodes, batch); None unless recorded.
        free_energies: F_t, summed over nodes and batch, of the same states with the precision of the step that
            follows (the last row: of the last step), (steps + 1,); None unless recorded.
        recordings: values, predictions and errors of the same states, by name of the nodes for which they were asked.
    """

    steps: int
    nodes: tuple[str, ...]
    levels: Mapping[str, int]
    energies: Tensor | None = None
    error_norms: Tensor | None = None
    free_energies: Tensor | None = None
    recordings: Mapping[str, Recording] = attrs.field(factory=dict)

    def energy(self, node: Node | str) -> Tensor:
        """E_n of one node over the relaxation, (steps + 1, batch); StateError unless recorded."""
        name = node if isinstance(node, str) else node.name
        if self.energies is None:
            raise StateError("this trace holds no energies: ask for them with infer(..., record=True)")
        if name not in self.nodes:
            raise StateError(f"node {name!r} has no energy in this run; those that have: {', '.join(self.nodes)}")
        return self.energies[:, self.nodes.index(name)]

    def value(self, node: Node | str) -> Tensor:
        """v_n of one node over the relaxation, (steps + 1, batch, *shape); StateError unless recorded."""
        return self._recorded(node, "value")

    def prediction(self, node: Node | str) -> Tensor:
        """u_n of one node over the relaxation, (steps + 1, batch, *shape); StateError unless recorded."""
        return self._recorded(node, "prediction")

    def error(self, node: Node | str) -> Tensor:
        """ε_n of one node over the relaxation, (steps + 1, batch, *shape); StateError unless recorded."""
        return self._recorded(node, "error")

    def _recorded(self, node: Node | str, part: str) -> Tensor:
        name = node if isinstance(node, str) else node.name
        found: Tensor | None = getattr(self.recordings.get(name), part, None)
        if found is None:
            kept = [f"{part} of {name!r}" for name, each in self.recordings.items() for part in _kept(each)]
            raise StateError(
                f"this trace holds no {part} of node {name!r}, but {', '.join(kept) or 'none at all'}: ask for it with "
                f"infer(..., record=[{name!r}]), or for what it holds (part= of a figure)"
            )
        return found

    def __repr__(self) -> str:
        kept = ["energies"] if self.energies is not None else []
        kept += [f"{' and '.join(_kept(each))} of {name!r}" for name, each in self.recordings.items()]
        change = ""
        if self.free_energies is not None:
            first, last = self.free_energies[[0, -1]].tolist()
            change = f", free energy {first:.4g} to {last:.4g}"
        return f"Trace({self.steps} steps, {len(self.nodes)} nodes{change}; recorded: {', '.join(kept) or 'nothing'})"

    def _repr_html_(self) -> str:
        caption = f"Trace of {self.steps} steps over {len(self.nodes)} nodes with an energy"
        if self.energies is None:
            return tables.html((), (), caption=f"{caption}; no energies recorded (infer(..., record=True))")
        means, rows = self.energies.double().mean(2), []
        for level in sorted({self.levels[name] for name in self.nodes if name in self.levels}):
            members = [place for place, name in enumerate(self.nodes) if self.levels.get(name) == level]
            start, end = means[:, members].sum(1)[[0, -1]].tolist()
            rows.append((str(level), ", ".join(self.nodes[place] for place in members), f"{start:.4g}", f"{end:.4g}"))
        headings = ("level", "nodes", "energy per sample at the start", "at the end")
        return tables.html(headings, rows, caption=caption)


def _kept(recording: Recording) -> list[str]:
    return [part for part in PARTS if getattr(recording, part) is not None]
