"""The courier: takes signed checkpoints off the host, so that what they speak of cannot be rewritten there.

Runs as a process of its own, child of the supervisor: ``python -m ray_guard.evidence.courier DESTINATION``. Standard
library only. Checkpoints come on standard input, a JSON object ``{"key", "checkpoint"}`` a line. Each stands for all
before it, so where the destination is slow or down only the newest of each log waits. What became of it is said on
standard output, a line whenever it changes: nothing when it works, else why not. Its failure changes no verdict.
"""

from __future__ import annotations

import json
import os
import re
import select
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from ray_guard.errors import RayGuardError

OTLP: Final = "otlp"
_TIMEOUT_S: Final = 10.0
_BACKOFF_S: Final = (1.0, 60.0)
_LAST_S: Final = 5.0
_INFO: Final = 9

_URL: Final = re.compile(r"https?://[^/?#]")

Deliver = Callable[[bytes], None]
"""Takes one line to the destination. Raises OSError: it did not arrive."""


class CourierError(RayGuardError):
    """A destination that is none, and what it may be."""


def destination(spelled: str, environ: Mapping[str, str]) -> Deliver:
    """How checkpoints get there.

    Args:
        spelled: the absolute path of a file (each is appended), a URL (each is posted as JSON), or ``otlp`` (each is a
            log record, sent as OTLP/HTTP JSON to where ``OTEL_EXPORTER_OTLP_*`` point).

    Raises:
        CourierError: it is none of these.
    """
    if spelled == OTLP:
        endpoint = environ.get("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "").strip()
        base = environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").strip()
        if not endpoint and not base:
            raise CourierError("otlp needs OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_LOGS_ENDPOINT")
        url = endpoint or f"{base.rstrip('/')}/v1/logs"
        return lambda line: _post(url, _log_record(line), _headers(environ))
    if os.path.isabs(spelled):
        return lambda line: _append(spelled, line)
    if _URL.match(spelled):
        return lambda line: _post(spelled, line, {})
    raise CourierError(f"{spelled!r} is no destination of checkpoints: an absolute path, an http(s):// URL, or otlp")


def _append(path: str, line: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _post(url: str, body: bytes, headers: Mapping[str, str]) -> None:
    import urllib.request  # here alone: the supervisor asks this module whether a destination is one

    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})  # noqa: S310 - checked
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S):  # noqa: S310
        pass


def _headers(environ: Mapping[str, str]) -> dict[str, str]:
    """``OTEL_EXPORTER_OTLP_HEADERS``: ``name=value`` with commas between, values percent-encoded."""
    from urllib.parse import unquote

    said = environ.get("OTEL_EXPORTER_OTLP_LOGS_HEADERS") or environ.get("OTEL_EXPORTER_OTLP_HEADERS") or ""
    pairs = (each.partition("=") for each in said.split(",") if "=" in each)
    return {name.strip(): unquote(value.strip()) for name, _, value in pairs}


def _log_record(line: bytes) -> bytes:
    said = json.loads(line)
    attribute = {"key": "ray_guard.journal.key", "value": {"stringValue": said["key"]}}
    record = {
        "timeUnixNano": str(time.time_ns()),
        "severityNumber": _INFO,
        "severityText": "INFO",
        "eventName": "ray_guard.checkpoint",
        "body": {"stringValue": said["checkpoint"]},
        "attributes": [attribute],
    }
    service = {"key": "service.name", "value": {"stringValue": "ray_guard"}}
    logs = {
        "resource": {"attributes": [service]},
        "scopeLogs": [{"scope": {"name": "ray_guard"}, "logRecords": [record]}],
    }
    return json.dumps({"resourceLogs": [logs]}).encode()


class _Inbox:
    """The newest checkpoint of each log that has not been delivered."""

    def __init__(self) -> None:
        self.waiting: dict[str, bytes] = {}
        self.open = True
        self._rest = b""

    def fill(self, seconds: float | None) -> None:
        """Takes what has come, or waits for something that long."""
        while self.open and select.select([0], [], [], seconds)[0]:
            piece = os.read(0, 1 << 16)
            self.open = bool(piece)
            *lines, self._rest = (self._rest + piece).split(b"\n")
            for line in lines:
                self.waiting[json.loads(line)["key"]] = line + b"\n"
            seconds = 0


def carry(deliver: Deliver) -> bool:
    """Until standard input ends, and a little longer for what is left then. Whether all was delivered."""
    inbox = _Inbox()
    delay, failing = _BACKOFF_S[0], ""
    until = float("inf")
    while inbox.open or inbox.waiting:
        inbox.fill(None if not inbox.waiting else delay if failing else 0)
        if not inbox.open and until == float("inf"):
            until = time.monotonic() + _LAST_S
        why = ""
        for key, line in list(inbox.waiting.items()):
            try:
                deliver(line)
                del inbox.waiting[key]
            except OSError as error:  # urllib's errors are
                why = f"{type(error).__name__}: {error}"
                break
        if bool(why) != bool(failing):
            print(why, flush=True)
        delay = min(2 * delay, _BACKOFF_S[1]) if why else _BACKOFF_S[0]
        failing = why
        if why and not inbox.open:
            if time.monotonic() > until:
                return False
            time.sleep(0.2)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """0 when all was delivered, 1 when something was not, 2 for a destination that is none."""
    (spelled,) = sys.argv[1:] if argv is None else argv
    try:
        deliver = destination(spelled, os.environ)
    except CourierError as error:
        sys.stderr.write(f"ray-guard courier: {error}\n")
        return 2
    return 0 if carry(deliver) else 1


if __name__ == "__main__":
    sys.exit(main())
