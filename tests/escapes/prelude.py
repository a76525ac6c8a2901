# ruff: noqa: F401 - what the programs that follow it use
# Prepended to every attack program. Standard library only, and no site-packages: it must start fast.
import array
import ctypes
import errno
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

print('{"started": true}', flush=True)  # from here on it is the sandbox that stops it, not a missing interpreter
A = json.loads(sys.argv[1])
TOKEN = A["token"].encode()
AF_INET, AF_INET6, AF_UNIX = socket.AF_INET, socket.AF_INET6, socket.AF_UNIX
STREAM, DGRAM, SEQPACKET, RAW = socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET, socket.SOCK_RAW
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def call(number, *arguments):
    """A raw system call; raises OSError."""
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = libc.syscall(ctypes.c_long(number), *converted)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def sockaddr(host, port):
    if ":" in host:
        return struct.pack("=H", AF_INET6) + struct.pack(">HI", port, 0) + socket.inet_pton(AF_INET6, host) + bytes(4)
    return struct.pack("=H", AF_INET) + struct.pack(">H", port) + socket.inet_pton(AF_INET, host) + bytes(8)


class IOVec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class MsgHdr(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("namelen", ctypes.c_uint),
        ("iov", ctypes.POINTER(IOVec)),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_char_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    ]


class MMsgHdr(ctypes.Structure):
    _fields_ = [("header", MsgHdr), ("length", ctypes.c_uint)]


KEEP = []


def message(data, name=b"", control=b""):
    buffer = ctypes.create_string_buffer(data, len(data))
    vector = IOVec(ctypes.addressof(buffer), len(data))
    header = MsgHdr(name or None, len(name), ctypes.pointer(vector), 1, control or None, len(control), 0)
    KEEP.append((buffer, vector, header))
    return header


def connect(family, kind, address, protocol=0):
    with socket.socket(family, kind, protocol) as sock:
        sock.connect(address)
        sock.sendall(TOKEN)


def missing(reason):
    print(json.dumps({"missing": str(reason)}), flush=True)
    os._exit(0)


def say(**what):
    print(json.dumps(what), flush=True)


def finish(main):
    try:
        main()
        say(done=True)
    except OSError as error:
        number = (
            errno.ETIMEDOUT if isinstance(error, TimeoutError) else error.errno
        )  # a socket's own limit has no number
        say(errno=errno.errorcode.get(number, str(number)), text=str(error))
