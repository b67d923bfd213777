# SPDX-License-Identifier: Apache-2.0
"""`transformers serve` with checked requests."""

import asyncio
import functools
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

from transformers.cli.serve import Serve
from transformers.cli.serving.utils import GenerateManager

from ..cli.main import is_refusal
from .errors import RequestError
from .fields import check_settings, message_parts
from .pictures import check_picture


if TYPE_CHECKING:
    from fastapi import FastAPI

MAX_BODY_BYTES = 32 << 20
# raises where marks of pictures and pictures differ in number
PROCESSORS = "transformers.processing_utils"


class CheckedServe(Serve):
    """`transformers serve` whose bad requests are refused by 4xx, before anything is generated.

    Takes the arguments of the command. With `non_blocking` the command calls `start_server` when all is built, where
    this class puts its checks in front and then serves until it is told to end.
    """

    def start_server(self):
        """Add the checks, and serve."""
        app = cast("FastAPI", self.server.config.app)
        one_at_a_time = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pictures")
        for handler, check in (
            (self._chat_handler, check_chat),
            (self._completion_handler, check_completion),
            (self._response_handler, check_response),
        ):
            handler.handle_request = _checked(handler.handle_request, check, one_at_a_time)
        # managers are made at a model's first request, and this one takes its place
        managers = self._generation_state._generate_managers
        get_manager = self._generation_state.get_manager

        def get_checked_manager(model_id: str, use_cb: bool = False):
            if not use_cb and model_id not in managers:
                managers[model_id] = CheckedManager()
            return get_manager(model_id, use_cb=use_cb)

        self._generation_state.get_manager = get_checked_manager
        app.add_exception_handler(ValueError, _refuse)
        app.add_middleware(BodyLimit)
        self.server.run()


class CheckedManager(GenerateManager):
    """Refuses a prompt before its stream begins, where a status can still say so, and gives `stop` its tokenizer.

    The server hands `generate` the processor as its tokenizer, which has no vocabulary to look for stop strings in.
    """

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
        check_prompt(model, inputs, gen_config)
        tokenizer = getattr(processor, "tokenizer", processor)
        return super().generate_streaming(model, tokenizer, inputs, gen_config, request_id, response_parser)

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        check_prompt(model, inputs, gen_config)
        tokenizer = getattr(processor, "tokenizer", processor)
        return await super().generate_non_streaming(model, tokenizer, inputs, gen_config, request_id)


class BodyLimit:
    """Refuses a body of more than `MAX_BODY_BYTES`, or of an unknown length, before it is read."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable):
        from fastapi.responses import JSONResponse

        if scope["type"] == "http" and scope["method"] == "POST":
            headers = dict(scope["headers"])
            length = headers.get(b"content-length")
            error = None
            if b"transfer-encoding" in headers:
                error = RequestError("body", "send its length (Content-Length).", 411)
            elif length is not None and int(length) > MAX_BODY_BYTES:
                error = RequestError("body", f"{int(length):,} bytes are more than {MAX_BODY_BYTES:,}.", 413)
            if error is not None:
                # a client that is still sending would find its connection reset, and not the answer
                read, more = 0, True
                while more and read <= 4 * MAX_BODY_BYTES:
                    message = await receive()
                    read, more = read + len(message.get("body", b"")), message.get("more_body", False)
                await JSONResponse(error.body(), error.status, {"connection": "close"})(scope, receive, send)
                return
        await self.app(scope, receive, send)


def check_chat(body: dict[str, Any]):
    """Raise a [`RequestError`] for what `/v1/chat/completions` cannot answer."""
    check_settings(body)
    for place, part in message_parts(body.get("messages"), "messages"):
        check_picture(part, place)


def check_completion(body: dict[str, Any]):
    """Raise a [`RequestError`] for what `/v1/completions` cannot answer."""
    check_settings(body)
    if not isinstance(body.get("prompt"), str) or not body["prompt"]:
        raise RequestError("prompt", "there must be a text that is not empty.")


def check_response(body: dict[str, Any]):
    """Raise a [`RequestError`] for what `/v1/responses` cannot answer."""
    check_settings(body)
    if not isinstance(body.get("input"), str):
        for place, part in message_parts(body.get("input"), "input"):
            check_picture(part, place)


def check_prompt(model: Any, inputs: Any, gen_config: Any):
    """Raise a [`RequestError`] for a prompt that is empty or fills the context, or a bias of no token."""
    length, limit = inputs["input_ids"].shape[-1], getattr(model.config, "max_position_embeddings", None)
    field, rope = "messages or prompt", getattr(model.config, "rope_parameters", None) or {}
    if length == 0:
        raise RequestError(field, "they give an empty prompt.")
    # scaled rotary embeddings are made to go beyond
    if limit is not None and rope.get("rope_type") == "default" and length >= limit:
        raise RequestError(field, f"{length} tokens leave no room for an answer in the model's {limit} positions.")
    vocabulary = model.get_input_embeddings().num_embeddings
    unknown = [ids[0] for ids in gen_config.sequence_bias or {} if ids[0] >= vocabulary]
    if unknown:
        raise RequestError("logit_bias", f"token {unknown[0]} is none of the {vocabulary} tokens of the model.")


def _checked(handle: Callable, check: Callable[[dict[str, Any]], None], pool: ThreadPoolExecutor) -> Callable:
    @functools.wraps(handle)
    async def handle_checked(body: dict[str, Any], request_id: str):
        # in a thread, so that a large picture holds up nobody's stream
        await asyncio.get_running_loop().run_in_executor(pool, check, body)
        try:
            return await handle(body, request_id)
        except ValueError as error:
            # what only generation can tell of settings that the request brought
            if isinstance(error, RequestError) or body.get("generation_config") is None:
                raise
            raise RequestError("generation_config", str(error)) from error

    return handle_checked


async def _refuse(_request: Any, error: Exception):
    """4xx for an input that these packages refuse; anything else is a defect, and stays one."""
    from fastapi.responses import JSONResponse

    if isinstance(error, RequestError):
        return JSONResponse(error.body(), error.status)
    if is_refusal(error) or _raised_in(error) == PROCESSORS:
        return JSONResponse(RequestError("messages or prompt", str(error)).body(), 400)
    raise error


def _raised_in(error: BaseException) -> str:
    """The module whose line raised it."""
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "")
