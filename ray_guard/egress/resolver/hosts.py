"""The hosts file: names that no program asks a name server for. Pure; runs in the supervisor."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from ray_guard.named import NamedTuple
from ray_guard.policy.destination import canonical_address, canonical_name

_NOTHING: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType({})


class Hosts(NamedTuple):
    """Canonical addresses by canonical name, and names by address, both in the file's order."""

    addresses: Mapping[str, tuple[str, ...]] = _NOTHING
    names: Mapping[str, tuple[str, ...]] = _NOTHING

    @classmethod
    def parse(cls, text: str) -> Hosts:
        """What ``text`` says. Lines and names that say nothing usable are passed over, as the C library does."""
        addresses: dict[str, dict[str, None]] = {}
        names: dict[str, dict[str, None]] = {}
        for line in text.splitlines():
            words = line.partition("#")[0].split()
            try:
                address = canonical_address(words[0]) if words else ""
            except ValueError:
                continue
            for word in words[1:]:
                try:
                    name = canonical_name(word.removesuffix("."))
                except ValueError:
                    continue
                addresses.setdefault(name, {})[address] = None
                names.setdefault(address, {})[name] = None
        return cls(
            {name: tuple(found) for name, found in addresses.items()},
            {address: tuple(found) for address, found in names.items()},
        )
