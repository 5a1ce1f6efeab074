"""Measurements behind docs/performance.md, each a command: `python -m benchmarks.kernels`."""
