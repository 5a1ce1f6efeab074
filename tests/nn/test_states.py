"""Scales held fixed, and networks that go on as another order or scale."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from horq_tvm.errors import UsageError
from horq_tvm.nn import HorqConv2d, HorqLinear, freeze_scales, warm_start
from horq_tvm.nn.options import Beta
from horq_tvm.specs import Scale

torch.set_num_threads(1)


def _network(order: int = 2, scale: Scale = "static", beta: Beta = "learned", filters: int = 6) -> nn.Sequential:
    conv = HorqConv2d(4, filters, 3, order=order, scale=scale, beta=beta)
    return nn.Sequential(
        conv, nn.BatchNorm2d(filters), nn.Flatten(), HorqLinear(filters * 9, 3, order=order, scale=scale, beta=beta)
    )


def _step(model: nn.Module, x: Tensor, optimiser: torch.optim.Optimizer) -> None:
    optimiser.zero_grad()
    model.train()(x).square().sum().backward()
    optimiser.step()


def _betas(model: nn.Sequential) -> Tensor:
    return torch.cat([model[0].beta.detach(), model[3].beta.detach()]).clone()


@pytest.mark.parametrize("beta", ["learned", "running"])
def test_frozen_scales_stand_still_and_the_weights_do_not(beta: Beta) -> None:
    torch.manual_seed(0)
    model = _network(beta=beta)
    optimiser = torch.optim.Adam(model.parameters(), 0.01, weight_decay=0.1)
    _step(model, torch.randn(8, 4, 5, 5), optimiser)
    before = _betas(model)
    _step(model, 2 * torch.randn(8, 4, 5, 5), optimiser)
    moved = _betas(model)
    assert not torch.equal(moved, before)
    freeze_scales(model)
    weight = model[0].weight.detach().clone()
    for _ in range(3):
        _step(model, 2 * torch.randn(8, 4, 5, 5), optimiser)
    assert torch.equal(_betas(model), moved)
    assert not torch.equal(model[0].weight, weight)


def test_scales_that_are_not_there_yet_cannot_be_frozen() -> None:
    with pytest.raises(UsageError, match="layer '0' \\(static\\) has no beta yet"):
        freeze_scales(_network())


@pytest.mark.parametrize(
    ("order", "scale", "refitted"),
    [(2, "static", ()), (1, "static", ("0", "3")), (2, "sample", ()), (3, "patch", ())],
)
def test_warm_start_takes_over_all_but_the_scales(order: int, scale: Scale, refitted: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    trained, x = _network(), torch.randn(8, 4, 5, 5)
    trained.train()(x)
    model = _network(order, scale)
    assert warm_start(model, trained.state_dict()) == refitted
    for name, value in model.state_dict().items():
        if not name.endswith("beta"):
            assert torch.equal(value, trained.state_dict()[name])
    if refitted:
        with pytest.raises(UsageError, match="no beta yet"):
            model.eval()(x)
    model.train()(x)
    if scale == "static":
        assert _betas(model).isfinite().all()
        assert torch.equal(_betas(model), _betas(trained)) == (order == 2)


def test_scales_are_fitted_where_the_other_network_had_none() -> None:
    model, other = _network(), _network(scale="sample")
    assert warm_start(model, other.state_dict()) == ("0", "3")
    model.train()(torch.randn(8, 4, 5, 5))
    assert _betas(model).isfinite().all()


@pytest.mark.parametrize("other", [_network(filters=7), nn.Linear(2, 2)])
def test_state_of_another_network_is_named(other: nn.Module) -> None:
    model = _network()
    before = model[0].weight.detach().clone()
    with pytest.raises(UsageError, match="the state dict is of another network: .*, '.*' the first; accepted"):
        warm_start(model, other.state_dict())
    assert torch.equal(model[0].weight, before)


def test_freed_memory_is_kept_on_glibc() -> None:
    """In a process of its own, as it cannot be undone."""
    code = "import horq_tvm.nn, platform; assert horq_tvm.nn.keep_freed_memory() == (platform.libc_ver()[0] == 'glibc')"
    subprocess.run([sys.executable, "-c", code], check=True)
