"""The card of this machine: whether there is one, and whether it runs a library's code. Standard library only."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from horq_tvm.errors import HorqError

DRIVER = "libcuda.so.1"
NO_DEVICE = 100
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_ERRORS = {
    NO_DEVICE: "no CUDA-capable device is detected",
    34: "the driver is a stub",
    803: "the driver does not match the kernel's module",
    804: "the driver is too old for this card",
    999: "unknown error",
}


@dataclass(frozen=True)
class Card:
    """A card by its number and compute capability, 86 for 8.6."""

    index: int
    arch: int

    def runs(self, arch: int) -> bool:
        """Whether it executes machine code for `arch`: of its own major version, and no higher a minor one."""
        return self.arch // 10 == arch // 10 and arch <= self.arch


def card_for(archs: Sequence[int]) -> Card:
    """The first card of this machine that runs code for one of `archs`.

    HorqError where there is no driver or no card, or no card that does.
    """
    cards = _cards(archs)
    found = next((card for card in cards if any(map(card.runs, archs))), None)
    if found is None:
        here = ", ".join(f"sm_{card.arch}" for card in cards)
        raise HorqError(f"the library holds code for {named(archs)}; the CUDA device of this machine is {here}")
    return found


def named(archs: Sequence[int]) -> str:
    """sm_75, sm_86"""
    return ", ".join(f"sm_{arch}" for arch in archs)


def _cards(archs: Sequence[int]) -> list[Card]:
    needed = f"the library needs a card of {named(archs)}"
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError as error:
        raise HorqError(f"no CUDA device: NVIDIA's driver, {DRIVER}, is not on this machine; {needed}") from error
    count = ctypes.c_int()
    for status in (driver.cuInit(0), driver.cuDeviceGetCount(ctypes.byref(count))):
        if status != 0:
            said = _ERRORS.get(status, "see CUresult in cuda.h")
            raise HorqError(f"no CUDA device: the driver says {said} (error {status}); {needed}")
    if count.value == 0:
        raise HorqError(f"no CUDA device: the driver counts none; {needed}")
    return [Card(index, 10 * _ask(driver, _MAJOR, index) + _ask(driver, _MINOR, index)) for index in range(count.value)]


def _ask(driver: ctypes.CDLL, attribute: int, device: int) -> int:
    value = ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return value.value
