# SPDX-License-Identifier: Apache-2.0
"""Draw a picture from words, caption a picture, or let the model mix both.

moma generate --model DIR --prompt "noto: red apple" --mode image --output picture.png
moma generate --model DIR --image picture.png --mode text
"""

import argparse
import math
import sys
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, set_seed

import modeling_moma  # noqa: F401, makes the Auto classes know the model

from ..errors_moma import InputError
from ..generation_moma import GENERATION_MODES
from ..hub.loading import MODEL, PROCESSOR, open_saved, refuse_non_finite
from ..utils.atomic_files import write_aside


TEXT_NEW_TOKENS = 32


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of a model with its processor")
    parser.add_argument("--prompt", action="append", default=[], help="words; give it again for more rows")
    parser.add_argument("--image", action="append", default=[], help="picture before the words of its row")
    parser.add_argument("--mode", choices=GENERATION_MODES, help="by default text with --image, else image")
    parser.add_argument("--output", default="picture.png", help="where pictures go, numbered if there are several")
    parser.add_argument(
        "--max-new-tokens", type=within(int, 1), help=f"by default {TEXT_NEW_TOKENS}, and room for a picture"
    )
    parser.add_argument(
        "--temperature", type=within(float, 0), help="0 takes the likeliest; by default 0 for text, else 1"
    )
    parser.add_argument("--top-k", type=within(int, 0), default=0, help="sample among so many tokens, 0 for all")
    parser.add_argument(
        "--top-p", type=within(float, 0, 1), default=1.0, help="sample among tokens of this total probability"
    )
    parser.add_argument("--num-beams", type=within(int, 1), default=1)
    parser.add_argument(
        "--guidance-scale", type=within(float, 0), default=1.0, help="above 1 follows the words more closely"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.mode is None:
        args.mode = "text" if args.image else "image"
    return args


def within(kind: type, least: float, most: float = math.inf):
    """A type of arguments: finite numbers between two bounds."""

    def number(text: str):
        value = kind(text)
        if not (least <= value <= most and math.isfinite(value)):
            bounds = f"{least} or more" if most == math.inf else f"between {least} and {most}"
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return value

    # what argparse calls it where the text is no number at all
    number.__name__ = kind.__name__
    return number


def make_rows(prompts: list[str], images: list[str]) -> tuple[list[str], list[list[str]]]:
    """Texts and pictures of each row; one prompt serves all pictures, one picture all prompts."""
    num_rows = max(len(prompts), len(images))
    if num_rows == 0:
        raise InputError("--prompt, --image: give at least one of the two.")
    for name, values in (("--prompt", prompts), ("--image", images)):
        if len(values) not in (0, 1, num_rows):
            raise InputError(f"{name}: given {len(values)} times for {num_rows} rows; give it once, or for every row.")
    prompts, images = (values * num_rows if len(values) == 1 else values for values in (prompts, images))
    texts = [("<image>" if images else "") + prompt for prompt in prompts or [""] * num_rows]
    return texts, [[image] for image in images]


def generation_arguments(args: argparse.Namespace, image_seq_length: int) -> dict:
    """Arguments of `generate` for the command line's."""
    temperature = args.temperature
    if temperature is None:
        temperature = 0.0 if args.mode == "text" or args.num_beams > 1 else 1.0
    chosen = {"generation_mode": args.mode, "num_beams": args.num_beams, "guidance_scale": args.guidance_scale}
    max_new_tokens = args.max_new_tokens
    if max_new_tokens is None and args.mode != "image":
        max_new_tokens = TEXT_NEW_TOKENS + (image_seq_length + 2 if args.mode == "interleaved" else 0)
    if max_new_tokens is not None:
        chosen["max_new_tokens"] = max_new_tokens
    if temperature == 0:
        return {**chosen, "do_sample": False}
    return {**chosen, "do_sample": True, "temperature": temperature, "top_k": args.top_k, "top_p": args.top_p}


def picture_format(path: Path) -> str:
    """Name of the file format for a path's ending, once pictures can be written there.

    Raises:
        ValueError: they cannot; a drawing would be lost.
    """
    name = Image.registered_extensions().get(path.suffix.lower())
    if name is None:
        raise InputError(f"--output: {str(path)!r} has no ending of a picture format, such as .png.")
    try:
        Image.new("RGB", (8, 8)).save(BytesIO(), format=name)
    except (OSError, KeyError, ValueError) as error:
        raise InputError(
            f"--output: colour pictures cannot be written as {path.suffix} ({name}); take another ending, such as "
            ".png."
        ) from error
    if path.is_dir():
        raise InputError(f"--output: {str(path)!r} is a folder; name a file in it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"--output: nothing can be written into {str(path.parent)!r} ({error}).") from error
    return name


def generate(args: argparse.Namespace):
    """Load, generate, print texts and write pictures."""
    output = Path(args.output)
    file_format = picture_format(output) if args.mode != "text" else None
    texts, images = make_rows(args.prompt, args.image)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor: Any = open_saved(PROCESSOR, "--model", args.model, partial(AutoProcessor.from_pretrained, args.model))
    dtype = torch.float32 if device == "cpu" else "auto"
    load = partial(AutoModelForCausalLM.from_pretrained, args.model, dtype=dtype)
    model: Any = open_saved(MODEL, "--model", args.model, load)
    model = model.to(device).eval()
    refuse_non_finite(model, args.model)
    refuse_non_finite(processor.vq_model, f"{args.model}, picture tokenizer")
    processor.to(device)

    inputs = processor(images=images or None, text=texts, padding=True, padding_side="left", return_tensors="pt").to(
        device
    )
    set_seed(args.seed)
    ids = model.generate(**inputs, **generation_arguments(args, model.config.image_seq_length))
    new_ids = ids[:, inputs["input_ids"].shape[1] :]
    if args.mode == "image":
        # the last one of each row: a prompt may hold others, and the beginning of this one
        codes = torch.cat([model.decode_image_tokens(row.unsqueeze(0))[-1:] for row in ids])
        rows = [[picture] for picture in processor.decode_pictures(codes)]
    else:
        rows = processor.post_process_multimodal_output(new_ids, generation_mode=args.mode)
    rows = [[row] if isinstance(row, str) else row for row in rows]
    num_pictures = sum(not isinstance(part, str) for row in rows for part in row)
    written = 0
    for row in rows:
        for part in row:
            if isinstance(part, str):
                print(part.strip())
                continue
            name = f"{output.stem}-{written}{output.suffix}" if num_pictures > 1 else output.name
            print(write_aside(output.with_name(name), partial(part.save, format=file_format)))
            written += 1


def main(arguments: list[str] | None = None) -> int:
    try:
        generate(parse_arguments(arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
