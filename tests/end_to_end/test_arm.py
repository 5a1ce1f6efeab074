"""Networks built for ARM and run under qemu: their own layers against the reference, their end against x86."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import horq_tvm
from horq_tvm import zoo
from horq_tvm.errors import HorqError
from horq_tvm.nn import HorqConv2d
from horq_tvm.runtime.elf import Elf
from horq_tvm.runtime.loader import load, read_manifest
from horq_tvm.specs import Scale
from tests.end_to_end.emulator import machine
from tests.end_to_end.taps import Tap, compare
from tests.end_to_end.test_networks import assert_same_network, geometry
from tests.networks import HORQ_LAYERS, binary_weight, cifar_images, cifar_resnet

torch.set_num_threads(1)

TARGETS = (("rpi4", "aarch64"), ("armv7-neon", "armv7"))
BATCH = 8


@pytest.mark.parametrize(
    ("target", "name", "order", "scale"),
    [
        ("rpi4", "aarch64", 2, "static"),
        ("armv7-neon", "armv7", 2, "sample"),
        pytest.param("rpi5", "aarch64", 3, "sample", marks=pytest.mark.slow),
        pytest.param("rpi3", "aarch64", 2, "patch", marks=pytest.mark.slow),
        pytest.param("rpi4-32", "armv7", 3, "static", marks=pytest.mark.slow),
        pytest.param("rpi2", "armv7", 2, "patch", marks=pytest.mark.slow),
    ],
)
def test_layers_are_the_reference_and_predictions_are_those_of_x86(
    target: str, name: str, order: int, scale: Scale
) -> None:
    emulated = machine(name)
    network, x = cifar_resnet(order, scale), cifar_images(BATCH, seed=5)
    taps = () if scale == "patch" else HORQ_LAYERS
    compiled = horq_tvm.build(network, target, example_inputs=(x,), taps=taps)
    outputs = emulated(compiled, **{compiled.report["inputs"][0]["name"]: x.numpy()})
    result = outputs[compiled.report["outputs"][0]["name"]]
    with torch.no_grad():
        assert_same_network(result, network(x).numpy())
    here = horq_tvm.build(network, example_inputs=(x,), taps=taps)(x.numpy())
    assert_same_network(result, here[compiled.report["outputs"][0]["name"]])
    for layer_name in taps:
        layer = network.get_submodule(layer_name)
        weight, alpha = binary_weight(layer)
        found = compare(Tap.of(outputs, layer_name), weight, alpha, scale=scale, **geometry(layer))
        assert found.doubtful <= 1e-4 * found.signs


@pytest.mark.parametrize(("target", "name"), TARGETS)
def test_a_library_for_a_board(target: str, name: str, tmp_path: Path) -> None:
    """The same bytes twice; a manifest that any machine reads; libc, libm and pthread alone."""
    machine(name)
    network, x = cifar_resnet(2, "static"), cifar_images(1, seed=5)
    for path in (tmp_path / "first.so", tmp_path / "second.so"):
        horq_tvm.build(network, target, example_inputs=(x,)).export(path)
    library = tmp_path / "first.so"
    assert library.read_bytes() == (tmp_path / "second.so").read_bytes()
    assert read_manifest(library).target == target
    assert Elf.read(library).machine == {"aarch64": "aarch64", "armv7": "arm"}[name]
    listing = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    needed = {line.partition("[")[2].partition("]")[0] for line in listing.splitlines() if "(NEEDED)" in line}
    assert needed <= {"libc.so.6", "libm.so.6", "libpthread.so.0"}
    with pytest.raises(HorqError, match="is built for (aarch64|arm); this machine is"):
        load(library)


def test_a_cpu_without_the_features_is_told_so(tmp_path: Path) -> None:
    """Cortex-A53 has no dot products: the library says that it lacks them, and runs nothing."""
    emulated = machine("aarch64")
    network, x = cifar_resnet(2, "static"), cifar_images(1, seed=5)
    compiled = horq_tvm.build(network, "rpi5", example_inputs=(x,))
    old = type(emulated)(emulated.triple, emulated.emulator, "cortex-a53")
    with pytest.raises(AssertionError, match="the CPU lacks asimd(dp|hp)"):
        old(compiled, **{compiled.report["inputs"][0]["name"]: x.numpy()})


@pytest.mark.slow
@pytest.mark.parametrize(("target", "name"), [("rpi4", "aarch64"), ("rpi2", "armv7")])
@pytest.mark.parametrize(
    ("network", "order", "scale"), [("mnist", 2, "static"), ("resnet20", 2, "static"), ("resnet18", 1, "static")]
)
def test_layers_of_the_zoo_are_the_reference(target: str, name: str, network: str, order: int, scale: Scale) -> None:
    """Every binary layer, convolutions only, on the input that the library itself fed it."""
    emulated = machine(name)
    torch.manual_seed(0)
    module = zoo.build(network, order=order, scale=scale)
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((2, *zoo.NETWORKS[network].image), "float32"))
    module.train()
    with torch.no_grad():
        module(x)  # settles β and the statistics
    module.eval()
    layers = {n: m for n, m in module.named_modules() if isinstance(m, HorqConv2d)}
    compiled = horq_tvm.build(module, target, example_inputs=(x,), taps=list(layers))
    outputs = emulated(compiled, **{compiled.report["inputs"][0]["name"]: x.numpy()})
    here = horq_tvm.build(module, example_inputs=(x,), taps=list(layers))(x.numpy())
    for layer_name, layer in layers.items():
        weight, alpha = binary_weight(layer)
        found = compare(Tap.of(outputs, layer_name), weight, alpha, scale=scale, **geometry(layer))
        assert found.doubtful <= 1e-4 * found.signs
    result = compiled.report["outputs"][0]["name"]
    assert np.abs(outputs[result] - here[result]).max() <= 0.05 * np.abs(here[result]).max()
