# SPDX-License-Identifier: Apache-2.0
"""Turn a recipe's sources into token ids, on all cores; a second start goes on after a kill."""

import os
from dataclasses import dataclass, field
from typing import Annotated

from ..utils.fields import Count, Seed
from ..utils.messages import without_import_notices
from .arguments import Flag, FlagParser


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `moma tokenize`.

    Args:
        recipe (`str`):
            YAML with `sources`, and with `data` where it differs.
        processor (`str`):
            folder of a MomaProcessor.
        output (`str`):
            folder for the tokens; a second start goes on in it.
        processes (`int`, *optional*):
            by default one for every core.
        threads (`int`, *optional*, defaults to `1`):
            of each process.
        rows_per_shard (`int`, *optional*):
            by default about 64 shards a split, of 256 images and more.
        splits (`list[str]`, *optional*):
            these alone, `train` among them; by default all that there are.
        seed (`int`, *optional*, defaults to `0`):
            of the changed images of further codings.
        strict (`bool`, *optional*, defaults to `False`):
            stop at the first row that cannot be used.
        plan (`bool`, *optional*, defaults to `False`):
            write what there is to do and end, for `TokenizeStep` on several machines.
    """

    recipe: Annotated[str, Flag(metavar="RECIPE", is_positional=True)]
    processor: str
    output: str
    processes: Count = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    threads: Count = 1
    rows_per_shard: Count | None = None
    splits: Annotated[list[str] | None, Flag(metavar="SPLIT")] = None
    seed: Seed = 0
    strict: bool = False
    plan: bool = False


def parse_arguments(arguments: list[str] | None = None) -> Arguments:
    return Arguments(**FlagParser(Arguments, description=__doc__).read(arguments))


def summary(manifest: dict) -> str:
    """Return what was written of each source and what was left out, as a table and lines."""
    from ..utils.messages import markdown_table

    rows, notes = [], []
    splits = [part for entry in manifest["sources"].values() for part in entry["splits"].values()]
    modalities = list(dict.fromkeys(["text", "image", *(name for part in splits for name in part["tokens"])]))
    for name, entry in manifest["sources"].items():
        for split, part in entry["splits"].items():
            tokens = part["tokens"]
            numbers = [part["documents"], *(tokens.get(modality, 0) for modality in modalities)]
            rows.append([f"{name}, {split}", *(f"{number:,}" for number in numbers)])
        for split, read in entry["read"].items():
            for title, counts in (
                ("left out", read["left_out"]),
                ("images left out", read["images_left_out"]),
                ("changed", read["changed"]),
            ):
                if counts:
                    listed = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
                    notes.append(f"{name}, {split}: {title} of {read['rows']:,} rows: {listed}")
            notes += [f"  row {row['row']:,}: {row['reason']}: {row['detail']}" for row in read["named"][:5]]
    heads = ["source", "documents", *(f"{modality} tokens" for modality in modalities)]
    return "\n".join([markdown_table(heads, rows), *notes])


def run(args: Arguments) -> None:
    """Plan and write the tokens, and say what became of the rows."""
    with without_import_notices():
        from ..data.jobs import plan_job, write_job, write_manifest
        from ..data.sources import refuse_output_in_data
        from ..data.tokenizing import run_tasks
        from ..hub.loading import PROCESSOR, check_saved
        from ..training.recipe import DataFields, read_recipe

    recipe = read_recipe(args.recipe, needs=("sources",))
    refuse_output_in_data(args.output, recipe.sources)
    check_saved(PROCESSOR, "--processor", args.processor)
    to_tokenize = (recipe.data or DataFields()).to_tokenize()
    job = plan_job(recipe.sources, args.processor, *to_tokenize, args.seed, args.rows_per_shard, args.splits)
    write_job(args.output, job)
    if args.plan:
        print(f"{args.output} has {len(job.tasks())} shards to write; afterwards this command, without --plan")
        return
    run_tasks(args.output, job, args.processes, args.threads, args.strict)
    print(summary(write_manifest(args.output, job)))


def main(arguments: list[str] | None = None):
    run(parse_arguments(arguments))
