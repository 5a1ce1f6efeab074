"""`horq-tvm inspect`: what a library holds and needs.

Reads the file, whatever machine it was built for; needs numpy alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from horq_tvm.cli import options
from horq_tvm.cli.show import shape_text, table, write_json

# Measured: from here on, ONNX Runtime's int8 convolutions (VNNI) are faster than the planes of a HORQ layer.
SLOWER_THAN_INT8_ORDER = 6


def add(verbs: options.Verbs) -> None:
    """Add the verb to the parser."""
    verb = options.add_verb(verbs, "inspect", "say what a library holds and needs", run)
    verb.add_argument("library", metavar="OUT.so", help="what `horq-tvm build` wrote, for this machine or another")
    options.add_json_option(verb)


def run(arguments: argparse.Namespace) -> None:
    """Print the manifest."""
    from horq_tvm.runtime.loader import read_manifest

    manifest = read_manifest(arguments.library).to_dict()
    if arguments.json is not None:
        write_json(arguments.json, manifest)
    if arguments.json != "-":
        print(f"{arguments.library}\n{describe(manifest)}")


def describe(manifest: Mapping[str, Any]) -> str:
    """A manifest, or a build's report, as text."""
    layers = manifest["layers"]
    rewritten = [layer for layer in layers if layer["order"] is not None]
    lines = [
        f"target    {manifest['target']}",
        f"needs     {' '.join(manifest['cpu_features']) or 'no particular CPU features'}",
        *_runtime(manifest),
        *_tensors("input", manifest["inputs"]),
        *_tensors("output", manifest["outputs"]),
        f"size      {_sizes(manifest['bytes'])}",
        f"layers    {len(layers)}, {len(rewritten)} of them binary{_int8_share(layers)}",
        *_int8_cost(manifest.get("rest")),
    ]
    if layers:
        rows = [
            (
                layer["name"],
                layer["op"],
                layer["order"],
                layer["scale"] or ("int8" if _is_int8(layer) else "float"),
                layer["schedule"],
                layer.get("records", 0),
                layer["reason"] or "",
            )
            for layer in layers
        ]
        lines += ["", table(("layer", "op", "order", "scale", "schedule", "records", "reason"), rows)]
    slow = [layer["name"] for layer in rewritten if layer["order"] >= SLOWER_THAN_INT8_ORDER]
    if slow:
        order = SLOWER_THAN_INT8_ORDER
        lines += ["", f"note: from order {order} on, int8 with VNNI is faster than the planes: {', '.join(slow)}"]
    return "\n".join(lines)


def _is_int8(layer: Mapping[str, Any]) -> bool:
    return layer.get("rest") == "int8"


def _int8_share(layers: Sequence[Mapping[str, Any]]) -> str:
    count = sum(map(_is_int8, layers))
    return f", {count} int8" if count else ""


def _int8_cost(rest: Mapping[str, Any] | None) -> list[str]:
    """What a build says of its int8 layers; a library does not carry it."""
    if rest is None:
        return []
    cosine = "undefined" if rest["cosine"] is None else f"{rest['cosine']:.4f}"
    agreement = f"top-1 {rest['agreement']:.0%}, cosine {cosine} against a float32 rest"
    return [f"int8      {agreement}, on {rest['calibration']}, which gave the ranges"]


def _runtime(manifest: Mapping[str, Any]) -> list[str]:
    """What a library for TVM's runtime needs besides; and what its kernels take of a card, which a build says alone."""
    if not manifest.get("runtime"):
        return []
    card = f", a card of {', '.join(f'sm_{arch}' for arch in manifest['archs'])}" if manifest["archs"] else ""
    lines = [f"runtime   TVM's{card}"]
    if uses := manifest.get("kernels"):
        spilled = sum(use["spilled_bytes"] > 0 for use in uses)
        lines.append(
            f"kernels   {len({use['kernel'] for use in uses})} a card, at most {max(use['registers'] for use in uses)}"
            f" registers and {max(use['shared_bytes'] for use in uses)} bytes of shared memory, {spilled} with spills"
        )
    return lines


def _tensors(label: str, specs: Iterable[Mapping[str, Any]]) -> list[str]:
    return [f"{label:8}  {spec['name']}  {shape_text(spec['shape'])}  {spec['dtype']}" for spec in specs]


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {count / 1000:.1f} kB" for name, count in sizes.items())
