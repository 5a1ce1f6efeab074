"""CUDA: kernels whose blocks and threads TVM writes as one source for every architecture.

`legalize.py` maps ops to the algorithms that differ from the CPU's; each other file holds the schedule rules of one
family of kernels, which take a PrimFunc and return its schedule, or None. First match wins, TVM's dlight takes what is
left.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import s_tir, tirx

from horq_tvm.schedules.decisions import Decide
from horq_tvm.targets import Target

from .bitserial import popcounts, tensor_cores
from .fallback import fallback
from .float import tiles, windows
from .planes import ballots
from .threads import written

Rule = Callable[[tirx.PrimFunc, Target, Decide], "s_tir.Schedule | None"]

RULES: tuple[Rule, ...] = (tensor_cores, popcounts, written, ballots, tiles, windows, fallback)
