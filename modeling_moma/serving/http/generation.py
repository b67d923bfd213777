# SPDX-License-Identifier: Apache-2.0
"""How many requests are inside at once, and generation that ends once its client has gone."""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.cli.serving.utils import GenerateManager

from .errors import RequestError
from .limits import MAX_LARGE_BODIES


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
    def room_for_body(self) -> Iterator[None]:
        """Hold a large body, or raise a [`RequestError`] (status 429) where too many are held already."""
        if self.large >= MAX_LARGE_BODIES:
            raise RequestError("body", f"{self.large} large requests are being answered: ask again later.", 429)
        self.large += 1
        try:
            yield
        finally:
            self.large -= 1

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
        # when its generation began
        self.began = time.monotonic()
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
                self.began = time.monotonic()
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


class StopInTime(StoppingCriteria):
    """Ends a generation in place of `max_time`, and has the server say that it was cut.

    Args:
        request ([`ActiveRequest`]):
            knows when its generation began.
        gen_config (`GenerationConfig`):
            of the generation; its `max_time` is taken out.
    """

    def __init__(self, request: ActiveRequest, gen_config: Any):
        self.request, self.gen_config = request, gen_config
        self.seconds, gen_config.max_time = gen_config.max_time, None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> Any:
        """Return True for all rows once the time is over, `[B]`."""
        is_over = self.seconds is not None and time.monotonic() - self.request.began > self.seconds
        if is_over:
            # the server calls an answer cut that has as many tokens as this; `generate` has a copy of its own
            self.gen_config.max_new_tokens = 0
        return torch.full((input_ids.shape[0],), is_over, device=input_ids.device, dtype=torch.bool)


class StopByItself(StoppingCriteria):
    """Ends a generation in place of `stop_strings`, and has the server not call cut what ended by itself.

    Args:
        model (`Any`):
            whose ends of a text count where the request names none.
        tokenizer (`Any`):
            whose tokens are looked through for stop strings.
        gen_config (`GenerationConfig`):
            of the generation; its `stop_strings` are taken out.
        prompt_length (`int`):
            positions of the prompt, in which no stop string begins.
    """

    def __init__(self, model: Any, tokenizer: Any, gen_config: Any, prompt_length: int):
        self.tokenizer, self.gen_config, self.prompt_length = tokenizer, gen_config, prompt_length
        ends = gen_config.eos_token_id
        ends = model.generation_config.eos_token_id if ends is None else ends
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.stops, gen_config.stop_strings = _stops(gen_config), None
        self._search: StopStringCriteria | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> Any:
        """Return True for rows whose last token completes a stop string of the answer, `[B]`."""
        has_stop_B = torch.zeros(input_ids.shape[0], device=input_ids.device, dtype=torch.bool)
        if self.stops:
            # made here, in the thread of generation: it walks over the whole vocabulary
            self._search = self._search or StopStringCriteria(self.tokenizer, self.stops)
            answer: Any = input_ids[:, self.prompt_length :]
            has_stop_B = self._search(answer, None)
        # which of several beams is the answer is known at their end
        if len(input_ids) == 1 and (has_stop_B.any() or int(input_ids[0, -1]) in self.ends):
            self.say_it_is_whole()
        return has_stop_B

    def say_it_is_whole(self) -> None:
        """Have the server say so: it calls an answer cut that has as many tokens as it may have."""
        self.gen_config.max_new_tokens = None


class StoppedText:
    """The text of an answer piece by piece, without the first stop string and what follows it.

    Args:
        stops (`Sequence[str]`):
            none of them empty.
    """

    def __init__(self, stops: Sequence[str]):
        self.stops = stops
        self._held, self.has_ended = "", False

    def add(self, text: str) -> str:
        """Return what may be shown of the text so far; what may begin a stop string is held back."""
        if self.has_ended:
            return ""
        text = self._held + text
        found = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if found:
            self._held, self.has_ended = "", True
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self.stops), default=0)
        shown = len(text) - held
        self._held = text[shown:]
        return text[:shown]

    def end(self) -> str:
        """Return what was held back."""
        text, self._held = self._held, ""
        return text


class StoppedQueue:
    """The queue of a stream, whose texts end at the first stop string.

    Args:
        queue (`asyncio.Queue`):
            of texts, and `None` at the end; other entries are passed on.
        stops (`Sequence[str]`):
            none of them empty.
    """

    def __init__(self, queue: asyncio.Queue, stops: Sequence[str]):
        self._queue, self._text = queue, StoppedText(stops)
        self._ready: deque[Any] = deque()

    async def get(self) -> Any:
        """Return the next entry, and wait for it."""
        while not self._ready:
            self._take(await self._queue.get())
        return self._ready.popleft()

    def get_nowait(self) -> Any:
        """Return the next entry, or raise `asyncio.QueueEmpty`."""
        while not self._ready:
            self._take(self._queue.get_nowait())
        return self._ready.popleft()

    def _take(self, entry: Any) -> None:
        # reasoning is a kind of text with a place of its own
        is_text = type(entry) is str
        text = self._text.add(entry) if is_text else self._text.end()
        self._ready += [text] if text else []
        self._ready += [] if is_text else [entry]


class CheckedManager(GenerateManager):
    """Generates until an answer is complete, its time is over or its client has gone.

    The server hands `generate` the processor as its tokenizer, which has no vocabulary to look for stop strings in,
    and `generate` looks for them in the prompt, too.
    """

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
        """Stream an answer, without the stop string at which it ends."""
        tokenizer = getattr(processor, "tokenizer", processor)
        inputs, by_itself = _ending(model, tokenizer, inputs, gen_config)
        queue, streamer = super().generate_streaming(model, tokenizer, inputs, gen_config, request_id, response_parser)
        stops = by_itself.stops
        return (StoppedQueue(queue, stops) if stops else queue), streamer  # pyright: ignore[reportReturnType]

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        """Make an answer, without the stop string at which it ends."""
        tokenizer = getattr(processor, "tokenizer", processor)
        inputs, by_itself = _ending(model, tokenizer, inputs, gen_config)
        text, length, ids = await super().generate_non_streaming(model, tokenizer, inputs, gen_config, request_id)
        stopped = StoppedText(by_itself.stops)
        text = stopped.add(text) + stopped.end()
        if stopped.has_ended or len(ids) and int(ids[-1]) in by_itself.ends:
            by_itself.say_it_is_whole()
        return text, length, ids

    def submit(self, fn, *args, **kwargs):
        """Run a function in the thread of generation, for the current request."""
        return super().submit(current_request.get().running(fn), *args, **kwargs)

    def async_submit(self, fn, *args, **kwargs):
        """Run a function in the thread of generation, for the current request, and return an awaitable."""
        answer = super().async_submit(current_request.get().running(fn), *args, **kwargs)
        # reading the error keeps asyncio from logging it as never retrieved when the client has gone
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        return asyncio.shield(answer)


def _ending(model: Any, tokenizer: Any, inputs: Any, gen_config: Any) -> tuple[dict[str, Any], StopByItself]:
    """Return the arguments of `generate`, which stops in time, and what ends an answer that is not cut."""
    request = current_request.get()
    by_itself = StopByItself(model, tokenizer, gen_config, inputs["input_ids"].shape[-1])
    # the last one has the last word where an answer ends as its time does
    criteria = [StopOnDisconnect(request.disconnected), StopInTime(request, gen_config), by_itself]
    return {**inputs, "stopping_criteria": StoppingCriteriaList(criteria)}, by_itself


def _stops(gen_config: Any) -> list[str]:
    stops = gen_config.stop_strings or []
    return [stops] if isinstance(stops, str) else list(stops)


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
