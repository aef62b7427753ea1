"""pcsim: predictive coding networks as graphs of nodes and edges, simulated and trained by local rules."""

from pcsim import data, diagnosis, errors, plots, topologies
from pcsim.callbacks import BatchRecord, Callback, Checkpoint, EarlyStopping, EpochRecord, History
from pcsim.clamps import Stream
from pcsim.conversion import from_sequential, to_module
from pcsim.dynamics.inference import ErrorRelaxation, Relaxation
from pcsim.dynamics.learning import (
    ArrivalUpdate,
    Backprop,
    ForwardUpdate,
    IncrementalUpdate,
    LearningRule,
    SettledUpdate,
)
from pcsim.dynamics.nudging import Nudge, Nudging, SoftNudging
from pcsim.dynamics.precision import Constant, Decaying, PrecisionSchedule, Spiking
from pcsim.engine.batched.engine import BatchedEngine
from pcsim.engine.engine import Engine
from pcsim.engine.kernels.kernel import Call, Kernel
from pcsim.engine.kernels.kernel import register as register_kernel
from pcsim.engine.probe import Probe, Recording
from pcsim.engine.reference import ReferenceEngine
from pcsim.errors import EnergyWarning, PCError, PCWarning, PrecisionWarning
from pcsim.graph.combining import Attention, Concatenate, Product, Sum
from pcsim.graph.edge import Edge
from pcsim.graph.energies import Bernoulli, CorrelatedGaussian, Huber, Laplace, StudentT
from pcsim.graph.energy import CrossEntropy, Energy, Gaussian, LearnedPrecision
from pcsim.graph.network import Network
from pcsim.graph.node import Node
from pcsim.graph.rewrite import balance_paths, is_auxiliary
from pcsim.metrics import Accuracy, ErrorByLevel, MeanSquaredError, Metric, RelaxedEnergy
from pcsim.saving import load_network, register_module, save_network
from pcsim.simulator import Simulator
from pcsim.trace import Trace
from pcsim.training import Trainer, warmup_cosine
from pcsim.version import __version__

__all__ = [
    "Accuracy",
    "ArrivalUpdate",
    "Attention",
    "Backprop",
    "BatchRecord",
    "BatchedEngine",
    "Bernoulli",
    "Call",
    "Callback",
    "Checkpoint",
    "Concatenate",
    "Constant",
    "CorrelatedGaussian",
    "CrossEntropy",
    "Decaying",
    "EarlyStopping",
    "Edge",
    "Energy",
    "EnergyWarning",
    "Engine",
    "EpochRecord",
    "ErrorByLevel",
    "ErrorRelaxation",
    "ForwardUpdate",
    "Gaussian",
    "History",
    "Huber",
    "IncrementalUpdate",
    "Kernel",
    "Laplace",
    "LearnedPrecision",
    "LearningRule",
    "MeanSquaredError",
    "Metric",
    "Network",
    "Node",
    "Nudge",
    "Nudging",
    "PCError",
    "PCWarning",
    "PrecisionSchedule",
    "PrecisionWarning",
    "Probe",
    "Product",
    "Recording",
    "ReferenceEngine",
    "Relaxation",
    "RelaxedEnergy",
    "SettledUpdate",
    "Simulator",
    "SoftNudging",
    "Spiking",
    "Stream",
    "StudentT",
    "Sum",
    "Trace",
    "Trainer",
    "__version__",
    "balance_paths",
    "data",
    "diagnosis",
    "errors",
    "from_sequential",
    "is_auxiliary",
    "load_network",
    "plots",
    "register_kernel",
    "register_module",
    "save_network",
    "to_module",
    "topologies",
    "warmup_cosine",
]
