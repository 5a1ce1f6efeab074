"""`patch` in training: every window by its own scales, gradients by autograd through a plain unfold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from horq_tvm.nn import patch
from horq_tvm.nn.patch import Window, patch_conv2d
from horq_tvm.nn.quantise import ResidualQuantise, quantise
from horq_tvm.torch_ops import im2col, residual_scales

torch.set_num_threads(1)

WINDOWS = [
    Window((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    Window((3, 2), (2, 1), (1, 0, 2, 1), (1, 2), 2),
    Window((1, 1), (2, 3), (0, 0, 0, 0), (1, 1), 1),  # some pixels are in no window
    Window((2, 2), (3, 3), (0, 0, 0, 1), (1, 1), 4),
]


def _operands(window: Window, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x[3,8,9,10], a weight of 12 filters, and a cotangent."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 8, 9, 10, generator=generator)
    weight = torch.randn(12, 8 // window.groups, *window.kernel, generator=generator)
    return x, weight, torch.randn(3, 12, *window.outputs(x), generator=generator)


def _columns(x: Tensor, window: Window) -> Tensor:
    return im2col(x, window.kernel, window.stride, window.padding, window.dilation, window.groups)


def _clear(columns: Tensor, scales: Tensor) -> Tensor:
    """The windows [N,G,P] in which no residual is so close to 0 that its sign may fall either way."""
    residual, clear = columns, torch.ones(columns.shape[0], columns.shape[1], columns.shape[3], dtype=torch.bool)
    for scale in scales[:-1]:
        residual = residual - torch.copysign(scale, residual)
        clear &= (residual.abs() > 1e-5 * scales[0]).all(2)
    assert clear.float().mean() > 0.9
    return clear


def _product(columns: Tensor, weight: Tensor, window: Window, like: Tensor) -> Tensor:
    return (weight.reshape(window.groups, -1, weight[0].numel()) @ columns).reshape(like.shape)


def _gradients(x: Tensor, weight: Tensor, g: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = patch_conv2d(x, weight, None, *arguments)
    y.backward(g.to(y.dtype))
    assert x.grad is not None
    assert weight.grad is not None
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_output_and_weight_gradient(window: Window, order: int) -> None:
    x, weight, g = _operands(window)
    columns = _columns(x, window)
    scales = residual_scales(columns, order, (2,))
    clear = _clear(columns, scales).repeat_interleave(12 // window.groups, 1).reshape(g.shape)
    g = g * clear
    y, _, grad_weight = _gradients(x, weight, g, order, "residual", window)
    weight.requires_grad_()
    expected = _product(quantise(columns, scales), weight, window, g)
    expected.backward(g)
    torch.testing.assert_close(y * clear, expected.detach() * clear, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad_weight, weight.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("window", WINDOWS)
def test_input_gradient_is_that_of_the_convolution_where_all_is_passed(window: Window) -> None:
    x, weight, g = _operands(window)
    _, grad_x, _ = _gradients(x, weight, g, 2, "identity", window)
    x.requires_grad_()
    _product(_columns(x, window), weight, window, g).backward(g)
    torch.testing.assert_close(grad_x, x.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("ste", ["residual", "window", "tanh", "approxsign"])
def test_input_gradient_uses_the_mean_scales_of_the_windows(window: Window, ste: str) -> None:
    x, weight, g = _operands(window)
    _, grad_x, _ = _gradients(x, weight, g, 2, ste, window)
    columns = _columns(x, window)
    scales = residual_scales(columns, 2, (2,))  # [K,N,G,1,P]
    # What a window's scale hands to each of its values, by autograd through the unfold: sums and counts.
    probe = x.clone().requires_grad_()
    unfolded = _columns(probe, window)
    (count,) = torch.autograd.grad(unfolded.sum(), probe, retain_graph=True)
    means = [
        torch.autograd.grad((unfolded * s).sum(), probe, retain_graph=True)[0] / count.clamp(min=1) for s in scales
    ]
    float_x = x.clone().requires_grad_()
    _product(_columns(float_x, window), weight, window, g).backward(g)
    through = x.clone().requires_grad_()
    inside = count > 0
    beta = torch.where(inside, torch.stack(means), 1.0)
    ResidualQuantise.apply(through, beta, ste).backward(float_x.grad)
    torch.testing.assert_close(grad_x, through.grad, rtol=1e-3, atol=1e-3)
    assert (grad_x[~inside] == 0).all()


@pytest.mark.parametrize("ste", ["residual", "tanh"])
def test_input_gradient_is_close_to_that_of_each_windows_own_scales(ste: str) -> None:
    window, generator = WINDOWS[0], torch.Generator().manual_seed(0)
    x = torch.randn(4, 32, 12, 12, generator=generator)
    weight = torch.randn(32, 32, 3, 3, generator=generator)
    g = torch.randn(4, 32, 12, 12, generator=generator)
    _, found, _ = _gradients(x, weight, g, 2, ste, window)
    x.requires_grad_()
    columns = _columns(x, window)
    quantised = ResidualQuantise.apply(columns, residual_scales(columns.detach(), 2, (2,)), ste)
    _product(quantised, weight, window, g).backward(g)
    assert F.cosine_similarity(found.flatten(), x.grad.flatten(), 0) > 0.97


def test_some_images_at_a_time_is_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    window = WINDOWS[1]
    x, weight, g = _operands(window)
    at_once = _gradients(x, weight, g, 3, "residual", window)
    monkeypatch.setattr(patch, "_CHUNK_VALUES", 1)
    for one, other in zip(_gradients(x, weight, g, 3, "residual", window), at_once, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_bfloat16_under_autocast_has_the_planes_of_float32() -> None:
    """β and the residuals stay float32, so that only the products are rounded."""
    window = WINDOWS[0]
    x, weight, g = _operands(window)
    expected = _gradients(x, weight, g, 3, "residual", window)
    with torch.autocast("cpu", torch.bfloat16):
        y, grad_x, grad_weight = _gradients(x, weight, g, 3, "residual", window)
    assert y.dtype == torch.bfloat16
    assert grad_x.dtype == grad_weight.dtype == torch.float32
    for found, exact in zip((y.float(), grad_x, grad_weight), expected, strict=True):
        assert (found - exact).abs().max() <= 0.02 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_residual_of_zero_has_the_sign_plus(dtype: torch.dtype) -> None:
    """1, 2, 3 with β_1 = 2 leave −1, 0, 1, of which β_2 = 2/3 makes −2/3, 2/3, 2/3; negated, they leave 1, 0, −1."""
    x = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1) * torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1)
    weight = torch.eye(3).reshape(3, 3, 1, 1)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = patch_conv2d(x, weight, None, 2, "residual", Window((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1))
    expected = torch.tensor([[4 / 3, 8 / 3, 8 / 3], [-4 / 3, -4 / 3, -8 / 3]])
    torch.testing.assert_close(y.flatten(1).float(), expected, rtol=1e-2, atol=0)
