"""Int8 layers on x86 and ARM: the integers are the oracle's, at the edges of words, vectors, groups and rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

from tvm import relax

from horq_tvm import ops, pipeline, reference_int8, targets
from horq_tvm.compiler import CompiledModel
from horq_tvm.ops.int8 import MAX_ROW, Activation
from horq_tvm.runtime.loader import LoadedModel
from horq_tvm.schedules import int8
from horq_tvm.specs import LayerConfig
from horq_tvm.straightline import constant
from tests.end_to_end.drawn import compile_module
from tests.end_to_end.emulator import EmulatedModel, machine
from tests.relay_passes.program import module

Array = np.ndarray[Any, Any]

# Of x86 what this machine can run: VNNI in 512 bits, PMADDWD in 512, 256 and 128. SMULL, SDOT and VMULL under qemu.
ARM = {"rpi4": "aarch64", "rpi5": "aarch64", "rpi2": "armv7"}
TARGETS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            bool(targets.resolve(name).missing_on(targets.this_host().flags)), reason=f"this CPU is no {name}"
        ),
    )
    for name in ("native", "x86-64-v4", "x86-64-v3", "x86-64")
] + [pytest.param(name) for name in ARM]


def runnable(compiled: CompiledModel, target: str) -> LoadedModel | EmulatedModel:
    """The library loaded, or under qemu; skips where that is not installed."""
    return EmulatedModel(machine(ARM[target]), compiled) if target in ARM else compiled.load()


@pytest.mark.parametrize(
    ("target", "style"),
    [
        ("x86-64", "pairs"),
        ("x86-64-v3", "pairs"),
        ("x86-64-v4", "pairs"),
        ("cascadelake", "quads"),
        ("x86-64-v4-vpopcntdq", "quads"),
        ("zen3", "pairs"),
        ("zen5", "quads"),
        ("rpi4", "smull"),
        ("rpi5", "sdot"),
        ("jetson-orin", "sdot"),
        ("rpi4-32", "vmull"),
    ],
)
def test_style_by_target(target: str, style: str) -> None:
    assert int8.style(targets.resolve(target)) == style


# --- Whole layers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A conv over x [N,H,W,C], a dense layer where `lead` is given. `planar`: the image arrives as [N,C,H,W]."""

    channels: int
    filters: int
    kernel: tuple[int, int] = (3, 3)
    size: tuple[int, int, int] = (1, 5, 7)
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    planar: bool = False
    signed: bool = True
    lead: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.lead, self.channels) if self.lead is not None else (*self.size, self.channels)

    @property
    def window(self) -> dict[str, Any]:
        names = ("strides", "padding", "dilation", "groups")
        return {name: getattr(self, name) for name in names}

    def weight(self) -> Array:
        window = () if self.lead is not None else self.kernel
        shape = (self.filters, *window, self.channels // self.groups)
        return np.random.default_rng(self.filters).standard_normal(shape).astype("float32")

    def image(self) -> Array:
        """[N,H,W,C] or [..., L]."""
        x = np.random.default_rng(self.channels).standard_normal(self.shape)
        return (x + 0.4 if self.signed else np.maximum(x, 0)).astype("float32")

    @property
    def activation(self) -> Activation:
        """A range that cuts off the largest values, so that some are clipped."""
        x = self.image()
        return Activation(*reference_int8.activation_scale(0.9 * float(x.min()), 0.9 * float(x.max())))

    def expected(self) -> tuple[Array, Array]:
        """The oracle's sums and output, in the library's layout."""
        x, weight, how = self.image(), self.weight(), self.activation
        if self.lead is not None:
            return reference_int8.dense(x, weight, how.scale, how.zero_point)
        found = reference_int8.conv2d(
            np.moveaxis(x, 3, 1), np.moveaxis(weight, 3, 1), how.scale, how.zero_point, **self.window
        )
        return np.moveaxis(found[0], 1, 3), np.moveaxis(found[1], 1, 3)


LAYERS = [
    # dwords: channels around 2 and 4, joined kernel rows of any length
    *(Layer(channels, 17, planar=planar) for channels in (1, 2, 3, 4) for planar in (False, True)),
    *(Layer(channels, 16, (1, 1), padding=(0, 0, 0, 0)) for channels in (1, 3, 5, 16, 17, 31, 64)),
    Layer(5, 20, (2, 5), padding=(0, 2, 1, 1)),
    Layer(3, 64, (7, 7), (1, 20, 22), (2, 2), (3, 3, 3, 3), planar=True),
    Layer(3, 8, (7, 7), (2, 16, 15), (2, 2), (3, 2, 3, 4)),
    Layer(3, 24, (5, 4), (2, 9, 8), (3, 2), (0, 1, 2, 0), planar=True),
    # vectors: filters around 4, 8 and 16, widths that no tile divides
    *(Layer(6, filters, size=(1, 3, 13)) for filters in (1, 3, 4, 7, 8, 15, 16, 31, 33, 80)),
    # strides, with pixels that no window reads
    Layer(20, 32, (1, 1), (2, 7, 6), (2, 2), (0, 0, 0, 0)),
    Layer(6, 16, (1, 1), (1, 7, 8), (3, 2), (0, 0, 0, 0)),
    Layer(8, 16, (1, 1), (1, 6, 6), (2, 2), (1, 0, 0, 1)),
    Layer(12, 16, (3, 3), (2, 9, 8), (2, 3), (1, 0, 0, 2)),
    # dilation: runs are taps
    Layer(10, 20, (3, 2), (1, 9, 8), padding=(2, 0, 1, 3), dilation=(2, 3)),
    Layer(8, 20, (3, 3), (2, 9, 9), (2, 1), (2, 2, 2, 2), dilation=(1, 2)),
    Layer(3, 20, (3, 3), (1, 9, 9), padding=(2, 2, 2, 2), dilation=(2, 2), planar=True),
    # groups: a vector never crosses one, its channels begin at a dword
    *(Layer(2 * c, 2 * f, groups=2) for c, f in ((4, 4), (3, 8), (5, 12), (16, 16), (7, 48))),
    Layer(15, 12, (1, 1), (2, 6, 5), (2, 2), (0, 0, 0, 0), groups=3),
    Layer(24, 24, (3, 3), (1, 8, 8), (1, 2), (1, 1, 1, 1), dilation=(2, 2), groups=3),
    # a zero point of 0, as behind a ReLU
    Layer(16, 16, signed=False),
    Layer(3, 16, planar=True, signed=False),
    # dense
    *(
        Layer(c, f, lead=lead)
        for c, f, lead in ((512, 1000, (1,)), (7, 10, (3,)), (33, 5, (2, 3)), (64, 16, (4, 1, 2)))
    ),
]


def compiled(layers: Sequence[Layer], target: str) -> CompiledModel:
    """Layer i from input x<i> to output y<i>, nothing behind it."""

    def body(emit: Any, *inputs: relax.Var) -> list[relax.Expr]:
        outputs = []
        for i, (layer, x) in enumerate(zip(layers, inputs, strict=True)):
            if layer.planar:
                x = emit(relax.op.permute_dims(x, [0, 2, 3, 1]))
            weight = constant(layer.weight())
            dense = layer.lead is not None
            call = ops.dense(x, weight, name=f"L{i}") if dense else ops.conv2d(x, weight, name=f"L{i}", **layer.window)
            outputs.append(emit(call))
        return outputs

    shapes = [arriving(layer, layer.image()).shape for layer in layers]
    activations = {f"L{i}": layer.activation for i, layer in enumerate(layers)}
    return compile_module(pipeline.quantize_rest(activations)(module(shapes, body)), target=target)


def arriving(layer: Layer, image: Array) -> Array:
    return np.ascontiguousarray(np.moveaxis(image, 3, 1)) if layer.planar else image


ALDER_LAKE = """
version: 1
targets:
  avx-vnni: {description: VNNI without AVX-512, extends: x86-64-v3, mattr: [+avxvnni], features: [avx_vnni]}
"""


def test_vnni_without_avx512(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(ALDER_LAKE)
    name = f"{tmp_path / 'own.yaml'}:avx-vnni"
    assert int8.style(targets.resolve(name)) == "quads"
    if targets.resolve(name).missing_on(targets.this_host().flags):
        pytest.skip("this CPU has no AVX-VNNI")
    check_integers(name)


@pytest.mark.parametrize("target", TARGETS)
def test_integers_are_exact(target: str) -> None:
    check_integers(target)


def check_integers(target: str) -> None:
    """Nothing but a factor a filter stands between the sums and the output, so equal outputs are equal sums."""
    outputs = runnable(compiled(LAYERS, target), target)(*(arriving(layer, layer.image()) for layer in LAYERS))
    for i, layer in enumerate(LAYERS):
        sums, output = layer.expected()
        assert np.abs(sums).max() > 100, layer
        np.testing.assert_array_equal(outputs[f"y{i}"], output, err_msg=str(layer))


def test_the_sweep_clips_and_has_zero_points() -> None:
    zeros = {layer.activation.zero_point for layer in LAYERS}
    assert 0 in zeros
    assert len(zeros) > 10
    quantised = [reference_int8.quantize(layer.image(), *vars(layer.activation).values()) for layer in LAYERS]
    assert any(q.min() == 0 for q in quantised)
    assert any(q.max() == 255 for q in quantised)


@pytest.mark.parametrize("target", TARGETS)
def test_the_largest_sums_there_are(target: str) -> None:
    """All q = 255, all w = ±127, a row as long as may be: 16-bit sums would saturate, and 32-bit ones nearly do."""
    rows = (MAX_ROW, 4, 36)
    weights = [np.concatenate([np.ones((8, row)), -np.ones((8, row))]).astype("float32") for row in rows]

    def body(emit: Any, *inputs: relax.Var) -> list[relax.Expr]:
        pairs = enumerate(zip(inputs, weights, strict=True))
        return [emit(ops.dense(x, constant(w), name=f"L{i}")) for i, (x, w) in pairs]

    activations = {f"L{i}": Activation(1.0, 0) for i in range(len(rows))}
    mod = pipeline.quantize_rest(activations)(module([(1, row) for row in rows], body))
    model = runnable(compile_module(mod, target=target), target)
    outputs = model(*(np.full((1, row), 255, "float32") for row in rows))
    for i, row in enumerate(rows):
        factor = np.float32(1 / 127)
        expected = np.float32([255 * 127 * row] * 8 + [-255 * 127 * row] * 8) * factor
        np.testing.assert_array_equal(outputs[f"y{i}"], expected[None])


@pytest.mark.parametrize("target", TARGETS)
def test_the_least_byte_times_the_least_byte(target: str) -> None:
    """q = 0 and, as a model may bring it, w = −128: two such products of bytes are 2^15, too much for 16 bits."""
    weight = np.full((4, 6), -128, "float32")
    mod = module([(1, 6)], lambda emit, x: [emit(ops.dense(x, constant(weight), name="L"))])
    mod = pipeline.quantize_rest({"L": Activation(1.0, 255)}, {"L": np.ones(4)})(mod)
    found = runnable(compile_module(mod, target=target), target)(np.full((1, 6), -300, "float32"))["y0"]
    np.testing.assert_array_equal(found, np.full((1, 4), 6 * 255 * 128))


@pytest.mark.parametrize("target", TARGETS)
def test_every_rounding_of_the_quantisation(target: str) -> None:
    """One channel, one weight: the output tells q − z. Halves, values beside them, both ends, infinities."""
    scale = np.float32(0.37)
    steps = np.concatenate([np.arange(-300, 300) / 2, np.arange(-300, 300) / 2 + 1e-5]).astype("float32")
    x = np.concatenate([steps * scale, [np.inf, -np.inf, 3e38, -0.0]]).astype("float32")
    for zero in (0, 101, 255):
        one = constant(np.ones((1, 1, 1, 1), "float32"))
        mod = module([(1, len(x), 1, 1)], lambda emit, v, w=one: emit(ops.conv2d(v, w, name="L")))
        mod = pipeline.quantize_rest({"L": Activation(float(scale), zero)})(mod)
        found = runnable(compile_module(mod, target=target), target)(x.reshape(1, -1, 1, 1))["y0"].ravel()
        q = reference_int8.quantize(x, float(scale), zero).astype("float32")
        factor = np.float32(float(scale) / 127)
        np.testing.assert_array_equal(found, (q - zero) * 127 * factor)


@pytest.mark.parametrize("target", TARGETS)
def test_the_epilogue_follows_in_the_same_kernel(target: str) -> None:
    """Bias, residual, ReLU, and the planes of a static layer behind it: as the parts in NumPy say."""
    layer = Layer(20, 64, size=(2, 6, 9))
    rng = np.random.default_rng(5)
    bias = rng.standard_normal(64).astype("float32")
    residual = rng.standard_normal((2, 6, 9, 64)).astype("float32")
    signs = rng.choice(np.array([-1, 1], "float32"), (8, 1, 1, 64))

    def body(emit: Any, x: relax.Var, other: relax.Var) -> list[relax.Expr]:
        y = emit(ops.conv2d(x, constant(layer.weight()), name="L", **layer.window))
        y = emit(relax.op.add(emit(relax.op.add(y, constant(bias))), other))
        y = emit(relax.op.nn.relu(y))
        shifted = emit(relax.op.subtract(y, relax.const(0.75, "float32")))
        return [y, emit(ops.conv2d(shifted, constant(signs), name="next"))]

    mod = module([layer.shape, residual.shape], body)
    mod = pipeline.quantize_rest({"L": layer.activation})(
        pipeline.rewrite({"next": LayerConfig(1, "static", (1.0,))})(mod)
    )
    model = runnable(compile_module(mod, target=target), target)
    found = model(layer.image(), residual)
    expected = np.maximum(layer.expected()[1] + bias + residual, 0)
    np.testing.assert_allclose(found["y0"], expected, rtol=1e-6, atol=1e-5)
    planes = np.where(found["y0"] - np.float32(0.75) >= 0, 1, -1)
    np.testing.assert_array_equal(found["y1"], planes @ signs[:, 0, 0].T.astype(int))
    if isinstance(model, EmulatedModel):
        return
    steps = [step.name for step in model.profile(layer.image(), residual, runs=1)]
    assert [name.split("_")[0] for name in steps] == ["quantize", "fused", "fused"], steps


def test_equal_readers_share_a_quantisation() -> None:
    layer = Layer(16, 16)

    def body(emit: Any, x: relax.Var) -> list[relax.Expr]:
        def conv(name: str, pad: int) -> relax.Expr:
            return emit(ops.conv2d(x, constant(layer.weight()), name=name, padding=(pad,) * 4))

        return [conv("a", 1), conv("b", 1), conv("c", 0)]

    activations = dict.fromkeys("abc", layer.activation)
    model = compile_module(pipeline.quantize_rest(activations)(module([layer.shape], body))).load()
    names = [step.name for step in model.profile(layer.image(), runs=1)]
    assert sum(name.startswith("quantize") for name in names) == 2
    found = model(layer.image())
    np.testing.assert_array_equal(found["y0"], found["y1"])


def test_threads_and_runs_give_the_same_bits() -> None:
    layers = [Layer(3, 64, (7, 7), (1, 96, 96), (2, 2), (3, 3, 3, 3), planar=True), Layer(64, 64, size=(2, 28, 28))]
    images = [arriving(layer, layer.image()) for layer in layers]
    library = compiled(layers, "native")
    models = [library.load(threads) for threads in (1, 1, 2)]
    first, *others = (model(*images) for model in models)
    for again in (*others, models[0](*images)):
        for name in first:
            np.testing.assert_array_equal(first[name], again[name])
