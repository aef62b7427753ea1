"""Networks of ``pcsim.topologies`` as a user would train them, and a set of images to train them on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import pcsim
from benchmarks.workloads import DEPTH_OF_BLOCKS, Topology

NOISE, SIGNAL = 1.0, 0.3
"""Deviation of the noise in each pixel, and of the pattern of a class."""


def topology_and_data(topology: Topology, device: torch.device) -> tuple[pcsim.Network, Tensor, Tensor]:
    """A network, inputs and targets; the same at every call."""
    torch.manual_seed(0)
    kind: dict[str, Any] = {"image": topology.image, "classes": topology.classes}
    if topology.design == "transformer":
        blocks, width = topology.depth // DEPTH_OF_BLOCKS, int(topology.width)
        energy = pcsim.Gaussian()  # as of all other workloads
        network = pcsim.topologies.transformer(**kind, patch=2, width=width, heads=4, blocks=blocks, energy=energy)
    else:
        make = pcsim.topologies.vgg if topology.design.startswith("VGG") else pcsim.topologies.resnet
        network = make(topology.design, **kind, width=topology.width)
    inputs, classes = torch.randn(topology.batch, *topology.image), torch.arange(topology.batch) % topology.classes
    return network.to(device), inputs.to(device), torch.eye(topology.classes)[classes].to(device)


def module_and_data(topology: Topology, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """The network's forward pass as a module, inputs and targets."""
    network, inputs, targets = topology_and_data(topology, device)
    return pcsim.to_module(network), inputs, targets


def synthetic_images(topology: Topology, count: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Images (count, *image) of a smooth pattern for each class in noise, and their classes (count,).

    The patterns are always the same; which classes and what noise depends on the seed (and the device).
    """
    channels, height, width = topology.image
    coarse = torch.randn(topology.classes, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    patterns = nn.functional.interpolate(coarse, (height, width), mode="bilinear").to(device)
    generator = torch.Generator(device).manual_seed(seed)
    classes = torch.randint(topology.classes, (count,), generator=generator, device=device)
    images = torch.randn(count, channels, height, width, generator=generator, device=device)
    return images.mul_(NOISE).add_(SIGNAL * patterns[classes]), classes


def start_by_kaiming(network: pcsim.Network) -> None:
    """Weights N(0, 2/fan_in), zero biases (He et al., arXiv 1502.01852): what comes in reaches the other end."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
