"""The same figures on every machine: one thread, no network but this machine's own, a silent console."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

# Before torch is imported: sums in one order, and no fight for cores.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # timm asks the hub


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches out fails; processes of one test may still talk to each other."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else address
        if self.family in (socket.AF_INET, socket.AF_INET6) and host not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"this test reaches for the network: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture(autouse=True)
def silent_console(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What one test's command line switches on does not speak in the next test."""
    from sepress import console

    monkeypatch.setattr(console, "_console", None)
    return
