"""What is installed, and that a base install (numpy alone) does a device's work."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.wheel import ROOT, build_wheel

HEAVY = ("tvm", "tvm_ffi", "onnx", "onnxruntime", "torch", "yaml", "pydantic", "rich")

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def without_extras(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process where the extras' modules cannot be imported."""
    block = f"import sys; sys.modules.update(dict.fromkeys({HEAVY})); from horq_tvm.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", block, *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    pytest.importorskip("setuptools")
    return zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("wheel")))


@pytest.mark.parametrize(
    ("link", "to"), [("relay_passes", "relay_passes"), ("schedules", "schedules"), ("targets.yaml", "targets.yaml")]
)
def test_links_are_relative_and_lead_somewhere(link: str, to: str) -> None:
    path = ROOT / "horq_tvm" / link
    assert path.is_symlink()
    assert str(path.readlink()) == f"../{to}"
    assert path.exists()


def test_wheel_holds_horq_tvm_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"horq_tvm", f"horq_tvm-{PROJECT['version']}.dist-info"}
    installed = {Path(name) for name in wheel.namelist()}
    python = ("horq_tvm/**/*.py", "relay_passes/*.py", "schedules/**/*.py")
    shipped = "horq_tvm/tuning/shipped/**/*.json*"
    for pattern in (*python, shipped, "horq_tvm/runtime/*.[ch]", "schedules/cuda/*.cuh"):
        sources = list(ROOT.glob(pattern))
        assert sources, pattern
        for source in sources:
            name = source.relative_to(ROOT)
            assert (name if name.parts[0] == "horq_tvm" else Path("horq_tvm") / name) in installed
    assert wheel.read("horq_tvm/targets.yaml") == (ROOT / "targets.yaml").read_bytes()


def test_only_numpy_is_required(wheel: zipfile.ZipFile) -> None:
    [metadata] = [name for name in wheel.namelist() if name.endswith("METADATA")]
    required = re.findall(r"^Requires-Dist: (.*)$", wheel.read(metadata).decode(), re.MULTILINE)
    assert [line for line in required if "extra ==" not in line] == ["numpy>=1.23"]
    [scripts] = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "horq-tvm = horq_tvm.cli:main" in wheel.read(scripts).decode()


def test_constraints_meet_the_requirements() -> None:
    """A pin outside what the extras ask for would make `make test` uninstallable."""
    from packaging.requirements import Requirement

    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = {pin.name.lower(): pin for pin in (Requirement(line) for line in lines if line)}
    asked = [Requirement(line) for extra in PROJECT["optional-dependencies"].values() for line in extra]
    asked += [Requirement(line) for line in PROJECT["dependencies"]]
    assert {"torch", "apache-tvm", "apache-tvm-ffi"} <= set(pins)
    for requirement in asked:
        if requirement.name.lower() in pins:
            [pin] = pins[requirement.name.lower()].specifier
            assert pin.operator == "=="
            assert requirement.specifier.contains(pin.version), requirement


@pytest.mark.parametrize("verb", ["build", "run", "tune", "merge", "bench", "inspect", "targets"])
def test_help_needs_no_extra(verb: str) -> None:
    done = without_extras(verb, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: horq-tvm {verb}")


@pytest.mark.parametrize(
    "words", [["targets"], ["build", "model.onnx", "-o", "model.so", "--target", "x86-64", "--order", "2"]]
)
def test_a_verb_that_needs_an_extra_names_it(words: list[str], tmp_path: Path) -> None:
    done = without_extras(*words)
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"horq-tvm: error: \w+ is not installed; .*'horq-tvm\[compiler\]'\n", done.stderr), done.stderr


def test_run_and_inspect_need_numpy_alone(tmp_path: Path) -> None:
    """They get as far as the file, which is none of ours."""
    (tmp_path / "x.npy").write_bytes(b"")
    for words in (["inspect", str(tmp_path / "x.npy")], ["run", str(tmp_path / "x.npy"), str(tmp_path / "x.npy")]):
        done = without_extras(*words)
        assert done.returncode == 1
        assert "not installed" not in done.stderr
        assert "x.npy" in done.stderr
