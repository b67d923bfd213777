# SPDX-License-Identifier: Apache-2.0
"""The model and the one thread in which it reads and answers requests, one after the other."""

import asyncio
import base64
import io
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from transformers.generation import BaseStreamer, StoppingCriteria, StoppingCriteriaList

from ...utils.messages import one_line
from .requests import ChatRequest, ImageRequest, RequestError


MAX_LETTERS = 200_000
# earlier tokens decoded along with new ones, since they decide, for instance, whether a blank stands between words
CONTEXT = 8
# special tokens that a user writes are read as plain characters, so that `<eos>` in a message ends nothing
READ: Any = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "sanitize_control_tokens": True}


class Engine:
    """A model with its processor, served under a name."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        name: str,
        max_waiting: int = 32,
        max_new_tokens: int = 4096,
        max_seconds: float = 120.0,
    ):
        self.model, self.processor, self.name = model, processor, name
        self.max_waiting, self.max_new_tokens, self.max_seconds = max_waiting, max_new_tokens, max_seconds
        self.max_letters = MAX_LETTERS
        # no text of more letters fits, however it is cut into tokens; scaled embeddings go beyond the positions
        if model.config.rope_parameters["rope_type"] == "default":
            longest = max(map(len, processor.tokenizer.get_vocab()))
            self.max_letters = min(MAX_LETTERS, longest * model.config.max_position_embeddings)
        ends = model.generation_config.eos_token_id
        self.ends = {ends} if isinstance(ends, int) else set(ends or ())
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self.inside: set[Job] = set()

    def chat(self, request: ChatRequest, leaving: ExitStack) -> AsyncIterator[Any]:
        """Give the pieces of an answer in words, then why it ended and its usage, both in OpenAI's form."""
        self._check(request.model, "messages", request.letters)
        field = "max_completion_tokens" if request.max_completion_tokens else "max_tokens"
        most = getattr(request, field) or self.max_new_tokens
        if most > self.max_new_tokens:
            raise RequestError(field, f"it must be at most {self.max_new_tokens} (`limits.max_new_tokens`).")
        unknown = [token for token in request.logit_bias if int(token) >= self.model.config.vocab_size]
        if unknown:
            raise RequestError("logit_bias", f"{unknown[0]} is no token of the model.")
        return self._run(partial(self._answer, request, most), leaving)

    def draw(self, request: ImageRequest, leaving: ExitStack) -> AsyncIterator[Any]:
        """Give a list of images, as PNG in base64: those of `generate` for a batch that repeats the prompt."""
        self._check(request.model, "prompt", len(request.prompt))
        height, width = self.processor.image_size
        if not self.processor.has_image_decoder:
            raise RequestError("model", "its image tokenizer has no decoder, so that it draws nothing.")
        if request.size not in (None, f"{width}x{height}"):
            raise RequestError("size", f"{request.size[:20]!r} must be '{width}x{height}', as the model draws.")
        return self._run(partial(self._draw, request), leaving)

    def check_name(self, name: str):
        """Raise a [`RequestError`] for another model."""
        if name != self.name:
            raise RequestError("model", f"{name[:80]!r} is not served here, only {self.name!r}.", 404)

    def _check(self, name: str | None, field: str, letters: int):
        self.check_name(self.name if name is None else name)
        if letters > self.max_letters:
            reason = f"{letters:,} letters are more than the {self.max_letters:,} that are read here."
            raise RequestError(field, reason, 413)

    async def _run(self, work: Callable[["Job"], Any], leaving: ExitStack) -> AsyncIterator[Any]:
        """Give the texts that work emits in the thread of the model, and what it returns."""
        if len(self.inside) > self.max_waiting:
            raise RequestError("requests", f"{len(self.inside)} are answered or wait: ask again later.", 429)
        job = Job(work, self.inside.discard)
        self.inside.add(job)
        leaving.callback(self.inside.discard, job)
        leaving.callback(job.gone.set)
        self.worker.submit(job.run)
        while isinstance(event := await job.events.get(), str):
            yield event
        if isinstance(event, BaseException):
            raise event
        yield event

    def _answer(self, request: ChatRequest, most: int, job: "Job") -> tuple[str, dict[str, int]]:
        chat = request.read(self.processor)
        try:
            self.processor.apply_chat_template(chat, add_generation_prompt=True)
        # a chat template may raise any kind of error
        except Exception as error:
            raise RequestError("messages", f"the chat template refuses them: {one_line(error, 300)}.") from error
        inputs = self.processor.apply_chat_template(chat, add_generation_prompt=True, **READ)
        ids, tokenizer = inputs["input_ids"][0].tolist(), self.processor.tokenizer
        # beginning, end and padding tokens alone are an empty prompt
        if {*ids} <= {tokenizer.bos_token_id, tokenizer.pad_token_id, *self.ends}:
            raise RequestError("messages", "they give an empty prompt.")
        answer = Answer(tokenizer, request.stop, job.emit)
        options = {"generation_mode": "text", "num_beams": 1, "max_new_tokens": most, "streamer": answer}
        ends = Ends(job.gone, self.max_seconds, answer.text)
        self._generate(inputs, request.seed, ends, **options, **request.sampling())
        answer.finish()
        is_whole = answer.text.has_ended or answer.ids[-1] in self.ends
        total = len(ids) + len(answer.ids)
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(answer.ids), "total_tokens": total}
        return "stop" if is_whole else "length", usage

    def _draw(self, request: ImageRequest, job: "Job") -> list[str]:
        text = self.processor.escape_special_tokens(request.prompt)
        inputs = self.processor(text=[text] * request.n, sanitize_control_tokens=True, return_tensors="pt")
        ends = Ends(job.gone, self.max_seconds)
        ids = self._generate(inputs, request.seed, ends, generation_mode="image")
        if ends.is_cut:
            reason = f"so many drawings take more than {self.max_seconds:g} s (`limits.max_seconds`)."
            raise RequestError("n", reason)
        files = []
        for image in self.processor.decode_images(self.model.decode_image_tokens(ids)):
            file = io.BytesIO()
            image.save(file, "PNG")
            files.append(base64.b64encode(file.getvalue()).decode())
        return files

    def _generate(self, inputs: Any, seed: int | None, ends: "Ends", **options: Any) -> Any:
        # one thread does all sampling, so torch's global generator is this request's alone; without a seed it gets a
        # fresh one, or it would go on from the seed of the request before
        torch.manual_seed(secrets.randbits(63) if seed is None else seed)
        stopping = StoppingCriteriaList([ends])
        return self.model.generate(**inputs.to(self.model.device), stopping_criteria=stopping, **options)


class Job:
    """Work for one request in the thread of the model, which ends once its client has gone."""

    def __init__(self, work: Callable[["Job"], Any], on_end: Callable[["Job"], Any]):
        self.work, self.on_end = work, on_end
        self.loop, self.events, self.gone = asyncio.get_running_loop(), asyncio.Queue(), threading.Event()

    def run(self):
        """Work, unless the client has gone while others were before it."""
        try:
            result = None if self.gone.is_set() else self.work(self)
        except BaseException as error:
            result = error
        self.emit(result)
        self._call(self.on_end, self)

    def emit(self, event: Any):
        """Hand an event to the request."""
        self._call(self.events.put_nowait, event)

    def _call(self, function: Callable, argument: Any):
        # at the end of the server, the event loop may be closed before the last answer
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(function, argument)


class StoppedText:
    """A text piece by piece, without the first stop string and what follows it."""

    def __init__(self, stops: Sequence[str]):
        self.stops, self.has_ended, self._held = stops, False, ""

    def add(self, text: str) -> str:
        """Return what may be shown of the text so far; what may begin a stop string is held back."""
        if self.has_ended:
            return ""
        text = self._held + text
        found = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        self.has_ended = bool(found)
        held = 0 if found else max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - held :]
        return text[: min(found, default=len(text) - held)]

    def end(self) -> str:
        """Return what was held back."""
        return self._held


def _overlap(text: str, stop: str) -> int:
    """Return how many letters at the end of a text may be the beginning of a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


class Ends(StoppingCriteria):
    """Ends a generation whose client has gone, whose time is over, or whose stop string is written."""

    def __init__(self, gone: threading.Event, seconds: float, text: StoppedText | None = None):
        self.gone, self.end, self.text, self.is_cut = gone, time.monotonic() + seconds, text, False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> Any:
        """Return the same for all rows, `[B]`."""
        self.is_cut = self.gone.is_set() or time.monotonic() > self.end
        has_ended = self.is_cut or self.text is not None and self.text.has_ended
        return torch.full((input_ids.shape[0],), has_ended, device=input_ids.device, dtype=torch.bool)


class Answer(BaseStreamer):
    """The words of a generation, handed on token by token."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], emit: Callable[[str], Any]):
        self.tokenizer, self.text, self.emit = tokenizer, StoppedText(stops), emit
        self.ids: list[int] = []
        self._is_prompt, self._written = True, 0

    def put(self, value: torch.Tensor):
        """Take the prompt, then one token at a time."""
        if not self._is_prompt:
            self.ids.append(int(value))
            self.emit(self.text.add(self._new_text()))
        self._is_prompt = False

    def end(self):
        """Nothing is left to do for `generate`."""

    def finish(self):
        """Emit what is left."""
        self.emit(self.text.add(self._new_text(is_last=True)))
        self.emit(self.text.end())

    def _new_text(self, is_last: bool = False) -> str:
        start, decode = max(0, self._written - CONTEXT), self.tokenizer.decode
        before = decode(self.ids[start : self._written], skip_special_tokens=True)
        text = decode(self.ids[start:], skip_special_tokens=True)
        # a letter of several tokens decodes to U+FFFD until the last of them has come
        if text.endswith("\ufffd") and not is_last:
            return ""
        self._written = len(self.ids)
        return text[len(before) :]
