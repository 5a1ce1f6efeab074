"""Model files and PyTorch modules → Relax with named layers (docs/architecture.md, section 1).

`onnx` and `torch` are imported by whoever needs one of them: neither package is a dependency of the other's users.
"""

from .imported import ImportedModel

__all__ = ["ImportedModel"]
