"""`standalone`: a lowered module as one shared library that exports `horq_*` and needs only libc, libm and pthread."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import tvm

from horq_tvm.emit import cpu_features, driver, kernels, link, memory
from horq_tvm.emit.plan import CallPlan, lower, make_plan
from horq_tvm.errors import HorqError
from horq_tvm.files import replacing
from horq_tvm.manifest import ByteCounts, Manifest
from horq_tvm.runtime.elf import Elf
from horq_tvm.runtime.loader import MANIFEST_SECTION
from horq_tvm.specs import TensorSpec

_PACKED_DTYPES = frozenset({"uint32", "int32", "uint8"})  # words, the constants of borders, and bits laid out in bytes
_ANY_SIZE = 10**12  # wider than any byte count to come


class EmitTarget(Protocol):
    """What emitting asks of a target: see `horq_tvm.targets.Target`."""

    @property
    def name(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def features(self) -> tuple[str, ...]: ...
    @property
    def compiler(self) -> tuple[str, ...]: ...
    def tvm_target(self) -> tvm.target.Target: ...


def standalone(
    lowered: tvm.IRModule,
    target: EmitTarget,
    manifest: Manifest,
    out: Path,
    step_names: Mapping[str, str] | None = None,
) -> Manifest:
    """Writes the library `out` and returns its manifest, with `target`, `cpu_features` and `bytes` filled in.

    `lowered` is the form of docs/architecture.md, section 4; `manifest` names its inputs and outputs in order.
    `step_names` maps the name of a kernel to what the profile shows for its calls.

    HorqError: no C compiler, an unwritable path, a kernel that allocates a workspace, an operator that was not lowered,
    a CPU feature that the library could not check. Nothing is left at `out` then but what was there before.
    """
    compiler = link.find_compiler(target.compiler)
    questions = cpu_features.questions(target.family, target.features)
    manifest = replace(manifest, target=target.name, cpu_features=tuple(target.features))
    with replacing(out) as partial, tempfile.TemporaryDirectory(prefix="horq-tvm-") as scratch:
        folder = Path(scratch)
        mod = lower(lowered)
        plan = make_plan(mod, step_names)
        check_interface(plan, manifest)
        placement = memory.place(plan)
        symbols = kernels.symbol_names(plan.steps)
        objects = []
        if symbols:
            kernels.compile_kernels(mod, symbols, target.tvm_target(), folder / "kernels.o", placement.in_place)
            objects.append("kernels.o")
        source = driver.model_source(plan, placement, symbols, manifest.inputs, manifest.outputs, questions)
        (folder / "model.c").write_text(source)
        (folder / "data.S").write_text(driver.data_assembly("weights.bin", "manifest.json"))
        (folder / "weights.bin").write_bytes(driver.weights_image(plan, placement))
        manifest = replace(manifest, bytes=count_weights(plan))
        room = manifest_room(manifest)
        (folder / "manifest.json").write_bytes(bytes(room))
        link.link(compiler, target.family, folder, objects, partial)
        return write_manifest(partial, manifest, room)


def check_interface(plan: CallPlan, manifest: Manifest) -> None:
    """The manifest must speak of the same tensors as main does: a library that says otherwise corrupts memory."""
    params = [index for index, buffer in enumerate(plan.buffers) if buffer.kind == "input"]
    views = {view.buffer: view for view in reversed(plan.views)}
    _check_specs("input", [(views[p].shape, views[p].dtype) for p in params], manifest.inputs)
    outputs = [plan.views[view] for view in plan.outputs]
    _check_specs("output", [(view.shape, view.dtype) for view in outputs], manifest.outputs)


def _check_specs(kind: str, found: Sequence[tuple[tuple[int, ...], str]], specs: Sequence[TensorSpec]) -> None:
    stated = [(spec.shape, spec.dtype) for spec in specs]
    if list(found) != stated:
        raise HorqError(f"main has the {kind}s {list(found)}, but the manifest states {stated}")


def count_weights(plan: CallPlan) -> ByteCounts:
    """Bytes of the constants; those that are only ever seen as words or bytes of bits count as packed."""
    dtypes: dict[int, set[str]] = {}
    for view in plan.views:
        dtypes.setdefault(view.buffer, set()).add(view.dtype)
    packed = unpacked = 0
    for index, buffer in enumerate(plan.buffers):
        if buffer.kind == "constant" and dtypes[index] <= _PACKED_DTYPES:
            packed += buffer.nbytes
        elif buffer.kind == "constant":
            unpacked += buffer.nbytes
    return ByteCounts(weights_packed=packed, weights_float=unpacked)


def manifest_room(manifest: Manifest) -> int:
    """Bytes to keep for the manifest and its final NUL before the size of the code, which it states, is known."""
    widest = replace(manifest, bytes=replace(manifest.bytes, code=_ANY_SIZE, manifest=_ANY_SIZE))
    return len(widest.to_json().encode()) + 1


def write_manifest(library: Path, manifest: Manifest, room: int, further_code: int = 0) -> Manifest:
    """Fills the room that the linked library keeps for the manifest, padded with blanks.

    `further_code`: bytes of machine code in the library's data, a card's.
    """
    elf = Elf.read(library)
    section = elf.section(MANIFEST_SECTION)
    assert section is not None
    assert section.size == room
    counts = replace(manifest.bytes, code=elf.code_bytes + further_code, manifest=room)
    manifest = replace(manifest, bytes=counts)
    with library.open("r+b") as file:
        file.seek(section.offset)
        file.write(manifest.to_json().encode().ljust(room - 1) + b"\0")
    return manifest
