"""What pcsim raises and warns with: one small tree, so that ``except PCError`` catches all of it.

A message names the node or edge, what was given, what was expected, and what to do.
"""

from __future__ import annotations


class PCError(RuntimeError):
    """Base of every error that pcsim raises."""


class GraphError(PCError):
    """The network cannot be built as asked: names, shapes, cycles of deterministic nodes."""


class UnknownNameError(GraphError, KeyError):
    """A node or edge of that name is not in the network."""

    def __str__(self) -> str:
        return str(self.args[0])


class ClampError(PCError):
    """A clamp does not fit: unknown node, shape, dtype, device, batch size, or values that are not finite."""


class SettingError(PCError):
    """A relaxation, schedule or learning rule was given a value outside its range."""


class StateError(PCError):
    """A state was read, or learning was asked for, before a run that provides it."""


class DivergenceError(PCError):
    """A latent became NaN or infinite during relaxation."""


class ConvergenceError(PCError):
    """No equilibrium was found to the tolerance that was asked for."""


class ProcessError(PCError):
    """Another process of those that train together has failed, or is gone."""


class DataError(PCError):
    """A data set is missing, damaged or not what it claims to be."""


class FileError(PCError):
    """A file of pcsim's cannot be written, is damaged, or holds something else."""


class PCWarning(UserWarning):
    """Base of every warning that pcsim gives."""


class PrecisionWarning(PCWarning):
    """A precision schedule leaves nodes without what the user probably expects of it."""


class EnergyWarning(PCWarning):
    """An energy stands where it has no minimum, so that a relaxation drifts, or does not do there what it is for."""
