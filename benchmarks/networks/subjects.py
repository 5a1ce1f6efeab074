"""The networks that are timed, each in the form that an engine would be given: HORQ for us, float for the peers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import torch
from torch import nn

from horq_tvm import peers, zoo
from horq_tvm.errors import UsageError
from horq_tvm.export import to_onnx
from horq_tvm.nn import HorqLayer
from horq_tvm.specs import Scale, TensorSpec

from . import odd, real

ACTIVATIONS = ("signed", "relu")
TWINS = ("deployed", "same")
STATISTICS_BATCH = 2
CALIBRATION_BATCHES = 4
IMAGE = "image"

ZOO = ("resnet18", "vgg_small", "resnet20", "quicknet")
NAMES = (*ZOO, odd.NAME, real.NSFW, real.EFFICIENTNET, *real.light_names())

Shapes = Mapping[str, tuple[int, ...]]


class Subject(Protocol):
    """A network of one batch size. `activation` says what its HORQ layers read; `shapes` are those of its inputs."""

    @property
    def name(self) -> str: ...
    @property
    def activation(self) -> str: ...
    @property
    def shapes(self) -> Shapes: ...

    def horq(self, order: int, scale: Scale) -> Path:
        """The file that we compile."""

    def arguments(self, order: int, scale: Scale) -> dict[str, Any]:
        """What `horq_tvm.build` and `layers.choose` are told beside the file."""

    def twin(self) -> Path:
        """The file that the peers run."""


def feeds(subject: Subject) -> dict[str, np.ndarray]:
    """Seeded normal inputs, the same for every engine."""
    return peers.random_feeds(TensorSpec(name, shape, "float32") for name, shape in subject.shapes.items())


def calibration(subject: Subject) -> dict[str, np.ndarray]:
    """Seeded normal samples, axis 0: enough that quantisers find a range, few enough that nobody waits for them."""
    specs = [
        TensorSpec(name, (CALIBRATION_BATCHES * shape[0], *shape[1:]), "float32")
        for name, shape in subject.shapes.items()
    ]
    return peers.random_feeds(specs, seed=1)


def find(name: str, batch: int, activations: Iterable[str], twin: str, folder: Path) -> list[Subject]:
    """The network of that name, one of NAMES or an .onnx file, with each of the activations that it can have.

    Files that are made on the way go to `folder`.

    Raises:
        UsageError: no such network.
        HorqError: it cannot be fetched.
    """
    if name in (*ZOO, odd.NAME):
        return [ZooNetwork(name, batch, activation, twin, folder) for activation in activations]
    if (path := real.find(name, batch, folder)) is not None:
        return [FloatFile(name, path, batch, folder)]
    if name.endswith(".onnx") and Path(name).is_file():
        return [FloatFile(Path(name).stem, Path(name), batch, folder)]
    raise UsageError(f"network {name!r}; accepted: {', '.join(NAMES)}, or an .onnx file that exists")


def architecture(name: str) -> zoo.Architecture:
    """Of a network of the zoo, or the one that is none of its."""
    return odd.ARCHITECTURE if name == odd.NAME else zoo.architecture(name)


def built(name: str, order: zoo.Order, scale: Scale) -> nn.Module:
    """The network, untrained; "float" has no scale."""
    found = architecture(name)
    return found.make(zoo.Layers(order, scale), found.classes)


def images(name: str, count: int) -> torch.Tensor:
    """Seeded normal images [N,C,H,W]."""
    return torch.randn(count, *architecture(name).image, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class ZooNetwork:
    """A network of `horq_tvm.zoo` or `odd`, weights drawn at random, batch statistics and β those of a seeded batch.

    With activation "relu" a ReLU stands before every HORQ layer, whose first plane is then all +1.
    """

    name: str
    batch: int
    activation: str
    twin_form: str
    folder: Path
    made: dict[str, Path] = field(default_factory=dict, compare=False)

    @property
    def shapes(self) -> Shapes:
        """One image input."""
        return {IMAGE: (self.batch, *architecture(self.name).image)}

    def horq(self, order: int, scale: Scale) -> Path:
        """With a HORQ node for each HORQ layer."""
        return self._exported(f"{scale}_{order}", lambda: self._network(order, scale))

    def arguments(self, order: int, scale: Scale) -> dict[str, Any]:
        """Nothing: the file says it all."""
        return {}

    def twin(self) -> Path:
        """The same convolutions in float, "deployed" as one would who never meant to binarise them, or the "same"."""
        if self.twin_form == "same":
            return self._exported("same", lambda: self._network("float", "static"))
        return self._exported("deployed", lambda: deployed(built(self.name, "float", "static"), self._inner()))

    def _inner(self) -> tuple[str, ...]:
        """Names of the layers that are binary in the HORQ form."""
        return tuple(n for n, layer in built(self.name, 1, "sample").named_modules() if isinstance(layer, HorqLayer))

    def _network(self, order: zoo.Order, scale: Scale) -> nn.Module:
        network = built(self.name, order, scale)
        if self.activation == "relu":
            for name in self._inner():
                network.set_submodule(name, nn.Sequential(nn.ReLU(), network.get_submodule(name)))
        return network

    def _exported(self, form: str, make: Callable[[], nn.Module]) -> Path:
        """The file, made once."""
        if form not in self.made:
            torch.manual_seed(0)
            network = make().train()
            with torch.no_grad():
                network(images(self.name, STATISTICS_BATCH))
            path = self.folder / f"{self.name}-{self.activation}-{form}-{self.batch}.onnx"
            to_onnx(network.eval(), images(self.name, self.batch), path, [IMAGE], ["scores"])
            self.made[form] = path
        return self.made[form]


class PostActivation(nn.Module):
    """ReLU(shortcut(x) + BN(conv(x))): He et al. 2016, whose BN folds into the convolution, as ONNX Runtime does."""

    def __init__(self, block: zoo.Block, filters: int) -> None:
        super().__init__()
        self.conv, self.shortcut, self.norm = block.conv, block.shortcut, nn.BatchNorm2d(filters)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.shortcut(x) + self.norm(self.conv(x)))


def deployed(network: nn.Module, inner: Iterable[str]) -> nn.Module:
    """A float network of the zoo as its classic self: every convolution before its BN, and ReLUs for PReLUs.

    BN before a convolution and PReLU serve binarisation; in float they cost ONNX Runtime time and nobody would have
    them, so that to be measured against a network that has them would flatter us.
    """
    convolutions = {id(network.get_submodule(name)) for name in inner}
    for name, module in list(network.named_modules()):
        if isinstance(module, zoo.Block):
            network.set_submodule(name, PostActivation(module, module.conv.out_channels))
    for module in list(network.modules()):
        if isinstance(module, nn.Sequential):
            _swap_norms(module, convolutions)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.PReLU):
            network.set_submodule(name, nn.ReLU())
    return network


def _swap_norms(chain: nn.Sequential, convolutions: set[int]) -> None:
    """BN(C), conv C → F becomes conv C → F, BN(F), in place."""
    for i in range(len(chain) - 1):
        if isinstance(chain[i], nn.BatchNorm2d) and id(chain[i + 1]) in convolutions:
            chain[i], chain[i + 1] = chain[i + 1], nn.BatchNorm2d(chain[i + 1].out_channels)


@dataclass(frozen=True)
class FloatFile:
    """A float network in ONNX: rewritten as it is for us (no training: its speed is what we look at), float for peers.

    `activation` is what such networks have nearly everywhere; which layer drops a plane is found out one by one.
    """

    name: str
    path: Path
    batch: int
    folder: Path
    activation: str = "relu"

    @property
    def shapes(self) -> Shapes:
        """The file's, the batch ours. UsageError where another axis is open."""
        proto = onnx.load(self.path, load_external_data=False)
        weights = {tensor.name for tensor in proto.graph.initializer}
        shapes = {}
        for value in proto.graph.input:
            if value.name not in weights:
                sizes = [int(axis.dim_value) for axis in value.type.tensor_type.shape.dim]
                shapes[value.name] = (self.batch, *sizes[1:])
                if not sizes or 0 in sizes[1:]:
                    raise UsageError(
                        f"{self.path}: input {value.name} has shape {sizes}; accepted: all but axis 0 given"
                    )
        return shapes

    def horq(self, order: int, scale: Scale) -> Path:
        """The file itself."""
        return self.path

    def arguments(self, order: int, scale: Scale) -> dict[str, Any]:
        """Which layers, by order and scale."""
        return {"order": order, "scale": scale}

    def twin(self) -> Path:
        """The file with its batch fixed: what computes shapes folds away then, which else keeps int8 from its speed."""
        proto = onnx.load(self.path)
        for value in proto.graph.input:
            if value.name in self.shapes:
                value.type.tensor_type.shape.dim[0].dim_value = self.batch
        path = self.folder / f"{self.name}-batch{self.batch}.onnx"
        onnx.save(proto, path)
        return path
