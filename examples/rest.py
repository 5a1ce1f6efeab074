"""What `--rest int8` costs in accuracy: the trained examples on their whole test sets, with either rest.

    python examples/rest.py [--images 10000]

Ranges are calibrated on the first 512 training images, the test images take no part in it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import horq_tvm
from horq_tvm import datasets
from horq_tvm.runtime.loader import LoadedModel

PRETRAINED = Path(__file__).parent / "pretrained"
BATCH = 100
CALIBRATION = 512
INPUT = "image"


def scores(model: LoadedModel, images: np.ndarray) -> np.ndarray:
    """float32 [N,10] of images [N,C,H,W], N a multiple of BATCH."""
    batches = (images[i : i + BATCH].astype("float32") for i in range(0, len(images), BATCH))
    return np.concatenate([next(iter(model(batch).values())) for batch in batches])


def measure(path: Path, images: int) -> dict[str, float]:
    """Shares of the test images: right with a float32 rest, right with an int8 rest, classified alike by both."""
    data = datasets.load("mnist" if path.name.startswith("mnist") else "cifar10")
    shape = (BATCH, *data.test_images.shape[1:])
    calibration = {INPUT: data.train_images[:CALIBRATION].astype("float32")}
    classes = {}
    for rest in ("float32", "int8"):
        compiled = horq_tvm.build(path, rest=rest, input_shapes={INPUT: shape}, calibration=calibration)
        classes[rest] = scores(compiled.load(), data.test_images[:images]).argmax(1)
    right = {rest: float((found == data.test_labels[:images]).mean()) for rest, found in classes.items()}
    return {**right, "alike": float((classes["float32"] == classes["int8"]).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description="What an int8 rest costs the trained examples in accuracy.")
    parser.add_argument("--images", type=int, default=10_000, help="of the test set, a multiple of 100 (default: all)")
    given = parser.parse_args()
    if given.images < BATCH or given.images % BATCH:
        parser.error(f"--images: found {given.images}; accepted: a multiple of {BATCH}")
    print("| example | float32 rest | int8 rest | same class |\n|---|--:|--:|--:|")
    for path in sorted(PRETRAINED.glob("*.onnx")):
        found = measure(path, given.images)
        print(f"| `{path.name}` | {found['float32']:.2%} | {found['int8']:.2%} | {found['alike']:.2%} |", flush=True)


if __name__ == "__main__":
    main()
