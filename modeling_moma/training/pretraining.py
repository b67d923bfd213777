# SPDX-License-Identifier: Apache-2.0
"""The model and the Trainer of a pre-training, from a command's arguments."""

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy

from tokenization import MomaDataCollator, MomaProcessor

from .. import MomaConfig, MomaForCausalLM, MomaMetricsCallback, freeze_groups, initialize_code_embeddings
from ..data.documents import TokenFolder
from ..data.kinds import CaptionKind
from ..data.packing import PackedCollator, PackedExamples
from ..data.sources import VALIDATION, Source
from ..data.stream import DocumentExamples
from ..routing_moma import MomaRouter
from .adapters import with_adapters
from .checkpoints import last_checkpoint
from .examples import check_layout, held_out_sets
from .feeding import FeedingCallback
from .files import write_aside
from .precision import supports_bf16
from .recipe import Recipe
from .runs import RUN_FILE
from .samples import SampleCallback
from .stages import FollowArguments, StageTrainer, StopAt, copy_checkpoint, examples_a_step, first_step


if TYPE_CHECKING:
    from peft import PeftModel


def build_model(args: argparse.Namespace, processor: MomaProcessor) -> "MomaForCausalLM | PeftModel":
    # routers read it when they are made
    noise = {} if args.gumbel_noise is None else {"gumbel_noise": args.gumbel_noise}
    if args.model:
        config = MomaConfig.from_pretrained(args.model)
        # made anew, since what from_pretrained overrides is not checked
        config = MomaConfig.from_dict({**config.to_dict(), **noise})
        # whatever dtype it was saved in: steps are too small for bf16 weights
        model = MomaForCausalLM.from_pretrained(args.model, config=config, dtype=torch.float32)
        check_layout(model.config, processor.token_layout())
    else:
        model = MomaForCausalLM(model_config(args.recipe, processor, noise))
        initialize_code_embeddings(model, processor.vq_model.quantize.embedding.weight)
    model.set_attn_implementation(args.attn_implementation)
    if args.lora_rank is not None:
        return with_adapters(model, args.lora_rank, args.freeze_groups)
    freeze_groups(model, args.freeze_groups)
    return model


def model_config(recipe: Recipe, processor: MomaProcessor, overrides: dict[str, Any]) -> MomaConfig:
    """The configuration of a recipe's model over a processor's vocabulary."""
    fields = {**recipe.model, **overrides, **processor.token_layout()}
    preset = fields.pop("preset", None)
    return MomaConfig(**fields) if preset is None else MomaConfig.from_preset(preset, **fields)


def noise_description(model: "MomaForCausalLM | PeftModel") -> str | None:
    """What the noise of the model's expert routers will be in training, `None` without noise."""
    routers = [module for module in model.modules() if isinstance(module, MomaRouter)]
    scale, steps = model.config.gumbel_noise, model.config.gumbel_noise_steps
    if not routers or not scale:
        return None
    if steps is None:
        return f"Gumbel noise of scale {scale} on the expert routers, which stays"
    past = int(routers[0].num_updates)
    return f"Gumbel noise of scale {scale} on the expert routers, fading over {steps} training forwards, {past} past"


def make_training_arguments(args: argparse.Namespace) -> TrainingArguments:
    """The command line's and the recipe's settings of the Trainer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fields = {
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": args.batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.02},
        "warmup_steps": args.warmup_steps,
        "weight_decay": args.weight_decay,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "bf16": supports_bf16(device) if args.bf16 == "auto" else args.bf16 == "on",
        "eval_strategy": "steps",
        "eval_steps": args.eval_steps,
        "eval_on_start": True,
        "prediction_loss_only": True,
        "save_steps": args.save_steps,
        "save_total_limit": args.save_total_limit,
        "logging_steps": args.logging_steps,
        "report_to": [],
        "seed": args.seed,
    }
    return TrainingArguments(output_dir=args.output, use_cpu=device == "cpu", **{**fields, **args.trainer})


def training_stream(
    args: argparse.Namespace, tokens: TokenFolder, sources: list[Source], num_examples: int
) -> PackedExamples | DocumentExamples:
    """Packed sequences or documents of their own, as the recipe has it, or else the tokens."""
    data, processor = args.recipe.data, tokens.encoder.processor
    packed = tokens.manifest["packed"] if data is None else data.packed
    length = tokens.manifest["sequence_length"] if data is None else data.sequence_length
    documents = [tokens.documents(source) for source in sources]
    weights = [source.weight for source in sources]
    if not packed:
        return DocumentExamples(documents, weights, num_examples, args.seed)
    if length < tokens.manifest["sequence_length"]:
        raise ValueError(
            f"RECIPE, data: sequence_length = {length} is shorter than the {tokens.manifest['sequence_length']} that "
            f"--tokens {args.tokens!r} was tokenized for: some of its captions would fit nowhere."
        )
    frames = [(frame.begin, frame.end) for frame in processor.frames.values()]
    pad_token_id = processor.token_layout()["pad_token_id"]
    return PackedExamples(documents, weights, length, num_examples, pad_token_id, frames, args.seed)


def sample_callback(
    args: argparse.Namespace, tokens: TokenFolder, sources: list[Source], metrics: MomaMetricsCallback
) -> list[SampleCallback]:
    """What draws and captions every so often, where the recipe asks for it."""
    fields = args.recipe.samples
    if not fields.every:
        return []
    held_out = [
        tokens.documents(source, VALIDATION)
        for source in sources
        if isinstance(source.kind, CaptionKind) and VALIDATION in tokens.split_names(source.name)
    ]
    return [SampleCallback(fields, tokens.encoder.processor, held_out, metrics)]  # pyright: ignore[reportArgumentType]


def build_trainer(args: argparse.Namespace) -> StageTrainer:
    processor = MomaProcessor.from_pretrained(args.processor)
    tokens = TokenFolder(args.tokens, processor)
    sources = args.recipe.sources or tokens.sources()
    set_seed(args.seed)
    model = build_model(args, processor)
    config = model.config
    # saved with the checkpoints; truncation and pipelines cut there
    processor.tokenizer.model_max_length = config.max_position_embeddings
    print(f"{config.num_parameters():,} parameters, {config.num_parameters(active=True):,} active")
    if args.lora_rank is not None:
        model.print_trainable_parameters()  # pyright: ignore[reportCallIssue]
    if noise := noise_description(model):
        print(noise)
    training_arguments = make_training_arguments(args)
    earlier_steps = first_step(args, training_arguments)
    stream = training_stream(args, tokens, sources, args.steps * examples_a_step(training_arguments))
    if isinstance(stream, PackedExamples):
        # its order is random already, and a sequence needs what was left of the one before
        training_arguments.train_sampling_strategy = "sequential"
    # `source_ids` are counted, and then left out by the trainer itself
    training_arguments.remove_unused_columns = False
    held_out = held_out_sets(tokens, sources, args.eval_examples)
    if held_out is None:
        training_arguments.eval_strategy, training_arguments.eval_on_start = IntervalStrategy.NO, False
    weights = {source.name: source.weight for source in sources}
    feeding = FeedingCallback(weights, stream.epochs, examples_a_step(training_arguments))
    metrics = MomaMetricsCallback()
    callbacks = [metrics, feeding, FollowArguments(), *sample_callback(args, tokens, sources, metrics)]
    if args.stop_at:
        callbacks.append(StopAt(args.stop_at))
    trainer = StageTrainer(
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
    trainer.first_step, trainer.earlier_stage, trainer.feeding = earlier_steps, args.model, feeding
    trainer.processor = processor
    return trainer


def pretrain(args: argparse.Namespace):
    """
    Trains to the end, or to `--stop-at`, and writes model, processor and records into the output folder.

    Args:
        args: of `moma pretrain`.
    """
    trainer = build_trainer(args)
    processor = trainer.processor
    output = Path(args.output).absolute()
    run = {
        "examples_a_step": examples_a_step(trainer.args),
        "first_step": trainer.first_step,
        "arguments": {**vars(args), "recipe": args.recipe_file},
    }
    if trainer.is_world_process_zero():
        write_aside(output / RUN_FILE, lambda path: path.write_text(json.dumps(run, indent=2) + "\n"))
    checkpoint = last_checkpoint(args.output) if args.resume else None
    if checkpoint is None and trainer.first_step:
        # restores the position in the data
        checkpoint = args.model
    elif checkpoint is not None and args.stop_at and checkpoint.endswith(f"-{args.stop_at}"):
        # killed between its last checkpoint and its end: the loop would take one more step before it looks
        if trainer.is_world_process_zero():
            copy_checkpoint(checkpoint, output, processor)
        return
    trainer.train(resume_from_checkpoint=checkpoint)
    if args.lora_rank is not None:
        trainer.merge_adapters()
    trainer.save_model()
    if trainer.is_world_process_zero():
        # the model can be used from its folder alone
        processor.save_pretrained(output)
        # last: the sign of a finished run
        write_aside(output / TRAINER_STATE_NAME, lambda path: trainer.state.save_to_json(str(path)))
    # a process that ends before the others takes their connections with it
    trainer.accelerator.wait_for_everyone()
    # torch joins the threads of a group under the interpreter's lock, for which one that ends a barrier may still wait
    if trainer.accelerator.num_processes > 1:
        time.sleep(0.2)
    trainer.accelerator.end_training()
