"""`python -m benchmarks.cuda`: networks and their kernels on a card against cuDNN, once their results are right.

With --resources no card is needed: for each kernel and architecture the instruction that does its work, registers,
spills, shared memory and occupancy, of the machine code as it is.

Times are those of the card: a network's inputs lie in its memory, and runs follow each other without waiting. Peers,
where they are installed: PyTorch in float16 (cuDNN, channels last, a CUDA graph), ONNX Runtime in float32 and, by
TensorRT, in int8. With a CPU as --target all of this runs there, on TVM's runtime, and says nothing of a card.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import horq_tvm
from examples.layerwise import Fed, LayerTally, Seen, library_scales
from horq_tvm import targets, zoo
from horq_tvm.cli import options
from horq_tvm.cli.show import progress, table
from horq_tvm.cuda import device, disassembly, fatbin, toolkit
from horq_tvm.errors import HorqError, UsageError
from horq_tvm.export import to_onnx
from horq_tvm.nn import HorqConv2d, HorqLayer
from horq_tvm.runtime.virtual_machine import VirtualMachineModel

from .arguments import count, orders, seconds
from .command import deliver, execute

Record = dict[str, Any]
Timer = Callable[[int], float]
"""Runs n times and returns the seconds of all."""

OURS, TORCH, ORT, ORT_INT8 = "horq-tvm", "torch", "onnxruntime", "onnxruntime-int8"
IMAGE, SCORES = "image", "scores"
ROUNDS = 9


@dataclass(frozen=True)
class Subject:
    """A network of the zoo with its HORQ layers, seeded; statistics and β are those of its image."""

    name: str
    order: int
    batch: int

    @property
    def image(self) -> torch.Tensor:
        return zoo.example(self.name, self.batch)

    def module(self) -> torch.nn.Module:
        torch.manual_seed(0)
        network = zoo.build(self.name, order=self.order, scale="static").train()
        with torch.no_grad():
            network(self.image)
        return network.eval()

    def build(self, target: targets.Target, folder: Path, taps: Sequence[str] = ()) -> horq_tvm.CompiledModel:
        path = folder / f"{self.name}-{self.order}-{self.batch}.onnx"
        if not path.is_file():
            to_onnx(self.module(), self.image, path, [IMAGE], [SCORES])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return horq_tvm.build(path, target, taps=taps, emit="tvm")


# --- What the kernels take --------------------------------------------------------------------------------------------


def resources(name: str, given: Sequence[int], target: targets.Target, folder: Path) -> list[Record]:
    """A record a kernel, order and architecture."""
    found: list[Record] = []
    for order in given:
        compiled = Subject(name, order, 1).build(target, folder)
        steps = compiled.report["steps"]
        code = fatbin.extract(compiled.library.read_bytes())
        listing = disassembly.instructions(code, toolkit.find())
        for use in compiled.report["kernels"]:
            step = use["kernel"].partition("_kernel")[0]
            instruction = disassembly.counting(listing[use["kernel"], use["arch"]])
            layer = steps.get(step, step).partition(" ")[2]
            found.append({"network": name, "order": order, "layer": layer, "instruction": instruction, **use})
    return found


def describe_resources(records: Sequence[Record]) -> str:
    """A column an architecture, a row for all kernels of one order that take the same; those of layers by the first."""
    archs = sorted({record["arch"] for record in records})
    kernels: dict[tuple[int, str], list[Record]] = {}
    for record in sorted(records, key=lambda record: record["arch"]):
        kernels.setdefault((record["order"], record["kernel"]), []).append(record)
    rows: dict[tuple[Any, ...], list[str]] = {}
    for (order, kernel), of in kernels.items():
        cells = tuple(f"{r['registers']} / {r['occupancy']:.0%}" for r in of)
        named, shared = (
            "/".join(dict.fromkeys(str(r[key] or "-") for r in of)) for key in ("instruction", "shared_bytes")
        )
        row = (order, named, of[0]["threads"], shared, *cells)
        rows.setdefault(row, []).append(of[0]["layer"] or kernel.partition("_kernel")[0])
    header = ("layer, or kernel", "of these", "K", "by", "threads", "shared", *(f"sm_{arch}" for arch in archs))
    spilled = sum(record["spilled_bytes"] > 0 for record in records)
    text = table(header, [(sorted(names)[0], len(names), *row) for row, names in sorted(rows.items(), key=_order)])
    counts = f"{len(kernels)} kernels × {len(archs)} architectures, {spilled} with spills"
    return f"{text}\n\n{counts}; registers of a thread / share of a multiprocessor's warps"


def _order(row: tuple[tuple[Any, ...], list[str]]) -> tuple[Any, ...]:
    """By planes, then what counts bits, then by layer."""
    (order, instruction, *_), names = row
    return (order, instruction == "-", sorted(names)[0])


# --- On a card --------------------------------------------------------------------------------------------------------


def check(subject: Subject, target: targets.Target, folder: Path) -> dict[str, tuple[int, ...]]:
    """Every HORQ layer on its own input against PyTorch; returns the shapes of these inputs, NHWC.

    HorqError: planes differ where no sign is doubtful, or an output lies outside the tolerance.
    """
    module = subject.module()
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, HorqLayer)}
    tapped = subject.build(target, folder, tuple(layers)).load()(subject.image.numpy())
    shapes = {}
    for name, layer in layers.items():
        x, beta, y = (tapped[f"tap.{name}.{part}"] for part in ("input", "beta", "output"))
        shapes[name] = x.shape
        images = (torch.from_numpy(np.moveaxis(a, -1, 1) if a.ndim == 4 else a) for a in (x, y))
        given, output = (image.contiguous() for image in images)
        tally = LayerTally(OURS)
        tally.add(layer, Seen.of(layer, given), Fed(given, library_scales(layer, torch.from_numpy(beta)), output))
        result = tally.check(subject.batch)
        if not result.holds:
            raise HorqError(
                f"{subject.name} K={subject.order}, layer {name}: {result.wrong} of {result.signs} signs and"
                f" {result.outside} of {result.outputs} outputs are wrong (worst {result.worst:.1f} tolerances);"
                " nothing was timed"
            )
    return shapes


def median(timer: Timer, budget: float) -> tuple[float, float]:
    """Milliseconds of a run: the median and the least of ROUNDS blocks that take `budget` seconds together."""
    timer(3)
    once = max(timer(3) / 3, 1e-7)
    block = max(1, int(budget / ROUNDS / once))
    times = [timer(block) / block * 1e3 for _ in range(ROUNDS)]
    return statistics.median(times), min(times)


def timed(engine: str, subject: Subject, timer: Timer, budget: float, **more: Any) -> Record:
    """One record of the shared form."""
    half, least = median(timer, budget)
    how = {"scale": None, "rest": None, "threads": 1, "batch": subject.batch, "activation": "signed", **more}
    return {"network": subject.name, "engine": engine, "order": None, **how, "median_ms": half, "min_ms": least}


def networks(
    name: str, given: Sequence[int], batch: int, target: targets.Target, budget: float, folder: Path, say: Any
) -> list[Record]:
    """We at each order, then the peers that are there; every layer checked before anything is timed."""
    records: list[Record] = []
    shapes: Mapping[str, tuple[int, ...]] = {}
    for order in given:
        subject = Subject(name, order, batch)
        say(f"checking K={order}")
        shapes = check(subject, target, folder)
        say(f"timing K={order}")
        model = subject.build(target, folder).load()
        assert isinstance(model, VirtualMachineModel)
        x = subject.image.numpy()
        ours = {"order": order, "scale": "static", "rest": "float32"}
        records.append(timed(OURS, subject, model.timer(x), budget, **ours))
        for step, median_ns in model.profile(x):
            layer = step.partition(" ")[2]
            if layer in shapes:
                records.append(
                    {
                        "layer": layer,
                        "kernel": "conv+epilogue",
                        **ours,
                        "engine": OURS,
                        "batch": batch,
                        "median_ms": median_ns / 1e6,
                    }
                )
    subject = Subject(name, given[-1], batch)
    for engine, timer, form in peers(subject, folder):
        say(f"timing {engine} {form}")
        records.append(timed(engine, subject, timer, budget, rest=form))
    records += [
        {
            "layer": layer,
            "kernel": "conv",
            "engine": TORCH,
            "order": None,
            "rest": "float16",
            "batch": batch,
            "median_ms": ms,
        }
        for layer, ms in cudnn_layers(subject, shapes, budget / 10)
    ]
    return records


def peers(subject: Subject, folder: Path) -> Iterator[tuple[str, Timer, str]]:
    """Engine, timer and arithmetic of the float network on each peer that finds a card."""
    torch.manual_seed(0)
    twin = zoo.build(subject.name, order="float").eval()
    if torch.cuda.is_available():
        yield TORCH, _graph_timer(twin.half().cuda().to(memory_format=torch.channels_last), subject.image), "float16"
        twin = twin.float().cpu().to(memory_format=torch.contiguous_format)
    try:
        import onnxruntime as ort
    except ImportError:
        return
    path = folder / f"{subject.name}-float-{subject.batch}.onnx"
    to_onnx(twin, subject.image, path, [IMAGE], [SCORES])
    available = ort.get_available_providers()
    if "CUDAExecutionProvider" in available:
        yield ORT, _bound_timer(path, ["CUDAExecutionProvider"], subject.image), "float32"
    if "TensorrtExecutionProvider" in available:
        providers = [("TensorrtExecutionProvider", {"trt_int8_enable": True, "trt_fp16_enable": True})]
        yield ORT_INT8, _bound_timer(quantised(path, subject.image), providers, subject.image), "int8"


def quantised(path: Path, image: torch.Tensor) -> Path:
    """The model with QuantizeLinear and DequantizeLinear, symmetric, as TensorRT takes it."""
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        samples = iter([{IMAGE: image.numpy()}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.samples, None)

    out = path.with_suffix(".int8.onnx")
    symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True}
    int8 = quantization.QuantType.QInt8
    quantization.quantize_static(
        path, out, Reader(), per_channel=True, activation_type=int8, weight_type=int8, extra_options=symmetric
    )
    return out


def _graph_timer(module: torch.nn.Module, image: torch.Tensor) -> Timer:
    """PyTorch on the card, its launches recorded once."""
    x = image.half().cuda().to(memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = True
    with torch.no_grad():
        replayed = torch.cuda.make_graphed_callables(module, (x,))

    def measure(runs: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.no_grad():
            begin.record()
            for _ in range(runs):
                replayed(x)
            end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    return measure


def _bound_timer(path: Path, providers: Sequence[Any], image: torch.Tensor) -> Timer:
    """ONNX Runtime on the card, input and output in its memory."""
    import time

    import onnxruntime as ort

    session = ort.InferenceSession(str(path), providers=list(providers))
    binding = session.io_binding()
    binding.bind_ortvalue_input(IMAGE, ort.OrtValue.ortvalue_from_numpy(image.numpy(), "cuda", 0))
    binding.bind_output(SCORES, "cuda")

    def measure(runs: int) -> float:
        binding.synchronize_inputs()
        begin = time.perf_counter()
        for _ in range(runs):
            session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return time.perf_counter() - begin

    return measure


def cudnn_layers(subject: Subject, shapes: Mapping[str, tuple[int, ...]], budget: float) -> Iterator[tuple[str, float]]:
    """Milliseconds of each HORQ convolution as cuDNN computes it in float16; nothing without a card."""
    if not torch.cuda.is_available():
        return
    for name, layer in subject.module().named_modules():
        if isinstance(layer, HorqConv2d) and name in shapes:
            plain = torch.nn.Conv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, 0, layer.dilation, layer.groups
            )
            module = torch.nn.Sequential(torch.nn.ZeroPad2d(_around(layer)), plain).half().cuda()
            n, h, w, c = shapes[name]
            yield name, median(_graph_timer(module, torch.randn(n, c, h, w)), budget)[0]


def _around(layer: HorqConv2d) -> tuple[int, int, int, int]:
    """left, right, top, bottom"""
    top, left, bottom, right = layer.padding
    return (left, right, top, bottom)


def describe(records: Sequence[Record]) -> str:
    """Networks, then layers, one row an engine and order."""
    whole = [record for record in records if "network" in record]
    rows = [
        (
            r["network"],
            r["batch"],
            r["engine"],
            r["order"] or "",
            r["rest"] or "",
            f"{r['median_ms']:.3f}",
            f"{r['min_ms']:.3f}",
        )
        for r in whole
    ]
    text = table(("network", "batch", "engine", "K", "rest", "median ms", "least ms"), rows)
    layers: dict[str, dict[str, float]] = {}
    for record in records:
        if "layer" in record:
            column = f"K={record['order']}" if record["engine"] == OURS else f"{record['engine']} {record['rest']}"
            layers.setdefault(record["layer"], {})[column] = record["median_ms"] * 1e3
    if not layers:
        return text
    columns = list(dict.fromkeys(column for of in layers.values() for column in of))
    cells = [(layer, *(f"{of[c]:.1f}" if c in of else "" for c in columns)) for layer, of in layers.items()]
    note = "layers, µs; ours with epilogue, next planes and the wait for the card"
    return f"{text}\n\n{note}\n{table(('layer', *columns), cells)}"


# --- Command line -----------------------------------------------------------------------------------------------------


def parser() -> options.Parser:
    top = options.Parser(prog="python -m benchmarks.cuda", description=(__doc__ or "").split("\n\n")[0])
    top.add_argument("--resources", action="store_true", help="what the kernels take of a card; needs none")
    top.add_argument("--network", choices=tuple(zoo.NETWORKS), default="resnet18", help="default: resnet18")
    top.add_argument("--orders", type=orders, default=(1, 2), metavar="1,2", help="planes K (default: 1,2)")
    top.add_argument("--batch", type=count, default=1, metavar="N", help="images of a run (default: 1)")
    top.add_argument("--target", default="cuda", metavar="NAME", help="one of `horq-tvm targets` (default: cuda)")
    top.add_argument("--seconds", type=seconds, default=2.0, metavar="S", help="time for each engine (default: 2)")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options.add_json_option(top)
    return top


def run(arguments: argparse.Namespace) -> None:
    """Check, measure, print."""
    target = targets.resolve(arguments.target)
    if target.family != "cuda" and arguments.resources:
        cards = ", ".join(name for name, known in targets.presets().items() if known.family == "cuda")
        raise UsageError(f"--target {target.name} is a CPU; accepted with --resources: {cards}")
    if target.family == "cuda" and not arguments.resources:
        try:
            device.card_for(target.archs)
        except HorqError as error:
            raise HorqError(f"{error}; without a card, --resources says what the kernels take of one") from error
    with tempfile.TemporaryDirectory(prefix="horq-tvm-") as folder, progress() as say:
        if arguments.resources:
            found = resources(arguments.network, arguments.orders, target, Path(folder))
        else:
            how = (arguments.network, arguments.orders, arguments.batch, target, arguments.seconds)
            found = networks(*how, Path(folder), say)
    deliver(found, arguments.json, describe_resources if arguments.resources else describe)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return execute("cuda", parser(), run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
