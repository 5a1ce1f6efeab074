"""The window of a convolution: which input positions an output position reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Geometry:
    """Kernel, strides, padding (top, left, bottom, right), dilation and groups of a 2-D convolution."""

    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, attrs: Any) -> Geometry:
        """The geometry that `attributes()` wrote on an operator call."""

        def ints(key: str) -> tuple[int, ...]:
            return tuple(int(v) for v in attrs[key])

        kernel, strides, dilation = ints("kernel"), ints("strides"), ints("dilation")
        top, left, bottom, right = ints("padding")
        return cls(
            (kernel[0], kernel[1]),
            (strides[0], strides[1]),
            (top, left, bottom, right),
            (dilation[0], dilation[1]),
            int(attrs["groups"]),
        )

    def attributes(self) -> dict[str, Any]:
        """As attributes of an operator call."""
        return {
            "kernel": list(self.kernel),
            "strides": list(self.strides),
            "padding": list(self.padding),
            "dilation": list(self.dilation),
            "groups": self.groups,
        }

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """HO and WO for an unpadded input of `height` × `width`."""
        top, left, bottom, right = self.padding
        span_y = self.dilation[0] * (self.kernel[0] - 1) + 1
        span_x = self.dilation[1] * (self.kernel[1] - 1) + 1
        return (
            (height + top + bottom - span_y) // self.strides[0] + 1,
            (width + left + right - span_x) // self.strides[1] + 1,
        )
