"""`horq-tvm bench`: a library, or a model compiled on the spot, against ONNX Runtime in the same process."""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horq_tvm.cli import options
from horq_tvm.cli.show import progress, table, write_json
from horq_tvm.errors import UsageError
from horq_tvm.files import check_writable

if TYPE_CHECKING:
    from horq_tvm.manifest import LayerRecord
    from horq_tvm.peers import Peer

ENGINE = "horq-tvm"
PEERS = ("onnxruntime", "onnxruntime-int8")
SETTING = ("order", "scale", "rest", "activation")
ELF_MAGIC = b"\x7fELF"


def add(verbs: options.Verbs) -> None:
    """Add the verb to the parser."""
    verb = options.add_verb(verbs, "bench", "time a library, alone or against ONNX Runtime", run)
    verb.add_argument("subject", metavar="OUT.so|MODEL", help="a library, or a model that is compiled first")
    verb.add_argument(
        "--peers", type=_peers, default=(), metavar=",".join(PEERS), help="engines to time in turn with it"
    )
    verb.add_argument(
        "--model", metavar="MODEL", help="the .onnx that the peers run (default: the MODEL that is compiled)"
    )
    verb.add_argument(
        "--seconds",
        type=options.above_zero("seconds"),
        default=2.0,
        metavar="S",
        help="how long to time each engine (default: 2)",
    )
    options.add_threads_option(verb)
    options.add_model_options(verb)
    options.add_json_option(verb)


def run(arguments: argparse.Namespace) -> None:
    """Time the engines in turn; print a table, or the records as JSON."""
    if arguments.json not in (None, "-"):
        sources = (arguments.subject, arguments.model, arguments.plan, arguments.calibration)
        check_writable(arguments.json, sources=sources)
    subject = Path(arguments.subject)
    is_library = _is_library(subject)
    peer_model = _peer_model(arguments, subject, is_library)
    given = options.build_arguments(arguments)
    calibration = given.get("calibration")
    if is_library and given.keys() - {"calibration"}:
        names = ", ".join(sorted(given.keys() - {"calibration"}))
        raise UsageError(f"{subject}: a library is compiled already; {names}: accepted with a model only")
    with progress() as say, tempfile.TemporaryDirectory() as folder:
        library = subject
        if not is_library:
            import horq_tvm

            library = Path(folder) / f"{subject.stem}.so"
            horq_tvm.build(arguments.subject, progress=say, **given).export(library)
        records = _measure(arguments, library, peer_model, calibration, say)
    if arguments.json is not None:
        write_json(arguments.json, records)
    if arguments.json != "-":
        print(_describe(records))


def _measure(
    arguments: argparse.Namespace,
    library: Path,
    peer_model: Path | None,
    calibration: dict[str, Any] | None,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One record an engine; of the int8 forms, the faster one's."""
    from horq_tvm import peers, timing
    from horq_tvm.runtime.loader import load

    model = load(library, threads=arguments.threads)
    feeds = peers.random_feeds(model.inputs)
    rivals = [] if peer_model is None else _rivals(arguments, peer_model, feeds, calibration, say)
    say("timing")
    calls: dict[str, Callable[[], object]] = {ENGINE: lambda: model(**feeds)}
    calls |= {f"{rival.engine} {rival.form or ''}": rival.call for rival in rivals}
    ours, *theirs = timing.interleaved(calls, arguments.seconds).values()
    subject = {
        "network": library.stem,
        "threads": arguments.threads,
        "batch": model.inputs[0].shape[0] if model.inputs and model.inputs[0].shape else 1,
    }
    records = [{**subject, "engine": ENGINE, **_setting(model.manifest.layers), **asdict(ours)}]
    by_speed = sorted(zip(theirs, rivals, strict=True), key=lambda pair: pair[0].median_ms)
    for engine in dict.fromkeys(rival.engine for rival in rivals):
        time, rival = next(pair for pair in by_speed if pair[1].engine == engine)
        form = {} if rival.form is None else {"form": rival.form, "calibration": rival.calibration}
        records.append({**subject, "engine": engine, **dict.fromkeys(SETTING), **asdict(time), **form})
    return records


def _rivals(
    arguments: argparse.Namespace,
    model: Path,
    feeds: dict[str, Any],
    calibration: dict[str, Any] | None,
    say: Callable[[str], None],
) -> list[Peer]:
    from horq_tvm import peers

    if peers.holds_horq_nodes(model):
        warnings.warn(
            f"{model}: ONNX Runtime runs its HORQ nodes as one float convolution a plane; --model takes the float form"
            " that one would deploy there",
            stacklevel=2,
        )
    rivals: list[Peer] = []
    if peers.FLOAT32 in arguments.peers:
        rivals.append(peers.float32(model, feeds, arguments.threads))
    if peers.INT8 in arguments.peers:
        say("quantising for onnxruntime-int8")
        rivals += peers.int8(model, feeds, arguments.threads, calibration)
    return rivals


def _setting(layers: Sequence[LayerRecord]) -> dict[str, Any]:
    """Order and scale where the library's binary layers agree on one, else null."""
    orders = {layer.order for layer in layers if layer.order is not None}
    scales = {layer.scale for layer in layers if layer.scale is not None}
    return {
        "order": orders.pop() if len(orders) == 1 else None,
        "scale": scales.pop() if len(scales) == 1 else None,
        "rest": "int8" if any(layer.rest == "int8" for layer in layers) else "float32",
        # A library does not tell whether its binary layers follow a ReLU.
        "activation": None,
    }


def _describe(records: Sequence[dict[str, Any]]) -> str:
    first = records[0]
    setting = (
        "float" if first["scale"] is None and first["order"] is None else f"order {first['order']}, {first['scale']}"
    )
    title = f"{first['network']}: {setting}, batch {first['batch']}, {first['threads']} thread(s)"
    rows = [
        (
            " ".join(filter(None, (record["engine"], record.get("form")))),
            f"{record['median_ms']:.3f}",
            f"{record['min_ms']:.3f}",
            f"{record['median_ms'] / first['median_ms']:.2f}x",
        )
        for record in records
    ]
    lines = [title, table(("engine", "median ms", "min ms", f"time / {ENGINE}"), rows)]
    lines += [f"{r['engine']}: calibrated on {r['calibration']}" for r in records if r.get("calibration")]
    return "\n".join(lines)


def _is_library(subject: Path) -> bool:
    try:
        with subject.open("rb") as stream:
            return stream.read(len(ELF_MAGIC)) == ELF_MAGIC
    except OSError as error:
        raise UsageError(f"{subject}: cannot be read: {error.strerror or error}") from error


def _peer_model(arguments: argparse.Namespace, subject: Path, is_library: bool) -> Path | None:
    """The .onnx that the peers run, or None where there are no peers."""
    if not arguments.peers:
        return None
    if arguments.model is None and is_library:
        raise UsageError(f"--peers: {subject} is a library; accepted: with --model, the .onnx that the peers run")
    model = Path(arguments.model or subject)
    if model.suffix != ".onnx":
        raise UsageError(f"--peers: ONNX Runtime cannot run {model}; accepted: --model with an .onnx file")
    return model


def _peers(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(filter(None, text.split(","))))
    unknown = [name for name in names if name not in PEERS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"found {text!r}; accepted: {', '.join(PEERS)}, separated by commas")
    return names
