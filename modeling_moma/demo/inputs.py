# SPDX-License-Identifier: Apache-2.0
"""Parts that several tabs of the page share."""

from typing import Any

import gradio as gr
from gradio.events import Dependency
from gradio.utils import get_upload_folder
from PIL import Image

from .examples import Examples
from .uploads import read_upload


# one request at a time works with the model, whichever tab and browser it comes from; the others wait in the queue
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
MOST_CHARACTERS = 2000


def picture_input(label: str, elem_id: str) -> gr.Image:
    """A place for a picture that is uploaded or pasted; functions get the path of its file, unopened."""
    picture = gr.Image(
        label=label,
        elem_id=elem_id,
        elem_classes="moma-picture",
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        height=300,
    )
    # Gradio's own opens the file before any of our checks, and its error would name a file of the server
    setattr(picture, "preprocess", lambda payload: None if payload is None else payload.path)  # noqa: B010
    return picture


def read_picture(path: str) -> Image.Image:
    """The picture that a visitor uploaded, pasted or took from the examples; see [`read_upload`]."""
    return read_upload(path, get_upload_folder())


def picture_examples(examples: Examples, picture: gr.Image) -> Dependency | None:
    """Pictures that a click puts into a place for pictures; gives that event, or `None` where there are none."""
    if not examples.pictures:
        return None
    return gr.Examples(
        [[path] for path in examples.pictures], [picture], label="Or take one of these"
    ).load_input_event


def title(text: str):
    """A heading of what comes below. Labels of Gradio's pictures would cover a part of them."""
    gr.Markdown(f"**{text}**")


def words_input(label: str, elem_id: str, placeholder: str, lines: int = 1) -> gr.Textbox:
    """A place for words."""
    return gr.Textbox(
        label=label, elem_id=elem_id, placeholder=placeholder, lines=lines, max_lines=6, max_length=MOST_CHARACTERS
    )


def checked_words(words: str | None) -> str:
    """Words as a visitor sent them: the place for them has a limit in the browser alone.

    Raises:
        ValueError: they are too long, or hold half a pair of surrogates.
    """
    words = words or ""
    if len(words) > MOST_CHARACTERS:
        raise ValueError(f"The words have {len(words)} characters, more than {MOST_CHARACTERS}: shorten them.")
    if any("\ud800" <= character <= "\udfff" for character in words):
        raise ValueError("The words hold half a character (a lone surrogate): write them again.")
    return words


def sampling_inputs(prefix: str, temperature: float, guidance_scale: float) -> tuple[gr.Slider, gr.Slider, gr.Number]:
    """Sliders of temperature and guidance, and a seed."""
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
    """A seed that the samplers take.

    Raises:
        ValueError: it is none.
    """
    if seed is None or not 0 <= seed < 2**32:
        raise ValueError(f"The seed must be a whole number from 0 to {2**32 - 1}, got {seed}.")
    return int(seed)


__all__ = [
    "ONE_AT_A_TIME",
    "checked_seed",
    "checked_words",
    "picture_examples",
    "picture_input",
    "read_picture",
    "sampling_inputs",
    "title",
    "words_input",
]
