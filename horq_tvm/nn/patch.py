"""The convolution of `patch` in training: every window has scales of its own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from horq_tvm.nn.options import Ste
from horq_tvm.nn.quantise import ResidualQuantise
from horq_tvm.torch_ops import im2col, output_size, residual_scales


def patch_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: int,
    ste: Ste,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """x[N,C,H,W] with the float weight α·B [F,C/g,kh,kw] → [N,F,HO,WO], with straight-through gradients."""
    columns = im2col(x.float(), weight.shape[2:], stride, padding, dilation, groups)
    quantised = ResidualQuantise.apply(columns, residual_scales(columns.detach(), order, (2,)), ste)
    y = weight.reshape(groups, -1, weight[0].numel()) @ quantised
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    y = y.reshape(x.shape[0], -1, *size)
    return y if bias is None else y + bias.reshape(-1, 1, 1)
