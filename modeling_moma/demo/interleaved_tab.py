# SPDX-License-Identifier: Apache-2.0
"""The tab in which words and pictures are asked, and words and pictures answer in turn."""

import base64
import html
import io
from collections.abc import Iterator

import gradio as gr
from PIL import Image

from .inputs import ONE_AT_A_TIME, checked_seed, checked_words, read_picture, sampling_inputs, title
from .refusals import told_on_the_page
from .showing import enlarged
from .studio import Studio


MOST_PICTURES = 4


def interleaved_tab(studio: Studio):
    """Builds the tab."""

    @told_on_the_page
    def answer(
        prompt: dict, temperature: float, guidance: float, num_pictures: int, seed: float | None
    ) -> Iterator[str]:
        words, files = checked_words(prompt.get("text")).strip(), prompt.get("files") or []
        if not words and not files:
            raise ValueError("The prompt is empty: write words, add a picture, or both.")
        if len(files) > MOST_PICTURES:
            raise ValueError(f"The prompt has {len(files)} pictures, more than {MOST_PICTURES}: leave some out.")
        pictures = [read_picture(path) for path in files]
        parts = []
        for parts in studio.answer(words, pictures, temperature, guidance, int(num_pictures), checked_seed(seed)):
            yield as_html(parts)
        yield as_html(parts or ["The model had nothing to add."], is_whole=True)

    with gr.Row():
        with gr.Column():
            prompt = gr.MultimodalTextbox(
                label="Prompt of words and pictures",
                info=f"{studio.processor.image_token} in the words is a picture's place; else pictures come first",
                elem_id="interleaved-prompt",
                placeholder="Write words, add pictures",
                file_types=["image"],
                file_count="multiple",
                submit_btn=False,
            )
            with gr.Row():
                temperature, guidance, seed = sampling_inputs("interleaved", temperature=0.5, guidance_scale=1.0)
                count = gr.Slider(
                    1,
                    MOST_PICTURES,
                    1,
                    step=1,
                    label="Pictures",
                    info="At most",
                    elem_id="interleaved-count",
                )
            with gr.Row():
                button = gr.Button("Answer", variant="primary", elem_id="interleaved-button")
                stop = gr.Button("Stop", elem_id="interleaved-stop")
        with gr.Column():
            title("Answer")
            shown = gr.HTML(
                container=True,
                padding=True,
                elem_id="interleaved-answer",
                min_height=320,
            )
    inputs = [prompt, temperature, guidance, count, seed]
    events: list[dict] = [
        trigger(answer, inputs, [shown], api_name=name, show_progress="hidden", **ONE_AT_A_TIME)
        for trigger, name in ((button.click, "answer"), (prompt.submit, "answer_on_enter"))
    ]
    stop.click(None, cancels=events)


def as_html(parts: list[str | Image.Image], is_whole: bool = False) -> str:
    """Words and pictures in turn, as HTML that holds all of them; of the class `moma-whole` once nothing follows."""
    blocks = []
    for part in parts:
        if isinstance(part, str):
            blocks.append(f"<p>{html.escape(part.strip())}</p>")
            continue
        png = io.BytesIO()
        enlarged(part).save(png, "PNG")
        data = base64.b64encode(png.getvalue()).decode()
        blocks.append(f'<img alt="picture of the answer" width="200" src="data:image/png;base64,{data}">')
    name = "moma-answer moma-whole" if is_whole else "moma-answer"
    return f'<div class="{name}">{"".join(blocks)}</div>'
