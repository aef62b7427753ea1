"""One network, two ways: from a label to an image, and from an image to its label.

A generative network predicts downwards, label → hidden → hidden → image. It learns with both ends clamped. With the
label alone clamped, a forward pass draws what the network takes for that digit; with the image alone clamped, the
label is a latent like all others, and inferring it classifies.

    python examples/gallery/top_down.py --plot top_down.png
    python examples/gallery/top_down.py --steps 200 --width 128
"""

from __future__ import annotations

import argparse
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

RATE = 0.1


def network(width: int) -> pcsim.Network:
    """The label predicts the image through two hidden nodes."""
    net = pcsim.Network()
    net.add_node("label", (10,))
    net.add_node("shape", (width,), transfer=nn.Tanh())
    net.add_node("strokes", (width,), transfer=nn.Tanh())
    net.add_node("image", (64,))
    net.add_edge("label", "shape", nn.Linear(10, width))
    net.add_edge("shape", "strokes", nn.Linear(width, width))
    net.add_edge("strokes", "image", nn.Linear(width, 64))
    return net


def learn(net: pcsim.Network, train: ImageData, options: argparse.Namespace) -> None:
    """Label and image clamped, what is between them inferred."""
    sim = pcsim.Simulator(net, pcsim.Relaxation(20, RATE), pcsim.SettledUpdate())
    trainer = pcsim.Trainer(
        sim,
        AdamW(net.parameters(), lr=1e-3),
        clamps=lambda batch: {"image": batch[0], "label": batch[1]},
        target=None,
        progress=False,
        seed=options.seed,
    )
    trainer.fit(DataLoader(train.dataset(), 64, shuffle=True), epochs=options.epochs)


def class_means(train: ImageData) -> Tensor:
    """Mean training image of each digit, (10, 64)."""
    return torch.stack([train.images[train.labels == digit].mean(0) for digit in range(10)])


def draw(drawn: Tensor, confusion: Tensor, accuracy: float, path: Path) -> None:
    """Ten digits from ten labels above; below, which label was inferred for which digit."""
    figure = plots.new_figure(7, 6)
    above, below = figure.subfigures(2, height_ratios=[1, 3.6])
    above.suptitle("label clamped, image read")
    for digit, (axes, image) in enumerate(zip(above.subplots(1, 10), drawn.view(-1, 8, 8), strict=True)):
        axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set(title=str(digit), xticks=[], yticks=[])
    axes = below.subplots()
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    for row in range(10):
        for column in range(10):
            if count := int(confusion[row, column]):
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=colour)
    axes.set(xlabel="inferred label", ylabel="digit", xticks=range(10), yticks=range(10))
    axes.set_title(f"image clamped, label inferred (number of test images): accuracy {accuracy:.3f}")
    save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Learn, draw by the label, classify by the image, and tell."""
    parser = command_line(__file__, __doc__, epochs=20)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100, help="of inference of the label")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    train, test = pcsim.data.digits()
    torch.manual_seed(options.seed)
    net = network(options.width)
    learn(net, train, options)

    sim = pcsim.Simulator(net, pcsim.Relaxation(options.steps, RATE))
    drawn = sim.predict({"label": torch.eye(10)})["image"]
    means = class_means(train)
    spread = (means - means.mean(0)).square().mean()
    print(f"label to image: mean squared error to the mean of each digit {(drawn - means).square().mean():.4f} "
          f"(the mean of all digits is {spread:.4f} away)")  # fmt: skip
    inferred = sim.predict({"image": test.images})["label"].argmax(1)
    accuracy = float((inferred == test.labels).float().mean())
    nearest = float((torch.cdist(test.images, means).argmin(1) == test.labels).float().mean())
    print(f"image to label: test accuracy {accuracy:.3f} (by the nearest mean digit {nearest:.3f})")
    confusion = torch.zeros(10, 10).index_put_((test.labels, inferred), torch.ones(len(test)), accumulate=True)
    draw(drawn, confusion, accuracy, options.plot)


if __name__ == "__main__":
    main()
