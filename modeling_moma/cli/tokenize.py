# SPDX-License-Identifier: Apache-2.0
"""Turn a recipe's sources into token ids, on all cores; a second start goes on after a kill."""

import argparse
import os
from contextlib import nullcontext
from pathlib import Path

from ..data.executors import ENGINES, run_executor
from ..data.jobs import plan_job, write_job
from ..data.reports import write_manifest
from ..data.sources import Source
from ..data.workers import Workers, run_tasks
from ..hub.loading import PROCESSOR, check_saved
from ..training.recipe import DataFields, read_recipe
from ..utils.markdown import markdown_table


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", metavar="RECIPE", help="YAML with `sources`, and with `data` where it differs")
    parser.add_argument("--processor", required=True, help="folder of a MomaProcessor")
    parser.add_argument("--output", required=True, help="folder for the tokens; a second start goes on in it")
    parser.add_argument(
        "--processes", type=int, default=len(os.sched_getaffinity(0)), help="by default one for every core"
    )
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument(
        "--rows-per-shard", type=int, help="by default about 64 shards a split, of 256 pictures and more"
    )
    parser.add_argument(
        "--splits", nargs="+", metavar="SPLIT", help="these alone, `train` among them; by default all that there are"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the changed pictures of further codings")
    parser.add_argument("--strict", action="store_true", help="stop at the first row that cannot be used")
    engine = parser.add_argument_group("on a cluster", "shards as tasks of datatrove (extra `scale`)")
    engine.add_argument("--engine", choices=["processes", *ENGINES], default="processes")
    engine.add_argument("--tasks", type=int, default=64, help="of datatrove, each writes every so-manieth shard")
    engine.add_argument("--partition", help="of Slurm")
    engine.add_argument("--time", default="24:00:00", help="of a Slurm job")
    args = parser.parse_args(arguments)
    for name in ("processes", "threads", "rows_per_shard", "tasks"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value} must be 1 or more")
    if args.engine == "slurm" and not args.partition:
        parser.error("--engine slurm needs --partition")
    return args


def summary(manifest: dict) -> str:
    """What was written of each source and what was left out, as a table and lines."""
    rows, notes = [], []
    for name, entry in manifest["sources"].items():
        for split, part in entry["splits"].items():
            tokens = part["tokens"]
            rows.append(
                [f"{name}, {split}", *(f"{n:,}" for n in (part["documents"], tokens["text"], tokens["image"]))]
            )
        for split, read in entry["read"].items():
            for title, counts in (
                ("left out", read["left_out"]),
                ("pictures left out", read["pictures_left_out"]),
                ("changed", read["changed"]),
            ):
                if counts:
                    listed = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
                    notes.append(f"{name}, {split}: {title} of {read['rows']:,} rows: {listed}")
            notes += [f"  row {row['row']:,}: {row['reason']}: {row['detail']}" for row in read["named"][:5]]
    return "\n".join([markdown_table(["source", "documents", "text tokens", "picture tokens"], rows), *notes])


def main(arguments: list[str] | None = None):
    args = parse_arguments(arguments)
    recipe = read_recipe(args.recipe, needs=("sources",))
    data = recipe.data or DataFields()
    # what they cannot load they would each tell of
    check_saved(PROCESSOR, "--processor", args.processor)
    # while they start, this process looks at the sources
    others = args.processes - 1 if args.engine == "processes" else 0
    with Workers(others, args.threads, args.processor) if others else nullcontext() as workers:
        tokenize(args, recipe.sources, data, workers)


def tokenize(args: argparse.Namespace, sources: list[Source], data: DataFields, workers: Workers | None) -> None:
    """Plan and write the tokens, and say what became of the rows."""
    job = plan_job(
        sources, args.processor, data.sequence_length, data.packed, args.seed, args.rows_per_shard, args.splits
    )
    write_job(args.output, job)
    if args.engine == "processes":
        run_tasks(args.output, job, args.processes, args.threads, args.strict, workers)
    # a second start on a cluster, after the jobs of the first, only adds up
    elif not all((Path(args.output) / task.report_name()).is_file() for task in job.tasks()):
        at_once = args.tasks if args.engine == "slurm" else args.processes
        run_executor(args.output, args.engine, args.tasks, at_once, args.strict, args.partition, args.time)
        if args.engine == "slurm":
            print(f"submitted; once all tasks are done, the same command writes {args.output}/manifest.json")
            return
    manifest = write_manifest(args.output, job)
    print(summary(manifest))
