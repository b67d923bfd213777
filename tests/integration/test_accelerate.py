# SPDX-License-Identifier: Apache-2.0
"""A training loop by hand, with Accelerate."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader

from helpers.mixed import changed, copied_state, mixed_examples
from helpers.tiny import tiny_model
from tokenization import MomaDataCollator


DEPTH = {"num_hidden_layers": 3, "depth_layers": [1], "depth_capacity": 0.5, "gumbel_noise": 0.5}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps one precision for the whole process, other tests included."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Loop:
    """Two optimizer steps an epoch, of two batches each."""

    def __init__(self, model, processor, **options):
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **options)
        collate = MomaDataCollator(processor.tokenizer)
        loader = DataLoader(mixed_examples(processor), batch_size=3, collate_fn=collate)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=8)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, optimizer, loader, self.scheduler
        )

    def run(self, epochs):
        """The losses of all batches."""
        self.model.train()
        found = []
        for _ in range(epochs):
            for batch in self.loader:
                with self.accelerator.accumulate(self.model):
                    loss = self.model(**batch).loss
                    self.accelerator.backward(loss)
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                found.append(loss.item())
        return found


def test_saved_and_loaded_state_goes_on_bit_equal(processor, tmp_path):
    model = tiny_model(processor, **DEPTH)
    whole = Loop(copy.deepcopy(model), processor)
    torch.manual_seed(0)
    expected = whole.run(3)

    first = Loop(model, processor)
    torch.manual_seed(0)
    assert first.run(1) == expected[:4]
    first.accelerator.save_state(str(tmp_path / "state"))
    first.run(1)

    second = Loop(tiny_model(processor, **DEPTH, initializer_range=0.5), processor)
    second.accelerator.load_state(str(tmp_path / "state"))
    assert second.run(2) == expected[4:]
    assert not changed(copied_state(whole.model), second.model.state_dict())
    counters = [tensor for name, tensor in second.model.state_dict().items() if name.endswith("num_updates")]
    assert counters and all((counter == 12).all() for counter in counters)
