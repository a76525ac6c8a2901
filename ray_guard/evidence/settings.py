"""The standard ``OTEL_*`` variables of an exporter, checked before one is made of them.

Runs in the forwarder's process. OpenTelemetry's exporters take most wrong values for none, with a warning among others,
or fail at the first export or with a traceback that names no variable. Here each is named, with what would be right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

from ray_guard.evidence.forwarder import ForwardError

_BATCH: Final = "OTEL_BSP_MAX_EXPORT_BATCH_SIZE"
_DELAY: Final = "OTEL_BSP_SCHEDULE_DELAY"
_BATCH_SPANS: Final = 512
"""Spans of one request: the exporters' own default, and what collectors take in 4 MiB."""
_BATCH_LIMIT: Final = 8192


def check(environ: Mapping[str, str], signal: str, protocol: str) -> None:
    """Looks at all that an exporter for ``signal`` (``TRACES``, ``METRICS``) will read.

    Raises:
        ForwardError: names the variable, its value (but for headers, which hold credentials) and what would be right.
    """
    _check_endpoint(*_said(environ, signal, "ENDPOINT"), protocol)
    _check_headers(*_said(environ, signal, "HEADERS"))
    _check_timeout(*_said(environ, signal, "TIMEOUT"))
    name, said = _said(environ, signal, "COMPRESSION")
    if said and said.lower() not in ("gzip", "none", *(() if protocol == "grpc" else ("deflate",))):
        raise _wrong(name, said, "gzip or none" if protocol == "grpc" else "gzip, deflate or none")
    name, said = _said(environ, signal, "INSECURE")
    if said and said.lower() not in ("true", "false"):
        raise _wrong(name, said, "true or false")
    for what in ("CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE"):
        name, said = _said(environ, signal, what)
        if said:
            try:
                with open(said, "rb") as file:
                    file.read(1)
            except OSError as error:
                raise _wrong(name, said, f"a PEM file that can be read: {error.strerror or error}") from error
    key, certificate = (_said(environ, signal, what) for what in ("CLIENT_KEY", "CLIENT_CERTIFICATE"))
    if key[1] and not certificate[1]:
        raise ForwardError(f"{key[0]} is set, but {certificate[0]} is not: set both or neither")


def batch_size(environ: Mapping[str, str]) -> int:
    """Spans sent at once, at most. Raises ForwardError."""
    said = environ.get(_BATCH, "").strip()
    if not said:
        return _BATCH_SPANS
    if not (said.isascii() and said.isdecimal() and len(said) < 9 and 1 <= int(said) <= _BATCH_LIMIT):
        raise _wrong(_BATCH, said, f"a whole number of spans, 1 to {_BATCH_LIMIT}")
    return int(said)


def delay_s(environ: Mapping[str, str], default: float) -> float:
    """Seconds between looking for what has ended meanwhile. Raises ForwardError."""
    said = environ.get(_DELAY, "").strip()
    if not said:
        return default
    milliseconds = _number(said)
    if milliseconds is None or not 1 <= milliseconds <= 3_600_000:
        raise _wrong(_DELAY, said, "a number of milliseconds, 1 to 3600000")
    return milliseconds / 1e3


def _said(environ: Mapping[str, str], signal: str, what: str) -> tuple[str, str]:
    """The variable that counts, and its value; the signal's own before the general one."""
    own, general = f"OTEL_EXPORTER_OTLP_{signal}_{what}", f"OTEL_EXPORTER_OTLP_{what}"
    name = own if environ.get(own, "").strip() else general
    return name, environ.get(name, "").strip()


def _wrong(name: str, said: str, right: str) -> ForwardError:
    return ForwardError(f"{name}={said[:200]!r} is not usable: {right}")


def _number(said: str) -> float | None:
    try:
        found = float(said)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def _check_endpoint(name: str, said: str, protocol: str) -> None:
    example = "http://collector:4317" if protocol == "grpc" else "http://collector:4318"
    try:
        parts = urlsplit(said)
        host, _ = parts.hostname, parts.port  # a port that is none raises ValueError
    except ValueError as error:
        raise _wrong(name, said, f"a URL such as {example}: {error}") from error
    if protocol == "grpc" and "://" not in said:
        if said.startswith(("dns:", "unix:")) or said.rpartition(":")[2].isdecimal():
            return  # gRPC's own way to name one
        raise _wrong(name, said, f"a URL such as {example}, or host:port")
    if parts.scheme not in ("http", "https") or not host:
        raise _wrong(name, said, f"a URL with http or https, such as {example}")


def _check_headers(name: str, said: str) -> None:
    for at, item in enumerate(said.split(",") if said else (), 1):
        key, equals, _ = item.partition("=")
        if item.strip() and not (equals and key.strip() and key.strip().isascii() and " " not in key.strip()):
            raise ForwardError(f"{name}: item {at} is no header: key=value, key=value …, values percent-encoded")


def _check_timeout(name: str, said: str) -> None:
    if said and not 0 < (_number(said) or 0.0) <= 3600:
        raise _wrong(name, said, "a number of seconds above 0, 3600 at most")
