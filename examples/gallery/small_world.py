"""Does a network without layers learn? A random small-world graph between image and digit.

Watts and Strogatz's graph (1998) is a ring in which each node knows its next neighbours, with some edges rewired to
distant ones: paths become short while neighbourhoods stay. Each of its nodes becomes a population of tanh units, each
edge a linear map from the lower to the higher number; nodes that nothing predicts read the image, and those that
predict nothing predict the digit. The same graph learns by plain predictive coding, by spiking precision with forward
updates (arXiv 2506.23800) without and with auxiliary neurons, and by backprop.

    python examples/gallery/small_world.py --plot small_world.png
    python examples/gallery/small_world.py --nodes 30 --rewired 0.5 --seed 3
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import networkx as nx
import torch
from shared.script import command_line, save
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

import pcsim
from pcsim import plots
from pcsim.data import ImageData

SPIKING = pcsim.Spiking(alpha=0.0)
METHODS: dict[str, tuple[float, pcsim.PrecisionSchedule, pcsim.LearningRule, bool]] = {
    "PC": (0.2, pcsim.Constant(), pcsim.SettledUpdate(), False),  # a rate of 0.5 does not descend here
    "spiking + FU": (0.5, SPIKING, pcsim.ForwardUpdate(), False),
    "spiking + FU, auxiliary": (0.5, SPIKING, pcsim.ForwardUpdate(), True),
    "backprop": (0.5, pcsim.Constant(), pcsim.Backprop(), False),  # which relaxes nothing
}


def network(graph: nx.Graph, width: int) -> pcsim.Network:
    """A predictive coding network of the graph, its edges directed from the lower to the higher number."""
    directed = nx.DiGraph(sorted((min(ends), max(ends)) for ends in graph.edges))
    net = pcsim.Network()
    net.add_node("image", (64,))
    for number in graph:
        net.add_node(str(number), (width,), transfer=nn.Tanh())
    net.add_node("digit", (10,))
    ends = [("image", str(number)) for number, before in directed.in_degree if not before]
    ends += [(str(source), str(target)) for source, target in directed.edges]
    ends += [(str(number), "digit") for number, after in directed.out_degree if not after]
    for source, target in ends:
        linear = nn.Linear(net[source].shape[0], net[target].shape[0])
        # Over all of a node's inputs, so that activity keeps its scale whatever the degree.
        inputs = sum(net[other].shape[0] for other, end in ends if end == target)
        nn.init.normal_(linear.weight, std=inputs**-0.5)
        nn.init.zeros_(linear.bias)
        net.add_edge(source, target, linear)
    return net


def accuracy(method: str, graph: nx.Graph, data: tuple[ImageData, ImageData], options: argparse.Namespace) -> float:
    """Test accuracy after training the graph with one method, from the same weights."""
    rate, precision, rule, balanced = METHODS[method]
    torch.manual_seed(options.seed)
    net = network(graph, options.width)
    steps = max(net.levels().values()) + 1
    if balanced:
        net = pcsim.balance_paths(net, rate)
    sim = pcsim.Simulator(net, pcsim.Relaxation(steps, rate, precision=precision), rule)
    optimizer = AdamW(net.parameters(), lr=1e-3, weight_decay=1e-4)
    trainer = pcsim.Trainer(sim, optimizer, inputs="image", target="digit", progress=False, seed=options.seed)
    trainer.fit(DataLoader(data[0].dataset(), 64, shuffle=True), epochs=options.epochs)
    return trainer.evaluate(DataLoader(data[1].dataset(), len(data[1])))["accuracy"]


def draw(graph: nx.Graph, accuracies: dict[str, float], options: argparse.Namespace) -> None:
    """The ring with its shortcuts, coloured by level, and the accuracies."""
    net = network(graph, options.width)
    levels, drawn = net.levels(), net.to_networkx()
    places = {str(number): place for number, place in nx.circular_layout(sorted(graph)).items()}
    places |= {"image": (1.5, 0.35), "digit": (1.5, -0.35)}
    figure = plots.new_figure(10, 5)
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    colours = [levels[name] for name in drawn]
    look = {"vmin": -max(colours) / 3, "cmap": "viridis_r", "node_size": 520, "edge_color": "#888888", "arrowsize": 8}
    nx.draw_networkx(nx.DiGraph(drawn), places, ax=left, node_color=colours, font_size=7, font_color="white", **look)
    left.set_title(f"dark: far from the digit, {max(levels.values())} hops at most")
    left.set(aspect="equal", frame_on=False)
    left.margins(0.1)
    bars = right.barh(list(accuracies), list(accuracies.values()), color=[colour for colour, *_ in plots.LINES[1:5]])
    right.bar_label(bars, fmt="%.3f", padding=-32, color="white")
    right.set(xlabel="test accuracy", xlim=(0, 1))
    right.invert_yaxis()
    save(figure, options.plot)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the graph, train it by each method, tell, and draw."""
    parser = command_line(__file__, __doc__, epochs=8)
    parser.add_argument("--nodes", type=int, default=20, help="of the ring")
    parser.add_argument("--neighbours", type=int, default=4, help="of each node of the ring, an even number")
    parser.add_argument("--rewired", type=float, default=0.4, help="share of the edges, 0 to 1")
    parser.add_argument("--width", type=int, default=32, help="units of each node")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    graph = nx.connected_watts_strogatz_graph(options.nodes, options.neighbours, options.rewired, seed=options.seed)
    path, clustering = nx.average_shortest_path_length(graph), nx.average_clustering(graph)
    print(
        f"{graph.number_of_edges()} edges among {len(graph)} nodes, mean path {path:.2f}, clustering {clustering:.2f}"
    )
    data, accuracies = pcsim.data.digits(), {}
    for method in METHODS:
        accuracies[method] = accuracy(method, graph, data, options)
        print(f"{method:24} test accuracy {accuracies[method]:.3f}", flush=True)
    draw(graph, accuracies, options)


if __name__ == "__main__":
    main()
