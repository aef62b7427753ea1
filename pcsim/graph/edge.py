"""An edge: the module through which one node's value helps to predict another's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor, nn

from pcsim.errors import GraphError, StateError
from pcsim.graph.evaluation import held_draw

if TYPE_CHECKING:
    from pcsim.graph.network import Network
    from pcsim.graph.node import Node, StateReader


class Edge(nn.Module):
    """One edge of a predictive coding network; made by :meth:`Network.add_edge`.

    It contributes a_e = gain · f_e(v_source) to its target's prediction and feeds the message m_e back to its source
    (SPEC §1 and §2). After a run both are read from it: ``prediction`` and ``message``.
    """

    def __init__(
        self,
        network: Network,
        name: str,
        source: str,
        target: str,
        module: nn.Module,
        gain: float,
        contribution_shape: tuple[int, ...],
        stochastic: bool,
    ) -> None:
        super().__init__()
        # Past nn.Module's own __setattr__, which would make the network a child of its edge.
        object.__setattr__(self, "_network", network)
        self.name = name
        self.source_name = source
        self.target_name = target
        self.module = module
        self.gain = gain
        self.contribution_shape = contribution_shape
        self.stochastic = stochastic

    @property
    def gain(self) -> float:
        """The fixed factor on what the module gives; one that is set anew holds from the next run on."""
        return self._gain

    @gain.setter
    def gain(self, gain: float) -> None:
        if not (isinstance(gain, int | float) and math.isfinite(gain)):
            raise GraphError(f"edge {self.name!r}: gain {gain!r} given, expected a finite number")
        self._gain = float(gain)
        self.network.revision += 1

    @property
    def network(self) -> Network:
        """The network that this edge belongs to."""
        network: Network = object.__getattribute__(self, "_network")
        return network

    @property
    def source(self) -> Node:
        """The node whose value this edge reads."""
        return self.network.nodes[self.source_name]

    @property
    def target(self) -> Node:
        """The node whose prediction this edge contributes to."""
        return self.network.nodes[self.target_name]

    def contribute(self, value: Tensor, seed: int | None = None) -> Tensor:
        """a_e = gain · f_e(value) (SPEC §1).

        Args:
            value: the source's value, (batch, *source shape).
            seed: what the module's random draws (dropout, say) start from; None leaves them to the random state.
        """
        if self.stochastic and seed is not None:
            with held_draw(seed, f"edge {self.name}", value.device):
                contribution: Tensor = self.module(value)
        else:
            contribution = self.module(value)
        return contribution if self.gain == 1.0 else self.gain * contribution

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
