"""The workloads: networks, data and settings, as plain arrays, so that every library is given the same.

Only NumPy is needed here, since a peer's process may run in an interpreter without PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float32]
RATE = 0.1
"""Of the latents, where precision is constant."""
SPIKING_RATE = 0.5
"""Of the latents, where precision spikes; below 1, where the forward rule has nothing to learn from (SPEC §3)."""
DEEP_SPIKING_RATE = 0.95
"""The same in W5: an error is scaled by the rate at each layer, and should remain a normal number for 1,000."""
GRAPH_RATE = 0.05
"""Of the latents in random graphs, some nodes of which predict many others."""
WEIGHT_RATE = 1e-3
"""Of Adam."""
DEPTH_OF_BLOCKS = 3
"""Hops through a block of a transformer; two more lead into the first and out of the last."""


@dataclass(frozen=True)
class Chain:
    """Layers in a row, supervised: the input clamped at one end, the target at the other.

    Weights are N(0, gain² / fan_in) and biases zero; inputs N(0, 1), targets one-hot.

    Args:
        name: what tables call it.
        shape: of the input, batch axis left out.
        channels: output channels of the 3x3 convolutions, each followed by the activation and 2x2 max-pooling.
        units: outputs of the linear layers after them, each but the last followed by the activation.
        activation: the nonlinearity.
        batch: samples.
        steps: T with constant precision.
        spiking_rate: of the latents with spiking precision.
        warm_up: training steps before timing starts.
        gains: of all layers but the last, and of the last.
    """

    name: str
    shape: tuple[int, ...]
    units: tuple[int, ...]
    batch: int
    steps: int
    channels: tuple[int, ...] = ()
    activation: Literal["tanh", "gelu", "relu", "sigmoid"] = "tanh"
    spiking_rate: float = SPIKING_RATE
    warm_up: int = 5
    gains: tuple[float, float] = (1.0, 1.0)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.channels) + len(self.units)

    def weight_shapes(self) -> list[tuple[int, ...]]:
        """(out, in, 3, 3) of each convolution, (out, in) of each linear layer."""
        shapes: list[tuple[int, ...]] = []
        place = self.shape
        for out in self.channels:
            shapes.append((out, place[0], 3, 3))
            place = (out, place[1] // 2, place[2] // 2)
        features = int(np.prod(place))
        for out in self.units:
            shapes.append((out, features))
            features = out
        return shapes

    def latent_shapes(self) -> list[tuple[int, ...]]:
        """Shape of the value that each layer predicts, batch axis left out."""
        _, height, width = self.shape if self.channels else (0, 0, 0)
        images = [(out, height >> place, width >> place) for place, out in enumerate(self.channels, start=1)]
        return [*images, *((out,) for out in self.units)]


@dataclass(frozen=True)
class Graph:
    """A random directed graph without cycles of tanh nodes and linear edges, all roots and sinks clamped.

    Weights are U(±1/√width), PyTorch's default; what is clamped is N(0, 1).

    Args:
        name: what tables call it.
        nodes: how many.
        edges: how many; parallel ones may occur.
        width: units of every node.
        batch: samples.
        steps: T.
        warm_up: training steps before timing starts.
    """

    name: str
    nodes: int
    edges: int
    width: int = 16
    batch: int = 32
    steps: int = 20
    warm_up: int = 3

    def ends(self) -> list[tuple[int, int]]:
        """Source and target of each edge; the source comes first in the order of nodes."""
        generator = np.random.default_rng(0)
        one = generator.integers(0, self.nodes, self.edges)
        other = (one + generator.integers(1, self.nodes, self.edges)) % self.nodes
        pairs = zip(np.minimum(one, other).tolist(), np.maximum(one, other).tolist(), strict=True)
        return sorted(pairs, key=lambda pair: pair[1])


@dataclass(frozen=True)
class Topology:
    """A classifier of images of ``pcsim.topologies``, supervised; its paths are balanced where precision spikes.

    Inputs are N(0, 1), targets one-hot; weights start as the library makes them.

    Args:
        name: what tables call it.
        design: of ``topologies.vgg`` or ``topologies.resnet``, or ``"transformer"``.
        depth: hops from the input to the output, of the longest path.
        width: factor on all channels; units at each position of a transformer.
        image: channels, height and width.
        batch: samples.
        warm_up: training steps before timing starts.
    """

    name: str
    design: str
    depth: int
    width: float = 1.0
    image: tuple[int, int, int] = (3, 32, 32)
    batch: int = 128
    classes: int = 10
    spiking_rate: float = SPIKING_RATE
    warm_up: int = 5

    @property
    def steps(self) -> int:
        """T with constant precision."""
        return self.depth


Workload: TypeAlias = Chain | Graph | Topology


@dataclass(frozen=True)
class Problem:
    """What one chain is trained on.

    Args:
        inputs: (batch, *shape).
        targets: (batch, classes), one-hot.
        weights: one per layer; biases are zero.
    """

    inputs: Array
    targets: Array
    weights: list[Array] = field(default_factory=list)

    def half_squared_error(self, outputs: npt.ArrayLike) -> float:
        """½‖target − output‖², a mean over samples."""
        difference = np.asarray(outputs, np.float64) - self.targets
        return float(0.5 * (difference**2).sum() / len(self.targets))


def make_problem(chain: Chain) -> Problem:
    """Data and initial weights; the same at every call."""
    generator = np.random.default_rng(0)
    inputs = generator.standard_normal((chain.batch, *chain.shape)).astype(np.float32)
    shapes = chain.weight_shapes()
    weights = []
    for place, shape in enumerate(shapes):
        scale = chain.gains[place == len(shapes) - 1] / np.sqrt(np.prod(shape[1:]))
        weights.append((scale * generator.standard_normal(shape)).astype(np.float32))
    classes = chain.units[-1]
    targets = np.eye(classes, dtype=np.float32)[generator.integers(0, classes, chain.batch)]
    return Problem(inputs, targets, weights)


def deep_chain(depth: int, width: int = 64) -> Chain:
    """The chain of W5, of any depth."""
    return Chain("W5", (width,), (width,) * depth, 32, depth, spiking_rate=DEEP_SPIKING_RATE, warm_up=3)


def random_graph(nodes: int, width: int = 16) -> Graph:
    """The graph of W4, of any number of nodes: five edges per node."""
    return Graph("W4", nodes, 5 * nodes, width)


IMAGE = (3, 32, 32)
WORKLOADS: dict[str, Workload] = {
    "W1": Chain("W1", (784,), (256, 256, 10), 128, 20),
    "W1r": Chain("W1r", (784,), (256, 256, 10), 128, 20, activation="relu"),
    "W2": Chain("W2", (784,), (128,) * 30 + (10,), 128, 31),
    "W3": Chain("W3", IMAGE, (10,), 64, 8, (32, 64, 128, 128), "gelu", gains=(1.2, 0.5)),
    "W4": random_graph(10_000),
    "W5": deep_chain(1000),
    "W6": Chain("W6", (784,), (512, 512, 10), 250, 20, activation="sigmoid"),
    "W7": Chain("W7", (64,), (32, 32, 10), 1, 64, activation="sigmoid"),
    "W8": Topology("W8", "transformer", DEPTH_OF_BLOCKS * 3 + 2, 32, (1, 8, 8), 64),
}
SMALL_WORKLOADS: dict[str, Workload] = {
    "W1": Chain("W1", (12,), (8, 8, 4), 6, 4, warm_up=2),
    "W1r": Chain("W1r", (12,), (8, 8, 4), 6, 4, activation="relu", warm_up=2),
    "W2": Chain("W2", (12,), (8,) * 5 + (4,), 6, 6, warm_up=2),
    "W3": Chain("W3", (3, 8, 8), (4,), 4, 3, (4, 6), "gelu", warm_up=2, gains=(1.2, 0.5)),
    "W4": random_graph(40, 4),
    "W5": deep_chain(12, 4),
    "W6": Chain("W6", (12,), (8, 8, 4), 6, 4, activation="sigmoid", warm_up=2),
    "W7": Chain("W7", (6,), (5, 5, 4), 1, 5, activation="sigmoid", warm_up=2),
    "W8": Topology("W8", "transformer", DEPTH_OF_BLOCKS + 2, 8, (1, 4, 4), 4, warm_up=2),
}
"""Stand-ins that take no time: they show that everything runs, and nothing else."""
FULL_WIDTH: dict[str, Workload] = {
    "VGG10": Topology("VGG10", "VGG10", 10),
    "ResNet18": Topology("ResNet18", "ResNet18", 18),
}
"""Networks that only a GPU trains in the time there is: ``benchmarks/device.sh``."""
SMALL_FULL_WIDTH: dict[str, Workload] = {
    "VGG10": Topology("VGG10", "VGG5", 5, 1 / 32, batch=4, warm_up=2),
    "ResNet18": Topology("ResNet18", "ResNet10", 10, 1 / 32, (3, 8, 8), batch=4, warm_up=2),
}
DEPTHS, NODES = (10, 30, 100, 300, 1000), (100, 300, 1000, 3000, 10_000)
SMALL_DEPTHS, SMALL_NODES = (3, 6), (20, 40)


def workloads(small: bool, names: Sequence[str] = tuple(WORKLOADS)) -> list[Workload]:
    """The named workloads, or their stand-ins."""
    known = {**SMALL_WORKLOADS, **SMALL_FULL_WIDTH} if small else {**WORKLOADS, **FULL_WIDTH}
    return [known[name] for name in names]
