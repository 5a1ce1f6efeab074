"""The parser and how errors end: one line on stderr, the right exit code, no traceback."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import horq_tvm
from horq_tvm.cli import main
from horq_tvm.cli.app import parser
from horq_tvm.errors import HorqError

REPORT: dict[str, Any] = {
    "version": "0.1.0",
    "inputs": [{"name": "x", "shape": [1, 3, 8, 8], "dtype": "float32"}],
    "outputs": [{"name": "y", "shape": [1, 10], "dtype": "float32"}],
    "target": "zen5",
    "cpu_features": ["avx2"],
    "layers": [
        {"name": "stem", "op": "conv2d", "order": None, "scale": None, "reason": "first layer", "schedule": "default"},
        {"name": "body", "op": "conv2d", "order": 7, "scale": "sample", "reason": None, "schedule": "default"},
    ],
    "bytes": {"code": 1000, "weights_packed": 2000, "weights_float": 3000, "manifest": 400},
    "agreement": 0.5,
    "cosine": 0.75,
}


class Recorder:
    """Stands in for `horq_tvm.build`: keeps the call, and exports a text."""

    def __init__(self) -> None:
        self.model: Any = None
        self.options: dict[str, Any] = {}
        self.report = REPORT

    def __call__(self, model: Any, *, progress: Any, **options: Any) -> Recorder:
        progress("import")
        self.model, self.options = model, options
        return self

    def export(self, path: str) -> None:
        Path(path).write_text("library")


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(vars(horq_tvm), "build", recorder)
    return recorder


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("horq-tvm: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("", "required: VERB"),
        ("tune m.onnx --trials 5", "required: --database"),
        ("tune m.onnx --database d", "required: --trials"),
        ("tune m.onnx --database d --trials 0", "--trials: found '0'; accepted: a number from 1"),
        ("tune m.onnx --database d --trials 5 --minutes -1", "--minutes: found '-1'; accepted: a number of minutes"),
        ("build m.onnx", "required: -o/--output"),
        ("build m.onnx -o m.so --order 0", "--order: found '0'; accepted: 1 to 8, or float"),
        ("build m.onnx -o m.so --order 100", "--order: found '100'; accepted: 1 to 8, or float"),
        ("build m.onnx -o m.so --order 1.5", "--order: found '1.5'"),
        ("build m.onnx -o m.so --scale smaple", "--scale: invalid choice: 'smaple' (choose from"),
        ("build m.onnx -o m.so --input 1,3,8,8", "--input: found '1,3,8,8'; accepted: NAME=1,3,224,224"),
        ("build m.onnx -o m.so --input x=1,0,8", "--input: found 'x=1,0,8'"),
        ("build m.onnx -o m.so --emit vm", "argument --emit: invalid choice: 'vm'"),
        ("build m.onnx -o m.so --rest int4", "--rest: invalid choice: 'int4' (choose from"),
        ("build m.onnx -o m.so --ord 2", "unrecognized arguments: --ord 2"),
        ("run m.so x.npy --threads 0", "--threads: found '0'; accepted: a number from 1"),
        ("bench m.so --peers tflite", "--peers: found 'tflite'; accepted: onnxruntime, onnxruntime-int8"),
        ("bench nowhere.so", "nowhere.so: cannot be read: No such file"),
        ("build m.onnx -o m.so --calibration nowhere.npz", "nowhere.npz: cannot be read: No such file"),
    ],
)
def test_a_mistaken_call_is_one_line_and_exit_code_2(
    words: str, complaint: str, build: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    assert complaint in error_line(capsys)
    assert build.model is None


def test_every_verb_of_the_interface_and_no_other() -> None:
    text = parser().format_help()
    for verb in ("build", "run", "tune", "merge", "bench", "inspect", "targets"):
        assert f"\n    {verb} " in text


def test_build_hands_on_what_was_said_and_nothing_else(build: Recorder, tmp_path: Path) -> None:
    output = str(tmp_path / "m.so")
    assert main(["build", "m.onnx", "-o", output]) == 0
    assert (build.model, build.options) == ("m.onnx", {})
    np.savez(tmp_path / "c.npz", x=np.ones((2, 3), "float32"))
    words = (
        f"build m.onnx -o {output} --target zen4 --order 3 --scale static --rest int8 --plan p.yaml --tap a b --tap c"
    )
    words += f" --database d --input x=1,3,8,8 --input a=b=2 --calibration {tmp_path / 'c.npz'}"
    assert main(words.split()) == 0
    calibration = build.options.pop("calibration")
    assert {name: array.shape for name, array in calibration.items()} == {"x": (2, 3)}
    assert build.options == {
        "target": "zen4",
        "order": 3,
        "scale": "static",
        "plan": "p.yaml",
        "rest": "int8",
        "taps": ("a", "b", "c"),
        "database": "d",
        "input_shapes": {"x": (1, 3, 8, 8), "a=b": (2,)},
    }
    assert main(["build", "m.onnx", "-o", output, "--order", "float"]) == 0
    assert build.options == {"order": "float"}


def test_build_tells_what_became_of_each_layer(
    build: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", "m.onnx", "-o", str(tmp_path / "m.so")]) == 0
    text = capsys.readouterr().out
    assert "stem   conv2d      -  float   default         0  first layer" in text
    assert "body   conv2d      7  sample  default" in text
    assert "from order 6 on, int8 with VNNI is faster than the planes: body" in text


def test_json_alone_on_standard_output(build: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["build", "m.onnx", "-o", str(tmp_path / "m.so"), "--json"]
    assert main([*words, "-"]) == 0
    assert json.loads(capsys.readouterr().out) == REPORT
    assert main([*words, str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text()) == REPORT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.so", "r.json"]


@pytest.mark.parametrize("option", ["-o", "--json"])
def test_an_unwritable_path_is_found_before_the_work(
    option: str, build: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"-o": str(tmp_path / "m.so"), "--json": "-", option: str(tmp_path / "missing" / "file")}
    assert main(["build", "m.onnx", *(word for pair in files.items() for word in pair)]) == 1
    assert f"there is no folder {tmp_path / 'missing'}" in error_line(capsys)
    assert build.model is None


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (HorqError("conv 'a':\n  broken"), 1, "conv 'a': broken"),
        (
            RuntimeError("odd\nlines"),
            1,
            "internal error, please report it: RuntimeError: odd lines (--debug shows where)",
        ),
        (OSError(28, "No space left on device", "/m.so"), 1, "/m.so: No space left on device"),
        (ModuleNotFoundError("No module", name="tvm.relax"), 1, "tvm is not installed; it comes with: pip install"),
        (
            ModuleNotFoundError("No module", name="horq_tvm.x"),
            1,
            "internal error, please report it: ModuleNotFoundError",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_failure_is_one_line(
    error: BaseException,
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setitem(vars(horq_tvm), "build", fail)
    words = ["build", "m.onnx", "-o", str(tmp_path / "m.so")]
    assert main(words) == code
    assert text in error_line(capsys)
    main([*words, "--debug"])
    assert "Traceback" in capsys.readouterr().err


def test_what_libraries_log_is_for_debugging(
    build: Recorder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def noisy(*arguments: Any, **options: Any) -> Recorder:
        logging.warning("axis out of range")
        return build(*arguments, **options)

    monkeypatch.setitem(vars(horq_tvm), "build", noisy)
    words = ["build", "m.onnx", "-o", str(tmp_path / "m.so")]
    assert main(words) == 0
    assert caplog.messages == []
    assert main([*words, "--debug"]) == 0
    assert caplog.messages == ["axis out of range"]


def test_the_parser_imports_nothing_heavy() -> None:
    """`horq-tvm run` on a device: numpy and the standard library."""
    code = (
        "import sys; from horq_tvm.cli.app import parser; parser().parse_args(['run', 'a', 'b']);"
        "heavy = {'tvm', 'onnx', 'onnxruntime', 'torch', 'yaml', 'pydantic', 'rich', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_python_dash_m() -> None:
    done = subprocess.run([sys.executable, "-m", "horq_tvm", "targets", "--json", "-"], capture_output=True, check=True)
    records = json.loads(done.stdout)
    assert {"x86-64", "zen5"} <= {record["name"] for record in records}
    assert done.stderr == b""


def test_a_reader_that_hangs_up_is_no_error() -> None:
    command = f"{sys.executable} -m horq_tvm targets | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True)
    assert done.stderr == b""
