"""As much of ELF as it takes to look into a library of any little-endian machine without loading it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from horq_tvm.errors import HorqError, UsageError

MACHINES = {3: "i686", 40: "arm", 62: "x86_64", 183: "aarch64"}
"""e_machine by the name that `platform.machine()` has for it (32-bit ARM there says more: armv7l)."""

_SHT_SYMTAB = 2
_SHT_NOBITS = 8
_SHT_DYNSYM = 11
_SHF_EXECINSTR = 4
_STB_WEAK = 2


@dataclass(frozen=True)
class Section:
    """A section: where its bytes lie in the file, and what it is."""

    name: str
    kind: int
    flags: int
    offset: int
    size: int
    link: int

    @property
    def executable(self) -> bool:
        """Whether it holds machine code."""
        return bool(self.flags & _SHF_EXECINSTR)


@dataclass(frozen=True)
class Symbol:
    """An entry of the symbol table."""

    name: str
    weak: bool
    undefined: bool


@dataclass(frozen=True)
class Elf:
    """A file's bytes, known to be ELF with all its sections inside the file."""

    data: bytes
    wide: bool
    machine: str
    sections: tuple[Section, ...]

    @classmethod
    def read(cls, path: Path) -> Elf:
        """Reads `path`. UsageError where there is no such file, HorqError where it is not ELF or is cut short."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise UsageError(f"{path}: found no such file; accepted is a library that `horq-tvm build` wrote") from None
        except OSError as error:
            raise HorqError(f"cannot read {path}: {error.strerror}") from error
        if data[:4] != b"\x7fELF":
            raise HorqError(f"{path} is not a shared library (ELF) but starts with {data[:4]!r}")
        try:
            return cls._parse(data)
        except (struct.error, IndexError, ValueError) as error:
            raise HorqError(f"{path} is cut short or damaged: not all sections lie in its {len(data)} bytes") from error

    @classmethod
    def _parse(cls, data: bytes) -> Elf:
        wide = data[4] == 2
        if data[5] != 1:
            raise ValueError("big-endian")
        machine = struct.unpack_from("<H", data, 18)[0]
        (table,) = struct.unpack_from("<Q", data, 40) if wide else struct.unpack_from("<I", data, 32)
        entry_size, count, names_index = struct.unpack_from("<HHH", data, 58 if wide else 46)
        if table + count * entry_size > len(data):
            raise ValueError("the section headers past the end")
        headers = [_header(data, table + index * entry_size, wide) for index in range(count)]
        names = headers[names_index]
        sections = []
        for name, kind, flags, offset, size, link in headers:
            if kind != _SHT_NOBITS and offset + size > len(data):
                raise ValueError("a section past the end")
            sections.append(Section(_text(data, names[3] + name), kind, flags, offset, size, link))
        return cls(data, wide, MACHINES.get(machine, f"ELF machine {machine}"), tuple(sections))

    @cached_property
    def code_bytes(self) -> int:
        """Bytes in executable sections."""
        return sum(section.size for section in self.sections if section.executable)

    def section(self, name: str) -> Section | None:
        """The section of that name, None where there is none."""
        return next((section for section in self.sections if section.name == name), None)

    def contents(self, section: Section) -> bytes:
        """The bytes of a section that has any in the file."""
        return self.data[section.offset : section.offset + section.size]

    def symbols(self) -> Iterator[Symbol]:
        """The symbol table, without its unnamed entries."""
        return self._entries(_SHT_SYMTAB)

    def imports(self) -> Iterator[str]:
        """The names that a shared library looks for in others."""
        return (symbol.name for symbol in self._entries(_SHT_DYNSYM) if symbol.undefined)

    def _entries(self, kind: int) -> Iterator[Symbol]:
        layout = struct.Struct("<IBBHQQ" if self.wide else "<IIIBBH")
        for table in self.sections:
            if table.kind != kind:
                continue
            strings = self.sections[table.link]
            for fields in layout.iter_unpack(self.contents(table)):
                name = fields[0]
                info, index = (fields[1], fields[3]) if self.wide else (fields[3], fields[5])
                if name:
                    yield Symbol(_text(self.data, strings.offset + name), info >> 4 == _STB_WEAK, index == 0)


def _header(data: bytes, at: int, wide: bool) -> tuple[int, int, int, int, int, int]:
    """name, kind, flags, offset, size, link of the section header at byte `at`."""
    name, kind, flags, _address, offset, size, link = struct.unpack_from("<IIQQQQI" if wide else "<IIIIIII", data, at)
    return name, kind, flags, offset, size, link


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode("utf-8", "replace")
