"""Starting the resolver's helper, and trying whether it works on this host. Runs in the supervisor, and for doctor."""

from __future__ import annotations

import base64
import socket
import subprocess
import sys
from typing import Any, Final, NamedTuple

from ray_guard.kernel import seqpacket

CONF_LIMIT: Final = 1 << 14
"""Bytes of resolv.conf that are read."""
_PATIENCE_S: Final = 10.0
_END_S: Final = 0.2
_BOOT: Final = "import sys\nsys.path[:] = {path!r}\nfrom ray_guard.egress.resolver.helper import main\nmain()\n"
_ID: Final = b"\x52\x47"
_TRIAL: Final = _ID + b"\x01\0\0\1" + bytes(6) + b"\5trial\7invalid\0\0\1\0\1"
"""Asks for the address of ``trial.invalid``."""


class Helper(NamedTuple):
    """The running helper (:mod:`ray_guard.egress.resolver.helper`) and the line to it."""

    process: subprocess.Popen[bytes]
    line: socket.socket

    def end(self) -> None:
        """Hangs up, and waits until it has ended; one that does not within a moment is killed."""
        self.line.close()
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def start(resolv_conf: str) -> Helper:
    """Starts it.

    Like the supervisor: without start-up files and variables, with the packages that its starter has.

    Args:
        resolv_conf: the text of that file; the helper asks the name servers in it.

    Raises:
        OSError: it cannot be started.
    """
    line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with theirs:
            argv = [sys.executable, "-S", "-E", "-c", _BOOT.format(path=sys.path), str(theirs.fileno())]
            helper = subprocess.Popen(argv, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, cwd="/")
        seqpacket.send(line, {"resolv_conf": resolv_conf[:CONF_LIMIT]})
    except BaseException:
        line.close()
        raise
    return Helper(helper, line)


def probe() -> str:
    """Has a helper refuse a name, asking nobody; says what it would ask.

    Raises:
        OSError, ValueError: it does not work, and why.
    """
    with open("/etc/resolv.conf", encoding="utf-8", errors="replace") as file:
        conf = file.read(CONF_LIMIT)
    helper = start(conf)
    line = helper.line
    try:
        line.settimeout(_PATIENCE_S)
        _hear(line, "ready")
        seqpacket.send(line, {"op": "read", "id": 1, "message": base64.b64encode(_TRIAL).decode()})
        asked = _hear(line, "question")
        if (asked["name"], asked["type"]) != ("trial.invalid", "A"):
            raise ValueError(f"it took a question for {asked}")
        seqpacket.send(line, {"op": "answer", "id": 1, "rcode": "NXDOMAIN", "addresses": [], "datagram": True})
        said = base64.b64decode(_hear(line, "answer")["message"])
        if said[:2] != _ID or said[3] & 0xF != 3:
            raise ValueError(f"it answered {said!r}")
    finally:
        helper.end()
    servers = [words[1] for words in map(str.split, conf.splitlines()) if words[:1] == ["nameserver"] and words[1:]]
    return f"listed names are asked of {', '.join(servers) or '127.0.0.1'}; all others do not exist"


def _hear(line: socket.socket, operation: str) -> dict[str, Any]:
    received = seqpacket.receive(line)
    if received is None:
        raise ValueError("the resolver ended: is dnspython installed?")
    message, descriptors = received
    seqpacket.close_all(descriptors)
    if message.get("op") != operation:
        raise ValueError(f"the resolver said {message!r:.200}, not {operation}")
    return message
