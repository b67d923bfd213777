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
"""Train a MoMa from nothing on captions and pictures, with the plain Trainer."""

import argparse
import json
from pathlib import Path

import torch
from datasets import load_from_disk
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from emoji.curves import RUN_FILE
from emoji.examples import EmojiExamples, held_out_examples
from modeling_moma import MomaConfig, MomaForCausalLM, MomaMetricsCallback, initialize_code_embeddings
from precision import supports_bf16
from tokenization import MomaDataCollator, MomaProcessor
from writing import write_aside


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processor", required=True, help="folder of a MomaProcessor")
    parser.add_argument("--codes", required=True, help="folder that scripts/tokenize_pictures.py wrote")
    parser.add_argument("--config", required=True, help="JSON of MomaConfig fields; the processor gives the token ids")
    parser.add_argument("--output", required=True, help="folder for checkpoints and the model")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=32, help="examples of a step on one device")
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--warmup-steps", type=int, default=150)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--eval-steps", type=int, default=400)
    parser.add_argument("--save-steps", type=int, default=400)
    parser.add_argument("--logging-steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attn-implementation", default="sdpa", help="eager is the faster one on CPUs at this size")
    parser.add_argument("--bf16", choices=["auto", "on", "off"], default="auto", help="auto: where the device has it")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    return parser.parse_args(arguments)


def build_trainer(args: argparse.Namespace) -> Trainer:
    processor = MomaProcessor.from_pretrained(args.processor)
    codes = load_from_disk(args.codes)
    set_seed(args.seed)
    config = MomaConfig(**json.loads(Path(args.config).read_text()), **processor.token_layout())
    model = MomaForCausalLM(config)
    initialize_code_embeddings(model, processor.vq_model.quantize.embedding.weight)
    model.set_attn_implementation(args.attn_implementation)
    print(f"{config.num_parameters():,} parameters, {config.num_parameters(active=True):,} active")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    examples_a_step = args.batch_size * args.gradient_accumulation_steps
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
        save_total_limit=2,
        logging_steps=args.logging_steps,
        report_to=[],
        seed=args.seed,
    )
    return Trainer(
        model=model,
        args=training_arguments,
        train_dataset=EmojiExamples(codes["train"], processor, args.steps * examples_a_step, args.seed),
        eval_dataset=held_out_examples(codes["validation"], processor),
        data_collator=MomaDataCollator(processor.tokenizer),
        callbacks=[MomaMetricsCallback()],
        processing_class=processor.tokenizer,
    )


def main(arguments=None):
    args = parse_arguments(arguments)
    trainer = build_trainer(args)
    examples_a_step = trainer.args.train_batch_size * args.gradient_accumulation_steps * trainer.args.world_size
    run = {"examples_a_step": examples_a_step, "arguments": vars(args)}
    write_aside(Path(args.output) / RUN_FILE, lambda path: path.write_text(json.dumps(run, indent=2) + "\n"))
    checkpoint = get_last_checkpoint(args.output) if args.resume and Path(args.output).is_dir() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()
    trainer.save_model()


if __name__ == "__main__":
    main()
