"""A command line as the programs that it starts. Runs later. Pure.

Not a shell: quotes, pipelines, lists, substitutions, wrappers (``sudo``, ``nohup``, ``bash -c`` …) and the usual ways
to hide a text (base64, hex, ``printf``) are taken apart, so that rules look at programs and arguments and not at
spelling. What cannot be taken apart is kept as text.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

DEPTH: Final = 6
"""Commands within commands; deeper ones are not looked at."""
LONGEST: Final = 1 << 16
"""Characters of a command line; what is behind them is not looked at."""
_TEXTS: Final = 32
_NAMES: Final = 64

_SHELLS: Final = frozenset("sh bash dash zsh ksh ash fish busybox".split())
#: programs that run another one, with the letters of their options that take a value
_WRAPPERS: Final = {
    word.partition(":")[0]: word.partition(":")[2]
    for word in (
        "sudo:ugpCchrtT doas:uC env:uCS nohup setsid nice:n ionice:cnpP timeout:ks stdbuf:ioe time:fo command "
        "exec:a builtin xargs:IinLlPsdEa strace:eopsSuEaXO unbuffer torsocks proxychains:f proxychains4:f chroot "
        "systemd-run:pM screen:Sc tmux watch:n script:c busybox taskset:c flock:wE then do else if while until ! & {"
    ).split()
}
_ASSIGNMENT: Final = re.compile(r"[A-Za-z_]\w*\+?=")
_BASE64: Final = re.compile(r"[A-Za-z0-9+/]{16,}={0,2}")
_HEX: Final = re.compile(r"(?:\\x[0-9a-fA-F]{2}){4,}")
_BARE_HEX: Final = re.compile(r"\b(?:[0-9a-fA-F]{2}){8,}\b")
_OCTAL: Final = re.compile(r"(?:\\0?[0-3][0-7]{2}){4,}")
_ROT13: Final = re.compile(r"\btr\b[^|;]{0,40}(?:A-Za-z|a-zA-Z)\W+\w?(?:N-ZA-M|n-za-m)|rot_?13", re.IGNORECASE)
_VARIABLE: Final = re.compile(r"(?:^|[\s;&(])([A-Za-z_]\w*)=(?:'([^'$]*)'|\"([^\"$]*)\"|([\w./:@+-]+))(?=[\s;&])")


@dataclass(slots=True)
class Command:
    """One program with its arguments.

    Args:
        name: the program's name without folder.
        arguments: the others, unquoted.
        piped_from: the command whose output it reads, in a pipeline.
    """

    name: str
    arguments: list[str]
    piped_from: Command | None = None
    redirects: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return " ".join([self.name, *self.arguments])


def commands(text: str, depth: int = 0) -> Iterator[Command]:
    """The programs that a command line starts, those within it (``-c``, ``$(…)``, decoded texts) after it."""
    if depth > DEPTH:
        return
    before: Command | None = None
    for words, piped in _split(text[:LONGEST]):
        found = _program(words)
        if found is None:
            before = None if not piped else before
            continue
        found.piped_from = before if piped else None
        before = found
        yield found
        for inner in _within(found):
            yield from commands(inner, depth + 1)


def unhidden(text: str) -> Iterator[str]:
    """The text, and what it becomes: decoded (base64, escapes, hex, rot13), reversed, variables in their places.

    Whatever turns out to be text, also of what was decoded; as many as :data:`_TEXTS` of them.
    """
    found = [text]
    for at in range(_TEXTS):
        if at == len(found):
            return
        yield found[at]
        found += [each for each in itertools.islice(_becomes(found[at]), _TEXTS) if each not in found]


def _becomes(text: str) -> Iterator[str]:
    filled = _filled(text)
    if filled != text:
        yield filled
    if re.search(r"\|\s*rev\b", text):
        yield text[::-1]
    if _ROT13.search(text):
        yield codecs.encode(text, "rot13")
    if _HEX.search(text):
        yield _HEX.sub(lambda found: _characters(found[0], 16), text)
    if _OCTAL.search(text):
        yield _OCTAL.sub(lambda found: _characters(found[0], 8), text)
    for word in _BASE64.findall(text):
        decoded = _decoded(word)
        if decoded is not None:
            yield decoded
    for word in _BARE_HEX.findall(text):
        plain = bytes.fromhex(word)
        if _readable(plain):
            yield plain.decode()


def _characters(escapes: str, base: int) -> str:
    whole = "".join(chr(int(each, base) & 0xFF) for each in re.findall(r"\\x?([0-9a-fA-F]+)", escapes))
    return whole if base == 16 or whole.isprintable() else escapes


def _filled(text: str) -> str:
    """The text with the plain values of its own assignments in the places of the variables."""
    assigned = itertools.islice(_VARIABLE.finditer(text), _NAMES)
    values = {found[1]: found[2] or found[3] or found[4] or "" for found in assigned}
    if not values:
        return text
    names = "|".join(sorted(map(re.escape, values), key=len, reverse=True))
    return re.sub(rf"\$(?:\{{({names})\}}|({names})\b)", lambda found: values[found[1] or found[2]], text)


def _decoded(found: str) -> str | None:
    try:
        plain = base64.b64decode(found + "=" * (-len(found) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None
    return plain.decode() if _readable(plain) else None


def _readable(plain: bytes) -> bool:
    """Whether bytes are text, and not by chance: any run of letters decodes to something."""
    try:
        text = plain.decode("ascii")
    except UnicodeDecodeError:
        return False
    if len(text) < 8 or not all(char.isprintable() or char in "\n\t\r" for char in text):
        return False
    return " " in text or _BASE64.fullmatch(text.strip()) is not None  # encoded twice


def _split(text: str) -> list[tuple[list[str], bool]]:
    """Simple commands as (words, whether the one before is piped into it); quotes are taken off, substitutions kept."""
    return _Splitter(text).found


class _Splitter:
    def __init__(self, text: str) -> None:
        self.found: list[tuple[list[str], bool]] = []
        self._text = text
        self._at = 0
        self._words: list[str] = []
        self._word: list[str] = []
        self._begun = self._piped = False
        self._quote = ""
        while self._at < len(text):
            if self._quote:
                self._quoted(text[self._at])
            else:
                self._plain(text[self._at])
            self._at += 1
        self._end_command(into_next=False)

    def _add(self, part: str) -> None:
        self._word.append(part)
        self._begun = True

    def _quoted(self, char: str) -> None:
        if char == self._quote:
            self._quote = ""
        elif char == "\\" and self._quote == '"' and self._text[self._at + 1 : self._at + 2] in ('"', "\\", "$", "`"):
            self._at += 1
            self._add(self._text[self._at])
        else:
            self._add(char)

    def _plain(self, char: str) -> None:
        if char in "'\"":
            self._quote, self._begun = char, True
            if self._word and self._word[-1] == "$":  # $'…'
                self._word.pop()
        elif char == "\\" and self._at + 1 < len(self._text):
            self._at += 1
            if self._text[self._at] != "\n":
                self._add(self._text[self._at])
        elif char == "`" or self._text.startswith("$(", self._at):
            end = _closing(self._text, self._at)
            self._add(self._text[self._at : end])
            self._at = end - 1
        elif char in " \t\r":
            self._end_word()
        elif char == "#" and not self._begun:
            end = self._text.find("\n", self._at)
            self._at = (end if end >= 0 else len(self._text)) - 1
        elif char in "\n;&|()":
            self._separator(char)
        else:
            self._add(char)

    def _separator(self, char: str) -> None:
        following = self._text[self._at + 1 : self._at + 2]
        # `>&` and `&>` are redirections.
        if char == "&" and ((self._word and self._word[-1] == ">") or following == ">"):
            self._add(char)
            return
        self._end_command(into_next=char == "|" and following != char)
        self._at += following == char

    def _end_word(self) -> None:
        if self._begun:
            self._words.append("".join(self._word))
        self._word.clear()
        self._begun = False

    def _end_command(self, *, into_next: bool) -> None:
        self._end_word()
        if self._words:
            self.found.append((self._words, self._piped))
            self._words = []
        self._piped = into_next


def _closing(text: str, at: int) -> int:
    """The end of a substitution that begins here."""
    if text[at] == "`":
        end = text.find("`", at + 1)
        return end + 1 if end > 0 else len(text)
    depth = 0
    for position in range(at + 1, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position + 1
    return len(text)


def _program(words: list[str]) -> Command | None:
    """The program proper, behind assignments, wrappers and redirections."""
    left = list(words)
    redirects: list[str] = []
    for position in range(len(left) - 1, -1, -1):
        if re.fullmatch(r"\d*(?:>>?|<|<>|&>|>&)\S*|<<<?", left[position]):
            taken = left.pop(position)
            if re.fullmatch(r"\d*(?:>>?|<|<>|&>|<<<?)", taken) and position < len(left):
                taken += left.pop(position)
            redirects.append(taken)
    for _ in range(DEPTH):
        while left and _ASSIGNMENT.match(left[0]):
            left.pop(0)
        if not left:
            return None
        name = left[0].rpartition("/")[2]
        if name not in _WRAPPERS or len(left) == 1:
            return Command(name, left[1:], redirects=redirects)
        rest = left[1:]
        while rest and (rest[0].startswith("-") or (name == "timeout" and re.fullmatch(r"[\d.]+[smhd]?", rest[0]))):
            option = rest.pop(0)
            takes = len(option) == 2 and option[1] in _WRAPPERS[name] and option[0] == "-" and rest
            if takes:
                rest.pop(0)
        if name in ("taskset", "chroot", "flock", "tmux", "screen") and len(rest) > 1:
            rest.pop(0)
        if not rest:
            return Command(name, left[1:], redirects=redirects)
        left = rest
    return Command(left[0], left[1:], redirects=redirects)


def _within(command: Command) -> Iterator[str]:
    """Texts that the command has run: a shell's ``-c``, what is substituted, what is decoded into a shell."""
    if command.name in _SHELLS or command.name in ("su", "eval", "ssh", "watch", "script", "parallel"):
        yield from _given_to_shell(command)
    if command.name in ("python", "python3", "perl", "ruby", "node", "php"):
        for option, code in pairwise(command.arguments):
            if option in ("-c", "-e", "-r"):
                yield from (" ".join(_STRING.findall(found)) for found in _CODE_RUNS.findall(code))
    for argument in [*command.arguments, *command.redirects]:
        closed = argument[: max(argument.rfind(")"), argument.rfind("`")) + 1]  # else every opening looks for an end
        for inner in re.findall(r"\$\((.+)\)|`([^`]+)`|[<>]\((.+)\)", closed, re.DOTALL):
            yield next(each for each in inner if each)


def _given_to_shell(command: Command) -> Iterator[str]:
    for option, text in pairwise(command.arguments):
        if option.startswith("-") and option.endswith("c") and not option.startswith("--"):
            yield text
    if command.name == "eval":
        yield " ".join(command.arguments)
    yield from (each[3:] for each in command.redirects if each.startswith("<<<"))
    source = command.piped_from
    if source is not None and source.name in ("echo", "printf"):
        yield " ".join(source.arguments).replace("\\n", "\n")
    # `echo … | base64 -d | sh`: whatever was said on the way may be what is run.
    said = list(command.redirects)
    while source is not None:
        said += source.arguments
        source = source.piped_from
    whole = " ".join(said)
    yield from (text for text in unhidden(whole) if text != whole)


_CODE_RUNS: Final = re.compile(
    r"(?:system|popen|run|call|Popen|check_output|spawn|spawnSync|execSync|execFile|exec)\(\s*[\[(]?\s*"
    r"((?:(?:'[^']+'|\"[^\"]+\")[\s,\[]*)+)"
)
_STRING: Final = re.compile(r"(?<=')[^',\s][^']*(?=')|(?<=\")[^\",\s][^\"]*(?=\")")
