# SPDX-License-Identifier: Apache-2.0
"""Token ids of `generate` while it runs.

Shape suffixes: B rows, T new tokens so far.
"""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


class _Feed(BaseStreamer):
    """Hands on each step's tokens `[B]`; the first call brings the prompt."""

    def __init__(self, steps: queue.SimpleQueue):
        self.steps = steps
        self.is_prompt = True

    def put(self, value: torch.Tensor):
        if not self.is_prompt:
            self.steps.put(value)
        self.is_prompt = False

    def end(self):
        pass


class _Stopped(StoppingCriteria):
    """Ends all rows once somebody says so."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def stream_ids(model: Any, inputs: dict[str, torch.Tensor], every: int, **arguments) -> Iterator[torch.Tensor]:
    """
    Runs `generate` in a thread, and yields its new tokens as they arrive.

    Closing the iterator ends the generation after the step that runs, and waits for it.

    Args:
        model: in eval mode.
        inputs: of `generate`, prompts `[B, T]`.
        every: steps between two yields.
        arguments: further ones of `generate`, without beams.

    Yields:
        All new ids so far `[B, T]`, last those of the whole generation.

    Raises:
        ValueError: `every` is below 1; and whatever `generate` raises.
    """
    if every < 1:
        raise ValueError(f"`every` must be at least 1, got {every}.")
    # steps, then None or an error
    steps: queue.SimpleQueue = queue.SimpleQueue()
    stop = threading.Event()

    def run():
        try:
            criteria = StoppingCriteriaList([_Stopped(stop)])
            model.generate(**inputs, streamer=_Feed(steps), stopping_criteria=criteria, **arguments)
            steps.put(None)
        # whatever it is, it is raised where the ids are awaited
        except BaseException as error:
            steps.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    columns = []
    try:
        while (step := steps.get()) is not None:
            if isinstance(step, BaseException):
                raise step
            columns.append(step)
            if len(columns) % every == 0:
                yield torch.stack(columns, dim=1)
        if len(columns) % every:
            yield torch.stack(columns, dim=1)
    finally:
        stop.set()
        thread.join()


__all__ = ["stream_ids"]
