# SPDX-License-Identifier: Apache-2.0
"""The tab that shows which expert took which patch and which word, layer by layer."""

import gradio as gr
from PIL import Image

from .examples import Examples
from .inputs import ONE_AT_A_TIME, checked_words, picture_examples, picture_input, read_picture, title, words_input
from .refusals import told_on_the_page
from .routing_view import RoutedExample, RoutingView
from .studio import Studio


Shown = tuple[Image.Image | None, str, str]


def routing_tab(studio: Studio, examples: Examples):
    """Builds the tab."""
    config = studio.model.config
    view = RoutingView(config)

    def show(example: RoutedExample | None, layer: int) -> Shown:
        if example is None:
            return None, "", ""
        index = int(layer) - 1
        return view.picture(example, index), view.words(example, index), view.legend(example, index)

    @told_on_the_page
    def route(path: str | None, words: str, layer: int) -> tuple[RoutedExample, Image.Image | None, str, str]:
        example = studio.route(None if path is None else read_picture(path), checked_words(words))
        return example, *show(example, layer)

    # of this visitor
    example = gr.State(None)
    with gr.Row():
        with gr.Column():
            picture = picture_input("Picture", "routing-picture")
            words = words_input("Words", "routing-words", "Left empty: the model's own caption of the picture")
            button = gr.Button("Show the routing", variant="primary", elem_id="routing-button")
            taken = picture_examples(examples, picture)
        with gr.Column():
            most = config.num_hidden_layers
            # a slider of one place is refused, and nobody needs it
            layer = gr.Slider(1, max(most, 2), 1, step=1, label="Layer", elem_id="routing-layer", visible=most > 1)
            title("Patches by expert")
            patches = gr.Image(
                show_label=False,
                elem_id="routing-patches",
                interactive=False,
                format="png",
                height=400,
                buttons=["download", "fullscreen"],
            )
            title("Words by expert")
            chips = gr.HTML(elem_id="routing-chips")
            legend = gr.HTML(elem_id="routing-legend")
    outputs = [patches, chips, legend]
    button.click(route, [picture, words, layer], [example, *outputs], api_name="route", **ONE_AT_A_TIME)
    if taken is not None:
        taken.then(route, [picture, words, layer], [example, *outputs], **ONE_AT_A_TIME)
    layer.change(
        show,
        [example, layer],
        outputs,
        show_progress="hidden",
        trigger_mode="always_last",
        concurrency_limit=None,
        api_visibility="private",
    )
