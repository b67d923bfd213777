# SPDX-License-Identifier: Apache-2.0
"""Which hosts may be asked for pictures (`--image-hosts`), and at which addresses."""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self


Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?)*")
PORT = re.compile(r"(?P<host>\[[^\]]+\]|[^:]+):(?P<port>[0-9]{1,5})")
LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))
NAT64 = ipaddress.ip_network("64:ff9b::/96")
USUAL_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class ImageHosts:
    """A list of hosts that may be asked.

    Args:
        names: of hosts, each with its port, or with `None` for the usual ones of `http` and `https`.
        networks: of addresses, in the same way; only these may be private, link-local or of this machine.
    """

    names: frozenset[tuple[str, int | None]] = frozenset()
    networks: tuple[tuple[Network, int | None], ...] = ()

    @classmethod
    def from_entries(cls, entries: Iterable[str]) -> Self:
        """
        Reads `HOST`, `HOST:PORT`, `ADDRESS`, `[ADDRESS]:PORT` and `NETWORK/BITS`.

        Raises:
            ValueError: an entry is none of these; a pattern or a whole address of the web is none.
        """
        names, networks = set(), []
        for entry in entries:
            host, port = entry.strip().lower(), None
            if parts := PORT.fullmatch(host):
                host, port = parts["host"], int(parts["port"])
            try:
                networks.append((ipaddress.ip_network(host.strip("[]")), port))
                continue
            except ValueError:
                pass
            # digits and dots that are no address would be read as one by some resolvers
            if not NAME.fullmatch(host) or host.rpartition(".")[2].isdigit() or (port or 1) > 65535 or port == 0:
                raise ValueError(
                    f"--image-hosts: {entry!r} must be the name of a host, an address or a network, each with a port "
                    "or without, such as pictures.example.org, 10.0.0.7:8080 or 10.0.0.0/8."
                )
            names.add((host, port))
            if host == "localhost":
                networks += [(network, port) for network in LOOPBACK]
        return cls(frozenset(names), tuple(networks))

    def __bool__(self) -> bool:
        return bool(self.names or self.networks)

    def may_ask(self, host: str, port: int, scheme: str) -> bool:
        """Whether a request may name this host at this port."""
        ports = (port, None) if port == USUAL_PORTS[scheme] else (port,)
        address = _address(host)
        if address is None:
            return any((host.lower(), one) in self.names for one in ports)
        return self._names_address(address, ports)

    def may_connect(self, address: str, port: int, scheme: str) -> bool:
        """Whether a host may be at this address: a public one, or one that is named itself."""
        ip = _address(address)
        if ip is None:
            return False
        if all(map(_is_public, (ip, *_inner_addresses(ip)))):
            return True
        ports = (port, None) if port == USUAL_PORTS[scheme] else (port,)
        return self._names_address(ip, ports)

    def _names_address(self, address: Address, ports: tuple) -> bool:
        return any(
            port in ports and address.version == network.version and address in network
            for network, port in self.networks
        )


def _address(host: str) -> Address | None:
    try:
        # a scope is of one interface of this machine
        return ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return None


def _inner_addresses(address: Address) -> list[Address]:
    """Those of IPv4 that one of IPv6 leads to: mapped, 6to4, Teredo and NAT64."""
    if address.version == 4:
        return []
    inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if address in NAT64:
        inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return [one for one in inner if one is not None]


def _is_public(address: Address) -> bool:
    return address.is_global and not address.is_multicast and not address.is_reserved
