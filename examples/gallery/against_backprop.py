"""How far is predictive coding from backprop on the same graph? Accuracies, and each edge's update beside backprop's.

One network with a skip from the first hidden layer to the last learns by backprop; by plain predictive coding, with as
many inference steps as it has levels and with more; and by spiking precision with forward updates and auxiliary neurons
on the skip (arXiv 2506.23800). The picture shows the accuracies, and the cosine between every edge's update and that of
backprop from the same weights (``pcsim.diagnosis.update_similarity``), before and after training.

    python examples/gallery/against_backprop.py --plot against_backprop.png
    python examples/gallery/against_backprop.py --hidden 8
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from shared.script import command_line, draw_accuracy, save
from torch.optim import AdamW
from torch.utils.data import DataLoader

import pcsim
from pcsim import diagnosis, plots

SPIKING = pcsim.Spiking(alpha=0.0)
METHODS: dict[str, tuple[int, float, pcsim.PrecisionSchedule, pcsim.LearningRule]] = {
    "PC, few steps": (0, 0.2, pcsim.Constant(), pcsim.SettledUpdate()),
    "PC, 20 steps more": (20, 0.2, pcsim.Constant(), pcsim.SettledUpdate()),
    "spiking + FU": (0, 0.5, SPIKING, pcsim.ForwardUpdate()),
    "backprop": (0, 0.2, pcsim.Constant(), pcsim.Backprop()),  # which relaxes nothing
}


def simulator(method: str, options: argparse.Namespace) -> pcsim.Simulator:
    """The same fresh chain with a skip, with the rules of a method."""
    more, rate, precision, rule = METHODS[method]
    torch.manual_seed(options.seed)
    net = pcsim.topologies.mlp([64, *[options.width] * options.hidden, 10])
    net.add_edge("hidden1", f"hidden{options.hidden}", name="skip")
    steps = max(net.levels().values()) + 1
    if precision == SPIKING:
        net = pcsim.balance_paths(net, rate)
    return pcsim.Simulator(net, pcsim.Relaxation(steps + more, rate, precision=precision), rule)


def draw(
    curves: dict[str, list[float]], similarities: dict[str, dict[str, dict[str, float]]], options: argparse.Namespace
) -> None:
    """Accuracy over epochs, and the similarity of each edge's update before and after training."""
    figure = plots.new_figure(11, 7)
    above, below = figure.subfigures(2, height_ratios=[1, 1.3])
    draw_accuracy(curves, above)
    for part, (moment, own) in zip(below.subfigures(1, 2), similarities.items(), strict=True):
        plots.similarity_by_edge(own, figure=part)
        part.suptitle(f"{moment} training")
    save(figure, options.plot)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train by each method from the same weights, tell, and draw."""
    parser = command_line(__file__, __doc__, epochs=8)
    parser.add_argument("--hidden", type=int, default=5, help="hidden layers, at least 3")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    train, test = pcsim.data.standardise(*pcsim.data.digits())
    few = {"input": train.images[:256], "output": train.one_hot()[:256]}
    curves: dict[str, list[float]] = {}
    similarities: dict[str, dict[str, dict[str, float]]] = {"before": {}, "after": {}}
    for method in METHODS:
        sim = simulator(method, options)
        local = method != "backprop"
        if local:
            similarities["before"][method] = diagnosis.update_similarity(sim, few)
        optimizer = AdamW(sim.network.parameters(), lr=1e-3, weight_decay=1e-4)
        trainer = pcsim.Trainer(sim, optimizer, metrics=[pcsim.Accuracy()], progress=False, seed=options.seed)
        history = trainer.fit(
            DataLoader(train.dataset(), 64, shuffle=True),
            epochs=options.epochs,
            validation=DataLoader(test.dataset(), len(test)),
        )
        curves[method] = [record.validation["accuracy"] for record in history.records]
        told = f"{method:18} test accuracy {curves[method][-1]:.3f}"
        if local:
            after = similarities["after"][method] = diagnosis.update_similarity(sim, few)
            before = similarities["before"][method]
            told += f"; least cosine with backprop's update {min(before.values()):.3f} before training, "
            told += f"{min(after.values()):.3f} after"
        print(told, flush=True)
    draw(curves, similarities, options)


if __name__ == "__main__":
    main()
