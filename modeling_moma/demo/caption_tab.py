# SPDX-License-Identifier: Apache-2.0
"""The tab that puts a picture into words."""

import gradio as gr
from PIL import Image

from .examples import Examples
from .inputs import ONE_AT_A_TIME, picture_examples, picture_input, read_picture, title
from .refusals import told_on_the_page
from .showing import enlarged
from .studio import Studio


def caption_tab(studio: Studio, examples: Examples):
    """Builds the tab."""

    @told_on_the_page
    def caption(path: str | None) -> tuple[str, Image.Image]:
        if path is None:
            raise ValueError("There is no picture yet: upload one, paste one, or take an example.")
        picture = read_picture(path)
        return studio.caption(picture), enlarged(studio.seen(picture))

    with gr.Row():
        with gr.Column():
            picture = picture_input("Picture", "caption-picture")
            button = gr.Button("Caption", variant="primary", elem_id="caption-button")
            taken = picture_examples(examples, picture)
        with gr.Column():
            words = gr.Textbox(label="What the model says", elem_id="caption-words", interactive=False, lines=2)
            title(f"What the model sees of it: {studio.processor.image_seq_length} codes, decoded")
            seen = gr.Image(
                show_label=False,
                elem_id="caption-seen",
                interactive=False,
                format="png",
                height=300,
                buttons=[],
            )
    button.click(caption, [picture], [words, seen], api_name="caption", **ONE_AT_A_TIME)
    if taken is not None:
        taken.then(caption, [picture], [words, seen], **ONE_AT_A_TIME)
