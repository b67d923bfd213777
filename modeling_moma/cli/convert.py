# SPDX-License-Identifier: Apache-2.0
"""Convert a checkpoint of another model into a 1t1i MoMa: Llama and its kin, Chameleon, VQGAN."""

import argparse
import sys

import torch
from transformers.utils.hub import convert_file_size_to_int

from ..convert.chameleon import convert_chameleon
from ..convert.llama import CODE_ROWS, IMAGE_GROUPS, convert_llama
from ..convert.reading import CheckpointError
from ..convert.report import Receipt
from ..convert.vqgan import convert_vqgan
from ..utils.messages import one_line


DTYPES = ("float32", "bfloat16", "float16")


def size(text: str) -> int:
    return convert_file_size_to_int(text)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    subcommands = parser.add_subparsers(dest="family", required=True)
    chameleon = subcommands.add_parser("chameleon", help="Chameleon, or Anole as converted for Transformers")
    vqgan = subcommands.add_parser("vqgan", help="the picture tokenizer of Chameleon or taming-transformers alone")
    vqgan.add_argument("--source", required=True, help="vqgan.ckpt, or the same tensors as safetensors")
    vqgan.add_argument("--output", required=True, help="folder for a MomaVQModel")
    vqgan.add_argument("--allow-pickle", action="store_true", help="read a .ckpt, a pickle of tensors")
    vqgan.add_argument("--resolution", type=int, default=512, help="side of its pictures in pixels; taming's have 256")
    llama = subcommands.add_parser("llama", help="a text model: Llama, SmolLM2, Qwen2, Qwen3, Mistral")
    for subcommand in (chameleon, llama):
        kind = (
            "folder of the checkpoint, or its name on the Hub" if subcommand is llama else "folder of the checkpoint"
        )
        subcommand.add_argument("--source", required=True, help=kind)
        subcommand.add_argument("--output", required=True, help="folder to write; missing or empty")
        subcommand.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin files as well")
        subcommand.add_argument(
            "--max-shard-size", type=size, default="2GB", help="size of one file, as 400MB; 2GB by default"
        )
        subcommand.add_argument("--dtype", choices=DTYPES, help="of the output; by default the source's")
        subcommand.add_argument(
            "--no-probe", dest="probe", action="store_false", help="do not compare the outputs of both models"
        )
    chameleon.add_argument("--vqgan", help="vqgan.ckpt of the image tokenizer, with its decoder")
    llama.add_argument("--processor", required=True, help="folder of the MomaProcessor whose pictures it shall learn")
    llama.add_argument("--gguf-file", help="file of the source to read in place of its other weights; needs gguf")
    llama.add_argument(
        "--code-rows",
        choices=CODE_ROWS,
        default="fitted",
        help="rows of picture codes: fitted so that pictures begin at a uniform loss, or around the mean of all rows",
    )
    llama.add_argument("--image-group", choices=IMAGE_GROUPS, default="copy", help="weights of the image group")
    llama.add_argument("--seed", type=int, default=0, help="of the new weights")
    return parser.parse_args(argv)


def convert(args: argparse.Namespace) -> str:
    """Run one subcommand and return what to print."""
    if args.family == "vqgan":
        model = convert_vqgan(args.source, args.output, allow_pickle=args.allow_pickle, resolution=args.resolution)
        return f"{model.config.num_embeddings} codes, {model.num_parameters():,} parameters"
    return convert_checkpoint(args).table()


def convert_checkpoint(args: argparse.Namespace) -> Receipt:
    shared = {
        "dtype": getattr(torch, args.dtype) if args.dtype else None,
        "allow_pickle": args.allow_pickle,
        "max_shard_size": args.max_shard_size,
        "probe": args.probe,
    }
    if args.family == "llama":
        return convert_llama(
            args.source,
            args.output,
            processor=args.processor,
            gguf_file=args.gguf_file,
            image_group=args.image_group,
            code_rows=args.code_rows,
            seed=args.seed,
            **shared,
        )
    return convert_chameleon(args.source, args.output, vqgan=args.vqgan, **shared)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        print(convert(args))
    except CheckpointError as error:
        print(f"moma convert: {one_line(error)}", file=sys.stderr)
        return 2
    print(args.output)
    return 0
