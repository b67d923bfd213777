# SPDX-License-Identifier: Apache-2.0
"""Put a trained model and its processor into one folder as they go to the Hub, without code: bf16, routers in fp32."""

import argparse
import math
import sys
from pathlib import Path

import torch

from modeling_moma.data.documents import check_layout
from modeling_moma.errors_moma import InputError
from modeling_moma.hub.loading import open_model, open_processor, require_plain_weights
from modeling_moma.utils.atomic_files import check_writable, write_folder_aside


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a trained MomaForCausalLM")
    parser.add_argument("--processor", required=True, help="folder of its MomaProcessor")
    parser.add_argument("--output", required=True)
    parser.add_argument(
        "--never-first",
        metavar="WORD",
        help="token that no caption of `generate` begins with by default, as none is empty then",
    )
    parser.add_argument(
        "--draw-temperature", type=float, help="by which `generate` samples images where its caller says nothing"
    )
    parser.add_argument("--draw-guidance", type=float, help="its guidance, by default none")
    args = parser.parse_args(arguments)
    try:
        if args.draw_temperature is None and args.draw_guidance is not None:
            raise InputError(f"--draw-guidance {args.draw_guidance}: without --draw-temperature nothing is sampled.")
        drawing = None if args.draw_temperature is None else image_sampling(args.draw_temperature, args.draw_guidance)
        release(args.model, args.processor, args.output, args.never_first, drawing)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def release(
    model_folder: str,
    processor_folder: str,
    output: str,
    never_first: str | None = None,
    drawing: dict | None = None,
):
    """
    Writes the folder of a release.

    `never_first` is a token that no caption of `generate` begins with by default, as none is empty then: where names
    follow images at once, the end of a document and the word before tags are each likelier than any name. `drawing`
    has the options by which `generate` draws images where its caller gives none.
    """
    check_writable(output)
    model = open_model(model_folder, dtype=torch.bfloat16)
    require_plain_weights("--model", model_folder, model.config)
    # noise belongs to a stage of training; whoever trains the release further sets it anew
    model.config.gumbel_noise, model.config.gumbel_noise_steps = 0.0, None
    processor = open_processor(processor_folder)
    check_layout(model.config, processor.token_layout())
    # what truncation and pipelines cut at
    processor.tokenizer.model_max_length = model.config.max_position_embeddings
    if never_first is not None:
        word = processor.tokenizer(never_first, add_special_tokens=False)["input_ids"]
        if len(word) != 1:
            raise InputError(f"--never-first {never_first!r}: it is {len(word)} tokens of the tokenizer, and not one.")
        model.generation_config.caption_suppress_tokens = [processor.tokenizer.eos_token_id, *word]

    if drawing is not None:
        model.generation_config.image_sampling = drawing

    def save(folder: Path):
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        # the processor saves what it computes in, fp32; these values are those of bf16
        processor.vq_model.to(torch.bfloat16).save_pretrained(folder / "vq_model")
        # `moma push` adds the code of the installed packages
        for code in folder.rglob("*.py"):
            code.unlink()

    write_folder_aside(output, save)


def image_sampling(temperature: float, guidance_scale: float | None) -> dict:
    """What a model's `generation_config.json` says of drawing."""
    for flag, value, least in (("temperature", temperature, 0), ("guidance", guidance_scale, 1)):
        if value is not None and not least < value < math.inf:
            raise InputError(f"--draw-{flag} {value}: it must be a number above {least}.")
    guided = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, **guided}


if __name__ == "__main__":
    sys.exit(main())
