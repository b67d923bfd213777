# SPDX-License-Identifier: Apache-2.0
"""Draw an image from words, caption an image, or let the model mix both.

moma generate --model DIR --prompt "noto: red apple" --mode image --output image.png
moma generate --model DIR --image image.png --mode text
"""

import argparse
import dataclasses
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any, Literal

from pydantic import Field

from ..errors_moma import InputError
from ..utils.fields import Count, Float, Int, Seed, Share
from ..utils.messages import without_import_notices
from .arguments import Flag, parse_fields


# of `MomaForCausalLM.generate`
Mode = Literal["text", "image", "interleaved"]
TEXT_NEW_TOKENS = 32


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
        mode (`Literal["text", "image", "interleaved"]`, *optional*):
            by default text with --image, else image.
        output (`str`, *optional*, defaults to `"image.png"`):
            where images go, numbered if there are several.
        max_new_tokens (`int`, *optional*):
            by default 32, and room for an image.
        temperature (`float`, *optional*):
            0 takes the likeliest; by default 0 for text, else 1.
        top_k (`int`, *optional*, defaults to `0`):
            sample among so many tokens, 0 for all.
        top_p (`float`, *optional*, defaults to `1.0`):
            sample among tokens of this total probability.
        num_beams (`int`, *optional*, defaults to `1`):
            beams of a search, 1 for none.
        guidance_scale (`float`, *optional*, defaults to `1.0`):
            above 1 follows the words more closely.
        candidates (`int`, *optional*, defaults to `1`):
            draw so many images of each prompt, and write the one of which its words are likeliest.
        seed (`int`, *optional*, defaults to `0`):
            of what is drawn.
    """

    model: str
    prompt: Annotated[list[str], Flag(is_repeated=True)] = field(default_factory=list)
    image: Annotated[list[str], Flag(is_repeated=True)] = field(default_factory=list)
    mode: Mode | None = None
    output: str = "image.png"
    max_new_tokens: Count | None = None
    temperature: Annotated[Float, Field(ge=0)] | None = None
    top_k: Annotated[Int, Field(ge=0)] = 0
    top_p: Share = 1.0
    num_beams: Count = 1
    guidance_scale: Annotated[Float, Field(ge=0)] = 1.0
    candidates: Count = 1
    seed: Seed = 0


def parse_arguments(arguments: list[str] | None = None) -> Arguments:
    args = parse_fields(Arguments, __doc__, arguments, formatter_class=argparse.RawDescriptionHelpFormatter)
    return dataclasses.replace(args, mode=args.mode or ("text" if args.image else "image"))


def make_rows(prompts: list[str], images: list[str]) -> tuple[list[str], list[list[str]]]:
    """Texts and images of each row; one prompt serves all images, one image all prompts."""
    num_rows = max(len(prompts), len(images))
    if num_rows == 0:
        raise InputError("--prompt, --image: give at least one of the two.")
    for name, values in (("--prompt", prompts), ("--image", images)):
        if len(values) not in (0, 1, num_rows):
            raise InputError(f"{name}: given {len(values)} times for {num_rows} rows; give it once, or for every row.")
    prompts, images = (values * num_rows if len(values) == 1 else values for values in (prompts, images))
    texts = [("<image>" if images else "") + prompt for prompt in prompts or [""] * num_rows]
    return texts, [[image] for image in images]


def generation_arguments(args: Arguments, image_seq_length: int) -> dict:
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


def check_candidates(args: Arguments) -> None:
    """Raise `ValueError` where there is nothing by which one of several candidates could be chosen."""
    if args.candidates == 1:
        return
    if args.mode != "image":
        raise InputError(f"--candidates {args.candidates}: only images are chosen, and the mode is {args.mode!r}.")
    if args.image or not args.prompt or not all(prompt.strip() for prompt in args.prompt):
        raise InputError(
            f"--candidates {args.candidates}: images are chosen by the words of their prompts; give each --prompt "
            "words, and no --image."
        )


def image_format(path: Path) -> str:
    """Return the name of the file format for a path's ending, once images can be written there.

    Args:
        path (`Path`):
            of an image; its folder is made.

    Raises:
        ValueError: they cannot; a drawing would be lost.
    """
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
    if path.is_dir():
        raise InputError(f"--output: {str(path)!r} is a folder; name a file in it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"--output: nothing can be written into {str(path.parent)!r} ({error}).") from error
    return name


def run(args: Arguments) -> None:
    """Load, generate, print texts and write images."""
    with without_import_notices():
        import torch
        from transformers import AutoModelForCausalLM, AutoProcessor, set_seed

        from ..evaluation.retrieval import likeliest_drawings
        from ..hub.loading import MODEL, PROCESSOR, open_saved, refuse_non_finite
        from ..utils.atomic_files import write_aside

    check_candidates(args)
    output = Path(args.output)
    file_format = image_format(output) if args.mode != "text" else None
    texts, images = make_rows(args.prompt, args.image)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor: Any = open_saved(PROCESSOR, "--model", args.model, partial(AutoProcessor.from_pretrained, args.model))
    dtype = torch.float32 if device == "cpu" else "auto"
    load = partial(AutoModelForCausalLM.from_pretrained, args.model, dtype=dtype)
    model: Any = open_saved(MODEL, "--model", args.model, load)
    model = model.to(device).eval()
    refuse_non_finite(model, args.model)
    refuse_non_finite(processor.vq_model, f"{args.model}, image tokenizer")
    processor.to(device)

    try:
        inputs = processor(images=images or None, text=texts, padding=True, padding_side="left", return_tensors="pt")
    # an address that is not reached, a file that cannot be read
    except OSError as error:
        raise InputError(f"--image: {error}") from error
    inputs = {name: values.repeat_interleave(args.candidates, dim=0) for name, values in inputs.to(device).items()}
    set_seed(args.seed)
    ids = model.generate(**inputs, **generation_arguments(args, model.config.image_seq_length))
    new_ids = ids[:, inputs["input_ids"].shape[1] :]
    if args.mode == "image":
        # the last one of each row: a prompt may hold others, and the beginning of this one
        codes = torch.cat([model.decode_image_tokens(row.unsqueeze(0))[-1:] for row in ids])
        if args.candidates > 1:
            drawings = codes.unflatten(0, (-1, args.candidates))
            chosen = likeliest_drawings(model, processor, drawings, args.prompt)
            codes = drawings[torch.arange(len(drawings)), chosen]
        rows = [[image] for image in processor.decode_images(codes)]
    else:
        rows = processor.post_process_multimodal_output(new_ids, generation_mode=args.mode)
    rows = [[row] if isinstance(row, str) else row for row in rows]
    num_images = sum(not isinstance(part, str) for row in rows for part in row)
    written = 0
    for row in rows:
        for part in row:
            if isinstance(part, str):
                print(part.strip())
                continue
            name = f"{output.stem}-{written}{output.suffix}" if num_images > 1 else output.name
            print(write_aside(output.with_name(name), partial(part.save, format=file_format)))
            written += 1


def main(arguments: list[str] | None = None):
    run(parse_arguments(arguments))
