"""The C example prints what the Python loader computes, and says what is wrong with a file."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm")
pytest.importorskip("onnx")

import horq_tvm
from tests.wheel import ROOT

SHAPE = (1, 1, 28, 28)

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With model.so, and on_device.c compiled to `classify` as its first lines say."""
    folder = tmp_path_factory.mktemp("c")
    model = ROOT / "examples" / "pretrained" / "mnist-k2.onnx"
    horq_tvm.build(model, input_shapes={"image": SHAPE}).export(folder / "model.so")
    runtime, source = ROOT / "horq_tvm" / "runtime", ROOT / "examples" / "on_device.c"
    words = ["cc", "-Wall", "-Wextra", "-Werror", "-I", str(runtime), str(source), "./model.so", "-o", "classify"]
    subprocess.run(words, cwd=folder, check=True)
    return folder


def test_class_and_scores_are_those_of_the_loader(folder: Path) -> None:
    image = np.random.default_rng(0).uniform(0, 255, SHAPE).astype("float32")
    image.tofile(folder / "image.f32")
    done = subprocess.run(["./classify", "image.f32"], cwd=folder, capture_output=True, text=True, check=True)
    expected = horq_tvm.load(folder / "model.so")(image)["scores"][0]
    best, scores = done.stdout.split(":")
    assert int(best) == expected.argmax()
    np.testing.assert_allclose(np.array(scores.split(), "float32"), expected, rtol=1e-5)


@pytest.mark.parametrize(("name", "why"), [("short.f32", "fewer values"), ("none.f32", "cannot be opened")])
def test_a_file_that_is_no_image_is_named(folder: Path, name: str, why: str) -> None:
    (folder / "short.f32").write_bytes(b"\0" * 100)
    done = subprocess.run(["./classify", name], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1
    assert name in done.stderr
    assert why in done.stderr
