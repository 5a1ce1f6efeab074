"""A Debian device of another architecture on this machine: its root in a folder, its programs under qemu.

The root holds what a bare device has with `apt install python3-numpy python3-pip`: packages of the architecture,
fetched by this machine's own apt (which checks their signatures) and unpacked; the cache folder of `horq_tvm.datasets`
keeps it. Programs run with that folder as their root, so nothing of this machine is seen, no /proc and no /dev either.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from horq_tvm import datasets

PACKAGES = ("python3", "python3-numpy", "python3-pip")
INSTALLED = ".complete"


class NoDeviceError(Exception):
    """This machine cannot be that device; says what it lacks."""


@dataclass(frozen=True)
class Architecture:
    """Debian's name, GNU's triple, and the emulator that qemu-user-static has for it."""

    debian: str
    triple: str
    emulator: str


ARM64 = Architecture("arm64", "aarch64-linux-gnu", "qemu-aarch64-static")
ARMHF = Architecture("armhf", "arm-linux-gnueabihf", "qemu-arm-static")


@dataclass(frozen=True)
class Device:
    """A root folder of its own, to be written to as one likes."""

    architecture: Architecture
    root: Path

    def run(self, *words: str) -> str:
        """Runs a program by its path on the device and returns its standard output."""
        as_root = ("chroot",) if os.geteuid() == 0 else ("unshare", "--user", "--map-root-user", "chroot")
        command = (*as_root, str(self.root), f"/{self.architecture.emulator}", *words)
        done = subprocess.run(command, capture_output=True, text=True, env={"PATH": os.environ["PATH"], "HOME": "/"})
        assert done.returncode == 0, f"{' '.join(words)} on {self.architecture.debian}:\n{done.stderr}"
        return done.stdout

    def put(self, source: Path, *, into: str = "home") -> str:
        """Copies a file to the device and returns its path there."""
        (self.root / into).mkdir(exist_ok=True)
        shutil.copy(source, self.root / into / source.name)
        return f"/{into}/{source.name}"


def make_device(architecture: Architecture, folder: Path) -> Device:
    """A device whose root is `folder`, which must not exist. NoDeviceError: what this machine lacks for it."""
    emulator = shutil.which(architecture.emulator)
    if emulator is None:
        raise NoDeviceError(f"{architecture.emulator} is not installed (apt install qemu-user-static)")
    shutil.copytree(_packages_unpacked(architecture), folder, symlinks=True)
    shutil.copy(emulator, folder / architecture.emulator)
    device = Device(architecture, folder)
    try:
        device.run("/usr/bin/python3", "-c", "import numpy, pip")
    except AssertionError as error:
        raise NoDeviceError(f"programs cannot be run with a folder as their root: {error}") from error
    return device


def _packages_unpacked(architecture: Architecture) -> Path:
    """The root as the packages have it, from the cache, which the first call fills."""
    cached = datasets.cache_folder() / f"debian-{architecture.debian}"
    if (cached / INSTALLED).exists():
        return cached
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise NoDeviceError(f"{cached} is empty, and there is no apt to fetch it with")
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as name:
        scratch = Path(name)
        root = scratch / "root"
        root.mkdir()
        for package in _fetch(architecture, scratch / "apt"):
            _call("dpkg", "--extract", str(package), str(root))
        _choose_alternatives(root / "usr" / "lib" / architecture.triple)
        (root / "tmp").mkdir(exist_ok=True)
        (root / INSTALLED).touch()
        shutil.rmtree(cached, ignore_errors=True)
        root.replace(cached)
    return cached


def _fetch(architecture: Architecture, folder: Path) -> list[Path]:
    """The packages and all that they depend on, as apt would install them on an empty device."""
    for part in ("state/lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True)
    (folder / "status").touch()
    settings = {
        "Dir::State": folder / "state",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder / "cache",
        "APT::Architecture": architecture.debian,
        "APT::Architectures::": architecture.debian,
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "",
    }
    apt = ("apt-get", "-qq", *(f"-o{key}={value}" for key, value in settings.items()))
    subprocess.run([*apt, "update"], capture_output=True)  # one index may be missing; what matters is what comes next
    _call(*apt, "install", "--yes", "--download-only", *PACKAGES)
    return sorted((folder / "cache" / "archives").glob("*.deb"))


def _choose_alternatives(libraries: Path) -> None:
    """The links that the packages' own scripts would set."""
    for name in ("blas", "lapack"):
        (libraries / f"lib{name}.so.3").symlink_to(f"{name}/lib{name}.so.3")


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    if done.returncode:
        lines: Sequence[str] = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise NoDeviceError(f"{command[0]}: {lines[0]}")
