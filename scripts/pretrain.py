# Copyright 2026 The modeling-moma authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Train a MoMa on captions and pictures, from nothing or from a saved model, with the plain Trainer."""

import argparse
import json
from pathlib import Path

import torch
from datasets import load_from_disk
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from emoji.checkpoints import last_checkpoint
from emoji.curves import RUN_FILE
from emoji.examples import EmojiExamples, check_layout, evenly_spaced, held_out_examples
from emoji.stages import FollowArguments, StageTrainer, StopAt, copy_checkpoint, examples_a_step, first_step
from modeling_moma import MomaConfig, MomaForCausalLM, MomaMetricsCallback, freeze_groups, initialize_code_embeddings
from modeling_moma.routing_moma import MomaRouter
from precision import supports_bf16
from tokenization import MomaDataCollator, MomaProcessor
from writing import write_aside


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processor", required=True, help="folder of a MomaProcessor")
    parser.add_argument("--codes", required=True, help="folder that scripts/tokenize_pictures.py wrote")
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--config", help="JSON of MomaConfig fields; the processor gives the token ids")
    start.add_argument("--model", help="start from this saved model; one that was upcycled goes on in the data")
    parser.add_argument(
        "--restart-data", action="store_true", help="begin at the first example, whatever `--model` has seen"
    )
    parser.add_argument("--output", required=True, help="folder for checkpoints and the model")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=32, help="examples of a step on one device")
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--warmup-steps", type=int, default=150)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--eval-steps", type=int, default=400)
    parser.add_argument(
        "--eval-examples", type=positive_int, help="evaluate on so many held-out examples; by default on all"
    )
    parser.add_argument("--save-steps", type=int, default=400)
    parser.add_argument("--save-total-limit", type=int, default=2, help="checkpoints to keep")
    parser.add_argument("--stop-at", type=int, help="stop and save at this step of the schedule, as seeds do")
    parser.add_argument("--logging-steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--freeze-groups", nargs="+", default=[], help="expert groups whose weights stay as they are")
    parser.add_argument(
        "--gumbel-noise",
        type=float,
        help="scale of the routers' noise in training, 0 turns it off; by default what the model's config has",
    )
    parser.add_argument("--attn-implementation", default="sdpa", help="eager is the faster one on CPUs at this size")
    parser.add_argument("--bf16", choices=["auto", "on", "off"], default="auto", help="auto: where the device has it")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    return parser.parse_args(arguments)


def positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


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
        fields = {**json.loads(Path(args.config).read_text()), **noise}
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


def build_trainer(args: argparse.Namespace) -> Trainer:
    processor = MomaProcessor.from_pretrained(args.processor)
    codes = load_from_disk(args.codes)
    set_seed(args.seed)
    model = build_model(args, processor)
    config = model.config
    # saved with the checkpoints; truncation and pipelines cut there
    processor.tokenizer.model_max_length = config.max_position_embeddings
    print(f"{config.num_parameters():,} parameters, {config.num_parameters(active=True):,} active")
    if noise := noise_description(model):
        print(noise)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    training_arguments = TrainingArguments(
        output_dir=args.output,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.02},
        warmup_steps=args.warmup_steps,
        weight_decay=args.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=supports_bf16(device) if args.bf16 == "auto" else args.bf16 == "on",
        use_cpu=device == "cpu",
        eval_strategy="steps",
        eval_steps=args.eval_steps,
        eval_on_start=True,
        prediction_loss_only=True,
        save_steps=args.save_steps,
        save_total_limit=args.save_total_limit,
        logging_steps=args.logging_steps,
        report_to=[],
        seed=args.seed,
    )
    earlier_steps = first_step(args, training_arguments)
    num_examples = args.steps * examples_a_step(training_arguments)
    held_out = held_out_examples(codes["validation"], processor)
    callbacks = [MomaMetricsCallback(), FollowArguments(), *([StopAt(args.stop_at)] if args.stop_at else [])]
    trainer = StageTrainer(
        model=model,
        args=training_arguments,
        train_dataset=EmojiExamples(codes["train"], processor, num_examples, args.seed),
        eval_dataset=evenly_spaced(held_out, args.eval_examples),
        data_collator=MomaDataCollator(processor.tokenizer),
        callbacks=callbacks,
        processing_class=processor.tokenizer,
    )
    trainer.first_step = earlier_steps
    trainer.earlier_stage = args.model
    return trainer


def main(arguments=None):
    args = parse_arguments(arguments)
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
        write_aside(output / TRAINER_STATE_NAME, trainer.state.save_to_json)
    # a process that ends before the others takes their connections with it
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
