"""What schedule rules ask of a kernel's blocks, whatever the target."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import tvm_ffi
from tvm import s_tir, tirx

Sch: TypeAlias = "s_tir.Schedule"
Block: TypeAlias = "s_tir.schedule.SBlockRV"
Loop: TypeAlias = "s_tir.schedule.LoopRV"


@dataclass(frozen=True)
class Kernel:
    """The top blocks of a function in order, and which of them reduce."""

    sch: Sch
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, sch: Sch) -> Kernel:
        return cls(sch, tuple(sch.get_child_blocks(sch.get_sblock("root"))))

    @property
    def reductions(self) -> tuple[Block, ...]:
        return tuple(b for b in self.blocks if is_reduction(self.sch, b))


def name(sch: Sch, block: Block) -> str:
    return str(sch.get(block).name_hint)


def is_reduction(sch: Sch, block: Block) -> bool:
    return any(int(v.iter_type) == tirx.IterVar.CommReduce for v in sch.get(block).iter_vars)


def packs(sch: Sch, block: Block) -> bool:
    """Whether this block packs bits: it reads vectors, so nothing can be inlined into it."""
    return name(sch, block).startswith("pack")


def spatial_extents(sch: Sch, block: Block) -> tuple[int, ...]:
    """Extents of the block's spatial axes."""
    return tuple(int(v.dom.extent) for v in sch.get(block).iter_vars if int(v.iter_type) == tirx.IterVar.DataPar)


def written_shape(sch: Sch, block: Block) -> tuple[int, ...]:
    """The shape of the buffer that the block writes."""
    return tuple(int(extent) for extent in sch.get(block).writes[0].source.shape)


def keeps_last_axis(sch: Sch, block: Block) -> bool:
    """Whether a reduction reads and writes its last spatial axis as the last index: vectors load and store whole."""
    node = sch.get(block)
    spatial = [v for v in node.iter_vars if int(v.iter_type) == tirx.IterVar.DataPar]
    if not spatial or int(spatial[-1].dom.extent) == 1:
        return False
    last = spatial[-1].var
    written = node.writes[0].region
    if not written[len(written) - 1].min.same_as(last):
        return False
    sources = [r.region for r in node.reads if not r.source.same_as(node.writes[0].source)]
    return all(region[len(region) - 1].min.same_as(last) for region in sources)


def source_of_last_axis(sch: Sch, block: Block) -> int | None:
    """For a transposing map, the position of the loop that runs along its operand's last axis; None for any other."""
    node = sch.get(block)
    variables = [v.var for v in node.iter_vars]
    if len(node.reads) != 1 or len(variables) != len(sch.get_loops(block)):
        return None
    region = node.reads[0].region
    last = region[len(region) - 1].min
    position = next((i for i, var in enumerate(variables) if var.same_as(last)), None)
    return position if position is not None and position < len(variables) - 1 else None


def work(sch: Sch, block: Block) -> int:
    """How often the block's body runs."""
    extents: list[int] = [int(v.dom.extent) for v in sch.get(block).iter_vars]
    return prod(extents)


def function(sch: Sch) -> tirx.PrimFunc:
    """The one function that is being scheduled."""
    (func,) = sch.mod.functions.values()
    return func


def writes_output(sch: Sch, block: Block) -> bool:
    """Whether the block writes one of the function's own buffers, so that it must stay."""
    return any(region.source.same_as(param) for region in sch.get(block).writes for param in function(sch).params)


def fuse_start(sch: Sch, reduction: Block) -> None:
    """Sets a popcount's accumulators to their border constants, where a `start` block adds these afterwards."""
    for consumer in sch.get_consumers(reduction):
        if name(sch, consumer).startswith("start"):
            sch.fuse_reduction_epilogue(reduction, consumer)


def vectorize(sch: Sch, loop: Loop) -> None:
    if int(sch.get(loop).extent) > 1:
        sch.vectorize(loop)


def inline_elementwise(sch: Sch) -> list[Block]:
    """Inlines every elementwise block into its consumers, but for those that write an output or that a pack reads.

    Returns what is left besides the reductions, in order: the first is the tile's master, the rest follow it.
    """
    kept: list[Block] = []
    for block in Kernel.of(sch).blocks:
        if is_reduction(sch, block):
            continue
        feeds_pack = any(packs(sch, consumer) for consumer in sch.get_consumers(block))
        if packs(sch, block) or feeds_pack or writes_output(sch, block):
            kept.append(block)
        else:
            sch.compute_inline(block)
    return kept


def in_place(func: tirx.PrimFunc) -> list[list[int]]:
    """Pairs (input, output) of parameters that may be one piece of memory, see `emit.plan.Step`.

    The input is read by one block alone, at the very index at which that block writes the output.
    """
    found: list[s_tir.SBlock] = []
    tvm_ffi.structural_walk(func.body, (s_tir.SBlock, found.append))
    inner = [block for block in found if block.name_hint != "root"]
    pairs: list[list[int]] = []
    for o, output in enumerate(func.params):
        writers = [block for block in inner if any(w.source.same_as(output) for w in block.writes)]
        if len(writers) != 1:
            continue
        (write,) = [w for w in writers[0].writes if w.source.same_as(output)]
        for i, operand in enumerate(func.params):
            readers = [block for block in inner if any(r.source.same_as(operand) for r in block.reads)]
            if i == o or len(readers) != 1 or not readers[0].same_as(writers[0]):
                continue
            reads = [r for r in readers[0].reads if r.source.same_as(operand)]
            if len(reads) == 1 and _same_element(reads[0], write):
                pairs.append([i, o])
    return pairs


def _same_element(read: object, write: object) -> bool:
    """Whether two regions are the same single element of tensors of one type."""
    a, b = read.source, write.source  # type: ignore[attr-defined]
    if str(a.dtype) != str(b.dtype) or [int(e) for e in a.shape] != [int(e) for e in b.shape]:
        return False
    ranges = zip(read.region, write.region, strict=True)  # type: ignore[attr-defined]
    return all(tvm_ffi.structural_equal(r.min, w.min) and int(r.extent) == int(w.extent) == 1 for r, w in ranges)
