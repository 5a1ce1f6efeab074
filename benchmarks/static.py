"""`python -m benchmarks.static`: the inner loops of ARM kernels as llvm-mca sees them. Static analysis, not measured.

For each core: the kernel is compiled, the innermost loop with most CNT (or FMLA) is taken from the object file, checked
for spills and for bits counted outside the vectors, and given to LLVM's model of that core. The bound is what the same
model says of the needed instructions alone: EOR, CNT, ADD for 128 binary multiply-accumulates, FMLA for 4 of float32.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from horq_tvm import targets
from horq_tvm.cli import options
from horq_tvm.cli.show import progress, table
from horq_tvm.emit import kernels as emit_kernels
from horq_tvm.emit.plan import CallPlan, Step, lower, make_plan
from horq_tvm.errors import HorqError

from . import assembly, fragments, mca, trace
from .arguments import listed, orders
from .command import deliver, execute
from .fragments import Fragment
from .kernels import FLOAT_CONVS, STAGES

Record = dict[str, Any]

NOTE = "static analysis, not measured"
TARGETS = ("rpi3", "jetson-nano", "rpi4", "rpi5", "neoverse-n1")
STEM = "7x7 s2"
NEGLIGIBLE = 1e-4  # of the instructions that run: a block below is not worth asking for


@dataclass(frozen=True)
class Kind:
    """What a kernel's loop is searched for, and the instructions that its bound is made of.

    `counted`: the instructions of which a loop of this kind holds most; `needed`, with {} for a register of its own:
    what one vector of 128 bits takes at least; `copies` of it for as many as the registers allow.
    """

    name: str
    counted: tuple[str, ...]
    needed: tuple[str, ...]
    copies: int
    macs: int  # multiply-accumulates a vector

    @property
    def bound_loop(self) -> str:
        """The needed instructions, none reading what another writes."""
        registers = iter(range(self.copies * len(self.needed)))
        return "".join(f"{text.format(next(registers))}\n" for _ in range(self.copies) for text in self.needed)


BITS = "conv"
FLOATS = "float_conv"
KINDS = {
    "aarch64": {
        BITS: Kind(
            BITS,
            ("cnt",),
            ("eor v{}.16b, v30.16b, v31.16b", "cnt v{}.16b, v30.16b", "add v{}.16b, v30.16b, v31.16b"),
            copies=8,
            macs=128,
        ),
        FLOATS: Kind(FLOATS, ("fmla", "fmls"), ("fmla v{}.4s, v30.4s, v31.4s",), copies=24, macs=4),
    },
    "arm": {
        BITS: Kind(
            BITS, ("vcnt.8",), ("veor q{}, q14, q15", "vcnt.8 q{}, q14", "vadd.i8 q{}, q14, q15"), copies=4, macs=128
        ),
        # LLVM keeps multiplications and additions of float32 apart for a Cortex-A7, whose VFMA it holds to be slow.
        FLOATS: Kind(FLOATS, ("vfma.f32", "vmla.f32", "vmul.f32"), ("vfma.f32 q{}, q14, q15",), copies=12, macs=4),
    },
}
"""By `trace.architecture`."""


def kind_of(name: str, target: targets.Target) -> Kind:
    """`name` on the target's architecture."""
    return KINDS[trace.architecture(target)][name]


@dataclass(frozen=True)
class Compiled:
    """A fragment's kernels as the object file that a library would have; nothing is linked. `step` calls `symbol`."""

    obj: Path
    plan: CallPlan
    step: Step
    symbol: str


def compile_object(fragment: Fragment, target: targets.Target, out: Path) -> Compiled:
    """Writes the object file `out`; its last step is the kernel itself, those before it pad and lay out."""
    mod = lower(fragment.lowered(target))
    plan = make_plan(mod)
    symbols = emit_kernels.symbol_names(plan.steps)
    emit_kernels.compile_kernels(mod, symbols, target.tvm_target(), out)
    return Compiled(out, plan, plan.steps[-1], symbols[plan.steps[-1].kernel])


def kernels(wanted: Sequence[int]) -> Iterator[tuple[str, str, int | None, Fragment]]:
    """What is analysed: kind, layer, order (None for float) and the fragment."""
    for order in wanted:
        for conv in STAGES:
            yield BITS, conv.layer, order, fragments.bare_conv(conv, order, batch=1)
    stem = FLOAT_CONVS[STEM]
    rng = np.random.default_rng(fragments.SEED)
    shape = (stem.filters, stem.kernel, stem.kernel, stem.channels)
    weight, bias = rng.standard_normal(shape, "float32"), rng.standard_normal(stem.filters, "float32")
    yield FLOATS, stem.layer, None, fragments.float_conv(stem, 1, weight, bias)


def analyse(tools: mca.Tools, listing: str, target: targets.Target, kind: Kind) -> Record:
    """The hottest loop of a listing on the target's core; cycles are per vector of 128 bits.

    Where LLVM has no model of the core, all that depends on it is None.
    HorqError where no loop holds what `kind` counts.
    """
    loop = assembly.hottest(assembly.instructions(listing), kind.counted)
    if loop is None:
        raise HorqError(f"target {target.name}: no loop of the {kind.name} kernel holds {' or '.join(kind.counted)}")
    return {
        **modelled(tools, loop, target, kind),
        "vectors_per_iteration": loop.count(kind.counted),
        "instructions": len(loop.body),
        "spills": len(loop.spills),
        "scalar_popcounts": len(loop.scalar_popcounts),
        "assembly": [instruction.text for instruction in loop.body],
    }


def modelled(tools: mca.Tools, loop: assembly.Loop, target: targets.Target, kind: Kind) -> Record:
    """What of a record comes from llvm-mca."""
    try:
        found = tools.analyse(assembly.text_of(loop.body), target.mtriple, target.mcpu, target.mattr)
    except mca.NoModelError:
        names = ("cycles", "bound", "fraction_of_bound", "macs_per_cycle", "model", "busiest", "busiest_fraction")
        return dict.fromkeys((*names, "micro_ops"))
    cycles, limit = found.cycles / loop.count(kind.counted), bound(tools, target, kind)
    unit = max(found.busy, key=lambda name: found.busy[name])
    return {
        "cycles": cycles,
        "bound": limit,
        "fraction_of_bound": limit / cycles,
        "macs_per_cycle": kind.macs / cycles,
        "model": found.model,
        "micro_ops": found.micro_ops,
        "busiest": unit,
        "busiest_fraction": found.busy[unit],
    }


def whole(tools: mca.Tools, blocks: Sequence[trace.Block], target: targets.Target, kind: Kind) -> Record:
    """The kernel with all that is around its loop: each block's cycles as often as qemu entered it, per vector.

    A block is taken to overlap with its next run as a loop does, which an out-of-order core comes close to.
    """
    vectors = sum(block.runs * assembly.vectors(block.body, kind.counted) for block in blocks)
    executed = sum(block.runs * len(block.body) for block in blocks)
    try:
        cycles = sum(
            block.runs * tools.analyse(assembly.text_of(block.body), target.mtriple, target.mcpu, target.mattr).cycles
            for block in blocks
            if block.runs * len(block.body) > executed * NEGLIGIBLE
        )
    except mca.NoModelError:
        return {"whole_cycles": None, "whole_fraction_of_bound": None, "whole_instructions": executed / vectors}
    return {
        "whole_cycles": cycles / vectors,
        "whole_fraction_of_bound": bound(tools, target, kind) * vectors / cycles,
        "whole_instructions": executed / vectors,
    }


@lru_cache(maxsize=64)
def bound(tools: mca.Tools, target: targets.Target, kind: Kind) -> float:
    """Least cycles per vector of 128 bits on the core, by the same model."""
    return tools.analyse(kind.bound_loop, target.mtriple, target.mcpu, target.mattr).cycles / kind.copies


@dataclass(frozen=True)
class Setting:
    """What a run analyses. `folder` is where object files go; `loops_only` leaves qemu out."""

    targets: Sequence[targets.Target]
    orders: Sequence[int]
    folder: Path
    loops_only: bool = False
    say: Callable[[str], None] = lambda _doing: None


def examine(setting: Setting) -> list[Record]:
    """A record per target and kernel, in the order of the table."""
    tools = mca.find_tools()
    records: list[Record] = []
    for target in setting.targets:
        for name, layer, order, fragment in kernels(setting.orders):
            kind = kind_of(name, target)
            setting.say(f"{target.name}: {layer}" + (f" K={order}" if order else ""))
            obj = setting.folder / f"{target.name}-{kind.name}-{layer}-{order or 'float'}.o"
            built = compile_object(fragment, target, obj)
            record = {"layer": layer, "kernel": kind.name, "engine": "horq-tvm", "order": order}
            record |= {"target": target.name, "mcpu": target.mcpu, "llvm": tools.version, "note": NOTE}
            record |= analyse(tools, tools.disassemble(obj), target, kind)
            if not setting.loops_only:
                executed = trace.trace(tools, obj, built.plan, built.step, built.symbol, target)
                record |= whole(tools, executed, target, kind)
            records.append(record)
    return records


def describe(records: Sequence[Record]) -> str:
    """One table; its first line says what it is not."""
    rows = [
        (
            record["target"],
            f"{record['mcpu']} ({record['model'] or 'no model'})",
            record["layer"],
            "float" if record["order"] is None else f"K={record['order']}",
            record["instructions"],
            round(record["vectors_per_iteration"], 2),
            *_columns(record),
            record["spills"],
            record["scalar_popcounts"],
            *_whole_columns(record),
        )
        for record in records
    ]
    loop = ("instructions", "vectors", "cycles", "bound", "of bound", "busiest", "spills", "scalar popcounts")
    columns = ("target", "core (model)", "layer", "", *loop, "whole kernel", "of bound", "instructions")
    head = (
        f"{NOTE}: llvm-mca {records[0]['llvm']} on the innermost loop, then on the whole kernel\n"
        "vectors: of 128 bits, an iteration; cycles: a vector, so 128 binary multiply-accumulates or 4 of float32\n"
        "whole kernel: cycles and instructions a vector, each as often as it runs under qemu"
    )
    return f"{head}\n{table(columns, rows)}"


def _columns(record: Record) -> tuple[str | None, ...]:
    if record["cycles"] is None:
        return (None,) * 4
    busiest = f"{record['busiest']} {record['busiest_fraction']:.0%}"
    return f"{record['cycles']:.2f}", f"{record['bound']:.2f}", f"{record['fraction_of_bound']:.0%}", busiest


def _whole_columns(record: Record) -> tuple[str | None, ...]:
    if "whole_instructions" not in record:
        return (None,) * 3
    instructions = f"{record['whole_instructions']:.2f}"
    if record["whole_cycles"] is None:
        return None, None, instructions
    return f"{record['whole_cycles']:.2f}", f"{record['whole_fraction_of_bound']:.0%}", instructions


def parser() -> options.Parser:
    """The command line, in the manner of the other benchmarks."""
    accepted = [name for name, target in targets.presets().items() if target.family == "arm"]
    top = options.Parser(prog="python -m benchmarks.static", description=(__doc__ or "").split("\n\n")[0])
    top.add_argument(
        "--targets",
        type=listed(accepted),
        default=TARGETS,
        metavar=",".join(TARGETS[:2]),
        help=f"what to compile for (default: {','.join(TARGETS)})",
    )
    top.add_argument("--orders", type=orders, default=(1, 2), metavar="1,2", help="planes K (default: 1,2)")
    top.add_argument("--loops-only", action="store_true", help="leave out the whole kernel, which needs qemu")
    top.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the object files there, to be disassembled")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options.add_json_option(top)
    return top


def run(arguments: argparse.Namespace) -> None:
    """Analyse, print the table, write the records."""
    chosen = [targets.resolve(name) for name in arguments.targets]
    if arguments.keep is not None:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    with progress() as say, tempfile.TemporaryDirectory(prefix="horq-static-") as scratch:
        folder = arguments.keep or Path(scratch)
        records = examine(Setting(chosen, arguments.orders, folder, arguments.loops_only, say))
    deliver(records, arguments.json, describe)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 the work failed, 2 the call was mistaken."""
    return execute("static", parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
