"""How a library asks its CPU for a feature, per architecture. The C side (runtime/cpu_*.c) knows only the question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from horq_tvm.errors import HorqError

_EAX, _EBX, _ECX, _EDX = range(4)
_YMM = 0b110  # XCR0: SSE and AVX state
_ZMM = 0b1110_0110  # and opmask, upper halves, upper registers
_EXTENDED = 0x8000_0001


@dataclass(frozen=True)
class Question:
    """On x86: bit `bit` of register `word` of CPUID `leaf`, `subleaf`, and the XCR0 bits `os_state` set.

    On ARM: bit `bit` of what getauxval says of AT_HWCAP (`word` 0) or AT_HWCAP2 (1), to a process of `leaf` bits.
    """

    leaf: int
    subleaf: int
    word: int
    bit: int
    os_state: int = 0


X86: Mapping[str, Question] = {
    "sse2": Question(1, 0, _EDX, 26),
    "pni": Question(1, 0, _ECX, 0),
    "ssse3": Question(1, 0, _ECX, 9),
    "fma": Question(1, 0, _ECX, 12, _YMM),
    "cx16": Question(1, 0, _ECX, 13),
    "sse4_1": Question(1, 0, _ECX, 19),
    "sse4_2": Question(1, 0, _ECX, 20),
    "movbe": Question(1, 0, _ECX, 22),
    "popcnt": Question(1, 0, _ECX, 23),
    "avx": Question(1, 0, _ECX, 28, _YMM),
    "f16c": Question(1, 0, _ECX, 29, _YMM),
    "lahf_lm": Question(_EXTENDED, 0, _ECX, 0),
    "abm": Question(_EXTENDED, 0, _ECX, 5),
    "sse4a": Question(_EXTENDED, 0, _ECX, 6),
    "xop": Question(_EXTENDED, 0, _ECX, 11, _YMM),
    "fma4": Question(_EXTENDED, 0, _ECX, 16, _YMM),
    "tbm": Question(_EXTENDED, 0, _ECX, 21),
    "bmi1": Question(7, 0, _EBX, 3),
    "avx2": Question(7, 0, _EBX, 5, _YMM),
    "bmi2": Question(7, 0, _EBX, 8),
    "avx512f": Question(7, 0, _EBX, 16, _ZMM),
    "avx512dq": Question(7, 0, _EBX, 17, _ZMM),
    "avx512ifma": Question(7, 0, _EBX, 21, _ZMM),
    "avx512cd": Question(7, 0, _EBX, 28, _ZMM),
    "avx512bw": Question(7, 0, _EBX, 30, _ZMM),
    "avx512vl": Question(7, 0, _EBX, 31, _ZMM),
    "avx512vbmi": Question(7, 0, _ECX, 1, _ZMM),
    "avx512_vbmi2": Question(7, 0, _ECX, 6, _ZMM),
    "gfni": Question(7, 0, _ECX, 8),
    "avx512_vnni": Question(7, 0, _ECX, 11, _ZMM),
    "avx512_bitalg": Question(7, 0, _ECX, 12, _ZMM),
    "avx512_vpopcntdq": Question(7, 0, _ECX, 14, _ZMM),
    "avx512_fp16": Question(7, 0, _EDX, 23, _ZMM),
    "avx_vnni": Question(7, 1, _EAX, 4, _YMM),
    "avx512_bf16": Question(7, 1, _EAX, 5, _ZMM),
}

ARM: Mapping[str, Question] = {
    "fp": Question(64, 0, 0, 0),
    "asimd": Question(64, 0, 0, 1),
    "asimdhp": Question(64, 0, 0, 10),
    "asimdrdm": Question(64, 0, 0, 12),
    "fcma": Question(64, 0, 0, 14),
    "asimddp": Question(64, 0, 0, 20),
    "sve": Question(64, 0, 0, 22),
    "sve2": Question(64, 0, 1, 1),
    "i8mm": Question(64, 0, 1, 13),
    "bf16": Question(64, 0, 1, 14),
    "neon": Question(32, 0, 0, 12),
    "vfpv3": Question(32, 0, 0, 13),
    "vfpv4": Question(32, 0, 0, 16),
    "idiva": Question(32, 0, 0, 17),
    "idivt": Question(32, 0, 0, 18),
    "vfpd32": Question(32, 0, 0, 19),
    "crc32": Question(32, 0, 1, 4),
}
"""arch/arm64 and arch/arm, include/uapi/asm/hwcap.h, of the Linux kernel."""

_KNOWN: Mapping[str, Mapping[str, Question]] = {"x86": X86, "arm": ARM}


def questions(family: str, features: Sequence[str]) -> tuple[tuple[str, Question], ...]:
    """Name and question of each feature. HorqError for one that the library could not check before it uses it."""
    known = _KNOWN[family]
    for feature in features:
        if feature not in known:
            raise HorqError(f"no check of the CPU feature {feature!r} is known; {family} has: {', '.join(known)}")
    return tuple((feature, known[feature]) for feature in features)
