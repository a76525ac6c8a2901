"""Sigma rules, other people's, judged over command lines. Runs later, and in the judge.

pySigma reads the rules and their conditions; what a condition says of a field is judged here, over the events that a
command line makes: each program that it starts, and the line itself as its shell's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from sigma.collection import SigmaCollection
from sigma.conditions import (
    ConditionAND,
    ConditionFieldEqualsValueExpression,
    ConditionNOT,
    ConditionOR,
    ConditionValueExpression,
)
from sigma.exceptions import SigmaError
from sigma.rule import SigmaRule
from sigma.types import SigmaBool, SigmaExists, SigmaNull, SigmaNumber, SigmaRegularExpression, SigmaString

from ray_guard.detect import Kind
from ray_guard.detect.shell import commands
from ray_guard.errors import BadPath

Event = Mapping[str, str]

#: ATT&CK techniques, and words of a rule's title, as one of our kinds; the first that fits
_TECHNIQUES: Final = {
    "t1496": Kind.MINING,
    "t1572": Kind.REVERSE_TUNNEL,
    "t1090": Kind.REVERSE_TUNNEL,
    "t1046": Kind.PROBING,
    "t1018": Kind.PROBING,
    "t1595": Kind.PROBING,
    "t1552.005": Kind.METADATA,
    "t1071.004": Kind.DNS_TUNNEL,
    "t1048": Kind.EXFILTRATION,
    "t1041": Kind.EXFILTRATION,
    "t1567": Kind.EXFILTRATION,
}
_TITLES: Final = (
    (re.compile(r"(?i)miner|mining|stratum|xmrig"), Kind.MINING),
    (re.compile(r"(?i)reverse.?shell|bind.?shell|/dev/tcp"), Kind.REVERSE_SHELL),
    (re.compile(r"(?i)tunnel|port.?forward|proxy"), Kind.REVERSE_TUNNEL),
    (re.compile(r"(?i)metadata"), Kind.METADATA),
    (re.compile(r"(?i)scan|discovery|enumerat"), Kind.PROBING),
    (re.compile(r"(?i)exfil|upload"), Kind.EXFILTRATION),
)


class BadRule(BadPath):
    """A rule that cannot be used."""


class Rule:
    """One rule. ``kind`` None: of none of our kinds."""

    def __init__(self, rule: SigmaRule, path: str) -> None:
        self.name = f"sigma.{rule.id or rule.title}"
        self.kind = _kind(rule)
        try:
            self._conditions = [condition.parsed for condition in rule.detection.parsed_condition]
        except SigmaError as error:
            raise BadRule(path, str(error)) from error

    def matches(self, event: Event) -> bool:
        return any(_holds(condition, event) for condition in self._conditions)


def digest(path: Path) -> str:
    """Of all that :func:`load` would read there.

    Raises:
        BadRule: a file cannot be read.
    """
    found = hashlib.sha256()
    for each in _files(path):
        try:
            text = each.read_bytes()
        except OSError as error:
            raise BadRule(str(each), f"cannot be read: {error.strerror}") from error
        found.update(f"{each.name} {len(text)}\n".encode(errors="surrogateescape") + text)
    return found.hexdigest()


def _files(path: Path) -> list[Path]:
    return sorted(each for each in path.rglob("*.y*ml") if each.is_file()) if path.is_dir() else [path]


def load(paths: Iterable[Path]) -> list[Rule]:
    """The rules in files and folders (``*.yml``, ``*.yaml``) about processes of Linux.

    Raises:
        BadRule: a file cannot be read, or holds a rule that cannot be used.
    """
    rules: list[Rule] = []
    for given in paths:
        before = len(rules)
        files = _files(given)
        if not files:
            raise BadRule(str(given), "a folder without *.yml; name a rule, or a folder that holds some")
        for path in files:
            try:
                found = SigmaCollection.from_yaml(path.read_text(encoding="utf-8"))
            except OSError as error:
                raise BadRule(str(path), f"cannot be read: {error.strerror}") from error
            except (AttributeError, TypeError) as error:  # pySigma's, of YAML that is no mapping
                told = "it must be a YAML mapping with title, logsource and detection"
                raise BadRule(str(path), f"no Sigma rule: {told}") from error
            except Exception as error:
                raise BadRule(str(path), f"no Sigma rule: {error}") from error
            for rule in found.rules:
                if isinstance(rule, SigmaRule) and _of_processes(rule):
                    rules.append(Rule(rule, str(path)))
        if len(rules) == before:
            raise BadRule(str(given), "no rule about processes of Linux; others cannot be judged here")
    return rules


def _of_processes(rule: SigmaRule) -> bool:
    about = rule.logsource
    return about.category in (None, "process_creation") and about.product in (None, "linux")


def events(text: str) -> Iterator[Event]:
    """What a sensor of processes would tell of a command line."""
    yield {"Image": "/bin/bash", "CommandLine": text, "ParentImage": "/bin/bash", "OriginalFileName": "bash"}
    for command in commands(text):
        image = command.name if "/" in command.name else f"/usr/bin/{command.name}"
        yield {"Image": image, "CommandLine": command.text, "ParentImage": "/bin/bash", "ParentCommandLine": text}


def _holds(node: Any, event: Event) -> bool:
    if isinstance(node, ConditionOR):
        return any(_holds(each, event) for each in node.args)
    if isinstance(node, ConditionAND):
        return all(_holds(each, event) for each in node.args)
    if isinstance(node, ConditionNOT):
        return not _holds(node.args[0], event)
    if isinstance(node, ConditionFieldEqualsValueExpression):
        return _equals(node.value, event.get(node.field))
    if isinstance(node, ConditionValueExpression):
        return any(_contains(node.value, value) for value in event.values())
    return False  # of a kind that nobody here understands: it does not hold


def _equals(wanted: Any, found: str | None) -> bool:
    if isinstance(wanted, SigmaNull):
        return found is None
    if isinstance(wanted, SigmaExists):
        return bool(wanted) is (found is not None)
    if found is None:
        return False
    if isinstance(wanted, SigmaString):
        return re.fullmatch(_glob(wanted), found, re.IGNORECASE | re.DOTALL) is not None
    if isinstance(wanted, SigmaRegularExpression):
        return re.search(str(wanted.regexp), found, re.DOTALL) is not None
    if isinstance(wanted, SigmaNumber | SigmaBool):
        return found.lower() == str(wanted).lower()
    return False


def _contains(wanted: Any, found: str) -> bool:
    if isinstance(wanted, SigmaString):
        return re.search(_glob(wanted), found, re.IGNORECASE | re.DOTALL) is not None
    return _equals(wanted, found)


def _glob(wanted: SigmaString) -> str:
    """A Sigma string as an expression: its wildcards are no text."""
    return "".join(
        re.escape(part) if isinstance(part, str) else (".*" if part.name == "WILDCARD_MULTI" else ".")
        for part in wanted.s
    )


def _kind(rule: SigmaRule) -> Kind | None:
    for tag in rule.tags:
        for technique, kind in _TECHNIQUES.items():
            if tag.name.lower() == technique or tag.name.lower().startswith(f"{technique}."):
                return kind
    return next((kind for pattern, kind in _TITLES if pattern.search(rule.title or "")), None)
