# SPDX-License-Identifier: Apache-2.0
"""Images of the web: which hosts and addresses may be asked (`--image-hosts`), and their download."""

import asyncio
import ipaddress
import logging
import re
import socket
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import httpx

from ...errors_moma import InputError
from .errors import RequestError
from .limits import DOWNLOAD_SECONDS, DOWNLOADS, MAX_DOWNLOAD_BYTES, MAX_REDIRECTS, WAITING_DOWNLOADS


logger = logging.getLogger("uvicorn.error")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?)*")
PORT = re.compile(r"(?P<host>\[[^\]]+\]|[^:]+):(?P<port>[0-9]{1,5})")
LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))
NAT64 = ipaddress.ip_network("64:ff9b::/96")
USUAL_PORTS = {"http": 80, "https": 443}
NOT_FETCHED = "it could not be fetched; the log of the server says why."


@dataclass(frozen=True)
class ImageHosts:
    """A list of hosts that may be asked.

    Args:
        names (`frozenset[tuple[str, int | None]]`, *optional*, defaults to `frozenset()`):
            of hosts, each with its port, or with `None` for the usual ones of `http` and `https`.
        networks (`tuple[tuple[Network, int | None], ...]`, *optional*, defaults to `()`):
            of addresses, in the same way; only these may be private, link-local or of this machine.
    """

    names: frozenset[tuple[str, int | None]] = frozenset()
    networks: tuple[tuple[Network, int | None], ...] = ()

    @classmethod
    def from_entries(cls, entries: Iterable[str]) -> Self:
        """Read `HOST`, `HOST:PORT`, `ADDRESS`, `[ADDRESS]:PORT` and `NETWORK/BITS`.

        Args:
            entries (`Iterable[str]`):
                what `--image-hosts` names.

        Raises:
            ValueError: an entry is none of these; a pattern or a whole address of the web is none.
        """
        names, networks = set(), []
        for entry in entries:
            host, port = entry.strip().lower(), None
            if parts := PORT.fullmatch(host):
                host, port = parts["host"], int(parts["port"])
            network = _network(host)
            # some resolvers read digits and dots as an address even where they are none
            is_name = NAME.fullmatch(host) and not host.rpartition(".")[2].isdigit()
            if port is not None and not 0 < port < 65536 or network is None and not is_name:
                raise InputError(
                    f"--image-hosts: {entry!r} must be the name of a host, an address or a network, each with a port "
                    "or without, such as images.example.org, 10.0.0.7:8080 or 10.0.0.0/8."
                )
            if network is not None:
                networks.append((network, port))
                continue
            names.add((host, port))
            if host == "localhost":
                networks += [(network, port) for network in LOOPBACK]
        return cls(frozenset(names), tuple(networks))

    def __bool__(self) -> bool:
        return bool(self.names or self.networks)

    def may_ask(self, host: str, port: int, scheme: str) -> bool:
        """Return whether a request may name this host at this port."""
        ports = (port, None) if port == USUAL_PORTS[scheme] else (port,)
        address = _address(host)
        if address is None:
            return any((host.lower(), one) in self.names for one in ports)
        return self._names_address(address, ports)

    def may_connect(self, address: str, port: int, scheme: str) -> bool:
        """Return whether a host may be at this address: a public one, or one that is named itself."""
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


class Downloads:
    """A pool of a few downloads at once, apart from all else that the server does.

    Args:
        hosts (`ImageHosts`):
            that may be asked.
        seconds (`float`, *optional*, defaults to `DOWNLOAD_SECONDS`):
            for one download in all: waiting for a slot, names, redirects and content.
        tls (`ssl.SSLContext`, *optional*):
            how certificates are verified; by default as `httpx` does.
    """

    def __init__(self, hosts: ImageHosts, seconds: float = DOWNLOAD_SECONDS, tls: ssl.SSLContext | None = None):
        self.hosts, self.seconds = hosts, seconds
        # the context is made once because it reads many certificates
        self._tls = tls or httpx.create_ssl_context(trust_env=False)
        self._places = asyncio.Semaphore(DOWNLOADS)
        self._inside = 0

    async def fetch(self, address: str, field: str) -> bytes:
        """Return the content of an address, in the time for one download.

        Args:
            address (`str`):
                `http://...` or `https://...`.
            field (`str`):
                its place in the body.

        Raises:
            RequestError: a host that is not named or not public, a redirect to one, too many bytes (status 413), too
                many downloads (429), or whatever else went wrong, without saying what.
        """
        url = self._checked(address, field)
        if self._inside >= DOWNLOADS + WAITING_DOWNLOADS:
            raise RequestError(field, "too many images of the web are being fetched: ask again later.", 429)
        self._inside += 1
        try:
            async with asyncio.timeout(self.seconds), self._places:
                return await self._follow(url, field)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            # a message that tells failures apart would let clients scan hosts and ports
            logger.warning("An image could not be fetched: %.200r: %.200r", address, error)
            raise RequestError(field, NOT_FETCHED) from error
        finally:
            self._inside -= 1

    def _checked(self, address: str, field: str) -> httpx.URL:
        if not self.hosts:
            raise RequestError(
                field,
                "images of the web are not fetched (`--image-hosts` is not set): send `data:image/png;base64,`.",
            )
        try:
            url = httpx.URL(address)
            host, port = url.raw_host.decode("ascii"), url.port or USUAL_PORTS[url.scheme]
        except (httpx.InvalidURL, KeyError, ValueError) as error:
            raise RequestError(field, "it is no address of http or https.") from error
        if url.userinfo or not self.hosts.may_ask(host, port, url.scheme):
            raise RequestError(field, "`--image-hosts` does not name its host and port.")
        return url

    async def _follow(self, url: httpx.URL, field: str) -> bytes:
        # connections are kept by address but verified for one host name, so none is kept
        limits = httpx.Limits(max_keepalive_connections=0)
        # trust_env would bring proxies and .netrc, which know nothing of the checks
        async with httpx.AsyncClient(trust_env=False, verify=self._tls, timeout=None, limits=limits) as client:
            for _ in range(MAX_REDIRECTS + 1):
                request = await self._request(client, url, field)
                response = await client.send(request, stream=True, follow_redirects=False)
                try:
                    if not response.has_redirect_location:
                        response.raise_for_status()
                        return await _content(response, field)
                finally:
                    await response.aclose()
                url = self._checked(str(url.join(response.headers["location"])), field)
        raise RequestError(field, NOT_FETCHED)

    async def _request(self, client: httpx.AsyncClient, url: httpx.URL, field: str) -> httpx.Request:
        """Return a request to the one address that the name leads to now; names are not asked again."""
        host, port = url.raw_host.decode("ascii"), url.port or USUAL_PORTS[url.scheme]
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(info[4][0]) for info in found]
        # one forbidden address is enough: all of them are chosen by the owner of the name
        if not addresses or not all(self.hosts.may_connect(one, port, url.scheme) for one in addresses):
            logger.warning("%.200r is at %s, which --image-hosts does not name", host, addresses[:4])
            raise RequestError(field, NOT_FETCHED)
        headers = {"Host": url.netloc.decode("ascii"), "Accept": "image/*", "Accept-Encoding": "identity"}
        named, target = {"sni_hostname": host}, url.copy_with(host=addresses[0])
        # TLS certificates are still verified for the host name
        return client.build_request("GET", target, headers=headers, extensions=named)


async def _content(response: httpx.Response, field: str) -> bytes:
    content = bytearray()
    # content is not decompressed, because a few bytes may hold gigabytes
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > MAX_DOWNLOAD_BYTES:
            raise RequestError(field, f"it has more than {MAX_DOWNLOAD_BYTES >> 20} MiB.", 413)
    return bytes(content)


def _network(host: str) -> Network | None:
    try:
        return ipaddress.ip_network(host.strip("[]"))
    except ValueError:
        return None


def _address(host: str) -> Address | None:
    try:
        # the scope after % names an interface of this machine and is no part of the address
        return ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return None


def _inner_addresses(address: Address) -> list[Address]:
    """Return the IPv4 addresses that one of IPv6 leads to: mapped, 6to4, Teredo and NAT64."""
    if address.version == 4:
        return []
    inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if address in NAT64:
        inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return [one for one in inner if one is not None]


def _is_public(address: Address) -> bool:
    return address.is_global and not address.is_multicast and not address.is_reserved
