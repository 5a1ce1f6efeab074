"""Kernels: the algorithm of each packed op, and the schedule per target family.

`legalize.py` maps ops to algorithms (te.compute, or TensorIR where bits are packed or looked up); `x86.py` and `arm.py`
hold the schedule rules of their families, first match wins; `tile.py` is the analytic model behind their default
parameters; `layout.py` says how a layer's bits lie, by what its target counts them with. `cuda/` has rules of its own,
and algorithms where a warp works otherwise than a vector.
"""
