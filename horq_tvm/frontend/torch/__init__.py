"""PyTorch → Relax with named layers. Importing this package does not import torch; `import_torch` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UsageError
from ..imported import ImportedModel

if TYPE_CHECKING:
    import torch

__all__ = ["import_torch"]


def import_torch(
    model: torch.nn.Module | torch.export.ExportedProgram | str | Path,
    example_inputs: Sequence[torch.Tensor] | None = None,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> ImportedModel:
    """A PyTorch model as Relax with named layers: a module, an ExportedProgram, or the path of a saved one (.pt2).

    A module is exported in eval mode with `example_inputs`, which fix the shapes, and left in the mode it was in.
    `input_shapes` gives the shape of inputs that an ExportedProgram leaves open, by input name. Inputs carry the names
    of forward's arguments; the outputs are "output", or "output_0", "output_1", ... where there are several.

    Raises UsageError for a missing file, missing example inputs, or a missing or wrong input shape; HorqError for a
    file that is no ExportedProgram, a module that cannot be exported, and operators (all, with their nodes) that cannot
    be compiled.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "importing a PyTorch model: found no torch; accepted is an installation with pip install 'horq-tvm[torch]'"
        ) from error
    from .importer import import_program

    return import_program(model, example_inputs, input_shapes or {})
