# SPDX-License-Identifier: Apache-2.0
"""Draw from words, caption an image, hear or speak where the model can, or mix all.

moma generate --model DIR --prompt "house (typical)" --mode image --output image.png
moma generate --model DIR --image image.png --mode text
moma generate --model DIR --audio sound.wav --mode text
"""

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ..errors_moma import InputError
from ..utils.atomic_files import check_place
from ..utils.errors import needs_extra
from ..utils.fields import Count, Float, Int, Seed, Share, check_utf8
from ..utils.messages import one_line, without_import_notices
from .arguments import Flag, parse_fields


# scores times or by numbers beyond these would not be finite
LEAST_TEMPERATURE = 1e-6
MOST_SCALE = 1000
Scale = Annotated[Float, Field(ge=0, le=MOST_SCALE)]
TopK = Annotated[Int, Field(ge=0)]
OfSampling = Flag(section="sampling")


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raise `ValueError` at a temperature too near to 0, or at flags of sampling without it."""
    if 0 < temperature < LEAST_TEMPERATURE:
        raise InputError(
            f"sampling.temperature = {temperature}: it is below {LEAST_TEMPERATURE}; 0 takes the likeliest token."
        )
    if temperature == 0 and (top_k or top_p < 1):
        flag = f"sampling.top_k = {top_k}" if top_k else f"sampling.top_p = {top_p:g}"
        raise InputError(
            f"{flag}: nothing is sampled here, where the temperature is 0: give sampling.temperature, such as 1."
        )


# of `MomaForCausalLM.generate`
Mode = Literal["text", "image", "interleaved", "audio"]
TEXT_NEW_TOKENS = 32
SOUND_NEW_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `moma generate`.

    Args:
        model (`str`):
            folder or Hub name of a model with its processor.
        prompt (`list[str]`, *optional*, defaults to `[]`):
            words; give it again for more rows.
        image (`list[str]`, *optional*, defaults to `[]`):
            image before the words of its row.
        audio (`list[str]`, *optional*, defaults to `[]`):
            sound before the words of its row, of a model that has a codec of sounds.
        mode (`Literal["text", "image", "interleaved", "audio"]`, *optional*):
            by default text with --image or --audio, else image.
        output (`str`, *optional*):
            where images go, by default image.png, or sounds, by default sound.wav; numbered if there are several.
            Sounds between texts and images go beside the images.
        max_new_tokens (`int`, *optional*):
            by default 32, and room for an image; for a sound, 256.
        temperature (`float`, *optional*):
            0 takes the likeliest; by default 0 for text and with beams, else 1. Where neither it nor any of the next
            four is given, images are drawn as the model's `generation_config.json` has it in `image_sampling`.
        top_k (`int`, *optional*):
            sample among so many tokens, by default all.
        top_p (`float`, *optional*):
            sample among tokens of this total probability, by default 1.
        num_beams (`int`, *optional*):
            beams of a search, by default 1, which is none.
        guidance_scale (`float`, *optional*):
            above 1, which is the default, follows the words more closely.
        candidates (`int`, *optional*, defaults to `1`):
            draw so many images of each prompt, and write the one of which its words are likeliest.
        seed (`int`, *optional*, defaults to `0`):
            of what is drawn.
    """

    model: str
    prompt: Annotated[list[str], Flag(is_repeated=True)] = field(default_factory=list)
    image: Annotated[list[str], Flag(is_repeated=True)] = field(default_factory=list)
    audio: Annotated[list[str], Flag(is_repeated=True)] = field(default_factory=list)
    mode: Mode | None = None
    output: str | None = None
    max_new_tokens: Annotated[Count | None, OfSampling] = None
    temperature: Annotated[Scale | None, OfSampling] = None
    top_k: Annotated[TopK | None, OfSampling] = None
    top_p: Annotated[Share | None, OfSampling] = None
    num_beams: Annotated[Count | None, OfSampling] = None
    guidance_scale: Annotated[Scale | None, OfSampling] = None
    candidates: Count = 1
    seed: Seed = 0


def parse_arguments(arguments: list[str] | None = None) -> Arguments:
    args = parse_fields(Arguments, __doc__, arguments, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = args.mode or ("text" if args.image or args.audio else "image")
    if mode == "text" and args.output is not None:
        raise InputError(f"--output {args.output!r}: the mode 'text' writes no file; texts are printed.")
    output = args.output or ("sound.wav" if mode == "audio" else "image.png")
    # what is wrong with it is told before the model is loaded, which takes a while
    if mode != "text":
        (sound_format if mode == "audio" else image_format)(Path(output))
    return dataclasses.replace(args, mode=mode, output=output)


def make_rows(
    prompts: list[str], images: list[str], sounds: list[str]
) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """Texts, images and sounds of each row; what is given once serves all rows."""
    num_rows = max(len(prompts), len(images), len(sounds))
    if num_rows == 0:
        raise InputError("--prompt, --image, --audio: give at least one of them.")
    for name, values in (("--prompt", prompts), ("--image", images), ("--audio", sounds)):
        if len(values) not in (0, 1, num_rows):
            raise InputError(f"{name}: given {len(values)} times for {num_rows} rows; give it once, or for every row.")
    prompts, images, sounds = (
        values * num_rows if len(values) == 1 else values for values in (prompts, images, sounds)
    )
    shown = ("<image>" if images else "") + ("<audio>" if sounds else "")
    texts = [shown + prompt for prompt in prompts or [""] * num_rows]
    return texts, [[image] for image in images], [[sound] for sound in sounds]


def generation_arguments(args: Arguments, image_seq_length: int, has_image_sampling: bool = False) -> dict:
    """Arguments of `generate` for the command line's; a model may have a way of its own to draw images."""
    chosen: dict[str, Any] = {"generation_mode": args.mode}
    max_new_tokens = args.max_new_tokens
    if max_new_tokens is None and args.mode == "audio":
        max_new_tokens = SOUND_NEW_TOKENS
    if max_new_tokens is None and args.mode != "image":
        max_new_tokens = TEXT_NEW_TOKENS + (image_seq_length + 2 if args.mode == "interleaved" else 0)
    if max_new_tokens is not None:
        chosen["max_new_tokens"] = max_new_tokens
    given = (args.temperature, args.top_k, args.top_p, args.num_beams, args.guidance_scale)
    if has_image_sampling and args.mode == "image" and given.count(None) == len(given):
        return chosen
    chosen["num_beams"] = args.num_beams or 1
    chosen["guidance_scale"] = 1.0 if args.guidance_scale is None else args.guidance_scale
    temperature, top_k, top_p = sampling_of(args)
    if temperature == 0:
        return {**chosen, "do_sample": False}
    return {**chosen, "do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}


def sampling_of(args: Arguments) -> tuple[float, int, float]:
    """Return temperature, 0 for the likeliest tokens, top-k and top-p; by default text and beams are not sampled."""
    temperature = args.temperature
    if temperature is None:
        temperature = 0.0 if args.mode == "text" or (args.num_beams or 1) > 1 else 1.0
    return temperature, args.top_k or 0, 1.0 if args.top_p is None else args.top_p


def check_prompts_and_temperature(args: Arguments) -> None:
    """Raise `ValueError` at a prompt that is no text, a temperature too near to 0, or flags of sampling without it."""
    for prompt in args.prompt:
        check_utf8("--prompt", prompt)
    check_sampling(*sampling_of(args))


def check_candidates(args: Arguments) -> None:
    """Raise `ValueError` where there is nothing by which one of several candidates could be chosen."""
    if args.candidates == 1:
        return
    if args.mode != "image":
        raise InputError(f"--candidates {args.candidates}: only images are chosen, and the mode is {args.mode!r}.")
    if sampling_of(args)[0] == 0:
        raise InputError(
            f"--candidates {args.candidates}: they would be alike, as nothing is sampled: give sampling.temperature."
        )
    if args.image or args.audio or not args.prompt or not all(prompt.strip() for prompt in args.prompt):
        raise InputError(
            f"--candidates {args.candidates}: images are chosen by the words of their prompts; give each --prompt "
            "words, and neither --image nor --audio."
        )


def image_format(path: Path) -> str:
    """Return the name of the file format for a path's ending, once images can be written there."""
    from PIL import Image

    name = Image.registered_extensions().get(path.suffix.lower())
    if name is None:
        raise InputError(f"--output: {str(path)!r} has no ending of an image format, such as .png.")
    try:
        Image.new("RGB", (8, 8)).save(BytesIO(), format=name)
    except (OSError, KeyError, ValueError) as error:
        raise InputError(
            f"--output: colour images cannot be written as {path.suffix} ({name}); take another ending, such as .png."
        ) from error
    check_place(path)
    return name


def sound_format(path: Path) -> str:
    """Return the name of the file format for a path's ending, once sounds can be written there."""
    with needs_extra("writing sounds needs soundfile", "audio"):
        import numpy as np
        import soundfile

    name = path.suffix.lstrip(".").upper()
    if name not in soundfile.available_formats():
        raise InputError(f"--output: {str(path)!r} has no ending of a format of sounds, such as .wav or .flac.")
    try:
        soundfile.write(BytesIO(), np.zeros(1), 16000, format=name)
    except (soundfile.LibsndfileError, TypeError, ValueError) as error:
        raise InputError(
            f"--output: sounds cannot be written as {path.suffix} ({error}); take another ending, such as .wav."
        ) from error
    check_place(path)
    return name


def check_sounds(args: Arguments, processor: Any) -> int | None:
    """Return the sampling rate of a model's sounds, `None` where it has none."""
    codec = processor.codecs.get("audio")
    asked = "--audio" if args.audio else f"--mode {args.mode}"
    if codec is None and (args.audio or args.mode == "audio"):
        known = ", ".join(["text", *processor.frames])
        raise InputError(f"{asked}: the model {args.model!r} has no codec of sounds; it knows {known}.")
    rate = getattr(codec, "sampling_rate", None)
    if rate is None and codec is not None and args.mode in ("audio", "interleaved"):
        raise InputError(
            f"{asked}: the codec {type(codec).__name__} of {args.model!r} has no `sampling_rate`, so what it makes "
            "cannot be written; decode its codes in Python, with `processor.decode_items`."
        )
    return rate


def run(args: Arguments) -> None:
    """Load, generate, print texts and write images."""
    with without_import_notices():
        import torch
        from transformers import set_seed

        from ..evaluation.retrieval import likeliest_drawings
        from ..frames_moma import open_frame_codes
        from ..hub.loading import open_model, open_processor

    check_prompts_and_temperature(args)
    check_candidates(args)
    output = Path(str(args.output))
    writes_images = args.mode in ("image", "interleaved")
    file_format = image_format(output) if writes_images else sound_format(output) if args.mode == "audio" else None
    texts, images, sounds = make_rows(args.prompt, args.image, args.audio)
    if args.mode in ("image", "audio"):
        # each row has one
        for number in range(len(texts)):
            check_place(numbered(output, number, len(texts)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor: Any = open_processor(args.model, "--model")
    model: Any = open_model(args.model, dtype=torch.float32 if device == "cpu" else "auto").to(device).eval()
    processor.to(device)
    sampling_rate = check_sounds(args, processor)
    items = {"audio": sounds} if sounds else {}
    try:
        inputs = processor(
            images=images or None, text=texts, **items, padding=True, padding_side="left", return_tensors="pt"
        )
    # an address that is not reached, a file that cannot be read
    except OSError as error:
        raise InputError(f"--image: {error}") from error
    inputs = {name: values.repeat_interleave(args.candidates, dim=0) for name, values in inputs.to(device).items()}
    set_seed(args.seed)
    has_image_sampling = bool(getattr(model.generation_config, "image_sampling", None))
    ids = model.generate(**inputs, **generation_arguments(args, model.config.image_seq_length, has_image_sampling))
    width = inputs["input_ids"].shape[1]
    if args.mode == "image":
        # the last one of each row: a prompt may hold others, and the beginning of this one
        codes = torch.cat([model.decode_image_tokens(row.unsqueeze(0))[-1:] for row in ids])
        if args.candidates > 1:
            drawings = codes.unflatten(0, (-1, args.candidates))
            chosen = likeliest_drawings(model, processor, drawings, args.prompt)
            codes = drawings[torch.arange(len(drawings)), chosen]
        rows = [[image] for image in processor.decode_images(codes)]
    elif args.mode == "audio":
        codes = [model.decode_modality_tokens(row.unsqueeze(0), "audio")[-1] for row in ids]
        rows = [[sound] for sound in processor.decode_items("audio", codes)]
    elif args.mode == "interleaved":
        # an image that the prompt has begun is read from its begin on
        opened = open_frame_codes(model.config.frames, inputs["input_ids"]) + 1
        rows = [processor.decode_parts(row[width - count :]) for row, count in zip(ids, opened.tolist())]
    else:
        rows = processor.post_process_multimodal_output(ids[:, width:], generation_mode=args.mode)
    # sounds among images get an ending of their own
    sound_suffix = output.suffix if args.mode == "audio" else ".wav"
    rows = [[row] if isinstance(row, str) else row for row in rows]
    write_rows(rows, output, file_format, sound_suffix, sampling_rate)


def numbered(output: Path, number: int, total: int) -> Path:
    """Return the path of one of so many outputs: with its number where there are several."""
    return output.with_name(f"{output.stem}-{number}{output.suffix}") if total > 1 else output


def write_rows(
    rows: list[list[Any]], output: Path, image_format: str | None, sound_suffix: str, sampling_rate: int | None
) -> None:
    """Print texts, and write images and sounds, numbered where there are several."""
    from PIL import Image

    from ..utils.atomic_files import atomic_write

    counts: Counter = Counter()
    totals = Counter(isinstance(part, Image.Image) for row in rows for part in row if not isinstance(part, str))
    failed: list[str] = []
    if image_format is not None and not totals[True]:
        print(f"--output: no image came, and {str(output)!r} is not written", file=sys.stderr)

    def write(path: Path, save: Callable[[Path], Any]) -> None:
        try:
            print(atomic_write(path, save))
        except (InputError, OSError) as error:
            failed.append(f"{path.name}: {one_line(error)}")

    for row in rows:
        for part in row:
            if isinstance(part, str):
                print(part.strip())
                continue
            is_image = isinstance(part, Image.Image)
            path = numbered(output, counts[is_image], totals[is_image])
            counts[is_image] += 1
            if is_image:
                write(path, partial(part.save, format=image_format))
                continue
            path = path.with_suffix(sound_suffix)
            write(path, partial(_write_sound, part, int(sampling_rate or 0), path))
    if failed:
        raise InputError(f"--output: {len(failed)} of {sum(totals.values())} could not be written: {failed[0]}")


def _write_sound(samples: Any, sampling_rate: int, target: Path, path: Path) -> None:
    import soundfile

    soundfile.write(path, samples, sampling_rate, format=sound_format(target))


def main(arguments: list[str] | None = None):
    run(parse_arguments(arguments))
