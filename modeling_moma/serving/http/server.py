# SPDX-License-Identifier: Apache-2.0
"""The app: routes and answers in OpenAI's form."""

import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse

from ...utils.errors import is_input_error
from .generation import Engine
from .guard import Guard, is_loopback
from .requests import ChatRequest, ImageRequest, RequestError, refusal_of


logger = logging.getLogger("uvicorn.error")
# open connections, idle ones included
MAX_CONNECTIONS = 256
WHY = "the server failed; its log says why."
FAILED = {"error": {"message": WHY, "type": "server_error", "param": None, "code": None}}


def build_app(engine: Engine, api_key: str | None = None, is_local: bool = True) -> Guard:
    """Return the app behind its guard."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    card = {"id": engine.name, "object": "model", "created": int(time.time()), "owned_by": "modeling-moma"}

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str):
        engine.check_name(name)
        return card

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request):
        events = engine.chat(body, request.state.leaving)
        # an invalid request raises before its first token, while a status can still be sent
        first = await anext(events)
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": engine.name}
        if body.stream:
            lines = _stream(first, events, head, body.stream_options.include_usage)
            return StreamingResponse(lines, media_type="text/event-stream")
        *pieces, (reason, usage) = [first, *[event async for event in events]]
        message = {"role": "assistant", "content": "".join(pieces)}
        choice = {"index": 0, "message": message, "finish_reason": reason}
        return {**head, "object": "chat.completion", "choices": [choice], "usage": usage}

    @app.post("/v1/images/generations")
    async def draw(body: ImageRequest, request: Request):
        files = await anext(engine.draw(body, request.state.leaving))
        return {"created": int(time.time()), "data": [{"b64_json": file} for file in files]}

    @app.exception_handler(RequestValidationError)
    async def refuse_field(_request: Request, errors: RequestValidationError):
        return refusal_of(errors).response()

    # handlers by status, since the router raises Starlette's HTTPException and not FastAPI's
    @app.exception_handler(400)
    @app.exception_handler(404)
    @app.exception_handler(405)
    async def refuse_route(request: Request, error: HTTPException):
        field = "body" if error.status_code == 400 else request.scope["path"]
        return RequestError(field, f"{error.detail}.", error.status_code).response(**(error.headers or {}))

    @app.exception_handler(ValueError)
    async def refuse_input(_request: Request, error: ValueError):
        if isinstance(error, RequestError):
            return error.response()
        if is_input_error(error):
            return RequestError("messages or prompt", str(error)).response()
        raise error

    @app.exception_handler(Exception)
    async def fail(_request: Request, _error: Exception):
        return JSONResponse(FAILED, 500)

    return Guard(app, api_key, is_local)


async def _stream(first: str, events: AsyncIterator[Any], head: dict[str, Any], has_usage: bool) -> AsyncIterator[str]:
    def line(choices: list[dict], usage: dict | None = None) -> str:
        chunk = {**head, "object": "chat.completion.chunk", "choices": choices}
        return f"data: {json.dumps({**chunk, 'usage': usage} if has_usage else chunk)}\n\n"

    def choice(delta: dict, reason: str | None = None) -> list[dict]:
        return [{"index": 0, "delta": delta, "finish_reason": reason}]

    yield line(choice({"role": "assistant", "content": first}))
    try:
        async for event in events:
            if isinstance(event, str):
                if event:
                    yield line(choice({"content": event}))
                continue
            reason, usage = event
            yield line(choice({}, reason))
            if has_usage:
                yield line([], usage)
    # status 200 has been sent, so an error can only be a last event of the stream
    except Exception:
        logger.exception("A generation failed in the middle of its stream")
        yield f"data: {json.dumps(FAILED)}\n\n"
    yield "data: [DONE]\n\n"


def serve(engine: Engine, host: str, port: int, api_key: str | None):
    """Serve until it is told to end."""
    uvicorn.run(
        build_app(engine, api_key, is_loopback(host)),  # pyright: ignore[reportArgumentType]
        host=host,
        port=port,
        # h11 bounds the size of headers, which the guard relies on
        http="h11",
        ws="none",
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=5,
    )
