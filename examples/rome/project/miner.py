"""Logs in at a mining pool: miner.py stratum+tcp://HOST:PORT USER."""

import json
import socket
import sys
from urllib.parse import urlsplit

pool = urlsplit(sys.argv[1])
with socket.create_connection((pool.hostname, pool.port), timeout=5) as connection:
    lines = connection.makefile("rw")
    for number, (method, parameters) in enumerate(
        [("mining.subscribe", ["xmrig/6.21"]), ("mining.authorize", [sys.argv[2], "x"])], start=1
    ):
        print(json.dumps({"id": number, "method": method, "params": parameters}), file=lines, flush=True)
        print(lines.readline(), end="")
