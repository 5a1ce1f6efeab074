"""Devices behind a tracker, on loopback: they share the work, and one that is killed costs its own measurement."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("tvm")
pytest.importorskip("tornado")
pytest.importorskip("psutil")

import horq_tvm
from horq_tvm.errors import HorqError
from horq_tvm.tuning import api, remote
from tests.schedules.test_decisions import float_network
from tests.tuning.test_tune import measurements, tune

KEY = "board"
pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Bench:
    """A tracker and two servers."""

    def __init__(self, log: Path) -> None:
        self._log = log.open("w")
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self.tracker = self._start("rpc_tracker", "--port", str(port), "--port-end", str(port + 1))
        self._wait(lambda: self._answers(port))
        self.servers = [self._serve() for _ in range(2)]
        self._wait(lambda: remote._listed("127.0.0.1", port).get(KEY, 0) == 2)

    def _serve(self) -> subprocess.Popen[bytes]:
        port = free_port()
        words = ["--tracker", self.address, "--key", KEY, "--port", str(port), "--port-end", str(port + 1)]
        return self._start("rpc_server", *words)

    def _start(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"tvm.exec.{name}", "--host", "127.0.0.1", *words]
        return subprocess.Popen(command, stdout=self._log, stderr=self._log, start_new_session=True)

    def _answers(self, port: int) -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            return False
        return True

    def _wait(self, condition: object) -> None:
        deadline = time.monotonic() + 60
        while not condition():  # type: ignore[operator]
            assert time.monotonic() < deadline, Path(self._log.name).read_text()
            time.sleep(0.2)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """The process and those that it forked for a session."""
        import psutil

        for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            victim.kill()
        process.wait()

    def close(self) -> None:
        for process in (*self.servers, self.tracker):
            if process.poll() is None:
                self.kill(process)
        self._log.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    found = Bench(tmp_path / "log")
    yield found
    found.close()


def test_one_of_two_devices_is_killed_and_the_run_completes(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "db"
    killed = threading.Event()

    def kill_at_four(progress: api.Progress) -> None:
        if progress.done >= 4 and not killed.is_set():
            killed.set()
            bench.kill(bench.servers[0])

    report = tune(folder, trials=12, rpc=bench.address, key=KEY, progress=kill_at_four)
    assert killed.is_set()
    assert len(measurements(folder)) == report.added == 12
    assert report.failed == 0
    horq_tvm.build(float_network(), order="float", database=folder)


def test_no_device_under_that_key_and_none_that_is_left(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(HorqError, match="no device under the key 'bord' .*there are: board"):
        tune(tmp_path / "db", rpc=bench.address, key="bord")

    def kill_all(progress: api.Progress) -> None:
        if progress.done >= 2:
            for server in bench.servers:
                if server.poll() is None:
                    bench.kill(server)

    with pytest.raises(HorqError, match="measurements are in the database, the same call goes on"):
        tune(tmp_path / "db", trials=12, rpc=bench.address, key=KEY, progress=kill_all)
    assert len(measurements(tmp_path / "db")) >= 2


def test_a_device_of_another_architecture(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(HorqError, match="does not run for target rpi4 .*accepted: the target of the device"):
        tune(tmp_path / "db", target="rpi4", rpc=bench.address, key=KEY)
    assert not measurements(tmp_path / "db")
