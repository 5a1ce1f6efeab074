"""What runs on the device: numpy and `horq_tvm.load`. No compiler, no PyTorch, no ONNX.

    python examples/on_device.py MODEL.so IMAGES.npy SCORES.npy

runs the model on each image of IMAGES by itself and writes the scores, one row an image.
"""

from __future__ import annotations

import sys

import numpy as np

import horq_tvm


def main() -> None:
    model_path, images_path, scores_path = sys.argv[1:]
    model = horq_tvm.load(model_path)
    output = model.outputs[0].name
    scores = [model(image[None])[output] for image in np.load(images_path)]
    np.save(scores_path, np.concatenate(scores))
    heavy = {"onnx", "onnxruntime", "torch", "tvm"} & sys.modules.keys()
    assert not heavy, f"a device needs numpy alone, yet these were imported: {heavy}"


if __name__ == "__main__":
    main()
