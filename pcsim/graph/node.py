"""A node: a population of units with a shape, and what turns its inputs into a prediction of its value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from pcsim.errors import GraphError, StateError
from pcsim.graph.energy import Energy, Gaussian, LearnedPrecision
from pcsim.graph.evaluation import held_draw

if TYPE_CHECKING:
    from pcsim.graph.edge import Edge
    from pcsim.graph.network import Network


class Sum(nn.Module):
    """Adds the contributions of a node's incoming edges: the usual way to combine them."""

    def forward(self, *contributions: Tensor) -> Tensor:
        """Sum of contributions of one shape, (batch, *shape)."""
        total = contributions[0]
        for contribution in contributions[1:]:
            total = total + contribution
        return total


class Product(nn.Module):
    """Multiplies the contributions of a node's incoming edges, unit by unit (gating)."""

    def forward(self, *contributions: Tensor) -> Tensor:
        """Product of contributions of one shape, (batch, *shape)."""
        product = contributions[0]
        for contribution in contributions[1:]:
            product = product * contribution
        return product


class Concatenate(nn.Module):
    """Joins the contributions of a node's incoming edges, in the order in which the edges were added.

    Args:
        axis: axis of the node's shape (the batch axis not counted), 0 by default.
    """

    def __init__(self, axis: int = 0) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, *contributions: Tensor) -> Tensor:
        """Contributions joined along ``axis``, (batch, *shape)."""
        return torch.cat(contributions, self.axis + 1 if self.axis >= 0 else self.axis)

    def extra_repr(self) -> str:
        """The axis, for printing."""
        return f"axis={self.axis}"


class StateReader(Protocol):
    """What a simulator offers to the nodes and edges of its network after a run."""

    def value(self, node: Node) -> Tensor:
        """v_n, (batch, *shape)."""

    def forward_value(self, node: Node) -> Tensor:
        """v_n after the feed-forward start, (batch, *shape)."""

    def forward_prediction(self, node: Node) -> Tensor:
        """u_n after the feed-forward start, (batch, *shape)."""

    def prediction(self, node: Node) -> Tensor:
        """u_n, (batch, *shape)."""

    def error(self, node: Node) -> Tensor:
        """ε_n, (batch, *shape)."""

    def precision(self, node: Node) -> Tensor:
        """π_n, 0-d or (*shape)."""

    def energy(self, node: Node) -> Tensor:
        """E_n, (batch,)."""

    def contribution(self, edge: Edge) -> Tensor:
        """a_e, (batch, *shape before the target's transfer)."""

    def message(self, edge: Edge) -> Tensor:
        """m_e, (batch, *shape of the source)."""


class Node(nn.Module):
    """One node of a predictive coding network; made by :meth:`Network.add_node`.

    After a run its state is read from it: ``value``, ``prediction``, ``error``, ``precision``, ``energy``,
    ``forward_value``, ``forward_prediction``. Each raises :class:`StateError` before a run. What is read is
    evaluated at the present latent values and the present weights, so it is never a step stale.
    """

    def __init__(
        self,
        network: Network,
        name: str,
        shape: tuple[int, ...],
        *,
        transfer: nn.Module | None,
        combine: nn.Module | None,
        energy: Energy | None,
        weight: float,
        precision: float | Tensor | LearnedPrecision,
        deterministic: bool,
        prior: float | Tensor | None,
    ) -> None:
        super().__init__()
        # Past nn.Module's own __setattr__, which would make the network a child of its node.
        object.__setattr__(self, "_network", network)
        self.name = name
        self.shape = shape
        self.transfer = nn.Identity() if transfer is None else transfer
        self.combine = Sum() if combine is None else combine
        if energy is not None and not isinstance(energy, Energy):
            mend = instead_of(energy, Energy, "write Gaussian(), CrossEntropy(), or one of your own")
            raise GraphError(f"node {name!r}: energy {energy!r} given, expected an instance of Energy; {mend}")
        self.energy_function = Gaussian() if energy is None else energy
        self.deterministic = deterministic
        self.stochastic = False
        self.weight = weight
        self._set_precision(precision)
        self._set_prior(prior)

    def _set_precision(self, precision: float | Tensor | LearnedPrecision) -> None:
        self.log_precision: nn.Parameter | None = None
        self.given_precision: Tensor | float = 1.0
        if isinstance(precision, LearnedPrecision):
            if not self.energy_function.normalised:
                raise GraphError(
                    f"node {self.name!r}: a learned precision was asked for together with "
                    f"{type(self.energy_function).__name__}, which has no log-likelihood in its precision; "
                    "use the Gaussian energy, or give the precision"
                )
            start = torch.full(self.shape if precision.per_unit else (), math.log(precision.initial))
            self.log_precision = nn.Parameter(start)
        elif isinstance(precision, Tensor):
            if precision.shape not in (torch.Size(()), torch.Size(self.shape)):
                raise GraphError(
                    f"node {self.name!r}: precision of shape {tuple(precision.shape)} given, expected one number or "
                    f"one per unit, {self.shape}"
                )
            if not bool((torch.isfinite(precision) & (precision >= 0)).all()):
                raise GraphError(f"node {self.name!r}: a precision is negative or not finite; give at least 0")
            del self.given_precision
            self.register_buffer("given_precision", precision.detach().clone())
        elif not isinstance(precision, int | float) or not (precision >= 0 and math.isfinite(precision)):
            raise GraphError(
                f"node {self.name!r}: precision {precision!r} given, expected a finite number of at least 0"
            )
        else:
            self.given_precision = float(precision)

    def _set_prior(self, prior: float | Tensor | None) -> None:
        self.prior: Tensor | None = None
        if prior is None:
            return
        if self.deterministic:
            raise GraphError(f"node {self.name!r}: a deterministic node has no energy for a prior to enter; drop one")
        tensor = prior if isinstance(prior, Tensor) else torch.tensor(float(prior))
        if not bool(torch.isfinite(tensor).all()):
            raise GraphError(f"node {self.name!r}: the prior is NaN or infinite; give finite numbers")
        if tensor.shape not in (torch.Size(()), torch.Size(self.shape)):
            raise GraphError(
                f"node {self.name!r}: prior of shape {tuple(tensor.shape)} given, expected one number or one per "
                f"unit, {self.shape}"
            )
        if isinstance(tensor, nn.Parameter):
            self.prior = tensor
        else:
            del self.prior
            self.register_buffer("prior", tensor.detach().clone())

    @property
    def weight(self) -> float:
        """w_n, the fixed factor on the energy; one that is set anew holds from the next run on."""
        return self._weight

    @weight.setter
    def weight(self, weight: float) -> None:
        if not isinstance(weight, int | float) or not (weight >= 0 and math.isfinite(weight)):
            raise GraphError(f"node {self.name!r}: weight {weight!r} given, expected a finite number of at least 0")
        self._weight = float(weight)
        self.network.revision += 1

    @property
    def network(self) -> Network:
        """The network that this node belongs to."""
        network: Network = object.__getattribute__(self, "_network")
        return network

    @property
    def incoming(self) -> list[Edge]:
        """Edges into this node, in the order in which they were added."""
        return self.network.incoming(self.name)

    @property
    def outgoing(self) -> list[Edge]:
        """Edges out of this node, in the order in which they were added."""
        return self.network.outgoing(self.name)

    @property
    def predicted(self) -> bool:
        """Whether anything predicts this node: an incoming edge, or a prior."""
        return self.prior is not None or self.network.in_degree(self.name) > 0

    @property
    def trainable(self) -> list[nn.Parameter]:
        """Parameters that make this node's prediction or weigh its error: of its incoming edges, and its own."""
        found = [parameter for edge in self.incoming for parameter in edge.parameters()] + list(self.parameters())
        return [parameter for parameter in dict.fromkeys(found) if parameter.requires_grad]

    @property
    def base_precision(self) -> Tensor | float:
        """The node's own precision, which the schedule multiplies: a number, 0-d or (*shape)."""
        return self.given_precision if self.log_precision is None else self.log_precision.exp()

    def predict(self, contributions: Sequence[Tensor], seed: int | None = None) -> Tensor:
        """u_n = g_n(combine(a_e over incoming e)) (SPEC §1).

        Args:
            contributions: one per incoming edge, in order, each (batch, ...).
            seed: what the modules' random draws (dropout, say) start from; None leaves them to the random state.

        Returns:
            The prediction of this node's value, (batch, *shape).
        """
        if self.stochastic and seed is not None:
            with held_draw(seed, f"node {self.name}", contributions[0].device):
                prediction: Tensor = self.transfer(self.combine(*contributions))
        else:
            prediction = self.transfer(self.combine(*contributions))
        return prediction

    def predict_from_prior(self, batch: int) -> Tensor:
        """The prior as a prediction of a root without incoming edges, (batch, *shape)."""
        if self.prior is None:
            raise GraphError(f"node {self.name!r} has no prior; give one to add_node")
        return self.prior.expand(batch, *self.shape)

    def _reader(self) -> StateReader:
        reader = self.network.reader
        if reader is None:
            raise StateError(f"node {self.name!r} has no state yet: run Simulator.infer on its network first")
        return reader

    @property
    def value(self) -> Tensor:
        """v_n, the latent state, (batch, *shape)."""
        return self._reader().value(self)

    @property
    def forward_value(self) -> Tensor:
        """v_n after the feed-forward start (the paper's h0), (batch, *shape)."""
        return self._reader().forward_value(self)

    @property
    def forward_prediction(self) -> Tensor:
        """u_n after the feed-forward start: the network's output at a target, (batch, *shape)."""
        return self._reader().forward_prediction(self)

    @property
    def prediction(self) -> Tensor:
        """u_n, (batch, *shape); :class:`StateError` where nothing predicts the node."""
        return self._reader().prediction(self)

    @property
    def error(self) -> Tensor:
        """ε_n = v_n − u_n, (batch, *shape); zero for a deterministic node."""
        return self._reader().error(self)

    @property
    def precision(self) -> Tensor:
        """π_n at the last inference step, 0-d or (*shape)."""
        return self._reader().precision(self)

    @property
    def energy(self) -> Tensor:
        """E_n before precision and weight, per sample, (batch,); zero where nothing predicts the node."""
        return self._reader().energy(self)

    def __repr__(self) -> str:
        kind = "deterministic" if self.deterministic else "latent"
        return f"Node({self.name!r}, shape={self.shape}, {kind})"


def instead_of(given: object, kind: type, otherwise: str) -> str:
    """What to do where an instance of ``kind`` is expected: make one of the class that was given, or ``otherwise``."""
    if isinstance(given, type) and issubclass(given, kind):
        return f"write {given.__name__}() with its arguments"
    return otherwise
