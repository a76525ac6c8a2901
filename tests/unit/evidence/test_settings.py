"""A standard variable with a wrong value is named, with its value and what would be right; right ones pass."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ray_guard.client.identity import named_service
from ray_guard.evidence.forwarder import ForwardError
from ray_guard.evidence.settings import batch_size, check, delay_s

OTLP = "OTEL_EXPORTER_OTLP_"
GOOD = {f"{OTLP}ENDPOINT": "http://collector:4318"}


@pytest.mark.parametrize(
    ("name", "said", "protocol"),
    [
        ("ENDPOINT", "https://c.example.org/otlp", "http/protobuf"),
        ("ENDPOINT", "http://[2001:db8::1]:4318", "http/protobuf"),
        ("TRACES_ENDPOINT", "http://c:4318/v1/traces", "http/protobuf"),
        ("ENDPOINT", "c:4317", "grpc"),
        ("ENDPOINT", "unix:/run/otlp.sock", "grpc"),
        ("HEADERS", "authorization=Bearer%20abc,x-scope=1,", "http/protobuf"),
        ("HEADERS", "api-key=a=b==", "grpc"),
        ("TRACES_HEADERS", "a=", "http/protobuf"),
        ("TIMEOUT", "2.5", "http/protobuf"),
        ("COMPRESSION", "gzip", "grpc"),
        ("COMPRESSION", "deflate", "http/protobuf"),
        ("TRACES_COMPRESSION", "none", "http/protobuf"),
        ("INSECURE", "True", "grpc"),
        ("CERTIFICATE", " ", "grpc"),
    ],
)
def test_right_values_pass(name: str, said: str, protocol: str) -> None:
    check({**GOOD, f"{OTLP}{name}": said}, "TRACES", protocol)


@pytest.mark.parametrize(
    ("name", "said", "protocol", "remedy"),
    [
        ("ENDPOINT", "collector:4318", "http/protobuf", "a URL with http or https, such as http://collector:4318"),
        ("ENDPOINT", "ftp://collector", "http/protobuf", "a URL with http or https"),
        ("ENDPOINT", "http://", "http/protobuf", "a URL with http or https"),
        ("ENDPOINT", "http://c:99999", "http/protobuf", "Port out of range"),
        ("ENDPOINT", "http://[::1", "http/protobuf", "Invalid IPv6"),
        ("TRACES_ENDPOINT", "collector", "grpc", "or host:port"),
        ("TIMEOUT", "soon", "http/protobuf", "a number of seconds above 0"),
        ("TIMEOUT", "nan", "http/protobuf", "a number of seconds above 0"),
        ("TRACES_TIMEOUT", "0", "grpc", "a number of seconds above 0"),
        ("TIMEOUT", "-1", "grpc", "a number of seconds above 0"),
        ("COMPRESSION", "brotli", "http/protobuf", "gzip, deflate or none"),
        ("COMPRESSION", "deflate", "grpc", "gzip or none"),
        ("INSECURE", "1", "grpc", "true or false"),
        ("CERTIFICATE", "/nowhere/ca.pem", "http/protobuf", "a PEM file that can be read: No such file"),
        ("TRACES_CLIENT_CERTIFICATE", "/", "grpc", "a PEM file that can be read: Is a directory"),
    ],
)
def test_wrong_ones_are_named_with_value_and_remedy(name: str, said: str, protocol: str, remedy: str) -> None:
    with pytest.raises(ForwardError) as caught:
        check({**GOOD, f"{OTLP}{name}": said}, "TRACES", protocol)
    assert str(caught.value).startswith(f"{OTLP}{name}={said!r} is not usable: ")
    assert remedy in str(caught.value)


@pytest.mark.parametrize("said", ["secret", "a=1,secret", "=secret", "a b=secret", "é=secret"])
def test_headers_are_not_repeated_for_they_hold_credentials(said: str) -> None:
    with pytest.raises(ForwardError, match="is no header: key=value") as caught:
        check({**GOOD, f"{OTLP}HEADERS": said}, "METRICS", "grpc")
    assert "secret" not in str(caught.value)


def test_a_key_without_its_certificate(tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_text("x")
    with pytest.raises(ForwardError, match="CLIENT_CERTIFICATE is not: set both or neither"):
        check({**GOOD, f"{OTLP}CLIENT_KEY": str(key)}, "TRACES", "grpc")


@pytest.mark.skipif(os.getuid() == 0, reason="who is root reads everything")
def test_a_certificate_that_may_not_be_read(tmp_path: Path) -> None:
    closed = tmp_path / "ca.pem"
    closed.touch(mode=0)
    with pytest.raises(ForwardError, match="Permission denied"):
        check({**GOOD, f"{OTLP}CERTIFICATE": str(closed)}, "TRACES", "grpc")


def test_a_signals_own_variable_counts_before_the_general_one() -> None:
    check({**GOOD, f"{OTLP}TIMEOUT": "wrong", f"{OTLP}TRACES_TIMEOUT": "3"}, "TRACES", "grpc")
    with pytest.raises(ForwardError, match="OTEL_EXPORTER_OTLP_TIMEOUT='wrong'"):
        check({**GOOD, f"{OTLP}TIMEOUT": "wrong", f"{OTLP}TRACES_TIMEOUT": "3"}, "METRICS", "grpc")


def test_batches_and_delay() -> None:
    assert batch_size({}) == 512
    assert batch_size({"OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "64"}) == 64
    assert delay_s({}, 0.5) == 0.5
    assert delay_s({"OTEL_BSP_SCHEDULE_DELAY": "2500"}, 0.5) == 2.5
    for wrong in ("0", "-1", "many", "1.5", "9999", "9" * 5000):
        with pytest.raises(ForwardError, match="OTEL_BSP_MAX_EXPORT_BATCH_SIZE"):
            batch_size({"OTEL_BSP_MAX_EXPORT_BATCH_SIZE": wrong})
    for wrong in ("0", "-1", "soon", "inf"):
        with pytest.raises(ForwardError, match="OTEL_BSP_SCHEDULE_DELAY"):
            delay_s({"OTEL_BSP_SCHEDULE_DELAY": wrong}, 0.5)


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, "default"),
        ({"OTEL_SERVICE_NAME": "trainer"}, "trainer"),
        ({"OTEL_SERVICE_NAME": " ", "OTEL_RESOURCE_ATTRIBUTES": "a=b, service.name = my%20job ,c=d"}, "my job"),
        ({"OTEL_SERVICE_NAME": "wins", "OTEL_RESOURCE_ATTRIBUTES": "service.name=other"}, "wins"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "nonsense,service.name"}, "default"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=%ff%zz"}, "\ufffd%zz"),
    ],
)
def test_the_services_name(variables: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES"):
        monkeypatch.delenv(each, raising=False)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    assert named_service("default") == name
