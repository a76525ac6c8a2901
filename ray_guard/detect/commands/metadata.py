"""Commands that ask a cloud for the machine's credentials. Runs later, and live. Pure."""

from __future__ import annotations

import ipaddress
import re
from typing import Final

from ray_guard.detect import METADATA_ADDRESSES, Finding, Kind
from ray_guard.detect.commands.line import HOSTS, Line, canonical, host_of

_ADDRESSES: Final = frozenset(map(ipaddress.ip_address, METADATA_ADDRESSES))
_WRITTEN: Final = tuple(map(str, _ADDRESSES))
_NAMES: Final = re.compile(
    r"(?i)metadata\.google\.internal|\bmetadata\.goog\b|metadata\.azure\.(?:internal|com)|instance-data\.ec2\.internal|metadata\.tencentyun\.com|"
    r"169-254-169-254|//(?:metadata|instance-data)(?=[/:\s'\"]|$)|\$\{?(?:IDENTITY_ENDPOINT|MSI_ENDPOINT|ECS_CONTAINER_METADATA_URI|AWS_CONTAINER_CREDENTIALS_)|/latest/meta-data|"
    r"/latest/api/token|computeMetadata/v1|/metadata/(?:instance|identity/oauth2/token)\?|/opc/v[12]/instance|"
    r"X-aws-ec2-metadata-token|Metadata-Flavor:\s*Google|\bInstanceMetadata(?:Fetcher|Provider)\b|\bIMDSFetcher\b"
)
_PUT_TOGETHER: Final = re.compile(r"(?<![\d.])169\D{1,8}254\D{1,8}169\D{1,8}254(?![\d.]*\d)")
_WILDCARD_NAME: Final = re.compile(r"(?i)\b(?:0x)?(?:a9-?fe-?a9-?fe|2852039166)\.(?:[\w-]+\.)+[a-z]{2,}")
_PROGRAMS: Final = frozenset(("ec2-metadata", "ec2metadata", "ec2-metadata.sh"))


def in_text(line: Line) -> Finding | None:
    """Its names and addresses, in any form."""
    if line.only_read:
        return None
    if _NAMES.search(line.text) or any(command.name in _PROGRAMS for command in line.commands):
        return Finding(Kind.METADATA, "metadata.name")
    if (
        _PUT_TOGETHER.search(line.text)
        or _WILDCARD_NAME.search(line.text)
        or any(each in line.text for each in _WRITTEN)
    ):
        return Finding(Kind.METADATA, "metadata.address")
    words = [*HOSTS.findall(line.text), *(word for command in line.commands for word in command.arguments)]
    for word in dict.fromkeys(words):
        bare = host_of(word) if "://" in word else word.rpartition("@")[2].partition("/")[0]
        if bare[:1] != "[" and bare.count(":") == 1:
            bare = bare.partition(":")[0]
        if canonical(bare) in _ADDRESSES:
            return Finding(Kind.METADATA, "metadata.address")
    return None
