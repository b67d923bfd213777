# SPDX-License-Identifier: Apache-2.0
"""What a step of `moma pretrain` asks of a device, beside one of Llama under Transformers' Trainer."""

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

from helpers.cuda.device import Counts, PretendedCuda, RealCuda
from helpers.tiny import TRAINED, trainer_flags, write_training
from modeling_moma.cli.pretrain import parse_arguments
from modeling_moma.training.pretraining import build_trainer


# steps after which counting begins and ends; none of them logs
FIRST, LAST = 2, 6
# packed rows, in bf16 by autocast
DATA = {"packed": True, "sequence_length": 64}
ARGUMENTS = trainer_flags(max_steps=LAST, per_device_train_batch_size=4, eval_steps=100, save_steps=100)
ARGUMENTS += trainer_flags(logging_steps=100, warmup_steps=2, bf16=True)


class CountSteps(TrainerCallback):
    """Counts from the end of one step to the end of another."""

    def __init__(self, device: PretendedCuda | RealCuda, with_places: bool):
        self.device, self.with_places = device, with_places
        self.context, self.counts = contextlib.ExitStack(), Counts()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == FIRST:
            self.counts = self.context.enter_context(self.device.counting(self.with_places))
        elif state.global_step == LAST:
            self.context.close()


def count_pretraining(device: PretendedCuda | RealCuda, with_places: bool = False) -> Iterator[tuple[str, Counts]]:
    """The counts of a step, of this package's training and of Llama's with the same arguments and rows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_training(folder)
        recipe = {"model": TRAINED, "data": DATA, "trainer": {"disable_tqdm": True}}
        (folder / "recipe.json").write_text(json.dumps(recipe))
        paths = [f"--{part}={folder / part}" for part in ("processor", "tokens", "output")]
        with contextlib.redirect_stdout(io.StringIO()):
            ours = build_trainer(parse_arguments([*paths, *ARGUMENTS, str(folder / "recipe.json")]))
        yield "MoMa", count_steps(ours, device, with_places)
        sizes = {"vocab_size": ours.model.config.vocab_size, "num_key_value_heads": TRAINED["num_attention_heads"]}
        collate = ours.data_collator

        def without_sources(rows):
            return {key: value for key, value in collate(rows).items() if key != "source_ids"}

        llama = Trainer(
            model=LlamaForCausalLM(LlamaConfig(**TRAINED, **sizes)),
            args=ours.args,
            train_dataset=ours.train_dataset,
            eval_dataset=ours.eval_dataset,
            data_collator=without_sources,
        )
        yield "Llama", count_steps(llama, device, with_places)


def count_steps(trainer: Trainer, device: PretendedCuda | RealCuda, with_places: bool) -> Counts:
    """The counts of a step of a training, the mean of several."""
    steps = CountSteps(device, with_places)
    trainer.add_callback(steps)
    # it prints what it logs
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return steps.counts.over(LAST - FIRST)
