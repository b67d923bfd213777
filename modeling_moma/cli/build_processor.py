# SPDX-License-Identifier: Apache-2.0
"""Join image tokenizer, audio tokenizer if any, and a recipe's text tokenizer in a processor."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from ..errors_moma import InputError
from ..utils.messages import without_import_notices
from .arguments import Changes, Flag, parse_fields


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from ..training.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `moma build-processor`.

    Args:
        recipe (`str`):
            YAML with `sources`, and with `processor` where it differs.
        image_tokenizer (`str`):
            folder of a trained MomaVQModel; or folder or Hub name of a JanusVQVAE (LlamaGen's), of an Emu3VQVAE, or of
            a Janus or an Emu3 with it.
        audio_tokenizer (`str`, *optional*):
            for a third modality, sounds: folder of `moma train-audio-tokenizer`; or folder or Hub name of an EnCodec,
            a DAC or a Mimi.
        set (`list[str]`, *optional*, defaults to `[]`):
            fields of the recipe, as processor.vocab_size=2000 or processor.text_tokenizer=FOLDER.
        output (`str`):
            new folder for the processor.
    """

    recipe: Annotated[str, Flag(metavar="RECIPE", is_positional=True)]
    image_tokenizer: str
    audio_tokenizer: str | None = None
    set: Changes = field(default_factory=list)
    output: str


def parse_arguments(arguments: list[str] | None = None) -> Arguments:
    return parse_fields(Arguments, __doc__, arguments)


def text_tokenizer(recipe: "Recipe") -> "PreTrainedTokenizerFast":
    """Return the tokenizer that the recipe names, or one that learns from the texts of the sources."""
    from tokenization import train_text_tokenizer

    from ..data.sources import source_texts
    from ..hub.loading import open_text_tokenizer

    if recipe.processor.text_tokenizer is not None:
        return open_text_tokenizer(recipe.processor.text_tokenizer)
    texts = source_texts(recipe.sources, recipe.processor.text_rows)
    return train_text_tokenizer(texts, recipe.processor.vocab_size)


def image_size(given: int | str | None, image_tokenizer: Any) -> tuple[int, int]:
    """Return height and width of the processor's images in pixels: as given, or those of the image tokenizer."""
    from tokenization.image_tokenizers_moma import own_image_size

    if given is None:
        own = own_image_size(image_tokenizer.config)
        if own is None:
            raise InputError(
                f"`processor.image_size` is needed: {type(image_tokenizer).__name__} takes images of any size, and a "
                "processor has one; such as 256, or 256x384."
            )
        return own
    sides = str(given).split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() and int(side) for side in sides):
        raise InputError(
            f"`processor.image_size` = {given!r} is no size in pixels: write 256, or height and width, 256x384."
        )
    return int(sides[0]), int(sides[-1])


def run(args: Arguments) -> None:
    with without_import_notices():
        import torch

        from tokenization import (
            MomaImageProcessor,
            MomaProcessor,
            MomaVQModel,
            add_image_tokens,
            add_modality_tokens,
        )
        from tokenization.audio_codecs_moma import AUDIO
        from tokenization.image_tokenizers_moma import number_of_codes
        from tokenization.text_tokenizer_moma import IMAGE, beginning_ids

        from ..data.encoding import caption_chat_template
        from ..hub.loading import open_audio_tokenizer, open_image_tokenizer
        from ..training.recipe import read_recipe
        from ..utils.atomic_files import check_new_folder, write_folder_aside

    # tokens may be made with a processor that is there, and files that this one lacks would stay
    check_new_folder(args.output)
    recipe = read_recipe(args.recipe, ("sources",), args.set, ("processor", "sources"))
    vq_model = open_image_tokenizer(args.image_tokenizer)
    if isinstance(vq_model, MomaVQModel):
        # rounded as the released weights are, so that the codes of the training data are those of the release
        vq_model = vq_model.to(torch.bfloat16)
    size = image_size(recipe.processor.image_size, vq_model)
    codebooks = recipe.processor.audio_codebooks
    if codebooks is not None and args.audio_tokenizer is None:
        raise InputError(f"`processor.audio_codebooks` = {codebooks} is of an `--audio-tokenizer`, and none is given.")
    codecs = {}
    if args.audio_tokenizer is not None:
        codecs[AUDIO] = open_audio_tokenizer(args.audio_tokenizer, codebooks)
    tokenizer = text_tokenizer(recipe)
    tokenizer = add_image_tokens(tokenizer, number_of_codes(vq_model.config))
    for modality, codec in codecs.items():
        tokenizer = add_modality_tokens(tokenizer, modality, codec.num_codes)
    # prompts of a batch have to end side by side
    tokenizer.padding_side = "left"
    image_processor = MomaImageProcessor.for_resolution(size, do_pad=recipe.processor.do_pad)
    # a model that learnt from chats is spoken to as in them
    has_chats = any(source.kind.has_chats for source in recipe.sources)
    has_bos = bool(beginning_ids(tokenizer))
    template = None if has_chats else caption_chat_template([IMAGE, *codecs], has_bos)
    processor = MomaProcessor(image_processor, tokenizer, vq_model, chat_template=template, codecs=codecs)
    write_folder_aside(args.output, processor.save_pretrained)
    of_sounds = "".join(f", {codec.num_codes} of them codes of {modality}" for modality, codec in codecs.items())
    print(f"{args.output}: {len(tokenizer)} tokens{of_sounds}, {processor.image_seq_length} an image")


def main(arguments: list[str] | None = None):
    run(parse_arguments(arguments))
