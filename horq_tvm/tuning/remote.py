"""Devices behind TVM's RPC tracker (`python -m tvm.exec.rpc_tracker`), each with a `python -m tvm.exec.rpc_server`."""

from __future__ import annotations

import socket
import time
from typing import Any

from horq_tvm.errors import HorqError, UsageError

from .worker import Remote

MOST_DEVICES = 16
WAIT_S = 3.0  # for a device that has just been switched on


def devices(address: str | None, key: str | None) -> list[Remote | None]:
    """One Remote for each device that the tracker lists under the key; none where no address is given.

    Raises:
        UsageError: an address that is none, or only one of address and key.
        HorqError: no tracker answers, or it knows no device under that key (the message lists the keys it knows).
    """
    if address is None and key is None:
        return []
    if address is None or not key:
        raise UsageError("rpc: an address and a key go together; accepted: --rpc HOST:PORT --key KEY")
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"rpc: found {address!r}; accepted: HOST:PORT")
    deadline = time.monotonic() + WAIT_S
    while not (count := (known := _listed(host, int(port))).get(key, 0)) and time.monotonic() < deadline:
        time.sleep(0.25)
    if not count:
        others = ", ".join(sorted(known)) or "none"
        raise HorqError(f"no device under the key {key!r} on the tracker {address}; there are: {others}")
    return [Remote(host, int(port), key)] * min(count, MOST_DEVICES)


def _listed(host: str, port: int) -> dict[str, int]:
    """How many servers the tracker knows, by key."""
    from tvm import rpc

    try:
        socket.create_connection((host, port), WAIT_S).close()  # TVM goes on trying for a minute
        summary: dict[str, Any] = rpc.connect_tracker(host, port).summary()
    except Exception as error:
        raise HorqError(f"no RPC tracker answers at {host}:{port} ({' '.join(str(error).split())[:120]})") from error
    found: dict[str, int] = {}
    for server in summary.get("server_info", []):
        name = str(server["key"]).removeprefix("server:")
        found[name] = found.get(name, 0) + 1
    return found
