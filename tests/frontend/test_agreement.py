"""One network by both ways: PyTorch itself, and the ONNX file that it exports to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from horq_tvm.export import to_onnx
from horq_tvm.frontend.onnx import import_onnx
from horq_tvm.frontend.torch import import_torch
from tests.networks import cifar_images, cifar_resnet, cifar_resnet_float


@pytest.mark.parametrize("scale", ["sample", "static", "float"])
def test_a_residual_network(scale: str, tmp_path: Path, execute: Any, layer_names: Any) -> None:
    network = cifar_resnet_float() if scale == "float" else cifar_resnet(2, scale)
    images = cifar_images(1)
    to_onnx(network, images, tmp_path / "net.onnx")
    by_onnx, by_torch = import_onnx(tmp_path / "net.onnx"), import_torch(network, (images,))

    assert layer_names(by_onnx) == layer_names(by_torch)
    assert "layer2.0.shortcut.1" in layer_names(by_onnx)
    assert by_onnx.trained == by_torch.trained
    assert len(by_torch.trained) == (0 if scale == "float" else 5)
    assert by_onnx.inputs == by_torch.inputs
    found, wanted = (execute(model, [images.numpy()])[0] for model in (by_onnx, by_torch))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
