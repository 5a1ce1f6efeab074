"""llvm-mca: how many cycles LLVM's model of a core takes for a loop. Static analysis: no core has measured it.

The model knows the core's pipes, widths and latencies; it takes every load to hit the first cache and every branch to
be foreseen. Bounds come from the same model: the needed instructions alone, on registers, none depending on another.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from horq_tvm.errors import HorqError

OLDEST = 16  # the first with a model of Neoverse N1; before, it borrows Cortex-A57's
NEWEST = 40
WARM, LONG = 200, 1200  # iterations; their difference leaves out how the loop fills the pipes


class NoModelError(HorqError):
    """LLVM schedules for this core by another's numbers or by none: there is nothing to analyse it with."""


@dataclass(frozen=True)
class Analysis:
    """Of one iteration of a loop: cycles, instructions, micro-operations, and the part of the cycles that each unit of
    the core works (units of one name averaged). `model` is the name LLVM's model gives its units."""

    cycles: float
    instructions: int
    micro_ops: float
    model: str
    busy: dict[str, float]


@dataclass(frozen=True)
class Tools:
    """Programs of one version of LLVM."""

    mca: str
    objdump: str
    objcopy: str
    version: str

    def disassemble(self, obj: Path) -> str:
        """The listing of an object file's code (TVM adds a section of its own, whose addresses start at 0 again)."""
        return call([self.objdump, "-d", "-j", ".text", "--no-show-raw-insn", str(obj)])

    def analyse(self, assembly: str, mtriple: str, mcpu: str, mattr: Sequence[str] = ()) -> Analysis:
        """One iteration of a loop on the core `mcpu`. NoModelError where LLVM has none of it."""
        command = [self.mca, f"-mtriple={mtriple}", f"-mcpu={mcpu}", "-json"]
        if mattr:
            command.append(f"-mattr={','.join(mattr)}")
        few, many = (json.loads(call([*command, f"-iterations={n}", "-"], assembly)) for n in (WARM, LONG))
        (region,) = many["CodeRegions"]
        first, summary = few["CodeRegions"][0]["SummaryView"], region["SummaryView"]
        cycles = (summary["TotalCycles"] - first["TotalCycles"]) / (LONG - WARM)
        count = summary["Instructions"] // LONG
        names = many["TargetInfo"]["Resources"]
        pressure: dict[str, list[float]] = {re.sub(r"\.\d+$", "", name): [] for name in names}
        used = {
            entry["ResourceIndex"]: entry["ResourceUsage"]
            for entry in region["ResourcePressureView"]["ResourcePressureInfo"]
            if entry["InstructionIndex"] == count  # the row behind the last instruction holds the sums
        }
        for index, name in enumerate(names):
            pressure[re.sub(r"\.\d+$", "", name)].append(used.get(index, 0.0))
        busy = {_unit(name): sum(uses) / len(uses) / cycles for name, uses in pressure.items()}
        return Analysis(cycles, count, summary["TotaluOps"] / LONG, names[0].split("Unit")[0], busy)


@lru_cache(maxsize=1)
def find_tools() -> Tools:
    """The newest on PATH. HorqError where there is none, or none that is new enough."""
    suffixes = ["", *(f"-{number}" for number in range(NEWEST, OLDEST - 1, -1))]
    found = []
    for suffix in suffixes:
        programs = [f"llvm-{program}{suffix}" for program in ("mca", "objdump", "objcopy")]
        if all(map(shutil.which, programs)):
            version = re.search(r"version (\d+)([.\d]*)", call([programs[0], "--version"]))
            if version:
                found.append((int(version[1]), Tools(*programs, version[1] + version[2])))
    if not found or max(found, key=lambda pair: pair[0])[0] < OLDEST:
        there = ", ".join(tools.version for _, tools in found) or "none"
        raise HorqError(
            f"llvm-mca: found {there} on PATH; accepted: LLVM {OLDEST} or newer (Debian, Ubuntu: apt install llvm-19)"
        )
    return max(found, key=lambda pair: pair[0])[1]


def _unit(name: str) -> str:
    """ "A57UnitX": "X"."""
    return name.split("Unit")[-1]


def call(command: Sequence[str], text: str | None = None) -> str:
    """The standard output of a program. HorqError where it fails or does not know the CPU."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    wrong = [line for line in done.stderr.splitlines() if "error" in line or "not a recognized" in line]
    if done.returncode or wrong:  # an unknown CPU is only a warning to it, and another takes its place
        kind = NoModelError if any("scheduling information" in line for line in wrong) else HorqError
        raise kind(f"{command[0]} failed: {wrong[0] if wrong else f'exit status {done.returncode}'}")
    return done.stdout
