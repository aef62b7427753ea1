"""What does lateral inhibition do? Features that compete in groups, by one edge from a node to itself.

Features are first learned without competition. Then an edge from them to themselves, with a negative gain, lets each
lower the prediction of the others of its group: relaxed with the image alone clamped, the strongest silence the rest.
Last, the weights go on learning with it, beside a control that goes on without, and learn around a part of it.
Sparseness is Treves and Rolls' ⟨v⟩² / ⟨v²⟩ over the units (1991): less is sparser.

    python examples/gallery/lateral_inhibition.py --plot lateral_inhibition.png
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from shared.script import command_line, save
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

import pcsim
from pcsim import plots
from pcsim.data import ImageData

RATE, GROUP = 0.1, 4
GAINS = (0.0, -0.1, -0.2, -0.4, -0.6, -0.8)


def feedforward() -> pcsim.Network:
    """Image, features that are never negative at rest, digit."""
    net = pcsim.Network()
    image, digit = net.add_node("image", (64,)), net.add_node("digit", (10,))
    features = net.add_node("features", (64,), transfer=nn.ReLU())
    net.add_edge(image, features, nn.Linear(64, 64))
    net.add_edge(features, digit, nn.Linear(64, 10))
    return net


def inhibited(net: pcsim.Network, gain: float) -> pcsim.Network:
    """A copy in which the features of each group inhibit each other; the wiring is fixed, and learns nothing."""
    net = copy.deepcopy(net)
    others = nn.Linear(64, 64, bias=False)
    others.weight = nn.Parameter(torch.block_diag(*[1 - torch.eye(GROUP)] * (64 // GROUP)), requires_grad=False)
    net.add_edge("features", "features", others, gain=gain, name="lateral")
    return net


def learn(net: pcsim.Network, train: ImageData, epochs: int) -> pcsim.Network:
    """The same network after so many epochs more of plain predictive coding."""
    sim = pcsim.Simulator(net, pcsim.Relaxation(30, RATE), pcsim.SettledUpdate())
    optimizer = AdamW((weight for weight in net.parameters() if weight.requires_grad), lr=1e-3)
    trainer = pcsim.Trainer(sim, optimizer, inputs="image", target="digit", progress=False, seed=0)
    trainer.fit(DataLoader(train.dataset(), 64, shuffle=True), epochs=epochs)
    return net


def settled(net: pcsim.Network, test: ImageData) -> tuple[Tensor, float]:
    """Features, (images, features), with nothing but the image clamped, and the accuracy that is read from them."""
    values = pcsim.Simulator(net, pcsim.Relaxation(400, RATE, momentum=0.5)).predict({"image": test.images})
    return values["features"].clamp(min=0), float((values["digit"].argmax(1) == test.labels).float().mean())


def sparseness(values: Tensor) -> float:
    """⟨v⟩² / ⟨v²⟩ over the units, averaged over the images: 1 where all are equal, 1/64 where one is alone."""
    return float((values.mean(1).square() / values.square().mean(1).clamp(min=1e-12)).mean())


def ranks(values: Tensor) -> Tensor:
    """Mean activity of the strongest of a group, the second, ..., relative to the strongest, (GROUP,)."""
    ordered = values.view(len(values), -1, GROUP).sort(2, descending=True).values.mean((0, 1))
    return ordered / ordered[0]


def draw(rows: dict[str, Tensor], by_gain: dict[float, Tensor], path: Path) -> None:
    """Activity by rank within a group and against the gain; below, the features of some images before and after."""
    figure = plots.new_figure(9, 7)
    above, below = figure.subfigures(2)
    left, right = above.subplots(1, 2)
    for (name, values), (colour, marker, dashes) in zip(rows.items(), plots.LINES, strict=False):
        left.plot(range(1, GROUP + 1), ranks(values).numpy(), dashes, label=name, color=colour, marker=marker)
    left.set(xlabel="rank within a group", ylabel="activity / the strongest's", xticks=range(1, GROUP + 1))
    left.legend(frameon=False, fontsize=8)
    right.plot(list(by_gain), [sparseness(values) for values in by_gain.values()], "s--", color="#D55E00")
    right.set(xlabel="gain of the lateral edge, same weights", ylabel="⟨v⟩² / ⟨v²⟩", xlim=(0.03, -0.83), ylim=(0, None))
    panels = below.subplots(2, 1, sharex=True)
    for axes, name in zip(panels, rows, strict=False):
        image = axes.imshow(rows[name][:12].numpy(), aspect="auto", cmap="magma", vmin=0, vmax=1)
        axes.set(title=name, ylabel="image", xticks=range(0, 64, GROUP))
    panels[1].set_xlabel("feature (a tick where a group begins)")
    below.colorbar(image, ax=list(panels), label="activity")
    save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Learn, switch the competition on, learn on, tell, and draw."""
    parser = command_line(__file__, __doc__, epochs=10)
    parser.add_argument("--gain", type=float, default=-0.4, help="below zero")
    options = parser.parse_args(arguments)
    train, test = pcsim.data.digits()
    torch.manual_seed(0)
    before = learn(feedforward(), train, options.epochs)
    competing = inhibited(before, options.gain)
    networks = {"no inhibition": before, "inhibition, same weights": competing}
    networks["inhibition, learned on"] = learn(copy.deepcopy(competing), train, options.epochs)
    networks["no inhibition, learned on"] = learn(copy.deepcopy(before), train, options.epochs)
    rows = {}
    for name, net in networks.items():
        rows[name], accuracy = settled(net, test)
        told = f"sparseness {sparseness(rows[name]):.3f}  second of a group {ranks(rows[name])[1]:.2f} of the first"
        print(f"{name:26} {told}  test accuracy {accuracy:.3f}", flush=True)
    draw(rows, {gain: settled(inhibited(before, gain), test)[0] for gain in GAINS}, options.plot)


if __name__ == "__main__":
    main()
