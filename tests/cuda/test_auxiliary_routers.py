# SPDX-License-Identifier: Apache-2.0
"""The training of auxiliary routers leaves on the device what it leaves on the CPU."""

import copy

import torch
from transformers import TrainingArguments

from helpers.cuda.compare import assert_near
from helpers.reference import GROUPS
from helpers.tiny import mixed_ids, tiny_model
from modeling_moma.calibration.auxiliary_training import AuxiliaryRouterTrainer


ROWS = [{"input_ids": ids, "labels": ids} for ids in mixed_ids(rows=16, length=16)]


def collate(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def train(model, folder, **fields):
    arguments = TrainingArguments(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **fields,
    )
    trainer = AuxiliaryRouterTrainer(model=model, args=arguments, train_dataset=ROWS, data_collator=collate)
    trainer.train()
    return trainer.model


def test_auxiliary_routers_learn_what_they_learn_on_the_cpu(device, tmp_path):
    model = tiny_model(**GROUPS["4t4i"], auxiliary_routers=True)
    before = copy.deepcopy(model.state_dict())
    found = train(copy.deepcopy(model), tmp_path / "device")
    expected = train(model, tmp_path / "cpu", use_cpu=True).state_dict()
    for name, value in found.state_dict().items():
        assert_near(value, expected[name], rtol=1e-3, atol=1e-4, name=name)
    learned = {name for name, value in expected.items() if not torch.equal(value, before[name])}
    assert learned and all(".auxiliary." in name for name in learned)
