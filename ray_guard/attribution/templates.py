"""A command with what varies taken out, so that its repetitions count as one pattern. Runs later. Pure.

Hosts, addresses, ports, paths, ids and numbers are replaced, secrets taken out; programs and options stay. Only the
first characters of a text are looked at, so that no command takes long.
"""

from __future__ import annotations

import json
import re
from ipaddress import ip_address
from typing import Any, Final

from ray_guard.evidence.redact import redact

_READ: Final = 4_000
"""Characters of arguments in which the command is looked for."""
_SHAPED: Final = 400
_SHOWN: Final = 160

_KEY: Final = re.compile(
    r'"(?:command|cmd|commands|code|script|source|python|bash|shell|action_input|arguments|input|query|argv|args?)"\s*:\s*(?=["\[])'
)
_SHELL: Final = re.compile(r"\s*(?:[\w./-]*/)?(?:ba|z|da|a)?sh\s+-[a-z]*c\s+")
_DECODER: Final = json.JSONDecoder()
_TLD: Final = (
    "com|net|org|edu|gov|mil|int|io|ai|dev|app|cloud|xyz|info|biz|top|club|site|online|tech|store|live|us|uk|de|fr|nl|"
    "eu|cn|jp|ru|br|au|ca|ch|at|se|pl|kr|hk|tw|sg|id|example|invalid|test|internal|intranet|local|localdomain|lan|corp|"
    "home|svc|onion|arpa"
)
_FILE: Final = r"[\w.@%+,=-]+"


def _address(found: re.Match[str]) -> str:
    try:
        ip_address(found[0].strip("[]"))
    except ValueError:
        return found[0]
    return "<ip>"


def _number(found: re.Match[str]) -> str:
    return found[0] if found["name"] else "<n>"


#: (what has to be there for the pattern to match at all, pattern, word): most texts lack most of these
_RULES: Final = (
    ("mysql", re.compile(r"(\bmysql\w*\s(?:[^|;&]*?\s)?-p)[^\s-]\S*"), r"\1<secret>"),
    ("://", re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s'\"<>|;)\\]+", re.IGNORECASE), "<url>"),
    ("@", re.compile(r"[\w.+-]+@[A-Za-z\d][\w.-]*"), "<user>@<host>"),
    (
        ".",
        re.compile(
            r"(?<![\w.@/-])(?:\d{1,3}(?:\.\d{1,3}){3}(?![\w.])|(?:[\w-]+\.)+(?:"
            + _TLD
            + r")(?![\w-]|\.\w))(?::\d+)?/[^\s'\"<>|;)\\]*",
            re.IGNORECASE,
        ),
        "<url>",
    ),
    (".", re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.])"), "<ip>"),
    (":", re.compile(r"(?<![\w:.])\[?(?:[0-9a-f]{0,4}:){2,7}(?:[0-9a-f]{1,4}\]?)?(?![\w:])", re.IGNORECASE), _address),
    (
        ".",
        re.compile(r"(?<![\w.@/-])(?:[\w-]+\.)+(?:" + _TLD + r")(?![\w(-]|\.\w)", re.IGNORECASE),
        "<host>",
    ),
    # Which program it is matters, not where it lies.
    ("/", re.compile(rf"(?:(?<=^)|(?<=[;|&(]\s)|(?<=[;|&(]))(?:~|\.{{1,2}})?(?:/{_FILE})*/([\w.+-]+)(?=\s|$)"), r"\1"),
    (
        "/",
        re.compile(
            rf"(?<![\w.<>/])(?:(?:~|\.{{1,2}})?(?:/{_FILE})+/?|[\w.-]+(?:/{_FILE}){{2,}}/?|[\w.-]+/{_FILE}\.\w+)"
        ),
        "<path>",
    ),
    (
        "",
        re.compile(
            r"\b[0-9a-f]{8}-[0-9a-f-]{27}\b|\b[0-9a-f]{12,}\b|\b(?=\d*[a-f])(?=[a-f]*\d)[0-9a-f]{7,}\b"
            r"|(?<![A-Za-z0-9])(?=[A-Za-z]*\d)(?=\d*[A-Za-z])[A-Za-z0-9]{20,}(?![A-Za-z0-9])",
            re.IGNORECASE,
        ),
        "<id>",
    ),
    ("", re.compile(r"\"[^\"]{24,}\"|'[^']{24,}'"), "<text>"),
    (
        "",
        re.compile(
            r"\b(?P<name>s3(?:api)?|[a-z]*python3?|pip3|base64|base32|md5sum|sha\d+sum|b64\w+|k8s|x86_64|utf8|aria2c|"
            r"nc6|ipv[46]|http2)\b|\d+(?:\.\d+)*(?:e[+-]?\d+)?"
        ),
        _number,
    ),
)


#: (RE2's pattern, what stands for an id, an address or a number and is taken for one again)
_ALIKE: Final = (
    (r"\b[0-9a-f]{8}-[0-9a-f-]{27}\b|\b[0-9a-f]{12,}\b", "a1b2c3d4e5f6"),
    (r"[a-z]{2,8}://[^\s\x27\x22<>|;)\\]+", "http://a"),
    (r"(^|[^0-9A-Fa-f])\d{4,}\b", r"\17777"),
    (r"\b\d{1,3}\b", "7"),
)


def alike(column: str) -> str:
    """SQL for what most repetitions in a column of texts have in common: it costs a twentieth of a template, so that
    few texts are left to look at in full."""
    made = f"left({column}, {_READ})"
    for pattern, words in _ALIKE:
        made = f"regexp_replace({made}, '{pattern}', '{words}', 'g')"
    return made


def template(text: str) -> str:
    """The pattern of a command line, or of a tool's arguments as JSON; empty where there is nothing."""
    shortened = redact(_command(text[:_READ])[: 2 * _SHAPED])[:_SHAPED]
    for needed, pattern, word in _RULES:
        if needed in shortened:
            shortened = pattern.sub(word, shortened)
    return " ".join(shortened.split())[:_SHOWN]


def _command(text: str) -> str:
    """The command within ``{"command": "…"}``, which is what most tools' arguments look like."""
    if text[:1] == "{":
        text = _within(text)
    shell = _SHELL.match(text)
    if shell is None:
        return text
    within = text[shell.end() :].strip()
    return within[1:].removesuffix(within[0]) if within[:1] in ("'", '"') else within


def _within(text: str) -> str:
    found = _KEY.search(text)
    if found is None:
        return _words(_decoded(text, 0, text))
    value = _decoded(text, found.end(), text[found.end() :].strip('"[]}'))
    if isinstance(value, str) and value[:1] == "{":  # arguments as text within arguments
        return _within(value)
    return _words(value)


def _decoded(text: str, at: int, otherwise: str) -> Any:
    try:
        return _DECODER.raw_decode(text, at)[0]
    except (ValueError, RecursionError):  # cut off, or none
        return otherwise.replace("\\n", "\n").replace('\\"', '"')


def _words(value: Any) -> str:
    """Text as it is, a list as a command line, other arguments by their names."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, dict):
        return " ".join(f"{name}={_quoted(each)}" for name, each in value.items())
    return str(value)


def _quoted(value: Any) -> str:
    said = value if isinstance(value, str) else json.dumps(value)
    return f"'{said}'" if len(said.split()) > 1 else said
