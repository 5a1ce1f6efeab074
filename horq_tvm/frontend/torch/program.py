"""A PyTorch model as the importer wants it: an ExportedProgram of static shapes, its layers not taken apart."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.export import ExportedProgram

from ... import torch_ops  # noqa: F401  registers the HORQ operators, without which a saved program cannot be read
from ...errors import HorqError, UsageError
from ..shapes import fix_shapes

_KEPT = (
    *("linear.default", "conv1d.default", "conv1d.padding", "conv2d.default", "conv2d.padding"),
    *("matmul.default", "max_pool1d.default", "max_pool2d.default", "avg_pool1d.default", "avg_pool2d.default"),
    *("adaptive_avg_pool2d.default", "prelu.default"),
)
"""Operators of aten that a converter of ours or TVM's takes whole."""


def load(
    model: torch.nn.Module | ExportedProgram | str | Path,
    example_inputs: Sequence[torch.Tensor] | None,
    input_shapes: Mapping[str, tuple[int, ...]],
) -> ExportedProgram:
    """The model as a decomposed ExportedProgram of static input shapes. Raises as `import_torch` does."""
    if isinstance(model, torch.nn.Module):
        if example_inputs is None or isinstance(example_inputs, torch.Tensor):
            found = "no example inputs" if example_inputs is None else "a tensor that is in no tuple"
            raise UsageError(
                f"{type(model).__name__}: found {found}; accepted are the tensors of one call, example_inputs=(x, ...)"
            )
        program = _export(model, tuple(example_inputs))
    elif isinstance(model, ExportedProgram):
        program = model
    elif isinstance(model, str | Path):
        program = _read(Path(model))
    else:
        raise UsageError(
            f"found a {type(model).__name__}; accepted are an nn.Module, an ExportedProgram and the path of a .pt2 file"
        )
    program = _with_shapes(program, input_shapes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = torch.export.default_decompositions()
        for name in _KEPT:
            packet, overload = name.split(".")
            table.pop(getattr(getattr(torch.ops.aten, packet), overload), None)
        return program.run_decompositions(table)


def user_inputs(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """The example value (a fake tensor) of each input, in order. Raises HorqError for an input that is no tensor."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    found: dict[str, torch.Tensor] = {}
    for name in program.graph_signature.user_inputs:
        value = values.get(name) if isinstance(name, str) else name
        if not isinstance(value, torch.Tensor):
            raise HorqError(f"input {name!r}: found {type(value).__name__}; accepted are tensors")
        found[str(name)] = value
    return found


def _export(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> ExportedProgram:
    training = {module: module.training for module in model.modules()}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(model.eval(), inputs)
    except UsageError:
        raise
    except Exception as error:  # torch.export has no error of its own
        raise HorqError(f"{type(model).__name__}: torch.export cannot export it ({_first_line(error)})") from error
    finally:
        for module, was_training in training.items():
            module.training = was_training


def _read(path: Path) -> ExportedProgram:
    if not path.is_file():
        raise UsageError(f"{path}: found no such file; accepted is the path of a saved ExportedProgram (.pt2)")
    try:
        with _quiet():
            return torch.export.load(path)
    except Exception as error:  # zipfile, pickle, json and torch raise each their own
        raise HorqError(f"{path}: not a readable ExportedProgram ({_first_line(error)})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what torch.export logs before it raises: the error says it."""
    log = logging.getLogger("torch.export")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _with_shapes(program: ExportedProgram, shapes: Mapping[str, tuple[int, ...]]) -> ExportedProgram:
    """The program with its open dimensions fixed by exporting it once more; itself where none is open."""
    inputs = user_inputs(program)
    found = {
        name: [str(extent) if isinstance(extent, torch.SymInt) else int(extent) for extent in value.shape]
        for name, value in inputs.items()
    }
    fixed = fix_shapes(found, shapes)
    if all(isinstance(extent, int) for extents in found.values() for extent in extents):
        return program
    return _export_again(program, tuple(torch.zeros(fixed[name], dtype=value.dtype) for name, value in inputs.items()))


def _export_again(program: ExportedProgram, values: tuple[torch.Tensor, ...]) -> ExportedProgram:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(program.module(), values)
    except Exception as error:
        raise UsageError(f"the program does not take the given input shapes ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
