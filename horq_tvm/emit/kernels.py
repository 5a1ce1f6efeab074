"""The kernels as one object file, and the checks that it asks nothing of a runtime that we do not have."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from horq_tvm.emit.plan import Step
from horq_tvm.emit.tails import mask_tails
from horq_tvm.errors import HorqError
from horq_tvm.runtime.elf import Elf

PROVIDED = frozenset({"__TVMBackendParallelLaunch", "TVMFFIErrorSetRaisedFromCStrParts"})
"""What our C runtime defines of what TVM's code generator may refer to."""

_WORKSPACE = frozenset({"__TVMBackendAllocWorkspace", "__TVMBackendFreeWorkspace"})


def symbol_names(steps: Sequence[Step]) -> dict[str, str]:
    """A C name for each kernel, in order of first use: a number, and what of the kernel's own name C can spell."""
    kernels = dict.fromkeys(step.kernel for step in steps)
    return {name: f"k{index}_{re.sub('[^0-9A-Za-z_]', '_', name)}" for index, name in enumerate(kernels)}


def entry(symbol: str) -> str:
    """The symbol under which TVM's code generator exports the PrimFunc `symbol`."""
    return f"__tvm_ffi_{symbol}"


def compile_kernels(
    mod: tvm.IRModule,
    symbols: Mapping[str, str],
    target: tvm.target.Target,
    out: Path,
    in_place: frozenset[str] = frozenset(),
) -> None:
    """Compiles the PrimFuncs that `symbols` names to the object file `out`, each under its symbol.

    Those of `in_place` are handed one piece of memory twice, so LLVM must not be told that arguments are apart.
    HorqError where a kernel allocates a workspace: in a kernel's inner loops that costs more than the kernel.
    """
    functions = {
        tvm.ir.GlobalVar(symbol): _kernel(mod, name, name in in_place).with_attr("global_symbol", symbol)
        for name, symbol in symbols.items()
    }
    final = _FinalModule()
    config = {"tirx.disable_assert": True}
    with tvm.transform.PassContext(opt_level=3, config=config, instruments=[final.instrument]):
        masked = mask_tails(with_plain_indices(tvm.IRModule(functions)))
        library = tvm.tirx.build(masked, target, pipeline="s_tir")
    library.write_to_file(str(out), "o")
    missing = _missing_references(out)
    names = {symbol: name for name, symbol in symbols.items()}
    if missing & _WORKSPACE:
        culprits = ", ".join(names.get(symbol, symbol) for symbol in final.callers("tirx.TVMBackendAllocWorkspace"))
        raise HorqError(
            f"kernel {culprits} allocates a workspace at run time; its temporaries must fit on the stack "
            "(scope 'global', under 1024 bytes) or be outputs of the kernel"
        )
    if missing:
        raise HorqError(
            f"the kernels refer to {', '.join(sorted(missing))} of TVM's runtime; a standalone library has only "
            f"{', '.join(sorted(PROVIDED))}"
        )


def with_plain_indices(mod: tvm.IRModule) -> tvm.IRModule:
    """The first passes of TVM's own pipeline, and a simplification before it goes on to shrink buffers to what is used.

    A block's variables have no ranges to the simplifier, loop variables do: only once they stand in the indices is
    (4·b + v) // 100 seen to be 0, and not taken to range over all groups, too many for the stack.
    """
    passes = [
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        tirx.transform.StmtSimplify(),
    ]
    return tvm.ir.transform.Sequential(passes)(mod)


def _kernel(mod: tvm.IRModule, name: str, in_place: bool) -> tirx.PrimFunc:
    function = mod[name]
    if not isinstance(function, tirx.PrimFunc):
        raise HorqError(f"main calls {name}, which is a {type(function).__name__}; a kernel is a PrimFunc")
    return function.with_attr("tirx.noalias", False) if in_place else function


class _FinalModule:
    """Keeps the TensorIR in which allocations have become calls: the last form that knows the kernels by name."""

    def __init__(self) -> None:
        self._mod = tvm.IRModule()
        keeper = self

        @tvm.instrument.pass_instrument
        class Instrument:
            def run_after_pass(self, mod: tvm.IRModule, info: tvm.transform.PassInfo) -> None:
                if info.name == "tirx.LowerTVMBuiltin":
                    keeper._mod = mod

        self.instrument = Instrument()

    def callers(self, op: str) -> list[str]:
        """The symbols of the kernels that call the operator `op`, sorted."""
        found = set()
        for gvar, function in self._mod.functions.items():
            called: set[str] = set()
            look = lambda call, called=called: called.add(getattr(call.op, "name", ""))  # noqa: E731
            tvm_ffi.structural_walk(function.body, (tvm.ir.Call, look))
            if op in called:
                found.add(gvar.name_hint)
        return sorted(found)


def _missing_references(obj: Path) -> set[str]:
    """What the object refers to, or holds a weak slot for, of TVM's runtime and the C runtime does not define."""
    wanted = {
        symbol.name
        for symbol in Elf.read(obj).symbols()
        if (symbol.undefined or symbol.weak) and re.match("(__)?(TVM|tvm_ffi__)", symbol.name)
    }
    return wanted - PROVIDED
