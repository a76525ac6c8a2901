"""The arguments of OpenSSH's client, read as it reads them. Runs later. Pure."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

#: options that take a value (ssh 9.x)
_VALUED: Final = frozenset("BbcDEeFIiJLlmOoPpQRSWw")
_FLAGS: Final = frozenset("46AaCfGgKkMNnqsTtVvXxYy")


class Arguments(NamedTuple):
    """What matters of them. ``options``: letter and value, in order; ``settings``: of ``-o``, keys in lower case."""

    options: list[tuple[str, str]]
    settings: dict[str, str]
    host: str
    command: list[str]


def parse(words: list[str]) -> Arguments | None:
    """The arguments after the program's name; None where ssh itself would refuse them."""
    options: list[tuple[str, str]] = []
    settings: dict[str, str] = {}
    host = ""
    left = list(words)
    while left:
        word = left.pop(0)
        if word == "--":
            if not host and left:
                host = left.pop(0)
            break
        if not word.startswith("-") or word == "-":
            if host:
                return Arguments(options, settings, host, [word, *left])
            host = word  # options may stand behind it too
            continue
        letters = word[1:]
        while letters:
            letter, letters = letters[0], letters[1:]
            if letter in _VALUED:
                if not letters and not left:
                    return None
                value, letters = (letters, "") if letters else (left.pop(0), "")
                options.append((letter, value))
                if letter == "o":
                    key, _, said = re.sub(r"\s*=\s*|\s+", "=", value.strip(), count=1).partition("=")
                    settings[key.lower()] = said
            elif letter in _FLAGS:
                options.append((letter, ""))
            else:
                return None
    return Arguments(options, settings, host, left)


_PORT: Final = r"(?:\d{1,5}|[a-z][a-z0-9-]*)"
_FORWARD: Final = re.compile(rf"(?:\[?[\w.*:-]*\]?:)?\d{{1,5}}:(?:\[[\w:]+\]|[\w.-]+):{_PORT}|\d{{2,5}}:/\S+|/\S+:/\S+")


def tunnels_back(words: list[str]) -> str:
    """How these arguments let the far side in, or everything out: the rule's name; empty where they do not."""
    parsed = parse(words)
    if parsed is None:
        return ""
    letters = {letter for letter, _ in parsed.options}
    for letter, value in parsed.options:
        if letter == "R" and value:
            return "ssh.remote_forward"
        if letter == "w":
            return "ssh.tun_device"
        if letter == "L" and ("g" in letters or re.match(r"(?:0\.0\.0\.0|\*|\[::\]):\d", value)):
            return "ssh.open_forward"
    if parsed.settings.get("remoteforward"):
        return "ssh.remote_forward"
    if parsed.settings.get("tunnel", "no").lower() not in ("no", ""):
        return "ssh.tun_device"
    if "D" in letters or parsed.settings.get("dynamicforward"):
        return "ssh.dynamic_forward"
    if letters >= {"F", "N"} and not letters & set("LWJO"):
        return "ssh.forwards_of_a_file"  # it only forwards, and what stands in a file that was brought along
    return ""


def looks_like_remote_forward(words: list[str]) -> bool:
    """Whether these arguments, of whatever program, are ssh's, with a forward of the far side's."""
    if not any(word.startswith("-") and ("R" in word or "emote" in word) for word in words):
        return False
    parsed = parse(words)
    if parsed is None or not parsed.host:
        return False
    return any(letter == "R" and _FORWARD.fullmatch(value) for letter, value in parsed.options) or bool(
        parsed.settings.get("remoteforward")
    )
