# SPDX-License-Identifier: Apache-2.0
"""Recipes: one YAML file that says what a training is made of, from its data to its model."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from ..configuration_moma import MomaConfig
from ..data.sources import Source, read_sources
from ..errors_moma import InputError
from ..utils.fields import Count, Int, NotNegative, read_fields, refuse_unknown
from ..utils.messages import one_line, without_import_notices


# the command line decides these, not the recipe
RUN_FIELDS = ("output_dir", "use_cpu", "resume_from_checkpoint")
# with these a run that goes on would silently be another one, or documents would be read twice, or not measured
REFUSED = {
    "save_only_model": "checkpoints without optimizer and schedule cannot be gone on from",
    "ignore_data_skip": "a run that goes on would read its first documents again",
    "auto_find_batch_size": "documents of a step are counted before: give a `per_device_train_batch_size` that fits",
    "dataloader_drop_last": "held-out documents would be left out of their loss",
    "data_seed": "the order of the documents follows from `seed`",
    "label_smoothing_factor": "smoothed labels know neither `modality_loss_weights` nor the z-loss of the routers",
    "num_train_epochs": "a training is as long as `max_steps` says, whose documents come from a stream",
}
# the one value that each of Accelerate's settings may have, and why
ACCELERATOR_FIELDS = {
    "split_batches": (False, "a step would take fewer documents than are counted"),
    "dispatch_batches": (False, "each process reads its own documents"),
    "even_batches": (True, "the processes would wait for each other for ever"),
}
# the tag of the key `<<`
MERGE = "tag:yaml.org,2002:merge"
# orders of rows that a run which goes on finds its place in
STRATEGIES = ("random", "sequential")


@dataclass(frozen=True)
class DataFields:
    """How a training reads its documents.

    Args:
        sequence_length (`int`, *optional*):
            tokens of a sequence, and most of an image with its caption; by default 512 in `moma tokenize`, and in
            training what the tokens were made for.
        packed (`bool`, *optional*):
            whether sequences are full of documents; otherwise each is a row of its own, padded. By default `True` in
            `moma tokenize`, and in training as the tokens were made.
    """

    # a token is predicted from the one before it
    sequence_length: Annotated[Int, Field(ge=2)] | None = None
    packed: bool | None = None

    def to_tokenize(self) -> tuple[int, bool]:
        """Return the length of sequences, and whether they are packed, with the defaults of `moma tokenize`."""
        return self.sequence_length or 512, self.packed is not False


@dataclass(frozen=True)
class ProcessorFields:
    """How texts and images become tokens.

    Args:
        vocab_size (`int`, *optional*, defaults to `2000`):
            text tokens of a byte-pair encoding that learns from the sources.
        text_tokenizer (`str`, *optional*):
            a folder or Hub name of a tokenizer to take instead.
        text_rows (`int`, *optional*, defaults to `1000000`):
            rows of each source that the encoding learns from, at most.
        do_pad (`bool`, *optional*, defaults to `False`):
            whether images are fitted into a white square, or whatever shape the model's have, in place of being
            cropped to it. It is the default of the image tokenizer's training, too.
        image_size (`int | str`, *optional*):
            size of all images in pixels, as 256 or, height first, 256x384; by default that of the image tokenizer,
            which Emu3's lacks. A MomaVQModel takes its own alone.
        audio_codebooks (`int`, *optional*):
            codebooks of an EnCodec, a DAC or a Mimi that are used; by default the fewest that it can.
    """

    vocab_size: Count = 2000
    text_tokenizer: str | None = None
    text_rows: Count = 1_000_000
    do_pad: bool = False
    image_size: Int | str | None = None
    audio_codebooks: Count | None = None


@dataclass(frozen=True)
class SampleFields:
    """What a training draws and says every so often.

    Args:
        every (`int`, *optional*, defaults to `0`):
            steps between two samples; 0 for none.
        prompts (`list[str]`, *optional*, defaults to `[]`):
            words to draw images from.
        images (`int`, *optional*, defaults to `4`):
            held-out images to caption, of every source of captions.
        temperature (`float`, *optional*, defaults to `1.0`):
            of the drawings, 0 for the likeliest codes.
        guidance_scale (`float`, *optional*, defaults to `1.0`):
            of the drawings, 1 for none.
        max_new_tokens (`int`, *optional*, defaults to `32`):
            longest caption.
    """

    every: Annotated[Int, Field(ge=0)] = 0
    prompts: list[str] = field(default_factory=list)
    images: Annotated[Int, Field(ge=0)] = 4
    temperature: NotNegative = 1.0
    guidance_scale: NotNegative = 1.0
    max_new_tokens: Count = 32


@dataclass(frozen=True)
class Recipe:
    """What a training is made of.

    Args:
        model (`dict[str, Any]`, *optional*, defaults to `{}`):
            fields of [`MomaConfig`], perhaps over a `preset`; the processor gives those of its token layout.
        trainer (`dict[str, Any]`, *optional*, defaults to `{}`):
            fields of `TrainingArguments`.
        sources (`list[Source]`, *optional*, defaults to `[]`):
            where the data are and what they are.
        image_tokenizer (`dict[str, Any]`, *optional*, defaults to `{}`):
            settings of the training of the image tokenizer.
        audio_tokenizer (`dict[str, Any]`, *optional*, defaults to `{}`):
            settings of the training of the audio tokenizer.
        processor (`ProcessorFields`, *optional*):
            see [`ProcessorFields`].
        data (`DataFields`, *optional*):
            see [`DataFields`]; `None` where the recipe has no such section.
        samples (`SampleFields`, *optional*):
            see [`SampleFields`].
    """

    model: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    image_tokenizer: dict[str, Any] = field(default_factory=dict)
    audio_tokenizer: dict[str, Any] = field(default_factory=dict)
    processor: ProcessorFields = field(default_factory=ProcessorFields)
    data: DataFields | None = None
    samples: SampleFields = field(default_factory=SampleFields)


# sections whose fields are checked when a recipe is read
SECTIONS = {"processor": ProcessorFields, "data": DataFields, "samples": SampleFields}
_EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")


class _RecipeLoader(yaml.SafeLoader):
    """YAML as it is, but for a key that stands twice in a mapping: all but its last value would be lost."""

    # as the mapping is read: later the keys that `<<` merges stand beside its own
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in lines and key.tag != MERGE:
                raise yaml.YAMLError(
                    f"{key.value!r} stands twice in one mapping, in line {lines[name]} and in line {line}, and all "
                    "but the last one would be lost. Was it copied, and not renamed?"
                )
            lines[name] = line
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        # a value that looks like a date and is none says nothing of its place
        except ValueError as error:
            raise yaml.constructor.ConstructorError(None, None, one_line(error), node.start_mark) from error


def read_recipe(
    path: str | Path | None, needs: Sequence[str] = (), changes: Sequence[str] = (), reads: Sequence[str] = ()
) -> Recipe:
    """Read a recipe, empty without a path, and change fields as `--set` has it, of sections that a command reads."""
    where = "--set" if path is None else f"RECIPE {str(path)!r}"
    if path is not None and not Path(path).is_file():
        raise InputError(f"{where} is no file.")
    try:
        content = {} if path is None else _read_yaml(where, Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where} cannot be read as YAML: {one_line(error)}") from error
    if isinstance(content, dict):
        for change in changes:
            _change(content, change, reads)
    sections = [entry.name for entry in dataclasses.fields(Recipe)]
    if not isinstance(content, dict) or not content.keys() <= set(sections):
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise InputError(
            f"{where} must hold some of the sections {', '.join(sections)}, got {found}: are the fields of the model "
            "not under `model:`?"
        )
    missing = [section for section in needs if section not in content]
    if missing:
        raise InputError(f"{where} has no section {missing[0]!r}, which this command needs.")
    return _read_sections(where, {name: {} if value is None else value for name, value in content.items()})


def _read_yaml(where: str, text: str) -> Any:
    try:
        return yaml.load(text, Loader=_RecipeLoader)
    # brackets in brackets may go too deep
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{where} cannot be read as YAML: {one_line(error)}") from error


def _change(content: dict[str, Any], change: str, reads: Sequence[str]) -> None:
    """Put a value of `--set section.field=value` into a recipe's content."""
    place, equals, text = change.partition("=")
    *sections, name = place.split(".")
    if not (equals and sections and all(sections) and name):
        raise InputError(f"--set {change!r}: it is no section.field=value, such as trainer.max_steps=100.")
    if sections[0] not in reads:
        raise InputError(f"--set {change!r}: of a recipe's sections this command reads {', '.join(reads)} alone.")
    holder = content
    for section in sections:
        holder[section] = {} if holder.get(section) is None else holder[section]
        holder = holder[section]
        if not isinstance(holder, dict):
            raise InputError(f"--set {change!r}: {section} = {holder!r} has no fields.")
    holder[name] = _read_yaml(f"--set {change!r}", text)


def _read_sections(where: str, content: dict[str, Any]) -> Recipe:
    # imported late: it imports Transformers' Trainer, which tokenizing processes do not need
    with without_import_notices():
        from transformers import TrainingArguments

    for section, value in content.items():
        if section != "sources" and not isinstance(value, dict):
            raise InputError(f"{where}, {section}: expected a mapping of fields, got {value!r}.")
    refuse_unknown(
        content.get("model", {}), ["preset", *_names(MomaConfig)], f"{where}, model", "MomaConfig", is_listed=False
    )
    of_trainer = [name for name in _names(TrainingArguments) if name not in RUN_FIELDS]
    holder = "TrainingArguments that a recipe may set"
    refuse_unknown(content.get("trainer", {}), of_trainer, f"{where}, trainer", holder, is_listed=False)
    for name, reason in REFUSED.items():
        if content.get("trainer", {}).get(name):
            raise InputError(f"{where}, trainer: {name} = {content['trainer'][name]!r}: {reason}.")
    _refuse_accelerator_fields(where, content.get("trainer", {}).get("accelerator_config"))
    strategy = content.get("trainer", {}).get("train_sampling_strategy", STRATEGIES[0])
    if strategy not in STRATEGIES:
        raise InputError(
            f"{where}, trainer: train_sampling_strategy = {strategy!r} is none of {', '.join(STRATEGIES)}: rows "
            "are made when they are read, in an order of their own that a run which goes on counts on."
        )
    for section in ("model", "trainer"):
        if section in content:
            content[section] = _with_numbers(content[section])
    if "trainer" in content:
        _check_values(where, content["trainer"], TrainingArguments)
    sections = {
        section: read_fields(kind, content[section], f"{where}, {section}")
        for section, kind in SECTIONS.items()
        if section in content
    }
    plain = ("model", "trainer", "image_tokenizer", "audio_tokenizer")
    others = {section: content[section] for section in plain if section in content}
    sources = read_sources(content["sources"]) if "sources" in content else []
    return Recipe(sources=sources, **others, **sections)


def _check_values(where: str, trainer: dict[str, Any], kind: type) -> None:
    """Read a bare `no` as such, and raise `ValueError` for a field without a value that has to have one."""
    defaults = {entry.name: entry.default for entry in dataclasses.fields(kind)}
    for name, value in trainer.items():
        # as YAML 1.1 reads it
        if value is False and name in ("eval_strategy", "save_strategy", "logging_strategy"):
            trainer[name] = "no"
        if value is None and defaults[name] not in (None, dataclasses.MISSING):
            raise InputError(
                f"{where}, trainer: {name} has no value; give it one, or leave it out for the default of this command."
            )


def _refuse_accelerator_fields(where: str, config: Any) -> None:
    """Raise `ValueError` for settings of Accelerate by which a step takes other documents than are counted."""
    if isinstance(config, str):
        raise InputError(
            f"{where}, trainer: accelerator_config = {config!r}: give its fields here, not a file of them: some would "
            "change which documents a step takes."
        )
    if not isinstance(config, dict):
        return
    for name, (only, reason) in ACCELERATOR_FIELDS.items():
        if config.get(name, only) not in (only, None):
            raise InputError(f"{where}, trainer: accelerator_config: {name} = {config[name]!r}: {reason}.")
    accumulation = config.get("gradient_accumulation_kwargs")
    if isinstance(accumulation, dict) and "num_steps" in accumulation:
        raise InputError(
            f"{where}, trainer: accelerator_config: gradient_accumulation_kwargs: num_steps = "
            f"{accumulation['num_steps']!r}: documents are counted by `gradient_accumulation_steps`, so give that."
        )


def _with_numbers(value: Any) -> Any:
    """Return a value of YAML with numbers such as `1e-8` as such: without a dot YAML 1.1 reads them as texts."""
    if isinstance(value, dict):
        return {name: _with_numbers(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_with_numbers(entry) for entry in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _names(kind: type) -> list[str]:
    return [entry.name for entry in dataclasses.fields(kind)]
