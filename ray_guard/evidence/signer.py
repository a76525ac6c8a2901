"""The helper that holds a log's private key and signs its checkpoints: a process of its own, under the supervisor.

Runs in the signer, a child of the zygote: it loads ``cryptography``, which the supervisor does not. The key is made
here, never leaves this process, and ends with it. The process is forked from one that is not dumpable, and never
executes another program, so there is no moment at which a process of the same user could open its memory or trace it
(one with CAP_SYS_PTRACE can). Messages are those of :mod:`ray_guard.kernel.seqpacket`:

    signer → supervisor   ready {public}            base64
    supervisor → signer   sign {id, text}
    signer → supervisor   signed {id, signature}    base64
"""

from __future__ import annotations

import base64
import ctypes
import os
import resource
import socket
from typing import NoReturn

from ray_guard.kernel import libc, seqpacket


def run(line: socket.socket) -> NoReturn:
    """The signer's life, until the supervisor hangs up."""
    libc.prctl(libc.PR_SET_DUMPABLE, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    name = ctypes.create_string_buffer(b"ray-guard-seal")
    libc.prctl(libc.PR_SET_NAME, ctypes.addressof(name))
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    public = base64.b64encode(key.public_key().public_bytes_raw()).decode()
    try:
        seqpacket.send(line, {"op": "ready", "public": public})
        while (received := seqpacket.receive(line)) is not None:
            message, descriptors = received
            seqpacket.close_all(descriptors)
            signature = base64.b64encode(key.sign(str(message["text"]).encode())).decode()
            seqpacket.send(line, {"op": "signed", "id": message["id"], "signature": signature})
    except ConnectionError:
        pass  # the supervisor is gone
    os._exit(0)
