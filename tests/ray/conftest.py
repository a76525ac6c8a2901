"""A real Ray cluster for each module, evidence in a folder of its own, and a sink that stands for the outside."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cloudpickle import register_pickle_by_value, unregister_pickle_by_value

from ray_guard.evidence.reader import NotEvidence, Quarantine, merge, read
from ray_guard.records import SpanRecord


class Sink:
    """A TCP listener on loopback that keeps what it is sent: what it saw did get out."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._server.getsockname()[1]
        self.accepted = 0
        self._seen: list[bytes] = []
        threading.Thread(target=self._serve, name="sink", daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._server.accept()
            except OSError:
                return
            self.accepted += 1
            with peer:
                peer.settimeout(5)
                try:
                    while chunk := peer.recv(4096):
                        self._seen.append(chunk)
                except OSError:
                    pass

    def saw(self, text: str, within: float = 2.0) -> bool:
        """`text` has arrived, or does so within that many seconds."""
        deadline = time.monotonic() + within
        while text.encode() not in b"|".join(self._seen):
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        return True

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()


@pytest.fixture
def sink() -> Iterator[Sink]:
    found = Sink()
    yield found
    found.close()


@pytest.fixture
def other() -> Iterator[Sink]:
    """A second one."""
    found = Sink()
    yield found
    found.close()


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evidence")


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, evidence: Path) -> Iterator[Any]:
    """One ``ray.init`` for a module, whose classes and functions travel by value, as those of a script do."""
    before = dict(os.environ)
    os.environ["RAY_GUARD_EVIDENCE"] = str(evidence)
    register_pickle_by_value(request.module)
    context = ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    yield context
    ray.shutdown()
    unregister_pickle_by_value(request.module)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def recorded(evidence: Path) -> Callable[..., list[SpanRecord]]:
    """``recorded(fits)``: waits until the evidence holds a span that fits, and returns all that do."""

    def wait(fits: Callable[[SpanRecord], bool], within: float = 10.0) -> list[SpanRecord]:
        deadline = time.monotonic() + within
        while True:
            found = [span for span in _spans(evidence) if fits(span)]
            if found or time.monotonic() >= deadline:
                return found
            time.sleep(0.1)

    return wait


def _spans(folder: Path) -> list[SpanRecord]:
    try:
        return [entry.span for entry in merge(read([folder], Quarantine())).values()]
    except NotEvidence:
        return []  # nothing has been written yet
