# SPDX-License-Identifier: Apache-2.0
"""The page: its tabs, what visitors may send with the checks of it, and the server that shows it."""

import base64
import html
import io
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.utils import get_upload_folder
from gradio_client.utils import is_http_url_like
from PIL import Image

from tokenization.audio_input_moma import SoundError, read_sound
from tokenization.image_input_moma import clean_pil_image, open_image

from ..errors_moma import InputError
from .routing_view import RoutedExample, RoutingView
from .studio import PROMPTS, DemoSession


IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
# limits of an upload
MOST_BYTES = 10 * 2**20
MOST_PIXELS = 40_000_000
MOST_SECONDS, MOST_SAMPLES = 30, 2**23
MOST_CHARACTERS = 2000
# most images of a drawing, of a prompt and of an answer
MOST_IMAGES = 4
TOO_MANY_PIXELS = f"This image has more than {MOST_PIXELS // 10**6} million pixels: make it smaller."
NOT_UPLOADED = "This file was not uploaded to this page."
LEAST_SIDE = 256
# requests of all tabs and browsers use the model one at a time; the others wait in the queue
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
# one visitor more than these that wait for the model is told that the queue is full
MOST_WAITING = 32
# uploads are deleted every hour, once they are an hour old
CLEANING = (3600, 3600)
ABOUT = "One decoder reads and writes words and images: an image is a row of codes among the words."
CSS = """
.moma-words { line-height: 2.2; }
.moma-legend div { margin: 4px 0; }
.moma-answer img { margin: 6px 0; }
.moma-image img { width: 100%; height: 100%; object-fit: contain; }
"""


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


@contextmanager
def errors_shown() -> Iterator[None]:
    """Turn a `ValueError` into a message on the page, without its traceback in the server's log."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error


def uploaded(path: str | None, wanted: str) -> str:
    """Return the path of a file that a visitor uploaded, pasted, recorded or took from the examples."""
    if path is None:
        raise InputError(wanted)
    if not Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
        raise InputError(NOT_UPLOADED)
    return path


def read_image(path: str | None) -> Image.Image:
    """Open, check and decode an uploaded image."""
    path = uploaded(path, "There is no image yet: upload one, paste one, or take an example.")
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


def read_sound_upload(path: str | None, sampling_rate: int) -> np.ndarray:
    """Open, check and decode an uploaded sound."""
    path = uploaded(path, "There is no sound yet: upload or record one.")
    try:
        samples = read_sound(Path(path).read_bytes(), sampling_rate, max_samples=MOST_SAMPLES)
    except SoundError as error:
        if error.reason in ("sound too long", "sound too large"):
            raise InputError("This sound is too long: cut it to a few seconds.") from error
        raise InputError("This file is not a sound that can be read: take a WAV, FLAC, Ogg or MP3 file.") from error
    except OSError as error:
        raise InputError(NOT_UPLOADED) from error
    if len(samples) > MOST_SECONDS * sampling_rate:
        raise InputError(f"This sound is longer than {MOST_SECONDS} s: cut it.")
    return samples


def checked_words(words: str | None, wanted: str | None = None) -> str:
    """Return words as a visitor sent them: their input has a limit in the browser alone."""
    words = (words or "").strip()
    if wanted is not None and not words:
        raise InputError(f"There are no words yet: say what to {wanted}.")
    if len(words) > MOST_CHARACTERS:
        raise InputError(f"The words have {len(words)} characters, more than {MOST_CHARACTERS}: shorten them.")
    if any("\ud800" <= character <= "\udfff" for character in words):
        raise InputError("The words hold half a character (a lone surrogate): write them again.")
    return words


def checked_seed(seed: float | None) -> int:
    """Return a seed that the samplers take."""
    if seed is None or not 0 <= seed < 2**32:
        raise InputError(f"The seed must be a whole number from 0 to {2**32 - 1}, got {seed}.")
    return int(seed)


def unopened(component: Any) -> Any:
    """Have functions get the path of a file: Gradio would open it before our checks, and its errors would name it."""
    component.preprocess = lambda payload: None if payload is None else payload.path
    return component


def image_input(prefix: str) -> gr.Image:
    """Return an input for an image that is uploaded or pasted."""
    return unopened(
        gr.Image(
            label="Image",
            elem_id=f"{prefix}-image",
            elem_classes="moma-image",
            type="filepath",
            image_mode=None,
            sources=["upload", "clipboard"],
            height=300,
        )
    )


def image_examples(examples: Examples, image: gr.Image) -> list[Callable]:
    """Show images that a click puts into an image input; return what then calls a function, nothing without images."""
    if not examples.images:
        return []
    return [
        gr.Examples([[path] for path in examples.images], [image], label="Or take one of these").load_input_event.then
    ]


def words_input(label: str, elem_id: str, placeholder: str) -> gr.Textbox:
    """Return an input for words."""
    return gr.Textbox(label=label, elem_id=elem_id, placeholder=placeholder, max_lines=6, max_length=MOST_CHARACTERS)


def sampling_inputs(prefix: str, temperature: float, guidance_scale: float) -> list[gr.Slider | gr.Number]:
    """Return the sliders of temperature and guidance, and a seed."""
    options: dict[str, Any] = {"label": "Temperature", "info": "0: the likeliest", "elem_id": f"{prefix}-temperature"}
    temperature_input = gr.Slider(0, 2, temperature, step=0.05, **options)
    options = {"label": "Guidance", "info": "1: none", "elem_id": f"{prefix}-guidance"}
    guidance_input = gr.Slider(1, 10, guidance_scale, step=0.5, **options)
    seed = gr.Number(0, label="Seed", info="Same seed, same answer", precision=0, elem_id=f"{prefix}-seed")
    return [temperature_input, guidance_input, seed]


def count_input(prefix: str, info: str) -> gr.Slider:
    """Return the slider of a number of images."""
    return gr.Slider(1, MOST_IMAGES, 1, step=1, label="Images", info=info, elem_id=f"{prefix}-count")


def main_button(text: str, elem_id: str) -> gr.Button:
    """Return the button of what a tab is for."""
    return gr.Button(text, variant="primary", elem_id=elem_id)


def shown_text(label: str, elem_id: str, lines: int = 1) -> gr.Textbox:
    """Return a place for words of an answer."""
    return gr.Textbox(label=label, elem_id=elem_id, interactive=False, lines=lines)


def shown_image(title: str, elem_id: str, height: int, buttons: Sequence[Any] = ()) -> gr.Image:
    """Return a place for an image of an answer, under a title, since a label would cover a part of the image."""
    gr.Markdown(f"**{title}**")
    return gr.Image(
        show_label=False, elem_id=elem_id, interactive=False, format="png", height=height, buttons=list(buttons)
    )


def shown_gallery(elem_id: str, columns: int, height: int, buttons: Sequence[Any] = ()) -> gr.Gallery:
    """Return a place for several images of an answer."""
    return gr.Gallery(
        show_label=False,
        elem_id=elem_id,
        format="png",
        columns=columns,
        height=height,
        object_fit="contain",
        interactive=False,
        buttons=list(buttons),
    )


def on(triggers: list[Callable], function: Callable, inputs: list, outputs: list, name: str, **options) -> list:
    """Have events call a function that uses the model, named in the page's API."""
    return [trigger(function, inputs, outputs, api_name=name, **options, **ONE_AT_A_TIME) for trigger in triggers]


def enlarged(image: Image.Image) -> Image.Image:
    """Return an image of at least [`LEAST_SIDE`] pixels, each pixel a square: browsers would blur a small one."""
    factor = max(1, LEAST_SIDE // image.width)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def as_sound(samples: np.ndarray, sampling_rate: int) -> tuple[int, np.ndarray]:
    """Return what a player of the page takes: the rate and samples of 16 bits."""
    return sampling_rate, (np.clip(samples, -1, 1) * 32767).astype(np.int16)


def as_html(parts: list[str | Image.Image | np.ndarray], sampling_rate: int | None, is_whole: bool = False) -> str:
    """Return words, images and sounds in turn as one piece of HTML, of the class `moma-whole` once nothing follows."""
    blocks = []
    for part in parts:
        content = io.BytesIO()
        if isinstance(part, str):
            blocks.append(f"<p>{html.escape(part.strip())}</p>")
        elif isinstance(part, np.ndarray):
            # installed with what reads sounds, without which no model has any
            import soundfile

            soundfile.write(content, as_sound(part, 0)[1], sampling_rate or 0, format="WAV")
            data = base64.b64encode(content.getvalue()).decode()
            blocks.append(f'<audio controls src="data:audio/wav;base64,{data}"></audio>')
        else:
            enlarged(part).save(content, "PNG")
            data = base64.b64encode(content.getvalue()).decode()
            blocks.append(f'<img alt="image of the answer" width="200" src="data:image/png;base64,{data}">')
    name = "moma-answer moma-whole" if is_whole else "moma-answer"
    return f'<div class="{name}">{"".join(blocks)}</div>'


def caption_tab(studio: DemoSession, examples: Examples):
    """Build the tab."""

    def caption(path: str | None) -> tuple[str, Image.Image]:
        with errors_shown():
            image = read_image(path)
            return studio.caption(image), enlarged(studio.seen(image))

    with gr.Row():
        with gr.Column():
            image = image_input("caption")
            button = main_button("Caption", "caption-button")
            taken = image_examples(examples, image)
        with gr.Column():
            words = shown_text("What the model says", "caption-words", lines=2)
            title = f"What the model sees of it: {studio.processor.image_seq_length} codes, decoded"
            seen = shown_image(title, "caption-seen", 300)
    on([button.click, *taken], caption, [image], [words, seen], "caption")


def label_tab(studio: DemoSession, examples: Examples):
    """Build the tab."""

    def label(path: str | None) -> tuple[dict[str, float], str]:
        with errors_shown():
            names, tags = studio.label(read_image(path))
            return {guess.text: guess.probability for guess in names}, ", ".join(guess.text for guess in tags)

    def find(words: str) -> list[tuple[Image.Image, str]]:
        with errors_shown():
            return studio.find(checked_words(words, "look for"))

    with gr.Row():
        with gr.Column():
            image = image_input("label")
            button = main_button("Name it", "label-button")
            taken = image_examples(examples, image)
        with gr.Column():
            names = gr.Label(label="Names, and how likely the model finds them", elem_id="label-names")
            tags = shown_text("Tags", "label-tags", lines=2)
    on([button.click, *taken], label, [image], [names, tags], "label")
    if studio.coded is not None:
        words = words_input("Words", "find-words", f"Find one of {len(studio.coded.paths):,} images by words")
        find_button = main_button("Find", "find-button")
        on([find_button.click, words.submit], find, [words], [shown_gallery("find-gallery", 6, 320)], "find")


def draw_tab(studio: DemoSession, examples: Examples):
    """Build the tab."""
    whole = studio.processor.image_seq_length

    def draw(
        words: str, count: int, temperature: float, guidance: float, seed: float | None
    ) -> Iterator[tuple[list[Image.Image], str]]:
        with errors_shown():
            words = checked_words(words, "draw")
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
                sampling = sampling_inputs("draw", *studio.image_sampling())
                count = count_input("draw", "Drawn side by side")
            with gr.Row():
                button = main_button("Draw", "draw-button")
                stop = gr.Button("Stop", elem_id="draw-stop")
            if examples.prompts:
                gr.Examples([[prompt] for prompt in examples.prompts], [words], label="For instance")
        with gr.Column(scale=2):
            gr.Markdown("**Images**")
            gallery = shown_gallery("draw-gallery", 2, 490, ["download", "fullscreen"])
            progress = shown_text("Progress", "draw-progress")
    inputs, outputs = [words, count, *sampling], [gallery, progress]
    events = on([button.click, words.submit], draw, inputs, outputs, "draw", show_progress="hidden")
    stop.click(None, cancels=events)


def sound_tab(studio: DemoSession, sampling_rate: int):
    """Build the tab, for a model whose sounds have this rate."""

    def listen(path: str | None) -> tuple[str, tuple[int, np.ndarray]]:
        with errors_shown():
            samples = read_sound_upload(path, sampling_rate)
            return studio.listen(samples), as_sound(studio.heard(samples), sampling_rate)

    def draw(path: str | None, temperature: float, guidance: float, seed: float | None) -> Iterator[Image.Image]:
        with errors_shown():
            sounds = [read_sound_upload(path, sampling_rate)]
            for _, (image,) in studio.draw("", 1, temperature, guidance, checked_seed(seed), sounds):
                yield enlarged(image)

    def say(words: str, temperature: float, guidance: float, seed: float | None) -> tuple[int, np.ndarray]:
        with errors_shown():
            words = checked_words(words, "speak")
            return as_sound(studio.say(words, temperature, guidance, checked_seed(seed)), sampling_rate)

    sampling = sampling_inputs("sound", temperature=0.7, guidance_scale=1.0)
    player: dict[str, Any] = {"interactive": False, "format": "wav"}
    with gr.Row():
        with gr.Column():
            sound = gr.Audio(label="Sound", elem_id="sound-input", type="filepath", sources=["upload", "microphone"])
            with gr.Row():
                listen_button = main_button("Write it", "sound-listen")
                draw_button = gr.Button("Draw it", elem_id="sound-draw")
            words = words_input("Words", "sound-words", "What to speak")
            say_button = main_button("Speak", "sound-say")
        with gr.Column():
            written = shown_text("What the model writes", "sound-written")
            heard = gr.Audio(label="What the model hears of it", elem_id="sound-heard", **player)
            drawn = shown_image("What the model draws", "sound-drawn", 256)
            said = gr.Audio(label="What the model says", elem_id="sound-said", **player)
    unopened(sound)
    on([listen_button.click], listen, [sound], [written, heard], "listen")
    on([draw_button.click], draw, [sound, *sampling], [drawn], "draw_sound")
    on([say_button.click], say, [words, *sampling], [said], "say")


def interleaved_tab(studio: DemoSession):
    """Build the tab."""

    def answer(
        prompt: dict, temperature: float, guidance: float, num_images: int, seed: float | None
    ) -> Iterator[str]:
        with errors_shown():
            words, files = checked_words(prompt.get("text")), prompt.get("files") or []
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
                count = count_input("interleaved", "At most")
            with gr.Row():
                button = main_button("Answer", "interleaved-button")
                stop = gr.Button("Stop", elem_id="interleaved-stop")
        with gr.Column():
            gr.Markdown("**Answer**")
            shown = gr.HTML(container=True, padding=True, elem_id="interleaved-answer", min_height=320)
    inputs = [prompt, temperature, guidance, count, seed]
    events = on([button.click, prompt.submit], answer, inputs, [shown], "answer", show_progress="hidden")
    stop.click(None, cancels=events)


def routing_tab(studio: DemoSession, examples: Examples):
    """Build the tab."""
    most = studio.model.config.num_hidden_layers
    view = RoutingView(studio.model.config)

    def show(example: RoutedExample | None, layer: int) -> tuple[Image.Image | None, str, str]:
        if example is None:
            return None, "", ""
        index = int(layer) - 1
        return view.image(example, index), view.words(example, index), view.legend(example, index)

    def route(path: str | None, words: str, layer: int) -> tuple[RoutedExample, Image.Image | None, str, str]:
        with errors_shown():
            example = studio.route(None if path is None else read_image(path), checked_words(words))
            return example, *show(example, layer)

    # Gradio keeps this state for each visitor
    example = gr.State(None)
    with gr.Row():
        with gr.Column():
            image = image_input("routing")
            words = words_input("Words", "routing-words", "Left empty: the model's own caption of the image")
            button = main_button("Show the routing", "routing-button")
            taken = image_examples(examples, image)
        with gr.Column():
            # Gradio raises for a slider of one place, which is hidden anyway
            layer = gr.Slider(1, max(most, 2), 1, step=1, label="Layer", elem_id="routing-layer", visible=most > 1)
            patches = shown_image("Patches by expert", "routing-patches", 400, ["download", "fullscreen"])
            gr.Markdown("**Words by expert**")
            outputs = [patches, gr.HTML(elem_id="routing-chips"), gr.HTML(elem_id="routing-legend")]
    on([button.click, *taken], route, [image, words, layer], [example, *outputs], "route")
    layer.change(
        show,
        [example, layer],
        outputs,
        show_progress="hidden",
        trigger_mode="always_last",
        concurrency_limit=None,
        api_visibility="private",
    )


def build_page(studio: DemoSession, examples: Examples | None = None) -> gr.Blocks:
    """Return a page of five tabs for one model, and of six where it hears."""
    examples = examples or Examples()
    # by default Gradio reports each page to its makers
    with gr.Blocks(title=f"{studio.name}: MoMa", analytics_enabled=False, delete_cache=CLEANING) as page:
        gr.Markdown(f"# {studio.name}\n{ABOUT}")
        with gr.Tab("Caption"):
            caption_tab(studio, examples)
        with gr.Tab("Names"):
            label_tab(studio, examples)
        with gr.Tab("Draw"):
            draw_tab(studio, examples)
        if studio.sampling_rate is not None:
            with gr.Tab("Sounds"):
                sound_tab(studio, studio.sampling_rate)
        with gr.Tab("Interleaved"):
            interleaved_tab(studio)
        with gr.Tab("Routing"):
            routing_tab(studio, examples)
    for block in page.blocks.values():
        _refuse_addresses(block)
    # otherwise requests to Gradio's own API pass by the queue
    return page.queue(max_size=MOST_WAITING, api_open=False)


def _refuse_addresses(block: Any) -> None:
    """Have a part of the page take uploads alone: Gradio would download what a request names, of any size."""
    move = block.async_move_resource_to_block_cache

    async def move_upload(path: str | Path | None) -> str | None:
        if is_http_url_like(path):
            raise gr.Error(NOT_UPLOADED)
        return await move(path)

    block.async_move_resource_to_block_cache = move_upload


def open_page(page: gr.Blocks, host: str | None = None, port: int | None = None) -> str:
    """Start the page's server in threads of this process, which fetches nothing and sends nothing elsewhere."""
    # Gradio takes 0 for a port
    if port == 0:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
    # fonts of the visitor's system are not fetched from elsewhere
    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            max_file_size=MOST_BYTES,
            footer_links=[],
            run_history=False,
            show_error=False,
            theme=gr.themes.Soft(primary_hue="teal", **fonts),
            css=CSS,
        )
    except OSError as error:
        raise InputError(f"--host, --port: nobody can listen on {host}:{port} ({error}).") from error
    except ValueError as error:
        # Gradio's advice is a tunnel through its makers' servers
        raise InputError(
            f"--host, --port: the page on {host or 'this machine'} does not answer this process in time. Does "
            "`http_proxy` or `https_proxy` stand in the way (`no_proxy=localhost`), or is the machine busy?"
        ) from error
    return address
