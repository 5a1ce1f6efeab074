"""One call of an ARM kernel under qemu: which of its instructions run, and how often.

The kernel's object file is linked into a program that calls it once on zeros (no kernel of ours branches on data). qemu
logs every block that it translates and every time it enters one: a count of instructions, which says nothing of time.
"""

from __future__ import annotations

import itertools
import math
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from horq_tvm import targets
from horq_tvm.emit import link
from horq_tvm.emit.kernels import entry
from horq_tvm.emit.plan import CallPlan, Step
from horq_tvm.errors import HorqError

from .assembly import Instruction, Loop, innermost_loops, instructions
from .mca import Tools, call

EMULATORS = {"aarch64": "qemu-aarch64-static", "arm": "qemu-arm-static"}
SECTION = "kernels"  # apart from libc's .text, so that the kernels' code is known by its addresses
DTYPE_CODES = {"i": 0, "u": 1, "f": 2}  # DLPack's

_TRANSLATED = re.compile(r"^0x([0-9a-f]+): ", re.MULTILINE)
_ENTERED = re.compile(r"^Trace \d+: \S+ \[[0-9a-f]+/([0-9a-f]+)/", re.MULTILINE)
_PROGRAM = """
#include "internal.h"
int {entry}(void *, const hq_any *, int, hq_any *);
static int launch(hq_task task, void *data, int tasks) {{
  hq_parallel_env alone = {{0, 1}};
  (void)tasks;
  return task(0, &alone, data);
}}
int (*__TVMBackendParallelLaunch)(hq_task, void *, int) = launch;
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {{
  (void)kind, (void)parts, (void)count;
}}
int main(void) {{
  hq_any arguments[{count}] = {{{{0}}}}, result = {{0}};
{tensors}
  return {entry}(0, arguments, {count}, &result);
}}
"""
_TENSOR = """
  static char data{i}[{bytes}] __attribute__((aligned(64)));
  static int64_t shape{i}[] = {{{extents}}};
  hq_tensor tensor{i} = {{data{i}, HQ_DEVICE_CPU, 0, {rank}, {{{code}, {bits}, 1}}, shape{i}, 0, 0}};
  arguments[{i}].type_index = HQ_ANY_DLTENSOR;
  arguments[{i}].value.v_ptr = &tensor{i};
"""


@dataclass(frozen=True)
class Block:
    """Instructions that run one after the other, and how often they do."""

    body: tuple[Instruction, ...]
    runs: int


def architecture(target: targets.Target) -> str:
    """ "aarch64", or "arm" for the 32-bit instructions, which triples call armv7 or armv8."""
    first = target.mtriple.partition("-")[0]
    return first if first == "aarch64" else "arm"


def trace(tools: Tools, obj: Path, plan: CallPlan, step: Step, symbol: str, target: targets.Target) -> list[Block]:
    """What one call of the kernel `symbol` runs, which is what `step` of `plan` calls: see `blocks` and `paths`.

    HorqError where the cross compiler or qemu is missing, or the kernel fails.
    """
    emulator = EMULATORS[architecture(target)]
    if shutil.which(emulator) is None:
        raise HorqError(f"{emulator} is not on PATH (Debian, Ubuntu: apt install qemu-user-static)")
    folder = obj.with_suffix(".trace")
    folder.mkdir(exist_ok=True)
    call([tools.objcopy, "--rename-section", f".text={SECTION}", str(obj), str(folder / "kernels.o")])
    (folder / "main.c").write_text(program(plan, step, symbol))
    sources = [str(folder / "main.c"), str(folder / "kernels.o")]
    compiler = link.find_compiler(target.compiler)
    call([*compiler, "-O1", "-static", "-I", str(link.RUNTIME), *sources, "-o", str(folder / "main")])
    call([emulator, "-d", "in_asm,exec,nochain", "-D", str(folder / "log"), str(folder / "main")])
    listing = call([tools.objdump, "-d", "-j", SECTION, "--no-show-raw-insn", str(folder / "main")])
    code = instructions(listing)
    return paths(blocks((folder / "log").read_text(errors="replace"), code), innermost_loops(code))


def program(plan: CallPlan, step: Step, symbol: str) -> str:
    """C that calls the kernel on tensors of zeros."""
    tensors = []
    for i, index in enumerate(step.args):
        view = plan.views[index]
        dtype = np.dtype(view.dtype)
        size = -(-math.prod(view.shape) * dtype.itemsize // 64) * 64
        fields = {"bytes": max(size, 64), "extents": ", ".join(map(str, view.shape)) or "0", "rank": len(view.shape)}
        tensors.append(_TENSOR.format(i=i, code=DTYPE_CODES[dtype.kind], bits=8 * dtype.itemsize, **fields))
    return _PROGRAM.format(entry=entry(symbol), count=len(step.args), tensors="".join(tensors))


def blocks(log: str, code: Sequence[Instruction]) -> list[Block]:
    """What of `code` ran, by qemu's log (-d in_asm,exec,nochain): neighbours that ran equally often, up to a branch.

    qemu's own blocks overlap, and end where a page ends; a sum over them for each instruction does neither.
    """
    translated: dict[int, tuple[int, ...]] = {}
    for part in log.split("IN: ")[1:]:
        addresses = tuple(int(address, 16) for address in _TRANSLATED.findall(part.partition("\n\n")[0]))
        if addresses:
            translated[addresses[0]] = addresses
    runs: Counter[int] = Counter()
    for start, times in Counter(_ENTERED.findall(log)).items():
        for address in translated.get(int(start, 16), ()):
            runs[address] += times
    found: list[Block] = []
    body: list[Instruction] = []
    for instruction, following in zip(code, [*code[1:], None], strict=True):
        body.append(instruction)
        times = runs[instruction.address]
        if instruction.leaves or following is None or runs[following.address] != times:
            found += [Block(tuple(body), times)] if times else []
            body = []
    return found


def paths(found: Sequence[Block], loops: Sequence[Loop]) -> list[Block]:
    """The same, but that the blocks of an innermost loop are joined to the ways through it: they overlap in the core.

    A block that is skipped in some iterations is taken to be skipped in those that skip a more frequent one too: all
    blocks as often as the rarest runs, then all but the rarest, and so on. Every instruction keeps its count.
    """
    spans = [(loop.body[0].address, loop.body[-1].address) for loop in loops]

    def span(block: Block) -> tuple[int, int] | None:
        return next((s for s in spans if s[0] <= block.body[0].address <= s[1]), None)

    joined: list[Block] = []
    for loop, group in itertools.groupby(found, span):
        members = list(group)
        if loop is None:
            joined += members
            continue
        levels = sorted({block.runs for block in members})
        for below, level in itertools.pairwise([0, *levels]):
            body = [instruction for block in members if block.runs >= level for instruction in block.body]
            joined.append(Block(tuple(body), level - below))
    return joined
