"""The version, in its one place: packaging reads it from here without importing anything else."""

__version__ = "0.1.0"
