# SPDX-License-Identifier: Apache-2.0
"""Convert a checkpoint of another model into a 1t1i MoMa: Llama and its kin, Chameleon, VQGAN."""

import argparse
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator

from ..errors_moma import InputError
from ..utils.fields import Int, Seed
from ..utils.messages import one_line, without_import_notices
from .arguments import Flag, FlagParser


if TYPE_CHECKING:
    from ..convert.transfer import Receipt


def _size(text: str) -> str:
    from transformers.utils.hub import convert_file_size_to_int

    try:
        size = convert_file_size_to_int(text)
    except ValueError as error:
        raise InputError("a size, as 400MB or 2GB") from error
    if size < 1:
        raise InputError("a size above 0, as 400MB or 2GB")
    return text


@dataclass(frozen=True, kw_only=True)
class Vqgan:
    """Flags of `moma convert vqgan`.

    Args:
        source (`str`):
            vqgan.ckpt, or the same tensors as safetensors.
        output (`str`):
            folder for a MomaVQModel.
        allow_pickle (`bool`, *optional*, defaults to `False`):
            read a .ckpt, a pickle of tensors.
        resolution (`int`, *optional*, defaults to `512`):
            side of its images in pixels; taming's have 256.
    """

    help = "the image tokenizer of Chameleon or taming-transformers alone"

    source: str
    output: str
    allow_pickle: bool = False
    resolution: Int = 512


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Flags that `moma convert chameleon` and `moma convert llama` share.

    Args:
        output (`str`):
            folder to write; missing or empty.
        allow_pickle (`bool`, *optional*, defaults to `False`):
            read pytorch_model.bin files as well.
        max_shard_size (`str`, *optional*, defaults to `"2GB"`):
            size of one file, as 400MB.
        dtype (`Literal["float32", "bfloat16", "float16"]`, *optional*):
            of the output; by default the source's.
        probe (`bool`, *optional*, defaults to `True`):
            do not compare the outputs of both models.
    """

    output: str
    allow_pickle: bool = False
    max_shard_size: Annotated[str, AfterValidator(_size)] = "2GB"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    probe: Annotated[bool, Flag(name="--no-probe")] = True


@dataclass(frozen=True, kw_only=True)
class Chameleon(Checkpoint):
    """Flags of `moma convert chameleon`.

    Args:
        source (`str`):
            folder of the checkpoint.
        vqgan (`str`, *optional*):
            vqgan.ckpt of the image tokenizer, with its decoder.
    """

    help = "Chameleon, or Anole as converted for Transformers"

    source: str
    vqgan: str | None = None


@dataclass(frozen=True, kw_only=True)
class Llama(Checkpoint):
    """Flags of `moma convert llama`.

    Args:
        source (`str`):
            folder of the checkpoint, or its name on the Hub.
        processor (`str`):
            folder of the MomaProcessor whose images it shall learn.
        gguf_file (`str`, *optional*):
            file of the source to read in place of its other weights; needs gguf.
        code_rows (`Literal["fitted", "mean"]`, *optional*, defaults to `"fitted"`):
            rows of image codes: fitted so that images begin at a uniform loss, or around the mean of all rows.
        image_group (`Literal["copy", "new"]`, *optional*, defaults to `"copy"`):
            weights of the image group.
        seed (`int`, *optional*, defaults to `0`):
            of the new weights.
    """

    help = "a text model: Llama, SmolLM2, Qwen2, Qwen3, Mistral"

    source: str
    processor: str
    gguf_file: str | None = None
    # of `convert_llama`
    code_rows: Literal["fitted", "mean"] = "fitted"
    image_group: Literal["copy", "new"] = "copy"
    seed: Seed = 0


FAMILIES = {"chameleon": Chameleon, "vqgan": Vqgan, "llama": Llama}


def parse_arguments(arguments: list[str] | None = None) -> Chameleon | Vqgan | Llama:
    parser = argparse.ArgumentParser(description=__doc__)
    subcommands = parser.add_subparsers(dest="family", required=True, parser_class=FlagParser)
    parsers = {name: subcommands.add_parser(name, kind=kind, help=kind.help) for name, kind in FAMILIES.items()}
    given = vars(parser.parse_args(arguments))
    family = given.pop("family")
    return FAMILIES[family](**parsers[family].checked(given))


def convert(args: Chameleon | Vqgan | Llama) -> str:
    """Run one subcommand and return what to print."""
    if isinstance(args, Vqgan):
        from ..convert.vqgan import convert_vqgan

        model = convert_vqgan(args.source, args.output, allow_pickle=args.allow_pickle, resolution=args.resolution)
        return f"{model.config.num_embeddings} codes, {model.num_parameters():,} parameters"
    return convert_checkpoint(args).table()


def convert_checkpoint(args: Chameleon | Llama) -> "Receipt":
    """Convert a checkpoint of a language model; see [`convert_llama`] and [`convert_chameleon`]."""
    import torch

    from ..convert.chameleon import convert_chameleon
    from ..convert.llama import convert_llama

    given = {**vars(args), "dtype": getattr(torch, args.dtype) if args.dtype else None}
    return (convert_llama if isinstance(args, Llama) else convert_chameleon)(**given)


def run(args: Chameleon | Vqgan | Llama) -> int:
    with without_import_notices():
        from ..convert.reading import CheckpointError

    try:
        print(convert(args))
    except CheckpointError as error:
        print(f"moma convert: {one_line(error)}", file=sys.stderr)
        return 2
    print(args.output)
    return 0


def main(arguments: list[str] | None = None) -> int:
    return run(parse_arguments(arguments))
