"""Vectors that reach past the last channel: the numbers, and that nothing beyond an operand's end is touched."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm")

import tvm
from tvm import s_tir, te
from tvm.script import tirx as T

from horq_tvm import targets
from horq_tvm.emit.kernels import compile_kernels
from horq_tvm.emit.tails import mask_tails

ROWS = 16  # of any number of floats take whole cache lines, which kernels expect operands to begin with
FEW = 4  # what a kernel has of its own fits on its stack
PAGE = mmap.PAGESIZE


Compute = Callable[[tvm.tirx.Expr, tvm.tirx.Expr], tvm.tirx.Expr]


def elementwise(value: Compute, channels: int, lanes: int, dtype: str = "float32") -> s_tir.Schedule:
    """y[r, c] = value(x[r, c], w[c]) with vectors of `lanes` channels."""
    x, w = te.placeholder((ROWS, channels), dtype, name="x"), te.placeholder((channels,), dtype, name="w")
    y = te.compute((ROWS, channels), lambda r, c: value(x[r, c], w[c]), name="y")
    sch = s_tir.Schedule(te.create_prim_func([x, w, y]))
    _vectorize(sch, "y", lanes)
    return sch


def _vectorize(sch: s_tir.Schedule, name: str, lanes: int) -> None:
    sch.vectorize(sch.split(sch.get_loops(sch.get_sblock(name))[-1], [None, lanes])[1])


def _only(sch: s_tir.Schedule) -> tvm.tirx.PrimFunc:
    (func,) = sch.mod.functions.values()
    return func


def rounded(channels: int, lanes: int) -> tvm.tirx.PrimFunc:
    """round(x·w), which TVM makes no vector of."""
    return _only(elementwise(lambda x, w: te.nearbyint(x * w), channels, lanes))


def divided(channels: int, lanes: int) -> tvm.tirx.PrimFunc:
    """x / w of integers."""
    return _only(elementwise(tvm.tirx.truncdiv, channels, lanes, "int32"))


def affine(channels: int, lanes: int, rolled: bool = True) -> tvm.tirx.PrimFunc:
    """x·w + 1, the loop over the vectors as it is or unrolled."""
    sch = elementwise(lambda x, w: x * w + te.const(1, "float32"), channels, lanes)
    if not rolled:
        sch.unroll(sch.get_loops(sch.get_sblock("y"))[-2])
    return _only(sch)


def staged(channels: int, lanes: int) -> tvm.tirx.PrimFunc:
    """y = x·w + (x + w), both summands through memory of the kernel's own, whose rows are no multiple of the lanes."""
    x, w = te.placeholder((FEW, channels), name="x"), te.placeholder((channels,), name="w")
    t = te.compute((FEW, channels), lambda r, c: x[r, c] * w[c], name="t")
    u = te.compute((FEW, channels), lambda r, c: x[r, c] + w[c], name="u")
    y = te.compute((FEW, channels), lambda r, c: t[r, c] + u[r, c], name="y")
    sch = s_tir.Schedule(te.create_prim_func([x, w, y]))
    for name in ("t", "u", "y"):
        _vectorize(sch, name, lanes)
    return _only(sch)


@T.prim_func(private=True, s_tir=True)
def backwards(x: T.Buffer((2, 24), "float32"), y: T.Buffer((2, 24), "float32")):
    """y[r, c] = 2·(x[r, 23 - c] + 1), row 1 put down before row 0, whose second vector of 16 reaches into it."""
    t = T.sblock_alloc_buffer((2, 24), "float32")
    for f in T.serial(2):
        for v in T.vectorized(16):
            with T.sblock("second"):
                c = T.axis.spatial(24, f * 16 + v)
                T.where(f * 16 + v < 24)
                t[1, c] = x[1, c] + T.float32(1)
    for f in T.serial(2):
        for v in T.vectorized(16):
            with T.sblock("first"):
                c = T.axis.spatial(24, f * 16 + v)
                T.where(f * 16 + v < 24)
                t[0, c] = x[0, c] + T.float32(1)
    for i, j in T.grid(2, 24):
        with T.sblock("y"):
            r, c = T.axis.remap("SS", [i, j])
            y[r, c] = t[r, 23 - c] * T.float32(2)


KERNELS = {"affine": affine, "rounded": rounded}


def load(func: tvm.tirx.PrimFunc, folder: Path) -> tvm.runtime.Module:
    obj, out = folder / "k.o", folder / "k.so"
    compile_kernels(tvm.IRModule({"k": func}), {"k": "k"}, targets.resolve("native").tvm_target(), obj)
    subprocess.run(["gcc", "-shared", "-nostdlib", "-o", str(out), str(obj), "-lm"], check=True)
    return tvm.runtime.load_module(str(out))


def before_a_wall(array: np.ndarray) -> np.ndarray:
    """A copy whose last byte is the last one that may be touched."""
    pages = -(-array.nbytes // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(begin + pages * PAGE), PAGE, 0) == 0
    offset = pages * PAGE - array.nbytes
    copy = np.frombuffer(memory, array.dtype, array.size, offset).reshape(array.shape)
    copy[...] = array
    return copy


def _run(func: tvm.tirx.PrimFunc, rows: int, channels: int, folder: Path) -> tuple[np.ndarray, ...]:
    """x[rows, channels], w[channels], and what the kernel makes of them."""
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-9, 9, shape).astype("float32") for shape in ((rows, channels), (channels,)))
    out = tvm.runtime.tensor(np.zeros((rows, channels), "float32"))
    load(func, folder)["k"](tvm.runtime.tensor(x), tvm.runtime.tensor(w), out)
    return x, w, out.numpy()


@pytest.mark.parametrize("rolled", [True, False])
@pytest.mark.parametrize(("channels", "lanes"), [(13, 16), (29, 8), (33, 16), (63, 16)])
def test_numbers_up_to_the_last_channel(channels: int, lanes: int, rolled: bool, tmp_path: Path) -> None:
    x, w, y = _run(affine(channels, lanes, rolled), ROWS, channels, tmp_path)
    np.testing.assert_array_equal(y, x * w + 1)


@pytest.mark.parametrize(("channels", "lanes"), [(13, 16), (29, 8), (29, 16)])
def test_memory_of_the_kernels_own_stays_as_large_as_its_vectors(channels: int, lanes: int, tmp_path: Path) -> None:
    x, w, y = _run(staged(channels, lanes), FEW, channels, tmp_path)
    np.testing.assert_array_equal(y, x * w + x + w)


def test_a_row_of_the_kernels_own_memory_is_not_written_into_the_next(tmp_path: Path) -> None:
    kernel = load(backwards, tmp_path)
    x = np.arange(48, dtype="float32").reshape(2, 24)
    out = tvm.runtime.tensor(np.zeros((2, 24), "float32"))
    kernel["k"](tvm.runtime.tensor(x), out)
    np.testing.assert_array_equal(out.numpy(), 2 * (x[:, ::-1] + 1))


def test_lanes_that_are_not_there_divide_by_nothing() -> None:
    """They hold 0, and an integer's division by it ends the process: the condition stays."""
    text = str(mask_tails(_plain(divided(29, 16))).script())
    assert "llvm.masked" not in text
    assert "< 13:" in text


CRASHES = """
import sys
from collections.abc import Callable
from pathlib import Path
import numpy as np
import tvm, tvm_ffi
from tests.emit.test_tails import KERNELS, ROWS, before_a_wall, load
channels = 29
kernel = load(KERNELS[sys.argv[2]](channels, 16), Path(sys.argv[1]))
x, y = (before_a_wall(np.ones((ROWS, channels), "float32")) for _ in range(2))
kernel["k"](tvm_ffi.from_dlpack(x), tvm.runtime.tensor(np.ones(channels, "float32")), tvm_ffi.from_dlpack(y))
assert (y == (2 if sys.argv[2] == 'affine' else 1)).all()
"""


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_beyond_an_operand_is_touched(kernel: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CRASHES, str(tmp_path), kernel], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_tail_is_masked_and_whole_vectors_are_not() -> None:
    def text(channels: int) -> str:
        return str(mask_tails(_plain(affine(channels, 16))).script())

    assert text(48).count("llvm.masked") == 0
    assert text(45).count("llvm.masked") == 3  # x, w and y, of the last vector alone
    assert "if " not in text(45)


def test_what_tvm_makes_no_vector_of_keeps_its_condition() -> None:
    text = str(mask_tails(_plain(rounded(29, 16))).script())
    assert "llvm.masked" not in text
    assert "< 13:" in text  # of the last turn, lane by lane


def _plain(func: tvm.tirx.PrimFunc) -> tvm.IRModule:
    from horq_tvm.emit.kernels import with_plain_indices

    return with_plain_indices(tvm.IRModule({"k": func.with_attr("global_symbol", "k")}))


def test_kernels_without_tails_are_left_as_they_are() -> None:
    module = _plain(affine(48, 16))
    assert mask_tails(module).same_as(module)
