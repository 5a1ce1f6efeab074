"""ONNX Runtime as a peer to be measured against: float32 with every graph optimisation, int8 in both of its forms."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from horq_tvm import extras
from horq_tvm.errors import HorqError, UsageError
from horq_tvm.specs import TensorSpec

FLOAT32 = "onnxruntime"
INT8 = "onnxruntime-int8"
NAMES = (FLOAT32, INT8)

CALIBRATION_SAMPLES = 32
# The first opset whose QuantizeLinear has a scale a channel.
INT8_OPSET = 13
SEED = 0

Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Peer:
    """An engine ready to run one model on one set of inputs.

    `engine` is one of NAMES, `form` tells the int8 forms apart, `calibration` says on what an int8 form was calibrated.
    """

    engine: str
    call: Callable[[], object]
    form: str | None = None
    calibration: str | None = None


def random_feeds(inputs: Iterable[TensorSpec], seed: int = SEED) -> dict[str, np.ndarray]:
    """Seeded inputs by name: standard normal floats; integers drawn from the whole of 8 bits, or 0 and 1 for bool."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for spec in inputs:
        dtype = np.dtype(spec.dtype)
        if dtype.kind == "f":
            feeds[spec.name] = rng.standard_normal(spec.shape).astype(dtype)
        else:
            high = 2 if dtype.kind == "b" else 128 if dtype == np.int8 else 256
            feeds[spec.name] = rng.integers(0, high, spec.shape).astype(dtype)
    return feeds


def float32(model: Path, feeds: Feeds, threads: int = 1) -> Peer:
    """ONNX Runtime on the model as it is.

    Raises:
        HorqError: ONNX Runtime refuses the model or the inputs.
    """
    return Peer(FLOAT32, _call(model, _session(model, threads), feeds))


def int8(
    model: Path, feeds: Feeds, threads: int = 1, calibration: Mapping[str, np.ndarray] | None = None
) -> tuple[Peer, ...]:
    """The model quantised statically to int8 (unsigned activations, signed weights a channel), as QDQ and QOperator.

    Which one is faster depends on the network, so that a fair comparison times both.

    `calibration` holds arrays by input name, axis 0 the samples; without it, 32 seeded normal samples serve.

    Raises:
        UsageError: the calibration data does not fit the model's inputs.
        HorqError: ONNX Runtime cannot quantise the model.
    """
    try:
        from onnxruntime import quantization
        from onnxruntime.quantization import shape_inference
    except ImportError as error:
        raise extras.missing(error) from error

    samples, source = _calibration_samples(feeds, calibration)
    peers = []
    with tempfile.TemporaryDirectory() as folder, _explained(model, "quantising it to int8"):
        whole, prepared = Path(folder) / "whole.onnx", Path(folder) / "prepared.onnx"
        _write_whole(model, whole)
        shape_inference.quant_pre_process(str(whole), str(prepared), skip_symbolic_shape=True)
        for form in ("QDQ", "QOperator"):
            quantised = Path(folder) / f"{form}.onnx"
            quantization.quantize_static(
                str(prepared),
                str(quantised),
                _Reader(samples),
                quant_format=quantization.QuantFormat[form],
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
            peers.append(Peer(INT8, _call(model, _session(quantised, threads), feeds), form, source))
    return tuple(peers)


def holds_horq_nodes(model: Path) -> bool:
    """Whether ONNX Runtime would run the planes of trained HORQ layers one by one, as float convolutions.

    Raises:
        HorqError: the file is no ONNX model.
    """
    try:
        import onnx
    except ImportError as error:
        raise extras.missing(error) from error

    with _explained(model, "reading it"):
        return any(node.domain == "horq" for node in onnx.load(model, load_external_data=False).graph.node)


def _write_whole(model: Path, out: Path) -> None:
    """The model in one file, its external weights too (the quantiser looks for them beside its own copies), and of an
    opset in which it can be quantised a channel."""
    import onnx

    proto = onnx.load(model)
    opset = max((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), default=INT8_OPSET)
    if opset < INT8_OPSET:
        proto = onnx.version_converter.convert_version(proto, INT8_OPSET)
    onnx.save(proto, out)


class _Reader:
    """onnxruntime's CalibrationDataReader over a list; it asks by `get_next`, None being the end."""

    def __init__(self, samples: Sequence[Feeds]) -> None:
        self._samples: Iterator[Feeds] = iter(samples)

    def get_next(self) -> Feeds | None:
        return next(self._samples, None)


def _calibration_samples(feeds: Feeds, calibration: Mapping[str, np.ndarray] | None) -> tuple[list[Feeds], str]:
    """Batches of the shape of `feeds`, and where they come from in words."""
    if calibration is None:
        specs = [TensorSpec(name, array.shape, array.dtype.name) for name, array in feeds.items()]
        samples: list[Feeds] = [random_feeds(specs, seed) for seed in range(1, CALIBRATION_SAMPLES + 1)]
        return samples, f"{CALIBRATION_SAMPLES} seeded normal samples"
    if set(calibration) != set(feeds):
        raise UsageError(
            f"calibration: found {', '.join(calibration)}; accepted: one array for each of {', '.join(feeds)}"
        )
    batches = {name: _batches(name, calibration[name], array) for name, array in feeds.items()}
    count = min(map(len, batches.values()))
    if count == 0:
        raise UsageError("calibration: fewer samples than one batch of the model; accepted: one batch or more")
    return [{name: parts[i] for name, parts in batches.items()} for i in range(count)], "the calibration data"


def _batches(name: str, data: np.ndarray, like: np.ndarray) -> list[np.ndarray]:
    if like.ndim == 0 or data.shape[1:] != like.shape[1:]:
        raise UsageError(
            f"calibration: {name} has shape {data.shape}; accepted: (samples, {str(like.shape[1:])[1:-1]})"
        )
    size = like.shape[0]
    return [data[i : i + size].astype(like.dtype) for i in range(0, len(data) - size + 1, size)]


def _session(model: Path, threads: int) -> Any:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise extras.missing(error) from error

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    with _explained(model, "loading it"):
        return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def _call(model: Path, session: Any, feeds: Feeds) -> Callable[[], object]:
    """A call of the session on `feeds`, tried once here so that a misfit shows before anything is timed."""
    wanted = [node.name for node in session.get_inputs()]
    if set(wanted) != set(feeds):
        raise UsageError(f"{model}: its inputs are {', '.join(wanted)}; the library's are {', '.join(feeds)}")
    run, inputs = session.run, dict(feeds)
    with _explained(model, "running it"):
        run(None, inputs)
    return lambda: run(None, inputs)


@contextmanager
def _explained(model: Path, doing: str) -> Iterator[None]:
    """ONNX Runtime raises a dozen types of its own; a user needs the model, what was being done, and the message."""
    if not model.is_file():
        raise UsageError(f"{model}: no such file")
    try:
        yield
    except HorqError:
        raise
    except Exception as error:
        raise HorqError(f"{model}: ONNX Runtime failed in {doing}: {error}") from error
