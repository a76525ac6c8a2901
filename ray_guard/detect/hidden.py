"""What a command line becomes: decoded, put together from variables, spelt out. Runs later, and live. Pure.

Every way of writing a text otherwise that a shell or an interpreter undoes is undone here, one at a time and again on
what came out, so that rules look at what is run. A way that is not known leaves the text as it is.
"""

from __future__ import annotations

import ast
import base64
import binascii
import bz2
import codecs
import itertools
import lzma
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from typing import Final
from urllib.parse import unquote

LONGEST: Final = 1 << 16
"""Characters of a command line; what is behind them is not looked at."""
_TEXTS: Final = 32
_WORK: Final = 4 * LONGEST
"""Characters of all that one text becomes: what is short when it is decoded has always room."""
_NAMES: Final = 64
_UNPACKED: Final = 1 << 16

_NAME: Final = r"[A-Za-z_]\w*"
_VARIABLE: Final = re.compile(
    rf"(?:^|[\s;&(])({_NAME})=(?:'([^'$]*)'|\"([^\"$`]*)\"|([\w./:@+,%=-]+))(?=[\s;&)]|$)", re.MULTILINE
)
_READ_INTO: Final = re.compile(rf"\bread\s+(?:-r\s+)?({_NAME})\s+<<<\s*['\"]?([^'\"$\n;|&]+)")
_ALIAS: Final = re.compile(r"\balias\s+([\w.-]+)=(?:'([^']*)'|\"([^\"]*)\"|([\w./-]+))")
_FUNCTION: Final = re.compile(rf"\b({_NAME})\s*\(\)\s*\{{\s*([^{{}}\n]{{1,400}}?)\s*\"?\$[@*]\"?\s*;?\s*\}}")
_EXPANSION: Final = re.compile(rf"\$\{{({_NAME})(:-|:=|:\d+|//?)([^{{}}]{{0,80}})\}}")
_SAID: Final = re.compile(
    r"(?:\$\(|`)\s*(echo|printf)\s+(?:-[neE]+\s+)*((?:'[^']*'|\"[^\"$`]*\"|[^\s'\"$`()|;&]+)(?:\s+(?:'[^']*'|\"[^\"$`]*\"|[^\s'\"$`()|;&]+)){0,32})\s*(?:\)|`)"
)
_DECODED_IN_PLACE: Final = re.compile(
    r"\$\(\s*(?:echo|printf)\s+(?:-n\s+)?['\"]?([A-Za-z0-9+/]{4,}={0,2})['\"]?\s*\|\s*base64\s+(?:-d|-D|--decode)\s*\)|"
    r"\$\(\s*base64\s+(?:-d|-D|--decode)\s*<<<\s*['\"]?([A-Za-z0-9+/]{4,}={0,2})['\"]?\s*\)"
)
_NUMBER: Final = re.compile(r"\$\(\(\s*(0x[0-9a-fA-F]+|0[0-7]*|[1-9]\d*)\s*(?:([+*-])\s*(0x[0-9a-fA-F]+|\d+)\s*)?\)\)")
_SPACES: Final = re.compile(r"\$\{?IFS(?:%\?\?|:\d+:\d+)?\}?(?:\$\d)?")
_NOTHING: Final = re.compile(r"(?<=\w)(?:\$[@*1-9]|\$\{[@*1-9]\}|\$\(\)|``)(?=\w)")
_QUOTES_WITHIN: Final = re.compile(r"(?<=[\w./@:-])(?:''|\"\"|['\"]|\\(?!n))(?=[\w./@:-])")
_BRACES: Final = re.compile(r"(?<![\w$/{}])\{([^{}\s]{1,400},[^{}\s]{0,400})\}(?=[\s;|&)]|$)")
_ANSI: Final = re.compile(r"\$'((?:[^'\\]|\\.){1,2000})'", re.DOTALL)
_HEX: Final = re.compile(r"(?:\\x[0-9a-fA-F]{2}){4,}")
_OCTAL: Final = re.compile(r"(?:\\0?[0-3][0-7]{2}){4,}")
_UNICODE: Final = re.compile(r"(?:\\u00[0-9a-fA-F]{2}){4,}")
_BARE_HEX: Final = re.compile(r"\b(?:0x)?((?:[0-9a-fA-F]{2}){8,})\b")
_SPACED_HEX: Final = re.compile(r"\b[0-9a-fA-F]{2}(?:[ :,]\s?(?:0x)?[0-9a-fA-F]{2}){7,}\b")
_PERCENT: Final = re.compile(r"(?:%[2-7][0-9a-fA-F][^%\s]{0,64}){4}")
_CODES: Final = re.compile(r"\b\d{2,3}(?:\s*,\s*\d{2,3}){7,}")
_CHR: Final = re.compile(r"(?:\bchr\(\d{2,3}\)\s*[.+]\s*){3,}chr\(\d{2,3}\)")
_BASE64: Final = re.compile(r"[A-Za-z0-9+/_-]{16,}={0,2}")
_BASE32: Final = re.compile(r"[A-Z2-7]{16,}={0,6}")
_BASE85: Final = re.compile(r"(?:b85|a85)decode\(\s*b?['\"]([!-~]{16,4096}?)['\"]")
_REVERSED: Final = re.compile(r"\|\s*rev\b|\[::-1\]|\breverse\b|\bstrrev\(|\btac\b")
_TRANSLATED: Final = re.compile(
    r"\btr\s+(?:'([^']{2,128})'|\"([^\"]{2,128})\"|(\S{2,128}))\s+(?:'([^']{2,128})'|\"([^\"]{2,128})\"|([^\s|;)]{2,128}))"
)
_DELETED: Final = re.compile(r"\btr\s+-d\s+(?:'([^']{1,32})'|\"([^\"]{1,32})\"|([^\s|;)'\"]{1,32}))")
_SUBSTITUTED: Final = re.compile(r"\bsed\s+(?:-\w\s+)?['\"]?s([/|#,:])([\w.^%@!-]{1,32})\1([\w. %-]{0,32})\1g?['\"]?")
_ROT13: Final = re.compile(r"rot_?13", re.IGNORECASE)
_RENAMED: Final = re.compile(
    r"\b(?:cp|mv|ln|install)\s+(?:-\w+\s+)*(?:\"?\$\((?:which|command -v|type -p)\s+([\w.-]+)\)\"?|`which "
    r"([\w.-]+)`|((?:/[\w.-]+)+|[\w.-]+))\s+([\w./~-]+)"
)
_BROUGHT: Final = re.compile(
    r"\b(?:curl|wget)\b[^|;&\n]{0,400}?\s(?:-o|-O|--output|--output-document)[= ]\s*([\w./~-]+)[^|;&\n]{0,400}"
)
_LAST_OF_URL: Final = re.compile(r"https?://[^\s'\"]*/([A-Za-z][A-Za-z-]+)[^\s/'\"]*")
_RUN_BY_CODE: Final = re.compile(
    r"(?:system|popen2?|run|call|Popen|check_output|check_call|getoutput|spawn|spawnSync|spawnlp?|execSync|execFile|"
    r"execv?p?|execlp?|exec|shell_exec|passthru|proc_open|Command|sh)\s*(?:\(|\s(?=['\"]|qw))\s*[\[(]?\s*"
    r"((?:b?(?:'(?:[^'\\\n]|\\.){1,2000}'|\"(?:[^\"\\\n]|\\.){1,2000}\")[\s,\[\]]*){1,32}|qw\([^)]{1,400}\))"
)
_STRING: Final = re.compile(r"'((?:[^'\\\n]|\\.)*)'|\"((?:[^\"\\\n]|\\.)*)\"|qw\(([^)]*)\)")
_SCRIPTS: Final = re.compile(r"\"scripts\"\s*:\s*\{([^{}]{1,4000})\}")
_SCRIPT: Final = re.compile(r":\s*\"((?:[^\"\\\n]|\\.){4,2000})\"")
_BACKTICKS: Final = re.compile(r"%x[{(]([^})]{4,400})[})]|(?<=[\s=;'\"{])`([^`\n]{8,400})`")
_DOTS: Final = str.maketrans("。．｡", "...")


def unhidden(text: str) -> Iterator[str]:
    """The text, and what it becomes, and what that becomes; as many as :data:`_TEXTS` of them."""
    found = [text]
    left = _WORK
    for at in range(_TEXTS):
        if at == len(found):
            break
        if len(found[at]) <= left:
            left -= len(found[at])
            yield found[at]
            becomes = itertools.chain.from_iterable(way(found[at]) for way in _WAYS)
            found += [each for each in itertools.islice(becomes, _TEXTS) if each not in found]
    for way in _REWRITTEN:
        yield from (each for each in way(text) if each not in found and len(each) <= left)


# -- a shell's own ways -----------------------------------------------------------------------------------------------


def _one(rewrite: Callable[[str], str]) -> Callable[[str], Iterator[str]]:
    """A way that makes one text of one."""

    def way(text: str) -> Iterator[str]:
        written = rewrite(text)
        if written != text:
            yield written[:LONGEST]

    return way


def _spelt(text: str) -> str:
    """Blanks, nothings, quotes within words, braces and numbers as a shell would spell them out."""
    if "IFS" in text:
        text = _SPACES.sub(" ", text)
    if "$((" in text:
        text = _NUMBER.sub(_sum, text)
    if "$'" in text:
        text = _ANSI.sub(lambda found: _escaped(found[1]), text)
    if "{" in text:
        text = _BRACES.sub(lambda found: found[1].replace(",", " "), text)
    return _QUOTES_WITHIN.sub("", _NOTHING.sub("", text))


def _sum(found: re.Match[str]) -> str:
    left, right = (_integer(found[1]), _integer(found[3] or "0"))
    return str({"-": left - right, "*": left * right}.get(found[2], left + right))


def _integer(text: str) -> int:
    octal = len(text) > 1 and text[0] == "0" and text.isdecimal()
    return (
        int(text[:18], 8) if octal and "8" not in text and "9" not in text else int(text[:18], 0 if "x" in text else 10)
    )


def _escaped(text: str) -> str:
    if "\\" not in text:
        return text
    try:
        return str(ast.literal_eval('"' + text.replace('"', r"\"").replace("\n", r"\n").replace(r"\e", r"\x1b") + '"'))
    except (SyntaxError, ValueError, MemoryError):
        return text


def _filled(text: str) -> str:
    """The text with the plain values of its own assignments in the places of the variables."""
    if "$" not in text:
        return text
    values = {}
    for found in itertools.islice(_VARIABLE.finditer(text), _NAMES):
        values[found[1]] = next((each for each in found.groups()[1:] if each is not None), "")
    for found in itertools.islice(_READ_INTO.finditer(text), _NAMES):
        values[found[1]] = found[2].strip()
    text = _EXPANSION.sub(lambda found: _expanded(found, values), text)
    if not values:
        return text
    names = "|".join(sorted(map(re.escape, values), key=len, reverse=True))
    return re.sub(rf"\$(?:\{{({names})\}}|({names})\b)", lambda found: values[found[1] or found[2]], text)


def _expanded(found: re.Match[str], values: dict[str, str]) -> str:
    name, operator, rest = found[1], found[2], found[3]
    value = values.get(name)
    if operator in (":-", ":="):
        return value or rest
    if value is None:
        return found[0]
    if operator.startswith(":"):
        length = rest.removeprefix(":")
        start = int(operator[1:])
        return value[start : start + int(length)] if length.isdecimal() else value[start:]
    old, _, new = rest.partition("/")
    return value.replace(old, new, 1 if operator == "/" else -1) if old else found[0]


def _named(text: str) -> str:
    """The programs behind aliases, functions that pass their arguments on, copies and links."""
    given: dict[str, str] = {}
    for pattern in (_ALIAS, _FUNCTION, _RENAMED) if _MAY_NAME.search(text) else ():
        for found in itertools.islice(pattern.finditer(text), _NAMES):
            *values, last = found.groups()
            name, value = (
                (last, next(filter(None, values))) if pattern is _RENAMED else (found[1], found[found.lastindex or 2])
            )
            given[name] = value
    for found in itertools.islice(_BROUGHT.finditer(text), _NAMES):
        program = _LAST_OF_URL.search(found[0])
        if program is not None:
            given[found[1]] = program[1].rstrip("-")
    if not given:
        return text
    names = "|".join(sorted((re.escape(name) for name in given), key=len, reverse=True))
    at_work = re.compile(
        rf"((?:^|[\n;&|({{]|\b(?:do|then|exec|nohup|sudo|setsid)\s)\s*)(?:\./)?({names})(?=\s|$|[;&|)])"
    )
    return at_work.sub(lambda found: found[1] + given[found[2]], text)


def _said_in_place(text: str) -> str:
    """What ``$(echo …)``, ``$(printf …)`` and ``$(… | base64 -d)`` leave behind."""
    if "$(" not in text and "`" not in text:
        return text
    return _SAID.sub(_saying, _DECODED_IN_PLACE.sub(_decoded_in_place, text))


def _decoded_in_place(found: re.Match[str]) -> str:
    plain = _unpacked(found[1] or found[2])
    return found[0] if plain is None else plain


def _saying(found: re.Match[str]) -> str:
    words = [
        re.sub(r"^(['\"])(.*)\1$", r"\2", word, flags=re.DOTALL)
        for word in re.findall(r"'[^']*'|\"[^\"]*\"|\S+", found[2])
    ]
    if found[1] == "echo":
        return " ".join(words)
    written, *values = words
    said = iter(values)
    return re.sub(r"%-?\d*[sdbi]", lambda _: next(said, ""), _escaped(written))


# -- ways of filters --------------------------------------------------------------------------------------------------


def _reversed(text: str) -> Iterator[str]:
    if _REVERSED.search(text):
        yield text[::-1].replace("'", " ").replace('"', " ")


def _replaced(text: str) -> Iterator[str]:
    """What ``tr`` and ``sed s`` of plain characters make of it."""
    if _ROT13.search(text):
        yield codecs.encode(text, "rot13")
    for found in itertools.islice(_TRANSLATED.finditer(text), 4):
        old, new = (_ranges(next(filter(None, found.groups()[each : each + 3]))) for each in (0, 3))
        if old and new and not old.startswith("-"):
            yield text.translate(dict(zip(map(ord, old), new.ljust(len(old), new[-1]), strict=False)))
    for found in itertools.islice(_DELETED.finditer(text), 4):
        yield text.translate(dict.fromkeys(map(ord, _ranges(next(filter(None, found.groups()))))))
    for found in itertools.islice(_SUBSTITUTED.finditer(text), 4):
        yield text.replace(found[2], found[3])


def _ranges(said: str) -> str:
    """The characters that a set of ``tr`` stands for."""
    spelt = re.sub(r"(\w)-(\w)", lambda found: "".join(map(chr, range(ord(found[1]), ord(found[2]) + 1)))[:128], said)
    return spelt[:256]


# -- ways of codes ----------------------------------------------------------------------------------------------------


def _escapes(text: str) -> str:
    if _PERCENT.search(text):
        text = unquote(text, errors="replace")
    if "\\" not in text:
        return text
    text = _HEX.sub(lambda found: _characters(found[0], 16), text)
    text = _UNICODE.sub(lambda found: _characters(found[0].replace("\\u00", "\\x"), 16), text)
    return _OCTAL.sub(lambda found: _characters(found[0], 8), text)


def _characters(escapes: str, base: int) -> str:
    whole = "".join(chr(int(each, base) & 0xFF) for each in re.findall(r"\\x?([0-9a-fA-F]+)", escapes))
    return whole if base == 16 or whole.isprintable() else escapes


def _decoded(text: str) -> Iterator[str]:
    """Base64, base32, base85, hexadecimal and lists of character codes; packed or not."""
    for pattern, decode in _CODED:
        for found in itertools.islice(pattern.finditer(text), _TEXTS):
            plain = decode(found[found.lastindex or 0])
            if plain is not None:
                yield plain


def _unpacked(word: str) -> str | None:
    try:
        plain = base64.b64decode(
            word.rstrip("=").translate(_URL_SAFE) + "=" * (-len(word.rstrip("=")) % 4), validate=True
        )
    except (binascii.Error, ValueError):
        return None
    return _text(plain)


def _base32(word: str) -> str | None:
    try:
        return _text(base64.b32decode(word.rstrip("=") + "=" * (-len(word.rstrip("=")) % 8)))
    except (binascii.Error, ValueError):
        return None


def _base85(word: str) -> str | None:
    for decode in (base64.b85decode, base64.a85decode):
        try:
            plain = _text(decode(word))
        except ValueError:
            continue
        if plain is not None:
            return plain
    return None


def _hexadecimal(word: str) -> str | None:
    try:
        return _text(bytes.fromhex(re.sub(r"0x|[ :,]", "", word)))
    except ValueError:
        return None


def _codes(word: str) -> str | None:
    numbers = [int(each) for each in re.findall(r"\d+", word)]
    return _text(bytes(numbers)) if max(numbers) < 256 else None


def _text(plain: bytes) -> str | None:
    """Bytes as text, unpacked where they are packed; None: they are none, or could be by chance."""
    for begins, unpack in _PACKED:
        if plain.startswith(begins):
            try:
                plain = unpack(plain)[:_UNPACKED]
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError):
                return None
    if plain[1:2] == b"\0" and len(plain) % 2 == 0:  # PowerShell's
        plain = plain[::2]
    return plain.decode() if _readable(plain) else None


def _inflated(packed: bytes) -> bytes:
    return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(packed, _UNPACKED)


_PACKED: Final = (
    (b"\x1f\x8b", _inflated),
    (b"x\x9c", _inflated),
    (b"x\xda", _inflated),
    (b"x\x01", _inflated),
    (b"BZh", lambda packed: bz2.BZ2Decompressor().decompress(packed, _UNPACKED)),
    (b"\xfd7zXZ", lambda packed: lzma.LZMADecompressor().decompress(packed, _UNPACKED)),
)
_URL_SAFE: Final = str.maketrans("-_", "+/")
_CODED: Final[tuple[tuple[re.Pattern[str], Callable[[str], str | None]], ...]] = (
    (_BASE64, _unpacked),
    (_BASE32, _base32),
    (_BASE85, _base85),
    (_BARE_HEX, _hexadecimal),
    (_SPACED_HEX, _hexadecimal),
    (_CODES, _codes),
    (_CHR, _codes),
)


def _readable(plain: bytes) -> bool:
    """Whether bytes are text, and not by chance: any run of letters decodes to something."""
    try:
        text = plain.decode("ascii")
    except UnicodeDecodeError:
        return False
    if len(text) < 3 or not all(char.isprintable() or char in "\n\t\r" for char in text):
        return False
    if len(text) < 8:
        return text.isalpha()
    return bool(re.search(r"[ /.]", text)) or _BASE64.fullmatch(text.strip()) is not None  # encoded twice


# -- ways of other languages ------------------------------------------------------------------------------------------


def run_by_code(text: str) -> Iterator[str]:
    """What a program in another language has run, its strings in their order; and a package's scripts."""
    if "(" in text or "qw" in text or "exec" in text or "system" in text:
        for found in itertools.islice(_RUN_BY_CODE.finditer(text), _TEXTS):
            strings = _STRING.findall(found[1])
            yield " ".join(re.sub(r"\\(.)", r"\1", each) for string in strings for each in string if each)
    for found in itertools.islice(_SCRIPTS.finditer(text), 4):
        yield from (re.sub(r"\\(.)", r"\1", script[1]) for script in _SCRIPT.finditer(found[1]))
    for found in itertools.islice(_BACKTICKS.finditer(text), 4):
        yield found[1] or found[2]


def _normal(text: str) -> str:
    """Digits, letters and dots of other alphabets as a resolver would read them."""
    return text if text.isascii() else unicodedata.normalize("NFKC", text.translate(_DOTS))


_MAY_NAME: Final = re.compile(r"\balias\b|\(\)|\b(?:cp|mv|ln|install)\b")
_REWRITTEN: Final = tuple(map(_one, (_normal, _filled, _said_in_place, _spelt, _named, _escapes)))


def _rewritten(text: str) -> Iterator[str]:
    """Every rewriting after the other: of each by itself, and of some of them, there would be too many."""
    written = text
    for way in _REWRITTEN:
        written = next(way(written), written)
    if written != text:
        yield written


_WAYS: Final[tuple[Callable[[str], Iterator[str]], ...]] = (_rewritten, _reversed, _replaced, _decoded, run_by_code)
