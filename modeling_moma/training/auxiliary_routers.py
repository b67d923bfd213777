# SPDX-License-Identifier: Apache-2.0
"""The training of auxiliary routers, from a command's arguments."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tokenization import MomaDataCollator

from ..calibration.auxiliary_training import (
    AuxiliaryRouterTrainer,
    add_auxiliary_routers,
    auxiliary_report,
    save_with_processor,
)
from ..calibration.observation import named_routers
from ..calibration.thresholds import calibrate_auxiliary_thresholds
from ..configuration_moma import MomaConfig
from ..data.documents import TokenFolder, check_layout, check_positions, held_out_sets, open_documents
from ..data.sources import VALIDATION
from ..data.stream import DocumentExamples
from ..errors_moma import InputError
from ..evaluation.measures import held_out_batches, load_model
from ..evaluation.report import router_table
from ..hub.loading import open_processor, require_plain_weights
from ..modeling_moma import MomaForCausalLM
from ..utils.atomic_files import check_new_folder
from ..utils.fields import Count, Int, NotNegative
from .checkpoints import (
    check_kind,
    checkpoint_step,
    examples_a_step,
    last_checkpoint,
    set_attention,
    without_incomplete_checkpoints,
)
from .fingerprints import Facts, RunFingerprint, check_output, run_facts
from .muon import MUON
from .output_lock import sole_run
from .stage_trainer import ArgumentsOverrideState, ResumedTrainer
from .trainer_settings import (
    Steps,
    TrainerFields,
    WarmupSteps,
    make_trainer,
    make_training_arguments,
    recorded,
    uses_muon,
)


REPORT_FILE = "auxiliary_routers.json"


@dataclass(frozen=True, kw_only=True)
class AuxiliaryFields(TrainerFields):
    """Fields of the section `trainer` for this training, which is short."""

    max_steps: Count = 500
    learning_rate: NotNegative = 1e-3
    warmup_steps: WarmupSteps = 20
    weight_decay: NotNegative = 0.0
    eval_steps: Steps = 250
    save_steps: Steps = 250
    save_total_limit: Int | None = 1
    logging_steps: Steps = 25


class AuxiliaryTraining(ResumedTrainer, AuxiliaryRouterTrainer):
    """The trainer of this command, which may have no step left to take."""

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Leave out of the figures what the routers are given in the block."""
        counts, self._counts = self._counts, None
        try:
            yield
        finally:
            self._counts = counts


def build_trainer(
    command: argparse.Namespace, args: TrainingArguments, model: MomaForCausalLM, tokens: TokenFolder, facts: Facts
) -> AuxiliaryTraining:
    """Return the trainer of the auxiliary routers, with its data."""
    documents = [tokens.documents(source) for source in tokens.sources()]
    weights = [source.weight for source in tokens.sources()]
    num_examples = args.max_steps * examples_a_step(args)
    tokenizer = tokens.encoder.processor.tokenizer
    return make_trainer(
        AuxiliaryTraining,
        command,
        model=model,
        args=args,
        train_dataset=DocumentExamples(documents, weights, num_examples, args.seed, cuts=True),
        eval_dataset=held_out_sets(tokens),
        data_collator=MomaDataCollator(tokenizer),
        callbacks=[RunFingerprint(facts), ArgumentsOverrideState()],
        processing_class=tokenizer,
    )


def check_output_is_own(output: str, resume: bool):
    """Raise `ValueError` where the output folder holds files that are not of the run to go on with."""
    has_report = (Path(output) / REPORT_FILE).is_file()

    def is_own(path: Path) -> bool:
        of_trainer = path.name == TRAINER_STATE_NAME or path.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
        return resume and (has_report or of_trainer)

    check_new_folder(output, is_own)


def split_batches(batches: list[dict], batch_size: int) -> tuple[list[dict], list[dict]]:
    """Return batches to calibrate on, and batches to report on."""
    if len(batches) < 2:
        raise InputError(
            f"`per_device_train_batch_size` = {batch_size} gives {len(batches)} batch of the validation split: two "
            "are needed, one to calibrate on and one to report on."
        )
    half = len(batches) // 2
    return batches[:half], batches[half:]


def train_auxiliary_routers(args: argparse.Namespace) -> None:
    """Train the auxiliary routers of a saved model, calibrate them, and save the model with a report."""
    check_output_is_own(args.output, args.resume)
    processor = open_processor(args.processor)
    if uses_muon(args):
        raise InputError(f"trainer.optim = {MUON!r}: auxiliary routers are trained by an optimizer of Trainer's own.")
    training_arguments = make_training_arguments(args, lr_scheduler_type="cosine")
    # the stream is shuffled already, and a longer run goes on in it
    training_arguments.train_sampling_strategy = "sequential"
    tokens = TokenFolder(args.tokens, processor)
    with sole_run(args.output, training_arguments.process_index == 0):
        _train_and_save(args, training_arguments, tokens)


def _train_and_save(args: argparse.Namespace, training_arguments: TrainingArguments, tokens: TokenFolder) -> None:
    processor = tokens.encoder.processor
    packing = (False, tokens.manifest["sequence_length"])
    config = MomaConfig.from_pretrained(args.model)
    require_plain_weights("--model", args.model, config)
    facts = run_facts(config, args.model, tokens, tokens.sources(), packing, training_arguments)
    # the folder has files of a run: check of which
    check_output(args.output, facts, args.resume)
    check_positions(config, tokens.manifest["sequence_length"])
    held_out = open_documents(args.tokens, processor, VALIDATION)
    batches = held_out_batches(
        held_out, processor, training_arguments.per_device_train_batch_size, training_arguments.seed
    )
    threshold, calibration_batches, report_batches = args.threshold, [], batches
    if threshold is None:
        calibration_batches, report_batches = split_batches(batches, training_arguments.per_device_train_batch_size)
    set_seed(training_arguments.seed)
    model = load_model(args.model, training_arguments.device)
    check_layout(model.config, processor.token_layout())
    if not model.config.auxiliary_routers:
        add_auxiliary_routers(model)
    set_attention(model, args.attn_implementation)
    trainer = build_trainer(args, training_arguments, model, tokens, facts)
    checkpoint = last_checkpoint(args.output) if args.resume else None
    if checkpoint is not None:
        check_kind(checkpoint, None)
    if checkpoint is not None and checkpoint_step(checkpoint) >= training_arguments.max_steps:
        steps = training_arguments.max_steps
        print(f"{args.output}: this run has taken all of its {steps} steps; its routers are judged anew.")
    with without_incomplete_checkpoints(trainer):
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()
    # thresholds are computed in fp32, without the casts that training in bf16 leaves around the forward
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)

    if threshold is None:
        calibrate_auxiliary_thresholds(model, calibration_batches)
    else:
        for router in named_routers(model).values():
            router.auxiliary.threshold.fill_(threshold)
    # each process reports on its part, unless there are too few for all
    rank, number = training_arguments.process_index, training_arguments.world_size
    own_batches = report_batches[rank::number] if len(report_batches) >= number else report_batches
    rows = auxiliary_report(model, own_batches)
    print(router_table(rows))
    model.config.inference_routing, model.config.depth_inference_routing = "auxiliary", None
    report = {
        "arguments": recorded(args),
        "steps": trainer.state.global_step,
        "calibration_batches": len(calibration_batches),
        "report_batches": len(report_batches),
        "routers": rows,
    }
    if trainer.is_world_process_zero():
        save_with_processor(model, args.model, processor, args.output, REPORT_FILE, report)
