"""Training steps of pcsim's engines."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn, optim

import pcsim
from benchmarks.contender import BATCHED, COMPILED_STEPS, CPU, GRAPHS, REFERENCE, Local
from benchmarks.full_width import topology_and_data
from benchmarks.plain import activations
from benchmarks.variants import MULTIPLIER_RATE, Variant
from benchmarks.workloads import WEIGHT_RATE, Chain, Graph, Problem, Topology, Workload, make_problem

ENGINES: dict[str, str | Callable[[pcsim.Network], pcsim.Engine]] = {
    BATCHED: "batched",
    REFERENCE: "reference",
    GRAPHS: partial(pcsim.BatchedEngine, cuda_graphs=True),
    COMPILED_STEPS: partial(pcsim.BatchedEngine, compiled=True),
}
RULES: dict[str, Callable[[], pcsim.LearningRule]] = {
    "settled": pcsim.SettledUpdate,
    "forward": pcsim.ForwardUpdate,
    "arrival": pcsim.ArrivalUpdate,
    "incremental": pcsim.IncrementalUpdate,
    "backprop": pcsim.Backprop,
}


def chain_network(chain: Chain, problem: Problem, latents: str = "outputs") -> pcsim.Network:
    """Nodes "input", "layer1", ..., "output"; the linear map or convolution is the edge, the rest the transfer, or,
    where latents are inputs of activations, part of the next edge.
    """
    network = pcsim.Network()
    previous = network.add_node("input", chain.shape)
    activation = activations[chain.activation]
    shapes = chain.latent_shapes()
    for place, (shape, weight) in enumerate(zip(shapes, problem.weights, strict=True), start=1):
        last = place == chain.depth
        transfer: nn.Module | None = None if last else activation()
        mapping: nn.Conv2d | nn.Linear
        if weight.ndim == 4:
            mapping = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
            transfer = nn.Sequential(activation(), nn.MaxPool2d(2))
        else:
            mapping = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            mapping.weight.copy_(torch.from_numpy(weight))
            nn.init.zeros_(cast(nn.Parameter, mapping.bias))
        flat = weight.ndim == 2 and len(previous.shape) == 3
        if latents == "inputs":
            transfer, before = None, [activation()] if place > 1 else []
        else:
            before = [nn.Flatten()] if flat else []
        node = network.add_node("output" if last else f"layer{place}", shape, transfer=transfer)
        network.add_edge(previous, node, nn.Sequential(*before, mapping) if before else mapping)
        previous = node
    return network


def graph_network(graph: Graph) -> pcsim.Network:
    """Tanh nodes "0", "1", ... and linear edges."""
    torch.manual_seed(0)
    network = pcsim.Network()
    for place in range(graph.nodes):
        network.add_node(str(place), (graph.width,), transfer=nn.Tanh())
    for source, target in graph.ends():
        network.add_edge(str(source), str(target), nn.Linear(graph.width, graph.width))
    return network


def network_and_clamps(
    workload: Workload, device: torch.device = CPU, latents: str = "outputs"
) -> tuple[pcsim.Network, dict[str, Tensor]]:
    """A workload's network, and what is given of it."""
    if isinstance(workload, Topology):
        network, inputs, targets = topology_and_data(workload, device)
        return network, {"input": inputs, "output": targets}
    if isinstance(workload, Chain):
        problem = make_problem(workload)
        network = chain_network(workload, problem, latents)
        clamps = {"input": torch.from_numpy(problem.inputs), "output": torch.from_numpy(problem.targets)}
    else:
        network = graph_network(workload)
        ends = dict.fromkeys([*network.roots(), *network.sinks()])
        clamps = {node.name: torch.randn(workload.batch, workload.width) for node in ends}
    return network.to(device), {name: value.to(device) for name, value in clamps.items()}


def simulator(
    network: pcsim.Network, workload: Workload, variant: Variant, engine: str | Callable[..., pcsim.Engine]
) -> pcsim.Simulator:
    """What trains the network of a workload."""
    precision: pcsim.PrecisionSchedule = pcsim.Constant()
    if variant.alpha is not None:
        precision = pcsim.Spiking(alpha=variant.alpha, peak=variant.peak(workload))
    steps, rate = variant.steps(workload), variant.rate(workload)
    relaxation = pcsim.Relaxation(
        steps, rate, precision=precision, multipliers=MULTIPLIER_RATE if variant.relaxed == "multipliers" else 0.0
    )
    if variant.relaxed == "errors":
        relaxation = pcsim.ErrorRelaxation(steps, rate)
    if isinstance(workload, Topology) and variant.alpha is not None:
        network = pcsim.balance_paths(network, rate, peak=variant.peak(workload))
    return pcsim.Simulator(network, relaxation, RULES[variant.rule](), engine=engine)


def simulated(workload: Workload, variant: Variant, implementation: str = BATCHED, device: torch.device = CPU) -> Local:
    """A training step of one of pcsim's engines."""
    network, clamps = network_and_clamps(workload, device, variant.latents)
    sim = simulator(network, workload, variant, ENGINES[implementation])
    adam = optim.Adam(sim.network.parameters(), lr=WEIGHT_RATE, fused=True)

    def train() -> None:
        sim.update(clamps, adam)

    def error() -> float:
        outputs = sim.predict({"input": clamps["input"]})["output"]
        return 0.5 * float((outputs - clamps["output"]).double().square().sum()) / len(outputs)

    judged = None if isinstance(workload, Graph) else error
    return Local(variant.name, implementation, train, judged, device=device)
