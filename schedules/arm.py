"""Schedule rules for ARM with NEON. Each takes a PrimFunc and returns its schedule, or None. First match wins.

The algorithms, and every rule but the first, are x86's: vectors are 128 bits, that is all. In the first the tile is
another one. A word of the activation that is spread over a vector is an instruction of the vector pipes here (LD1R, or
DUP), not a free operand, so tiles have few pixels and many filters.
"""

from __future__ import annotations

from tvm import s_tir, tirx

from horq_tvm.targets import Target

from . import blocks, neon, x86
from .decisions import Decide, by_default
from .tile import Loop, Tile, candidates, decided

WORKING = 5  # registers beside accumulators and spread elements: weights, and what is counted before it is added
LATENCY = 5  # cycles of a multiply-accumulate: a step takes no less
ISSUE = 3  # instructions a cycle
LOOP = 4  # of the loop itself
COUNTED = 1.5  # cycles of the vector pipes for EOR, CNT and UADALP, two of them a cycle
MULTIPLIED = 0.5  # for FMLA
DOT = 1.0  # for SMULL and SADALP; SDOT takes half of it, but tiles of fewer filters spill in an unrolled window
MAX_COUNTED = 8  # vectors of filters
RAGGED = 1.5


def direct_convolution(func: tirx.PrimFunc, target: Target, decide: Decide = by_default) -> s_tir.Schedule | None:
    """Bitserial and float convolutions with their epilogue, and the next layer's planes, in one tile nest."""
    sch = s_tir.Schedule(func)
    reductions = [b for b in blocks.Kernel.of(sch).reductions if blocks.name(sch, b).startswith(x86.ACCUMULATIONS)]
    if not reductions:
        return None
    kind = blocks.name(sch, reductions[0])
    in_halves = kind.startswith("flush")  # neon.py: the start is added afterwards
    for block in reductions if not in_halves else ():
        blocks.fuse_start(sch, block)
    master, *followers = blocks.inline_elementwise(sch)
    _, height, width, groups, per_group, lanes = blocks.written_shape(sch, reductions[0])
    packs = any(blocks.packs(sch, b) for b in followers)
    loop = Loop(
        height=height,
        width=width,
        blocks=per_group,
        lanes=lanes,
        registers=target.vector_registers,
        latency=LATENCY,
        q_multiple=max(1, 32 // lanes) if packs else 1,
        per_step=_per_step(kind),
    )
    tile = choose(loop, decide)
    work = neon.work(sch, reductions[0]) if in_halves else blocks.work(sch, reductions[0])
    nest = x86.tile_nest(sch, master, tile, groups, lanes, work, decide)
    unroll = 1 if in_halves else decide("unroll", x86.unrolls(sch, reductions[0], tile), 1)
    for block in reductions:
        if in_halves:
            neon.accumulate(sch, block, nest.at)
        else:
            x86.accumulate(sch, block, nest.at, unroll)
    nest.unroll(sch)
    for block in followers:
        x86.follow(sch, block, nest.at, tile, lanes)
    return sch


def _per_step(kind: str) -> float:
    """Cycles of the vector pipes for one vector, in a block of this name."""
    costs = (("multiply", MULTIPLIED), ("dot", DOT))
    return next((cost for name, cost in costs if kind.startswith(name)), COUNTED)


def choose(loop: Loop, decide: Decide = by_default) -> Tile:
    """The tile with the fewest cycles a step among those whose accumulators leave room for the operands.

    Counted bits take at most 8 vectors of filters: their weights, 128 bytes a word, stay in the first cache then.
    """
    most = MAX_COUNTED if loop.per_step == COUNTED else loop.blocks
    found = [
        tile for tile in candidates(loop) if tile.px * tile.q + tile.px + WORKING <= loop.registers and tile.q <= most
    ]
    return decided(loop, found, lambda tile: _score(loop, tile), decide)


def _score(loop: Loop, tile: Tile) -> float:
    """Cycles for one vector of 128 bits (or 4 floats).

    What is left of a row has a loop of its own; not so where bits are counted in halves, since TVM does not take a loop
    of vector code apart: there every step asks whether a pixel exists.
    """
    full, rest = divmod(loop.width, tile.px)
    cycles = full * _cycles(loop, tile.px, tile.q)
    if rest and loop.per_step == COUNTED:
        cycles = RAGGED * (cycles + _cycles(loop, tile.px, tile.q))
    elif rest:
        cycles += _cycles(loop, rest, tile.q)
    return cycles / (loop.width * tile.q) + 0.01 / (tile.px * tile.q)


def _cycles(loop: Loop, px: int, q: int) -> float:
    """Cycles of one step, on a core of two vector pipes and one load pipe that issues three a cycle (Cortex-A57).

    A step loads q vectors of weights and spreads px elements, each half a cycle of the vector pipes.
    """
    pipes = loop.per_step * px * q + 0.5 * px
    issue = (2 * loop.per_step * px * q + 2 * px + q + LOOP) / ISSUE
    return max(pipes, float(px + q), issue, float(loop.latency))


RULES: tuple[x86.Rule, ...] = (direct_convolution, *x86.RULES[1:])
