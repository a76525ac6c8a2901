"""Log formats, a module each. Runs later, on any machine.

:data:`FORMATS` is where a new one is entered; :mod:`~ray_guard.attribution.sources.reader` does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, Protocol

from ray_guard.attribution.observation import Observation
from ray_guard.attribution.sources.alibaba_firewall import AlibabaFirewall
from ray_guard.attribution.sources.aws_firewall import AwsFirewall
from ray_guard.attribution.sources.aws_vpc import AwsVpc
from ray_guard.attribution.sources.azure_flow import AzureFlow
from ray_guard.attribution.sources.falco import Falco
from ray_guard.attribution.sources.fortigate import Fortigate
from ray_guard.attribution.sources.gcp_vpc import GcpVpc
from ray_guard.attribution.sources.hubble import Hubble
from ray_guard.attribution.sources.line import Line
from ray_guard.attribution.sources.nftables import Nftables
from ray_guard.attribution.sources.panos import Panos
from ray_guard.attribution.sources.suricata import Suricata
from ray_guard.attribution.sources.tetragon import Tetragon
from ray_guard.attribution.sources.zeek import Zeek


class Source(Protocol):
    """One format. An object lives as long as one file: it may remember a header."""

    format: str

    def recognises(self, line: Line) -> bool:
        """Whether the line is of this format. Raises :class:`~…line.Unusable` for what is no text."""

    def read(self, line: Line) -> list[Observation]:
        """The records in a line; none for a header or for what is not about traffic.

        Raises:
            Unusable: the line is damaged.
            Partly: some of its records are.
            BadTime: its time is none.
        """


#: In the order they are asked in: the envelopes first, those that share names with others last.
FORMATS: Final[Mapping[str, Callable[[], Source]]] = MappingProxyType(
    {
        kind.format: kind
        for kind in (
            AwsFirewall,
            Suricata,
            Tetragon,
            Hubble,
            Falco,
            GcpVpc,
            AzureFlow,
            AlibabaFirewall,
            Nftables,
            Fortigate,
            Panos,
            Zeek,
            AwsVpc,
        )
    }
)
