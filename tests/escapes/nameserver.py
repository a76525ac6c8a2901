"""A small DNS server on loopback, the name server of a confined host: what reaches it is in its log."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

Zone = Mapping[tuple[str, str], tuple[str, ...]]


class NameServer:
    """Answers from ``zone``: (name, type) → values; a name with a CNAME alone is followed. Port 53: needs root.

    Args:
        address: of 127.0.0.0/8, to listen at.
        zone: names without their trailing dot.
        ttl: seconds, of every answer.
    """

    def __init__(self, address: str, zone: Zone, ttl: int = 60) -> None:
        self.address = address
        self.zone = dict(zone)
        self.ttl = ttl
        self.log: list[tuple[str, str, str]] = []
        """(transport, name, type) of every query."""
        self.raw: list[bytes] = []
        self._datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._datagrams.bind((address, 53))
        self._streams = socket.create_server((address, 53))
        for serve in (self._serve_datagrams, self._serve_streams):
            threading.Thread(target=serve, daemon=True).start()

    def _serve_datagrams(self) -> None:
        while True:
            try:
                data, source = self._datagrams.recvfrom(4096)
            except OSError:
                return
            reply = self._answer(data, "udp")
            if reply is not None:
                self._datagrams.sendto(reply, source)

    def _serve_streams(self) -> None:
        while True:
            try:
                accepted, _ = self._streams.accept()
            except OSError:
                return
            with accepted, accepted.makefile("rb") as file, contextlib.suppress(OSError):
                while len(head := file.read(2)) == 2:
                    reply = self._answer(file.read(int.from_bytes(head, "big")), "tcp")
                    if reply is not None:
                        accepted.sendall(len(reply).to_bytes(2, "big") + reply)

    def _answer(self, data: bytes, transport: str) -> bytes | None:
        self.raw.append(data)
        try:
            query = dns.message.from_wire(data)
            asked = query.question[0]
        except Exception:  # noqa: BLE001 - a tunnel need not speak DNS
            return None
        name, kind = asked.name.to_text(omit_final_dot=True), dns.rdatatype.to_text(asked.rdtype)
        self.log.append((transport, name, kind))
        reply = dns.message.make_response(query, recursion_available=True)
        owner = name.lower()
        while (alias := self.zone.get((owner, "CNAME"))) is not None:
            reply.answer.append(dns.rrset.from_text(owner + ".", self.ttl, "IN", "CNAME", alias[0] + "."))
            owner = alias[0]
        values = self.zone.get((owner, kind), ())
        if values:
            reply.answer.append(dns.rrset.from_text(owner + ".", self.ttl, "IN", kind, *values))
        elif not any(known == owner for known, _ in self.zone):
            reply.set_rcode(dns.rcode.NXDOMAIN)
        wire = reply.to_wire()
        if transport == "udp" and len(wire) > 1232:
            short = dns.message.make_response(query, recursion_available=True)
            short.flags |= dns.flags.TC
            wire = short.to_wire()
        return wire

    def asked(self, name: str) -> bool:
        return any(name.lower() == asked.lower() for _, asked, _ in self.log)

    def close(self) -> None:
        for sock in (self._datagrams, self._streams):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            sock.close()


def use(prefix: list[str], folder: Path, *, resolv_conf: str, hosts: str | None = None) -> None:
    """Makes these the ``/etc/resolv.conf`` and ``/etc/hosts`` of the mount namespace that ``prefix`` enters."""
    for text, path in ((resolv_conf, "/etc/resolv.conf"), (hosts, "/etc/hosts")):
        if text is not None:
            source = folder / Path(path).name
            source.write_text(text)
            subprocess.run([*prefix, "mount", "--bind", str(source), path], check=True)
