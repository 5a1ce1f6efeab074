"""What a streaming multiprocessor of each architecture has, and how many of a kernel's blocks that holds.

NVIDIA's CUDA C++ Programming Guide 13.0, chapter "Compute Capabilities", table "Technical Specifications per Compute
Capability".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

WARP = 32
REGISTERS = 65536  # 32-bit, of a multiprocessor
REGISTER_UNIT = 256  # a warp's registers are handed out in this many
PARTITIONS = 4  # a warp belongs to one of the four parts of a multiprocessor, with a quarter of its registers
MAX_REGISTERS = 255  # of a thread
KIB = 1024


@dataclass(frozen=True)
class Multiprocessor:
    """Warps and blocks at once, bytes of shared memory; `reserved_bytes` of it go to the system with each block."""

    warps: int
    blocks: int
    shared_bytes: int
    reserved_bytes: int


ARCHITECTURES: Mapping[int, Multiprocessor] = {
    75: Multiprocessor(32, 16, 64 * KIB, 0),
    80: Multiprocessor(64, 32, 164 * KIB, KIB),
    86: Multiprocessor(48, 16, 100 * KIB, KIB),
    87: Multiprocessor(48, 16, 164 * KIB, KIB),
    89: Multiprocessor(48, 24, 100 * KIB, KIB),
    90: Multiprocessor(64, 32, 228 * KIB, KIB),
}


def occupancy(arch: int, threads: int, registers: int, shared_bytes: int) -> float:
    """The share of a multiprocessor's warps that blocks of `threads` fill, each thread with `registers`.

    The least of what warps, blocks, registers and shared memory allow, as CUDA's own occupancy calculator has it. 0
    where not one block fits.
    """
    has = ARCHITECTURES[arch]
    warps = -(-threads // WARP)
    per_warp = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // PARTITIONS // per_warp * PARTITIONS // warps if registers else has.blocks
    taken = shared_bytes + has.reserved_bytes
    by_shared = has.shared_bytes // taken if taken else has.blocks
    blocks = min(has.blocks, has.warps // warps, by_registers, by_shared)
    return blocks * warps / has.warps
