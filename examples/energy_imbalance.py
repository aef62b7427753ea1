"""Where does the energy sit in a deep network while it relaxes? Plain predictive coding beside spiking precision.

Relaxes an untrained VGG on one batch of images for twice its depth, and draws the energy and the error of each level
at each inference step, the imbalance between levels, the front of the error, and how well each edge's update agrees
with backprop's (arXiv 2506.23800, §3). Without CIFAR-10, scikit-learn's digits stand in for it, on a network that fits
them.

    python examples/energy_imbalance.py --plot imbalance.png
    python examples/energy_imbalance.py --data cifar10 --root DATA --topology VGG10 --plot imbalance.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from command_line import file, number, told_in_a_line
from torch import Tensor

import pcsim
from pcsim import data, diagnosis, plots
from pcsim.topologies import Convolution, VGGDesign

SMALL = VGGDesign(tuple(Convolution(channels, pool=place in (2, 5)) for place, channels in enumerate((16,) * 8)))
METHODS: dict[str, Callable[[float], tuple[pcsim.PrecisionSchedule, pcsim.LearningRule]]] = {
    "PC": lambda rate: (pcsim.Constant(), pcsim.SettledUpdate()),
    "spiking + FU": lambda rate: (pcsim.Spiking(alpha=0.0), pcsim.ForwardUpdate()),
    # As in Eq. 4, a peak of 1/rate would hand errors on whole, and wipe each node's own; so a little less.
    "spiking to 0.9 / rate + FU": lambda rate: (pcsim.Spiking(alpha=0.0, peak=0.9 / rate), pcsim.ForwardUpdate()),
}


def batch(options: argparse.Namespace) -> dict[str, Tensor]:
    """Images and targets."""
    if options.data == "digits":
        (few,) = data.standardise(data.digits()[0].take(options.batch))
        images = few.images.view(-1, 1, 8, 8)
    else:
        few = data.cifar10(options.root)[0].take(options.batch)
        images = data.normalise(few.images, data.CIFAR10_MEAN, data.CIFAR10_STD)
    return {"input": images.double(), "output": few.one_hot().double()}


def simulator(method: str, image: Sequence[int], options: argparse.Namespace) -> pcsim.Simulator:
    """The same untrained network with the rules of a method."""
    torch.manual_seed(options.seed)
    design = SMALL if options.data == "digits" else options.topology
    net = pcsim.topologies.vgg(design, image=image, width=options.width, batch_norm=options.batchnorm)
    precision, rule = METHODS[method](options.rate)
    # In float64: what rounding makes of errors that have shrunk by many decades is another matter.
    return pcsim.Simulator(net.double(), pcsim.Relaxation(2 * len(net.edges), options.rate, precision=precision), rule)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", choices=("digits", "cifar10"), default="digits")
    add("--root", type=Path, default=Path("data"), help="folder that holds CIFAR-10")
    add("--topology", choices=pcsim.topologies.VGG_DESIGNS, default="VGG10", help="of CIFAR-10")
    add("--width", type=number(float, 0, 1000, but=0), default=1.0, help="factor on the channels")
    add("--batchnorm", action=argparse.BooleanOptionalAction, default=False)
    add("--rate", type=number(float, 0, but=0), default=0.2, help="of the latents")
    add("--batch", type=number(int, 1), default=64)
    add("--seed", type=number(int, 0), default=0)
    add("--plot", type=file, default=Path("energy_imbalance.png"), metavar="PATH")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Relax, tell, and draw."""
    options = parsed(arguments)
    with told_in_a_line("energy_imbalance.py"):
        clamps = batch(options)
    traces, similarities = {}, {}
    for method in METHODS:
        sim = simulator(method, clamps["input"].shape[1:], options)
        traces[method] = sim.infer(clamps, record=True)
        similarities[method] = diagnosis.update_similarity(sim, clamps)
        worst = min(similarities[method].values())
        print(f"{method:26} largest / smallest energy of a level after {traces[method].steps} steps: "
              f"{diagnosis.imbalance(traces[method])[-1]:.3g}; least agreement with backprop: {worst:.3f}")  # fmt: skip
    figure = plots.new_figure(13, 10)
    energies, errors, below = figure.subfigures(3, height_ratios=[1, 1, 1])
    plots.energy_by_level(traces, figure=energies)
    plots.error_by_level(traces, figure=errors)
    left, middle, right = below.subfigures(1, 3)
    plots.imbalance_by_step(traces, figure=left)
    plots.error_front(traces, figure=middle)
    plots.similarity_by_edge(similarities, figure=right)
    figure.savefig(options.plot, dpi=150)
    print(f"drawn: {options.plot}")


if __name__ == "__main__":
    main()
