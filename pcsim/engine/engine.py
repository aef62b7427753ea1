"""What can be asked of an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from pcsim.engine.problem import Batch, Gradients, State, Task
from pcsim.errors import StateError
from pcsim.graph.network import Network

if TYPE_CHECKING:
    from pcsim.engine.batched.program import Program
    from pcsim.engine.planning.plan import Plan


class Engine(ABC):
    """Base class of engines: one network, any number of tasks and batches on it."""

    name: ClassVar[str]
    reads_late: ClassVar[bool] = False
    """Whether it reads what is unread of a batch's clamps itself, together with whether values are finite."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.shown: State | None = None
        """The state that nodes and edges show; no later run may touch its tensors before another takes its place."""

    @abstractmethod
    def predict(self, task: Task, batch: Batch) -> dict[str, Tensor]:
        """Values after the feed-forward start alone (SPEC §2, Start), by node name, in tensors of the caller's own."""

    @abstractmethod
    def relax(
        self,
        task: Task,
        batch: Batch,
        learn: Callable[[Gradients], None] | None = None,
    ) -> State:
        """Start feed-forward, then take T inference steps (SPEC §2).

        Args:
            task: what to relax.
            batch: on what.
            learn: called after every inference step with the gradients of F_t at the state before it (SPEC §4,
                incremental) where the task learns each step; None elsewhere.

        Raises:
            DivergenceError: a latent became NaN or infinite.
            ClampError: what is unread of the clamps is.
        """

    @abstractmethod
    def gradients(self, state: State) -> Gradients:
        """Gradients of the task's learning rule at a relaxed state (SPEC §4), in tensors of the caller's own."""

    @abstractmethod
    def update_statistics(self, state: State) -> None:
        """Let modules with running statistics take the batch in: once, at the weight update (Eq. 6)."""

    def plan(self, state: State) -> Plan:
        """The plan by which a state was computed; StateError where the engine has none."""
        raise StateError(f"the {self.name} engine computes everything at every step, without a plan; use 'batched'")

    def program(self, state: State) -> Program:
        """The operations that computed a state; StateError where the engine has none."""
        raise StateError(f"the {self.name} engine runs no program; use 'batched'")
