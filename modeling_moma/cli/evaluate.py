# SPDX-License-Identifier: Apache-2.0
"""Measure a model on held-out data: losses, captions, information, retrieval, drawings.

Losses are by modality and source, causal as in `generate`. The loss under `expert_choice` stands beside them with its
warning: it sees the future and is no measure of quality.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from ..errors_moma import InputError
from ..utils.fields import Count, Int, Seed, Share
from ..utils.messages import without_import_notices
from .arguments import Flag, parse_fields, title_of
from .generate import OfSampling, Scale, TopK, check_sampling


# of `measure_sources`
Measure = Literal["losses", "captions", "information", "retrieval", "drawings"]
# of drawings, where other flags of sampling are given
DEFAULT_SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "guidance_scale": 1.0}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `moma evaluate`.

    Args:
        model (`str`):
            folder of a MomaForCausalLM.
        processor (`str`, *optional*):
            folder of its MomaProcessor; by default that of the model.
        tokens (`str`):
            folder that `moma tokenize` wrote.
        split (`str`, *optional*, defaults to `"test"`):
            of the tokens.
        sources (`list[str]`, *optional*):
            measure these alone; by default all.
        measures (`list[Literal["losses", "captions", "information", "retrieval", "drawings"]]`, *optional*):
            by default losses, and captions where a source has any; retrieval and drawings take longer.
        limit (`int`, *optional*):
            measure so many rows of each source, drawn at random.
        batch_size (`int`, *optional*, defaults to `64`):
            rows at once.
        dtype (`Literal["float32", "bfloat16"]`, *optional*, defaults to `"float32"`):
            of the weights, but for a model that bitsandbytes has quantised, which keeps its own; a GPU multiplies
            groups of experts in bfloat16 alone without waiting.
        seed (`int`, *optional*, defaults to `0`):
            of the draw, the order and the drawings.
        retrieval_pairs (`int`, *optional*, defaults to `64`):
            pairs of each source, each ranked among all.
        temperature (`float`, *optional*):
            of the drawings, by default 1; 0 takes the likeliest codes. Where neither it nor any of the next three is
            given, images are drawn as the model's `generation_config.json` has it in `image_sampling`.
        top_k (`int`, *optional*):
            draw among so many codes, by default all.
        top_p (`float`, *optional*):
            draw among codes of this total probability, by default 1.
        guidance_scale (`float`, *optional*):
            above 1, which is the default, follows the words more closely.
        output (`str`, *optional*):
            JSON file of all figures, `null` where one is no finite number.
    """

    model: str
    processor: str | None = None
    tokens: str
    split: str = "test"
    sources: Annotated[list[str] | None, Flag(metavar="NAME")] = None
    measures: list[Measure] | None = None
    limit: Count | None = None
    batch_size: Count = 64
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: Seed = 0
    retrieval_pairs: Annotated[Int, Field(ge=2)] = 64
    temperature: Annotated[Scale | None, OfSampling] = None
    top_k: Annotated[TopK | None, OfSampling] = None
    top_p: Annotated[Share | None, OfSampling] = None
    guidance_scale: Annotated[Scale | None, OfSampling] = None
    output: str | None = None


def parse_arguments(arguments: list[str] | None = None) -> Arguments:
    return parse_fields(Arguments, __doc__, arguments)


def sampling_arguments(args: Arguments) -> dict[str, Any] | None:
    """Return the arguments of `generate` that flags ask for, `None` where none is given; or raise `ValueError`."""
    given = {name: getattr(args, name) for name in DEFAULT_SAMPLING if getattr(args, name) is not None}
    if not given:
        return None
    chosen = DEFAULT_SAMPLING | given
    check_sampling(chosen["temperature"], chosen["top_k"], chosen["top_p"])
    if chosen["temperature"] == 0:
        return {"do_sample": False, "guidance_scale": chosen["guidance_scale"]}
    return {"do_sample": True, **chosen}


def check_flags(args: Arguments) -> None:
    """Raise `ValueError` at flags of sampling that are out of range, or that no measure asked for would read."""
    sampling_arguments(args)
    if args.output == "":
        raise InputError("--output '': it names no file; is a variable of the shell empty?")
    defaults = {entry.name: entry.default for entry in dataclasses.fields(Arguments)}
    for measure, names in {"drawings": tuple(DEFAULT_SAMPLING), "retrieval": ("retrieval_pairs",)}.items():
        given = [name for name in names if getattr(args, name) != defaults[name]]
        if given and measure not in (args.measures or ()):
            flag = title_of(Arguments, given[0])
            raise InputError(f"{flag}: it is read by `--measures {measure}` alone, which is not asked for.")


def evaluate(args: Arguments) -> tuple[dict, str]:
    """Return the figures of [`measure_sources`] by source, and the type in which they were computed."""
    with without_import_notices():
        import torch

        from ..data.documents import check_layout
        from ..evaluation.evaluate import MeasureSettings, measure_sources
        from ..evaluation.held_out import read_held_out
        from ..evaluation.measures import load_model
        from ..hub.loading import open_processor

    settings = MeasureSettings(
        None if args.measures is None else tuple(args.measures),
        args.batch_size,
        args.seed,
        args.retrieval_pairs,
        sampling_arguments(args),
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(args.model, device, args.dtype)
    processor = open_processor(args.processor or args.model, "--processor" if args.processor else "--model").to(device)
    check_layout(model.config, processor.token_layout())
    sources = read_held_out(args.tokens, processor, args.split, args.limit, args.seed, args.sources)
    return measure_sources(model, processor, sources, settings), str(model.dtype).removeprefix("torch.")


def run(args: Arguments) -> None:
    from ..utils.atomic_files import atomic_write, check_place
    from ..utils.records import finite_json

    check_flags(args)
    if args.output is not None:
        # before hours of measures
        check_place(args.output)
    sources, dtype = evaluate(args)
    from ..evaluation.report import report_tables

    print(report_tables(sources))
    if args.output is not None:
        report = {"arguments": vars(args), "dtype": dtype, "sources": sources}
        atomic_write(args.output, lambda path: path.write_text(finite_json(report)))


def main(arguments: list[str] | None = None):
    run(parse_arguments(arguments))
