"""Float convolutions on packed weights: what the layers that stay float are made of."""

from __future__ import annotations

from tvm import te

from horq_tvm.ops import Geometry


def conv2d(x: te.Tensor, weight: te.Tensor, geometry: Geometry, channels: int) -> te.Tensor:
    """x float32 [N,H,W,C] (padded), weight [G,B,kh,kw,C/G,v] → float32 [N,HO,WO,F]."""
    batch, height, width = (int(e) for e in x.shape[:3])
    groups, blocks, kh, kw, inner, lanes = (int(e) for e in weight.shape)
    (sy, sx), (dy, dx) = geometry.strides, geometry.dilation
    ry, rx, rc = te.reduce_axis((0, kh), "ry"), te.reduce_axis((0, kw), "rx"), te.reduce_axis((0, inner), "rc")
    out = geometry.output_size(height, width)
    acc = te.compute(
        (batch, *out, groups, blocks, lanes),
        lambda n, y, x_, g, b, v: te.sum(
            x[n, y * sy + ry * dy, x_ * sx + rx * dx, g * inner + rc] * weight[g, b, ry, rx, rc, v], axis=[ry, rx, rc]
        ),
        name="multiply0",
    )
    per_group = channels // groups
    return te.compute(
        (batch, *out, channels),
        lambda n, y, x_, f: (
            acc[n, y, x_, f // per_group, (f % per_group) // lanes, (f % per_group) % lanes]
            if groups > 1
            else acc[n, y, x_, 0, f // lanes, f % lanes]
        ),
        name="conv2d",
    )


def depthwise(x: te.Tensor, weight: te.Tensor, geometry: Geometry) -> te.Tensor:
    """x float32 [N,H,W,C] (padded), weight [kh,kw,C] → float32 [N,HO,WO,C]."""
    batch, height, width, channels = (int(e) for e in x.shape)
    kh, kw, _ = (int(e) for e in weight.shape)
    (sy, sx), (dy, dx) = geometry.strides, geometry.dilation
    ry, rx = te.reduce_axis((0, kh), "ry"), te.reduce_axis((0, kw), "rx")
    return te.compute(
        (batch, *geometry.output_size(height, width), channels),
        lambda n, y, x_, c: te.sum(x[n, y * sy + ry * dy, x_ * sx + rx * dx, c] * weight[ry, rx, c], axis=[ry, rx]),
        name="depthwise",
    )
