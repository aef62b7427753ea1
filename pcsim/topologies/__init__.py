"""Ready graphs to start from: each returns a network that can be printed, edited and simulated."""

from pcsim.topologies.mlp import mlp, residual_mlp

__all__ = ["mlp", "residual_mlp"]
