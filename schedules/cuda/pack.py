"""Binarisation on a warp: a lane is a channel, and the ballot of the lanes is a word of a plane.

A ballot needs every lane, so the block that takes it must run also where a tile reaches beyond the pixels: the
predicate that a schedule then puts around the block `everywhere` moves to where the block reads and writes.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm_ffi
from tvm import s_tir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from horq_tvm.ops import WORD_BITS
from horq_tvm.schedules.binarize import Binarization, arguments

from .threads import ZERO, index, wide

PACK = "pack"
RESIDUAL = "residual"


def binarize(spec: Binarization) -> tirx.PrimFunc:
    """x float32 [N,H,W,C], β float32, factor and addend float32 [C] → planes uint32 `spec.output_shape`.

    One block over pixels, words, and lanes; of the last word of a group that is no whole one, lanes read nothing.
    """
    with IRBuilder() as builder, T.prim_func(private=True, s_tir=True):
        (x, beta, *line), planes = arguments(spec)
        batch, height, width, groups, count, words = spec.output_shape
        extents = wide((batch, height, width, groups * words, WORD_BITS))
        with T.grid(*extents) as loops, T.sblock(PACK):
            n, y, x_, word, lane = (T.axis.spatial(e, v, "int64") for e, v in zip(extents, loops, strict=True))
            tail = spec.group_channels % WORD_BITS
            group, j = tirx.floordiv(word, words), tirx.floormod(word, words)
            channel = group * spec.group_channels + j * WORD_BITS + lane if tail else word * WORD_BITS + lane
            there = j * WORD_BITS + lane < spec.group_channels if tail else None
            row = n if spec.scale == "sample" else index(0)
            T.reads(x[n, y, x_, channel], beta[row, 0 : spec.order], *(operand[channel] for operand in line))
            T.writes(planes[n, y, x_, group, 0:count, j])
            value = x[n, y, x_, channel]
            if line:
                value = value * line[0][channel] + line[1][channel]
            scales = [beta[row, index(k)] for k in range(spec.order)]
            words_of_planes = _ballots(value, scales, spec.first, there)
            for p, found in enumerate(words_of_planes):
                with T.If(lane == 0), T.Then():
                    T.buffer_store(planes, found, [n, y, x_, group, index(p), j])
    return builder.get()


def _ballots(value: tirx.Expr, scales: Sequence[tirx.Expr], first: int, there: tirx.Expr | None) -> list[tirx.Expr]:
    """The words of the stored planes; R_i = R_{i-1} − β_i·H_i, rounded after each subtraction."""
    residual = _named(RESIDUAL, value if there is None else T.if_then_else(there, value, ZERO))
    words = []
    for k, beta in enumerate(scales):
        positive = residual >= ZERO
        if k >= first:
            asked = positive if there is None else tirx.all(there, positive)
            words.append(_named("bits", T.call_extern("uint32", "horq_ballot", asked), "uint32"))
        if k + 1 < len(scales):
            # A plane before `first` is known to be all +1.
            step = beta if k < first else tirx.Select(positive, beta, -beta)
            residual = _named("rest", residual - step)
    return words


def _named(name: str, value: tirx.Expr, dtype: str = "float32") -> tirx.Var:
    """The value once. No buffer: TVM counts it as read from outside as soon as anything is inlined into the block."""
    return T.bind(value, var=tirx.Var(name, dtype))


def everywhere(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function with the predicates of `PACK` blocks inside them: around what they read and what they write."""
    return tvm_ffi.structural_map(func, (s_tir.SBlockRealize, _without_predicate))


def _without_predicate(realize: s_tir.SBlockRealize) -> s_tir.SBlockRealize:
    block, predicate = realize.block, realize.predicate
    if not block.name_hint.startswith(PACK) or isinstance(predicate, tirx.IntImm):
        return realize

    def read(bind: tirx.Bind) -> tirx.Bind:
        first = bind.var.name.startswith(RESIDUAL)
        return tirx.Bind(bind.var, tirx.if_then_else(predicate, bind.value, ZERO)) if first else bind

    def write(branch: tirx.IfThenElse) -> tirx.IfThenElse:
        return tirx.IfThenElse(tirx.all(predicate, branch.condition), branch.then_case, branch.else_case)

    # The predicate speaks of loops, of which a block may speak where it has no axes of its own.
    axes = {axis.var: value for axis, value in zip(block.iter_vars, realize.iter_values, strict=True)}
    of_loops = (tirx.Var, lambda var: axes.get(var, var))
    body, reads, writes = (tvm_ffi.structural_map(part, of_loops) for part in (block.body, block.reads, block.writes))
    body = tvm_ffi.structural_map(body, ((tirx.Bind, read), (tirx.IfThenElse, write)))
    alloc, match, notes = block.alloc_buffers, block.match_buffers, block.annotations
    inside = s_tir.SBlock([], reads, writes, block.name_hint, body, None, alloc, match, notes)
    return s_tir.SBlockRealize([], tirx.const(True, "bool"), inside)
