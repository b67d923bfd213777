# SPDX-License-Identifier: Apache-2.0
"""How many requests are inside at once, and what ends with a client that has gone."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from transformers import StoppingCriteria

from .errors import RequestError
from .limits import LARGE_BODY_BYTES, MAX_LARGE_BODIES


class Gone(Exception):
    """The client hung up before its generation began."""


class Desk:
    """Counts requests.

    Args:
        max_requests: at once.
        max_waiting: beside them.
    """

    def __init__(self, max_requests: int, max_waiting: int):
        self.most = max_requests + max_waiting
        self.inside, self.large = 0, 0
        self.turns = asyncio.Semaphore(max_requests)

    @contextlib.contextmanager
    def room_for_body(self, length: int) -> Iterator[None]:
        """Raises a [`RequestError`] (status 429) where too many large bodies are held already."""
        is_large = length > LARGE_BODY_BYTES
        if is_large and self.large >= MAX_LARGE_BODIES:
            raise RequestError("body", f"{self.large} large requests are being answered: ask again later.", 429)
        self.large += is_large
        try:
            yield
        finally:
            self.large -= is_large

    def enter(self) -> "Ticket":
        """Raises a [`RequestError`] (status 429) where too many wait already."""
        if self.inside >= self.most:
            raise RequestError("requests", f"{self.inside} are being answered or wait: ask again later.", 429)
        return Ticket(self)


class Ticket:
    """One request, from its body until its generation has ended or its client has gone.

    Used in the thread of the event loop, but for [`running`].
    """

    def __init__(self, desk: Desk):
        self.desk, self.loop = desk, asyncio.get_running_loop()
        self.gone = threading.Event()
        self.seed: int | None = None
        self._has_turn, self._is_inside = False, True
        desk.inside += 1

    async def take_turn(self):
        """Waits until few enough others are being read or generated for."""
        await self.desk.turns.acquire()
        self._has_turn = True

    def finish(self):
        """Makes room for others; what is left is to send the answer."""
        if self._has_turn:
            self.desk.turns.release()
        if self._is_inside:
            self.desk.inside -= 1
        self._has_turn = self._is_inside = False

    def close(self):
        """The request is over, whatever came of it."""
        self.gone.set()
        self.finish()

    def running(self, generate: Callable) -> Callable:
        """`generate` in the thread of generation: not begun for a client that has gone, and its end makes room."""

        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                if self.gone.is_set():
                    raise Gone
                if self.seed is not None:
                    # here, where nothing else is sampled until it has ended
                    torch.manual_seed(self.seed)
                return generate(*args, **kwargs)
            finally:
                # closed when the server ends
                with contextlib.suppress(RuntimeError):
                    self.loop.call_soon_threadsafe(self.finish)

        return run


class UntilGone(StoppingCriteria):
    """Ends a generation once its client has gone."""

    def __init__(self, gone: threading.Event):
        self.gone = gone

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> Any:
        return torch.full((input_ids.shape[0],), self.gone.is_set(), device=input_ids.device, dtype=torch.bool)


current_ticket: ContextVar[Ticket] = ContextVar("current_ticket")
