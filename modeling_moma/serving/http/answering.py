# SPDX-License-Identifier: Apache-2.0
"""What happens between the body of a request and its generation, in place of the server's own handlers."""

import asyncio
import logging
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from starlette.responses import JSONResponse
from transformers.cli.serving.utils import BaseHandler, Modality

from tokenization import MomaProcessor

from ...utils.errors import is_input_error
from .downloads import NOT_FETCHED, Downloads
from .errors import RequestError
from .fields import ChatSettings, CompletionSettings, ResponseSettings, Settings, check_settings
from .generation import current_request
from .limits import DOWNLOAD_SECONDS, Limits
from .messages import MessageImage, MessageSound, read_items, read_messages


logger = logging.getLogger("uvicorn.error")
# raises ValueError where placeholders of images and images differ in number
PROCESSORS = "transformers.processing_utils"
# what continuous batching has no way to do for a single request
PER_REQUEST = ("temperature", "top_p", "seed", "stop", "frequency_penalty", "logit_bias", "generation_config")
# of an answer, as Transformers' server has it
DEFAULT_NEW_TOKENS = 1024


@dataclass(frozen=True)
class Route:
    """How one kind of request is read.

    Args:
        settings (`type[Settings]`):
            what its fields may be.
        messages (`str`, *optional*):
            the field with messages; none for a bare prompt.
        needs_body (`bool`, *optional*, defaults to `False`):
            whether the handler's last steps take the body as well.
    """

    settings: type[Settings]
    messages: str | None = None
    needs_body: bool = False


CHAT = Route(ChatSettings, "messages")
COMPLETION = Route(CompletionSettings)
RESPONSE = Route(ResponseSettings, "input", needs_body=True)


@dataclass
class Prompt:
    """A request that is read: what `generate` takes."""

    model_id: str
    model: Any
    processor: Any
    uses_batching: bool
    inputs: Any
    settings: Any


class Answering:
    """Checks a request, reads it in a thread, and leaves the rest to a handler of Transformers' server.

    Args:
        handler (`BaseHandler`):
            of the route.
        route (`Route`):
            how its requests are read.
        limits (`Limits`):
            of the server.
        readers (`ThreadPoolExecutor`):
            threads that read requests, so that neither a template nor an image holds up anybody's stream.
        downloads (`Downloads`):
            of images.
    """

    def __init__(
        self, handler: BaseHandler, route: Route, limits: Limits, readers: ThreadPoolExecutor, downloads: Downloads
    ):
        self.handler: Any = handler
        self.route, self.limits, self.readers, self.downloads = route, limits, readers, downloads

    async def __call__(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer a request.

        Raises:
            RequestError: it cannot be answered.
        """
        request = current_request.get()
        # clients write null for a field that they leave out, which Transformers' handlers take for a value
        body = {name: value for name, value in body.items() if value is not None}
        items = await self._in_thread(self.check, body)
        await self._fetch([item for item in items if isinstance(item, MessageImage) and item.is_of_the_web])
        await request.take_turn()
        prompt: Prompt = await self._in_thread(self.read, body, items)
        request.seed = body.get("seed")
        try:
            return await self._generate(body, request_id, prompt)
        except ValueError as error:
            # some contradictions of a request's `generation_config` show in `generate` alone
            if isinstance(error, RequestError) or body.get("generation_config") is None:
                raise
            raise RequestError("generation_config", str(error)) from error

    async def _fetch(self, images: list[MessageImage]):
        field = ""
        try:
            async with asyncio.timeout(DOWNLOAD_SECONDS):
                for image in images:
                    field = image.field
                    image.content = await self.downloads.fetch(image.address, field)
        except TimeoutError as error:
            raise RequestError(field, NOT_FETCHED) from error

    async def _in_thread(self, work: Callable, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.readers, work, *args)

    def check(self, body: dict[str, Any]) -> list[MessageImage | MessageSound]:
        """Return the images and sounds of a request, after a check of all else that it says."""
        check_settings(body, self.route.settings, self.limits)
        field = self.route.messages
        if field is None or field == "input" and isinstance(body.get(field), str):
            return []
        return read_messages(body.get(field), field)

    def read(self, body: dict[str, Any], items: list[MessageImage | MessageSound]) -> Prompt:
        """Return the tokens of a request."""
        handler = self.handler
        handler._validate_request(body)
        try:
            model_id, model, processor = handler._resolve_model(body)
            modality = handler.model_manager.get_model_modality(model, processor=processor)
        # only a server without a model of its own is asked for one that does not exist, or is damaged in any way
        except Exception as error:
            if self.limits.pinned is not None:
                raise
            logger.warning("The model of a request cannot be loaded: %s: %.300s", type(error).__name__, error)
            raise RequestError("model", "it cannot be loaded; the log of the server says why.", 404) from error
        uses_batching = handler.generation_state.use_continuous_batching(model, modality)
        if uses_batching:
            check_batched(body, model)
        images = [item for item in items if isinstance(item, MessageImage)]
        if images and modality is Modality.LLM:
            raise RequestError(images[0].field, "the model sees nothing: it has no processor of images.")
        read_items(items, processor)
        tensors = None if uses_batching else "pt"
        inputs: Any
        if self.route.messages is None:
            inputs = self._read_prompt(body["prompt"], processor, tensors)
        else:
            messages = handler._normalize_input(body) if self.route.messages == "input" else body["messages"]
            arguments = {**handler.chat_template_kwargs, **body.get("chat_template_kwargs", {})}
            if isinstance(processor, MomaProcessor):
                # images come as such, and words are words: `<eos>` ends no message
                arguments["sanitize_control_tokens"] = True
            try:
                inputs = processor.apply_chat_template(
                    handler.get_processor_inputs_from_messages(messages, modality),
                    **arguments,
                    add_generation_prompt=True,
                    return_tensors=tensors,
                    return_dict=True,
                    tokenize=True,
                )
            except Exception as error:
                if not _is_of_template(error):
                    raise
                raise RequestError(self.route.messages, f"the chat template refuses them: {error}.") from error
        # the request lives until its answer ends, and would keep them
        for item in items:
            item.forget()
        if not uses_batching:
            inputs = inputs.to(model.device)
        # the seed is set when generation begins, see `ActiveRequest.running`
        asked = {name: value for name, value in body.items() if name != "seed"}
        settings = handler._build_generation_config(asked, model.generation_config, use_cb=uses_batching)
        settings.max_time = min(settings.max_time or self.limits.max_seconds, self.limits.max_seconds)
        room = check_prompt(model, inputs, settings)
        # where the server says that an answer was cut; `generate` ends at the last position by itself
        asked_tokens = settings.max_new_tokens or DEFAULT_NEW_TOKENS
        settings.max_new_tokens = min(asked_tokens, self.limits.max_new_tokens, asked_tokens if room is None else room)
        return Prompt(model_id, model, processor, uses_batching, inputs, settings)

    @staticmethod
    def _read_prompt(prompt: str, processor: Any, tensors: str | None) -> Any:
        """Return the tokens of a bare prompt, whose words are words: images go into chats."""
        if isinstance(processor, MomaProcessor):
            text = processor.escape_special_tokens(prompt)
            return processor(text=text, sanitize_control_tokens=True, return_tensors=tensors)  # pyright: ignore[reportCallIssue]
        tokenizer = getattr(processor, "tokenizer", processor)
        return tokenizer(prompt, return_tensors=tensors)

    async def _generate(self, body: dict[str, Any], request_id: str, prompt: Prompt) -> Any:
        manager = self.handler.generation_state.get_manager(prompt.model_id, use_cb=prompt.uses_batching)
        if prompt.uses_batching:
            # one batch has one way of sampling, whoever asks first
            manager.init_cb(prompt.model, prompt.model.generation_config)
        rest = [body] if self.route.needs_body else []
        arguments = [
            request_id,
            prompt.model,
            prompt.processor,
            prompt.model_id,
            *rest,
            prompt.inputs,
            prompt.settings,
            manager,
        ]
        if self.route.settings is CompletionSettings:
            arguments.append(body.get("suffix"))
        if body["stream"]:
            return self.handler._streaming(*arguments)
        try:
            return await self.handler._non_streaming(*arguments)
        except asyncio.CancelledError:
            if prompt.uses_batching:
                manager._cb.cancel_request(request_id)
            raise


def check_batched(body: dict[str, Any], model: Any) -> None:
    """Raise where a request asks for what continuous batching would not do, which samples all requests alike.

    Args:
        body (`dict[str, Any]`):
            of a request, without nulls.
        model (`Any`):
            that answers it.

    Raises:
        RequestError: names the field.
    """
    is_greedy = not model.generation_config.do_sample
    for field in PER_REQUEST:
        if field in body and not (field == "temperature" and body[field] == 0 and is_greedy):
            raise RequestError(
                field,
                "this server batches continuously (`--continuous-batching`), all requests by the model's own "
                "generation_config: leave it out.",
            )


def check_prompt(model: Any, inputs: Any, gen_config: Any) -> int | None:
    """Return the positions that a prompt leaves for its answer, `None` where they have no end.

    Args:
        model (`Any`):
            that reads it.
        inputs (`Any`):
            with its `input_ids`, a list or `[1, S]`.
        gen_config (`Any`):
            with its biases.

    Raises:
        RequestError: a prompt that is empty or fills the context, or a bias of no token.
    """
    # continuous batching takes a list of ids, `generate` a tensor of rows
    ids = inputs["input_ids"]
    ids = ids if isinstance(ids, list) else ids[0].tolist()
    length = len(ids)
    limit = getattr(model.config, "max_position_embeddings", None)
    field, rope = "messages or prompt", getattr(model.config, "rope_parameters", None) or {}
    # what stands around every prompt says nothing
    special = (getattr(model.config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id"))
    if not {*ids}.difference(*(entry if isinstance(entry, list) else [entry] for entry in special)):
        raise RequestError(field, "they give an empty prompt.")
    # scaled rotary embeddings are made to go beyond the model's positions
    room = limit - length if limit is not None and rope.get("rope_type") == "default" else None
    if room is not None and room <= 0:
        raise RequestError(field, f"{length} tokens leave no room for an answer in the model's {limit} positions.")
    vocabulary = model.get_input_embeddings().num_embeddings
    unknown = [ids[0] for ids in gen_config.sequence_bias or {} if ids[0] >= vocabulary]
    if unknown:
        raise RequestError("logit_bias", f"token {unknown[0]} is none of the {vocabulary} tokens of the model.")
    return room


async def answer_input_error(_request: Any, error: Exception):
    """Answer 4xx for an input that these packages do not take; anything else is a defect, and stays one."""
    if not isinstance(error, RequestError):
        if not is_input_error(error) and _raised_in(error) != PROCESSORS:
            raise error
        error = RequestError("messages or prompt", str(error))
    return JSONResponse(error.body(), error.status, error.headers())


async def answer_invalid_body(_request: Any, error: Any):
    """Answer 400 for a body that is no JSON object, without a word of what it holds."""
    problem = error.errors()[0]
    if problem["type"] == "json_invalid":
        reason = f"it is no JSON: {problem['ctx']['error']}, at character {problem['loc'][-1]}."
    elif problem["type"] == "missing":
        reason = "there is none: send a JSON object."
    else:
        reason = "it must be a JSON object, sent with `Content-Type: application/json`."
    refusal = RequestError("body", reason)
    return JSONResponse(refusal.body(), refusal.status)


async def answer_http_error(_request: Any, error: Any):
    """Answer what the handlers of Transformers' server refuse as this server answers its own refusals."""
    refusal = RequestError("body", str(error.detail), error.status_code)
    return JSONResponse(refusal.body(), refusal.status, error.headers)


def _is_of_template(error: Exception) -> bool:
    """Return whether a template raised the error, or what a template called with what it was given."""
    frames = traceback.walk_tb(error.__traceback__)
    return isinstance(error, TemplateError) or any(frame.f_code.co_filename == "<template>" for frame, _ in frames)


def _raised_in(error: BaseException) -> str:
    """Return the module whose line raised it."""
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "")
