# SPDX-License-Identifier: Apache-2.0
"""What stands before the app: names of this machine, pages of the web, keys, bodies, and clients that leave."""

import asyncio
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import ExitStack, suppress
from typing import Any
from urllib.parse import urlsplit

from fastapi.datastructures import Headers

from .requests import RequestError


# a body is held three times while it is read, so that bodies above `LARGE_BODY_BYTES` are few at once
MAX_BODY_BYTES, LARGE_BODY_BYTES, MAX_LARGE_BODIES = 32 << 20, 1 << 20, 4
# values are counted by their commas and brackets: JSON's objects take a hundred times the bytes that write them
MAX_VALUES = 250_000
# seconds that a client has to send its body, and to take a piece of its answer
BODY_SECONDS, SEND_SECONDS = 20.0, 30.0
# seconds between two looks at whether the client of a connection has gone
LISTEN_SECONDS = 1.0

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """Reads bodies, refuses what should not reach the app, and ends what nobody waits for any more."""

    def __init__(self, app: Callable[..., Awaitable[None]], api_key: str | None = None, is_local: bool = True):
        self.app, self.is_local, self.large = app, is_local, 0
        # stripped as bytes, which takes ASCII blanks alone: the last byte of a UTF-8 letter may be a blank in latin-1
        self.api_key = None if api_key is None else api_key.encode().strip()

    async def __call__(self, scope: Message, receive: Receive, send: Send):
        """Have a request answered by the app, or say what is wrong with it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # the app finds `leaving` in its scope, and closing it tells the app that the client has its answer or has gone
        with ExitStack() as leaving:
            try:
                body = await self._read(receive, leaving, self._refusal(scope["path"], Headers(scope=scope)))
            except RequestError as error:
                await error.response(Connection="close")(scope, receive, send)
                return
            await _attend(self.app, {**scope, "state": {"leaving": leaving}}, body, receive, send)

    def _refusal(self, path: str, headers: Headers) -> RequestError | None:
        """Return what is wrong with a request before its body; a page of the web gets in by no name of its own."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.is_local and not is_loopback(_host_name(host)):
            return RequestError("Host", f"{host[:80]!r} is no name of this machine.", 421)
        if origin is not None and origin.partition("://")[2] != host:
            return RequestError("Origin", f"pages of {origin[:80]!r} may not ask.", 403)
        if self.api_key is not None and path != "/health":
            scheme, _, key = headers.get("authorization", "").partition(" ")
            is_known = hmac.compare_digest(key.encode("latin-1").strip(), self.api_key)
            if scheme.lower() != "bearer" or not is_known:
                return RequestError("Authorization", "there must be `Bearer` and the key of this server.", 401)
        if "transfer-encoding" in headers:
            return RequestError("body", "send its length (Content-Length).", 411)
        if int(headers.get("content-length", "0")) > MAX_BODY_BYTES:
            return RequestError("body", f"it has more than {MAX_BODY_BYTES:,} bytes.", 413)
        return None

    async def _read(self, receive: Receive, leaving: ExitStack, refusal: RequestError | None) -> bytes:
        """Return a body, or raise a refusal once it has come: who still sends would find the connection reset."""
        content, more, is_large = bytearray(), True, False
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more:
                    message = await receive()
                    more = message.get("more_body", False)
                    content += b"" if refusal else message.get("body", b"")
                    if len(content) <= LARGE_BODY_BYTES or is_large:
                        continue
                    if self.large < MAX_LARGE_BODIES:
                        self.large, is_large = self.large + 1, True
                        leaving.callback(self._let_go)
                    else:
                        content.clear()
                        refusal = RequestError("body", "other large requests are answered: ask again later.", 429)
        except TimeoutError:
            refusal = refusal or RequestError("body", f"it took longer than {BODY_SECONDS:g} s.", 408)
        if refusal is None and sum(map(content.count, (b",", b"[", b"{"))) > MAX_VALUES:
            refusal = RequestError("body", f"it has more than {MAX_VALUES:,} values.", 413)
        if refusal is not None:
            raise refusal
        return bytes(content)

    def _let_go(self):
        self.large -= 1


async def _attend(app: Callable, scope: Message, body: bytes, receive: Receive, send: Send):
    """Run the app until it has answered, or until the client has gone or takes nothing of its answer."""
    bodies: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    is_answered = False

    async def replay() -> Message:
        if not bodies:
            # there is no further message: the app is cancelled when its client goes
            await asyncio.get_running_loop().create_future()
        return bodies.pop()

    async def send_in_time(message: Message):
        nonlocal is_answered
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await send(message)
        except TimeoutError:
            gone.cancel()
            raise
        is_answered = message["type"] == "http.response.body" and not message.get("more_body", False)

    work = asyncio.ensure_future(app(scope, replay, send_in_time))
    gone = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if is_answered or not gone.done():
            await work
    finally:
        work.cancel()
        gone.cancel()
        # an error of the app has been raised above, or its client has gone and nobody can be told
        await asyncio.gather(work, gone, return_exceptions=True)


async def _until_gone(receive: Receive):
    while True:
        # uvicorn reads no further where bytes follow a request, and reads on when it is asked again
        with suppress(TimeoutError):
            async with asyncio.timeout(LISTEN_SECONDS):
                if (await receive())["type"] == "http.disconnect":
                    return


def is_loopback(host: str) -> bool:
    """Return whether an address, or a name that no DNS server can give away, is of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
