"""Takes secrets out of text that is recorded. Runs in the target and in the supervisor. Pure, standard library only.

What is recorded leaves the host with the traces, and is kept. A secret is known by its form (keys of clouds and code
hosts, JSON web tokens, private keys), by what stands before it (``Authorization:``, ``password=``, ``--token``,
``user:…@``), or by being text that nobody would choose: mixed, long and without a pattern. The last is a guess, set so
that hashes, UUIDs, paths and identifiers stay. What is taken out is missing: the hash of the whole is recorded
beside, and says whether two were the same.

Every pattern takes time linear in the text: tools choose what they are called with.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from typing import Final

REDACTED: Final = "[redacted]"

MARGIN: Final = 4096
"""Who cuts a text redacts this many characters beyond the cut first: half a secret has lost its form."""

_WORDS: Final = tuple(
    "pass pwd secret token key auth cookie credential bearer :// akia asia ltai aiza xox sk- gh glpat eyj hf_ -u npm_ "
    "pypi- ya29 abia acca agpa aida aroa anpa _live_ _test_".split()
)
"""Without one of these, and without a long word, there is nothing that a pattern could find."""
_LONG: Final = 32
_ENTROPY: Final = 3.8
"""Bits a character. Random base64 of 32 characters has 4.2 to 5; what is repeated has less."""
_RESTLESS: Final = 0.45
"""Changes of kind (upper, lower, digit, sign) for each character. Random base64 has 0.6, CamelCase and paths 0.3."""

_NAME: Final = (
    r"(?:pass(?:word|wd|phrase|code)|(?<![a-z])pwd|secret|token(?!i[sz]|s)|api[_-]?key|access[_-]?key|private[_-]?key|"
    r"signing[_-]?key|encryption[_-]?key|account[_-]?key|credential|authorization|cookie)"
)
_VALUE: Final = r"""(?!\[redacted\]|(?:null|none|true|false|\d{1,9})\b)[^\s"'`&;,)}\]\\]{3,}"""


@functools.cache
def _patterns() -> tuple[tuple[re.Pattern[str], str], ...]:
    # Made when first needed: most commands hold no word that could be one, and a tool's start waits for this.
    case = re.IGNORECASE
    return (
        (re.compile(r"-----BEGIN ([A-Z0-9 ]{0,40})PRIVATE KEY(?: BLOCK)?-----.*?"
                    r"(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----|\Z)", re.DOTALL), REDACTED),
        # Of a whole line: a header's value may hold blanks and more than one secret.
        (re.compile(r"""\b((?:proxy-)?authorization|x-[a-z0-9-]{0,24}(?:key|token|secret)|set-cookie|cookie)"""
                    r"""(\\?["']?\s{0,4}+[:=]\s{0,4}+\\?["']?)(?!\[redacted\])[^\r\n"'\\]{3,}""", case),
         rf"\1\2{REDACTED}"),
        (re.compile(r"\b(bearer)\s{1,4}[A-Za-z0-9._~+/=-]{8,}", case), rf"\1 {REDACTED}"),
        (re.compile(r"(://[^\s/:@\"']{0,256}:)[^\s/\"']{1,512}@"), rf"\1{REDACTED}@"),
        (re.compile(r"(://)[A-Za-z0-9_-]{20,256}@"), rf"\1{REDACTED}@"),
        (re.compile(r"\b(?:(?:AKIA|ASIA|ABIA|ACCA|AGPA|AIDA|AROA|ANPA)[A-Z0-9]{16}|LTAI[A-Za-z0-9]{12,30}|"
                    r"AIza[A-Za-z0-9_-]{35}|ya29\.[A-Za-z0-9_-]{20,})"), REDACTED),
        (re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}|"
                    r"xox[abeoprs]-[A-Za-z0-9-]{10,}|hf_[A-Za-z0-9]{20,}|npm_[A-Za-z0-9]{30,}|pypi-[A-Za-z0-9_-]{40,}|"
                    r"[rs]k_(?:live|test)_[A-Za-z0-9]{10,}|sk-[A-Za-z0-9_-]{20,})"), REDACTED),
        (re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)?"), REDACTED),
        (re.compile(rf"""({_NAME}[A-Za-z0-9_]{{0,32}}\\?["']?\s{{0,4}}+(?::=|[:=])\s{{0,4}}+\\?["']?){_VALUE}""", case),
         rf"\1{REDACTED}"),
        (re.compile(rf"(--?[a-z0-9-]{{0,32}}{_NAME}[a-z0-9-]{{0,32}}\s{{1,4}}[\"']?){_VALUE}", case),
         rf"\1{REDACTED}"),
        (re.compile(r"(\bsshpass\s+-p\s*[\"']?)[^\s\"']+"), rf"\1{REDACTED}"),
        (re.compile(r"((?:^|\s)(?:-u|--user|--proxy-user)[\s=][\"']?[^\s:\"']{1,128}:)[^\s\"'/]{1,256}"),
         rf"\1{REDACTED}"),
    )  # fmt: skip


@functools.cache
def _random() -> re.Pattern[str]:
    return re.compile(rf"[A-Za-z0-9+/_=-]{{{_LONG},}}")


def redact(text: str) -> str:
    """`text` with ``[redacted]`` in place of each secret in it."""
    if len(text) < 8:
        return text
    if _may_hold_one(text.lower()):
        for pattern, replacement in _patterns():
            text = pattern.sub(replacement, text)
    return _without_random(text)


def _without_random(text: str) -> str:
    return _random().sub(_unless_chosen, text) if len(text) >= _LONG else text


def _may_hold_one(lowered: str) -> bool:
    return any(map(lowered.__contains__, _WORDS))  # each exec waits for this


def _unless_chosen(found: re.Match[str]) -> str:
    word = found[0]
    return REDACTED if is_random(word) else word


def is_random(word: str) -> bool:
    """Whether nobody would have chosen `word`: it goes to and fro between upper case, lower case and digits."""
    body = word.strip("=")[:256]
    kinds = [character.isdigit() + 2 * character.isupper() + 4 * character.islower() for character in body]
    if len(body) < _LONG or {1, 2, 4} - set(kinds):
        return False  # all of hex too: hashes and ids
    changes = sum(map(operator.ne, kinds, kinds[1:]))
    counts = [body.count(character) for character in set(body)]
    entropy = -sum(n / len(body) * math.log2(n / len(body)) for n in counts)
    return changes >= _RESTLESS * len(body) and entropy >= _ENTROPY


@functools.cache
def _secret_name() -> re.Pattern[str]:
    return re.compile(rf"{_NAME}|(?:^|[_-])(?:auth|passwd|pass)$", re.IGNORECASE)


@functools.lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether what is kept under that name (a field, a variable, an option) is a secret."""
    return _secret_name().search(name) is not None


def redact_arguments(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """A command's arguments, each redacted, and those that follow an option such as ``--password``."""
    if not _may_hold_one("\0".join(arguments).lower()):
        if max(map(len, arguments), default=0) < _LONG:
            return arguments
        return tuple([_without_random(argument) for argument in arguments])
    found: list[str] = []
    before = ""
    for argument in arguments:
        found.append(_argument(before, argument, arguments[0]))
        before = argument
    return tuple(found)


def _argument(before: str, argument: str, program: str) -> str:
    if before.startswith("-") and "=" not in before and not argument.startswith("-"):
        if is_secret_name(before) or (before == "-p" and program.rpartition("/")[2] == "sshpass"):
            return REDACTED
        if before in ("-u", "--user", "--proxy-user") and ":" in argument:
            return f"{argument.partition(':')[0]}:{REDACTED}"
    return redact(argument)
