"""What nodes and edges have in common: a name in a network, and modules that are evaluated again and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from pcsim.errors import GraphError
from pcsim.graph.probing import held_draw, on_copies

if TYPE_CHECKING:
    from pcsim.graph.network import Network


class Part(nn.Module):
    """Base class of nodes and edges.

    A relaxation evaluates the same modules many times on one batch. What they draw is drawn once per batch, and what
    they keep moves once per batch.
    """

    kind: ClassVar[str]
    renamed: ClassVar[dict[str, str]] = {}
    """Present names by earlier ones."""

    def __init__(self, network: Network, name: str) -> None:
        super().__init__()
        # Past nn.Module's own __setattr__, which would make the network a child of its part.
        object.__setattr__(self, "_network", network)
        self._name = name
        self.stochastic = False
        """Whether the modules may draw random numbers."""
        self.moves = False
        """Whether the modules' buffers move when they are evaluated (those of torch's normalisation aside)."""
        self.reentrant = False
        """Whether the modules checkpoint reentrantly, so that no local gradients can be asked for."""
        self.looked_at: tuple[int, ...] = ()
        """The modules for which this was found."""

    @property
    def name(self) -> str:
        """Unique among the network's nodes, or edges."""
        return self._name

    @property
    def network(self) -> Network:
        """The network that this part belongs to."""
        network: Network = object.__getattribute__(self, "_network")
        return network

    @property
    def device(self) -> torch.device | None:
        """Where :meth:`Network.place` has put the node, or the edge with its target; None where it has not."""
        where = self._buffers.get("where")
        return None if where is None else where.device

    def lie_on(self, device: torch.device) -> None:
        """Go to a device, to be computed there."""
        # A buffer goes wherever the part is moved; one of booleans tells nothing of the part's dtype.
        self.register_buffer("where", torch.empty(0, dtype=torch.bool), persistent=False)
        self.to(device)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.renamed:
            raise AttributeError(f"{self.kind} {self._name!r}: {name} is called {self.renamed[name]}")
        reading = getattr(type(self), name, None)
        if isinstance(reading, property) and reading.fset is None:
            raise AttributeError(f"{self.kind} {self._name!r}: {name} is read, and cannot be set")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        child = self.__dict__.get("_modules", {}).get(name)
        if child is not None:  # a look-up that a large graph makes a hundred thousand times
            return child
        if name in self.renamed:
            raise AttributeError(f"{self.kind}: {name} is called {self.renamed[name]}")
        return super().__getattr__(name)

    @contextmanager
    def _drawing(self, seed: int | None, device: torch.device) -> Iterator[None]:
        if self.stochastic and seed is not None:
            with held_draw(seed, f"{self.kind} {self._name}", device):
                yield
        else:
            yield

    def _call(self, module: nn.Module, inputs: Sequence[Tensor], hold: bool) -> Tensor:
        output: Tensor = on_copies(module, inputs) if hold and self.moves else module(*inputs)
        return output

    def forward(self, *_: object, **__: object) -> NoReturn:
        """Refused: a part is evaluated by a simulator."""
        raise GraphError(f"{self.kind} {self._name!r} is not called itself; call its modules, or run a Simulator")

    def _refuse_hook(self, *_: object, **__: object) -> NoReturn:
        raise GraphError(
            f"{self.kind} {self._name!r} is not called itself, so a hook on it would never run; set it on its module"
        )

    register_forward_hook = _refuse_hook
    register_forward_pre_hook = _refuse_hook
    register_full_backward_hook = _refuse_hook
    register_full_backward_pre_hook = _refuse_hook
    register_backward_hook = _refuse_hook
