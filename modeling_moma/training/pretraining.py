# SPDX-License-Identifier: Apache-2.0
"""The model and the Trainer of a pre-training, from a command's arguments."""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from tokenization import MomaDataCollator, MomaProcessor

from .. import MomaConfig, MomaForCausalLM, MomaMetricsCallback, freeze_groups, initialize_code_embeddings
from ..routing_moma import MomaRouter
from .checkpoints import last_checkpoint
from .examples import CaptionExamples, check_layout, evenly_spaced, held_out_examples, load_codes
from .files import write_aside
from .precision import supports_bf16
from .recipe import read_recipe
from .runs import RUN_FILE
from .stages import FollowArguments, StageTrainer, StopAt, copy_checkpoint, examples_a_step, first_step


def build_model(args: argparse.Namespace, processor: MomaProcessor) -> MomaForCausalLM:
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
        fields = {**read_recipe(args.recipe).model, **noise}
        model = MomaForCausalLM(MomaConfig(**fields, **processor.token_layout()))
        initialize_code_embeddings(model, processor.vq_model.quantize.embedding.weight)
    freeze_groups(model, args.freeze_groups)
    model.set_attn_implementation(args.attn_implementation)
    return model


def noise_description(model: MomaForCausalLM) -> str | None:
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


def build_trainer(args: argparse.Namespace) -> StageTrainer:
    processor = MomaProcessor.from_pretrained(args.processor)
    codes = load_codes(args.codes)
    set_seed(args.seed)
    model = build_model(args, processor)
    config = model.config
    # saved with the checkpoints; truncation and pipelines cut there
    processor.tokenizer.model_max_length = config.max_position_embeddings
    print(f"{config.num_parameters():,} parameters, {config.num_parameters(active=True):,} active")
    if noise := noise_description(model):
        print(noise)
    training_arguments = make_training_arguments(args)
    earlier_steps = first_step(args, training_arguments)
    num_examples = args.steps * examples_a_step(training_arguments)
    held_out = held_out_examples(codes["validation"], processor)
    callbacks = [MomaMetricsCallback(), FollowArguments(), *([StopAt(args.stop_at)] if args.stop_at else [])]
    trainer = StageTrainer(
        model=model,
        args=training_arguments,
        train_dataset=CaptionExamples(codes["train"], processor, num_examples, args.seed),
        eval_dataset=evenly_spaced(held_out, args.eval_examples),  # pyright: ignore[reportArgumentType]
        data_collator=MomaDataCollator(processor.tokenizer),
        callbacks=callbacks,
        processing_class=processor.tokenizer,
    )
    trainer.first_step = earlier_steps
    trainer.earlier_stage = args.model
    return trainer


def pretrain(args: argparse.Namespace):
    """
    Trains to the end, or to `--stop-at`, and writes model, processor and records into the output folder.

    Args:
        args: of `moma pretrain`.
    """
    trainer = build_trainer(args)
    output = Path(args.output).absolute()
    run = {
        "examples_a_step": examples_a_step(trainer.args),
        "first_step": trainer.first_step,
        "arguments": vars(args),
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
            copy_checkpoint(checkpoint, output)
        return
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        # last: the sign of a finished run
        write_aside(output / TRAINER_STATE_NAME, lambda path: trainer.state.save_to_json(str(path)))
    # a process that ends before the others takes their connections with it
    trainer.accelerator.wait_for_everyone()
    # torch joins the threads of a group under the interpreter's lock, for which one that ends a barrier may still wait
    if trainer.accelerator.num_processes > 1:
        time.sleep(0.2)
    trainer.accelerator.end_training()
