"""A node: a population of units with a shape, and what turns its inputs into a prediction of its value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from pcsim.errors import GraphError, StateError
from pcsim.graph import checks
from pcsim.graph.combining import Sum
from pcsim.graph.energy import Energy, Gaussian, LearnedPrecision
from pcsim.graph.part import Part
from pcsim.graph.probing import integers_taken
from pcsim.messages import is_number

if TYPE_CHECKING:
    from pcsim.graph.edge import Edge
    from pcsim.graph.network import Network


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


class Node(Part):
    """One node of a predictive coding network; made by :meth:`Network.add_node`.

    After a run its state is read from it: ``value``, ``prediction``, ``error``, ``precision``, ``energy``,
    ``forward_value``, ``forward_prediction``. Each raises :class:`StateError` before a run. What is read is
    evaluated at the present latent values, weights and settings, so it is never a step stale, and a copy of the
    reader's own.

    ``transfer``, ``combine``, ``energy_function``, ``energy_weight``, ``own_precision``, ``prior``, ``constant`` and
    ``deterministic`` may be set between runs, and are checked as by ``add_node``; ``precision`` and ``energy``, under
    which a run's are read, may be set as well, as they are given.
    """

    kind = "node"
    renamed = {  # noqa: RUF012 - annotated by the base class
        "weight": "energy_weight",
        "given_precision": "own_precision",
        "base_precision": "own_precision",
    }

    def __init__(
        self,
        network: Network,
        name: str,
        shape: tuple[int, ...],
        *,
        transfer: nn.Module | None,
        combine: nn.Module | None,
        energy: Energy | None,
        energy_weight: float,
        precision: float | Tensor | LearnedPrecision,
        deterministic: bool,
        prior: object,
        constant: float | None,
    ) -> None:
        super().__init__(network, name)
        self._shape = shape
        self.transfer: nn.Module = nn.Identity() if transfer is None else transfer
        self.combine: nn.Module = Sum() if combine is None else combine
        self._deterministic = deterministic
        self._energy_function: Energy = Gaussian()
        self.log_precision: nn.Parameter | None = None
        self._number = 1.0
        self.energy_function = energy
        self.energy_weight = energy_weight
        self.own_precision = precision
        self.prior = prior
        self.constant = constant

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("transfer", "combine") and name in self._modules:
            checks.module(f"node {self.name!r}: {name}", value)
            if value is None:
                value = nn.Identity() if name == "transfer" else Sum()
            checks.replaced_in_node(self, name, value)
            self.network.revision += 1
        if name in ("prior", "own_precision", "energy_function", "precision", "energy"):
            # Past nn.Module, which would take a parameter, buffer or module under that name as it is.
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the node's value, the batch axis left out."""
        return self._shape

    @property
    def deterministic(self) -> bool:
        """Whether the node has no latent of its own, v_n ≡ u_n."""
        return self._deterministic

    @deterministic.setter
    def deterministic(self, deterministic: bool) -> None:
        if deterministic and self.prior is not None:
            raise GraphError(f"node {self.name!r}: a deterministic node has no energy for a prior to enter; drop one")
        if deterministic and self.constant is not None:
            raise GraphError(
                f"node {self.name!r}: a deterministic node has no value of its own to be constant; drop one"
            )
        if deterministic and self.network.closes_deterministic_cycle(self):
            raise GraphError(
                f"node {self.name!r}: made deterministic it would close a cycle of deterministic nodes only, whose "
                "values have no solution to start from; leave it latent"
            )
        if deterministic and self.integers is not None:
            raise GraphError(
                f"node {self.name!r}: holds integers, since its edges read such, and nothing predicts integers; leave "
                "it as it is"
            )
        self._deterministic = bool(deterministic)
        self.network.revision += 1

    @property
    def energy_function(self) -> Energy:
        """The energy, before precision and weight."""
        return self._energy_function

    @energy_function.setter
    def energy_function(self, energy: Energy | None) -> None:
        energy = Gaussian() if energy is None else energy
        own = self.own_precision
        checks.energy(self, energy, per_unit=isinstance(own, Tensor) and own.dim() > 0)
        if self.log_precision is not None:
            self._check_normalised(energy)
        self._modules.pop("energy_function", None)
        if isinstance(energy, nn.Module):
            self._modules["energy_function"] = energy  # so that its parameters are the node's
        object.__setattr__(self, "_energy_function", energy)
        self.network.revision += 1

    def _check_normalised(self, energy: Energy) -> None:
        if not energy.normalised:
            raise GraphError(
                f"node {self.name!r}: a learned precision was asked for together with {type(energy).__name__}, which "
                "has no log-likelihood in its precision; use the Gaussian energy, or give the precision"
            )

    @property
    def own_precision(self) -> Tensor | float:
        """The node's own precision, which the schedule multiplies: a number, 0-d or (*shape).

        Given as a number, a tensor, or :class:`LearnedPrecision`; where it is learned, it is read as the exponential
        of the parameter ``log_precision``.
        """
        if self.log_precision is not None:
            return self.log_precision.exp()
        given = self._buffers.get("own_precision")
        return self._number if given is None else given

    @own_precision.setter
    def own_precision(self, precision: float | Tensor | LearnedPrecision) -> None:
        if isinstance(precision, LearnedPrecision):
            self._check_normalised(self._energy_function)
            checks.energy(self, self._energy_function, per_unit=precision.per_unit)
            sizes = self.shape if precision.per_unit else ()
            start = torch.full(sizes, math.log(precision.initial), device=self.device)
            self._buffers.pop("own_precision", None)
            self._number, self.log_precision = 1.0, nn.Parameter(start)
            self.network.revision += 1
            return
        if isinstance(precision, nn.Parameter):
            raise GraphError(
                f"node {self.name!r}: precision given as a parameter, which would not learn as one; give "
                "LearnedPrecision(), whose logarithm does, or the parameter's detach()"
            )
        if isinstance(precision, Tensor):
            if precision.shape not in (torch.Size(()), torch.Size(self.shape)):
                raise GraphError(
                    f"node {self.name!r}: precision of shape {tuple(precision.shape)} given, expected one number or "
                    f"one per unit, {self.shape}"
                )
            if not bool((torch.isfinite(precision) & (precision >= 0)).all()):
                raise GraphError(f"node {self.name!r}: a precision is negative or not finite; give at least 0")
            checks.energy(self, self._energy_function, per_unit=precision.dim() > 0)
            self._buffers["own_precision"] = precision.detach().clone().to(self.device)
        elif not is_number(precision) or precision < 0:
            raise GraphError(
                f"node {self.name!r}: precision {precision!r} given, expected a finite number of at least 0"
            )
        else:
            self._buffers.pop("own_precision", None)
            self._number = float(precision)
        self.log_precision = None
        self.network.revision += 1

    @property
    def prior(self) -> Tensor | None:
        """What predicts a root, 0-d or (*shape); None where nothing but edges does. A parameter is learned."""
        learned = self._parameters.get("prior")
        return self._buffers.get("prior") if learned is None else learned

    @prior.setter
    def prior(self, prior: object) -> None:
        checked = checks.prior(self, prior)
        self._parameters.pop("prior", None)
        self._buffers.pop("prior", None)
        if isinstance(checked, nn.Parameter):
            self._parameters["prior"] = checked
        elif checked is not None:
            self._buffers["prior"] = checked
        self.network.revision += 1

    def convert_own(self, dtype: torch.dtype, device: torch.device | None) -> None:
        """Bring precision and prior, where they are tensors, to the dtype of the network's modules and where they lie.

        They may have been given before there were any, or since these were converted.
        """
        for name in ("own_precision", "prior"):
            given = self._buffers.get(name)
            if given is not None:
                self._buffers[name] = given.to(device, dtype)
        if self.log_precision is not None:
            self.log_precision.data = self.log_precision.data.to(device, dtype)

    @property
    def energy_weight(self) -> float:
        """w_n, the fixed factor on the energy; one that is set anew holds from the next run on."""
        return self._energy_weight

    @energy_weight.setter
    def energy_weight(self, weight: float) -> None:
        if not is_number(weight) or weight < 0:
            raise GraphError(
                f"node {self.name!r}: energy_weight {weight!r} given, expected a finite number of at least 0"
            )
        self._energy_weight = float(weight)
        self.network.revision += 1

    @property
    def constant(self) -> float | None:
        """What all units are clamped to in every run that gives the node no clamp; None where they are free."""
        return self._constant

    @constant.setter
    def constant(self, constant: float | None) -> None:
        if constant is not None and not is_number(constant):
            raise GraphError(f"node {self.name!r}: constant {constant!r} given, expected a finite number, or None")
        if constant is not None and self.deterministic:
            raise GraphError(
                f"node {self.name!r}: a deterministic node has no value of its own to be constant; drop one"
            )
        self._constant = None if constant is None else float(constant)
        self.network.revision += 1

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
    def integers(self) -> int | None:
        """How many integers, from 0 on, the value may hold, where the edges out of this node read such
        (``nn.Embedding``, and what has its ``num_embeddings``); None of a node that holds numbers, as all others do.

        A node of integers is a root, and always clamped.
        """
        found = (integers_taken(edge.module) for edge in self.outgoing)
        return min((count for count in found if count is not None), default=None)

    @property
    def trainable(self) -> list[nn.Parameter]:
        """Parameters that make this node's prediction or weigh its error: of its incoming edges, and its own."""
        found = [parameter for edge in self.incoming for parameter in edge.parameters()] + list(self.parameters())
        return [parameter for parameter in dict.fromkeys(found) if parameter.requires_grad]

    def predict(self, contributions: Sequence[Tensor], seed: int | None = None, *, hold: bool = True) -> Tensor:
        """u_n = g_n(combine(a_e over incoming e)) (SPEC §1).

        Args:
            contributions: one per incoming edge, in order, each (batch, ...).
            seed: what the modules' random draws (dropout, say) start from; None leaves them to the random state.
            hold: leave buffers that move with every evaluation where they are.

        Returns:
            The prediction of this node's value, (batch, *shape).
        """
        with self._drawing(seed, contributions[0].device):
            return self._call(self.transfer, [self._call(self.combine, contributions, hold)], hold)

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
        """π_n at the last inference step, 0-d, (*shape), or (batch, ...) where it was given with the clamps.

        Setting it sets ``own_precision``, for the runs that follow.
        """
        return self._reader().precision(self)

    @precision.setter
    def precision(self, precision: float | Tensor | LearnedPrecision) -> None:
        self.own_precision = precision

    @property
    def energy(self) -> Tensor:
        """E_n before precision and weight, per sample, (batch,); zero where nothing predicts the node.

        Setting it sets ``energy_function``, for the runs that follow.
        """
        return self._reader().energy(self)

    @energy.setter
    def energy(self, energy: Energy | None) -> None:
        self.energy_function = energy

    def __repr__(self) -> str:
        kind = "deterministic" if self.deterministic else "latent"
        return f"Node({self.name!r}, shape={self.shape}, {kind})"
