"""What stands in for a card: the warp functions of `prelude.cl`, and that PoCL shows what a card would do wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("tvm")

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from tests.schedules.cuda import pocl
from tests.schedules.cuda.fragments import M8N8K128, M16N8K256, Array, counts, registers

WARPS = 3


@pytest.fixture(scope="module", autouse=True)
def _device() -> None:
    pocl.device()


def bits(*shape: int) -> Array:
    return np.random.default_rng(len(shape)).random(shape) < 0.5


# --- Fragments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fragments", [M16N8K256, M8N8K128])
def test_a_fragment_holds_each_element_once(fragments) -> None:  # type: ignore[no-untyped-def]
    m, n, k = fragments.shape
    for matrix, shape in (("a", (m, k)), ("b", (k, n)), ("c", (m, n))):
        values = np.arange(np.prod(shape)).reshape(shape)
        np.testing.assert_array_equal(np.sort(fragments.split(matrix, values), axis=None), values.ravel())
        np.testing.assert_array_equal(fragments.join(matrix, fragments.split(matrix, values)), values)


def test_four_products_of_k128_are_one_of_k256() -> None:
    """sm_75: register r of A is a whole A, from row 8·(r % 2) and bit 128·(r / 2) on, and so register h of B."""
    a, b = M16N8K256.split("a", bits(16, 256)), M16N8K256.split("b", bits(256, 8))
    c = np.random.default_rng(0).integers(-99, 99, (32, 4), dtype="int32")
    expected = M16N8K256.mma(np.bitwise_xor, a, b, c)
    found = c.copy()
    for half in (0, 1):
        for upper in (0, 1):
            of_a, of_b = a[:, 32 * (2 * half + upper) :][:, :32], b[:, 32 * half :][:, :32]
            of_c = slice(2 * upper, 2 * upper + 2)
            found[:, of_c] = M8N8K128.mma(np.bitwise_xor, of_a, of_b, found[:, of_c])
    np.testing.assert_array_equal(found, expected)


def test_and_stands_in_for_xor() -> None:
    """sm_90 has AND alone: two of them, or one and the populations of A's rows and of B's columns."""
    a, b = M16N8K256.split("a", bits(16, 256)), M16N8K256.split("b", bits(256, 8))
    c = np.zeros((32, 4), "int32")
    expected = M16N8K256.mma(np.bitwise_xor, a, b, c)
    twice = M16N8K256.mma(np.bitwise_and, ~a, b, M16N8K256.mma(np.bitwise_and, a, ~b, c))
    np.testing.assert_array_equal(twice, expected)
    ones_a, ones_b = M16N8K256.join("a", a).sum(1)[:, None], M16N8K256.join("b", b).sum(0)[None]
    populations = M16N8K256.split("c", (ones_a + ones_b).astype("int32"))
    np.testing.assert_array_equal(populations - 2 * M16N8K256.mma(np.bitwise_and, a, b, c), expected)


# --- The warp's functions ---------------------------------------------------------------------------------------------


def products(steps: int) -> tirx.PrimFunc:
    """A [WARPS,steps,32,4], B [WARPS,steps,32,2], C [WARPS,32,4] in fragments → C + Σ A·B, a warp each, one block."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("products")
        a = T.arg("a", T.Buffer((WARPS, steps, 32, 4), "uint32"))
        b = T.arg("b", T.Buffer((WARPS, steps, 32, 2), "uint32"))
        c = T.arg("c", T.Buffer((WARPS, 32, 4), "int32"))
        out = T.arg("out", T.Buffer((WARPS, 32, 4), "int32"))
        with (
            T.thread_binding(1, "blockIdx.x"),
            T.thread_binding(WARPS, "threadIdx.y") as w,
            T.thread_binding(32, "threadIdx.x") as lane,
            T.sblock("products"),
        ):
            T.reads(a[0:WARPS, 0:steps, 0:32, 0:4], b[0:WARPS, 0:steps, 0:32, 0:2], c[0:WARPS, 0:32, 0:4])
            T.writes(out[0:WARPS, 0:32, 0:4])
            of_a = T.sblock_alloc_buffer((4,), "uint32", scope="local")
            of_b = T.sblock_alloc_buffer((2,), "uint32", scope="local")
            of_c = T.sblock_alloc_buffer((4,), "int32", scope="local")
            for i in range(4):
                T.buffer_store(of_c, c[w, lane, i], [i])
            with T.serial(steps) as step:
                for i in range(4):
                    T.buffer_store(of_a, a[w, step, lane, i], [i])
                for i in range(2):
                    T.buffer_store(of_b, b[w, step, lane, i], [i])
                addresses = (T.address_of(buffer[0]) for buffer in (of_c, of_a, of_b))
                T.evaluate(T.call_extern("void", "horq_mma", *addresses))
            for i in range(4):
                T.buffer_store(out, of_c[i], [w, lane, i])
    return builder.get()


def test_mma_lane_by_lane_is_the_product_of_the_matrices() -> None:
    steps = 5
    a, b = bits(WARPS, steps, 16, 256), bits(WARPS, steps, 256, 8)
    c = np.random.default_rng(1).integers(-999, 999, (WARPS, 16, 8), dtype="int32")
    fragments = [registers(M16N8K256.split("a", a)), registers(M16N8K256.split("b", b)), M16N8K256.split("c", c)]
    (found,) = pocl.run(products(steps), *fragments)
    np.testing.assert_array_equal(M16N8K256.join("c", found), c + counts(np.bitwise_xor, a, b).sum(1))


def test_ballot_has_a_bit_of_each_lane() -> None:
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("votes")
        x = T.arg("x", T.Buffer((2, WARPS, 4, 32), "float32"))
        words = T.arg("words", T.Buffer((2, WARPS, 4, 32), "uint32"))
        with (
            T.thread_binding(2, "blockIdx.x") as block,
            T.thread_binding(WARPS, "threadIdx.y") as w,
            T.thread_binding(32, "threadIdx.x") as lane,
            T.sblock("votes"),
        ):
            T.reads(x[0:2, 0:WARPS, 0:4, 0:32])
            T.writes(words[0:2, 0:WARPS, 0:4, 0:32])
            with T.serial(4) as i:
                positive = tirx.Cast("int32", x[block, w, i, lane] >= tirx.const(0.0, "float32"))
                T.buffer_store(words, T.call_extern("uint32", "horq_ballot", positive), [block, w, i, lane])
    x = np.random.default_rng(2).standard_normal((2, WARPS, 4, 32)).astype("float32")
    (found,) = pocl.run(builder.get(), x)
    expected = registers(x >= 0)[..., :1]
    np.testing.assert_array_equal(found, np.broadcast_to(expected, found.shape))


# --- What must show ---------------------------------------------------------------------------------------------------


def mirrored() -> tirx.PrimFunc:
    """x [4,64] → each row back to front, by way of shared memory."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("mirrored")
        x = T.arg("x", T.Buffer((4, 64), "float32"))
        y = T.arg("y", T.Buffer((4, 64), "float32"))
        with T.thread_binding(4, "blockIdx.x") as row, T.thread_binding(64, "threadIdx.x") as i, T.sblock("mirrored"):
            T.reads(x[0:4, 0:64])
            T.writes(y[0:4, 0:64])
            shared = T.sblock_alloc_buffer((64,), "float32", scope="shared")
            T.buffer_store(shared, x[row, i], [i])
            T.buffer_store(y, shared[63 - i], [row, i])
    return builder.get()


def test_a_missing_barrier_shows() -> None:
    x = np.arange(256, dtype="float32").reshape(4, 64)
    program = pocl.Program.of(mirrored())
    (found,) = program.run("mirrored", x)
    np.testing.assert_array_equal(found, x[:, ::-1])
    (raced,) = program.without_barriers().run("mirrored", x)
    assert (raced != x[:, ::-1]).any()


def copied(words: int, shift: int = 0) -> tirx.PrimFunc:
    """x [256] → x, `words` at a time, each stored by the thread opposite to the one that copied it."""
    threads = 256 // words
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("copied")
        x = T.arg("x", T.Buffer((256 + shift,), "uint32"))
        y = T.arg("y", T.Buffer((256,), "uint32"))
        with T.thread_binding(1, "blockIdx.x"), T.thread_binding(threads, "threadIdx.x") as i, T.sblock("copied"):
            T.reads(x[0:256])
            T.writes(y[0:256])
            moved = T.sblock_alloc_buffer((words,), "uint32", scope="local")
            shared = T.sblock_alloc_buffer((256,), "uint32", scope="shared")
            for word in range(words):
                T.buffer_store(moved, tirx.const(0, "uint32"), [word])
            own, there = T.address_of(moved[0]), T.address_of(shared[i * words])
            last = T.if_then_else(i < threads - 1, tirx.const(1, "int32"), tirx.const(0, "int32"))
            source = T.address_of(x[i * words + shift])
            T.evaluate(T.call_extern("void", f"horq_fetch{words}", own, there, source, last))
            T.evaluate(T.call_extern("void", f"horq_land{words}", own, there))
            T.evaluate(T.call_extern("void", "horq_landed"))
            T.evaluate(T.tvm_storage_sync("shared"))
            for word in range(words):
                at = (threads - 1 - i) * words + word
                T.buffer_store(y, moved[word] * tirx.const(0, "uint32") + shared[at], [at])
    return builder.get()


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("words", [1, 2, 4])
def test_copies_to_shared_memory(words: int, asynchronous: bool) -> None:
    x = np.arange(1, 257, dtype="uint32")
    expected = np.where(np.arange(256) < 256 - words, x, 0)  # where nothing is inside, zeros
    program = replace(pocl.Program.of(copied(words)), asynchronous=asynchronous)
    np.testing.assert_array_equal(program.run("copied", x)[0], expected)
    if not asynchronous:
        assert (program.without_barriers().run("copied", x)[0] != expected).any()
    if words > 1:
        (lost,) = replace(pocl.Program.of(copied(words, shift=1)), asynchronous=asynchronous).run(
            "copied", np.append(x, x[:1])
        )
        assert (lost[:-words] == 0xDEADBEEF).all()  # a card would refuse the address


def test_what_no_kernel_writes_shows() -> None:
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("half")
        y = T.arg("y", T.Buffer((64,), "uint32"))
        with T.thread_binding(32, "threadIdx.x") as i, T.sblock("half"):
            T.reads()
            T.writes(y[0:64])
            T.buffer_store(y, tirx.const(0, "uint32"), [i])
    (found,) = pocl.run(builder.get())
    assert (found[:32] == 0).all()
    assert (found[32:] == int.from_bytes([pocl.UNWRITTEN] * 4)).all()


def test_a_function_of_two_launches_has_its_space_between_them() -> None:
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("twice")
        x = T.arg("x", T.Buffer((3, 32), "int32"))
        y = T.arg("y", T.Buffer((3, 32), "int32"))
        between = T.sblock_alloc_buffer((3, 32), "int32")
        for source, target in ((x, between), (between, y)):
            with T.thread_binding(3, "blockIdx.x") as row, T.thread_binding(32, "threadIdx.x") as i, T.sblock("step"):
                T.reads(source[0:3, 0:32])
                T.writes(target[row, i])
                T.buffer_store(target, source[2 - row, 31 - i] * 2, [row, i])
    x = np.arange(96, dtype="int32").reshape(3, 32)
    program = pocl.Program.of(builder.get())
    (function,) = program.functions.values()
    assert len(function.launches) == 2
    (found,) = program.run("twice", x)
    np.testing.assert_array_equal(found, 4 * x)
