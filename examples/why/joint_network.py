"""One network of image and label, for missing_inputs.py and moving_input.py: its parts, its gaps, and how it learns.

Causes, with a prior, predict the image; the image predicts the label, by a hidden layer. What backprop trains is the
same without causes, and either never sees a gap or is trained with gaps too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import AdamW

import pcsim
from pcsim.data import ImageData

METHODS = ("predictive coding", "backprop", "backprop, trained with gaps")
CAUSES, HIDDEN, PRECISION, BATCH = 24, 128, 5.0, 64
GAP_EPOCHS = 4
"""Gaps are learned more slowly: that network has so many times the epochs."""
RATE = 0.3 / PRECISION
LEARNING = pcsim.Relaxation(20, RATE, momentum=0.5)


def network(method: str) -> pcsim.Network:
    """Image to label; with predictive coding, causes of the image as well."""
    net = pcsim.Network()
    net.add_node("image", (64,), precision=PRECISION)
    net.add_node("hidden", (HIDDEN,), transfer=nn.Tanh(), precision=PRECISION)
    net.add_node("label", (10,), precision=PRECISION)
    net.add_edge("image", "hidden", nn.Linear(64, HIDDEN))
    net.add_edge("hidden", "label", nn.Linear(HIDDEN, 10))
    if method == METHODS[0]:
        net.add_node("causes", (CAUSES,), prior=0.0)
        net.add_edge("causes", "image", nn.Linear(CAUSES, 64))
    return net


def gaps(shape: tuple[int, int], shares: float | Tensor, generator: torch.Generator) -> Tensor:
    """Which pixels are given, (batch, pixels): each is missing with probability ``shares``, (batch, 1) or a number."""
    return torch.rand(shape, generator=generator) >= shares


def train(method: str, lr: float, seed: int, data: ImageData, epochs: int) -> pcsim.Simulator:
    """A network that has learned from standardised images, (N, 64)."""
    generator = torch.manual_seed(seed)
    rule = pcsim.SettledUpdate() if method == METHODS[0] else pcsim.Backprop()
    sim = pcsim.Simulator(network(method), LEARNING, rule)
    optimizer = AdamW(sim.network.parameters(), lr=lr)
    for _ in range(epochs * (GAP_EPOCHS if method == METHODS[2] else 1)):
        for batch in torch.split(torch.randperm(len(data), generator=generator), BATCH):
            images = data.images[batch]
            if method == METHODS[2]:
                shares = 0.9 * torch.rand(len(batch), 1, generator=generator)
                images = images * gaps((len(batch), 64), shares, generator)
            sim.update({"image": images, "label": data.one_hot()[batch]}, optimizer)
    return sim
