"""The machines we compile for: `targets.yaml` as typed, frozen values, and `native`, which is looked up on the host.

`resolve("zen5")`, `resolve("native")` and, for a file of one's own, `resolve("boards.yaml:kitchen")`.
"""

from __future__ import annotations

import difflib
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from horq_tvm import extras, yamlfile
from horq_tvm.errors import HorqError, UsageError

if TYPE_CHECKING:
    import tvm

Family = Literal["x86", "arm", "cuda"]
Popcount = Literal["vpopcntdq", "avx512bw", "avx2", "ssse3", "scalar", "cnt", "popc"]

NATIVE = "native"
PRESETS = Path(__file__).with_name("targets.yaml")
CPUINFO = Path("/proc/cpuinfo")
NATIVE_COMPILER = ("cc",)
WARP = 32
MAX_THREADS = 1024  # in a block

# The instruction set extensions that LLVM uses for code it was not asked to use them for, by LLVM's name, and the flag
# of /proc/cpuinfo that tells of each. Extensions reached through intrinsics alone (AES, SHA, AMX, ...) do not count: a
# virtual machine may mask them, and no kernel of ours would miss them.
LLVM_TO_CPUINFO: Mapping[str, str] = {
    "sse2": "sse2",
    "sse3": "pni",
    "ssse3": "ssse3",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "sse4a": "sse4a",
    "popcnt": "popcnt",
    "cx16": "cx16",
    "sahf": "lahf_lm",
    "avx": "avx",
    "f16c": "f16c",
    "fma": "fma",
    "fma4": "fma4",
    "xop": "xop",
    "tbm": "tbm",
    "avx2": "avx2",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "lzcnt": "abm",
    "movbe": "movbe",
    "gfni": "gfni",
    "avxvnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
}
AARCH64_TO_CPUINFO: Mapping[str, str] = {
    "fp-armv8": "fp",
    "neon": "asimd",
    "fullfp16": "asimdhp",
    "rdm": "asimdrdm",
    "dotprod": "asimddp",
    "complxnum": "fcma",
    "sve": "sve",
    "sve2": "sve2",
    "i8mm": "i8mm",
    "bf16": "bf16",
}
ARM_TO_CPUINFO: Mapping[str, str] = {
    "neon": "neon",
    "vfp3": "vfpv3",
    "vfp4": "vfpv4",
    "d32": "vfpd32",
    "hwdiv-arm": "idiva",
    "hwdiv": "idivt",
    "fp-armv8": "crc32",  # has no flag of its own in a 32-bit process; CRC32 came with it
}
TO_CPUINFO: Mapping[str, Mapping[str, str]] = {
    "x86_64": LLVM_TO_CPUINFO,
    "aarch64": AARCH64_TO_CPUINFO,
    "arm": ARM_TO_CPUINFO,
}
"""The like of `LLVM_TO_CPUINFO` by architecture, see `architecture_of`."""


def architecture_of(machine: str) -> str:
    """x86_64, aarch64 or arm: by the first part of a triple, or by what `platform.machine()` says."""
    first = machine.partition("-")[0].lower()
    if first.startswith("arm") and first != "arm64":
        return "arm"
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(first, first)


@dataclass(frozen=True)
class Target:
    """A machine to compile for.

    `features` are flags of /proc/cpuinfo, sorted; `vector_bits` and `word_bits` are bits; `l1_bytes` and `l2_bytes` are
    the data caches of one core; `compiler` is the argv prefix of the C compiler that links the library; `level` orders
    the generic presets of an architecture for `native` (None for a particular CPU).

    Of the family `cuda`, `archs` are the architectures that the library holds code for (86 is sm_86), `shared_bytes`
    the shared memory that a block may take on all of them, and what speaks of a CPU is the host's; only `vector_bits`,
    output channels side by side in packed weights, is the card's.
    """

    name: str
    description: str
    family: Family
    mtriple: str
    mcpu: str
    mattr: tuple[str, ...]
    features: tuple[str, ...]
    popcount: Popcount
    vector_bits: int
    vector_registers: int
    word_bits: int
    l1_bytes: int
    l2_bytes: int
    compiler: tuple[str, ...]
    level: int | None = None
    archs: tuple[int, ...] = ()
    shared_bytes: int = 0

    @property
    def architecture(self) -> str:
        """x86_64, aarch64 or arm."""
        return architecture_of(self.mtriple)

    def tvm_target(self) -> tvm.target.Target:
        """The same for TVM. That of a card has the lowest of its architectures: what is compiled for it runs on all.

        Raises:
            HorqError: the extra `compiler` is not installed, LLVM does not know the CPU (it would quietly compile for a
                generic one), or may use an extension for it that `features` does not name.
        """
        host = self.host_target()
        if self.family != "cuda":
            return host
        import tvm

        return tvm.target.Target(
            {
                "kind": "cuda",
                "arch": f"sm_{min(self.archs)}",
                "max_num_threads": MAX_THREADS,
                "max_threads_per_block": MAX_THREADS,
                "max_shared_memory_per_block": self.shared_bytes,
                "thread_warp_size": WARP,
            },
            host=host,
        )

    def host_target(self) -> tvm.target.Target:
        """What LLVM compiles for: the CPU, of a card its host. Raises as `tvm_target`."""
        codegen = _tvm_codegen()
        import tvm

        config = _llvm_config(self.mtriple)
        known = [str(cpu) for cpu in codegen.llvm_get_cpu_archlist(tvm.target.Target(config))]
        if self.mcpu not in known:
            close = difflib.get_close_matches(self.mcpu, known, n=5) or known
            version = codegen.llvm_version_major()
            raise HorqError(
                f"target {self.name}: LLVM {version} has no mcpu {self.mcpu!r}; accepted: {', '.join(close)}"
            )
        config["mcpu"] = self.mcpu
        if self.mattr:
            config["mattr"] = list(self.mattr)
        target = tvm.target.Target(config)
        flag_of = TO_CPUINFO[self.architecture]
        used = {flag_of.get(str(llvm)) for llvm in codegen.llvm_get_cpu_features(target)} - {None}
        unchecked = sorted(str(flag) for flag in used.difference(self.features))
        if unchecked:
            raise HorqError(
                f"target {self.name}: code for mcpu {self.mcpu!r} may use {', '.join(unchecked)}, which"
                " `features` does not name for a library to check; accepted: each in `features`, or off in `mattr`"
            )
        return target

    def missing_on(self, flags: frozenset[str]) -> tuple[str, ...]:
        """The features that a CPU with these /proc/cpuinfo flags lacks."""
        return tuple(feature for feature in self.features if feature not in flags)


@dataclass(frozen=True)
class Host:
    """What the machine we run on says of itself: /proc/cpuinfo flags, and LLVM's name of the CPU (None without TVM)."""

    machine: str
    flags: frozenset[str]
    llvm_cpu: str | None


def names() -> tuple[str, ...]:
    """The names `resolve` takes, `native` first."""
    return (NATIVE, *presets())


def resolve(name: str, host: Host | None = None) -> Target:
    """The target called `name`: a preset, `native` (of `host`, by default this machine), or `FILE.yaml:NAME`.

    Raises:
        UsageError: there is none of that name (the message lists those there are), or its file has a mistake.
        HorqError: `native` on a machine for which there is no preset.
    """
    if name == NATIVE:
        return native(presets(), host or this_host())
    path, colon, own = name.rpartition(":")
    if colon and path.endswith((".yaml", ".yml")):
        known: Mapping[str, Target] = load_presets(Path(path), base=_documents())
        label = f"{own!r} in {path}"
        accepted = tuple(known)
    else:
        known, own, label, accepted = presets(), name, repr(name), names()
    if own not in known:
        close = difflib.get_close_matches(own, accepted, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UsageError(f"unknown target {label}{hint}; accepted: {', '.join(accepted)}, or FILE.yaml:NAME")
    return known[own]


@lru_cache(maxsize=1)
def presets() -> Mapping[str, Target]:
    """The shipped targets, by name, in the file's order."""
    return load_presets(PRESETS)


def native(known: Mapping[str, Target], host: Host) -> Target:
    """What `native` stands for on `host`.

    The preset of the host's own CPU if it is listed and the host has all its features; else the highest generic level
    that fits, compiled for the CPU that LLVM sees, minus what the host (a virtual machine, say) masks.

    Raises:
        HorqError: no preset fits.
    """
    fitting = [
        replace(target, compiler=NATIVE_COMPILER)
        for target in known.values()
        if target.family != "cuda"
        and target.architecture == architecture_of(host.machine)
        and not target.missing_on(host.flags)
    ]
    if not fitting:
        raise HorqError(
            f"native: no preset for this machine ({host.machine or 'unknown'} with {len(host.flags)} CPU flags in"
            f" {CPUINFO}); accepted: {', '.join(known)}"
        )
    exact = [target for target in fitting if target.level is None and target.mcpu == host.llvm_cpu]
    if exact:
        return exact[0]
    best = max((target for target in fitting if target.level is not None), key=lambda target: target.level or 0)
    return _for_cpu(best, host)


def runnable(target: Target) -> Target:
    """`target` where this machine's CPU can run it, else `native`: what a build for another is tried out with."""
    host = this_host()
    here = (
        target.family != "cuda"
        and target.architecture == architecture_of(host.machine)
        and not target.missing_on(host.flags)
    )
    return target if here else native(presets(), host)


def this_host() -> Host:
    """Read off the machine; nothing in it needs the extra `compiler`."""
    try:
        llvm_cpu: str | None = str(_tvm_codegen().llvm_get_system_cpu())
    except HorqError:
        llvm_cpu = None
    return Host(_machine(), _cpu_flags(CPUINFO), llvm_cpu)


def _machine() -> str:
    """Of this process: a 64-bit kernel runs 32-bit systems too, and names itself."""
    machine = platform.machine()
    return "armv7l" if machine == "aarch64" and sys.maxsize < 2**32 else machine


def load_presets(path: Path, base: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Target]:
    """The targets of a YAML file, validated; `base` holds documents that they may extend.

    Raises:
        UsageError: names the file, the key, what was found and what is accepted.
    """
    document = yamlfile.load(path)
    from horq_tvm.target_schema import TargetsFile

    own = yamlfile.validate(TargetsFile, document, str(path)).targets
    every = {**(base or {}), **own}
    return {name: _parse(name, _flatten(name, every, path), path) for name in own}


def _documents() -> dict[str, Mapping[str, Any]]:
    return dict(yamlfile.load(PRESETS)["targets"])


def _flatten(
    name: str, every: Mapping[str, Mapping[str, Any]], path: Path, seen: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The document of `name` with what it extends filled in; features add up, a level is nobody's heirloom."""
    own = dict(every[name])
    parent = own.pop("extends", None)
    if parent is None:
        return own
    if parent not in every:
        raise UsageError(f"{path}: targets.{name}.extends: unknown target {parent!r}; accepted: {', '.join(every)}")
    if parent in (*seen, name):
        raise UsageError(f"{path}: targets.{name}.extends: {' -> '.join((*seen, name, parent))} goes round in a circle")
    inherited = _flatten(parent, every, path, (*seen, name))
    inherited.pop("level", None)
    merged = {**inherited, **own}
    if isinstance(own.get("features", []), list):
        merged["features"] = [*inherited.get("features", []), *own.get("features", [])]
    return merged


_KIB = {"l1_bytes": "l1d_kib", "l2_bytes": "l2_kib", "shared_bytes": "shared_kib"}
"""The sizes of a `Target` by their keys in the file."""


def _parse(name: str, document: Mapping[str, Any], path: Path) -> Target:
    from horq_tvm.target_schema import TargetRecord

    record = yamlfile.validate(TargetRecord, document, f"{path}: targets.{name}")
    fields = record.model_dump()
    kib = {key: fields.pop(name) for key, name in _KIB.items()}
    for ordered in ("features", "archs"):
        fields[ordered] = tuple(sorted(set(fields[ordered])))
    return Target(name=name, **{key: value * 1024 for key, value in kib.items()}, **fields)


def _for_cpu(generic: Target, host: Host) -> Target:
    """`generic` compiled for the host's CPU: its name where LLVM has one, its features where they were not masked."""
    if host.llvm_cpu in (None, "generic", "x86-64", generic.mcpu):
        return generic
    codegen = _tvm_codegen()
    import tvm

    flag_of = TO_CPUINFO[generic.architecture]
    cpu = tvm.target.Target({**_llvm_config(generic.mtriple), "mcpu": host.llvm_cpu})
    of_cpu = {str(feature) for feature in codegen.llvm_get_cpu_features(cpu)}
    usable = {llvm: flag for llvm, flag in flag_of.items() if llvm in of_cpu}
    # What the level asks for beyond the CPU's own features is switched on by name.
    added = [attribute for attribute in generic.mattr if attribute[1:] not in of_cpu]
    if set(generic.features) - set(usable.values()) - {flag_of[attribute[1:]] for attribute in added}:
        # LLVM's name is that of a lesser CPU than the flags tell of: trust the flags.
        return generic
    masked = sorted(llvm for llvm, flag in usable.items() if flag not in host.flags)
    present = {flag for flag in usable.values() if flag in host.flags}
    return replace(
        generic,
        name=f"{NATIVE}:{host.llvm_cpu}",
        description=f"This machine: {generic.description}, tuned for {host.llvm_cpu}",
        mcpu=host.llvm_cpu,
        mattr=(*added, *(f"-{llvm}" for llvm in masked)),
        features=tuple(sorted(present | set(generic.features))),
        level=None,
    )


def _cpu_flags(path: Path) -> frozenset[str]:
    """The `flags` line of the first processor (ARM: `Features`); empty where there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    named = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(named, "").split())


def _llvm_config(mtriple: str) -> dict[str, Any]:
    """What LLVM is told of a triple: on 32-bit ARM, floats are passed in registers."""
    config: dict[str, Any] = {"kind": "llvm", "mtriple": mtriple}
    return {**config, "mfloat-abi": "hard"} if architecture_of(mtriple) == "arm" else config


def _tvm_codegen() -> Any:
    try:
        from tvm.target import codegen
    except ImportError as error:
        raise extras.missing(error) from error
    return codegen
