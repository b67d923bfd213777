# SPDX-License-Identifier: Apache-2.0
"""Join a picture tokenizer and a text tokenizer of a recipe's texts into a processor."""

import argparse

import torch
from transformers import PreTrainedTokenizerFast

from tokenization import MomaImageProcessor, MomaProcessor, add_picture_tokens, train_text_tokenizer

from ..data.corpus import source_texts
from ..data.encoding import CHAT_TEMPLATE
from ..data.kinds import InterleavedKind
from ..hub.loading import open_picture_tokenizer, open_text_tokenizer
from ..training.recipe import Recipe, read_recipe
from ..utils.atomic_files import refuse_files, write_folder_aside


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", metavar="RECIPE", help="YAML with `sources`, and with `processor` where it differs")
    parser.add_argument("--tokenizer", required=True, help="folder of a trained MomaVQModel")
    parser.add_argument("--vocab-size", type=int, help="text tokens; by default the recipe's, or 2,000")
    parser.add_argument(
        "--text-tokenizer", help="folder or Hub name of a text tokenizer to take, in place of a new one"
    )
    parser.add_argument("--output", required=True, help="new folder for the processor")
    return parser.parse_args(arguments)


def text_tokenizer(recipe: Recipe, vocab_size: int | None, given: str | None) -> PreTrainedTokenizerFast:
    """The tokenizer that is given, or one that learns from the texts of the sources."""
    if given is not None:
        return open_text_tokenizer(given)
    if recipe.processor.text_tokenizer is not None:
        return open_text_tokenizer(recipe.processor.text_tokenizer, "RECIPE, processor: text_tokenizer")
    texts = source_texts(recipe.sources, recipe.processor.text_rows)
    return train_text_tokenizer(texts, vocab_size or recipe.processor.vocab_size)


def main(arguments: list[str] | None = None):
    args = parse_arguments(arguments)
    # tokens may be made with a processor that is there, and files that this one lacks would stay
    refuse_files(args.output)
    recipe = read_recipe(args.recipe, needs=("sources",))
    # rounded to bf16 as the released weights are, so that the codes of the training data are those of the release
    vq_model = open_picture_tokenizer(args.tokenizer, dtype=torch.bfloat16)
    tokenizer = text_tokenizer(recipe, args.vocab_size, args.text_tokenizer)
    tokenizer = add_picture_tokens(tokenizer, vq_model.config.num_embeddings)
    # prompts of a batch have to end side by side
    tokenizer.padding_side = "left"
    image_processor = MomaImageProcessor.for_resolution(vq_model.config.resolution)
    kinds = [source.kind for source in recipe.sources]
    has_chats = any(isinstance(kind, InterleavedKind) and kind.messages is not None for kind in kinds)
    # a model that learnt from chats is spoken to as in them
    template = None if has_chats else CHAT_TEMPLATE
    processor = MomaProcessor(image_processor, tokenizer, vq_model, chat_template=template)
    write_folder_aside(args.output, processor.save_pretrained)
    print(f"{args.output}: {len(tokenizer)} tokens, {processor.image_seq_length} a picture")
