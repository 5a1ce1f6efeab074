"""Which tile a layer's matrix product is cut into: the one that a rough model of a card finishes first.

A library holds one form of a kernel for all of its architectures, so the card of the model is none in particular: of
the cards that it may run on the one with the middling number of multiprocessors, and per multiprocessor and cycle

    one fragment product (16 × 8 × 256 bits) in 4 cycles   RTX 3090 and H100 (two ANDs); A100 takes 2 (docs/cuda.md)
    128 bytes from shared memory                           all of them
    32 bytes from the second-level cache or memory         A100 47 (5120 bytes over 108), RTX 3090 about 25
    128 threads' operations                                64 on sm_75 and A100, 128 on the others

What a block waits for is latency, so many blocks, or several on a multiprocessor, are worth more than large tiles where
pixels are few: 49 pixels × 512 filters are cut into 64 tiles of 16 × 32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from horq_tvm.errors import HorqError
from horq_tvm.ops import STEP_WORDS
from horq_tvm.targets import WARP, Target

from . import mma
from .mma import CHUNKS, FRAGMENT_M, FRAGMENT_N, Gemm, Tile

MULTIPROCESSORS: Mapping[int, int] = {75: 40, 80: 108, 86: 82, 87: 16, 89: 128, 90: 132}
"""By architecture, of T4, A100, RTX 3090, Orin, RTX 4090, H100."""
SHARED_OF_CARD = 96 << 10  # of a multiprocessor, near enough
THREADS_OF_CARD = 1024  # at once on a multiprocessor, with 64 registers each
REGISTERS_OF_SUMS = 64  # of a thread: half of what 512 threads on a multiprocessor leave to each
REGISTERS_MOVED = 48  # words on their way to shared memory on sm_75
FRAGMENT_CYCLES = 4
SHARED_CYCLE = 128  # bytes
MEMORY_CYCLE = 32  # bytes
STAGE_LATENCY = 500  # cycles from the request to the barrier
BLOCK_LATENCY = 2000  # start, first stage, epilogue
OUTPUT_CYCLES = 0.4  # of an epilogue's value: some 16 operations and 8 bytes
OUTPUT_LATENCY = 40  # of each of a thread's values: loads of several are under way at a time
MOVE_LATENCY = 20  # of each of a thread's copies of a stage

ROWS = (16, 32, 64, 128)
COLUMNS = (32, 64, 128)  # whole words of the next planes
WARPS = ((1, 2), (2, 1), (2, 2), (1, 4), (4, 1), (2, 4), (4, 2))
STEPS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Card:
    """What a tile is chosen for: multiprocessors, and the shared memory that a block may take."""

    multiprocessors: int
    shared_bytes: int

    @classmethod
    def of(cls, target: Target) -> Card:
        known = sorted(MULTIPROCESSORS[arch] for arch in target.archs)
        return cls(known[len(known) // 2], target.shared_bytes)


def choose(gemm: Gemm, card: Card) -> Tile:
    """The tile with the least time; the smaller one of equals. Raises HorqError if none fits into shared memory."""
    fitting = [tile for tile in _tiles(gemm) if shared_bytes(gemm, tile) <= card.shared_bytes]
    if not fitting:
        smallest = min(shared_bytes(gemm, tile) for tile in _every_tile())
        raise HorqError(
            f"{gemm.orders} planes need {smallest} bytes of shared memory for the smallest tile;"
            f" accepted are up to {card.shared_bytes}, the target's shared_kib"
        )
    return min(fitting, key=lambda tile: (cycles(gemm, tile, card), tile.m * tile.n))


def shared_bytes(gemm: Gemm, tile: Tile) -> int:
    """Of a block: the stages, and the counts that its threads hand to one another."""
    buffers = min(mma.stages(gemm, tile), 2)
    staged = buffers * (gemm.orders * tile.m + tile.n) * tile.row
    return 4 * (staged + gemm.orders * tile.m * (tile.n + mma.COUNTS_SHIFT))


def cycles(gemm: Gemm, tile: Tile, card: Card) -> float:
    """Until the last block is done, by the model."""
    blocks = mma.grid(gemm, tile)
    on_one = -(-blocks[0] * blocks[1] * blocks[2] // card.multiprocessors)
    room = max(1, SHARED_OF_CARD // shared_bytes(gemm, tile))
    at_once = min(on_one, room, THREADS_OF_CARD // (tile.warps * WARP))
    stages = mma.stages(gemm, tile)
    busy = stages * tile.steps * _step(gemm, tile) + tile.m * tile.n * OUTPUT_CYCLES
    threads = tile.warps * WARP
    words = tile.steps * STEP_WORDS
    copies = -(-gemm.orders * tile.m * words // gemm.chunk // threads) - (-tile.n * words // CHUNKS[0] // threads)
    waiting = BLOCK_LATENCY + stages * (STAGE_LATENCY + copies * MOVE_LATENCY)
    waiting += tile.m * tile.n // threads * OUTPUT_LATENCY
    return on_one * busy + -(-on_one // at_once) * waiting


def _step(gemm: Gemm, tile: Tile) -> float:
    """Cycles of a multiprocessor for a step of a tile: its products, fragments read, and words moved overlap."""
    across, down = tile.fragments
    products = gemm.orders * tile.m // FRAGMENT_M * (tile.n // FRAGMENT_N) * FRAGMENT_CYCLES
    read = tile.warps * (gemm.orders * across * FRAGMENT_M + down * FRAGMENT_N) * STEP_WORDS * 4 / SHARED_CYCLE
    moved = (gemm.orders * tile.m + tile.n) * STEP_WORDS * 4 / MEMORY_CYCLE
    return max(products, read, moved)


def _tiles(gemm: Gemm) -> Iterator[Tile]:
    """Tiles that fit into a thread's registers and are not much larger than the layer."""
    for tile in _every_tile():
        across, down = tile.fragments
        threads = tile.warps * WARP
        words = tile.steps * STEP_WORDS
        moved = -(-gemm.orders * tile.m * words // threads) + -(-tile.n * words // threads)
        wide = tile.n > COLUMNS[0] and tile.n >= 2 * gemm.filters
        if gemm.orders * across * down * 4 <= REGISTERS_OF_SUMS and moved <= REGISTERS_MOVED and not wide:
            yield tile


def _every_tile() -> Iterator[Tile]:
    for m, n, (warps_m, warps_n), steps in product(ROWS, COLUMNS, WARPS, STEPS):
        if m % (warps_m * FRAGMENT_M) == 0 and n % (warps_n * FRAGMENT_N) == 0:
            yield Tile(m, n, warps_m, warps_n, steps)
