# SPDX-License-Identifier: Apache-2.0
"""Keys as people configure them and as clients send them."""

import pytest


for package in ("fastapi", "httpx"):
    pytest.importorskip(package, reason="`pip install transformers[serving]` is missing")

from fastapi.testclient import TestClient  # noqa: E402
from starlette.responses import PlainTextResponse  # noqa: E402

from modeling_moma.serving.http.generation import Admission  # noqa: E402
from modeling_moma.serving.http.guard import Guard  # noqa: E402


def status(configured: str, sent: bytes) -> int:
    guard = Guard(PlainTextResponse("in"), Admission(1, 1), api_key=configured)
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
