"""The bitserial convolution: XOR, popcount, and the affine that turns integers into activations.

One reduction a plane, weights shared, so that the accumulators of one plane at a time live in registers:

    acc_p[n,y,x,g,b,l] = start[class(y), class(x), g, b·v+l]
                         + Σ_{ry,rx,c} popcount(planes[…, p, c] ^ weight[g,b,ry,rx,c,l])

`start` makes zero padding exact and costs nothing: it is what the accumulator is set to. With `halved`, acc is −S/2
and the factor is in the constants; otherwise S = 2·start' − … is formed as an integer (see `horq.packed_bitserial`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

from horq_tvm.ops import Geometry


@dataclass(frozen=True)
class Bitserial:
    """One `horq.packed_bitserial` as plain numbers."""

    geometry: Geometry
    channels: int
    order: int
    first: int
    scale: str
    halved: bool
    rows: tuple[int, int]
    columns: tuple[int, int]

    @classmethod
    def of(cls, attrs: Any) -> Bitserial:
        """Of a call's attributes."""
        rows, columns = attrs["rows"], attrs["columns"]
        return cls(
            geometry=Geometry.of(attrs),
            channels=int(attrs["channels"]),
            order=int(attrs["order"]),
            first=int(attrs["first"]),
            scale=str(attrs["scale"]),
            halved=bool(attrs["halved"]),
            rows=(int(rows[0]), int(rows[1])),
            columns=(int(columns[0]), int(columns[1])),
        )


def border_class(position: tirx.Expr, bounds: tuple[int, int]) -> tirx.Expr:
    """`BorderClasses`' closed form: min(y, low) + max(y − high, 0)."""
    low, high = bounds
    return te.min(position, low) + te.max(position - high, 0)


def bitserial(
    spec: Bitserial, planes: te.Tensor, weight: te.Tensor, start: te.Tensor, *factors: te.Tensor
) -> te.Tensor:
    """→ float32 [N,HO,WO,F]; operands as `horq.packed_bitserial` lists them, words side by side."""
    counts = [_popcount(spec, p, planes, weight) for p in range(spec.order - spec.first)]
    return from_counts(spec, counts, start, *factors)


def from_counts(spec: Bitserial, counts: Sequence[te.Tensor], start: te.Tensor, *factors: te.Tensor) -> te.Tensor:
    """→ float32 [N,HO,WO,F]; counts: per plane the popcounts over the windows, an integer [N,HO,WO,G,B,v]."""
    sums = [_sum(spec, p, count, start) for p, count in enumerate(counts)]
    finish = _static if spec.scale == "static" else _dynamic
    return finish(spec, sums, factors, int(counts[0].shape[5]))


def _popcount(spec: Bitserial, p: int, planes: te.Tensor, weight: te.Tensor) -> te.Tensor:
    """int32 [N,HO,WO,G,B,v]: the differing bits of plane p."""
    batch, height, width = (int(e) for e in planes.shape[:3])
    groups, blocks, kh, kw, words, lanes = (int(e) for e in weight.shape)
    (sy, sx), (dy, dx) = spec.geometry.strides, spec.geometry.dilation
    ry, rx, rc = te.reduce_axis((0, kh), "ry"), te.reduce_axis((0, kw), "rx"), te.reduce_axis((0, words), "rc")
    extents = (batch, *spec.geometry.output_size(height, width), groups, blocks, lanes)

    def differing_bits(n, y, x, g, b, v):  # type: ignore[no-untyped-def]
        word = planes[n, y * sy + ry * dy, x * sx + rx * dx, g, p, rc] ^ weight[g, b, ry, rx, rc, v]
        return te.sum(tirx.popcount(word).astype("int32"), axis=[ry, rx, rc])

    return te.compute(extents, differing_bits, name=f"popcount{p}")


def _sum(spec: Bitserial, p: int, count: te.Tensor, start: te.Tensor) -> te.Tensor:
    """The integer of plane p: −S/2 if halved, else S."""
    extents = tuple(int(e) for e in count.shape)
    lanes = extents[5]

    def number(*index):  # type: ignore[no-untyped-def]
        value = count[index]
        return value if value.dtype == "int32" else value.astype("int32")

    def border(y, x, g, b, v):  # type: ignore[no-untyped-def]
        return start[border_class(y, spec.rows), border_class(x, spec.columns), g, b * lanes + v]

    if spec.halved:
        return te.compute(
            extents, lambda n, y, x, g, b, v: number(n, y, x, g, b, v) + border(y, x, g, b, v), name=f"start{p}"
        )
    return te.compute(
        extents, lambda n, y, x, g, b, v: border(y, x, g, b, v) - 2 * number(n, y, x, g, b, v), name=f"sum{p}"
    )


def _integer(spec: Bitserial, sums: Sequence[te.Tensor], p: int, index: tuple[Any, ...], lanes: int) -> tirx.Expr:
    """The integer of plane p at NHWC index, as float32."""
    n, y, x, f = index
    per_group = spec.channels // spec.geometry.groups
    if spec.geometry.groups == 1:
        return sums[p][n, y, x, 0, f // lanes, f % lanes].astype("float32")
    inner = f % per_group
    return sums[p][n, y, x, f // per_group, inner // lanes, inner % lanes].astype("float32")


def _static(spec: Bitserial, sums: Sequence[te.Tensor], factors: Sequence[te.Tensor], lanes: int) -> te.Tensor:
    """Σ_p scale[p,f]·acc_p + addend, one FMA a plane."""
    scale, addend = factors

    def affine(n, y, x, f):  # type: ignore[no-untyped-def]
        bordered = int(addend.shape[0]) * int(addend.shape[1]) > 1
        rows, columns = (border_class(y, spec.rows), border_class(x, spec.columns)) if bordered else (0, 0)
        value = addend[rows, columns, f]
        for p in range(len(sums)):
            value = _integer(spec, sums, p, (n, y, x, f), lanes) * scale[p, f] + value
        return value

    return te.compute((*(int(e) for e in sums[0].shape[:3]), spec.channels), affine, name="bitserial")


def _dynamic(spec: Bitserial, sums: Sequence[te.Tensor], factors: Sequence[te.Tensor], lanes: int) -> te.Tensor:
    """alpha·(Σ β_i·acc_i) + bias with the β of the image or the patch."""
    alpha, bias, beta = factors[:3]
    per_group = spec.channels // spec.geometry.groups

    def affine(n, y, x, f):  # type: ignore[no-untyped-def]
        group = f // per_group if spec.geometry.groups > 1 else 0
        index = (n,) if spec.scale == "sample" else (n, y, x, group)
        total = None
        if spec.first:
            first_sum = factors[3][border_class(y, spec.rows), border_class(x, spec.columns), f]
            total = beta(*index, 0) * first_sum
        for p in range(len(sums)):
            term = beta(*index, p + spec.first) * _integer(spec, sums, p, (n, y, x, f), lanes)
            total = term if total is None else total + term
        return alpha[f] * total + bias[f]

    return te.compute((*(int(e) for e in sums[0].shape[:3]), spec.channels), affine, name="bitserial")
