"""Recognises what an agent should not do: by command lines, first payload bytes and DNS names.

Runs later, and live in the judge. Pure. :class:`Finding` is the answer; :mod:`.commands`, :mod:`.payloads` and
:mod:`.flows` ask for it, :mod:`.sigma` adds other people's rules.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, NamedTuple

METADATA_ADDRESSES: Final = frozenset(
    (
        *("169.254.169.254", "169.254.170.2", "169.254.170.23", "169.254.42.42", "100.100.100.200", "192.0.0.192"),
        *("fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254"),
    )
)
"""Where clouds tell a machine of its own credentials (AWS, ECS, EKS, Scaleway, Alibaba, Oracle, Google)."""


class Kind(StrEnum):
    REVERSE_TUNNEL = "reverse_tunnel"
    MINING = "mining"
    PROBING = "probing"
    METADATA = "metadata"
    DNS_TUNNEL = "dns_tunnel"
    EXFILTRATION = "exfiltration"
    REVERSE_SHELL = "reverse_shell"


OTHER: Final = "other"
"""In place of a kind: of what a rule of other people's finds that is of none of these."""
UNJUDGED: Final = "unjudged"
"""In place of a kind: of what nobody could judge."""


class Finding(NamedTuple):
    """What was recognised, and by which rule (``ssh.remote_forward``, a Sigma rule's id)."""

    kind: Kind
    rule: str
