"""Can a network see what is hidden? A cyclic graph learns digits, and completes them from one half.

Hidden causes predict the image, and every pixel is predicted by all other pixels as well, along an edge from the image
to itself: a cycle. It learns with whole images clamped. Then half of each test image is clamped, by a mask, and the
other half relaxes with the causes to the least energy (associative memory by predictive coding: arXiv 2109.08063; on
arbitrary graphs: arXiv 2201.13180). The error on the hidden half is compared with that of the mean training image.

    python examples/gallery/completion.py --plot completion.png
    python examples/gallery/completion.py --given left
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from shared.script import command_line, save
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

import pcsim
from pcsim import plots

PRECISION = 20.0
"""Of the image: how much closer than the causes' to their prior it is held to its prediction."""
RATE = 0.4 / PRECISION
HALVES = {"top": (slice(0, 4), slice(None)), "left": (slice(None), slice(0, 4))}


class FromOthers(nn.Linear):
    """Predicts each unit from all others: a linear layer without its diagonal."""

    def forward(self, value: Tensor) -> Tensor:
        """(batch, units) to (batch, units)."""
        others = 1 - torch.eye(self.in_features, dtype=value.dtype, device=value.device)
        return functional.linear(value, self.weight * others, self.bias)


def network(hidden: int) -> pcsim.Network:
    """Causes with a prior, an image that they predict, and the image's edge to itself."""
    net = pcsim.Network()
    net.add_node("causes", (hidden,), prior=0.0)
    net.add_node("image", (64,), precision=PRECISION)
    net.add_edge("causes", "image", nn.Sequential(nn.Tanh(), nn.Linear(hidden, 64)))
    net.add_edge("image", "image", FromOthers(64, 64), name="between pixels")
    return net


def learn(net: pcsim.Network, images: Tensor, options: argparse.Namespace) -> None:
    """Whole images clamped, causes inferred, no label anywhere."""
    sim = pcsim.Simulator(net, pcsim.Relaxation(30, RATE), pcsim.SettledUpdate())
    # The strong decay keeps the pixels from copying each other: without it, completion does not settle.
    optimizer = AdamW(net.parameters(), lr=2e-3, weight_decay=3.0)
    trainer = pcsim.Trainer(
        sim, optimizer, clamps=lambda batch: {"image": batch[0]}, target=None, progress=False, seed=options.seed
    )
    trainer.fit(DataLoader(TensorDataset(images), 64, shuffle=True), epochs=options.epochs)


def draw(shown: dict[str, Tensor], mask: Tensor, path: Path) -> None:
    """A row of images for each title, the hidden half marked where it is grey."""
    figure = plots.new_figure(9, 0.85 * len(shown))
    count = len(next(iter(shown.values())))
    grid = figure.subplots(len(shown), count, squeeze=False)
    for row, (title, images) in zip(grid, shown.items(), strict=True):
        for axes, image in zip(row, images.view(-1, 8, 8), strict=True):
            hidden = ~mask.view(8, 8) if title == "given" else torch.zeros(8, 8, dtype=torch.bool)
            colours = image.clamp(0, 1).unsqueeze(2).repeat(1, 1, 3)
            colours[hidden] = torch.tensor([0.35, 0.55, 0.75])
            axes.imshow(colours.numpy())
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(title, rotation=0, ha="right", va="center")
    save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Learn, complete, tell, and draw."""
    parser = command_line(__file__, __doc__, epochs=40)
    parser.add_argument("--hidden", type=int, default=128, help="number of causes")
    parser.add_argument("--given", choices=HALVES, default="top", help="the half that is clamped")
    parser.add_argument("--steps", type=int, default=200, help="of inference in completion")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    train, test = pcsim.data.digits()
    mean = train.images.mean(0)
    torch.manual_seed(options.seed)
    net = network(options.hidden)
    learn(net, train.images - mean, options)

    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[HALVES[options.given]] = True
    mask = mask.flatten()
    sim = pcsim.Simulator(net, pcsim.Relaxation(options.steps, RATE, momentum=0.5))
    completed = sim.predict({"image": (test.images - mean, mask)})["image"] + mean
    error, baseline = ((guess - test.images)[:, ~mask].square().mean() for guess in (completed, mean))
    print(f"{options.given} half given, {len(test)} test digits; mean squared error per hidden pixel:")
    print(f"completed {error:.4f}, mean image {baseline:.4f}: {1 - error / baseline:.0%} less")
    first = [int((test.labels == digit).nonzero()[0]) for digit in range(10)]
    guesses = {"completed": completed[first], "mean image": torch.where(mask, test.images[first], mean)}
    draw({"given": test.images[first], **guesses, "truth": test.images[first]}, mask, options.plot)


if __name__ == "__main__":
    main()
