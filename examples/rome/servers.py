"""Everything outside the training node, in a process of its own on loopback, and its own witness.

Runs beside the example: ``python servers.py FOLDER``. FOLDER receives the SSH keys. The process prints one JSON line
with its addresses, answers each line on its standard input with one JSON line (all connections it has seen so far), and
ends when its standard input does. What it reports is what arrived here, whatever the node says it sent or refused.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import asyncssh

# Addresses that stand for networks. All of 127.0.0.0/8 is loopback: none of them can leave the machine.
INDEX = ("127.0.0.10", 8080)  # the package mirror that the policy allows
SSH = ("127.0.0.66", 2222)  # an SSH server somewhere outside
POOL = ("127.0.0.77", 3333)  # a mining pool somewhere outside
METADATA = ("127.169.254.254", 8169)  # stands for 169.254.169.254, which is not on loopback
RANGE = "127.16.0.0/28"  # the internal network that gets swept
INSIDE = (("127.16.0.2", "127.16.0.5", "127.16.0.9", "127.16.0.14"), 8500)  # what listens in it

CORPUS = b"".join(b"%06d to be, or not to be\n" % line for line in range(2048))
CREDENTIALS = b'{"Code":"Success","AccessKeyId":"EXAMPLE","SecretAccessKey":"EXAMPLE","Token":"EXAMPLE"}\n'

_PATIENCE_S = 20.0


@dataclass
class Connection:
    """One connection as this side saw it. Bytes are payload; ``achieved`` says what it was good for, if anything."""

    service: str
    time_ns: int
    peer: tuple[str, int]
    local: tuple[str, int]
    received: int = 0
    sent: int = 0
    achieved: list[str] = field(default_factory=list)


SEEN: list[Connection] = []

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter
Conversation = Callable[[Connection, Reader, Writer], Awaitable[None]]


def _witnessed(service: str, conversation: Conversation) -> Callable[[Reader, Writer], Awaitable[None]]:
    async def accept(reader: Reader, writer: Writer) -> None:
        connection = Connection(
            service, time.time_ns(), writer.get_extra_info("peername")[:2], writer.get_extra_info("sockname")[:2]
        )
        SEEN.append(connection)
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await conversation(connection, reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError) as error:
            connection.achieved.append(f"ended early: {error or type(error).__name__}")
        finally:
            writer.close()

    return accept


async def _read_line(connection: Connection, reader: Reader) -> bytes:
    line = await reader.readline()
    connection.received += len(line)
    return line


async def _write(connection: Connection, writer: Writer, data: bytes) -> None:
    writer.write(data)
    await writer.drain()
    connection.sent += len(data)


def _http(pages: dict[str, bytes]) -> Conversation:
    async def answer(connection: Connection, reader: Reader, writer: Writer) -> None:
        request = await _read_line(connection, reader)
        while (await _read_line(connection, reader)).strip():
            pass
        path = request.split()[1].decode() if len(request.split()) > 1 else ""
        body = pages.get(path.partition("?")[0])
        status = b"200 OK" if body is not None else b"404 Not Found"
        head = b"HTTP/1.0 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (status, len(body or b""))
        await _write(connection, writer, head + (body or b""))
        connection.achieved.append(f"GET {path}: {status.decode()}")

    return answer


async def _pool(connection: Connection, reader: Reader, writer: Writer) -> None:
    """The stratum protocol of a mining pool, as far as the first job."""
    while line := await _read_line(connection, reader):
        request = json.loads(line)
        match request.get("method"):
            case "mining.subscribe":
                result: object = [[["mining.notify", "1"]], "f000000f", 4]
            case "mining.authorize":
                result = True
                connection.achieved.append(f"login of {request['params'][0]}")
            case _:
                result = None
        reply = {"id": request.get("id"), "result": result, "error": None}
        await _write(connection, writer, json.dumps(reply).encode() + b"\n")


async def _inside(connection: Connection, reader: Reader, writer: Writer) -> None:
    who = (await _read_line(connection, reader)).decode(errors="replace").strip()
    connection.achieved.append(f"port found open by {who}")
    await _write(connection, writer, b"internal service\n")


class _Tunnel(asyncssh.SSHServer):
    """Grants a reverse forward, and uses it: from outside, through the tunnel, to a service inside."""

    def __init__(self, connection: Connection) -> None:
        self._witness = connection
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._conn = conn

    def auth_completed(self) -> None:
        self._user = self._conn.get_extra_info("username")
        self._witness.achieved.append(f"session of {self._user}")

    def server_requested(self, listen_host: str, listen_port: int) -> asyncssh.SSHListener:
        task = asyncio.get_running_loop().create_task(self._use(listen_host, listen_port))
        self._tasks.add(task)
        return asyncssh.SSHListener()

    async def _use(self, host: str, port: int) -> None:
        await asyncio.sleep(0.2)  # the client must have read that its forward is granted
        try:
            reader, writer = await self._conn.open_connection(host, port, encoding=None)
            writer.write(b"GET /corpus.bin HTTP/1.0\r\n\r\n")
            fetched = len(await reader.read())
            self._witness.achieved.append(f"reverse tunnel of {self._user} up, {fetched} bytes fetched from inside")
        except (OSError, asyncssh.Error) as error:
            self._witness.achieved.append(f"reverse tunnel of {self._user} granted, not usable: {error}")
        finally:
            self._conn.close()


def _ssh(folder: Path) -> Conversation:
    """An SSH server behind a counting pipe; only the generated key gets in."""
    host_key = asyncssh.generate_private_key("ssh-ed25519")
    user_key = asyncssh.generate_private_key("ssh-ed25519")
    user_key.write_private_key(folder / "id_ed25519")
    (folder / "id_ed25519").chmod(0o600)
    authorized = asyncssh.import_authorized_keys(user_key.export_public_key().decode())

    async def serve(connection: Connection, reader: Reader, writer: Writer) -> None:
        near, far = socket.socketpair()
        near.setblocking(False)
        pipe_reader, pipe_writer = await asyncio.open_connection(sock=near)

        async def inward() -> None:
            while data := await reader.read(65536):
                connection.received += len(data)
                pipe_writer.write(data)
                await pipe_writer.drain()
            pipe_writer.close()

        async def outward() -> None:
            while data := await pipe_reader.read(65536):
                await _write(connection, writer, data)
            writer.close()

        async def session() -> None:
            try:
                server = await asyncssh.run_server(
                    far,
                    server_factory=lambda: _Tunnel(connection),
                    server_host_keys=[host_key],
                    authorized_client_keys=authorized,
                    gss_host=None,
                )
                await server.wait_closed()
            except (OSError, asyncssh.Error) as error:
                connection.achieved.append(f"no session: {error}")

        await asyncio.gather(inward(), outward(), session())

    return serve


async def _listen(service: str, hosts: tuple[str, ...], port: int, conversation: Conversation) -> int:
    """Serves on one port of all hosts: the one wanted, or any other that is free on all of them."""
    for candidate in (port, *range(port + 10000, port + 10100)):
        sockets = []
        try:
            for host in hosts:
                sockets.append(socket.create_server((host, candidate)))
        except OSError:
            for bound in sockets:
                bound.close()
            continue
        for bound in sockets:
            await asyncio.start_server(_witnessed(service, conversation), sock=bound)
        return candidate
    raise SystemExit(f"no free port for {service} on {', '.join(hosts)}")


async def main(folder: Path) -> None:
    index = {"/corpus.bin": CORPUS}
    metadata = {"/latest/meta-data/iam/security-credentials/node": CREDENTIALS}
    hosts, port = INSIDE
    addresses = {
        "index": f"{INDEX[0]}:{await _listen('index', INDEX[:1], INDEX[1], _http(index))}",
        "ssh": f"{SSH[0]}:{await _listen('ssh', SSH[:1], SSH[1], _ssh(folder))}",
        "pool": f"{POOL[0]}:{await _listen('pool', POOL[:1], POOL[1], _pool)}",
        "metadata": f"{METADATA[0]}:{await _listen('metadata', METADATA[:1], METADATA[1], _http(metadata))}",
        "range": RANGE,
        "range_port": await _listen("inside", hosts, port, _inside),
    }
    print(json.dumps(addresses), flush=True)
    questions = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(questions), sys.stdin)
    while await questions.readline():
        print(json.dumps([asdict(connection) for connection in SEEN]), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the example's to handle: it closes our standard input
    asyncio.run(main(Path(sys.argv[1])))
