"""Can predictive coding train a transformer? Images cut into patches, which attend to each other.

Queries, keys, values, what is attended to, and the layer after it are latents of an encoder for images
(``pcsim.topologies.transformer``), with deterministic sums where its skips end. A skip around attention is two latent
hops shorter than the way through it: without auxiliary neurons (``pcsim.balance_paths``) errors come too early, and the
updates of a block have little to do with backprop's. The picture shows the test accuracy over training, and the cosine
between every edge's update and backprop's, before training, without and with auxiliary neurons.

    python examples/gallery/attention.py --plot attention.png
    python examples/gallery/attention.py --blocks 6
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
from shared.script import command_line, draw_accuracy, save
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

import pcsim
from pcsim import diagnosis, plots
from pcsim.data import ImageData

RATE, PLAIN_RATE = 0.8, 0.1
SPIKING = pcsim.Spiking(alpha=0.0)
METHODS: dict[str, tuple[pcsim.PrecisionSchedule, pcsim.LearningRule]] = {
    "backprop": (pcsim.Constant(), pcsim.Backprop()),
    "arrival": (pcsim.Spiking.for_rate(RATE), pcsim.ArrivalUpdate()),
    "spiking + FU": (SPIKING, pcsim.ForwardUpdate()),
    "plain PC": (pcsim.Constant(), pcsim.SettledUpdate()),
}


def simulator(method: str, options: argparse.Namespace, *, balanced: bool = True) -> pcsim.Simulator:
    """A fresh encoder with the rules of a method."""
    precision, rule = METHODS[method]
    torch.manual_seed(options.seed)
    net = pcsim.topologies.transformer(
        image=(1, 8, 8), patch=2, classes=10, width=options.width, heads=4, blocks=options.blocks
    )
    steps = max(net.levels().values())
    if isinstance(precision, pcsim.Spiking) and balanced:
        net = pcsim.balance_paths(net, RATE, peak=precision.peak)
    rate = RATE if isinstance(precision, pcsim.Spiking) else PLAIN_RATE
    return pcsim.Simulator(net, pcsim.Relaxation(steps, rate, precision=precision), rule)


def accuracies(method: str, data: tuple[ImageData, ImageData], options: argparse.Namespace) -> list[float]:
    """Test accuracy after each epoch; it chooses nothing."""
    sim = simulator(method, options)
    optimizer = AdamW(sim.network.parameters(), lr=2e-3, weight_decay=1e-4)
    trainer = pcsim.Trainer(sim, optimizer, metrics=[pcsim.Accuracy()], progress=False, seed=options.seed)
    train, test = (TensorDataset(part.images.view(-1, 1, 8, 8), part.labels) for part in data)
    history = trainer.fit(
        DataLoader(train, 64, shuffle=True), epochs=options.epochs, validation=DataLoader(test, len(test))
    )
    return [record.validation["accuracy"] for record in history.records]


def in_blocks(similarity: dict[str, float]) -> list[float]:
    """Cosines of the edges that lead to a block's latents; 0 where no error arrived."""
    ends = ("query", "key", "value", "mlp")
    found = (cosine for edge, cosine in similarity.items() if edge.split("->")[-1].startswith(ends))
    return [0.0 if math.isnan(cosine) else cosine for cosine in found]


def draw(
    curves: dict[str, list[float]], similarities: dict[str, dict[str, float]], options: argparse.Namespace
) -> None:
    """Accuracy over epochs, and the similarity of each edge's update to backprop's."""
    figure = plots.new_figure(11, 8)
    above, below = figure.subfigures(2, height_ratios=[1, 1.3])
    draw_accuracy(curves, above)
    plots.similarity_by_edge(similarities, figure=below)
    save(figure, options.plot)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train by each method from the same weights, tell, and draw."""
    parser = command_line(__file__, __doc__, epochs=5)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    data = pcsim.data.standardise(*pcsim.data.digits())
    few = {"input": data[0].images[:256].view(-1, 1, 8, 8), "output": data[0].one_hot()[:256]}
    print(f"A transformer of {options.blocks} blocks on digits cut into 16 patches, {options.epochs} epochs")
    similarities = {}
    for title, balanced in (("without auxiliary neurons", False), ("with auxiliary neurons", True)):
        similarities[title] = diagnosis.update_similarity(simulator("spiking + FU", options, balanced=balanced), few)
        cosines = in_blocks(similarities[title])
        print(f"{title:26} cosines with backprop's updates {min(cosines):.2f} to {max(cosines):.2f}", flush=True)
    curves = {}
    for method in METHODS:
        curves[method] = accuracies(method, data, options)
        print(f"{method:26} test accuracy {curves[method][-1]:.3f}", flush=True)
    draw(curves, similarities, options)


if __name__ == "__main__":
    main()
