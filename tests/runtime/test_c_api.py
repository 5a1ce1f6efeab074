"""The C runtime by itself: a model written by hand, with kernels in C that do what no compiled kernel should."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from horq_tvm.emit import driver, link
from horq_tvm.runtime.loader import _open

RUNTIME = link.RUNTIME

# Two inputs of four floats, one output. Step "launches" counts, by parallel launches, how often each task ran; step
# "fails" fails with a message where the first input is not 0.
MODEL = r"""
#include <stdlib.h>
#include "internal.h"

int TVMBackendParallelLaunch(hq_task task, void *data, int num_task);
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count);

#define LAUNCHES 2000

static float *data_of(const hq_any *args, int index) { return ((hq_tensor *)args[index].value.v_ptr)->data; }

static int count_task(int task_id, hq_parallel_env *env, void *data) {
  int *counts = data;
  if (task_id < 0 || task_id >= env->num_task) return -1;
  ++counts[task_id];
  return 0;
}

static int launches(void *self, const hq_any *args, int count, hq_any *result) {
  (void)self, (void)count, (void)result;
  int counts[HORQ_MAX_THREADS] = {0};
  float *out = data_of(args, 1);
  for (int i = 0; i < LAUNCHES; ++i) {
    if (TVMBackendParallelLaunch(count_task, counts, 0) != 0) return -1;
  }
  int threads = 0;
  while (threads < HORQ_MAX_THREADS && counts[threads] == LAUNCHES) ++threads;
  out[0] = (float)threads;
  out[1] = out[2] = out[3] = 0;
  for (int i = threads; i < HORQ_MAX_THREADS; ++i) out[1] += (float)counts[i];
  return 0;
}

static int fail_task(int task_id, hq_parallel_env *env, void *data) {
  const char *parts[] = {"input is ", "not 0"};
  (void)env;
  if (((const float *)data)[task_id % 4] == 0) return 0;
  TVMFFIErrorSetRaisedFromCStrParts("ValueError", parts, 2);
  return -1;
}

static int fails(void *self, const hq_any *args, int count, hq_any *result) {
  (void)self, (void)count, (void)result;
  return TVMBackendParallelLaunch(fail_task, data_of(args, 0), 0);
}

const unsigned char hq_weights[1] = {0};
const char hq_manifest_text[] = "{}";

static const int64_t extents[] = {4, 1};
static const horq_tensor_info inputs[] = {{"a", "float32", extents, 1, 16}, {"b", "float32", extents, 1, 16}};
static const horq_tensor_info outputs[] = {{"y", "float32", extents, 1, 16}};
static const hq_view views[] = {
    {HQ_INPUT, 1, {2, 32, 1}, 0, 1, 0}, {HQ_INPUT, 1, {2, 32, 1}, 0, 1, 1}, {HQ_OUTPUT, 1, {2, 32, 1}, 0, 1, 0}};
static const uint32_t bound[] = {0, 1, 2};
static const uint32_t arguments[] = {1, 2, 0};
static const hq_step steps[] = {{"launches", launches, 0, 2}, {"fails", fails, 2, 1}};
const hq_model hq_the_model = {.inputs = inputs, .input_count = 2, .outputs = outputs, .output_count = 1,
    .extents = extents, .views = views, .view_count = 3, .bound = bound, .bound_count = 3, .arguments = arguments,
    .argument_count = 3, .steps = steps, .step_count = 2};
"""

OK, ARGUMENT, KERNEL = 0, 1, 5


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("model")
    (folder / "model.c").write_text(MODEL)
    (folder / "data.S").write_text('.section .note.GNU-stack,"",%progbits\n')
    link.link(link.find_compiler(("cc",)), "x86", folder, [], folder / "model.so")
    return _open(folder / "model.so")


class Run:
    """A context, and a call on it with one float for the whole first input."""

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self.library = library
        self.context = ctypes.c_void_p()
        assert library.horq_create(threads, ctypes.byref(self.context)) == OK

    def __call__(self, first: float) -> tuple[int, list[float], str]:
        a, b, y = (ctypes.c_float * 4)(*[first] * 4), (ctypes.c_float * 4)(), (ctypes.c_float * 4)()
        inputs = (ctypes.c_void_p * 2)(ctypes.addressof(a), ctypes.addressof(b))
        outputs = (ctypes.c_void_p * 1)(ctypes.addressof(y))
        status = self.library.horq_run(self.context, inputs, outputs)
        return status, list(y), self.library.horq_last_error(self.context).decode()

    def close(self) -> None:
        self.library.horq_destroy(self.context)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_every_launch_runs_every_task_once(library: ctypes.CDLL, threads: int) -> None:
    run = Run(library, threads)
    for _ in range(3):
        assert run(0) == (OK, [threads, 0, 0, 0], "")
    run.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_kernel_that_fails_is_named_with_its_message_and_the_next_run_is_well(
    library: ctypes.CDLL, threads: int
) -> None:
    run = Run(library, threads)
    status, _, message = run(1)
    assert (status, message) == (KERNEL, "fails: ValueError: input is not 0")
    assert run(0) == (OK, [threads, 0, 0, 0], "")
    run.close()


def test_arguments_out_of_range(library: ctypes.CDLL) -> None:
    context = ctypes.c_void_p(1)
    for threads in (-1, 0, 257):
        assert library.horq_create(threads, ctypes.byref(context)) == ARGUMENT
        assert context.value is None
    assert library.horq_create(1, None) == ARGUMENT
    assert library.horq_run(None, None, None) == ARGUMENT
    run = Run(library, 1)
    assert library.horq_run(run.context, (ctypes.c_void_p * 2)(), (ctypes.c_void_p * 1)()) == ARGUMENT
    run.close()
    library.horq_destroy(None)
    assert library.horq_step_name(1) == b"fails"
    assert library.horq_step_name(2) is None


def test_every_status_has_words(library: ctypes.CDLL) -> None:
    words = {library.horq_status_text(status) for status in range(6)}
    assert len(words) == 6
    assert b"unknown status" not in words
    assert library.horq_status_text(6) == b"unknown status"


@pytest.mark.parametrize("source", [*link.COMMON_SOURCES, *link.CPU_SOURCES.values()])
def test_the_sources_compile_without_a_warning(source: str) -> None:
    flags = [*link._COMPILE, "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only"]
    subprocess.run([*link.find_compiler(("cc",)), *flags, RUNTIME / source], check=True)


PROGRAM = r"""
#include <stdio.h>
#include "horq.h"
int main(void) {
  horq_context *context = 0;
  float x[8] = {-2, -1, 0, 1, 2, 3, 4, 5}, y[8];
  const void *inputs[] = {x};
  void *outputs[] = {y};
  if (horq_abi_version() != HORQ_ABI_VERSION || horq_input(1) || horq_input(0)->bytes != sizeof x) return 1;
  if (horq_create(1, &context) != HORQ_OK || horq_run(context, inputs, outputs) != HORQ_OK) return 2;
  for (int i = 0; i < 8; ++i) printf("%g ", y[i]);
  printf("%s %s\n", horq_input(0)->name, horq_output(0)->dtype);
  horq_destroy(context);
  return 0;
}
"""


@pytest.mark.parametrize("language", ["c", "c++"])
def test_a_program_in_c_or_cplusplus_uses_the_header(tmp_path: Path, language: str) -> None:
    from tvm import topi

    from tests.emit.models import emit, module, spec

    compiler = shutil.which("cc" if language == "c" else "c++")
    if compiler is None:
        pytest.skip(f"no compiler for {language}")
    emit(tmp_path / "libm.so", module(lambda builder, x: [builder.emit_te(topi.nn.relu, x)], spec("x", 8)))
    (tmp_path / "main").with_suffix(".c").write_text(PROGRAM)
    flags = ["-x", language, "-Wall", "-Wextra", "-Werror", f"-I{RUNTIME}", "main.c", "-x", "none", "./libm.so"]
    subprocess.run([compiler, *flags, "-o", "main"], cwd=tmp_path, check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(["./main"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "0 0 0 1 2 3 4 5 x float32\n"


def test_strings_survive_the_way_into_c() -> None:
    assert driver._string('a"\\?\né') == r'"a\042\134\077\012\303\251"'
