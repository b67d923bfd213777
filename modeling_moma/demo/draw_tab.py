# SPDX-License-Identifier: Apache-2.0
"""The tab that draws pictures from words, and shows them while they are drawn."""

import time
from collections.abc import Iterator

import gradio as gr
from PIL import Image

from .examples import Examples
from .inputs import ONE_AT_A_TIME, checked_seed, checked_words, sampling_inputs, title, words_input
from .refusals import told_on_the_page
from .showing import enlarged
from .studio import Studio


MOST_PICTURES = 4


def draw_tab(studio: Studio, examples: Examples):
    """Builds the tab."""
    whole = studio.processor.image_seq_length

    @told_on_the_page
    def draw(
        words: str, count: int, temperature: float, guidance: float, seed: float | None
    ) -> Iterator[tuple[list[Image.Image], str]]:
        words = checked_words(words).strip()
        if not words:
            raise ValueError("There are no words yet: say what to draw.")
        start, pictures = time.monotonic(), []
        for codes, pictures in studio.draw(words, int(count), temperature, guidance, checked_seed(seed)):
            yield [enlarged(picture) for picture in pictures], f"{codes} of {whole} codes"
        seconds = time.monotonic() - start
        yield [enlarged(picture) for picture in pictures], f"{whole} codes in {seconds:.1f} s"

    with gr.Row():
        with gr.Column(scale=2):
            words = words_input("Words", "draw-words", "What to draw")
            with gr.Row():
                temperature, guidance, seed = sampling_inputs("draw", temperature=0.7, guidance_scale=5.0)
                count = gr.Slider(
                    1, MOST_PICTURES, 1, step=1, label="Pictures", info="Drawn side by side", elem_id="draw-count"
                )
            with gr.Row():
                button = gr.Button("Draw", variant="primary", elem_id="draw-button")
                stop = gr.Button("Stop", elem_id="draw-stop")
            if examples.prompts:
                gr.Examples([[prompt] for prompt in examples.prompts], [words], label="For instance")
        with gr.Column(scale=2):
            title("Pictures")
            gallery = gr.Gallery(
                show_label=False,
                elem_id="draw-gallery",
                format="png",
                columns=2,
                height=490,
                object_fit="contain",
                interactive=False,
                buttons=["download", "fullscreen"],
            )
            progress = gr.Textbox(label="Progress", elem_id="draw-progress", interactive=False)
    inputs = [words, count, temperature, guidance, seed]
    events: list[dict] = [
        trigger(draw, inputs, [gallery, progress], api_name=name, show_progress="hidden", **ONE_AT_A_TIME)
        for trigger, name in ((button.click, "draw"), (words.submit, "draw_on_enter"))
    ]
    stop.click(None, cancels=events)
