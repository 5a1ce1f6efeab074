"""The PyTorch layers against the reference, and their gradients against the formulas."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from horq_tvm import reference
from horq_tvm.errors import UsageError
from horq_tvm.nn import MIN_BETA, HorqConv2d, HorqLayer, HorqLinear, freeze
from horq_tvm.nn.options import Beta
from horq_tvm.specs import SCALES, Scale
from horq_tvm.torch_ops import filter_scales, horq_conv2d, horq_linear, planes_of, residual_scales
from tests.networks import binary_weight

torch.set_num_threads(1)


def _random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _fitted(layer: HorqConv2d, x: Tensor) -> HorqConv2d:
    layer.train()(x)
    return layer.eval()


@st.composite
def _drawn_layers(draw: st.DrawFn) -> tuple[HorqConv2d, Tensor]:
    """A layer of any geometry with its β fitted, in eval mode, and an input it takes."""
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, stride, dilation = draw(pair), draw(pair), draw(pair)
    groups = draw(st.sampled_from((1, 2, 3)))
    padding = draw(st.tuples(*[st.integers(0, 2)] * 4))
    size = tuple(d * (k - 1) + 1 + draw(st.integers(0, 4)) for d, k in zip(dilation, kernel, strict=True))
    seed = draw(st.integers(0, 2**20))
    torch.manual_seed(seed)
    layer = HorqConv2d(
        groups * draw(st.integers(1, 20)),
        groups * draw(st.integers(1, 4)),
        kernel,
        stride,
        padding,
        dilation,
        groups,
        draw(st.booleans()),
        order=draw(st.integers(1, 4)),
        scale=draw(st.sampled_from(SCALES)),
        balance=draw(st.booleans()),
    )
    x = _random(draw(st.integers(1, 3)), layer.in_channels, *size, seed=seed)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return _fitted(layer, x), x


def _reference(layer: HorqConv2d, x: Tensor, **changed: Any) -> reference.HorqResult:
    weight, alpha = binary_weight(layer)
    operands = {
        "alpha": alpha,
        "beta": None if layer.beta is None else layer.beta.detach().numpy(),
        "bias": None if layer.bias is None else layer.bias.detach().numpy(),
        **changed,
    }
    return reference.conv2d(
        x.numpy(),
        weight,
        **operands,
        order=layer.order,
        scale=layer.scale,
        strides=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
    )


@settings(max_examples=60, deadline=None)
@given(_drawn_layers())
def test_eval_is_the_reference(drawn: tuple[HorqConv2d, Tensor]) -> None:
    layer, x = drawn
    expected = _reference(layer, x)
    with torch.no_grad():
        y = layer(x).numpy()
    assert y.shape == expected.output.shape
    apart = np.abs(y - expected.output) > expected.tolerance
    assert not np.any(apart & ~expected.doubtful)


@settings(max_examples=40, deadline=None)
@given(_drawn_layers())
def test_sums_are_exact_integers(drawn: tuple[HorqConv2d, Tensor]) -> None:
    """With β = 1, |W| = 1 and no bias the output is Σ S_i, and must be equal."""
    layer, x = drawn
    x = (x * 4).round()  # every residual is an exact integer, so that no sign is in doubt but that of 0
    ones = np.ones(layer.order, np.float32)
    weight, _ = binary_weight(layer)
    unit = np.ones(layer.out_channels, np.float32)
    planes, _ = reference.residual_binarize(x.numpy(), layer.order, ones)
    sums = reference.conv2d_sums(
        planes, weight, strides=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups
    )
    y = horq_conv2d(
        x,
        torch.from_numpy(weight).float(),
        torch.from_numpy(unit),
        torch.from_numpy(ones),
        None,
        layer.order,
        "static",
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
    )
    np.testing.assert_array_equal(y.numpy(), sums.sum(0))


@settings(max_examples=30, deadline=None)
@given(_drawn_layers())
def test_training_computes_what_eval_does(drawn: tuple[HorqConv2d, Tensor]) -> None:
    layer, x = drawn
    with torch.no_grad():
        trained, inferred = layer.train()(x), layer.eval()(x)
    clear = torch.from_numpy(~_reference(layer, x).doubtful)
    torch.testing.assert_close(trained[clear], inferred[clear], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", [(40,), (4, 40), (2, 3, 40), (2, 3, 2, 40)])
def test_dense_layer_is_the_reference_in_training_and_eval(scale: Scale, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer, x = HorqLinear(40, 7, bias=True, order=3, scale=scale), _random(*shape)
    nn.init.normal_(layer.bias)
    trained = layer.train()(x)
    weight, alpha = binary_weight(layer)
    beta = None if layer.beta is None else layer.beta.detach().numpy()
    bias = layer.bias.detach().numpy()
    expected = reference.dense(x.numpy(), weight, alpha, beta, bias, order=3, scale=scale)
    with torch.no_grad():
        y = layer.eval()(x).numpy()
    assert y.shape == expected.output.shape == trained.shape
    assert not expected.doubtful.all()
    assert not np.any((np.abs(y - expected.output) > expected.tolerance) & ~expected.doubtful)
    clear = ~expected.doubtful
    np.testing.assert_allclose(trained.detach().numpy()[clear], y[clear], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", SCALES)
def test_dense_layer_of_one_pixel_is_the_convolution(scale: Scale) -> None:
    torch.manual_seed(0)
    dense, conv = HorqLinear(20, 6, order=2, scale=scale), HorqConv2d(20, 6, 1, order=2, scale=scale)
    conv.weight.data.copy_(dense.weight.data[..., None, None])
    rows, gradients = _random(5, 20, scale=1.5), []
    for layer, x in ((dense, rows), (conv, rows[..., None, None])):
        x = x.clone().requires_grad_()
        layer.train()(x).square().sum().backward()
        gradients.append([g.flatten() for g in (x.grad, *(p.grad for p in layer.parameters()))])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_autocast_rounds_the_products_alone(scale: Scale, kind: str) -> None:
    torch.manual_seed(0)
    layer = HorqConv2d(16, 8, 3, padding=1, scale=scale) if kind == "conv" else HorqLinear(16, 8, scale=scale)
    x = _random(4, 16, 6, 6) if kind == "conv" else _random(4, 16)
    plain = layer(x)
    beta = None if layer.beta is None else layer.beta.detach().clone()
    for fed in (x, x.bfloat16()):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(fed)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert (layer(x).float() - plain).abs().max() <= 0.02 * plain.abs().max()
    if beta is not None:
        assert torch.equal(layer.beta.detach(), beta)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_input_that_is_not_finite_is_named(scale: Scale, mode: str, value: float) -> None:
    """Its sign would be a number like any other."""
    x = _random(2, 4, 5, 5)
    layer = _fitted(HorqConv2d(4, 3, 3, scale=scale), x).train(mode == "train")
    x[1, 2, 3, 4] = value
    with pytest.raises(UsageError, match="input of a HORQ layer holds 1 NaN or infinite values; accepted: finite"):
        layer(x)


def test_numbers_whose_sum_overflows_are_finite() -> None:
    layer = HorqConv2d(4, 3, 3, scale="sample").eval()
    with torch.no_grad():
        assert layer(torch.full((1, 4, 3, 3), 3e38)).shape == (1, 3, 1, 1)


@pytest.mark.parametrize("scale", ["sample", "static"])
@pytest.mark.parametrize("shape", [(40,), (4, 40), (2, 3, 40)])
def test_linear_is_the_reference(scale: str, shape: tuple[int, ...]) -> None:
    x, weight, bias = _random(*shape), _random(7, 40, seed=1), _random(7, seed=2)
    binary, alpha = reference.binarize_weights(weight.numpy())
    beta = np.array([0.8, 0.4, 0.2], np.float32) if scale == "static" else None
    expected = reference.dense(x.numpy(), binary, alpha, beta, bias.numpy(), order=3, scale=scale)
    constants = [None if v is None else torch.from_numpy(np.asarray(v, np.float32)) for v in (binary, alpha, beta)]
    y = horq_linear(x, *constants, bias, 3, scale).numpy()
    assert not np.any((np.abs(y - expected.output) > expected.tolerance) & ~expected.doubtful)


def test_negative_zero_and_zero_have_sign_plus() -> None:
    x = torch.tensor([[0.0, -0.0, 1.0, -1.0]])
    assert next(planes_of(x, torch.tensor([0.5]))).tolist() == [[1.0, 1.0, 1.0, -1.0]]
    assert torch.equal(residual_scales(torch.zeros(2, 3), 2, (1,)), torch.zeros(2, 2, 1))


def test_scales_are_the_reference_bit_for_bit() -> None:
    x = _random(3, 24, 9, 9)
    scales = residual_scales(x, 4, (1, 2, 3)).flatten(1).T.numpy()
    np.testing.assert_array_equal(scales, reference.sample_scales(x.numpy(), 4))
    weight = _random(5, 24, 3, 3)
    np.testing.assert_array_equal(filter_scales(weight).numpy(), reference.binarize_weights(weight.numpy())[1])


# Gradients ------------------------------------------------------------------------------------------------------------


def _backward(layer: HorqConv2d, x: Tensor, cotangent: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (layer(x) * cotangent).sum().backward()
    assert x.grad is not None
    return x.grad


def _scales(layer: HorqLayer, x: Tensor) -> Tensor:
    """β of `static` or `sample`, [K,...] broadcasting against a conv's x."""
    if layer.beta is None:
        return residual_scales(x, layer.order, (1, 2, 3))
    return layer.beta.detach().reshape(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("scale", ["sample", "static"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_gradients_follow_the_formulas(scale: str, order: int) -> None:
    torch.manual_seed(0)
    layer = HorqConv2d(6, 4, 3, 2, (1, 0, 2, 1), groups=2, bias=True, order=order, scale=scale, balance=False)
    with torch.no_grad():
        layer.weight.mul_(8)  # so that some weights are beyond ±1
    x = _random(2, 6, 8, 8, scale=1.5)
    _fitted(layer, x).train()
    scales = _scales(layer, x)
    planes = torch.stack(list(planes_of(x, scales)))
    cotangent = _random(*layer(x).shape, seed=3)

    # The gradients of the one convolution inside, by PyTorch.
    quantised = (scales * planes).sum(0).requires_grad_()
    signs = torch.where(layer.weight >= 0, 1.0, -1.0).detach()
    alpha = layer.weight.detach().abs().mean((1, 2, 3), keepdim=True)
    weight = (alpha * signs).requires_grad_()
    y = F.conv2d(F.pad(quantised, (0, 1, 1, 2)), weight, None, 2, 0, 1, 2)
    (y * cotangent).sum().backward()

    grad_x = _backward(layer, x, cotangent)
    inside = x.abs() <= scales.sum(0) + scales[-1]
    assert 0 < inside.float().mean() < 1
    torch.testing.assert_close(grad_x, quantised.grad * inside, rtol=1e-4, atol=1e-5)

    # ∂/∂W = α·g·1[|W| <= 1] + sign(W)·mean(g·B), g being the gradient of α·B.
    g = weight.grad
    expected = alpha * g * (layer.weight.abs() <= 1) + signs * (g * signs).mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(layer.weight.grad, expected.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, cotangent.sum((0, 2, 3)), rtol=1e-4, atol=1e-4)
    if layer.beta is not None:
        torch.testing.assert_close(layer.beta.grad, (planes * quantised.grad).flatten(1).sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", ["sample", "static"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_compiled_training_is_one_graph_and_the_same(scale: Scale, order: int) -> None:
    """With β there, nothing in a training step makes `torch.compile` fall back to Python."""
    torch.compiler.reset()
    layer = HorqConv2d(6, 4, 3, 2, 1, order=order, scale=scale)
    x, cotangent = _random(2, 6, 8, 8, scale=1.5), _random(2, 4, 4, 4, seed=3)
    _fitted(layer, x).train()
    expected_x = _backward(layer, x, cotangent)
    expected = {name: value.grad.clone() for name, value in layer.named_parameters()}
    layer.zero_grad()
    found_x = _backward(torch.compile(layer, fullgraph=True, dynamic=False, backend="aot_eager"), x, cotangent)
    torch.testing.assert_close(found_x, expected_x)
    for name, value in layer.named_parameters():
        torch.testing.assert_close(value.grad, expected[name])


def test_gradient_of_beta_is_that_of_finite_differences() -> None:
    """Between two changes of a sign the output is linear in β, so that a difference quotient is the derivative."""
    torch.manual_seed(0)
    layer = HorqConv2d(3, 2, 3, padding=1, order=2, scale="static")
    x = torch.tensor([-2.0, -1.5, -0.9, -0.3, 0.3, 0.9, 1.5, 2.0])[torch.randint(8, (1, 3, 5, 5))]
    _fitted(layer, x).train()
    layer.beta.data = torch.tensor([1.1, 0.4])
    cotangent = _random(*layer(x).shape)
    _backward(layer, x, cotangent)
    for i in range(2):
        values = []
        for step in (0.03, -0.03):
            moved = copy.deepcopy(layer)
            moved.beta.data[i] += step
            values.append((moved(x) * cotangent).sum().item())
        assert (values[0] - values[1]) / 0.06 == pytest.approx(layer.beta.grad[i].item(), rel=1e-3, abs=1e-3)


def test_beta_stays_positive() -> None:
    x = _random(2, 3, 5, 5)
    layer = _fitted(HorqConv2d(3, 2, 3, order=2, scale="static"), x)
    layer.train().beta.data[1] = -0.5
    same = copy.deepcopy(layer)
    same.beta.data[1] = MIN_BETA
    assert torch.equal(layer(x), same(x))
    layer.eval()
    assert layer.beta[1].item() == pytest.approx(MIN_BETA)

    layer.train()
    cotangent = _random(*layer(x).shape)
    signs = []
    for direction in (1, -1):
        layer.beta.grad = None
        _backward(layer, x, direction * cotangent)
        signs.append(layer.beta.grad[1].item())
    # What would raise it passes, what would lower it does not.
    assert min(signs) < 0
    assert max(signs) == 0


def test_training_learns() -> None:
    """A student of the teacher's form gets most of the teacher's variance within a few steps, its β included."""
    torch.manual_seed(0)
    teacher = _fitted(HorqConv2d(8, 8, 3, padding=1, order=2, scale="static"), _random(4, 8, 8, 8))
    student = HorqConv2d(8, 8, 3, padding=1, order=2, scale="static")
    optimiser = torch.optim.Adam(student.parameters(), 0.01)
    losses = []
    for step in range(150):
        x = _random(4, 8, 8, 8, seed=step)
        with torch.no_grad():
            target = teacher(x)
        loss = F.mse_loss(student(x), target) / target.var()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 0.8
    assert np.mean(losses[-10:]) < 0.4


# State ----------------------------------------------------------------------------------------------------------------


def test_static_fits_beta_to_its_first_batch() -> None:
    torch.manual_seed(0)
    layer = HorqConv2d(3, 2, 3, order=3, scale="static")
    with pytest.raises(UsageError, match="no beta yet"):
        layer.eval()(torch.zeros(1, 3, 5, 5))
    x = _random(8, 3, 16, 16)
    layer.train()(x)
    fitted = layer.beta.detach().clone()

    def error(beta: Tensor) -> float:
        _, rest = reference.residual_binarize(x.numpy(), 3, beta.reshape(3, 1, 1, 1, 1).numpy())
        return float(np.square(rest, dtype=np.float64).sum())

    means = residual_scales(x.reshape(1, -1), 3, (1,)).flatten()
    assert error(fitted) < 0.8 * error(means)
    layer(3 * x)
    assert torch.equal(layer.beta.detach(), fitted)


@pytest.mark.parametrize("scale", ["sample", "static"])
def test_state_dict_round_trip(scale: str) -> None:
    torch.manual_seed(0)
    x = _random(2, 4, 6, 6)
    layer = _fitted(HorqConv2d(4, 3, 3, bias=True, order=2, scale=scale), x)
    state = layer.state_dict()
    assert set(state) == {"weight", "bias"} | ({"beta"} if scale == "static" else set())
    other = HorqConv2d(4, 3, 3, bias=True, order=2, scale=scale).eval()
    other.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(other(x), layer(x))
        # The loaded β is kept by training, too, not fitted anew.
        assert torch.equal(other.train()(5 * x), layer.train()(5 * x))


@pytest.mark.parametrize("mode", ["learned", "running"])
def test_running_scales_follow_the_batches_and_learned_ones_do_not(mode: Beta) -> None:
    torch.manual_seed(0)
    layer = HorqConv2d(4, 3, 3, scale="static", beta=mode)
    for step in range(60):
        layer.train()(_random(4, 4, 8, 8, seed=step, scale=1.0 if step == 0 else 3.0))
    once, thrice = (HorqConv2d(4, 3, 3, scale="static") for _ in range(2))
    once(_random(4, 4, 8, 8, seed=0))
    thrice(_random(64, 4, 8, 8, seed=1, scale=3.0))
    followed = thrice if mode == "running" else once
    torch.testing.assert_close(layer.beta.detach(), followed.beta.detach(), rtol=0.1, atol=0)
    assert layer.beta.requires_grad == (mode == "learned")


def test_beta_that_was_never_fitted_loads_as_such() -> None:
    layer = HorqConv2d(4, 3, 3, scale="static")
    layer.load_state_dict(HorqConv2d(4, 3, 3, scale="static").state_dict())
    with pytest.raises(UsageError, match="no beta yet"):
        freeze(nn.Sequential(layer))


def test_weights_changed_during_eval_count() -> None:
    layer, x = HorqConv2d(4, 3, 3, scale="sample").eval(), _random(1, 4, 5, 5)
    with torch.no_grad():
        before = layer(x)
        layer.weight.mul_(-2)
        torch.testing.assert_close(layer(x), -2 * before)


def test_inference_mode_leaves_the_layer_trainable() -> None:
    layer, x = HorqConv2d(4, 3, 3, scale="static"), _random(1, 4, 5, 5)
    _fitted(layer, x)
    with torch.inference_mode():
        layer(x)
    layer.train()(x).sum().backward()
    assert layer.weight.grad is not None
    assert layer.beta.grad is not None


def test_freeze_keeps_what_inference_needs() -> None:
    torch.manual_seed(0)
    x = _random(2, 4, 6, 6)
    model = nn.Sequential(HorqConv2d(4, 3, 3, scale="static"), HorqConv2d(3, 3, 3, scale="sample"))
    model.train()(x)
    frozen = freeze(model)
    assert model.training
    assert model[0].weight is not None
    assert set(frozen.state_dict()) == {"0.beta", "0.weight_sign", "0.alpha", "1.weight_sign", "1.alpha"}
    assert frozen[0].weight_sign.abs().eq(1).all()
    with torch.no_grad():
        assert torch.equal(frozen(x), model.eval()(x))
    with pytest.raises(UsageError, match="no latent weights"):
        frozen.train()


# The operators as torch.export sees them ------------------------------------------------------------------------------


def _operands(scale: str = "static") -> dict[str, Any]:
    return {
        "x": _random(2, 4, 7, 6),
        "weight": _random(6, 2, 3, 2).sign(),
        "alpha": torch.rand(6),
        "beta": torch.tensor([0.8, 0.4]) if scale == "static" else None,
        "bias": _random(6, seed=1),
        "order": 2,
        "scale": scale,
        "stride": [2, 1],
        "padding": [1, 0, 2, 1],
        "dilation": [1, 2],
        "groups": 2,
    }


@pytest.mark.parametrize("scale", SCALES)
def test_operators_are_well_formed(scale: str) -> None:
    operands = _operands(scale)
    torch.library.opcheck(horq_conv2d, tuple(operands.values()))
    for shape in ((3, 5), (3, 4, 5)):
        beta, bias = operands["beta"], operands["bias"]
        torch.library.opcheck(
            horq_linear, (_random(*shape), _random(6, 5).sign(), operands["alpha"], beta, bias, 2, scale)
        )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"order": 0}, "order 0; accepted are 1 to 8"),
        ({"order": 9}, "order 9; accepted are 1 to 8"),
        ({"scale": "image"}, "scale 'image'; accepted are patch, sample, static"),
        ({"scale": "patch"}, "beta is given with scale 'patch'"),
        ({"beta": None}, "beta is missing with scale 'static'"),
        ({"scale": "sample"}, "beta is given with scale 'sample'"),
        ({"order": 3}, r"beta has shape \[2\]; accepted: \[3\]"),
        ({"alpha": torch.ones(5)}, r"alpha has shape \[5\]; accepted: \[6\]"),
        ({"bias": torch.ones(1)}, r"bias has shape \[1\]"),
        ({"x": torch.ones(2, 4, 7, 6, dtype=torch.float64)}, "x is torch.float64; accepted: torch.float32"),
        ({"x": torch.ones(4, 7, 6)}, "accepted are x"),
        ({"groups": 1}, "1 groups; accepted are x"),
    ],
)
def test_operator_names_a_mistake(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        horq_conv2d(**_operands() | changed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 0}, "kernel_size=0; accepted"),
        ({"padding": (1, 2, 3)}, r"padding=\(1, 2, 3\); accepted: an int or 2 or 4 ints, each >= 0"),
        ({"padding": -1}, "padding=-1"),
        ({"stride": (1, 2, 3, 4)}, "stride"),
        ({"groups": 3}, "groups=3 does not divide"),
        ({"order": 100}, "order 100"),
        ({"scale": "image"}, "scale 'image'; accepted are patch, sample, static"),
        ({"order": 0}, "order 0; accepted are 1 to 8"),
        ({"order": True}, "order True; accepted are 1 to 8"),
        ({"order": 1.5}, "order 1.5; accepted are 1 to 8"),
        ({"ste": "hard"}, "ste 'hard'; accepted are residual, window, approxsign, tanh, identity"),
        ({"beta": "fixed"}, "beta 'fixed'; accepted are learned, running"),
    ],
)
def test_layer_names_a_mistake(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        HorqConv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3} | arguments)


def test_padding_of_a_pair_is_vertical_then_horizontal() -> None:
    layer = HorqConv2d(2, 2, (3, 1), padding=(1, 0))
    assert layer.padding == (1, 0, 1, 0)
    assert layer(torch.zeros(1, 2, 5, 7)).shape == (1, 2, 5, 7)
