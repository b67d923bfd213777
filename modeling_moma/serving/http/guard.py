# SPDX-License-Identifier: Apache-2.0
"""What stands before the server: routes, keys, sizes, numbers of requests, and clients that hang up."""

import asyncio
import hmac
import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import ExitStack, suppress
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from .errors import RequestError, short, short_name
from .generation import ActiveRequest, Admission, current_request
from .limits import BODY_SECONDS, LARGE_BODY_BYTES, LISTEN_SECONDS, MAX_BODY_BYTES, MAX_VALUES, SEND_SECONDS


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

ROUTES = {
    ("GET", "/health"),
    ("GET", "/v1/models"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
}
# only a server without a model of its own answers these
LOAD = "/load_model"
LOADING = {("POST", LOAD), ("POST", "/reset")}
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class Guard:
    """Answers what should not reach the server by an error, and ends requests whose client has gone.

    Args:
        app (`Callable`):
            the server.
        admission (`Admission`):
            counts requests.
        api_key (`str`, *optional*):
            which all routes but `/health` ask for, or `None`. Blanks at its ends are stripped: no header sends them.
        pinned (`str`, *optional*):
            the one model that is served, or `None`.
        has_cors (`bool`, *optional*, defaults to `False`):
            whether pages of other sites may ask.
        is_local (`bool`, *optional*, defaults to `True`):
            whether only this machine can reach the server; its names are then the only ones that it answers to, so
            that no page of the web gets in by a name of its own for this machine.
    """

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        admission: Admission,
        api_key: str | None = None,
        pinned: str | None = None,
        has_cors: bool = False,
        is_local: bool = True,
    ):
        self.app, self.admission, self.pinned = app, admission, pinned
        # as bytes it loses ASCII blanks alone: the last byte of another letter may be a blank of latin-1
        self.api_key = None if api_key is None else api_key.encode().strip()
        self.has_cors, self.is_local = has_cors, is_local

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send):
        """Have a request answered by the server, or say what is wrong with it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers, length = Headers(raw=scope["headers"]), 0
        try:
            length = _length(headers)
            self._check_origin(headers)
            if not self._is_preflight(scope, headers):
                self._check_key(scope, headers)
                self._check_route(scope)
            scope = {**scope, "headers": [pair for pair in scope["headers"] if _is_passed_on(*pair)]}
            if scope["method"] != "POST":
                await self.app(scope, receive, send)
                return
            if length > MAX_BODY_BYTES:
                raise RequestError("body", f"{length:,} bytes are more than {MAX_BODY_BYTES:,}.", 413)
            # a body that is read need not be drained
            announced, length = length, 0
            with ExitStack() as held:

                def hold() -> None:
                    nonlocal length
                    # what is refused in the middle is read on
                    length = announced
                    held.enter_context(self.admission.room_for_body())
                    length = 0

                body = await _read(receive, hold)
                if scope["path"] == LOAD:
                    _check_name(body)
                request = self.admission.enter()
                try:
                    await self._attend(request, scope, body, receive, send)
                finally:
                    request.close()
        except RequestError as error:
            await _drain(receive, length)
            told = {**error.headers(), **self._cors_headers(headers), "Connection": "close"}
            await JSONResponse(error.body(), error.status, told)(scope, receive, send)

    def _check_origin(self, headers: Headers):
        host = headers.get("host", "")
        if self.is_local and not is_loopback(_host_name(host)):
            raise RequestError("Host", f"{short(host)} is no name of this machine.", 421)
        origin = headers.get("origin")
        if origin is not None and not self.has_cors and origin.partition("://")[2] != host:
            raise RequestError("Origin", f"pages of {short(origin)} may not ask (`--enable-cors`).", 403)

    def _is_preflight(self, scope: MutableMapping[str, Any], headers: Headers) -> bool:
        """Return whether a browser asks if it may ask, which brings no key and is answered before any route."""
        asks = "origin" in headers and "access-control-request-method" in headers
        return self.has_cors and scope["method"] == "OPTIONS" and asks

    def _cors_headers(self, headers: Headers) -> dict[str, str]:
        """Return what lets a page of another site read a refusal; of answers the server says it itself."""
        origin = headers.get("origin")
        if not self.has_cors or origin is None:
            return {}
        return {"Access-Control-Allow-Origin": origin, "Access-Control-Allow-Credentials": "true", "Vary": "Origin"}

    def _check_key(self, scope: MutableMapping[str, Any], headers: Headers):
        if self.api_key is None or scope["path"] == "/health":
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        is_known = hmac.compare_digest(key.encode("latin-1").strip(), self.api_key)
        if scheme.lower() != "bearer" or not is_known:
            raise RequestError("Authorization", "there must be `Bearer` and the key of this server.", 401)

    def _check_route(self, scope: MutableMapping[str, Any]):
        route = (scope["method"], scope["path"])
        if route in ROUTES:
            return
        if route in LOADING:
            if self.pinned is None:
                return
            raise RequestError(scope["path"], f"this server is pinned to {self.pinned!r}.", 403)
        if any(scope["path"] == path for _, path in ROUTES | LOADING):
            raise RequestError(scope["path"], f"{short(scope['method'])} is not answered here.", 405)
        raise RequestError(short_name(scope["path"]), "this server has no such route.", 404)

    async def _attend(self, request: ActiveRequest, scope: Any, body: bytes, receive: Receive, send: Send):
        """Run the server until it has answered, or until the client has gone."""
        bodies: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        is_answered = False

        async def replay() -> Message:
            if bodies:
                return bodies.pop()
            # a client that has gone is told to the server by cancelling its task
            await asyncio.get_running_loop().create_future()
            return {"type": "http.disconnect"}

        async def send_in_time(message: Message):
            nonlocal is_answered
            try:
                async with asyncio.timeout(SEND_SECONDS):
                    await send(message)
            except TimeoutError as error:
                raise ConnectionAbortedError("the client does not take its answer") from error
            is_answered = message["type"] == "http.response.body" and not message.get("more_body", False)

        current_request.set(request)
        work = asyncio.ensure_future(self.app(scope, replay, send_in_time))
        hung_up = asyncio.ensure_future(_wait_for_disconnect(receive))
        try:
            await asyncio.wait((work, hung_up), return_when=asyncio.FIRST_COMPLETED)
            if is_answered or work.done():
                await work
        except ConnectionAbortedError:
            pass
        finally:
            request.close()
            for task in (work, hung_up):
                task.cancel()
            # errors of the tasks have been raised above, or no client is left to tell
            await asyncio.gather(work, hung_up, return_exceptions=True)


def is_loopback(host: str) -> bool:
    """Return whether an address, or a name that no DNS server can give away, is of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _wait_for_disconnect(receive: Receive):
    while True:
        # uvicorn reads no further where bytes follow a request, and reads on when it is asked again
        with suppress(TimeoutError):
            async with asyncio.timeout(LISTEN_SECONDS):
                if (await receive())["type"] == "http.disconnect":
                    return


def _length(headers: Headers) -> int:
    if "transfer-encoding" in headers:
        raise RequestError("body", "send its length (Content-Length).", 411)
    length = headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 15:
        raise RequestError("Content-Length", f"{short(length)} is no length.")
    return int(length)


async def _read(receive: Receive, on_large: Callable[[], object]) -> bytes:
    """Return a body; `on_large` is called once it is known to be large."""
    content, more, is_large = bytearray(), True, False
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while more:
                message = await receive()
                content += message.get("body", b"")
                more = message["type"] != "http.disconnect" and message.get("more_body", False)
                if not is_large and len(content) > LARGE_BODY_BYTES:
                    on_large()
                    is_large = True
    except TimeoutError:
        raise RequestError("body", f"it took longer than {BODY_SECONDS:g} s.", 408) from None
    if sum(map(content.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise RequestError("body", f"it has more than {MAX_VALUES:,} values.", 413)
    return bytes(content)


def _check_name(body: bytes):
    """Raise for a model to load whose name is no text; what else is wrong the server says."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return
    name = content.get("model") if isinstance(content, dict) else None
    if not isinstance(name, str | None):
        raise RequestError("model", f"{short(name)} must be a text.")


async def _drain(receive: Receive, length: int):
    """Read on, since a client that is still sending would find its connection reset, and not the answer."""
    read, more = 0, 0 < length <= 4 * MAX_BODY_BYTES
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while more and read < length:
                message = await receive()
                read += len(message.get("body", b""))
                more = message["type"] != "http.disconnect" and message.get("more_body", False)
    except TimeoutError:
        pass


def _is_passed_on(name: bytes, value: bytes) -> bool:
    # the server names the request by this header and sends it back, so it must be harmless
    return name.lower() != b"x-request-id" or REQUEST_ID.fullmatch(value) is not None


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
