"""What stands around the layers, pooling, softmax, transposes, on PoCL: the values PyTorch gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from tvm import relax

from tests.relay_passes.program import module
from tests.schedules.cuda import pocl
from tests.schedules.cuda.card import OnPocl

IMAGE, SCORES = (2, 9, 12, 40), (3, 1000)
Build = Callable[[relax.Expr], relax.Expr]
Expected = Callable[[torch.Tensor], torch.Tensor]


def as_image(operator: Expected) -> Expected:
    """Of PyTorch, which has channels second."""
    return lambda x: operator(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def pooled(kind: Any, **how: Any) -> Build:
    return lambda x: kind(x, **how, layout="NHWC", out_layout="NHWC")


POOL = relax.op.nn
OPERATORS: dict[str, tuple[tuple[int, ...], Build, Expected]] = {
    "max_pool": (
        IMAGE,
        pooled(POOL.max_pool2d, pool_size=(3, 3), strides=(2, 2), padding=(1, 1, 1, 1)),
        as_image(lambda x: F.max_pool2d(x, 3, 2, 1)),
    ),
    "avg_pool": (
        IMAGE,
        pooled(POOL.avg_pool2d, pool_size=(2, 3), strides=(2, 3)),
        as_image(lambda x: F.avg_pool2d(x, (2, 3))),
    ),
    "global_pool": (IMAGE, lambda x: relax.op.mean(x, (1, 2)), lambda x: x.mean((1, 2))),
    "adaptive_pool": (
        IMAGE,
        lambda x: relax.op.nn.adaptive_avg_pool2d(x, (1, 1), layout="NHWC"),
        as_image(lambda x: F.adaptive_avg_pool2d(x, 1)),
    ),
    "softmax": (SCORES, relax.op.nn.softmax, lambda x: x.softmax(-1)),
    "log_softmax": (SCORES, relax.op.nn.log_softmax, lambda x: x.log_softmax(-1)),
    "row_sums": (SCORES, lambda x: relax.op.sum(x, 1), lambda x: x.sum(1)),
    "short_sums": ((5, 7), lambda x: relax.op.sum(x, 1), lambda x: x.sum(1)),
    "total": (SCORES, lambda x: relax.op.sum(x, None), lambda x: x.sum()),
    "to_nchw": (IMAGE, lambda x: relax.op.permute_dims(x, (0, 3, 1, 2)), lambda x: x.permute(0, 3, 1, 2)),
    "pad": (
        IMAGE,
        lambda x: relax.op.nn.pad(x, [0, 0, 1, 2, 3, 0, 0, 0], "constant", 0.0),
        lambda x: F.pad(x, (0, 0, 3, 0, 1, 2)),
    ),
    "concat": (IMAGE, lambda x: relax.op.concat([x, x], 3), lambda x: torch.cat([x, x], 3)),
    "sigmoid": (IMAGE, relax.op.sigmoid, torch.sigmoid),
    "gelu": (IMAGE, relax.op.nn.gelu, F.gelu),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator(name: str) -> None:
    pocl.device()
    shape, build, expected = OPERATORS[name]
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    (found,) = OnPocl(module([shape], lambda emit, x: [emit(build(x))]))(x).values()
    np.testing.assert_allclose(found, expected(torch.from_numpy(x)).numpy(), rtol=1e-5, atol=1e-5)
