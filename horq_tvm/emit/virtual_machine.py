"""`--emit tvm`: a lowered module as a library for TVM's own runtime, its Relax virtual machine.

What a card needs, and whoever has TVM on the device anyway. The library holds the bytecode of main, the constants, the
host's part of each kernel and, for a card, one fatbin of all architectures; it carries our manifest as any other.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tvm
import tvm_ffi
from tvm import relax

from horq_tvm.emit import link
from horq_tvm.emit.kernels import with_plain_indices
from horq_tvm.emit.plan import lower as lower_calls
from horq_tvm.emit.plan import make_plan
from horq_tvm.emit.standalone import check_interface, count_weights, manifest_room, write_manifest
from horq_tvm.emit.tails import mask_tails
from horq_tvm.errors import HorqError
from horq_tvm.files import replacing
from horq_tvm.manifest import Manifest
from horq_tvm.targets import Target

if TYPE_CHECKING:
    from horq_tvm.cuda.fatbin import Fatbin, Use

COMPILE_HOOK = "tvm_callback_cuda_compile"
_LINK = ("-shared", "-fPIC", "-Wl,--build-id=none", "-Wl,--hash-style=gnu", "-Wl,-z,noexecstack", "-Wl,-s")
_MANIFEST = """\
    .section .horq.manifest,"a",%progbits
    .incbin "manifest.json"
    .section .note.GNU-stack,"",%progbits
"""


@dataclass(frozen=True)
class Written:
    """The manifest that a library carries, and what each kernel takes of a card (none of a CPU)."""

    manifest: Manifest
    uses: tuple[Use, ...] = ()


def virtual_machine(
    lowered: tvm.IRModule,
    target: Target,
    manifest: Manifest,
    out: Path,
    step_names: Mapping[str, str] | None = None,
) -> Written:
    """Writes the library `out`; its manifest has `target`, `cpu_features`, `archs`, `steps` and `bytes` filled in.

    `lowered`, `manifest` and `step_names` as `standalone` takes them.

    HorqError: no C compiler; of a card also no nvcc, one too old for an architecture, or a kernel that the card cannot
    hold. Nothing is left at `out` then but what was there before.
    """
    compiler = link.find_compiler(target.compiler)
    hook = _CompileHook(target) if target.family == "cuda" else None
    plan = make_plan(lower_calls(lowered), step_names)
    check_interface(plan, manifest)
    manifest = replace(
        manifest,
        target=target.name,
        cpu_features=tuple(target.features),
        bytes=count_weights(plan),
        runtime="tvm",
        archs=target.archs,
        steps={step.kernel: step.name for step in plan.steps},
    )
    with replacing(out) as partial, tempfile.TemporaryDirectory(prefix="horq-tvm-") as scratch:
        with hook or contextlib.nullcontext():
            # A card's kernels go to TVM as they are, so that what is verified through OpenCL is what is compiled.
            module = lowered if hook else with_plain_indices(lowered)
            passes = _to_bytecode(on_card=hook is not None)
            executable = relax.build(module, target.tvm_target(), relax_pipeline=passes, tir_pipeline="s_tir")
        room = manifest_room(manifest)
        _link(executable, compiler, Path(scratch), partial, bytes(room))
        fatbin = hook.made(partial) if hook else None
        code = len(fatbin.data) if fatbin else 0
        return Written(write_manifest(partial, manifest, room, code), fatbin.uses if fatbin else ())


def _to_bytecode(on_card: bool) -> tvm.transform.Pass:
    """The last passes of TVM's own pipeline: what comes before them is done.

    Kernels of a CPU have their tails masked behind them, as some look into kernels and know no lowered ones.
    """
    return tvm.transform.Sequential(
        [
            relax.transform.RewriteDataflowReshape(),
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            relax.transform.StaticPlanBlockMemory(),
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            relax.transform.AttachGlobalSymbol(),
            *([] if on_card else [_MaskTails()]),
        ]
    )


@tvm.transform.module_pass(opt_level=0, name="MaskTails")
class _MaskTails:
    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        return mask_tails(mod)


@dataclass
class _CompileHook:
    """Takes the place of TVM's compilation of CUDA source while the block runs."""

    target: Target
    _made: list[Fatbin] = field(default_factory=list)
    _restore: Any = None

    def __post_init__(self) -> None:
        from horq_tvm.cuda import driver, toolkit

        self._toolkit = toolkit.find()
        self._toolkit.check(self.target.archs)
        driver.ensure_runtime()

    def __enter__(self) -> None:
        self._restore = tvm_ffi.get_global_func(COMPILE_HOOK, allow_missing=True)
        tvm_ffi.register_global_func(COMPILE_HOOK, self._compile, override=True)

    def __exit__(self, *_error: object) -> None:
        if self._restore is not None:
            tvm_ffi.register_global_func(COMPILE_HOOK, self._restore, override=True)

    def _compile(self, source: str) -> bytes:
        from horq_tvm.cuda.fatbin import compile_source

        fatbin = compile_source(source, self.target.archs, self._toolkit, self.target.shared_bytes)
        self._made.append(fatbin)
        return fatbin.data

    def made(self, library: Path) -> Fatbin | None:
        """The fatbin that the library holds, None where no kernel runs on a card. HorqError where it holds source."""
        data = library.read_bytes()
        if len(self._made) > 1 or any(fatbin.data not in data for fatbin in self._made):
            raise HorqError("the library does not hold the machine code that nvcc made; accepted: one fatbin in each")
        if not self._made and b"__global__" in data:
            raise HorqError("the library holds CUDA source in place of machine code; accepted: a fatbin")
        return self._made[0] if self._made else None


def _link(executable: Any, compiler: Sequence[str], folder: Path, out: Path, manifest: bytes) -> None:
    """The executable as a shared library, with a section that has room for the manifest.

    Runs in `folder` and names files relative to it, so that no path of this machine gets into the library.
    """
    (folder / "manifest.json").write_bytes(manifest)
    (folder / "manifest.S").write_text(_MANIFEST)

    def link_objects(_name: str, objects: Sequence[str], **_options: Any) -> None:
        relative = [str(Path(path).relative_to(folder)) for path in objects]
        command = [*compiler, *_LINK, "-o", str(out), *relative, "manifest.S", "-lm"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise HorqError(f"{compiler[0]} failed (exit status {done.returncode}): {link.first_error(done.stderr)}")

    executable.export_library(str(out), fcompile=link_objects, workspace_dir=str(folder))
