"""Schedule rules for ARM with NEON. Each takes a PrimFunc and returns its schedule, or None: not mine."""

from __future__ import annotations

from . import x86

RULES: tuple[x86.Rule, ...] = x86.RULES
