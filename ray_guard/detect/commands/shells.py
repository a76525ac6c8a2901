"""Commands that hand a shell to the far side. Runs later, and live. Pure."""

from __future__ import annotations

import re
from typing import Final

from ray_guard.detect import Finding, Kind
from ray_guard.detect.commands.line import Line
from ray_guard.detect.shell import NETCATS, READERS, Command
from ray_guard.detect.wrappers import SHELLS

_DEVICE: Final = re.compile(r"/dev/(?:tcp|udp)/([\w.$\{\}-]+)/([\w$\{\}-]+)")
_ATTACHED: Final = re.compile(
    r"\b(?:ba|z|da|k)?sh\s+(?:-i\b|[0-2]?[<>]&)|0>&1|0<&\d+|>&\s*/dev/(?:tcp|udp)/|"
    r"\bread\b[^|]{0,200}\bdo\s+(?:eval\b|\"?\$|(?:ba|da|z)?sh\b)|\b(?:ba|z|da|k)?sh\s+[^|;&\n]{0,40}[0-9]?<&\s*\d"
)
_GIVEN: Final = re.compile(r"(?:/\S*/)?(?:ba|da|z|k|a)?sh(?P<whole> -i)?")
_PEER: Final = re.compile(r"[\w-]+(?:\.[\w-]+)+ \d{2,5}")
_PEER_OR_PORT: Final = re.compile(r"(?:[\w.-]+ )?\d{2,5}")
_LISTENERS: Final = frozenset("pwncat pwncat-cs rcat rustcat sliver-client villain weevely".split())


def in_text(line: Line) -> Finding | None:
    """A shell on ``/dev/tcp``."""
    if _DEVICE.search(line.text) and _ATTACHED.search(line.text) and not (line.only_read and not _put_to_use(line)):
        return Finding(Kind.REVERSE_SHELL, "shell.dev_tcp")
    return None


def _put_to_use(line: Line) -> bool:
    """What is only echoed goes to where a shell starts it."""
    return re.search(r">\s*\S*(?:rc|profile|crontab|cron\.\w+/\S+|\.sh|\.service)\b", line.text) is not None


def by_program(command: Command, line: Line) -> Finding | None:
    """Shells whose input or output is a connection."""
    text = " ".join(command.arguments)
    if command.name in SHELLS and any("/dev/tcp/" in each or "/dev/udp/" in each for each in command.redirects):
        return Finding(Kind.REVERSE_SHELL, "shell.dev_tcp")
    executes = re.search(r"(?:^|\s)(?:-\w*[ec]|--exec|--sh-exec)[= ]\s*(.*)", text)
    shell = executes and re.match(r"\S*\b(?:ba|da|z|k|a)?sh\b|cmd|powershell", executes[1])
    # A renamed netcat keeps its arguments: host, port, -e and a shell
    connects = command.name in NETCATS or re.search(r"(?:^|\s)(?=\S*[.\w])[\w.-]+ \d{2,5}(?:\s|$)", text)
    if shell and connects and command.name not in READERS:
        return Finding(Kind.REVERSE_SHELL, "shell.nc_exec")
    source = command.piped_from
    answered = any(each.partition(">")[2] in line.named_pipes for each in command.redirects)
    listens = re.search(r"(?:^|\s)-\w*l", text)
    if _is_shell(source) and command.name in NETCATS and not (listens and not answered):
        return Finding(Kind.REVERSE_SHELL, "shell.nc_pipe")
    if _is_shell(source) and _connects(command):
        return Finding(Kind.REVERSE_SHELL, "shell.pipe")
    if _is_shell(command) and source is not None and (_connects(source) or source.name in NETCATS):
        return Finding(Kind.REVERSE_SHELL, "shell.nc_pipe")
    if command.name not in READERS and _is_given_shell(command):
        return Finding(Kind.REVERSE_SHELL, "shell.handed")
    if command.name == "msfvenom" and ("reverse" in text or "bind" in text):
        return Finding(Kind.REVERSE_SHELL, "shell.msfvenom")
    if command.name in ("awk", "gawk") and "/inet/tcp/" in text:
        return Finding(Kind.REVERSE_SHELL, "shell.awk")
    if command.name in _LISTENERS and text not in ("--help", "-h", "--version"):
        return Finding(Kind.REVERSE_SHELL, "shell.listener")
    if command.name == "xterm" and re.search(r"-display\s+\d+\.\d+\.\d+\.\d+:", text):
        return Finding(Kind.REVERSE_SHELL, "shell.xterm")
    if re.search(r"(?i)(?:tcp|openssl)[46]?(?:-listen|-l):", text) and re.search(
        r"(?i)\b(?:exec|system):['\"]?\S*sh\b", text
    ):
        return Finding(Kind.REVERSE_SHELL, "shell.socat")
    return None


def _is_given_shell(command: Command) -> bool:
    """Whether a program of any name has a shell in its arguments, and a host and a port behind it."""
    for at, word in enumerate(command.arguments):
        shell = _GIVEN.fullmatch(word)
        peer = _PEER if shell and not shell["whole"] else _PEER_OR_PORT
        if shell and peer.fullmatch(" ".join(command.arguments[at + 1 : at + 3])):
            return True
    return False


def _is_shell(command: Command | None) -> bool:
    """Whether that is a shell that is told by its input what to do."""
    return command is not None and command.name in SHELLS and "-c" not in command.arguments


def _connects(command: Command) -> bool:
    return (
        command.name in ("telnet", "socat")
        or (command.name == "openssl" and "s_client" in command.arguments)
        or (command.name == "curl" and any(word.startswith("telnet://") for word in command.arguments))
    )
