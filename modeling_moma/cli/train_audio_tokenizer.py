# SPDX-License-Identifier: Apache-2.0
"""Learn a small audio tokenizer from a recipe's sounds: a codebook of mel spectrograms."""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..errors_moma import InputError
from ..training.tokenizer_settings import AudioTokenizerSettings
from ..utils.fields import read_fields
from ..utils.messages import without_import_notices
from .arguments import Changes, Flag, parse_fields


if TYPE_CHECKING:
    from ..data.sources import Source

METRICS_FILE = "metrics.json"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `moma train-audio-tokenizer`.

    Args:
        recipe (`str`):
            YAML file with a section `sources` and perhaps `audio_tokenizer`.
        output (`str`):
            new folder for the tokenizer and metrics.json.
        set (`list[str]`, *optional*, defaults to `[]`):
            fields of the recipe, as audio_tokenizer.num_codes=1024.
    """

    recipe: Annotated[str, Flag(metavar="RECIPE", is_positional=True)]
    output: str
    set: Changes = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Run(Arguments, AudioTokenizerSettings):
    """The flags, and what their recipe says.

    Args:
        sources (`list[Source]`):
            those that may have sounds.
    """

    sources: "list[Source]"


def parse_arguments(arguments: list[str] | None = None) -> Run:
    """Return the command line with what its recipe says."""
    given = parse_fields(Arguments, __doc__, arguments)
    with without_import_notices():
        from ..data.kinds import InterleavedKind
        from ..training.recipe import read_recipe

    recipe = read_recipe(given.recipe, ("sources",), given.set, ("audio_tokenizer", "sources"))
    may_have = [entry for entry in recipe.sources if entry.kind.has_sounds or isinstance(entry.kind, InterleavedKind)]
    if not may_have:
        kinds = {source.name: source.kind.name for source in recipe.sources}
        raise InputError(
            f"{given.recipe!r} has no source with sounds, but {kinds}: an audio tokenizer is trained on sources of "
            "sounds (`audio`) or of interleaved documents (`segments`, `messages`)."
        )
    settings = read_fields(AudioTokenizerSettings, recipe.audio_tokenizer, "audio_tokenizer", "this section")
    return Run(**vars(settings), **vars(given), sources=may_have)


def run(args: Run) -> None:
    with without_import_notices():
        from ..data.sources import refuse_output_in_data
        from ..training.audio_tokenizer import train_audio_tokenizer
        from ..utils.atomic_files import check_new_folder, write_folder_aside

    refuse_output_in_data(args.output, args.sources)
    check_new_folder(args.output)
    trained = train_audio_tokenizer(args.sources, args)
    write_folder_aside(args.output, partial(_write, trained.codec, trained.facts))
    facts = trained.facts
    of_held_out = "" if facts["held_out_db"] is None else f", {facts['held_out_db']:.1f} on held-out ones"
    met_there = "" if facts["held_out_codes"] is None else f", {facts['held_out_codes']} there"
    print(
        f"{args.output}: {args.num_codes} codes, {facts['codes_a_second']:.1f} a second, learnt from "
        f"{facts['sounds']:,} sounds; a band is {facts['train_db']:.1f} dB from its code's{of_held_out}; "
        f"{facts['train_codes']} codes are met{met_there}"
    )


def _write(codec, facts: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    codec.save_pretrained(folder)
    (folder / METRICS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    run(parse_arguments(arguments))
