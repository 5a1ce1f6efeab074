"""The HORQ dialect of Relax: one operator a file. docs/architecture.md lists them in the order of the pipeline."""

from .binarize import BINARIZE, WORD_BITS, binarize, words_of
from .bitserial import BITSERIAL_CONV2D, BITSERIAL_DENSE, bitserial
from .conv2d import CONV2D, conv2d
from .dense import DENSE, dense
from .fake_quantize import FAKE_QUANTIZE, byte_activation, fake_quantize
from .geometry import Geometry
from .int8 import (
    INT8_CONV2D,
    INT8_DENSE,
    INT8_IMAGE,
    PACKED_INT8,
    QUANTIZE,
    int8_conv2d,
    int8_dense,
    int8_image,
    packed_int8,
    quantize,
)
from .name import NAME, name
from .packed import (
    PACKED_BITSERIAL,
    PACKED_CONV2D,
    PACKED_DEPTHWISE,
    STEP_WORDS,
    BorderClasses,
    packed_bitserial,
    packed_conv2d,
)
from .pad_planes import PAD_PLANES, pad_planes
from .patch import PATCH, patch
from .registry import shape_of
from .scales import SCALES, scales
from .split_nibbles import SPLIT_NIBBLES, split_nibbles

__all__ = [
    "BINARIZE",
    "BITSERIAL_CONV2D",
    "BITSERIAL_DENSE",
    "CONV2D",
    "DENSE",
    "FAKE_QUANTIZE",
    "INT8_CONV2D",
    "INT8_DENSE",
    "INT8_IMAGE",
    "NAME",
    "PACKED_BITSERIAL",
    "PACKED_CONV2D",
    "PACKED_DEPTHWISE",
    "PACKED_INT8",
    "PAD_PLANES",
    "PATCH",
    "QUANTIZE",
    "SCALES",
    "SPLIT_NIBBLES",
    "STEP_WORDS",
    "WORD_BITS",
    "BorderClasses",
    "Geometry",
    "binarize",
    "bitserial",
    "byte_activation",
    "conv2d",
    "dense",
    "fake_quantize",
    "int8_conv2d",
    "int8_dense",
    "int8_image",
    "name",
    "packed_bitserial",
    "packed_conv2d",
    "packed_int8",
    "pad_planes",
    "patch",
    "quantize",
    "scales",
    "shape_of",
    "split_nibbles",
    "words_of",
]
