"""Policy files that are broken, missing or not what they seem: a clear PolicyError each."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_guard.errors import PolicyError
from ray_guard.policy.load import read_policy
from ray_guard.policy.model import Policy


def write(folder: Path, content: str | bytes, name: str = "policy.yaml") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        'egress: {allow: ["10.0.0.1:80"]}',
        '{"egress": {"allow": ["10.0.0.1:80"]}}',
        '{\n\t"egress": {\n\t\t"allow": ["10.0.0.1:80"]\n\t}\n}',  # JSON may hold tabs, YAML may not
        '# a comment\negress:\n  allow:\n    - "10.0.0.1:80"\n',
        "{egress: {allow: ['10.0.0.1:80']}}",  # looks like JSON and is YAML
        '\ufeffegress: {allow: ["10.0.0.1:80"]}',
        '---\negress: {allow: ["10.0.0.1:80"]}\n...\n',
    ],
)
@pytest.mark.parametrize("name", ["policy.yaml", "policy.json", "policy"])
def test_yaml_and_json_whatever_the_name(tmp_path: Path, content: str, name: str) -> None:
    assert Policy.load(write(tmp_path, content, name)).egress.allow == ("10.0.0.1:80",)


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        ("", "empty"),
        ("# only a comment\n", "empty"),
        ("null", "empty"),
        ("[]", "a list, not a mapping"),
        ("[1, 2]", "a list, not a mapping"),
        ("mode", "a str, not a mapping"),
        ("5", "a int, not a mapping"),
        (b"\xff\xfe\x00", r"not UTF-8 \(byte 0\)"),
        ("mode: enforce".encode("utf-16"), "not UTF-8"),
        (b"mode: enf\xffrce", r"not UTF-8 \(byte 9\)"),
        ("mode: [", r"neither YAML nor JSON: .*line 1"),
        ("mode: enforce\n  role: env", "line 2"),
        ("mode: \x00", "neither YAML nor JSON"),
        ("a: 1\n---\nb: 2", "neither YAML nor JSON"),
        ('{"mode": "enforce",}garbage', "neither YAML nor JSON"),
        ("mode: enforce\nmode: report", r"'mode' is given twice.*line 2"),
        ('{"mode": "enforce", "mode": "report"}', "'mode' is given twice"),
        ('{"egress": {"allow": [], "allow": ["cluster"]}}', "'allow' is given twice"),
        ("egress:\n  allow: []\n  allow: [cluster]", "'allow' is given twice"),
        ("egress: &e {allow: []}\nfiles: *e", "aliases are not read"),
        ("a: &a [*a]", "aliases are not read"),
        ("mode: !!python/object/apply:os.system [id]", "neither YAML nor JSON"),
        ("? [a]\n: b", "neither YAML nor JSON"),
        ("mode: 2026-99-99", "cannot be read"),
        ("mode: " + "9" * 5000, "cannot be read"),
        ('{"mode": ' + "9" * 5000 + "}", "cannot be read"),
        ('{"budgets": {"call": {"egress_bytes": Infinity}}}', "Infinity is no limit"),
        ("[" * 5000, "nested too deeply"),
        ('{"a":' * 5000, "nested too deeply"),
        ("mode: enforce\n" + "#" * (1 << 20), "larger than 1 MiB"),
    ],
)
def test_content_that_is_no_policy(tmp_path: Path, content: str | bytes, remedy: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(PolicyError, match=remedy) as caught:
        Policy.load(path)
    assert (caught.value.key, caught.value.value) == ("policy", str(path))


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for path, remedy in [
        (tmp_path / "missing.yaml", "no such file"),
        (tmp_path, "a folder"),
        (tmp_path / "loop", "cannot be read: Too many levels"),
        (Path("/proc/self/mem"), "cannot be read: Input/output error"),
        (Path("/dev/zero"), "larger than 1 MiB"),
        (Path("/dev/null"), "empty"),
        (Path("a\0b"), "cannot be read"),
    ]:
        with pytest.raises(PolicyError, match=remedy) as caught:
            Policy.load(path)
        assert caught.value.key == "policy"


def test_a_fault_within_the_file_names_the_key_and_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "egress:\n  allow: ['10.0.0.1:80', '127.1:80']\n")
    with pytest.raises(PolicyError) as caught:
        Policy.load(path)
    assert (caught.value.key, caught.value.value) == ("egress.allow[1]", "127.1:80")
    assert str(caught.value).endswith(f"(in {path})")


@pytest.mark.parametrize("entry", ["[2001:db8::/32]:443", "*.example.org:443", "[2001:db8::1]", "cluster: x"])
def test_an_unquoted_destination_says_put_it_in_quotes(tmp_path: Path, entry: str) -> None:
    """YAML reads brackets as a list and a star as an alias, and this is what people write first."""
    with pytest.raises(PolicyError, match="in quotes"):
        Policy.load(write(tmp_path, f"egress:\n  allow:\n    - {entry}\n"))


@given(st.one_of(st.text(), st.binary(), st.text(alphabet="{}[]:,-\"'&*!? \n\tab1")))
def test_no_content_raises_anything_but_a_policy_error(
    tmp_path_factory: pytest.TempPathFactory, content: str | bytes
) -> None:
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    path = write(tmp_path_factory.getbasetemp(), data, "any.yaml")
    try:
        assert isinstance(read_policy(path), dict)
    except PolicyError as error:
        assert error.key == "policy"  # noqa: PT017 - most contents are policies' faults, some are mappings
