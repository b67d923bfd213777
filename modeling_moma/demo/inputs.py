# SPDX-License-Identifier: Apache-2.0
"""What visitors may send: examples, uploads, words and seeds with their checks, and the parts of the page for them."""

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.events import Dependency
from gradio.utils import get_upload_folder
from PIL import Image

from tokenization.audio_input_moma import SoundError, read_sound
from tokenization.image_input_moma import clean_pil_image, open_image

from ..errors_moma import InputError
from . import PROMPTS


IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
MOST_BYTES = 10 * 2**20
MOST_PIXELS = 40_000_000
TOO_MANY_PIXELS = f"This image has more than {MOST_PIXELS // 10**6} million pixels: make it smaller."
# requests of all tabs and browsers use the model one at a time; the others wait in the queue
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
MOST_CHARACTERS = 2000
MOST_SECONDS, MOST_SAMPLES = 30, 2**23


@dataclass
class Examples:
    """Examples of a page."""

    images: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Examples":
        """Return the images of a folder, by name, and the lines of its `prompts.txt`, where it has one."""
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"--examples: there is no folder {str(folder)!r}.")
        paths = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_ENDINGS]
        # neither folders nor links to nowhere, which Gradio copies at once or cannot show
        images = sorted(str(path.resolve()) for path in paths if path.is_file())
        prompts = folder / PROMPTS
        try:
            lines = prompts.read_text(encoding="utf-8-sig").splitlines() if prompts.exists() else []
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--examples: {str(prompts)!r} cannot be read as text in UTF-8 ({error}).") from error
        if not images and not lines:
            raise InputError(
                f"--examples: {str(folder)!r} holds neither images ({', '.join(IMAGE_ENDINGS)}) nor a {PROMPTS}."
            )
        return cls(images, [line.strip() for line in lines if line.strip()])


def show_errors(function: Callable) -> Callable:
    """Turn a `ValueError` of a function, or of a generator while it runs, into a message on the page."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generator(*args, **kwargs) -> Iterator:
            try:
                yield from function(*args, **kwargs)
            except ValueError as error:
                raise _page_error(error) from error

        return generator

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except ValueError as error:
            raise _page_error(error) from error

    return call


def _page_error(error: ValueError) -> gr.Error:
    """Return the message of an error, without the traceback in the server's log."""
    return gr.Error(str(error), print_exception=False)


def read_upload(path: str, folder: str) -> Image.Image:
    """Open, check and decode an uploaded image."""
    if not Path(path).resolve().is_relative_to(Path(folder).resolve()):
        raise InputError("This file was not uploaded to this page.")
    try:
        image = open_image(path)
    except Exception as error:
        # Pillow itself raises this for sizes that it takes for an attack
        if isinstance(error.__cause__, Image.DecompressionBombError):
            raise InputError(TOO_MANY_PIXELS) from error
        raise InputError(
            "This file is not an image that can be read: it is damaged or of another kind. Take a PNG, JPEG, WebP or "
            "GIF file."
        ) from error
    # only the header has been read: a small file may hold more pixels than there is memory
    if image.width * image.height > MOST_PIXELS:
        raise InputError(TOO_MANY_PIXELS)
    try:
        return clean_pil_image(image, is_own=True)
    except Exception as error:
        if image.mode in ("I", "F"):
            raise InputError(
                "This image has 32 bits a pixel, and what is black and what is white in it is not known: save it with "
                "8 or 16."
            ) from error
        raise InputError("This image cannot be decoded: the file is truncated or damaged.") from error


def image_input(label: str, elem_id: str) -> gr.Image:
    """Return an input for an image that is uploaded or pasted; functions get the path of its file, unopened."""
    image = gr.Image(
        label=label,
        elem_id=elem_id,
        elem_classes="moma-image",
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        height=300,
    )
    # Gradio's own preprocess opens the file before our checks, and its error would name a file of the server
    setattr(image, "preprocess", lambda payload: None if payload is None else payload.path)  # noqa: B010
    return image


def read_image(path: str) -> Image.Image:
    """Return the image that a visitor uploaded, pasted or took from the examples; see [`read_upload`]."""
    return read_upload(path, get_upload_folder())


def sound_input(label: str, elem_id: str) -> gr.Audio:
    """Return an input for a sound that is uploaded or recorded; functions get the path of its file, unopened."""
    sound = gr.Audio(label=label, elem_id=elem_id, type="filepath", sources=["upload", "microphone"])
    # as for images, Gradio's own preprocess would open the file before our checks
    setattr(sound, "preprocess", lambda payload: None if payload is None else payload.path)  # noqa: B010
    return sound


def read_sound_upload(path: str, sampling_rate: int, folder: str | None = None) -> np.ndarray:
    """Open, check and decode an uploaded sound."""
    folder = get_upload_folder() if folder is None else folder
    if not Path(path).resolve().is_relative_to(Path(folder).resolve()):
        raise InputError("This file was not uploaded to this page.")
    try:
        content = Path(path).read_bytes()
        samples = read_sound(content, sampling_rate, max_samples=MOST_SAMPLES)
    except SoundError as error:
        if error.reason in ("sound too long", "sound too large"):
            raise InputError("This sound is too long: cut it to a few seconds.") from error
        raise InputError("This file is not a sound that can be read: take a WAV, FLAC, Ogg or MP3 file.") from error
    except OSError as error:
        raise InputError("This file was not uploaded to this page.") from error
    if len(samples) > MOST_SECONDS * sampling_rate:
        raise InputError(f"This sound is longer than {MOST_SECONDS} s: cut it.")
    return samples


def image_examples(examples: Examples, image: gr.Image) -> Dependency | None:
    """Show images that a click puts into an image input; return that event, `None` where there are none."""
    if not examples.images:
        return None
    return gr.Examples([[path] for path in examples.images], [image], label="Or take one of these").load_input_event


def title(text: str):
    """Show a heading of what comes below. Labels of Gradio's images would cover a part of them."""
    gr.Markdown(f"**{text}**")


def words_input(label: str, elem_id: str, placeholder: str, lines: int = 1) -> gr.Textbox:
    """Return an input for words."""
    return gr.Textbox(
        label=label, elem_id=elem_id, placeholder=placeholder, lines=lines, max_lines=6, max_length=MOST_CHARACTERS
    )


def checked_words(words: str | None) -> str:
    """Return words as a visitor sent them: their input has a limit in the browser alone."""
    words = words or ""
    if len(words) > MOST_CHARACTERS:
        raise InputError(f"The words have {len(words)} characters, more than {MOST_CHARACTERS}: shorten them.")
    if any("\ud800" <= character <= "\udfff" for character in words):
        raise InputError("The words hold half a character (a lone surrogate): write them again.")
    return words


def sampling_inputs(prefix: str, temperature: float, guidance_scale: float) -> tuple[gr.Slider, gr.Slider, gr.Number]:
    """Return the sliders of temperature and guidance, and a seed."""
    return (
        gr.Slider(
            0,
            2,
            temperature,
            step=0.05,
            label="Temperature",
            info="0: the likeliest",
            elem_id=f"{prefix}-temperature",
        ),
        gr.Slider(
            1,
            10,
            guidance_scale,
            step=0.5,
            label="Guidance",
            info="1: none",
            elem_id=f"{prefix}-guidance",
        ),
        gr.Number(0, label="Seed", info="Same seed, same answer", precision=0, elem_id=f"{prefix}-seed"),
    )


def checked_seed(seed: float | None) -> int:
    """Return a seed that the samplers take."""
    if seed is None or not 0 <= seed < 2**32:
        raise InputError(f"The seed must be a whole number from 0 to {2**32 - 1}, got {seed}.")
    return int(seed)
