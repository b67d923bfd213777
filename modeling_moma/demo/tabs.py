# SPDX-License-Identifier: Apache-2.0
"""The tabs of the page: captions, names, drawings, sounds, answers of words and images, and the routing by layers."""

import base64
import html
import io
import time
import wave
from collections.abc import Iterator

import gradio as gr
import numpy as np
from PIL import Image

from ..errors_moma import InputError
from .inputs import (
    ONE_AT_A_TIME,
    Examples,
    checked_seed,
    checked_words,
    image_examples,
    image_input,
    read_image,
    read_sound_upload,
    sampling_inputs,
    show_errors,
    sound_input,
    title,
    words_input,
)
from .routing_view import RoutedExample, RoutingView
from .studio import DemoSession


LEAST_SIDE = 256
# most images of a drawing, of a prompt and of an answer
MOST_IMAGES = 4

# rate and samples
Sound = tuple[int, np.ndarray]
ShownRouting = tuple[Image.Image | None, str, str]


def caption_tab(studio: DemoSession, examples: Examples):
    """Build the tab."""

    @show_errors
    def caption(path: str | None) -> tuple[str, Image.Image]:
        if path is None:
            raise InputError("There is no image yet: upload one, paste one, or take an example.")
        image = read_image(path)
        return studio.caption(image), enlarged(studio.seen(image))

    with gr.Row():
        with gr.Column():
            image = image_input("Image", "caption-image")
            button = gr.Button("Caption", variant="primary", elem_id="caption-button")
            taken = image_examples(examples, image)
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
    button.click(caption, [image], [words, seen], api_name="caption", **ONE_AT_A_TIME)
    if taken is not None:
        taken.then(caption, [image], [words, seen], **ONE_AT_A_TIME)


def label_tab(studio: DemoSession, examples: Examples):
    """Build the tab."""

    @show_errors
    def label(path: str | None) -> tuple[dict[str, float], str]:
        if path is None:
            raise InputError("There is no image yet: upload one, paste one, or take an example.")
        names, tags = studio.label(read_image(path))
        return {guess.text: guess.probability for guess in names}, ", ".join(guess.text for guess in tags)

    @show_errors
    def find(words: str) -> list[tuple[Image.Image, str]]:
        words = checked_words(words).strip()
        if not words:
            raise InputError("There are no words yet: say what to look for.")
        return studio.find(words)

    with gr.Row():
        with gr.Column():
            image = image_input("Image", "label-image")
            button = gr.Button("Name it", variant="primary", elem_id="label-button")
            taken = image_examples(examples, image)
        with gr.Column():
            names = gr.Label(label="Names, and how likely the model finds them", elem_id="label-names")
            tags = gr.Textbox(label="Tags", elem_id="label-tags", interactive=False, lines=2)
    button.click(label, [image], [names, tags], api_name="label", **ONE_AT_A_TIME)
    if taken is not None:
        taken.then(label, [image], [names, tags], **ONE_AT_A_TIME)
    if studio.coded is None:
        return
    words = words_input("Words", "find-words", f"Find one of {len(studio.coded.paths):,} images by words")
    find_button = gr.Button("Find", variant="primary", elem_id="find-button")
    gallery = gr.Gallery(
        show_label=False, elem_id="find-gallery", format="png", columns=6, height=320, object_fit="contain", buttons=[]
    )
    for trigger, name in ((find_button.click, "find"), (words.submit, "find_on_enter")):
        trigger(find, [words], [gallery], api_name=name, **ONE_AT_A_TIME)


def draw_tab(studio: DemoSession, examples: Examples):
    """Build the tab."""
    whole = studio.processor.image_seq_length

    @show_errors
    def draw(
        words: str, count: int, temperature: float, guidance: float, seed: float | None
    ) -> Iterator[tuple[list[Image.Image], str]]:
        words = checked_words(words).strip()
        if not words:
            raise InputError("There are no words yet: say what to draw.")
        start, images = time.monotonic(), []
        for codes, images in studio.draw(words, int(count), temperature, guidance, checked_seed(seed)):
            # the last are shown once: a file that is written again while the page loads it breaks off
            if codes < whole:
                yield [enlarged(image) for image in images], f"{codes} of {whole} codes"
        seconds = time.monotonic() - start
        yield [enlarged(image) for image in images], f"{whole} codes in {seconds:.1f} s"

    with gr.Row():
        with gr.Column(scale=2):
            words = words_input("Words", "draw-words", "What to draw")
            with gr.Row():
                temperature, guidance, seed = sampling_inputs("draw", *studio.image_sampling())
                count = gr.Slider(
                    1, MOST_IMAGES, 1, step=1, label="Images", info="Drawn side by side", elem_id="draw-count"
                )
            with gr.Row():
                button = gr.Button("Draw", variant="primary", elem_id="draw-button")
                stop = gr.Button("Stop", elem_id="draw-stop")
            if examples.prompts:
                gr.Examples([[prompt] for prompt in examples.prompts], [words], label="For instance")
        with gr.Column(scale=2):
            title("Images")
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


def sound_tab(studio: DemoSession, sampling_rate: int):
    """Build the tab, for a model whose sounds have this rate."""

    def samples_of(path: str | None) -> np.ndarray:
        if path is None:
            raise InputError("There is no sound yet: upload or record one.")
        return read_sound_upload(path, sampling_rate)

    @show_errors
    def listen(path: str | None) -> tuple[str, Sound]:
        samples = samples_of(path)
        return studio.listen(samples), as_sound(studio.heard(samples), sampling_rate)

    @show_errors
    def draw(path: str | None, temperature: float, guidance: float, seed: float | None) -> Iterator[Image.Image]:
        sounds = [samples_of(path)]
        for _, (image,) in studio.draw("", 1, temperature, guidance, checked_seed(seed), sounds):
            yield enlarged(image)

    @show_errors
    def say(words: str, temperature: float, guidance: float, seed: float | None) -> Sound:
        words = checked_words(words).strip()
        if not words:
            raise InputError("There are no words yet: say what to speak.")
        return as_sound(studio.say(words, temperature, guidance, checked_seed(seed)), sampling_rate)

    temperature, guidance, seed = sampling_inputs("sound", temperature=0.7, guidance_scale=1.0)
    with gr.Row():
        with gr.Column():
            sound = sound_input("Sound", "sound-input")
            with gr.Row():
                listen_button = gr.Button("Write it", variant="primary", elem_id="sound-listen")
                draw_button = gr.Button("Draw it", elem_id="sound-draw")
            words = words_input("Words", "sound-words", "What to speak")
            say_button = gr.Button("Speak", variant="primary", elem_id="sound-say")
        with gr.Column():
            written = gr.Textbox(label="What the model writes", elem_id="sound-written", interactive=False)
            heard = gr.Audio(
                label="What the model hears of it", elem_id="sound-heard", interactive=False, format="wav"
            )
            title("What the model draws")
            drawn = gr.Image(
                show_label=False, elem_id="sound-drawn", interactive=False, format="png", height=256, buttons=[]
            )
            said = gr.Audio(label="What the model says", elem_id="sound-said", interactive=False, format="wav")
    chosen = [temperature, guidance, seed]
    listen_button.click(listen, [sound], [written, heard], api_name="listen", **ONE_AT_A_TIME)
    draw_button.click(draw, [sound, *chosen], [drawn], api_name="draw_sound", **ONE_AT_A_TIME)
    say_button.click(say, [words, *chosen], [said], api_name="say", **ONE_AT_A_TIME)


def as_sound(samples: np.ndarray, sampling_rate: int) -> Sound:
    """Return what a player of the page takes: the rate and samples of 16 bits."""
    return sampling_rate, (np.clip(samples, -1, 1) * 32767).astype(np.int16)


def interleaved_tab(studio: DemoSession):
    """Build the tab."""

    @show_errors
    def answer(
        prompt: dict, temperature: float, guidance: float, num_images: int, seed: float | None
    ) -> Iterator[str]:
        words, files = checked_words(prompt.get("text")).strip(), prompt.get("files") or []
        if not words and not files:
            raise InputError("The prompt is empty: write words, add an image, or both.")
        if len(files) > MOST_IMAGES:
            raise InputError(f"The prompt has {len(files)} images, more than {MOST_IMAGES}: leave some out.")
        images = [read_image(path) for path in files]
        parts = []
        for parts in studio.answer(words, images, temperature, guidance, int(num_images), checked_seed(seed)):
            yield as_html(parts, studio.sampling_rate)
        yield as_html(parts or ["The model had nothing to add."], studio.sampling_rate, is_whole=True)

    with gr.Row():
        with gr.Column():
            prompt = gr.MultimodalTextbox(
                label="Prompt of words and images",
                info=f"{studio.processor.image_token} in the words is an image's place; else images come first",
                elem_id="interleaved-prompt",
                placeholder="Write words, add images",
                file_types=["image"],
                file_count="multiple",
                submit_btn=False,
            )
            with gr.Row():
                temperature, guidance, seed = sampling_inputs("interleaved", temperature=0.5, guidance_scale=1.0)
                count = gr.Slider(
                    1,
                    MOST_IMAGES,
                    1,
                    step=1,
                    label="Images",
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


def as_html(
    parts: list[str | Image.Image | np.ndarray], sampling_rate: int | None = None, is_whole: bool = False
) -> str:
    """Return words, images and sounds in turn as one piece of HTML, of the class `moma-whole` once nothing follows."""
    blocks = []
    for part in parts:
        if isinstance(part, str):
            blocks.append(f"<p>{html.escape(part.strip())}</p>")
            continue
        if isinstance(part, np.ndarray):
            blocks.append(f'<audio controls src="data:audio/wav;base64,{as_wav(part, sampling_rate)}"></audio>')
            continue
        png = io.BytesIO()
        enlarged(part).save(png, "PNG")
        data = base64.b64encode(png.getvalue()).decode()
        blocks.append(f'<img alt="image of the answer" width="200" src="data:image/png;base64,{data}">')
    name = "moma-answer moma-whole" if is_whole else "moma-answer"
    return f'<div class="{name}">{"".join(blocks)}</div>'


def as_wav(samples: np.ndarray, sampling_rate: int | None) -> str:
    """Return a WAV file of samples, as base64."""
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sampling_rate or 16000)
        file.writeframes(as_sound(samples, 0)[1].tobytes())
    return base64.b64encode(content.getvalue()).decode()


def routing_tab(studio: DemoSession, examples: Examples):
    """Build the tab."""
    config = studio.model.config
    view = RoutingView(config)

    def show(example: RoutedExample | None, layer: int) -> ShownRouting:
        if example is None:
            return None, "", ""
        index = int(layer) - 1
        return view.image(example, index), view.words(example, index), view.legend(example, index)

    @show_errors
    def route(path: str | None, words: str, layer: int) -> tuple[RoutedExample, Image.Image | None, str, str]:
        example = studio.route(None if path is None else read_image(path), checked_words(words))
        return example, *show(example, layer)

    # Gradio keeps this state for each visitor
    example = gr.State(None)
    with gr.Row():
        with gr.Column():
            image = image_input("Image", "routing-image")
            words = words_input("Words", "routing-words", "Left empty: the model's own caption of the image")
            button = gr.Button("Show the routing", variant="primary", elem_id="routing-button")
            taken = image_examples(examples, image)
        with gr.Column():
            most = config.num_hidden_layers
            # Gradio raises for a slider of one place, which is hidden anyway
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
    button.click(route, [image, words, layer], [example, *outputs], api_name="route", **ONE_AT_A_TIME)
    if taken is not None:
        taken.then(route, [image, words, layer], [example, *outputs], **ONE_AT_A_TIME)
    layer.change(
        show,
        [example, layer],
        outputs,
        show_progress="hidden",
        trigger_mode="always_last",
        concurrency_limit=None,
        api_visibility="private",
    )


def enlarged(image: Image.Image) -> Image.Image:
    """Return an image of at least [`LEAST_SIDE`] pixels, each pixel a square: browsers would blur a small one."""
    factor = max(1, LEAST_SIDE // image.width)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
