"""YAML that is plain at first sight, read without PyYAML, which takes longer to load than a tool to start.

Runs wherever a policy file is read. Policies are mostly a page of short words: mappings by indentation, lists, one-line
``[…]`` and ``{…}``, quoted texts without escapes, whole numbers, true and false. What is anything else, or could be, is
not read here: :mod:`ray_guard.policy.strict_yaml` does, and says what is wrong. That both read the same is a property
test's business.
"""

from __future__ import annotations

from typing import Any, Final, NoReturn

_DEEPEST: Final = 8
_SEPARATE: Final = frozenset({"", " "})
"""What may follow the colon of a key; nothing: the end of the line."""
_LETTERS: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
_DIGITS: Final = frozenset("0123456789")
_IN_KEYS: Final = _LETTERS | {"_"}
_IN_WORDS: Final = _LETTERS | _DIGITS | frozenset("_./~-")
_MEANING_SOMETHING: Final = frozenset({"true", "false", "yes", "no", "on", "off", "null"})
_UNITS: Final = frozenset({"", "KiB", "MiB", "GiB", "TiB", "kB", "MB", "GB", "TB"})
_MOST_DIGITS: Final = 18


class _NotPlainError(Exception):
    """Carries nothing: what it is, or what is wrong with it, is the real parser's to say."""


def read(text: str) -> dict[str, Any] | None:
    """The mapping that ``text`` holds; None: it is not plain."""
    if not text.isascii() or not text.replace("\n", "").isprintable():
        return None
    lines = [(len(line) - len(line.lstrip(" ")), line) for line in text.split("\n")]
    reader = _Reader([(indent, line) for indent, line in lines if line[indent:] and line[indent] != "#"])
    try:
        return reader.mapping(0)
    except _NotPlainError:
        return None


class _Reader:
    """Reads lines, each with how far it is indented; none is empty."""

    def __init__(self, lines: list[tuple[int, str]]) -> None:
        self._lines = lines
        self._at = 0

    def mapping(self, indent: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while (line := self._line_of(indent)) is not None:
            key, at = _key(line, indent)
            if key in found or line[at : at + 1] not in _SEPARATE:
                _refuse()
            self._at += 1
            found[key] = _Inline(line, at).whole() if _goes_on(line, at) else self._below(indent)
        return found or _refuse()

    def _below(self, above: int) -> object:
        """What stands under a key."""
        if self._at == len(self._lines):
            _refuse()
        indent, line = self._lines[self._at]
        if indent <= above or indent > 2 * _DEEPEST:
            _refuse()
        return self._listed(indent) if line.startswith("- ", indent) else self.mapping(indent)

    def _listed(self, indent: int) -> list[object]:
        found = []
        while (line := self._line_of(indent)) is not None:
            if not line.startswith("- ", indent) or not _goes_on(line, indent + 2):
                _refuse()
            self._at += 1
            found.append(_Inline(line, indent + 2).whole())
        return found

    def _line_of(self, indent: int) -> str | None:
        """The next line, if it belongs to what is indented so far; None: that is over."""
        if self._at == len(self._lines) or self._lines[self._at][0] < indent:
            return None
        if self._lines[self._at][0] > indent:
            _refuse()
        return self._lines[self._at][1]


class _Inline:
    """Reads a value within a line."""

    def __init__(self, line: str, at: int) -> None:
        self._line = line
        self._at = at

    def whole(self) -> object:
        """The one that the rest of the line is, but for a comment."""
        value = self._value(0)
        return _refuse() if _goes_on(self._line, self._at) else value

    def _value(self, depth: int) -> object:
        if depth > _DEEPEST:
            _refuse()
        first = self._skip()
        if first in ('"', "'"):
            return self._quoted(first)
        if first == "[":
            return self._list(depth)
        return self._flow_mapping(depth) if first == "{" else _meant(self._word())

    def _skip(self) -> str:
        """Over spaces; what stands behind them."""
        while self._line.startswith(" ", self._at):
            self._at += 1
        return self._line[self._at : self._at + 1]

    def _quoted(self, quote: str) -> str:
        end = self._line.find(quote, self._at + 1)
        text = self._line[self._at + 1 : end]
        self._at = end + 1
        if end < 0 or "\\" in text or self._line.startswith(quote, self._at):
            _refuse()
        return text

    def _list(self, depth: int) -> list[object]:
        found: list[object] = []
        self._at += 1
        if self._skip() == "]":
            self._at += 1
            return found
        while True:
            found.append(self._value(depth + 1))
            if self._ends("]"):
                return found

    def _flow_mapping(self, depth: int) -> dict[str, object]:
        found: dict[str, object] = {}
        self._at += 1
        if self._skip() == "}":
            self._at += 1
            return found
        while True:
            self._skip()
            key, self._at = _key(self._line, self._at)
            if key in found or self._line[self._at : self._at + 1] != " ":
                _refuse()
            found[key] = self._value(depth + 1)
            if self._ends("}"):
                return found

    def _ends(self, bracket: str) -> bool:
        """Whether that comes next, and not a comma."""
        after = self._skip()
        self._at += 1
        if after not in (bracket, ","):
            _refuse()
        return after == bracket

    def _word(self) -> str:
        start = self._at
        while self._line[self._at : self._at + 1] in _IN_WORDS:
            self._at += 1
        return self._line[start : self._at]


def _key(line: str, at: int) -> tuple[str, int]:
    """The key that begins there, and where its colon ends."""
    end = line.find(":", at)
    key = line[at:end]
    if end < 0 or not key or not _IN_KEYS.issuperset(key) or key.lower() in _MEANING_SOMETHING:
        _refuse()
    return key, end + 1


def _goes_on(line: str, at: int) -> bool:
    """Whether there is more than spaces and a comment; what follows something must be apart from it."""
    rest = line[at:]
    apart = rest.lstrip(" ")
    return bool(apart) and (apart[0] != "#" or apart == rest)


def _meant(word: str) -> str | int | bool:
    if word in ("true", "false"):
        return word == "true"
    number = word.rstrip("".join(_LETTERS))
    if number.isdigit() and word[len(number) :] in _UNITS and len(number) <= _MOST_DIGITS:
        if number[0] == "0" and word != "0":
            _refuse()  # octal, for some
        return int(word) if word == number else word
    first = word[:1]
    if first not in _LETTERS and not (first == "/" or word.startswith("~/")):
        _refuse()
    return _refuse() if word.lower() in _MEANING_SOMETHING else word


def _refuse() -> NoReturn:
    raise _NotPlainError
