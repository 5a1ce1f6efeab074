"""ReActNet's activations against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from horq_tvm.nn import HorqConv2d, PReLU, RPReLU, RSign


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 4), (3, 5, 4, 2)])
def test_shifts_and_slopes_are_per_channel(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, act, shift = torch.randn(shape), RPReLU(5), RSign(5)
    for parameter in (*act.parameters(), *shift.parameters()):
        nn.init.normal_(parameter)
    for c in range(5):
        v = x[:, c] - act.before[c]
        expected = torch.where(v > 0, v, act.slope[c] * v) + act.after[c]
        torch.testing.assert_close(act(x)[:, c], expected)
        torch.testing.assert_close(shift(x)[:, c], x[:, c] + shift.shift[c])
    (act(x).sum() + shift(x).sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (*act.parameters(), *shift.parameters()))


def test_a_fresh_one_is_a_prelu_and_nothing() -> None:
    x = torch.randn(2, 5, 3, 3)
    torch.testing.assert_close(RPReLU(5)(x), nn.functional.prelu(x, torch.tensor(0.25)))
    assert torch.equal(RSign(5)(x), x)


def test_the_shift_is_learned_through_the_layer_behind_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(RSign(4), HorqConv2d(4, 3, 3))
    model(torch.randn(2, 4, 5, 5)).square().sum().backward()
    assert model[0].shift.grad.abs().min() > 0


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 4, 2)])
@pytest.mark.parametrize("slopes", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prelu_is_pytorchs_with_its_gradients(shape: tuple[int, ...], slopes: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours, theirs = PReLU(slopes), nn.PReLU(slopes)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    x, g = torch.randn(shape).to(dtype), torch.randn(shape)
    x[0] = 0
    found, expected = x.clone().requires_grad_(), x.float().requires_grad_()
    y, z = ours(found), theirs(expected)
    (y * g).sum().backward()
    (z * g).sum().backward()
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, z)
    torch.testing.assert_close(found.grad, expected.grad.to(dtype))
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.eval()(x.float()), z)
    assert any(n.target is torch.ops.aten.prelu.default for n in torch.export.export(ours, (x.float(),)).graph.nodes)
