"""Two models held against each other: what counts as the same answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest

from horq_tvm import agreement
from horq_tvm.specs import TensorSpec


@dataclass(frozen=True)
class Model:
    """Stands for a loaded library: the same scores whatever it is fed."""

    scores: np.ndarray

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("x", (1, 2), "float32"),)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("y", self.scores.shape, "float32"),)

    def __call__(self, **_feeds: np.ndarray) -> dict[str, np.ndarray]:
        return {"y": self.scores}


def agree(a: Any, b: Any) -> agreement.Agreement:
    models = (cast("Any", Model(np.array(scores, "float32"))) for scores in (a, b))
    return agreement.compare(*models, None)


def test_rows_of_scores_agree_where_the_same_class_is_first() -> None:
    found = agree([[1, 2, 3], [3, 2, 1]], [[0, 1, 9], [0, 1, 9]])
    assert (found.agreement, found.inputs) == (0.5, "8 random inputs")


def test_the_classes_of_an_image_lie_on_axis_1() -> None:
    image = np.zeros((1, 3, 2, 4))
    other = image.copy()
    image[:, 2] = 1
    other[:, 2, 0] = other[:, 1, 1] = 1  # of the two rows of pixels, one changes its class
    assert agree(image, other).agreement == 0.5


@pytest.mark.parametrize("scores", [5.0, [1.0, 2.0]])
def test_a_scalar_and_a_vector_are_one_row(scores: Any) -> None:
    assert agree(scores, scores).agreement == 1.0


def test_no_cosine_of_what_is_not_finite() -> None:
    assert agree([[np.nan, 1]], [[0, 1]]).cosine is None
