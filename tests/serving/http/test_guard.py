# SPDX-License-Identifier: Apache-2.0
"""Keys as people configure them and as clients send them; bodies and clients that leave."""

import asyncio
from contextlib import ExitStack

import pytest


for package in ("fastapi", "httpx"):
    pytest.importorskip(package, reason="the extra `serve` is missing")

from fastapi.responses import PlainTextResponse  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402

from modeling_moma.serving.http import guard as guards  # noqa: E402
from modeling_moma.serving.http.guard import LARGE_BODY_BYTES, MAX_LARGE_BODIES, Guard  # noqa: E402
from modeling_moma.serving.http.requests import RequestError  # noqa: E402


def status(configured: str, sent: bytes) -> int:
    guard = Guard(PlainTextResponse("in"), api_key=configured)
    client = TestClient(guard, base_url="http://127.0.0.1")
    return client.get("/v1/models", headers={b"authorization": b"Bearer " + sent}).status_code


@pytest.mark.parametrize("configured", ["a key", "a key\n", " a key\r\n", "\ta key "])
def test_blanks_at_the_ends_of_a_key_are_none_of_it(configured):
    assert status(configured, b"a key") == status(configured, b"  a key ") == 200
    assert status(configured, b"a kez") == status(configured, b"akey") == status(configured, b"") == 401


# UTF-8 of either ends in a byte that is a blank of latin-1
@pytest.mark.parametrize("key", ["secretà", "secretŅ"])
def test_key_beyond_ascii_is_compared_byte_by_byte(key):
    assert status(key, key.encode()) == 200
    assert status(key, key.encode()[:-1]) == 401


def test_what_is_announced_takes_no_room_and_what_has_arrived_does():
    guard, piece = Guard(PlainTextResponse("in")), LARGE_BODY_BYTES // 2 + 1

    async def clients():
        released = asyncio.Event()

        def client(pieces):
            async def receive():
                if not pieces:
                    await released.wait()
                    return {"type": "http.request", "more_body": False}
                return {"type": "http.request", "body": pieces.pop(), "more_body": True}

            return receive

        async def body(pieces):
            with ExitStack() as leaving:
                return await guard._read(client(pieces), leaving, None)

        silent = [asyncio.ensure_future(body([])) for _ in range(2 * MAX_LARGE_BODIES)]
        large = [asyncio.ensure_future(body([b"a" * piece] * 2)) for _ in range(MAX_LARGE_BODIES)]
        await asyncio.sleep(0)
        assert guard.large == MAX_LARGE_BODIES
        refused = asyncio.ensure_future(body([b"a" * piece] * 3))
        await asyncio.sleep(0)
        released.set()
        with pytest.raises(RequestError, match="ask again later") as refusal:
            await refused
        assert refusal.value.status == 429
        assert [len(found) for found in await asyncio.gather(*silent)] == [0] * len(silent)
        assert [len(found) for found in await asyncio.gather(*large)] == [2 * piece] * len(large)
        assert guard.large == 0

    asyncio.run(clients())


@pytest.mark.parametrize("is_gone", [True, False], ids=["gone", "slow"])
def test_work_ends_for_a_client_that_has_gone_or_takes_nothing(monkeypatch, is_gone):
    monkeypatch.setattr(guards, "SEND_SECONDS", 0.01 if not is_gone else 60)
    monkeypatch.setattr(guards, "LISTEN_SECONDS", 0.01)
    ended = []

    async def app(scope, receive, send):
        scope["state"]["leaving"].callback(ended.append, True)
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.get_running_loop().create_future()

    async def receive():
        if not asked:
            asked.append("body")
            return {"type": "http.request", "body": b""}
        asked.append("next")
        # uvicorn tells that a client has gone once it is asked again
        if not is_gone or len(asked) < 4:
            await asyncio.get_running_loop().create_future()
        return {"type": "http.disconnect"}

    async def send(message):
        await asyncio.get_running_loop().create_future()

    asked, headers = [], [(b"host", b"localhost")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}
    asyncio.run(asyncio.wait_for(Guard(app)(scope, receive, send), 5))
    assert ended == [True]


def test_a_body_of_too_many_values_is_answered_as_soon_as_it_is_read():
    """And not once nothing more has come of it for as long as a body may take."""
    asked = []

    async def receive():
        asked.append("body")
        if len(asked) > 1:
            await asyncio.get_running_loop().create_future()
        return {"type": "http.request", "body": b"[" * (LARGE_BODY_BYTES + 1), "more_body": False}

    async def send(message):
        asked.append(message.get("status"))

    headers = [(b"host", b"localhost"), (b"content-length", str(LARGE_BODY_BYTES + 1).encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}
    guard = Guard(PlainTextResponse("in"))
    asyncio.run(asyncio.wait_for(guard(scope, receive, send), 5))
    assert asked == ["body", 413, None]
