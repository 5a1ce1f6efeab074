"""Bits counted by table look-up: the layout, the runs that a byte can hold, and whole layers at the vectors' edges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

from tvm import relax

from horq_tvm import ops, pipeline, targets
from horq_tvm.relay_passes.pack_weights import pack_bits, pack_words
from horq_tvm.schedules import layout, nibble
from horq_tvm.schedules.layout import WeightLayout
from horq_tvm.schedules.tile import Loop
from horq_tvm.specs import LayerConfig
from horq_tvm.straightline import array_of, constant, op_name
from tests.end_to_end.drawn import Drawn, compile_module, with_given_scales, with_own_scales
from tests.end_to_end.test_oracle import check_general, exact_results
from tests.relay_passes.program import module

TARGETS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            bool(targets.resolve(name).missing_on(targets.this_host().flags)), reason=f"this CPU is no {name}"
        ),
    )
    for name in ("x86-64-v2", "x86-64-v3", "x86-64-v4")
]

# --- The pieces -------------------------------------------------------------------------------------------------------


def test_a_byte_holds_63_nibbles_and_not_64() -> None:
    assert nibble.MAX_STEPS * 4 == 252
    assert nibble.MAX_STEPS * 4 <= np.iinfo("uint8").max < (nibble.MAX_STEPS + 1) * 4
    assert np.iinfo("uint16").max == nibble.MAX_ROW


@pytest.mark.parametrize(("words", "length"), [(1, 1), (9, 3), (18, 6), (7, 7), (8, 4), (72, 6), (99, 3), (11, 1)])
def test_runs_are_the_longest_that_divide_a_window(words: int, length: int) -> None:
    assert nibble.run_length(words) == length


def test_no_run_overflows() -> None:
    lengths = [nibble.run_length(words) for words in range(1, 700)]
    assert max(lengths) * nibble.STEPS_OF_WORD == 56  # seven words; an eighth would need 64 steps
    assert all(words % length == 0 for words, length in enumerate(lengths, 1))


def test_table() -> None:
    table = nibble.table()
    assert (table.shape, table.dtype) == (nibble.TABLE_SHAPE, np.uint8)
    for byte, weight in ((0x00, 0), (0x0F, 0), (0x63, 0b0110), (0xFE, 0b1010)):
        assert table[byte, 0, weight] == ((byte & 15) ^ weight).bit_count()
        assert table[byte, 1, weight] == ((byte >> 4) ^ weight).bit_count()


def test_weights_stay_bits_and_halves_come_apart() -> None:
    signs = np.random.default_rng(0).choice(np.array([-1, 1], "int8"), (40, 3, 2, 75))
    packed = pack_words(pack_bits(signs), 1, WeightLayout("nibbles", 32))
    assert (packed.shape, packed.dtype) == ((1, 2, 3 * 2 * 12, 32), np.uint8)
    tap = 12 * (2 * 2 + 1)  # of row 2, column 1
    for lane, channel in ((0, 0), (1, 16), (2, 1), (31, 31)):
        expected = np.packbits(signs[channel, 2, 1] > 0, bitorder="little")
        np.testing.assert_array_equal(packed[0, 0, tap : tap + len(expected), lane], expected)
    assert not packed[0, 1, :, 17].any()  # filter 32 + 24


@pytest.mark.parametrize(
    ("target", "filters", "groups", "row", "expected"),
    [
        ("x86-64-v4", 256, 1, 576, WeightLayout("nibbles", 64)),
        ("x86-64-v4", 20, 1, 576, WeightLayout("nibbles", 32)),
        ("x86-64-v3", 10, 1, 576, WeightLayout("nibbles", 16)),
        ("x86-64-v3", 48, 2, 576, WeightLayout("nibbles", 16)),
        ("x86-64-v3", 12, 2, 576, WeightLayout("words", 4)),
        ("x86-64-v2", 64, 1, 576, WeightLayout("nibbles", 16)),
        ("x86-64-v3", 64, 1, nibble.MAX_ROW, WeightLayout("nibbles", 32)),
        ("x86-64-v3", 64, 1, nibble.MAX_ROW + 1, WeightLayout("words", 8)),
        ("x86-64-v4-vpopcntdq", 64, 1, 576, WeightLayout("words", 16)),
        ("x86-64", 64, 1, 576, WeightLayout("words", 4)),
    ],
)
def test_layout_by_target(target: str, filters: int, groups: int, row: int, expected: WeightLayout) -> None:
    assert layout.bitserial(targets.resolve(target), filters, groups, row) == expected


def test_many_pixels_take_weights_a_nibble_a_byte() -> None:
    assert [nibble.splits(32, pixels) for pixels in (1, 15, 16, 49)] == [False, False, True, True]
    assert nibble.splits(64, 16)
    assert not nibble.splits(16, 3136)


@pytest.mark.parametrize(
    ("width", "lanes", "split", "expected"),
    [
        (56, 32, True, (4, 2, False)),
        (14, 32, True, (5, 2, True)),  # 5 + 5 + 4 pixels
        (7, 32, True, (4, 2, True)),
        (7, 32, False, (4, 2, True)),
        (56, 16, False, (8, 1, False)),  # SSE copies a table for each vector of filters
        (31, 32, True, (11, 1, True)),  # 31·8 look-ups in a row of code
    ],
)
def test_default_tiles(width: int, lanes: int, split: bool, expected: tuple[int, int, bool]) -> None:
    loop = Loop(width, width, blocks=8, lanes=lanes, registers=16, latency=8, split=split)
    tile = nibble.choose(loop)
    assert (tile.px, tile.q, tile.row) == expected
    assert tile.px * tile.q + (1 if split else 2) * tile.q + 3 <= loop.registers


def test_a_row_too_long_to_be_written_out_keeps_its_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(37, 37, blocks=8, lanes=32, registers=16, latency=8, split=True)
    assert not nibble.choose(loop).row
    monkeypatch.setattr(nibble, "MAX_BODIES", 37 * 2 * 8)
    assert nibble.choose(loop).row


# --- Whole layers -----------------------------------------------------------------------------------------------------

EDGES = [  # channels, filters, kernel, groups
    (1, 1, (1, 1), 1),
    (4, 4, (3, 3), 1),
    (31, 33, (3, 3), 1),
    (32, 16, (3, 3), 1),
    (33, 31, (2, 3), 1),
    (64, 64, (3, 3), 1),
    (75, 65, (1, 3), 1),
    (128, 128, (3, 3), 1),
    (256, 32, (3, 3), 1),
    (352, 17, (2, 1), 1),
    (32, 32, (3, 3), 2),
    (20, 48, (3, 3), 3),
    (40, 12, (2, 2), 4),
]


def edge_layers() -> list[Drawn]:
    """Every edge, with the scales, orders, strides, paddings and widths going round beside it."""
    found = []
    for i, (channels, filters, kernel, groups) in enumerate(EDGES):
        for j, scale in enumerate(("patch", "sample", "static")):
            found.append(
                Drawn(
                    channels,
                    filters,
                    order=1 + (i + j) % 3,
                    scale=scale,  # type: ignore[arg-type]
                    size=(1 + i % 2, 5, 6 + (i + j) % 5),
                    kernel=kernel,
                    strides=(1 + (i // 2) % 2, 1 + j % 2),
                    dilation=(1 + (i + j) % 2, 1),
                    padding=((1, 1, 1, 1), (0, 2, 1, 0), (2, 0, 0, 1))[(i + 2 * j) % 3],
                    groups=groups,
                    relu=(i + j) % 4 == 0,
                    seed=3 * i + j,
                )
            )
    return found


def dense_layers() -> list[Drawn]:
    return [
        Drawn(channels, filters, order, "static", lead=lead, seed=channels)
        for channels, filters, order, lead in ((1, 10, 1, (2,)), (127, 64, 2, (3, 2)), (1024, 100, 3, (1,)))
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_integers_are_exact(target: str) -> None:
    drawn = [*edge_layers(), *dense_layers()]
    compiled, fed = with_given_scales(drawn, target)
    for layer, y, result in exact_results(drawn, [d.image() for d in drawn], compiled.load(), fed, given_beta=1.0):
        np.testing.assert_array_equal(y, result.sums.sum(axis=0), err_msg=str(layer))


@pytest.mark.parametrize("target", TARGETS)
def test_outputs_are_within_the_tolerance(target: str) -> None:
    drawn = [d for d in edge_layers() if d.row >= 9][::3]
    check_general(drawn, with_own_scales(drawn, target).load(), [d.image() for d in drawn])


WIDTHS = [(1, 4, width) for width in (3, 5, 7, 9, 11, 13, 14, 17, 19)]


@pytest.mark.parametrize("pixels", [1, 1 << 30], ids=["split", "bits"])
@pytest.mark.parametrize("target", TARGETS)
def test_rows_of_any_width_from_split_weights_and_from_bits(
    target: str, pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nibble, "SPLIT_PIXELS", pixels)
    drawn = [
        Drawn(40, (64, 96, 130)[i % 3], 1 + i % 2, "static", size=size, kernel=(3, 3), padding=(1, 1, 1, 1), seed=i)
        for i, size in enumerate(WIDTHS)
    ]
    compiled, fed = with_given_scales(drawn, target)
    for layer, y, result in exact_results(drawn, [d.image() for d in drawn], compiled.load(), fed, given_beta=1.0):
        np.testing.assert_array_equal(y, result.sums.sum(axis=0), err_msg=str(layer))


def unit_conv(emit: Any, x: relax.Expr, weight: np.ndarray[Any, Any], name: str, pad: int = 0) -> relax.Expr:
    return emit(ops.conv2d(x, constant(weight.astype("float32")), name=name, padding=(pad,) * 4))


def compiled_outputs(target: str, shape: tuple[int, ...], x: np.ndarray[Any, Any], layers: Sequence[Any]) -> Any:
    """What a chain of convolutions of ±1 with β = 1 gives; `layers` lists name, order, weight and padding."""

    def body(emit: Any, value: relax.Expr) -> relax.Expr:
        for name, _, weight, pad in layers:
            value = unit_conv(emit, value, weight, name, pad)
        return value

    configs = {name: LayerConfig(order, "static", (1.0,) * order) for name, order, _, _ in layers}
    return compile_module(pipeline.rewrite(configs)(module([shape], body)), target=target).load()(x)["y0"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("filters", "width"), [(16, 1), (64, 18)], ids=["bits", "split"])
@pytest.mark.parametrize(("window", "channels"), [((1, 1), 224), ((3, 3), 64), ((1, 1), 256), ((5, 5), 2600)], ids=str)
def test_every_bit_differs(target: str, window: tuple[int, int], channels: int, filters: int, width: int) -> None:
    """The largest counts there are: 56 steps in a byte, and 65000 in the 16-bit sum of the last case."""
    weight = -np.ones((filters, *window, channels))
    x = np.ones((1, window[0], window[1] - 1 + width, channels), "float32")
    y = compiled_outputs(target, x.shape, x, [("layer", 1, weight, 0)])
    np.testing.assert_array_equal(y, np.full((1, 1, width, filters), -window[0] * window[1] * channels))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("filters", [32, 64, 96])
def test_the_next_layers_planes_are_packed_in_the_same_kernel(target: str, filters: int) -> None:
    rng = np.random.default_rng(filters)
    sign = np.array([-1, 1])
    chain = [
        ("a", 2, rng.choice(sign, (filters, 3, 3, 32)), 1),
        ("b", 2, rng.choice(sign, (64, 3, 3, filters)), 1),
        ("c", 1, rng.choice(sign, (16, 1, 1, 64)), 0),
    ]
    x = rng.standard_normal((2, 5, 7, 32)).astype("float32")
    y = compiled_outputs(target, x.shape, x, chain)
    np.testing.assert_array_equal(y, compiled_outputs("x86-64", x.shape, x, chain))


@pytest.mark.parametrize(("size", "split"), [(4, ()), (6, (2,))])  # 4 and 16 pixels
def test_the_style_reaches_the_kernel(size: int, split: tuple[int, ...]) -> None:
    target = targets.resolve("x86-64-v3")
    weight = np.ones((64, 3, 3, 64))
    mod = module([(1, size, size, 64)], lambda emit, x: unit_conv(emit, x, weight, "layer"))
    packed = pipeline.optimise(target)(pipeline.rewrite({"layer": LayerConfig(2, "static", (1.0, 1.0))})(mod))
    calls = [value for f in packed.functions.values() for _, value in bindings_of(f)]
    (call,) = [value for value in calls if op_name(value) == "horq.packed_bitserial"]
    assert str(call.attrs["style"]) == "nibbles"
    assert ops.shape_of(call.args[1]) == (1, 2, 72, *split, 32)
    assert ops.shape_of(call.args[-1]) == nibble.TABLE_SHAPE
    stored = [array_of(value.args[0]) for value in calls if op_name(value) == "horq.split_nibbles"]
    assert [bits.shape for bits in stored if bits is not None] == [(1, 2, 72, 32)] * len(split)


def bindings_of(function: relax.Function) -> list[tuple[relax.Var, relax.Expr]]:
    return [(b.var, b.value) for block in function.body.blocks for b in block.bindings]
