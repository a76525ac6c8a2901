"""Takes a shell's command line apart into the programs it starts. Runs later, and live. Pure.

No shell's whole grammar: enough of it that what is run is seen. Quotes, lists, substitutions and here-documents are
taken apart here, wrappers (``sudo``, ``nohup``, ``docker run`` …) by :mod:`.wrappers`, other ways to write a text by
:mod:`.hidden`, so that rules look at programs and arguments and not at spelling.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from ray_guard.detect.hidden import LONGEST, run_by_code, unhidden
from ray_guard.detect.wrappers import SHELLS, Unwrapped, unwrapped

_PIPED: Final = 32
"""Programs of a pipeline that are looked back at."""
DEPTH: Final = 6
"""Commands within commands; deeper ones are not looked at."""
READERS: Final = frozenset(
    (
        "grep egrep fgrep rg ag ack cat less more head tail echo printf sed awk find ls wc sort uniq diff git man "
        "cd jq tee nano"
    ).split()
)
"""Programs that search, show or write down a text and run nothing of it."""
NETCATS: Final = frozenset("nc ncat netcat nc.traditional nc.openbsd".split())
"""Programs that hand their input to a connection, and its bytes to their output."""
_TALKERS: Final = READERS | frozenset(
    "gh glab curl wget yq logger python python2 python3 perl ruby node php lua psql mysql sqlite3 docker claude "
    "llm".split()
)
"""Whose arguments of several words are no command lines."""
_READ_AS_COMMANDS: Final = SHELLS | frozenset(
    "su runuser ssh crontab at batch make expect source . eval parallel".split()
)
"""Programs that run what they read from their input."""
_PAPERS: Final = re.compile(
    r"(?i)\.(?:md|txt|rst|adoc|log|json|jsonl|ya?ml|toml|ini|cfg|csv|tsv|html?|xml|tex|py|js|ts|go|rs|c|h|cpp|java|rb|pl|php)$|^/dev/null$|^&\d"
)
"""Files that nobody runs as they are."""


_DRESSED: Final = re.compile(
    r"(?i)(?:[_.-]?v?\d+(?:\.\d+)+|[_.-](?:linux|darwin|freebsd|x64|x86(?:_64)?|amd64|arm64|aarch64|i?386|musl|static)(?![a-z])|"
    r"\.(?:exe|bin|elf|py|pl|rb))+$"
)


@dataclass(slots=True, eq=False)
class Command:
    """One program with its arguments.

    Args:
        name: the program's name without folder.
        arguments: the others, unquoted.
        piped_from: the command whose output it reads, in a pipeline.
        redirects: operator and target of each, as ``>file``.
        documents: here-documents and here-strings that it reads.
        first: of its pipeline; none where it is that itself.
        key: the same for two that do the same.
    """

    name: str
    arguments: list[str]
    piped_from: Command | None = None
    redirects: list[str] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)
    first: Command | None = None
    key: int = 0

    def __post_init__(self) -> None:
        self.key = hash((self.name, *self.arguments, *self.redirects, "<<", *self.documents))

    @property
    def program(self) -> str:
        """Its name without what an archive of programs adds to it: version, platform, suffix."""
        return (_DRESSED.sub("", self.name) if len(self.name) < 256 else "") or self.name

    def sources(self) -> Iterator[Command]:
        """The commands before it in its pipeline, the nearest first; of a long one those, and the first of all."""
        source = self.piped_from
        for _ in range(_PIPED):
            if source is None:
                return
            yield source
            source = source.piped_from
        if source is not None and self.first is not None:
            yield self.first

    @property
    def text(self) -> str:
        return " ".join([self.name, *self.arguments])

    def follow(self, before: Command) -> None:
        """Have it read what another one says."""
        self.piped_from, self.first = before, before.first or before
        self.key = hash((self.key, before.key))


def commands(text: str, depth: int = 0) -> Iterator[Command]:
    """The programs that a command line starts, those within it (``-c``, ``$(…)``, decoded texts) after it."""
    if depth > DEPTH:
        return
    before: Command | None = None
    splitter = _Splitter(text[:LONGEST])
    for words, piped in splitter.found:
        found, inner_texts = _program(words, splitter.documents)
        if found is None:
            before = None if not piped else before
        else:
            if piped and before is not None:
                found.follow(before)
            before = found
            yield found
            inner_texts += _within(found)
        for inner in inner_texts:
            yield from commands(inner, depth + 1)


class _Quoted(str):
    """A word that begins in quotes: no redirection, whatever it looks like."""

    __slots__ = ()


class _Splitter:
    """Simple commands as (words, whether the one before is piped into it); quotes are taken off, substitutions kept.

    A here-document is taken out of the text; the word ``<<N`` says that it is the N-th of :attr:`documents`.
    """

    def __init__(self, text: str) -> None:
        self.found: list[tuple[list[str], bool]] = []
        self.documents: list[str] = []
        self._text = text
        self._at = 0
        self._words: list[str] = []
        self._word: list[str] = []
        self._begun = self._piped = self._in_quotes = False
        self._depth = 0
        self._quote = ""
        self._awaited: list[tuple[int, str]] = []
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
        run = _QUOTED_RUN.match(self._text, self._at)
        if run:
            self._add(run[0])
            self._at = run.end() - 1
        elif char == self._quote:
            self._quote = ""
        elif self._quote == '"' and (char == "`" or self._text.startswith("$(", self._at)):
            self._substituted()
        elif char == "\\" and self._quote == '"' and self._text[self._at + 1 : self._at + 2] in ('"', "\\", "$", "`"):
            self._at += 1
            self._add(self._text[self._at])
        else:
            self._add(char)

    def _plain(self, char: str) -> None:
        run = _PLAIN_RUN.match(self._text, self._at)
        if run:
            self._add(run[0])
            self._at = run.end() - 1
            return
        following = self._text[self._at + 1 : self._at + 2]
        if char in "'\"":
            self._in_quotes = self._in_quotes or not self._begun
            self._quote, self._begun = char, True
            if self._word and self._word[-1] == "$":  # $'…'
                self._word.pop()
        elif char == "\\" and following:
            self._at += 1
            if following != "\n":
                self._add(following)
        elif char == "`" or (char in "$<>" and following == "("):
            self._substituted()
        elif self._text.startswith("<<<", self._at):
            self._end_word()
            self._words.append("<<<")
            self._at += 2
        elif char == "<" and (begins := _HERE.match(self._text, self._at)):
            self._here(begins)
        elif char in " \t\r":
            self._end_word()
        elif char == "#" and not self._begun:
            end = self._text.find("\n", self._at)
            self._at = (end if end >= 0 else len(self._text)) - 1
        elif char in "\n;&|()":
            self._separator(char, following)
        else:
            self._add(char)

    def _substituted(self) -> None:
        end = _closing(self._text, self._at)
        self._add(self._text[self._at : end])
        self._at = end - 1

    def _here(self, begins: re.Match[str]) -> None:
        self._end_word()
        self._awaited.append((len(self.documents), next(each for each in begins.groups() if each is not None)))
        self._words.append(f"<<{len(self.documents)}")
        self.documents.append("")
        self._at = begins.end() - 1

    def _separator(self, char: str, following: str) -> None:
        # `>&` and `&>` are redirections.
        if char == "&" and ((self._word and self._word[-1] in "<>") or following == ">"):
            self._add(char)
            return
        if char == ")" and self._is_label():
            return
        self._depth += {"(": 1, ")": -1}.get(char, 0)
        self._end_command(into_next=char == "|" and following != char)
        self._at += following == char or (char == "|" and following == "&")
        if char == "\n":
            for number, end in self._awaited:
                self._take(number, end)
            self._awaited.clear()

    def _is_label(self) -> bool:
        """Whether what stands before this parenthesis is a pattern of ``case``, and no command: it is dropped."""
        self._end_word()
        if self._depth > 0 or len(self._words) > 1:
            return False
        self._words = []
        while self._piped and self.found and len(self.found[-1][0]) == 1:
            self._piped = self.found.pop()[1]
        self._piped = False
        return True

    def _take(self, number: int, end: str) -> None:
        """The here-document that begins after this line."""
        last = re.compile(rf"^[ \t]*{re.escape(end)}[ \t]*\r?$", re.MULTILINE).search(self._text, self._at + 1)
        self.documents[number] = self._text[self._at + 1 : last.start() if last else len(self._text)]
        self._at = last.end() if last else len(self._text)

    def _end_word(self) -> None:
        if self._begun:
            word = "".join(self._word)
            self._words.append(_Quoted(word) if self._in_quotes else word)
        self._word.clear()
        self._begun = self._in_quotes = False

    def _end_command(self, *, into_next: bool) -> None:
        self._end_word()
        if self._words:
            self.found.append((self._words, self._piped))
            self._words = []
        self._piped = into_next


_PLAIN_RUN: Final = re.compile(r"[\w./:=@%+,~^-]+")
_QUOTED_RUN: Final = re.compile(r"[^'\"\\$`]+")
_HERE: Final = re.compile(r"<<-?\s*(?:'([^'\n]+)'|\"([^\"\n]+)\"|\\?([\w.!-]+))")


def _closing(text: str, at: int) -> int:
    """The end of a substitution that begins here."""
    if text[at] == "`":
        end = text.find("`", at + 1)
        return end + 1 if end > 0 else len(text)
    depth = 0
    for parenthesis in _PARENTHESES.finditer(text, at + 1):
        depth += 1 if parenthesis[0] == "(" else -1
        if depth == 0:
            return parenthesis.end()
    return len(text)


_PARENTHESES: Final = re.compile(r"[()]")
_SUBSTITUTION: Final = re.compile(r"[$<>]\(|`")


def _substitutions(text: str) -> Iterator[str]:
    """What stands within ``$(…)``, ``<(…)`` and backquotes, to the end where they do not close."""
    at = 0
    while begins := _SUBSTITUTION.search(text, at):
        at = _closing(text, begins.start())
        yield text[begins.end() : at].removesuffix(")" if begins[0] != "`" else "`")


_REDIRECT: Final = re.compile(r"(?:\d*|&)(?:>>?\|?|<>?|>&|<&|<<<)")
_REDIRECTED: Final = re.compile(r"(?:\d*|&)(?:>>?\|?|<>?|>&|<&|<<<)(?!\()(?:[^=].*)?", re.DOTALL)
_HERE_WORD: Final = re.compile(r"<<(\d+)")


def _program(words: list[str], documents: list[str]) -> tuple[Command | None, list[str]]:
    """The program proper, behind assignments, wrappers and redirections; and texts that the wrappers have run."""
    left = list(words)
    redirects: list[str] = []
    read: list[str] = []
    for position in range(len(left) - 1, -1, -1):
        here = _HERE_WORD.fullmatch(left[position])
        if here and int(here[1]) < len(documents):
            left.pop(position)
            read.append(documents[int(here[1])])
        elif not isinstance(left[position], _Quoted) and _REDIRECTED.fullmatch(left[position]):
            taken = left.pop(position)
            if _REDIRECT.fullmatch(taken) and position < len(left):
                taken += left.pop(position)
            redirects.append(taken)
            if "<<<" in taken:
                read.append(taken.partition("<<<")[2])
    found: Unwrapped = unwrapped(left)
    texts: list[str] = []
    for text in found.texts:
        texts += _substitutions(text) if text.startswith(("$(", "`")) else (text,)
    if not found.words:
        return None, texts
    name = found.words[0].rpartition("/")[2] or found.words[0]
    return Command(name, found.words[1:], redirects=redirects, documents=read), texts


def _within(command: Command) -> list[str]:
    """Texts that the command has run: a shell's ``-c``, what is substituted, what is decoded into a shell."""
    texts = list(_given(command))
    if command.name in _READ_AS_COMMANDS:
        texts += _read_by(command)
    texts += _put_in_file(command)
    if _INTERPRETERS.fullmatch(command.name):
        for program in (*command.arguments, *command.documents):
            texts += run_by_code(program)
    for word in [command.name, *command.arguments, *command.redirects]:
        texts += _substitutions(word)
    return texts


_INTERPRETERS: Final = re.compile(
    r"(?:python|perl|ruby|node|php|lua|deno|g?awk|tclsh|expect|osascript|vim?|nvim)[\d.]*"
)
_LED_IN: Final = re.compile(r"(?:[\w.-]{1,40}=|:!|!|\\!|\.(?:shell|system)\s|spawn\s|(?i:exec|system):)+\s*")


def _given(command: Command) -> Iterator[str]:
    """Its arguments that may be command lines: of a shell's ``-c``, and of several words."""
    for option, text in pairwise(command.arguments):
        if (
            option.startswith("-")
            and option.endswith("c")
            and not option.startswith("--")
            and command.name not in _TALKERS
        ):
            yield text
        if command.name == "git" and option == "-c":
            yield _LED_IN.sub("", text, count=1)
    if command.name == "eval":
        yield " ".join(command.arguments)
    if command.name == "find":
        yield from _executed(command.arguments)
    talks = command.name in _TALKERS
    for argument in command.arguments:
        led_in = _LED_IN.match(argument)
        if " " in argument and (not talks or (led_in and command.name in ("vim", "vi", "sqlite3", "mysql", "psql"))):
            yield argument[led_in.end() :] if led_in else argument


def _executed(words: list[str]) -> Iterator[str]:
    """What ``find`` runs on what it finds."""
    for at, word in enumerate(words):
        if word in ("-exec", "-execdir", "-ok", "-okdir"):
            ends = (end for end in range(at, len(words)) if words[end] in (";", "+"))
            yield shlex.join(words[at + 1 : next(ends, len(words))])


def _read_by(command: Command) -> Iterator[str]:
    """What a shell reads: here-documents, and what is echoed or decoded into it."""
    yield from command.documents
    source = command.piped_from
    if source is not None and source.name in ("echo", "printf", "cat"):
        yield _echoed(source)
    # `echo … | base64 -d | sh`: whatever was said on the way may be what is run.
    said = [*command.redirects, *command.documents, *(word for each in command.sources() for word in each.arguments)]
    whole = " ".join(said)
    yield from (text for text in unhidden(whole) if text != whole)


def _put_in_file(command: Command) -> Iterator[str]:
    """What is written to a file that may be run: a script, a shell's start, a timetable."""
    if command.name in ("echo", "printf", "cat"):
        source, files = command, [each.lstrip("0123456789&>|") for each in command.redirects if ">" in each]
    elif command.name == "tee" and command.piped_from is not None:
        source, files = command.piped_from, [each for each in command.arguments if not each.startswith("-")]
    else:
        return
    if any(file and not _PAPERS.search(file) for file in files):
        yield _echoed(source)


def _echoed(source: Command) -> str:
    words = list(source.arguments) if source.name != "cat" else []
    while words and re.fullmatch(r"-[neE]+|--", words[0]):
        words.pop(0)
    if source.name == "printf" and words:
        values = iter(words[1:])
        words = [re.sub(r"%-?\d*[sbdi]", lambda _: next(values, ""), words[0]), *values]
    said = ("\n" if source.name == "printf" else " ").join(words)
    return "\n".join([said.replace("\\n", "\n").replace("\\t", "\t"), *source.documents])
