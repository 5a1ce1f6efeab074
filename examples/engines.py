"""Three engines on one trained network and the whole test set: PyTorch, ONNX Runtime, the compiled library.

    python -m examples.engines cifar10 runs/resnet20-k2-static-seed0.pt [--images N] [--json FILE]

Two engines' sums of floats differ in the last bit, and where a residual is as good as 0 such a bit flips a sign. So
images are told apart: those on which every sign of every HORQ layer is equal in two engines, whose predictions must be
equal and whose scores lie within 1e-5 of the largest, and the others, whose share is reported. Beside it each layer is
compared by itself, on the other engine's input to it (`examples.layerwise`).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

import horq_tvm
from examples import train
from examples.layerwise import Fed, LayerCheck, LayerTally, Seen, library_scales
from horq_tvm import datasets
from horq_tvm.errors import HorqError, UsageError
from horq_tvm.export import to_onnx
from horq_tvm.files import replacing
from horq_tvm.nn import HorqConv2d, HorqLayer, keep_freed_memory
from horq_tvm.onnx_bits import pack_signs

BATCH = 100
SCORES = "scores"
ENGINES = ("PyTorch", "ONNX Runtime", "horq-tvm")
FUSED = "horq-tvm, fused"


@dataclass(frozen=True)
class Trace:
    """What an engine gave for a batch: scores float32 [N,classes], and what every HORQ layer saw, by its name."""

    scores: np.ndarray
    layers: Mapping[str, Fed]


@dataclass(frozen=True)
class Agreement:
    """Two engines over all images.

    `flipped` images are those on which a sign of some HORQ layer differs, None where an engine does not show its signs;
    `worst` is the greatest difference of a score on the others, as a share of the image's largest.
    """

    engines: tuple[str, str]
    images: int
    equal_predictions: int
    flipped: int | None
    equal_predictions_unflipped: int | None
    worst: float | None

    @property
    def holds(self) -> bool:
        """Equal predictions on all images without a flip and on 99.9% of all, scores within 1e-5."""
        enough = self.equal_predictions >= 0.999 * self.images
        if self.flipped is None or self.worst is None:
            return enough
        return enough and self.equal_predictions_unflipped == self.images - self.flipped and self.worst <= 1e-5


class PyTorch:
    """The model in eval mode, with hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self._fed = model.eval(), {}
        for name, layer in horq_layers(model).items():
            layer.register_forward_hook(
                lambda _, inputs, y, name=name: self._fed.update({name: Fed(inputs[0].clone(), None, y.clone())})
            )

    def __call__(self, images: Tensor) -> Trace:
        with torch.inference_mode():
            scores = self.model(images).numpy()
        return Trace(scores, dict(self._fed))


class OnnxRuntime:
    """The exported file, whose HORQ nodes' inputs and outputs are outputs of it as well."""

    def __init__(self, model: onnx.ModelProto, names: Sequence[str]) -> None:
        proto = onnx.ModelProto()
        proto.CopyFrom(model)
        nodes = {node.name: node for node in proto.graph.node}
        self._names = list(names)
        self._values = [value for name in names for value in (nodes[name].input[0], nodes[name].output[0])]
        for value in dict.fromkeys(self._values):
            proto.graph.output.append(onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])

    def __call__(self, images: Tensor) -> Trace:
        scores, *values = self._session.run([SCORES, *self._values], {"image": images.numpy()})
        tensors = [torch.from_numpy(value) for value in values]
        return Trace(scores, {n: Fed(tensors[2 * i], None, tensors[2 * i + 1]) for i, n in enumerate(self._names)})


class Library:
    """The compiled library with taps on the HORQ layers, and the one without, which is what a user ships."""

    def __init__(self, path: Path, model: nn.Module, image: Sequence[int]) -> None:
        shapes, layers = {"image": (BATCH, *image)}, horq_layers(model)
        self._layers, self._flattened = layers, flattened_images(model, image)
        self._tapped = horq_tvm.build(path, "native", input_shapes=shapes, taps=list(layers)).load()
        self._shipped = horq_tvm.build(path, "native", input_shapes=shapes).load()

    def __call__(self, images: Tensor) -> Trace:
        found = self._tapped(images.numpy())
        taps = {name: [found[f"tap.{name}.{part}"] for part in ("input", "beta", "output")] for name in self._layers}
        return Trace(found[SCORES], {name: self._fed(*taps[name], self._layers[name]) for name in taps})

    def shipped(self, images: Tensor) -> Trace:
        """Without taps, whose fused kernels keep no inputs to show."""
        return Trace(self._shipped(images.numpy())[SCORES], {})

    def _fed(self, x: np.ndarray, beta: np.ndarray, y: np.ndarray, layer: HorqLayer) -> Fed:
        """Taps as the layer's module has them: channels come last in a library, in a flattened image too."""
        scales = library_scales(layer, torch.from_numpy(beta))
        if isinstance(layer, HorqConv2d):
            x, y = (np.ascontiguousarray(np.moveaxis(tap, 3, 1)) for tap in (x, y))
            return Fed(torch.from_numpy(x), scales, torch.from_numpy(y))
        rows = x.reshape(len(x), -1)
        if rows.shape[1] in self._flattened:
            channels, *extents = self._flattened[rows.shape[1]]
            rows = np.moveaxis(rows.reshape(-1, *extents, channels), 3, 1).reshape(rows.shape)
        return Fed(torch.from_numpy(np.ascontiguousarray(rows)), scales, torch.from_numpy(y.reshape(len(y), -1)))


def horq_layers(model: nn.Module) -> dict[str, HorqLayer]:
    """The HORQ layers by name. Raises UsageError where there are none."""
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, HorqLayer)}
    if not found:
        raise UsageError("the checkpoint holds no HORQ layer; accepted: one of an order K")
    return found


def flattened_images(model: nn.Module, image: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """The shapes [C,H,W] of the images that the model flattens, by the number of their values."""
    shapes: dict[int, tuple[int, ...]] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, x: shapes.update({x[0][0].numel(): tuple(x[0].shape[1:])}))
        for layer in model.modules()
        if isinstance(layer, nn.Flatten)
    ]
    with torch.inference_mode():
        model.eval()(torch.zeros(1, *image))
    for hook in hooks:
        hook.remove()
    return shapes


def compare_layers(
    traces: Mapping[str, Trace], layers: Mapping[str, HorqLayer], tallies: Mapping[str, LayerTally]
) -> dict[tuple[str, str], np.ndarray]:
    """Adds to each engine's tally; bool [N] by pair of engines: the images on which a sign of some layer differs."""
    flips = {pair: torch.zeros(len(traces[pair[0]].scores), dtype=torch.bool) for pair in combinations(traces, 2)}
    with torch.inference_mode():
        for name, layer in layers.items():
            seen = {engine: Seen.of(layer, trace.layers[name].input) for engine, trace in traces.items()}
            for (one, other), flipped in flips.items():
                flipped |= seen[one].flipped(seen[other])
            for engine, tally in tallies.items():
                tally.add(layer, seen[engine], traces[engine].layers[name])
    return {pair: flipped.numpy() for pair, flipped in flips.items()}


class Tally:
    """Counts, batch by batch, what becomes the Agreement of two engines."""

    def __init__(self, first: str, second: str) -> None:
        self._engines = (first, second)
        self._images = self._equal = self._flipped = self._equal_unflipped = 0
        self._worst, self._signs_seen = 0.0, False

    def add(self, one: Trace, other: Trace, flipped: np.ndarray | None) -> None:
        """`flipped` is None where an engine does not show its signs."""
        self._signs_seen |= flipped is not None
        same = np.ones(len(one.scores), np.bool_) if flipped is None else ~flipped
        equal = one.scores.argmax(1) == other.scores.argmax(1)
        apart = np.abs(one.scores - other.scores).max(1) / np.abs(one.scores).max(1)
        self._images += len(same)
        self._equal += int(equal.sum())
        self._flipped += int((~same).sum())
        self._equal_unflipped += int(equal[same].sum())
        self._worst = max(self._worst, float(apart[same].max(initial=0.0)))

    def agreement(self) -> Agreement:
        if not self._signs_seen:
            return Agreement(self._engines, self._images, self._equal, None, None, None)
        unflipped = (self._flipped, self._equal_unflipped, self._worst)
        return Agreement(self._engines, self._images, self._equal, *unflipped)


def compare(
    model: nn.Module, data: train.Images, images: int, folder: Path
) -> tuple[list[Agreement], list[LayerCheck]]:
    """Every pair of the engines on the first so many test images, a multiple of BATCH, and each one's layers."""
    layers = horq_layers(model)
    proto = to_onnx(
        model, data.normalised(data.test[:1]), folder / "model.onnx", ["image"], [SCORES], dynamic_batch=True
    )
    packed = pack_signs(proto)
    (folder / "packed.onnx").write_bytes(packed.SerializeToString())
    runtime, pytorch = OnnxRuntime(packed, list(layers)), PyTorch(model)
    library = Library(folder / "packed.onnx", model, data.test.shape[1:])
    pairs = [*combinations(ENGINES, 2), ("PyTorch", FUSED)]
    tallies = {pair: Tally(*pair) for pair in pairs}
    # PyTorch's own layers are what the others' are held against.
    by_layer = {engine: LayerTally(engine) for engine in ENGINES[1:]}
    for batch in data.test[:images].split(BATCH):
        x = data.normalised(batch)
        traces = dict(zip(ENGINES, (pytorch(x), runtime(x), library(x)), strict=True))
        flips = compare_layers(traces, layers, by_layer)
        traces[FUSED] = library.shipped(x)
        for pair, tally in tallies.items():
            tally.add(traces[pair[0]], traces[pair[1]], flips.get(pair))
    return [tally.agreement() for tally in tallies.values()], [tally.check(images) for tally in by_layer.values()]


def table(agreements: Sequence[Agreement], checks: Sequence[LayerCheck]) -> str:
    """Lines of Markdown: the engines from end to end, and layer by layer."""
    lines = ["| engines | equal predictions | images with a flipped sign | of the others: equal, worst score |"]
    lines.append("|---|--:|--:|--:|")
    for a in agreements:
        flipped, others = "–", "–"
        if a.flipped is not None:
            flipped = f"{a.flipped / a.images:.2%}"
            others = f"{a.equal_predictions_unflipped} of {a.images - a.flipped}, {a.worst:.1e}"
        lines.append(f"| {' and '.join(a.engines)} | {a.equal_predictions / a.images:.2%} | {flipped} | {others} |")
    lines += ["", "| layers of | signs | doubtful, differing, wrong | outputs | outside, worst of the tolerance |"]
    lines.append("|---|--:|--:|--:|--:|")
    for c in checks:
        counts = f"{c.doubtful}, {c.differing}, {c.wrong} | {c.outputs:,} | {c.outside}, {c.worst:.2f}"
        lines.append(f"| {c.engine} | {c.signs:,} | {counts} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=list(datasets.SOURCES))
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--images", type=int, default=10_000, help=f"of the test set, in steps of {BATCH}")
    parser.add_argument("--data", type=Path, help="folder with the dataset's files (default: fetched into the cache)")
    parser.add_argument("--json", type=Path, help="write the counts to this file too")
    given = parser.parse_args(argv)
    if given.images < BATCH or given.images % BATCH:
        parser.error(f"--images {given.images}; accepted: a multiple of {BATCH}")
    keep_freed_memory()
    torch.set_num_threads(1)
    try:
        settings = train.read_checkpoint(given.checkpoint)["settings"]
        model = train.restored(given.checkpoint, settings["network"])
        data = train.Images(datasets.load(given.dataset, given.data), seed=0, views=1)
        data.check_fits(settings["network"])
        with tempfile.TemporaryDirectory() as folder:
            agreements, checks = compare(model, data, given.images, Path(folder))
        if given.json:
            network = {"network": given.checkpoint.stem}
            records: list[dict[str, Any]] = [{**network, **asdict(found)} for found in (*agreements, *checks)]
            with replacing(given.json) as partial:
                partial.write_text(json.dumps(records, indent=1) + "\n")
    except HorqError as error:
        print(f"engines: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    print(table(agreements, checks))
    return 0 if all(found.holds for found in (*agreements, *checks)) else 1


if __name__ == "__main__":
    sys.exit(main())
