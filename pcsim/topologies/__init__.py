"""Ready graphs to start from: each returns a network that can be printed, edited and simulated."""

from pcsim.topologies.mlp import mlp, residual_mlp
from pcsim.topologies.resnet import RESNET_DESIGNS, resnet
from pcsim.topologies.transformer import Patches, Positions, transformer
from pcsim.topologies.vgg import VGG_DESIGNS, Convolution, VGGDesign, tanh_gelu, vgg

__all__ = [
    "RESNET_DESIGNS",
    "VGG_DESIGNS",
    "Convolution",
    "Patches",
    "Positions",
    "VGGDesign",
    "mlp",
    "residual_mlp",
    "resnet",
    "tanh_gelu",
    "transformer",
    "vgg",
]
