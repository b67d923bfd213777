# SPDX-License-Identifier: Apache-2.0
"""How many requests are inside at once, and generation that ends once its client has gone."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.utils import GenerateManager

from .errors import RequestError
from .limits import LARGE_BODY_BYTES, MAX_LARGE_BODIES


class ClientDisconnected(Exception):
    """The client hung up before its generation began."""


class Admission:
    """Counts requests.

    Args:
        max_requests (`int`):
            at once.
        max_waiting (`int`):
            beside them.
    """

    def __init__(self, max_requests: int, max_waiting: int):
        self.most = max_requests + max_waiting
        self.inside, self.large = 0, 0
        self.turns = asyncio.Semaphore(max_requests)

    @contextlib.contextmanager
    def room_for_body(self, length: int) -> Iterator[None]:
        """Raise a [`RequestError`] (status 429) where too many large bodies are held already."""
        is_large = length > LARGE_BODY_BYTES
        if is_large and self.large >= MAX_LARGE_BODIES:
            raise RequestError("body", f"{self.large} large requests are being answered: ask again later.", 429)
        self.large += is_large
        try:
            yield
        finally:
            self.large -= is_large

    def enter(self) -> "ActiveRequest":
        """Raise a [`RequestError`] (status 429) where too many wait already."""
        if self.inside >= self.most:
            raise RequestError("requests", f"{self.inside} are being answered or wait: ask again later.", 429)
        return ActiveRequest(self)


class ActiveRequest:
    """One request, from its body until its generation has ended or its client has gone.

    Used in the thread of the event loop, but for [`running`].

    Args:
        admission (`Admission`):
            counts requests.
    """

    def __init__(self, admission: Admission):
        self.admission, self.loop = admission, asyncio.get_running_loop()
        self.disconnected = threading.Event()
        self.seed: int | None = None
        self._has_turn, self._is_inside = False, True
        admission.inside += 1

    async def take_turn(self):
        """Wait until few enough others are being read or generated for."""
        await self.admission.turns.acquire()
        self._has_turn = True

    def finish(self):
        """Free the slot for others; what is left is to send the answer."""
        if self._has_turn:
            self.admission.turns.release()
        if self._is_inside:
            self.admission.inside -= 1
        self._has_turn = self._is_inside = False

    def close(self):
        """End the request, whatever came of it."""
        self.disconnected.set()
        self.finish()

    def running(self, generate: Callable) -> Callable:
        """Run `generate` in its thread: it is not begun for a client that has gone, and its end frees a slot."""

        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                if self.disconnected.is_set():
                    raise ClientDisconnected
                if self.seed is not None:
                    # in this thread nothing else samples until the generation has ended
                    torch.manual_seed(self.seed)
                return generate(*args, **kwargs)
            finally:
                # the event loop is closed already when the server ends
                with contextlib.suppress(RuntimeError):
                    self.loop.call_soon_threadsafe(self.finish)

        return run


# the request that the running task answers
current_request: ContextVar[ActiveRequest] = ContextVar("current_request")


class StopOnDisconnect(StoppingCriteria):
    """Ends a generation once its client has gone."""

    def __init__(self, disconnected: threading.Event):
        self.disconnected = disconnected

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> Any:
        """Return True for all rows once the client has gone, `[B]`."""
        return torch.full((input_ids.shape[0],), self.disconnected.is_set(), device=input_ids.device, dtype=torch.bool)


class CheckedManager(GenerateManager):
    """Generates until an answer is complete or its client has gone.

    The server hands `generate` the processor as its tokenizer, which has no vocabulary to look for stop strings in.
    """

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
        """Stream an answer, which ends once the client has gone."""
        tokenizer = getattr(processor, "tokenizer", processor)
        return super().generate_streaming(model, tokenizer, _ending(inputs), gen_config, request_id, response_parser)

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        """Make an answer, which ends once the client has gone."""
        tokenizer = getattr(processor, "tokenizer", processor)
        return await super().generate_non_streaming(model, tokenizer, _ending(inputs), gen_config, request_id)

    def submit(self, fn, *args, **kwargs):
        """Run a function in the thread of generation, for the current request."""
        return super().submit(current_request.get().running(fn), *args, **kwargs)

    def async_submit(self, fn, *args, **kwargs):
        """Run a function in the thread of generation, for the current request, and return an awaitable."""
        answer = super().async_submit(current_request.get().running(fn), *args, **kwargs)
        # reading the error keeps asyncio from logging it as never retrieved when the client has gone
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        return asyncio.shield(answer)


def _ending(inputs: Any) -> dict[str, Any]:
    """Return the arguments of `generate`, which stops once the client has gone."""
    on_disconnect = StopOnDisconnect(current_request.get().disconnected)
    return {**inputs, "stopping_criteria": StoppingCriteriaList([on_disconnect])}
