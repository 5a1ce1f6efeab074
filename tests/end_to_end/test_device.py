"""A whole device under qemu: Debian's Python and numpy, our wheel by pip, a library by scp, real images.

What a Raspberry Pi does with docs/arm.md, but for the speed, of which qemu says nothing.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm")
pytest.importorskip("onnx")

import horq_tvm
from horq_tvm import datasets, targets
from horq_tvm.errors import HorqError
from tests.end_to_end.device import ARM64, ARMHF, Architecture, Device, NoDeviceError, make_device
from tests.wheel import ROOT, build_wheel

pytestmark = [pytest.mark.slow, pytest.mark.network]

PRETRAINED = ROOT / "examples" / "pretrained"
IMAGES = {"mnist-k2": 64, "resnet20-k1": 8, "resnet20-k2": 8}
DATA = {"mnist": "mnist", "resnet20": "cifar10"}
TARGETS = {ARM64.debian: "aarch64", ARMHF.debian: "armv7-neon"}


@dataclass(frozen=True)
class Installed:
    """A device with the wheel installed."""

    device: Device
    target: str

    def horq_tvm(self, *words: str) -> str:
        """The command line, as it is installed there."""
        return self.device.run("/usr/bin/python3", "/usr/local/bin/horq-tvm", *words)


@pytest.fixture(scope="module", params=[ARM64, ARMHF], ids=lambda architecture: architecture.debian)
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    architecture: Architecture = request.param
    folder = tmp_path_factory.mktemp(architecture.debian)
    try:
        device = make_device(architecture, folder / "root")
    except NoDeviceError as missing:
        pytest.skip(str(missing))
    wheel = device.put(build_wheel(folder))
    device.run("/usr/bin/python3", "-m", "pip", "install", "--quiet", "--no-index", "--break-system-packages", wheel)
    return Installed(device, TARGETS[architecture.debian])


def images(name: str) -> np.ndarray:
    """The first images of the test set, float32 [N,C,H,W] from 0 to 255."""
    network = name.partition("-")[0]
    try:
        data = datasets.load(DATA[network])
    except HorqError as error:
        pytest.skip(str(error))
    return data.test_images[: IMAGES[name]].astype("float32")


def library(name: str, target: str, folder: Path) -> Path:
    """The trained network for one image at a time."""
    network = name.partition("-")[0]
    shape = {"mnist": (1, 1, 28, 28), "resnet20": (1, 3, 32, 32)}[network]
    out = folder / f"{name}-{target}.so"
    horq_tvm.build(PRETRAINED / f"{name}.onnx", target=target, input_shapes={"image": shape}).export(out)
    return out


def scores_here(path: Path, x: np.ndarray) -> np.ndarray:
    """float32 [N,10] of a library for this machine."""
    model = horq_tvm.load(path)
    return np.concatenate([model(image[None])["scores"] for image in x])


@pytest.mark.parametrize("name", IMAGES)
def test_real_images_are_classified_as_on_x86(installed: Installed, name: str, tmp_path: Path) -> None:
    x = images(name)
    expected = scores_here(library(name, "native", tmp_path), x)
    np.save(tmp_path / "images.npy", x)
    device = installed.device
    words = [device.put(library(name, installed.target, tmp_path)), device.put(tmp_path / "images.npy")]
    script = device.put(ROOT / "examples" / "on_device.py")
    device.run("/usr/bin/python3", script, *words, "/home/scores.npy")  # asserts that numpy is all it needs
    scores = np.load(device.root / "home" / "scores.npy")
    # A sign in doubt may flip, which moves the scores of its image a little.
    np.testing.assert_allclose(scores, expected, atol=0.02 * np.abs(expected).max())
    np.testing.assert_array_equal(scores.argmax(1), expected.argmax(1))


def test_the_command_line_runs_and_inspects(installed: Installed, tmp_path: Path) -> None:
    x = images("mnist-k2")[:1]
    expected = scores_here(library("mnist-k2", "native", tmp_path), x)
    np.save(tmp_path / "one.npy", x)
    device = installed.device
    there = device.put(library("mnist-k2", installed.target, tmp_path))
    installed.horq_tvm("run", there, device.put(tmp_path / "one.npy"), "-o", "/home/one.npz")
    scores = np.load(device.root / "home" / "one.npz")["scores"]
    np.testing.assert_allclose(scores, expected, atol=0.02 * np.abs(expected).max())
    report = json.loads(installed.horq_tvm("inspect", there, "--json", "-"))
    assert report["target"] == installed.target
    assert [layer["order"] for layer in report["layers"] if layer["order"]] == [2, 2]


def test_the_c_example_says_the_same(installed: Installed, tmp_path: Path) -> None:
    x = images("mnist-k2")[:4]
    expected = scores_here(library("mnist-k2", "native", tmp_path), x)
    there = library("mnist-k2", installed.target, tmp_path)
    words = [*targets.resolve(installed.target).compiler, "-I", str(ROOT / "horq_tvm" / "runtime")]
    words += [str(ROOT / "examples" / "on_device.c"), "-L", str(tmp_path), f"-l:{there.name}", "-Wl,-rpath,$ORIGIN"]
    subprocess.run([*words, "-o", str(tmp_path / "classify")], check=True)
    installed.device.put(there)
    program = installed.device.put(tmp_path / "classify")
    for image, scores in zip(x, expected, strict=True):
        image.tofile(tmp_path / "image.f32")
        best, found = installed.device.run(program, installed.device.put(tmp_path / "image.f32")).split(":")
        assert int(best) == scores.argmax()
        np.testing.assert_allclose(np.array(found.split(), "float32"), scores, atol=0.02 * np.abs(scores).max())
