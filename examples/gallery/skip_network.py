"""Do skip connections need auxiliary neurons? One residual network without and with them, beside backprop.

A skip is two latent hops shorter than the branch around which it leads, so an error reaches the lower blocks too early,
and where precision spikes once, at the arrival along the longest path, it is too late. Auxiliary neurons put the
missing hops on the short path (arXiv 2506.23800; ``pcsim.balance_paths``). The picture shows the test accuracy over
training, and the energy of each level of the untrained network at each inference step: with auxiliary neurons the
error climbs one level per step.

    python examples/gallery/skip_network.py --plot skip_network.png
    python examples/gallery/skip_network.py --blocks 20 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from shared.script import command_line, save
from torch.optim import AdamW
from torch.utils.data import DataLoader

import pcsim
from pcsim import plots
from pcsim.data import ImageData

SPIKING = pcsim.Spiking(alpha=0.0)
METHODS: dict[str, tuple[pcsim.PrecisionSchedule, pcsim.LearningRule, bool]] = {
    "backprop": (pcsim.Constant(), pcsim.Backprop(), False),
    "with auxiliary neurons": (SPIKING, pcsim.ForwardUpdate(), True),
    "without auxiliary neurons": (SPIKING, pcsim.ForwardUpdate(), False),
}
STYLES = {"color": "#999999", "linewidth": 7}, {"color": "#0072B2", "marker": "D"}, {"color": "#D55E00", "marker": "s"}
RATE, BATCH = 0.8, 64


def simulator(method: str, seed: int, options: argparse.Namespace) -> pcsim.Simulator:
    """A fresh residual network with the rules of a method."""
    precision, rule, balanced = METHODS[method]
    torch.manual_seed(seed)
    net = pcsim.topologies.residual_mlp(64, options.width, 10, blocks=options.blocks, gain=options.blocks**-0.5)
    steps = max(net.levels().values()) + 2
    if balanced:
        net = pcsim.balance_paths(net, RATE)
    return pcsim.Simulator(net, pcsim.Relaxation(steps, RATE, precision=precision), rule)


def accuracies(method: str, seed: int, data: tuple[ImageData, ImageData], options: argparse.Namespace) -> list[float]:
    """Test accuracy after each epoch; it chooses nothing."""
    sim = simulator(method, seed, options)
    optimizer = AdamW(sim.network.parameters(), lr=1e-3, weight_decay=1e-4)
    trainer = pcsim.Trainer(sim, optimizer, metrics=[pcsim.Accuracy()], progress=False, seed=seed)
    history = trainer.fit(
        DataLoader(data[0].dataset(), BATCH, shuffle=True),
        epochs=options.epochs,
        validation=DataLoader(data[1].dataset(), len(data[1])),
    )
    return [record.validation["accuracy"] for record in history.records]


def draw(curves: dict[str, torch.Tensor], images: ImageData, options: argparse.Namespace) -> None:
    """Accuracy over epochs above; below, energies by level and step with and without auxiliary neurons."""
    batch = images.take(min(256, len(images)))
    traces = {}
    for method in list(METHODS)[1:]:
        sim = simulator(method, options.seeds[0], options)
        traces[method] = sim.infer({"input": batch.images, "output": batch.one_hot()}, record=True)
    figure = plots.new_figure(8, 7)
    above, below = figure.subfigures(2, height_ratios=[1, 1.2])
    axes = above.subplots()
    for (method, runs), style in zip(curves.items(), STYLES, strict=True):
        epochs = range(1, runs.shape[1] + 1)
        axes.plot(epochs, runs.mean(0).numpy(), label=method, **style)
        axes.fill_between(
            epochs, runs.amin(0).numpy(), runs.amax(0).numpy(), color=style["color"], alpha=0.2, linewidth=0
        )
    axes.axhline(0.1, color="grey", linewidth=1, linestyle=(0, (1, 3)))
    axes.set(xlabel="epoch", ylabel="test accuracy", ylim=(0, 1.03), xticks=list(epochs))
    axes.set_title(f"{options.blocks} residual blocks; shaded: from the worst to the best run")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    plots.energy_by_level(traces, figure=below)
    save(figure, options.plot)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train with each method, tell, and draw."""
    parser = command_line(__file__, __doc__, epochs=4)
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args(arguments)
    data = pcsim.data.standardise(*pcsim.data.digits())
    print(f"Test accuracy of {options.blocks} residual blocks after {options.epochs} epochs, seeds {options.seeds}")
    curves = {}
    for method in METHODS:
        curves[method] = torch.tensor([accuracies(method, seed, data, options) for seed in options.seeds])
        last = curves[method][:, -1]
        print(f"{method:26} {last.mean():.3f}  (worst {last.min():.3f}, best {last.max():.3f})", flush=True)
    draw(curves, data[0], options)


if __name__ == "__main__":
    main()
