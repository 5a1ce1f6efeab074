"""The demo, as a user starts it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_digits(tmp_path: Path) -> None:
    """Three epochs are enough for every network to read most digits, and for every engine to read the same."""
    command = [sys.executable, "examples/digits.py", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"(float|HORQ K=\d) +│ +([\d.]+)% │ +([\d.]+)% │", done.stdout)
    assert [title for title, _, _ in rows] == ["float", "HORQ K=1", "HORQ K=2", "HORQ K=3"]
    assert all(float(accuracy) > 75 and float(agreement) > 99 for _, accuracy, agreement in rows)
    for name in ("k1", "k2", "k3"):
        assert (tmp_path / f"digits-{name}.so").stat().st_size < 150_000
