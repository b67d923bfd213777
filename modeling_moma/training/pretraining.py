# SPDX-License-Identifier: Apache-2.0
"""The model and the Trainer of a pre-training, from a command's arguments."""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from tokenization import MomaDataCollator, MomaProcessor

from ..configuration_moma import MomaConfig
from ..data.documents import TokenFolder, check_layout, check_positions, held_out_sets
from ..data.kinds import AudioDocuments, CaptionDocuments
from ..data.packing import PackedCollator, PackedExamples
from ..data.sources import VALIDATION, Source
from ..data.stream import DocumentExamples, TokenDocuments
from ..errors_moma import InputError
from ..hub.loading import MODEL, check_saved, open_model, open_processor, require_plain_weights
from ..modeling_moma import MomaForCausalLM
from ..routing_moma import MomaRouter
from ..utils.atomic_files import atomic_write
from .checkpoints import (
    RUN_FILE,
    check_kind,
    checkpoint_step,
    copy_checkpoint,
    examples_a_step,
    first_step,
    last_checkpoint,
    set_attention,
    without_incomplete_checkpoints,
)
from .code_embeddings import initialize_code_embeddings
from .fingerprints import Facts, RunFingerprint, check_output, check_same_data, finished_at, run_facts
from .freezing import freeze_groups, with_adapters
from .metrics_callback import MomaMetricsCallback, check_best_metric
from .muon import MUON
from .output_lock import sole_run
from .recipe import DataFields, Recipe, SampleFields
from .samples import SampleCallback, check_prompts
from .stage_trainer import ArgumentsOverrideState, StageTrainer, StopAt, ThroughputCallback
from .trainer_settings import make_trainer, make_training_arguments, recorded, uses_muon


if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class RunParts:
    """What a training is made of, but for the model itself."""

    processor: MomaProcessor
    tokens: TokenFolder
    sources: list[Source]
    config: MomaConfig
    training_arguments: TrainingArguments
    first_step: int
    facts: Facts


def read_parts(args: argparse.Namespace) -> RunParts:
    """Return what the arguments of `moma pretrain` name, read before anything large is."""
    processor = open_processor(args.processor)
    tokens = TokenFolder(args.tokens, processor)
    sources = args.recipe.sources or tokens.sources()
    config = starting_config(args.model, args.recipe, processor)
    check_prompts(args.recipe.samples, processor, config)
    training_arguments = make_training_arguments(args, adam_beta2=0.95, prediction_loss_only=True)
    earlier_steps = first_step(args.model, training_arguments, args.stop_at, args.restart_data)
    others = {name: getattr(args, name) for name in ("lora_rank", "freeze_groups", "train_groups")}
    if uses_muon(args):
        others["optim"] = MUON
    packed = packing(args.recipe.data, tokens)
    facts = run_facts(config, args.model, tokens, sources, packed, training_arguments, earlier_steps, **others)
    check_same_data(args.model, facts)
    return RunParts(processor, tokens, sources, config, training_arguments, earlier_steps, facts)


def packing(data: DataFields | None, tokens: TokenFolder) -> tuple[bool, int]:
    """Return whether sequences are packed and how long they are, as the recipe has it, or else the tokens."""
    data = data or DataFields()
    packed = tokens.manifest["packed"] if data.packed is None else data.packed
    return packed, data.sequence_length or tokens.manifest["sequence_length"]


def starting_config(folder: str | None, recipe: Recipe, processor: MomaProcessor) -> MomaConfig:
    """Return the configuration that the training starts with: of a saved model, or else of the recipe."""
    if not folder:
        fields = {**recipe.model, **processor.token_layout()}
        preset = fields.pop("preset", None)
        return MomaConfig(**fields) if preset is None else MomaConfig.from_preset(preset, **fields)
    check_saved(MODEL, "--model", folder)
    config = MomaConfig.from_pretrained(folder)
    require_plain_weights("--model", folder, config)
    # of training alone; routers read it when they are made
    noise = {name: value for name, value in recipe.model.items() if name == "gumbel_noise"}
    # constructed again, since fields that from_pretrained overrides are not checked
    config = MomaConfig.from_dict({**config.to_dict(), **noise})
    check_layout(config, processor.token_layout())
    _warn_of_unread_fields(folder, config, recipe)
    return config


def _warn_of_unread_fields(folder: str, config: MomaConfig, recipe: Recipe) -> None:
    """Tell of fields of a recipe's section `model` that are not those of the saved model."""
    fields = config.to_dict()
    named = {name: value for name, value in recipe.model.items() if name in MomaConfig.__annotations__}
    different = [name for name, value in named.items() if fields.get(name) != value]
    if different:
        name, *more = different
        others = f", and so do {', '.join(more)}" if more else ""
        logger.warning_once(
            f"RECIPE, model: {name} = {named[name]!r} is not read beside `--model` {folder!r}, whose own "
            f"{fields.get(name)!r} stays{others}. What is no size can be changed in its config.json."
        )


def build_model(
    args: argparse.Namespace, processor: MomaProcessor, config: MomaConfig
) -> "MomaForCausalLM | PeftModel":
    """Return the model to train: loaded or fresh, with adapters or frozen groups as the command line says."""
    if args.model:
        # fp32 whatever the saved dtype: steps are too small for bf16 weights
        model = open_model(args.model, config=config, dtype=torch.float32)
        # its captions may begin otherwise after this training
        vars(model.generation_config).pop("caption_suppress_tokens", None)
    else:
        model = MomaForCausalLM(config)
        initialize_code_embeddings(model, processor.vq_model.quantize.embedding.weight)
    set_attention(model, args.attn_implementation)
    if args.lora_rank is not None:
        return with_adapters(model, args.lora_rank, args.freeze_groups)
    freeze_groups(model, args.freeze_groups)
    return model


def noise_description(model: "MomaForCausalLM | PeftModel") -> str | None:
    """Return what the noise of the model's expert routers will be in training, `None` without noise."""
    routers = [module for module in model.modules() if isinstance(module, MomaRouter)]
    scale, steps = model.config.gumbel_noise, model.config.gumbel_noise_steps
    if not routers or not scale:
        return None
    if steps is None:
        return f"Gumbel noise of scale {scale} on the expert routers, which stays"
    past = int(routers[0].num_updates)
    return f"Gumbel noise of scale {scale} on the expert routers, fading over {steps} training forwards, {past} past"


def training_stream(
    data: DataFields | None, tokens: TokenFolder, sources: list[Source], num_examples: int, seed: int
) -> PackedExamples | DocumentExamples:
    """Return packed sequences or documents of their own, as the recipe has it, or else the tokens."""
    processor, (packed, length) = tokens.encoder.processor, packing(data, tokens)
    documents = [tokens.documents(source) for source in sources]
    weights = [source.weight for source in sources]
    if not packed and tokens.manifest["packed"]:
        for entry in documents:
            if isinstance(entry, TokenDocuments) and (number := entry.num_long()):
                raise InputError(
                    f"RECIPE, data: packed = false, but --tokens {str(tokens.folder)!r} was tokenized to be packed, "
                    f"and {number} documents of {entry.name!r} are longer than a sequence: "
                    "tokenize with `packed: false`."
                )
    if length < tokens.manifest["sequence_length"]:
        raise InputError(
            f"RECIPE, data: sequence_length = {length} is shorter than the {tokens.manifest['sequence_length']} that "
            f"--tokens {str(tokens.folder)!r} was tokenized for: some of its captions would fit nowhere."
        )
    tokenized = {source.name: source.kind for source in tokens.sources()}
    for entry in documents:
        if not isinstance(entry, CaptionDocuments | AudioDocuments):
            continue
        kind = tokenized[entry.name]
        # texts that were tokenized were looked at then
        if not isinstance(kind, type(entry.kind)) or kind.templates() != entry.kind.templates():
            entry.check_texts(length)
    if not packed:
        return DocumentExamples(documents, weights, num_examples, seed)
    frames = [(frame.begin, frame.end) for frame in processor.frames.values()]
    pad_token_id = processor.token_layout()["pad_token_id"]
    return PackedExamples(documents, weights, length, num_examples, pad_token_id, frames, seed)


def sample_callback(
    fields: SampleFields, tokens: TokenFolder, sources: list[Source], metrics: MomaMetricsCallback
) -> list[SampleCallback]:
    """Return the callback that draws and captions every so often, where the recipe asks for it."""
    if not fields.every:
        return []
    held_out = [
        tokens.documents(source, VALIDATION)
        for source in sources
        if source.kind.has_captions and VALIDATION in tokens.split_names(source.name)
    ]
    return [SampleCallback(fields, tokens.encoder.processor, held_out, metrics)]  # pyright: ignore[reportArgumentType]


def build_trainer(args: argparse.Namespace, parts: RunParts | None = None) -> StageTrainer:
    """Return the trainer of a stage, with its model and data."""
    parts = read_parts(args) if parts is None else parts
    processor, tokens, sources = parts.processor, parts.tokens, parts.sources
    training_arguments = parts.training_arguments
    check_positions(parts.config, packing(args.recipe.data, tokens)[1])
    set_seed(training_arguments.seed)
    model = build_model(args, processor, parts.config)
    config = model.config
    # saved with the checkpoints; truncation and pipelines cut there
    processor.tokenizer.model_max_length = config.max_position_embeddings
    print(f"{config.num_parameters():,} parameters, {config.num_parameters(active=True):,} active")
    if args.lora_rank is not None:
        model.print_trainable_parameters()  # pyright: ignore[reportCallIssue]
    if noise := noise_description(model):
        print(noise)
    num_examples = training_arguments.max_steps * examples_a_step(training_arguments)
    stream = training_stream(args.recipe.data, tokens, sources, num_examples, training_arguments.seed)
    if isinstance(stream, PackedExamples) or training_arguments.train_sampling_strategy == "random":
        # the stream is shuffled already, and a packed sequence begins with the rest of the one before
        training_arguments.train_sampling_strategy = "sequential"
    # `source_ids` are counted, and then left out by the trainer itself
    training_arguments.remove_unused_columns = False
    held_out = held_out_sets(tokens, sources, args.eval_examples)
    check_best_metric(training_arguments, config, held_out)
    if held_out is None:
        training_arguments.eval_strategy, training_arguments.eval_on_start = IntervalStrategy.NO, False
    weights = {source.name: source.weight for source in sources}
    is_packed = isinstance(stream, PackedExamples)
    feeding = ThroughputCallback(weights, stream.epochs, examples_a_step(training_arguments), is_packed)
    metrics, fingerprint = MomaMetricsCallback(averages_eval_loss=True), RunFingerprint(parts.facts)
    samples = sample_callback(args.recipe.samples, tokens, sources, metrics)
    callbacks = [metrics, feeding, fingerprint, ArgumentsOverrideState(parts.first_step), *samples]
    if args.stop_at:
        callbacks.append(StopAt(args.stop_at))
    trainer = make_trainer(
        StageTrainer,
        args,
        model=model,
        args=training_arguments,
        train_dataset=stream,
        eval_dataset=held_out,
        data_collator=PackedCollator(MomaDataCollator(processor.tokenizer)),
        callbacks=callbacks,
        processing_class=processor.tokenizer,
    )
    if args.train_groups:
        trainer.train_only(args.train_groups)
    trainer.first_step, trainer.earlier_stage, trainer.feeding = parts.first_step, args.model, feeding
    trainer.metrics = metrics
    trainer.uses_muon = uses_muon(args)
    return trainer


def resumed_checkpoint(output: str, resume: bool) -> tuple[str | None, int]:
    """Return the checkpoint in the output folder that a run goes on from, and the steps that it has taken."""
    checkpoint = last_checkpoint(output) if resume else None
    return checkpoint, 0 if checkpoint is None else checkpoint_step(checkpoint)


def pretrain(args: argparse.Namespace):
    """Train to the end, or to `--stop-at`, and write model, processor and records into the output folder."""
    parts = read_parts(args)
    with sole_run(args.output, parts.training_arguments.process_index == 0):
        _train_and_save(args, parts)


def _train_and_save(args: argparse.Namespace, parts: RunParts) -> None:
    check_output(args.output, parts.facts, args.resume, parts.training_arguments)
    wanted, done = args.stop_at or parts.training_arguments.max_steps, finished_at(args.output)
    checkpoint, taken = resumed_checkpoint(args.output, args.resume)
    is_first = parts.training_arguments.process_index == 0
    if done is not None and done >= wanted:
        if is_first:
            print(f"{args.output}: this run has taken {done} of {wanted} steps and is finished; nothing is changed.")
        return
    if done is not None and checkpoint is None and args.resume:
        raise InputError(
            f"`--output` {args.output!r} is finished at step {done} and has no checkpoint from which it could go on "
            f"to step {wanted}: another `--output`, with `--model {args.output} --restart-data`, trains its model on."
        )
    if taken > wanted:
        raise InputError(
            f"`--output` {args.output!r} has taken {taken} steps already, more than the {wanted} of `max_steps` and "
            "`--stop-at`: give at least as many, or another `--output`."
        )
    if taken == wanted and is_first:
        print(f"{args.output}: this run has taken all of its {taken} steps; what is missing is written.")
    trainer = build_trainer(args, parts)
    if checkpoint is not None:
        check_kind(checkpoint, trainer.checkpoint_kind())
    processor, output = parts.processor, Path(args.output).absolute()
    run = {
        "examples_a_step": examples_a_step(trainer.args),
        "first_step": trainer.first_step,
        "fingerprint": parts.facts,
        "arguments": {**recorded(args), "recipe": args.recipe_file},
    }
    if trainer.is_world_process_zero():
        atomic_write(output / RUN_FILE, lambda path: path.write_text(json.dumps(run, indent=2, default=str) + "\n"))
    if checkpoint is None and trainer.first_step:
        # restores the position in the data
        checkpoint = args.model
    elif args.stop_at and taken == args.stop_at:
        # a run killed after its last checkpoint has no step left: the loop would take one before it checks
        if trainer.is_world_process_zero():
            folders = str(checkpoint), trainer.chosen_checkpoint(str(checkpoint))
            copy_checkpoint(*folders, output, processor, trainer.model)  # pyright: ignore[reportArgumentType]
        return
    with without_incomplete_checkpoints(trainer):
        trainer.train(resume_from_checkpoint=checkpoint)
    if args.lora_rank is not None:
        trainer.merge_adapters()
    if trainer.is_world_process_zero():
        # a stopped stage left this file: while its model is replaced, no run counts as finished here
        (output / TRAINER_STATE_NAME).unlink(missing_ok=True)
    trainer.save_model()
    if trainer.is_world_process_zero():
        # the model can be used from its folder alone
        processor.save_pretrained(output)
        # last: the sign of a finished run
        atomic_write(output / TRAINER_STATE_NAME, lambda path: trainer.state.save_to_json(str(path)))
    # a process that ends before the others takes their connections with it
    trainer.accelerator.wait_for_everyone()
    # torch joins the threads of a group under the interpreter's lock, for which one that ends a barrier may still wait
    if trainer.accelerator.num_processes > 1:
        time.sleep(0.2)
    trainer.accelerator.end_training()
