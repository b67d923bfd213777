# SPDX-License-Identifier: Apache-2.0
"""Turn a recipe's sources into token ids, on all cores; a second start goes on after a kill."""

import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from ..utils.fields import Count, Seed
from ..utils.messages import without_import_notices
from .arguments import Flag, FlagParser


if TYPE_CHECKING:
    from ..data.sources import Source
    from ..data.workers import Workers
    from ..training.recipe import DataFields

# flags that only some engines read
ENGINES_OF = {
    "processes": ("processes", "datatrove", "ray"),
    "threads": ("processes", "ray"),
    "tasks": ("datatrove", "slurm"),
    "partition": ("slurm",),
    "time": ("slurm",),
}
CLUSTER = "on a cluster, shards as tasks of datatrove (extra `scale`) or of Ray (extra `ray`)"


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
            of this machine, not of Slurm; by default one for every core.
        threads (`int`, *optional*, defaults to `1`):
            of each process; datatrove and Slurm have one.
        rows_per_shard (`int`, *optional*):
            by default about 64 shards a split, of 256 images and more.
        splits (`list[str]`, *optional*):
            these alone, `train` among them; by default all that there are.
        seed (`int`, *optional*, defaults to `0`):
            of the changed images of further codings.
        strict (`bool`, *optional*, defaults to `False`):
            stop at the first row that cannot be used.
        engine (`Literal["processes", "datatrove", "slurm", "ray"]`, *optional*, defaults to `"processes"`):
            what starts the tasks, shards of the tokens: this command, datatrove on this machine, Slurm, or Ray.
        tasks (`int`, *optional*, defaults to `64`):
            of datatrove, on this machine or on Slurm, among which the shards are divided.
        partition (`str`, *optional*):
            of Slurm.
        time (`str`, *optional*, defaults to `"24:00:00"`):
            longest of a Slurm job.
        address (`str`, *optional*):
            of a Ray cluster, HOST:PORT or `auto`, all cores of which work; by default RAY_ADDRESS, and without it a
            Ray of this machine with `processes`. Data, processor and tokens lie on a disk that all nodes share.
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
    engine: Annotated[Literal["processes", "datatrove", "slurm", "ray"], Flag(section=CLUSTER)] = "processes"
    tasks: Annotated[Count, Flag(section=CLUSTER)] = 64
    partition: Annotated[str | None, Flag(section=CLUSTER)] = None
    time: Annotated[str, Flag(section=CLUSTER)] = "24:00:00"
    address: Annotated[str | None, Flag(section=CLUSTER)] = None


def parse_arguments(arguments: list[str] | None = None) -> Arguments:
    parser = FlagParser(Arguments, description=__doc__)
    given = parser.read(arguments)
    args = Arguments(**given)
    if args.engine == "slurm" and not args.partition:
        parser.error("--engine slurm needs --partition")
    if args.address is not None and args.engine != "ray":
        parser.error(f"--address {args.address!r} is that of a Ray cluster: give --engine ray with it")
    for name in given:
        engines = ENGINES_OF.get(name, (args.engine,))
        if args.engine not in engines:
            where = " or ".join(engines)
            parser.error(f"--{name} {given[name]}: --engine {args.engine} does not read it, but {where}")
    return args


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
    with without_import_notices():
        from ..data.outputs import refuse_output_in_data
        from ..data.workers import Workers
        from ..hub.loading import PROCESSOR, check_saved
        from ..training.recipe import DataFields, read_recipe

    recipe = read_recipe(args.recipe, needs=("sources",))
    refuse_output_in_data(args.output, recipe.sources)
    data = recipe.data or DataFields()
    # what they cannot load they would each tell of
    check_saved(PROCESSOR, "--processor", args.processor)
    # while they start, this process looks at the sources
    others = args.processes - 1 if args.engine == "processes" else 0
    with Workers(others, args.threads, args.processor) if others else nullcontext() as workers:
        tokenize(args, recipe.sources, data, workers)


def tokenize(args: Arguments, sources: "list[Source]", data: "DataFields", workers: "Workers | None") -> None:
    """Plan and write the tokens, and say what became of the rows."""
    from ..data.executors import run_executor
    from ..data.jobs import done_report, plan_job, write_job
    from ..data.ray_tasks import run_on_ray
    from ..data.reports import write_manifest
    from ..data.workers import run_tasks

    job = plan_job(sources, args.processor, *data.to_tokenize(), args.seed, args.rows_per_shard, args.splits)
    write_job(args.output, job)
    if args.engine == "processes":
        run_tasks(args.output, job, args.processes, args.threads, args.strict, workers)
    elif args.engine == "ray":
        address = args.address or os.environ.get("RAY_ADDRESS") or None
        run_on_ray(args.output, job, args.processes, args.threads, args.strict, address)
    # a second start on a cluster, after the jobs of the first, only adds up
    elif any(done_report(args.output, task) is None for task in job.tasks()):
        at_once = args.tasks if args.engine == "slurm" else args.processes
        run_executor(args.output, args.engine, args.tasks, at_once, args.strict, args.partition, args.time)
        if args.engine == "slurm":
            print(f"submitted; once all tasks are done, the same command writes {args.output}/manifest.json")
            return
    manifest = write_manifest(args.output, job)
    print(summary(manifest))


def main(arguments: list[str] | None = None):
    run(parse_arguments(arguments))
