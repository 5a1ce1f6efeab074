"""Choices of a schedule, and sketches: kernels whose choices are fixed at the corners of their spaces, not tuned.

Whatever a tuner may choose computes the same: integers equal the reference, floats are within its tolerance.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

pytest.importorskip("tvm")

from tvm import tirx

import horq_tvm
from horq_tvm import pipeline
from horq_tvm.relay_passes.schedule_kernels import ScheduleKernels
from horq_tvm.schedules.decisions import Decide, Option, Recorded, Sampled, T, by_default
from tests.end_to_end.drawn import Drawn, with_given_scales, with_own_scales
from tests.end_to_end.test_oracle import check_general, exact_results
from tests.schedules.test_nibble import TARGETS, compiled_outputs

# --- The pieces -------------------------------------------------------------------------------------------------------


def test_a_record_is_taken_where_it_is_offered() -> None:
    decide = Recorded({"q": 2, "order": "pixels"})
    assert decide("q", [1, 2, 4], 1) == 2
    assert decide("order", ["channels", "pixels"], "channels") == "pixels"
    assert decide("rows", [1, 2], 2) == 2
    assert decide.taken == {"q": 2, "order": "pixels", "rows": 2}
    assert decide.offered["q"] == (1, 2, 4)
    assert decide.fits


@pytest.mark.parametrize("values", [{"q": 3}, {"q": "2"}, {"q": True}, {"q": 2.0}, {"lanes": 8}])
def test_a_stale_record_says_so_and_gives_the_default(values: dict[str, Any]) -> None:
    decide = Recorded(values)
    assert decide("q", [1, 2], 1) == 1
    assert not decide.fits


def test_a_default_that_is_not_offered_is_a_defect_of_the_rule() -> None:
    with pytest.raises(AssertionError, match="default 3 of 'q'"):
        Recorded({})("q", [1, 2], 3)


def test_samples_are_seeded_and_keep_what_is_given() -> None:
    def draw(seed: int) -> list[int]:
        decide = Sampled(random.Random(seed), {"px": 7})
        return [decide("q", range(100), 0), decide("px", range(100), 0), decide("rows", range(100), 0)]

    assert draw(1) == draw(1) != draw(2)
    assert draw(1)[1] == draw(2)[1] == 7


# --- Sketches ---------------------------------------------------------------------------------------------------------


class Corner(Recorded):
    """Always the first option, or the last; or one drawn."""

    def __init__(self, pick: Callable[[Sequence[Any]], Any], seen: dict[str, set[Option]]) -> None:
        super().__init__({})
        self._pick, self._seen = pick, seen

    def _choose(self, name: str, options: Sequence[T], default: T) -> T:
        chosen: T = self._pick(options)
        if chosen != default:
            self._seen[name].add(chosen)
        return chosen


CORNERS: dict[str, Callable[[], Callable[[Sequence[Any]], Any]]] = {
    "first": lambda: lambda options: options[0],
    "last": lambda: lambda options: options[-1],
    "drawn": lambda: random.Random(0).choice,
}


@pytest.fixture(params=CORNERS)
def seen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, set[Option]]]:
    """Builds with every choice at a corner; what was chosen other than by default, by name."""
    found: dict[str, set[Option]] = defaultdict(set)
    pick = CORNERS[request.param]()

    def choose(_func: tirx.PrimFunc) -> Decide:
        return Corner(pick, found)

    monkeypatch.setattr(pipeline, "schedule", lambda target, _choose: pipeline_schedule(target, choose))
    yield found
    assert found, "every choice was the default"


pipeline_schedule = pipeline.schedule

SKETCHED = [
    Drawn(64, 96, 2, "static", size=(1, 6, 7), kernel=(3, 3), padding=(1, 1, 1, 1)),
    Drawn(33, 31, 1, "sample", size=(2, 5, 9), kernel=(3, 3), strides=(2, 1), padding=(0, 2, 1, 0), seed=1),
    Drawn(20, 48, 2, "static", size=(1, 8, 5), kernel=(2, 3), groups=3, seed=2),
    Drawn(40, 12, 3, "sample", size=(1, 5, 6), kernel=(2, 2), groups=4, relu=True, seed=3),
    Drawn(256, 64, 1, "static", size=(1, 16, 16), kernel=(3, 3), padding=(1, 1, 1, 1), seed=4),
    Drawn(127, 64, 2, "sample", lead=(3, 2), seed=5),
]
NATIVE = pytest.param("native")


@pytest.mark.parametrize("target", [NATIVE, *TARGETS[1:2]])
def test_integers_are_exact_whatever_is_chosen(target: str, seen: dict[str, set[Option]]) -> None:
    compiled, fed = with_given_scales(SKETCHED, target)
    images = [layer.image() for layer in SKETCHED]
    for layer, y, result in exact_results(SKETCHED, images, compiled.load(), fed, given_beta=1.0):
        np.testing.assert_array_equal(y, result.sums.sum(axis=0), err_msg=str(layer))
    assert seen.keys() & {"q", "px", "rows"}


@pytest.mark.parametrize("target", [NATIVE, *TARGETS[1:2]])
def test_outputs_are_within_the_tolerance_whatever_is_chosen(target: str, seen: dict[str, set[Option]]) -> None:
    check_general(SKETCHED, with_own_scales(SKETCHED, target).load(), [layer.image() for layer in SKETCHED])


@pytest.mark.parametrize("target", [NATIVE, *TARGETS[1:2]])
def test_planes_packed_in_an_epilogue_are_the_same_whatever_is_chosen(
    target: str, seen: dict[str, set[Option]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    chain = [
        ("a", 2, rng.choice([-1, 1], (64, 3, 3, 32)), 1),
        ("b", 2, rng.choice([-1, 1], (96, 3, 3, 64)), 1),
        ("c", 1, rng.choice([-1, 1], (16, 1, 1, 96)), 0),
    ]
    x = rng.standard_normal((2, 5, 7, 32)).astype("float32")
    y = compiled_outputs(target, x.shape, x, chain)
    monkeypatch.setattr(pipeline, "schedule", pipeline_schedule)
    np.testing.assert_array_equal(y, compiled_outputs("x86-64", x.shape, x, chain))


def float_network() -> onnx.ModelProto:
    """A strided stem of a picture, a max-pool, a depthwise and a pointwise convolution, a mean, a head."""
    rng = np.random.default_rng(0)
    shapes = {"stem": (24, 3, 3, 3), "dw": (24, 1, 3, 3), "pw": (40, 24, 1, 1), "head": (10, 40, 1, 1)}
    weights = [numpy_helper.from_array(rng.standard_normal(s).astype("float32"), n) for n, s in shapes.items()]
    nodes = [
        helper.make_node("Conv", ["x", "stem"], ["a"], name="stem", strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MaxPool", ["b"], ["c"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["c", "dw"], ["d"], name="dw", pads=[1, 1, 1, 1], group=24),
        helper.make_node("Relu", ["d"], ["e"]),
        helper.make_node("Conv", ["e", "pw"], ["f"], name="pw"),
        helper.make_node("GlobalAveragePool", ["f"], ["g"]),
        helper.make_node("Conv", ["g", "head"], ["y"], name="head"),
    ]
    image = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 44, 60])
    output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "floats", [image], [output], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def test_float_layers_and_pools_are_onnx_runtimes_whatever_is_chosen(seen: dict[str, set[Option]]) -> None:
    ort = pytest.importorskip("onnxruntime")
    model = float_network()
    x = np.random.default_rng(1).standard_normal((1, 3, 44, 60)).astype("float32")
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": x})
    found = horq_tvm.build(model, order="float")(x)["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_the_default_is_what_nobody_decides() -> None:
    assert by_default("q", [1, 2], 2) == 2
    assert ScheduleKernels(horq_tvm.targets.resolve("x86-64")).choose(tirx.PrimFunc([], tirx.Evaluate(0))) is by_default
