# SPDX-License-Identifier: Apache-2.0
"""Join an image tokenizer and a text tokenizer of a recipe's texts into a processor."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from ..utils.fields import Count
from ..utils.messages import without_import_notices
from .arguments import Flag, parse_fields


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from ..training.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `moma build-processor`.

    Args:
        recipe (`str`):
            YAML with `sources`, and with `processor` where it differs.
        tokenizer (`str`):
            folder of a trained MomaVQModel.
        vocab_size (`int`, *optional*):
            text tokens; by default the recipe's, or 2,000.
        text_tokenizer (`str`, *optional*):
            folder or Hub name of a text tokenizer to take, in place of a new one.
        output (`str`):
            new folder for the processor.
    """

    recipe: Annotated[str, Flag(metavar="RECIPE", is_positional=True)]
    tokenizer: str
    vocab_size: Count | None = None
    text_tokenizer: str | None = None
    output: str


def parse_arguments(arguments: list[str] | None = None) -> Arguments:
    return parse_fields(Arguments, __doc__, arguments)


def text_tokenizer(recipe: "Recipe", vocab_size: int | None, given: str | None) -> "PreTrainedTokenizerFast":
    """Return the tokenizer that is given, or one that learns from the texts of the sources."""
    from tokenization import train_text_tokenizer

    from ..data.corpus import source_texts
    from ..hub.loading import open_text_tokenizer

    if given is not None:
        return open_text_tokenizer(given)
    if recipe.processor.text_tokenizer is not None:
        return open_text_tokenizer(recipe.processor.text_tokenizer, "RECIPE, processor: text_tokenizer")
    texts = source_texts(recipe.sources, recipe.processor.text_rows)
    return train_text_tokenizer(texts, vocab_size or recipe.processor.vocab_size)


def run(args: Arguments) -> None:
    with without_import_notices():
        import torch

        from tokenization import MomaImageProcessor, MomaProcessor, add_image_tokens

        from ..data.encoding import CHAT_TEMPLATE
        from ..hub.loading import open_image_tokenizer
        from ..training.recipe import read_recipe
        from ..utils.atomic_files import refuse_files, write_folder_aside

    # tokens may be made with a processor that is there, and files that this one lacks would stay
    refuse_files(args.output)
    recipe = read_recipe(args.recipe, needs=("sources",))
    # rounded to bf16 as the released weights are, so that the codes of the training data are those of the release
    vq_model = open_image_tokenizer(args.tokenizer, dtype=torch.bfloat16)
    tokenizer = text_tokenizer(recipe, args.vocab_size, args.text_tokenizer)
    tokenizer = add_image_tokens(tokenizer, vq_model.config.num_embeddings)
    # prompts of a batch have to end side by side
    tokenizer.padding_side = "left"
    image_processor = MomaImageProcessor.for_resolution(vq_model.config.resolution)
    # a model that learnt from chats is spoken to as in them
    template = None if any(source.kind.has_chats for source in recipe.sources) else CHAT_TEMPLATE
    processor = MomaProcessor(image_processor, tokenizer, vq_model, chat_template=template)
    write_folder_aside(args.output, processor.save_pretrained)
    print(f"{args.output}: {len(tokenizer)} tokens, {processor.image_seq_length} an image")


def main(arguments: list[str] | None = None):
    run(parse_arguments(arguments))
