"""HORQ-aware training in PyTorch: layers that take the place of `nn.Conv2d` and `nn.Linear`, and what goes with them.

    Y = α · Σ_i β_i · (H_i ∗ B) + bias,    B = sign(W),  α_f = mean|W_f|,  H_i = sign(R_{i-1}),  R_i = R_{i-1} − β_i·H_i

(High-Order Residual Quantization, Li et al., ICCV 2017.) In training a layer is one float convolution of X̂ = Σ β_i·H_i
with α·B, with straight-through gradients. In eval it is `torch.ops.horq.horq_conv2d` or `horq_linear`, plane by plane,
which is what `torch.export` keeps and what the compiler reproduces. `docs/training.md` says how to use it.
"""

from horq_tvm.nn.activations import PReLU, RPReLU, RSign
from horq_tvm.nn.convert import convert
from horq_tvm.nn.error import LayerError, quantisation_error
from horq_tvm.nn.layers import HorqConv2d, HorqLayer, HorqLinear
from horq_tvm.nn.memory import keep_freed_memory
from horq_tvm.nn.quantise import MIN_BETA, STES
from horq_tvm.nn.states import freeze, freeze_scales, warm_start

__all__ = [
    "MIN_BETA",
    "STES",
    "HorqConv2d",
    "HorqLayer",
    "HorqLinear",
    "LayerError",
    "PReLU",
    "RPReLU",
    "RSign",
    "convert",
    "freeze",
    "freeze_scales",
    "keep_freed_memory",
    "quantisation_error",
    "warm_start",
]
