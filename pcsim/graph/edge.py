"""An edge: the module through which one node's value helps to predict another's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pcsim.errors import GraphError, StateError
from pcsim.graph import checks
from pcsim.graph.part import Part
from pcsim.messages import is_number

if TYPE_CHECKING:
    from pcsim.graph.network import Network
    from pcsim.graph.node import Node, StateReader


class Edge(Part):
    """One edge of a predictive coding network; made by :meth:`Network.add_edge`.

    It contributes a_e = gain · f_e(v_source) to its target's prediction and feeds the message m_e back to its source
    (SPEC §1 and §2). After a run both are read from it: ``prediction`` and ``message``. Its ``module`` and ``gain`` may
    be set between runs.
    """

    kind = "edge"

    def __init__(self, network: Network, name: str, source: str, target: str, module: nn.Module, gain: float) -> None:
        super().__init__(network, name)
        self._source_name, self._target_name = source, target
        self._contribution_shape: tuple[int, ...] = ()
        self.module = module
        self.gain = gain

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "module" and "module" in self._modules:
            checks.module(f"edge {self.name!r}: module", value)
            value = nn.Identity() if value is None else value
            checks.replaced_edge(self, value)
            self.network.revision += 1
        super().__setattr__(name, value)

    @property
    def source_name(self) -> str:
        """Name of the node whose value this edge reads."""
        return self._source_name

    @property
    def target_name(self) -> str:
        """Name of the node whose prediction this edge contributes to."""
        return self._target_name

    @property
    def contribution_shape(self) -> tuple[int, ...]:
        """Shape of what the edge contributes, before the target's transfer, the batch axis left out."""
        return self._contribution_shape

    @property
    def gain(self) -> float:
        """The fixed factor on what the module gives; one that is set anew holds from the next run on."""
        return self._gain

    @gain.setter
    def gain(self, gain: float) -> None:
        if not is_number(gain):
            raise GraphError(f"edge {self.name!r}: gain {gain!r} given, expected a finite number")
        self._gain = float(gain)
        self.network.revision += 1

    @property
    def source(self) -> Node:
        """The node whose value this edge reads."""
        return self.network.nodes[self._source_name]

    @property
    def target(self) -> Node:
        """The node whose prediction this edge contributes to."""
        return self.network.nodes[self._target_name]

    def contribute(self, value: Tensor, seed: int | None = None, *, hold: bool = True) -> Tensor:
        """a_e = gain · f_e(value) (SPEC §1), where the target lies.

        Args:
            value: the source's value, (batch, *source shape).
            seed: what the module's random draws (dropout, say) start from; None leaves them to the random state.
            hold: leave buffers that move with every evaluation where they are.
        """
        value = value if self.device is None else value.to(self.device)
        with self._drawing(seed, value.device):
            contribution = self._call(self.module, [value], hold)
        return contribution if self._gain == 1.0 else self._gain * contribution

    def _reader(self) -> StateReader:
        reader = self.network.reader
        if reader is None:
            raise StateError(f"edge {self.name!r} has no state yet: run Simulator.infer on its network first")
        return reader

    @property
    def prediction(self) -> Tensor:
        """a_e, what this edge contributes, (batch, *shape before the target's transfer)."""
        return self._reader().contribution(self)

    @property
    def message(self) -> Tensor:
        """m_e, what this edge feeds back to its source, (batch, *source shape)."""
        return self._reader().message(self)

    def __repr__(self) -> str:
        gain = "" if self.gain == 1.0 else f", gain={self.gain:g}"
        return f"Edge({self.name!r}, {self.module!r}{gain})"
