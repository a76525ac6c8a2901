"""Knocks at one port of every address of a network: scan.py NETWORK PORT GREETING."""

import ipaddress
import socket
import sys

network, port, greeting = sys.argv[1:]
for address in ipaddress.ip_network(network).hosts():
    try:
        with socket.create_connection((str(address), int(port)), timeout=2) as connection:
            connection.sendall(greeting.encode() + b"\n")
            print(address, connection.recv(100).decode().strip())
    except OSError as error:
        print(address, error, file=sys.stderr)
