"""Benchmarks of pcsim: ``python -m benchmarks`` from a checkout."""
