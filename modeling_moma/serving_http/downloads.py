# SPDX-License-Identifier: Apache-2.0
"""Pictures of the web, from hosts that `--image-hosts` names."""

import asyncio
import logging
import socket
import ssl

import httpx

from .errors import RequestError
from .hosts import USUAL_PORTS, ImageHosts
from .limits import DOWNLOAD_SECONDS, DOWNLOADS, MAX_DOWNLOAD_BYTES, MAX_REDIRECTS, WAITING_DOWNLOADS


logger = logging.getLogger("uvicorn.error")

NOT_FETCHED = "it could not be fetched; the log of the server says why."


class Downloads:
    """A pool of a few downloads at once, apart from all else that the server does.

    Args:
        hosts: that may be asked.
        seconds: for one download in all: waiting for a place, names, redirects and content.
        tls: how certificates are verified; by default as `httpx` does.
    """

    def __init__(self, hosts: ImageHosts, seconds: float = DOWNLOAD_SECONDS, tls: ssl.SSLContext | None = None):
        self.hosts, self.seconds = hosts, seconds
        # made once: it reads many certificates
        self._tls = tls or httpx.create_ssl_context(trust_env=False)
        self._places = asyncio.Semaphore(DOWNLOADS)
        self._waiting = 0

    async def fetch(self, address: str, field: str) -> bytes:
        """
        The content of an address, in the time for one download.

        Args:
            address: `http://...` or `https://...`.
            field: its place in the body.

        Raises:
            RequestError: a host that is not named or not public, a redirect to one, too many bytes (status 413), too
                many downloads (429), or whatever else went wrong, without saying what.
        """
        self._checked(address, field)
        if self._places.locked() and self._waiting >= WAITING_DOWNLOADS:
            raise RequestError(field, "too many pictures of the web are being fetched: ask again later.", 429)
        try:
            async with asyncio.timeout(self.seconds):
                self._waiting += 1
                try:
                    await self._places.acquire()
                finally:
                    self._waiting -= 1
                try:
                    return await self._follow(address, field)
                finally:
                    self._places.release()
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ssl.SSLError) as error:
            # what is told apart here would tell ports and hosts apart
            logger.warning("A picture could not be fetched: %.200r: %.200r", address, error)
            raise RequestError(field, NOT_FETCHED) from error

    def _checked(self, address: str, field: str) -> httpx.URL:
        if not self.hosts:
            raise RequestError(
                field,
                "pictures of the web are not fetched (`--image-hosts` is not set): send `data:image/png;base64,`.",
            )
        try:
            url = httpx.URL(address)
            host, port = url.raw_host.decode("ascii"), url.port or USUAL_PORTS[url.scheme]
        except (httpx.InvalidURL, KeyError, ValueError) as error:
            raise RequestError(field, "it is no address of http or https.") from error
        if url.userinfo or not self.hosts.may_ask(host, port, url.scheme):
            raise RequestError(field, "`--image-hosts` does not name its host and port.")
        return url

    async def _follow(self, address: str, field: str) -> bytes:
        # a connection is kept by its address, but was verified for one name of it
        limits = httpx.Limits(max_keepalive_connections=0)
        # a proxy, or a file of passwords, would be asked past the checks
        async with httpx.AsyncClient(trust_env=False, verify=self._tls, timeout=self.seconds, limits=limits) as client:
            for _ in range(MAX_REDIRECTS + 1):
                request = await self._request(client, self._checked(address, field), field)
                response = await client.send(request, stream=True, follow_redirects=False)
                try:
                    if not response.has_redirect_location:
                        response.raise_for_status()
                        return await _content(response, field)
                    target = request.extensions["named"].join(response.headers["location"])
                finally:
                    await response.aclose()
                address = str(target)
        raise RequestError(field, NOT_FETCHED)

    async def _request(self, client: httpx.AsyncClient, url: httpx.URL, field: str) -> httpx.Request:
        """A request to the one address that the name leads to now; names are not asked again."""
        host, port = url.raw_host.decode("ascii"), url.port or USUAL_PORTS[url.scheme]
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(info[4][0]) for info in found]
        # of several one may be forbidden, and the others are of the same owner
        if not addresses or not all(self.hosts.may_connect(one, port, url.scheme) for one in addresses):
            logger.warning("%.200r is at %s, which --image-hosts does not name", host, addresses[:4])
            raise RequestError(field, NOT_FETCHED)
        headers = {"Host": url.netloc.decode("ascii"), "Accept": "image/*", "Accept-Encoding": "identity"}
        # certificates are still verified for the name
        extensions = {"sni_hostname": host, "named": url}
        return client.build_request("GET", url.copy_with(host=addresses[0]), headers=headers, extensions=extensions)


async def _content(response: httpx.Response, field: str) -> bytes:
    content = bytearray()
    # not unpacked: a few bytes may hold gigabytes
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > MAX_DOWNLOAD_BYTES:
            raise RequestError(field, f"it has more than {MAX_DOWNLOAD_BYTES >> 20} MiB.", 413)
    return bytes(content)
