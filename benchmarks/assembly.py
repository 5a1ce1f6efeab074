"""Loops of compiled ARM code, read from `llvm-objdump -d --no-show-raw-insn`.

A loop is what lies between a branch backwards and its destination; it is innermost if no other lies within. LLVM lays
the body of an innermost loop out in one piece, which is what this relies on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

LABEL = ".Lhere"
_LINE = re.compile(r"^\s*([0-9a-f]+):\s+(\S.*?)\s*$", re.MULTILINE)
_COMMENT = re.compile(r"\s*(//|@|;).*$")
_DESTINATION = re.compile(r"(?:0x)?([0-9a-f]+)(?: <.*>)?$")
_CONDITIONS = "eq|ne|cs|hs|cc|lo|mi|pl|vs|vc|hi|ls|ge|lt|gt|le|al"
_BRANCH = re.compile(rf"(b(\.?({_CONDITIONS}))?(\.[nw])?|cbn?z|tbn?z)$")
_VECTOR = re.compile(r"\b[vqds]\d+\b")
_ADDRESS = re.compile(r"\[(\w+)")
_SWAR_MASK = re.compile(r"#0x(5{8}|5{16})\b")  # the first step of counting bits by shifts and masks


@dataclass(frozen=True)
class Instruction:
    """One line of a listing: its address, and its text without the comment, blanks made single."""

    address: int
    text: str

    @property
    def mnemonic(self) -> str:
        return self.text.split(" ", 1)[0]

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """As they are separated by commas: braces and brackets are taken apart too."""
        _, _, rest = self.text.partition(" ")
        return tuple(word.strip() for word in rest.split(",")) if rest else ()

    @property
    def destination(self) -> int | None:
        """Where a branch within the function goes; None for any other instruction."""
        if not _BRANCH.match(self.mnemonic):
            return None
        found = _DESTINATION.search(self.text)
        return int(found[1], 16) if found else None

    @property
    def leaves(self) -> bool:
        """Whether what comes after it in the listing need not come next: a branch, a call, a return."""
        return self.destination is not None or bool(re.match(r"(bl|br|bx|blx|blr|ret)$", self.mnemonic))

    @property
    def defines(self) -> str | None:
        """The first register it writes, as the operand is spelt; None for stores, comparisons and branches."""
        if re.match(r"(v?st|cmp|cmn|tst|fcmp|b$|b\.|bl|cb|tb|ret)", self.mnemonic) or not self.operands:
            return None
        return self.operands[0].strip("{} ")

    @property
    def for_assembler(self) -> str:
        """The text with a label in place of an address, so that it stands by itself."""
        if self.destination is None and not re.match(r"adrp?$|bl$", self.mnemonic):
            return self.text
        *kept, _ = self.operands
        return f"{self.mnemonic} {', '.join([*kept, LABEL])}"


@dataclass(frozen=True)
class Loop:
    """A loop's instructions, from the branch's destination to the branch, and those before it in the listing."""

    body: tuple[Instruction, ...]
    before: tuple[Instruction, ...]

    def count(self, mnemonics: Iterable[str]) -> float:
        """`vectors` of the body."""
        return vectors(self.body, mnemonics)

    @property
    def spills(self) -> tuple[Instruction, ...]:
        """Loads and stores of vector registers on the stack, also by way of a register that points there."""
        return tuple(
            instruction
            for index, instruction in enumerate(self.body)
            if _moves_vectors(instruction) and self._on_stack(instruction, index)
        )

    @property
    def scalar_popcounts(self) -> tuple[Instruction, ...]:
        """Bits counted outside the vectors: CNT of a general register, of one moved over from there, or by masks."""
        found = []
        for index, instruction in enumerate(self.body):
            if instruction.mnemonic == "cnt":
                source = instruction.operands[1]
                if not source.startswith("v") or self._from_general_register(source, index):
                    found.append(instruction)
            elif _SWAR_MASK.search(instruction.text):
                found.append(instruction)
        return tuple(found)

    def _on_stack(self, instruction: Instruction, index: int) -> bool:
        """Follows the address register back through the listing. The frame pointer is a register like any other."""
        address = _ADDRESS.search(instruction.text)
        register = address[1] if address else ""
        for earlier in reversed((*self.before, *self.body[:index])):
            if register == "sp" or earlier.mnemonic in ("ret", "bx"):  # the end of another function
                break
            if earlier.defines != register:
                continue
            if earlier.mnemonic not in ("add", "sub", "mov", "orr"):
                break
            register = earlier.operands[1]
        return register == "sp"

    def _from_general_register(self, source: str, index: int) -> bool:
        number = re.match(r"v(\d+)", source)
        for earlier in reversed((*self.body[index:], *self.body[:index])):  # round the loop
            defined = re.match(r"[vqds](\d+)", earlier.defines or "")
            if defined and number and defined[1] == number[1]:
                return earlier.mnemonic in ("fmov", "mov", "ins", "dup") and bool(
                    re.match(r"[wx](\d+|zr)$", earlier.operands[-1])
                )
        return False


def instructions(listing: str) -> list[Instruction]:
    """The instructions of a listing, headings left out."""
    return [
        Instruction(int(address, 16), " ".join(_COMMENT.sub("", text).split()))
        for address, text in _LINE.findall(listing)
    ]


def text_of(body: Iterable[Instruction]) -> str:
    """The instructions as an assembler takes them."""
    return "\n".join([f"{LABEL}:", *(instruction.for_assembler for instruction in body)]) + "\n"


def vectors(body: Iterable[Instruction], mnemonics: Iterable[str]) -> float:
    """Vectors of 128 bits that the instructions of these names work on: a register of 64 bits is half of one."""
    wanted = frozenset(mnemonics)
    return sum(_width(instruction) for instruction in body if instruction.mnemonic in wanted)


def innermost_loops(code: Sequence[Instruction]) -> list[Loop]:
    """The loops of `code` that hold no other, in its order."""
    at = {instruction.address: index for index, instruction in enumerate(code)}
    ranges = [
        (at[instruction.destination], index)
        for index, instruction in enumerate(code)
        if instruction.destination in at and instruction.destination <= instruction.address
    ]
    innermost = [
        own for own in ranges if not any(other != own and own[0] <= other[0] and other[1] <= own[1] for other in ranges)
    ]
    return [Loop(tuple(code[first : last + 1]), tuple(code[:first])) for first, last in innermost]


def hottest(code: Sequence[Instruction], mnemonics: Iterable[str]) -> Loop | None:
    """The innermost loop that holds most instructions of these names, the first among equals; None if none does."""
    wanted = frozenset(mnemonics)
    loops = [loop for loop in innermost_loops(code) if loop.count(wanted)]
    return max(loops, key=lambda loop: loop.count(wanted), default=None)


def _width(instruction: Instruction) -> float:
    """1 for an instruction on whole 128-bit registers, 1/2 on halves of them, 1/4 for a float32 scalar."""
    first = instruction.operands[0]
    if re.search(r"\.(16b|8h|4s|2d)$", first) or re.match(r"q\d", first):
        return 1.0
    return 0.25 if re.match(r"s\d", first) else 0.5


def _moves_vectors(instruction: Instruction) -> bool:
    memory = re.match(r"(v?ld|v?st)", instruction.mnemonic)
    return bool(memory and _VECTOR.search(instruction.text.split("[")[0]))
