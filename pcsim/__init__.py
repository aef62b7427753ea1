"""pcsim: predictive coding networks as graphs of nodes and edges, simulated and trained by local rules."""

from pcsim import data, errors, topologies
from pcsim.dynamics.inference import Relaxation
from pcsim.dynamics.learning import Backprop, ForwardUpdate, IncrementalUpdate, LearningRule, SettledUpdate
from pcsim.dynamics.precision import Constant, Decaying, PrecisionSchedule, Spiking
from pcsim.engine.engine import Engine
from pcsim.errors import PCError, PCWarning, PrecisionWarning
from pcsim.graph.edge import Edge
from pcsim.graph.energy import CrossEntropy, Energy, Gaussian, LearnedPrecision
from pcsim.graph.network import Network
from pcsim.graph.node import Concatenate, Node, Product, Sum
from pcsim.simulator import Simulator, Trace
from pcsim.training import Trainer
from pcsim.version import __version__

__all__ = [
    "Backprop",
    "Concatenate",
    "Constant",
    "CrossEntropy",
    "Decaying",
    "Edge",
    "Energy",
    "Engine",
    "ForwardUpdate",
    "Gaussian",
    "IncrementalUpdate",
    "LearnedPrecision",
    "LearningRule",
    "Network",
    "Node",
    "PCError",
    "PCWarning",
    "PrecisionSchedule",
    "PrecisionWarning",
    "Product",
    "Relaxation",
    "SettledUpdate",
    "Simulator",
    "Spiking",
    "Sum",
    "Trace",
    "Trainer",
    "__version__",
    "data",
    "errors",
    "topologies",
]
