"""The device functions of `prelude.cuh` in their form for an architecture without binary tensor cores, on the host."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.schedules.cuda.fragments import M16N8K256

PRELUDE = Path(__file__).parents[3] / "schedules" / "cuda" / "prelude.cuh"
CALLS = """
extern "C" void product(int* c, const unsigned* a, const unsigned* b) {
  warp([=](int lane) { horq_mma(c + 4 * lane, a + 4 * lane, b + 2 * lane); });
}
extern "C" void vote(unsigned* words, const int* predicates) {
  warp([=](int lane) { words[lane] = horq_ballot(predicates[lane]); });
}
extern "C" void copy(unsigned* to, const unsigned* from, int inside) {
  unsigned words[7] = {};
  horq_fetch1(words, to, from, inside);
  horq_fetch2(words + 1, to + 1, from + 1, inside);
  horq_fetch4(words + 3, to + 3, from + 3, inside);
  horq_land1(words, to);
  horq_land2(words + 1, to + 1);
  horq_land4(words + 3, to + 3);
  horq_landed();
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ here")
    folder = tmp_path_factory.mktemp("prelude")
    shim = Path(__file__).with_name("warp.hpp")
    (folder / "calls.cpp").write_text(f'#include "{shim}"\n#include "{PRELUDE}"\n{CALLS}')
    command = [compiler, "-std=c++20", "-O1", "-pthread", "-shared", "-fPIC", "-o", "calls.so", "calls.cpp"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(folder / "calls.so"))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def test_a_product_lane_by_lane_is_the_tensor_cores(library: ctypes.CDLL) -> None:
    rng = np.random.default_rng(0)
    bits = [rng.random(shape) < 0.5 for shape in ((16, 256), (256, 8))]
    before = rng.integers(-1000, 1000, (16, 8), dtype="int32")
    a, b = (
        np.packbits(M16N8K256.split(matrix, of), axis=-1, bitorder="little").view("<u4")
        for matrix, of in zip("ab", bits, strict=True)
    )
    c = np.ascontiguousarray(M16N8K256.split("c", before))
    library.product(pointer(c), pointer(np.ascontiguousarray(a)), pointer(np.ascontiguousarray(b)))
    differing = (bits[0][:, :, None] != bits[1][None]).sum(1)
    np.testing.assert_array_equal(M16N8K256.join("c", c), before + differing)


def test_a_ballot_has_a_bit_of_each_lane(library: ctypes.CDLL) -> None:
    predicates = np.random.default_rng(0).integers(0, 2, 32).astype("int32")
    words = np.zeros(32, "uint32")
    library.vote(pointer(words), pointer(predicates))
    expected = np.packbits(predicates > 0, bitorder="little").view("<u4")[0]
    np.testing.assert_array_equal(words, np.full(32, expected))


@pytest.mark.parametrize("inside", [0, 1])
def test_words_outside_are_zeros(library: ctypes.CDLL, inside: int) -> None:
    source, target = np.arange(1, 8, dtype="uint32"), np.full(7, 99, "uint32")
    library.copy(pointer(target), pointer(source), inside)
    np.testing.assert_array_equal(target, source * inside)
