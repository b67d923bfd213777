# SPDX-License-Identifier: Apache-2.0
"""Find the fastest layout for a training on so many GPUs: computed, not measured.

Documents hold tables between `<!-- plan: ARGUMENTS -->` and `<!-- /plan -->`; `--write DOCUMENT` computes them anew.
"""

import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator

from ..errors_moma import InputError
from ..utils.fields import Count, Int
from ..utils.messages import one_line
from .arguments import Changes, Flag, parse_fields, read_changes, title_of


if TYPE_CHECKING:
    from ..configuration_moma import MomaConfig
    from ..planning.layouts import Layout, Memory
    from ..planning.plans import Hardware, Plan

GIGA = 1e9
TABLE = re.compile(r"(<!-- plan: (.+?) -->\n).*?(<!-- /plan -->)", flags=re.DOTALL)
# largest first, by the seconds of one
UNITS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
# flags of tables, and of the layouts of one model
OF_TABLES = ("steps", "top")
OF_ONE_MODEL = ("gpus", "steps", "top", "json")
OVERVIEW_GPUS = (1, 8, 64, 256)


def _preset(name: str) -> str:
    from ..configuration_moma import MomaConfig

    names = MomaConfig.preset_names()
    if name not in names:
        raise InputError(f"one of {', '.join(map(repr, names))}")
    return name


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `moma plan`.

    Args:
        preset (`str`, *optional*):
            as moma-1.4b-4t4i.
        config (`str`, *optional*):
            folder or JSON file of a complete MomaConfig, such as model_cards/moma-emoji.
        overview (`bool`, *optional*, defaults to `False`):
            the fastest layout of every preset on 1 to 256 GPUs.
        write (`str`, *optional*):
            compute the tables of a document anew.
        gpus (`int`, *optional*, defaults to `8`):
            number of them.
        tokens_per_gpu (`int`, *optional*, defaults to `24576`):
            of a step, all micro-batches together.
        sequence_length (`int`, *optional*, defaults to `4096`):
            tokens of a sequence.
        steps (`int`, *optional*):
            also tell how long so many steps take.
        set (`list[str]`, *optional*, defaults to `[]`):
            fields of [`Hardware`], as hardware.memory=40e9 or hardware.flops=312e12.
        top (`int`, *optional*, defaults to `6`):
            layouts in the table.
        json (`bool`, *optional*, defaults to `False`):
            print all layouts, in bytes and seconds.
    """

    preset: Annotated[str | None, AfterValidator(_preset), Flag(metavar="NAME", one_of="what")] = None
    config: Annotated[str | None, Flag(one_of="what")] = None
    overview: Annotated[bool, Flag(one_of="what")] = False
    write: Annotated[str | None, Flag(metavar="DOCUMENT", one_of="what")] = None
    gpus: Int = 8
    tokens_per_gpu: Int = 24576
    sequence_length: Int = 4096
    steps: Count | None = None
    set: Changes = field(default_factory=list)
    top: Count = 6
    json: bool = False


def parse_arguments(arguments: list[str] | None = None) -> Arguments:
    return parse_fields(Arguments, __doc__, arguments, required=("what",))


def read_config(args: Arguments) -> "MomaConfig":
    """Return the configuration of `--preset` or `--config`."""
    from huggingface_hub.errors import StrictDataclassError

    from ..configuration_moma import MomaConfig

    if args.config is None:
        return MomaConfig.from_preset(str(args.preset))
    path = Path(args.config)
    if not path.exists():
        raise InputError(f"--config {path}: no such file or folder")
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        raise InputError(f"--config {path}: the folder has no config.json; is it that of a saved model?")
    try:
        config, kind = MomaConfig.from_json_file(file), json.loads(file.read_text(encoding="utf-8")).get("model_type")
    # TypeError is a file that holds no object; KeyError and AttributeError are Transformers', of fields that it reads
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise InputError(
            f"--config {file}: no complete MomaConfig. Does it lack the token layout, as recipes/*.yaml do, which get "
            f"it from a tokenizer? {one_line(error)}"
        ) from error
    # of another model's fields some are ours, and defaults would stand for the others
    if kind != MomaConfig.model_type:
        raise InputError(f"--config {file}: `model_type` is {kind!r}; a MoMa's says {MomaConfig.model_type!r}.")
    return config


def hardware_of(args: Arguments) -> "Hardware":
    """Return the hardware that the flags describe."""
    from ..planning.plans import Hardware

    return read_changes(Hardware, "hardware", args.set)


def refuse_unread(args: Arguments, mode: str, names: Iterable[str]) -> None:
    """Raise `ValueError` where a flag has another value than its default that the command would not read."""
    defaults = vars(Arguments())
    given = [title_of(Arguments, name) for name in names if getattr(args, name) != defaults[name]]
    if given:
        raise InputError(f"{mode} takes no {', '.join(given)}, which would change nothing.")


def duration(seconds: float) -> str:
    """Return a time in the largest unit of which it has one at least, as `"1.4 days"`."""
    unit = next((unit for unit, size in UNITS.items() if seconds >= size), "seconds")
    return f"{seconds / UNITS[unit]:.1f} {unit}"


def compute(args: Arguments) -> "tuple[list[Plan], list[tuple[Layout, Memory]]]":
    """Return the plans, the fastest first, and the layouts that do not fit with the memory that they need."""
    from ..planning.plans import plan_training

    hardware = hardware_of(args)
    plans, misfits = plan_training(read_config(args), args.gpus, args.tokens_per_gpu, args.sequence_length, hardware)
    if not plans:
        layout, memory = misfits[0]
        raise InputError(
            f"no layout fits {args.gpus} GPUs of {hardware.memory / GIGA:g} GB: the smallest, {layout}, needs "
            f"{memory.total / GIGA:.1f} GB with one sequence of {args.sequence_length} at once, a GPU of "
            f"{memory.total / hardware.headroom / GIGA:.1f} GB at a `headroom` of {hardware.headroom:g}. Take more "
            "GPUs, larger ones, or shorter sequences."
        )
    return plans, misfits


def to_json(args: Arguments, plans: "list[Plan]", misfits: list) -> str:
    """Return what [`compute`] returns, and its arguments, as JSON in bytes and seconds."""

    def layout_of(layout):
        return {"name": str(layout), **asdict(layout)}

    report = {
        "arguments": {
            **{
                name: getattr(args, name) for name in ("preset", "config", "gpus", "tokens_per_gpu", "sequence_length")
            },
            "hardware": asdict(hardware_of(args)),
        },
        "plans": [
            {
                **asdict(plan),
                "layout": layout_of(plan.layout),
                "memory": {**asdict(plan.memory), "total": plan.memory.total},
                "collectives": [{**asdict(item), "sent": item.sent} for item in plan.collectives],
                "seconds": plan.seconds,
            }
            for plan in plans
        ],
        "do_not_fit": [{"layout": layout_of(layout), "least_memory": memory.total} for layout, memory in misfits],
    }
    return json.dumps(report, indent=2)


def to_table(args: Arguments, plans: "list[Plan]", misfits: list) -> str:
    """Return the fastest plans as a Markdown table, and the recommended one in words."""
    lines = [
        "| layout | GB per GPU | of which activations | sequences at once | layers computed again | compute s "
        "| weights s (GB) | tokens s (GB) | step s |",
        "|---|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    for plan in plans[: args.top]:
        sent = {True: 0.0, False: 0.0}
        for item in plan.collectives:
            sent[item.is_overlapped] += item.sent / GIGA
        cells = [
            str(plan.layout),
            f"{plan.memory.total / GIGA:.1f}",
            f"{plan.memory.activations / GIGA:.1f}",
            str(plan.sequences),
            "yes" if plan.checkpointing else "no",
            f"{plan.compute_seconds:.2f}",
            f"{plan.weight_seconds:.2f} ({sent[True]:.1f})",
            f"{plan.token_seconds:.2f} ({sent[False]:.1f})",
            f"{plan.seconds:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    best = plans[0]
    rate = args.tokens_per_gpu / best.seconds
    lines += ["", f"Recommended: {best.layout}, {rate:,.0f} tokens per second and GPU."]
    if args.steps is not None:
        lines[-1] += f" {args.steps:,} steps take {duration(args.steps * best.seconds)}."
    if len(plans) > args.top:
        lines[-1] += f" {len(plans) - args.top} slower layouts fit as well."
    if misfits:
        names = ", ".join(f"{layout} ({memory.total / GIGA:.0f} GB)" for layout, memory in misfits)
        lines[-1] += f" Do not fit, even one sequence at a time: {names}."
    return "\n".join(lines)


def overview(args: Arguments) -> str:
    """Return a Markdown table of the fastest layout of every preset on several numbers of GPUs."""
    refuse_unread(args, "--overview", OF_ONE_MODEL)
    from ..configuration_moma import MomaConfig
    from ..planning.plans import plan_training

    lines = [
        "| preset | " + " | ".join(f"{gpus} GPUs" if gpus > 1 else "1 GPU" for gpus in OVERVIEW_GPUS) + " |",
        "|---|" + "---|" * len(OVERVIEW_GPUS),
    ]
    for name in MomaConfig.preset_names():
        config, cells = MomaConfig.from_preset(name), []
        for gpus in OVERVIEW_GPUS:
            plans, _ = plan_training(config, gpus, args.tokens_per_gpu, args.sequence_length, hardware_of(args))
            cells.append(f"{plans[0].layout}, {plans[0].memory.total / GIGA:.0f} GB" if plans else "does not fit")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_tables(document: str) -> int:
    """Compute the tables of a document anew, and return their number."""
    from ..utils.atomic_files import atomic_write

    if not document:
        raise InputError("--write '': it names no document; is a variable of the shell empty?")

    def compute_anew(match):
        try:
            words = shlex.split(match[2])
        except ValueError as error:
            raise InputError(f"{document}: the arguments {match[2]!r} cannot be read: {error}.") from error
        args = parse_arguments(words)
        if args.json or args.write is not None:
            raise InputError(f"{document}: the arguments {match[2]!r} make no table: leave out --json and --write.")
        table = overview(args) if args.overview else to_table(args, *compute(args))
        return f"{match[1]}{table}\n{match[3]}"

    path = Path(document)
    try:
        text = path.read_bytes().decode()
    except (ValueError, OSError) as error:
        raise InputError(f"--write {document}: {error}") from error
    end = "\r\n" if "\r\n" in text else "\n"
    text, count = TABLE.subn(compute_anew, text.replace(end, "\n"))
    if not count:
        raise InputError(f"{document} has no table between <!-- plan: ARGUMENTS --> and <!-- /plan -->.")
    try:
        atomic_write(path, lambda aside: aside.write_bytes(text.replace("\n", end).encode()))
    except OSError as error:
        raise InputError(f"--write {document}: {error}") from error
    return count


def run(args: Arguments) -> None:
    if args.write is not None:
        refuse_unread(args, "--write", [entry.name for entry in fields(args) if entry.name != "write"])
        print(f"{args.write}: {write_tables(args.write)} tables")
    elif args.overview:
        print(overview(args))
    else:
        if args.json:
            refuse_unread(args, "--json", OF_TABLES)
        plans, misfits = compute(args)
        print(to_json(args, plans, misfits) if args.json else to_table(args, plans, misfits))


def main(arguments: list[str] | None = None):
    run(parse_arguments(arguments))
