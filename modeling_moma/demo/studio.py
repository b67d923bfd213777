# SPDX-License-Identifier: Apache-2.0
"""One model with its processor, shared by all visitors of a page: what is asked of it, one request at a time.

Answers are shown while they are written: [`stream_ids`] yields ids as `generate` makes them, and [`PartialImages`]
shows an image of which only the first codes are there.

Shape suffixes: B rows, T new tokens so far.
"""

import os
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList, set_seed

from tokenization.audio_codecs_moma import AUDIO

from ..errors_moma import InputError
from ..evaluation.routing_images import record_routing, token_pieces
from ..generation_moma import INTERLEAVED, own_image_sampling
from ..hub.loading import open_model, open_processor
from ..labelling.folder import CodedFolder, shown
from ..labelling.labeler import CaptionForm, Guess, ImageLabeler
from ..labelling.memory import memory_of
from .routing_view import RoutedExample


# of a folder of examples: words to draw, a line each
PROMPTS = "prompts.txt"
# new tokens of a caption, and of the words in an interleaved answer
MOST_WORDS = 32
# new codes of a sound
MOST_CODES = 256
# images that a search shows
MOST_FOUND = 12
# longest side in pixels that it sends of each
LARGEST_SHOWN = 320
# logits are divided by it, and would become infinite, or all alike
MIN_TEMPERATURE, MOST_TEMPERATURE = 1e-3, 100.0
# number of views of an image while it is drawn
VIEWS = 16
# the colour of patches that have no code yet
PAPER = (226, 230, 232)


class PartialImages:
    """Shows what codes in raster order make of an image before the last of them is there.

    The decoder wants all codes, so those of a white image stand for the missing ones; their patches are then covered
    with [`PAPER`], which is told apart from the drawing.
    """

    def __init__(self, processor: Any):
        self.processor = processor
        height, width = processor.image_size
        (self.white,) = processor.encode_images([Image.new("RGB", (width, height), "white")])

    def decode(self, rows: list[list[int]]) -> list[Image.Image]:
        """Return the images of rows of codes, complete or not."""
        images = self.processor.decode_images([row + self.white[len(row) :] for row in rows])
        num_rows, num_columns = self.processor.image_grid
        for image, codes in zip(images, rows, strict=True):
            patch = image.width // num_columns
            for place in range(len(codes), num_rows * num_columns):
                row, column = divmod(place, num_columns)
                image.paste(PAPER, (column * patch, row * patch, (column + 1) * patch, (row + 1) * patch))
        return images

    def parts(self, ids: list[int]) -> list[str | Image.Image | np.ndarray]:
        """Return words, images and whole sounds of token ids that may end inside an image or a sound."""
        frames = self.processor.frames
        if AUDIO in frames:
            ids = ids[: _open_place(ids, frames[AUDIO])]
        begin = _open_place(ids, frames["image"])
        if begin is None:
            return self.processor.decode_parts(ids)
        codes = [token - self.processor.image_token_offset for token in ids[begin + 1 :]]
        return [*self.processor.decode_parts(ids[:begin]), *self.decode([codes])]


def _open_place(ids: list[int], frame: Any) -> int | None:
    """Return the place of the last begin of a frame that has no end."""
    if frame.begin not in ids:
        return None
    last = len(ids) - 1 - ids[::-1].index(frame.begin)
    return None if frame.end in ids[last:] else last


@dataclass
class DemoSession:
    """A model and its processor. It keeps nothing of what it is asked.

    Sampling draws from the one random state of the process, so requests wait for each other.
    """

    model: Any
    processor: Any
    name: str
    form: CaptionForm = CaptionForm()
    library: str | None = None
    memory: str | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self):
        self.partial = PartialImages(self.processor)
        self.coded = None
        if self.library is not None:
            prompts = os.path.join(self.library, PROMPTS)
            self.coded = CodedFolder.read(self.library, self.labeler, "--search", prompts)

    def caption(self, image: Image.Image) -> str:
        """Return what the model says of an image, greedily."""
        return self._likeliest_words(self._inputs("", [image]))

    @cached_property
    def labeler(self) -> ImageLabeler:
        """What names, tags and finds images; made when it is asked for, since not every tokenizer suits it."""
        labeler = ImageLabeler(self.model, self.processor, self.form)
        labeler.take_memory(self.memory, "memory")
        return labeler

    def label(self, image: Image.Image) -> tuple[list[Guess], list[Guess]]:
        """Return the likeliest names and the likeliest tags of an image, with their probabilities."""
        with self._lock:
            codes = self.labeler.encode([image])
            return self.labeler.names(codes)[0], self.labeler.tags(codes)[0]

    def find(self, words: str) -> list[tuple[Image.Image, str]]:
        """Return images of the library that fit words, the best first, with their paths in it."""
        if self.coded is None:
            raise InputError("This page has no folder of images to search.")
        with self._lock:
            found = self.coded.search([words], self.labeler, MOST_FOUND)
        images = self.coded.images(found)
        for image, _ in images:
            # a page that shows small images need not send large ones
            image.thumbnail((LARGEST_SHOWN, LARGEST_SHOWN))
        # it takes modes that PNG has, and names that are text
        return [(image.convert("RGBA"), shown(name)) for image, name in images]

    @property
    def sampling_rate(self) -> int | None:
        """Samples of a second of the sounds that the model hears and makes; `None` where it knows none."""
        is_known = AUDIO in self.model.config.frames
        return getattr(self.processor.codecs.get(AUDIO), "sampling_rate", None) if is_known else None

    def listen(self, samples: np.ndarray) -> str:
        """Return what the model writes after a sound `[num_samples]`, greedily."""
        return self._likeliest_words(self._inputs("", [], [samples]))

    def heard(self, samples: np.ndarray) -> np.ndarray:
        """Return what is left of a sound once it is codes: what the model knows of it."""
        return self.processor.decode_items(AUDIO, self.processor.encode_items(AUDIO, [samples]))[0]

    def say(self, words: str, temperature: float = 0.7, guidance_scale: float = 1.0, seed: int = 0) -> np.ndarray:
        """Return a sound of the words, as samples `[num_samples]`."""
        inputs = self._inputs(words, [])
        arguments = {"generation_mode": AUDIO, "max_new_tokens": self._words_room(inputs, MOST_CODES)}
        with self._lock:
            set_seed(seed)
            ids = self.model.generate(**inputs, **arguments, **_sampling(temperature, guidance_scale))
        return self.processor.decode_items(AUDIO, self.model.decode_modality_tokens(ids, AUDIO)[-1:])[0]

    def seen(self, image: Image.Image) -> Image.Image:
        """Return what is left of an image once it is codes: what the model knows of it."""
        return self.processor.decode_images(self.processor.encode_images([image]))[0]

    def image_sampling(self) -> tuple[float, float]:
        """Return temperature and guidance by which images are drawn: the model's own, or else 1 and 1."""
        own = own_image_sampling(self.model.generation_config)
        temperature = own.get("temperature", 1.0) if own.get("do_sample", True) else 0.0
        return temperature, own.get("guidance_scale", 1.0)

    def draw(
        self,
        words: str,
        count: int = 1,
        temperature: float | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        sounds: Sequence[np.ndarray] = (),
    ) -> Iterator[tuple[int, list[Image.Image]]]:
        """Draw images of the words, or of a sound, and show them as their codes arrive."""
        own_temperature, own_scale = self.image_sampling()
        temperature = own_temperature if temperature is None else temperature
        guidance_scale = own_scale if guidance_scale is None else guidance_scale
        inputs = self._inputs(words, [], sounds)
        inputs = {name: values.expand(count, -1) for name, values in inputs.items()}
        arguments = {"generation_mode": "image", **_sampling(temperature, guidance_scale)}
        begin, length = self.processor.begin_image_token_id, self.processor.image_seq_length
        for ids_BT in self._stream(inputs, seed, arguments):
            rows = [row[row.index(begin) + 1 :][:length] if begin in row else [] for row in ids_BT.tolist()]
            codes = [[token - self.processor.image_token_offset for token in row] for row in rows]
            yield min(map(len, codes)), self.partial.decode(codes)

    def answer(
        self,
        words: str,
        images: list[Image.Image],
        temperature: float = 0.7,
        guidance_scale: float = 1.0,
        num_images: int = 1,
        seed: int = 0,
    ) -> Iterator[list[str | Image.Image | np.ndarray]]:
        """Go on after words and images with words and images in turn."""
        inputs = self._inputs(words, images)
        room = self._words_room(inputs, num_images * (self.processor.image_seq_length + 2))
        arguments = {"generation_mode": INTERLEAVED, "max_new_tokens": room}
        for ids_BT in self._stream(inputs, seed, {**arguments, **_sampling(temperature, guidance_scale)}):
            yield self.partial.parts(ids_BT[0].tolist())

    def route(self, image: Image.Image | None, words: str) -> RoutedExample:
        """Write down which expert takes which patch and which word."""
        if image is None and not words.strip():
            raise InputError("Give an image or words: there is nothing to route yet.")
        words = words if words.strip() or image is None else self.caption(image)
        ids = self._inputs(words, [] if image is None else [image])["input_ids"][0]
        most = self.model.config.max_position_embeddings
        if len(ids) > most:
            raise InputError(f"These are {len(ids)} tokens, but the model reads {most} at most: shorten the words.")
        with self._lock:
            routed = record_routing(self.model, ids)
        cropped = None
        if image is not None:
            images = self.processor.image_processor
            cropped = images.postprocess(images([image], return_tensors="pt")["pixel_values"])["pixel_values"][0]
        return RoutedExample(cropped, token_pieces(self.processor, ids), routed)

    def _inputs(
        self, words: str, images: list[Image.Image], sounds: Sequence[np.ndarray] = ()
    ) -> dict[str, torch.Tensor]:
        """Return token ids of a prompt `[1, T]`; of its special tokens only the places of images are special.

        Sounds come first.
        """
        # requests to the page's API bring any value
        if not isinstance(words, str):
            raise InputError(f"words: expected a text, got {type(words).__name__}.")
        image = self.processor.image_token
        parts = [self.processor.escape_special_tokens(part) for part in words.split(image)]
        if len(parts) == 1 and images:
            parts = [""] * len(images) + parts
        if len(parts) - 1 != len(images):
            raise InputError(
                f"The words have {len(parts) - 1} places for images ({image}), but {len(images)} images came "
                "with them: give one for each place, or leave the places out to put all images first."
            )
        items = {AUDIO: list(sounds)} if sounds else {}
        batch = self.processor(
            images=images or None,
            text=[f"<{AUDIO}>" * len(sounds) + image.join(parts)],
            **items,
            sanitize_control_tokens=True,
            return_tensors="pt",
        )
        return dict(batch.to(self.model.device))

    def _likeliest_words(self, inputs: dict[str, torch.Tensor]) -> str:
        with self._lock:
            ids = self.model.generate(
                **inputs, generation_mode="text", do_sample=False, max_new_tokens=self._words_room(inputs)
            )
        return self.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    def _words_room(self, inputs: dict[str, torch.Tensor], more: int = 0) -> int:
        """Return new tokens for words and `more` others, as far as the context goes."""
        length, most = inputs["input_ids"].shape[1], self.model.config.max_position_embeddings
        if length >= most:
            raise InputError(f"The prompt has {length} tokens, but the model reads {most} at most: shorten it.")
        return min(MOST_WORDS + more, most - length)

    def _stream(self, inputs: dict, seed: int, arguments: dict) -> Iterator[torch.Tensor]:
        with self._lock:
            set_seed(seed)
            every = max(1, self.processor.image_seq_length // VIEWS)
            yield from stream_ids(self.model, inputs, every, **arguments)


def _sampling(temperature: float, guidance_scale: float) -> dict:
    """Return the arguments of `generate`."""
    chosen: dict = {"guidance_scale": guidance_scale}
    if isinstance(temperature, str) or not (temperature == 0 or MIN_TEMPERATURE <= temperature <= MOST_TEMPERATURE):
        raise InputError(
            f"The temperature is {temperature!r}: it must be 0, or from {MIN_TEMPERATURE} to {MOST_TEMPERATURE}."
        )
    if temperature == 0:
        return {**chosen, "do_sample": False}
    return {**chosen, "do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


def load_studio(folder: str | Path, form: CaptionForm | None = None, library: str | None = None) -> DemoSession:
    """Load a model and its processor, on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = open_processor(str(folder), "FOLDER")
    model: Any = open_model(str(folder), "FOLDER", dtype=torch.float32 if device == "cpu" else "auto")
    if "image" not in model.config.frames:
        raise InputError(f"FOLDER: the model of {str(folder)!r} writes no images, so there is nothing to show.")
    if not processor.has_image_decoder:
        raise InputError(f"FOLDER: the image tokenizer of {str(folder)!r} has no decoder (use_decoder=False).")
    model, processor = model.to(device).eval(), processor.to(device)
    return DemoSession(model, processor, Path(folder).name, form or CaptionForm(), library, memory_of(str(folder)))


class _Steps(StoppingCriteria):
    """Hands on the ids `[B, T]` of each step, and ends all rows once it is told to."""

    def __init__(self):
        # of ids, then None or an error
        self.queue: queue.SimpleQueue = queue.SimpleQueue()
        self.is_stopped = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        self.queue.put(input_ids)
        return torch.full((input_ids.shape[0],), self.is_stopped, device=input_ids.device)


def stream_ids(model: Any, inputs: dict[str, torch.Tensor], every: int, **arguments) -> Iterator[torch.Tensor]:
    """Run `generate` in a thread, and yield its new tokens as they arrive.

    Closing the iterator ends the generation after the step that runs, and waits for it.
    """
    steps, length = _Steps(), inputs["input_ids"].shape[1]

    def run():
        try:
            model.generate(**inputs, stopping_criteria=StoppingCriteriaList([steps]), **arguments)
            steps.queue.put(None)
        # any error is raised again where the ids are awaited
        except BaseException as error:
            steps.queue.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    new_BT = torch.empty(0, 0)
    try:
        while (step := steps.queue.get()) is not None:
            if isinstance(step, BaseException):
                raise step
            new_BT = step[:, length:]
            if new_BT.shape[1] % every == 0:
                yield new_BT
        if new_BT.shape[1] % every:
            yield new_BT
    finally:
        steps.is_stopped = True
        thread.join()
