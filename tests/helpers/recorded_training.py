# SPDX-License-Identifier: Apache-2.0
"""A pre-training in a process of its own that leaves what each of its steps was trained on, and may die in one."""

import os
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from modeling_moma.cli import pretrain
from modeling_moma.training import pretraining


class Record(TrainerCallback):
    """Writes the rows that this process is given in each step, and ends the process like a kill.

    Args:
        folder: of `STEP-START-RANK.pt`.
        start: number of this start of the training.
        dies_in: the step in which all processes end, 0 for none.
    """

    def __init__(self, folder: Path, start: int, dies_in: int):
        self.folder, self.start, self.dies_in = folder, start, dies_in
        self.step, self.rows = 0, []

    def see(self, model, args, kwargs):
        if model.training:
            self.rows.append({name: kwargs[name].clone() for name in ("input_ids", "position_ids") if name in kwargs})

    def on_step_begin(self, args, state, control, **kwargs):
        self.step, self.rows = state.global_step + 1, []

    def on_optimizer_step(self, args, state, control, **kwargs):
        torch.save(self.rows, self.folder / f"{self.step}-{self.start}-{args.process_index}.pt")
        if self.step == self.dies_in:
            os._exit(9)


def main(arguments: list[str]):
    """Call `moma pretrain` with `FOLDER START DIES_IN ARGUMENTS...`; the first three are those of [`Record`]."""
    folder, start, dies_in, *given = arguments
    build = pretraining.build_trainer

    def build_recorded(*parts):
        trainer, record = build(*parts), Record(Path(folder), int(start), int(dies_in))
        trainer.model.register_forward_pre_hook(record.see, with_kwargs=True)
        trainer.add_callback(record)
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "build_trainer", build_recorded)
        pretrain.main(given)
