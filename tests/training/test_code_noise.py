# SPDX-License-Identifier: Apache-2.0
"""Noise on the codes that a training reads: what it touches, and that a training is what it was in all else."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tiny import TRAINED, four_steps, logged_losses, tiny_processor, write_training
from modeling_moma.cli.pretrain import main, parse_arguments
from modeling_moma.errors_moma import InputError
from modeling_moma.training.code_noise import CodeNoise
from modeling_moma.training.pretraining import build_trainer
from modeling_moma.training.recipe import read_recipe
from modeling_moma.training.stage_trainer import OwnRandomNumbers


FIRST, END = 8, 24


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise")
    write_training(folder, codings=3)
    for packed in (True, False):
        for noise in (0.0, 0.9):
            data = {"sequence_length": 64, "packed": packed, "code_noise": noise}
            recipe = json.dumps({"model": TRAINED, "data": data})
            (folder / f"{packed}-{noise}.json").write_text(recipe)
    return folder


@given(st.integers(0, 2**16), st.floats(0, 0.99), st.integers(1, 4), st.integers(1, 40), st.booleans())
@settings(deadline=None, max_examples=60)
def test_other_tokens_and_labels_stay(seed, most, rows, length, has_documents):
    torch.manual_seed(seed)
    inputs = {"input_ids": torch.randint(0, 40, (rows, length)), "labels": torch.randint(0, 40, (rows, length))}
    if has_documents:
        inputs["position_ids"] = torch.randint(0, 3, (rows, length))
    before = {name: values.clone() for name, values in inputs.items()}
    noisy = CodeNoise(most, FIRST, END)(inputs)
    assert all(torch.equal(inputs[name], values) for name, values in before.items())
    assert noisy.keys() == inputs.keys() and torch.equal(noisy["labels"], before["labels"])
    is_code = (before["input_ids"] >= FIRST) & (before["input_ids"] < END)
    is_still = (noisy["input_ids"] >= FIRST) & (noisy["input_ids"] < END)
    assert torch.equal(is_code, is_still)
    assert torch.equal(noisy["input_ids"][~is_code], before["input_ids"][~is_code])


def test_processes_draw_noise_of_their_own_and_the_first_one_that_of_a_training_by_itself(inputs, tmp_path):
    trainer = build_trainer(parse_arguments(four_steps(inputs, tmp_path, "True-0.9")))
    (numbers,) = [callback for callback in trainer.callback_handler.callbacks if type(callback) is OwnRandomNumbers]
    drawn = []
    for index in range(3):
        torch.manual_seed(trainer.args.seed)
        numbers.on_train_begin(SimpleNamespace(seed=trainer.args.seed, process_index=index), None, None)
        drawn.append(torch.rand(8))
    torch.manual_seed(trainer.args.seed)
    assert torch.equal(drawn[0], torch.rand(8))
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


def test_each_document_has_a_share_of_its_own_up_to_the_largest():
    torch.manual_seed(0)
    ids, positions = torch.full((20, 4000), FIRST), torch.arange(1000).repeat(4).expand(20, -1)
    noisy = CodeNoise(0.6, FIRST, END)({"input_ids": ids, "labels": ids, "position_ids": positions})["input_ids"]
    # one of 16 random codes is the true one
    shares = (noisy != ids).float().view(80, 1000).mean(dim=1) * 16 / 15
    assert shares.max() < 0.66 and shares.min() < 0.05 and abs(shares.mean() - 0.3) < 0.06
    rows = CodeNoise(0.6, FIRST, END)({"input_ids": ids, "labels": ids})["input_ids"]
    parts = (rows != ids).float().view(20, 4, 1000).mean(dim=2)
    # without positions a row is one document
    assert parts.std(dim=1).max() < 0.05 < parts.mean(dim=1).std()
    assert sorted(set(noisy.flatten().tolist())) == list(range(FIRST, END))


@pytest.mark.parametrize("packed", [True, False])
def test_training_reads_noise_and_learns_the_truth(inputs, tmp_path, packed):
    batches = {}
    for noise in (0.0, 0.9):
        trainer = build_trainer(parse_arguments(four_steps(inputs, tmp_path / str(noise), f"{packed}-{noise}")))
        seen = batches[noise] = []

        def record(model, args, kwargs, seen=seen):
            if model.training:
                seen.append((kwargs["input_ids"].clone(), kwargs["labels"].clone()))

        trainer.model.register_forward_pre_hook(record, with_kwargs=True)
        trainer.train()
    first, end = tiny_processor().frames["image"].bounds
    changed = 0
    for (ids, labels), (noisy, noisy_labels) in zip(batches[0.0], batches[0.9], strict=True):
        assert torch.equal(labels, noisy_labels)
        is_other = ids != noisy
        changed += int(is_other.sum())
        assert ((ids[is_other] >= first) & (ids[is_other] < end)).all()
    assert len(batches[0.0]) == 4 and changed > 10


def test_a_resumed_training_draws_the_noise_of_one_that_never_stopped(inputs, tmp_path):
    main(four_steps(inputs, tmp_path / "whole", "True-0.9"))
    main(four_steps(inputs, tmp_path / "stopped", "True-0.9", "--stop-at", "2"))
    main(four_steps(inputs, tmp_path / "stopped", "True-0.9", "--resume"))
    assert len(logged_losses(tmp_path / "whole")) == 4
    assert logged_losses(tmp_path / "stopped") == pytest.approx(logged_losses(tmp_path / "whole"), abs=1e-5)


def test_another_noise_is_another_run(inputs, tmp_path, capsys):
    main(four_steps(inputs, tmp_path / "out", "True-0.9", "--stop-at", "2"))
    with pytest.raises(InputError, match="code_noise = 0.9 there and 0.0 now"):
        main(four_steps(inputs, tmp_path / "out", "True-0.0", "--resume"))


@pytest.mark.parametrize("value", [1.0, -0.1, "much", True])
def test_a_share_that_is_none_is_named(tmp_path, value):
    (tmp_path / "recipe.json").write_text(json.dumps({"data": {"code_noise": value}}))
    with pytest.raises(InputError, match="code_noise"):
        read_recipe(tmp_path / "recipe.json")
