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
import shutil
from pathlib import Path

import torch
from datasets import load_from_disk
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils import logging

from emoji.curves import RUN_FILE
from emoji.examples import EmojiExamples, held_out_examples
from modeling_moma import MomaConfig, MomaForCausalLM, MomaMetricsCallback, freeze_groups, initialize_code_embeddings
from modeling_moma.routing_moma import MomaRouter
from precision import supports_bf16
from tokenization import MomaDataCollator, MomaProcessor
from writing import write_aside, write_folder_aside


UPCYCLING_FILE = "upcycling.json"

logger = logging.get_logger(__name__)


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


class StopAt(TrainerCallback):
    """End a training at a step of its schedule."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            control.should_save = control.should_training_stop = True
        return control


class FollowArguments(TrainerCallback):
    """Log, evaluate and save as often as the arguments say; a restored state says how often its first run did."""

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)


class StageTrainer(Trainer):
    """A Trainer whose optimizer and schedule begin where an earlier stage ended."""

    first_step, earlier_stage = 0, None

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint != self.earlier_stage:
            super()._load_optimizer_and_scheduler(checkpoint)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        return super().create_scheduler(num_training_steps - self.first_step, optimizer)


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


def check_layout(config: MomaConfig, layout: dict):
    """Raise `ValueError` where a saved model reads token ids otherwise than the processor writes them."""
    for name, value in layout.items():
        # rows of the embedding beyond the tokenizer's tokens do no harm
        is_fine = getattr(config, name) >= value if name == "vocab_size" else getattr(config, name) == value
        if not is_fine:
            raise ValueError(
                f"`--model` has {name} = {getattr(config, name)}, the processor's is {value}: were they made together?"
            )


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


def data_order(folder: str | Path) -> dict[str, int] | None:
    """What decided on the order of the data in the training that a model comes from.

    Args:
        folder (`str` or `Path`): output of this script, a checkpoint in it, or what scripts/upcycle.py made of either.

    Returns:
        `dict[str, int]`: `seed`, and `examples_a_step` over all devices; `None` where no file tells.
    """
    folder = Path(folder).resolve()
    run_folder = folder.parent if folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") else folder
    if (run_folder / RUN_FILE).is_file():
        run = json.loads((run_folder / RUN_FILE).read_text())
        order = {"seed": run.get("arguments", {}).get("seed"), "examples_a_step": run["examples_a_step"]}
        return None if order["seed"] is None else order
    if (folder / UPCYCLING_FILE).is_file():
        return json.loads((folder / UPCYCLING_FILE).read_text()).get("data_order")
    return None


def examples_a_step(args: TrainingArguments) -> int:
    """Examples that one optimizer step takes on all devices together."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def first_step(args: argparse.Namespace, training_arguments: TrainingArguments) -> int:
    """Training steps that the earlier stage of `--model` took, 0 when nothing tells.

    Raises:
        ValueError: that stage was finished, took its data in another order, or this one would end before it.
    """
    state_file = Path(args.model or "") / TRAINER_STATE_NAME
    if not args.model or args.restart_data or not state_file.is_file():
        return 0
    state = TrainerState.load_from_json(str(state_file))
    anew = "--restart-data begins anew in the data."
    if state.global_step == state.max_steps:
        raise ValueError(
            f"`--model` {args.model!r} comes from a training that is finished: it has taken all of its "
            f"{state.max_steps} steps, and no data are left for further ones. {anew}"
        )
    # the data are a permutation that the seed draws of all examples of all steps; examples a step give the place in it
    checks = [("`--steps`", state.max_steps, args.steps)]
    order = data_order(args.model)
    if order is None:
        logger.warning(
            f"`--model` {args.model!r} does not come with the {RUN_FILE} of its training, so the order of the data "
            f"cannot be checked: with another --seed or --gradient-accumulation-steps, or another number of devices, "
            f"some would come again. {anew}"
        )
        checks.append(("`--batch-size` times devices", state.train_batch_size, training_arguments.train_batch_size))
    else:
        product = "`--batch-size` times `--gradient-accumulation-steps` times devices"
        checks.append(("`--seed`", order["seed"], args.seed))
        checks.append((product, order["examples_a_step"], examples_a_step(training_arguments)))
    for name, then, now in checks:
        if then != now:
            raise ValueError(
                f"{name} = {now} is not the {then} of the stage that `--model` comes from, so it would meet some of "
                f"its data again. {anew}"
            )
    if state.global_step >= (args.stop_at or args.steps):
        raise ValueError(
            f"`--model` has taken {state.global_step} steps already, which `--steps` {args.steps} and `--stop-at` "
            f"{args.stop_at} count, too: nothing is left to train. {anew}"
        )
    return state.global_step


def evenly_spaced(examples: list, number: int | None) -> list:
    """So many of the examples; all where there are not more, or without a number."""
    number = min(number or len(examples), len(examples))
    return [examples[index * len(examples) // number] for index in range(number)]


def build_trainer(args: argparse.Namespace) -> Trainer:
    processor = MomaProcessor.from_pretrained(args.processor)
    codes = load_from_disk(args.codes)
    set_seed(args.seed)
    model = build_model(args, processor)
    config = model.config
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


def copy_checkpoint(checkpoint: str | Path, output: Path):
    """Make a run's last checkpoint its result."""
    left_out = shutil.ignore_patterns("optimizer.pt", "scheduler.pt", "rng_state*", TRAINER_STATE_NAME)
    write_folder_aside(output, lambda folder: shutil.copytree(checkpoint, folder, ignore=left_out))
    # last: the sign of a finished run
    write_aside(output / TRAINER_STATE_NAME, lambda path: shutil.copy(Path(checkpoint) / TRAINER_STATE_NAME, path))


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
    checkpoint = get_last_checkpoint(args.output) if args.resume and Path(args.output).is_dir() else None
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


if __name__ == "__main__":
    main()
