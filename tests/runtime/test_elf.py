"""Looking into ELF files by hand, against readelf and against damage."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from horq_tvm.errors import HorqError, UsageError
from horq_tvm.runtime.elf import Elf

INTERPRETER = Path(sys.executable).resolve()


def test_sections_are_those_that_readelf_shows() -> None:
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    text = subprocess.run(["readelf", "-SW", INTERPRETER], capture_output=True, text=True, check=True).stdout
    rows = re.findall(r"^ *\[ *\d+\] (\.\S+) +\S+ +[0-9a-f]+ ([0-9a-f]+) ([0-9a-f]+) ", text, re.MULTILINE)
    want = [(name, int(offset, 16), int(size, 16)) for name, offset, size in rows]
    assert len(want) > 10
    found = [(section.name, section.offset, section.size) for section in Elf.read(INTERPRETER).sections[1:]]
    assert found == want


def test_code_is_what_can_be_executed() -> None:
    elf = Elf.read(INTERPRETER)
    text = elf.section(".text")
    assert text is not None
    assert text.size <= elf.code_bytes < len(elf.data)


def narrow_elf() -> bytes:
    """A 32-bit ARM file of three sections: none, "horq" with the bytes "hello", and the section names."""
    names = b"\0horq\0names\0"
    contents = b"hello" + names
    table = 52 + len(contents)
    head = (
        b"\x7fELF\x01\x01\x01" + bytes(9) + struct.pack("<HHIIIIIHHHHHH", 3, 40, 1, 0, 0, table, 0, 52, 0, 0, 40, 3, 2)
    )
    sections = [(0,) * 10, (1, 1, 4, 0, 52, 5, 0, 0, 0, 0), (6, 3, 0, 0, 57, len(names), 0, 0, 0, 0)]
    return head + contents + b"".join(struct.pack("<10I", *section) for section in sections)


def test_a_32_bit_file_of_another_machine(tmp_path: Path) -> None:
    (tmp_path / "m.so").write_bytes(narrow_elf())
    elf = Elf.read(tmp_path / "m.so")
    section = elf.section("horq")
    assert section is not None
    assert (elf.machine, elf.contents(section), elf.code_bytes) == ("arm", b"hello", 5)


@pytest.mark.parametrize("kept", [5, 20, 51, 60, len(narrow_elf()) - 1])
def test_a_file_cut_short(tmp_path: Path, kept: int) -> None:
    (tmp_path / "m.so").write_bytes(narrow_elf()[:kept])
    with pytest.raises(HorqError, match="cut short or damaged"):
        Elf.read(tmp_path / "m.so")


def test_no_file_and_no_elf(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.so: found no such file"):
        Elf.read(tmp_path / "none.so")
    (tmp_path / "text.so").write_text("#!/bin/sh")
    with pytest.raises(HorqError, match="not a shared library"):
        Elf.read(tmp_path / "text.so")
