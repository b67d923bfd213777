# SPDX-License-Identifier: Apache-2.0
"""What a log says of a mixture: shares beside weights, passes, and a warning where they part."""

import logging

import pytest
import torch

from helpers.processes import run_group
from modeling_moma.training.stage_trainer import ThroughputCallback


def fed(shares, rows, weights=None, **fields):
    """A callback that was given so many rows of 100 positions, 10 of them padding."""
    weights = weights or {"photos": 5, "stories": 3, "lines": 2}
    epochs = lambda number: [number / 10, number / 20, number / 40]  # noqa: E731
    callback = ThroughputCallback(weights, epochs, examples_a_step=4, **fields)
    counts = [round(90 * share) for share in shares]
    row = torch.repeat_interleave(torch.tensor([0, 1, 2, -1]), torch.tensor([*counts, 100 - sum(counts)]))
    callback.on_batches([{"input_ids": row[None], "source_ids": row[None]} for _ in range(rows)], 0.01)
    callback.on_step_end(None, None, None)
    return callback


@pytest.fixture
def warnings(caplog, monkeypatch):
    # the library's loggers hand nothing on
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if "mixture" in record.getMessage()]


def test_shares_stand_beside_weights_and_padding_is_no_share(warnings):
    figures = fed([0.5, 0.3, 0.2], 400).figures(step=3)
    assert [figures[f"{name}_share"] for name in ("photos", "stories", "lines")] == [0.5, 0.3, 0.2]
    assert [figures[f"{name}_weight"] for name in ("photos", "stories", "lines")] == [0.5, 0.3, 0.2]
    assert figures["padding_share"] == pytest.approx(0.1)
    assert [figures[f"{name}_epoch"] for name in ("photos", "stories", "lines")] == [1.2, 0.6, 0.3]
    assert not warnings()


def test_a_mixture_that_is_off_is_warned_of_once_and_not_before_some_hundred_rows(warnings):
    fed([0.1, 0.5, 0.4], 200).figures(step=1)
    assert not warnings()
    callback = fed([0.1, 0.5, 0.4], 400)
    callback.figures(step=1)
    (message,) = warnings()
    assert "photos 0.100 in place of 0.500" in message and "stories 0.500 in place of 0.300" in message
    callback.on_batches([{"input_ids": torch.zeros(1, 8), "source_ids": torch.zeros(1, 8, dtype=torch.long)}], 0.01)
    callback.on_step_end(None, None, None)
    callback.figures(step=2)
    assert len(warnings()) == 1


@pytest.mark.parametrize("is_packed", [True, False])
def test_what_helps_is_said_of_packed_sequences_and_of_documents_that_are_rows(warnings, is_packed):
    fed([0.1, 0.5, 0.4], 400, is_packed=is_packed).figures(step=1)
    (message,) = warnings()
    assert ("a longer `sequence_length` helps" in message) == is_packed
    assert ("A row is one document" in message) != is_packed


def feed_on_two(rank):
    figures = fed([1.0, 0.0, 0.0] if rank else [0.0, 0.6, 0.4], 400).figures(step=1)
    shares = [figures[f"{name}_share"] for name in ("photos", "stories", "lines")]
    assert shares == pytest.approx([0.5, 0.3, 0.2]) and figures["padding_share"] == pytest.approx(0.1)


def test_shares_are_those_of_all_processes():
    run_group(feed_on_two)


def test_nothing_is_warned_of_where_a_share_is_off_by_less(warnings):
    fed([0.511, 0.3, 0.189], 400).figures(step=1)
    assert not warnings()


def test_epoch_is_that_of_the_only_source():
    several = fed([0.5, 0.3, 0.2], 1)
    assert several.epoch(5) is None
    alone = ThroughputCallback({"lines": 1.0}, lambda number: [number / 8], examples_a_step=4)
    assert alone.epoch(5) == 2.5


@pytest.mark.parametrize("weights", [{"lines": 1.0}, {"photos": 1.0, "lines": 1.0}])
def test_counting_a_batch_waits_for_no_device(weights):
    callback = ThroughputCallback(weights)
    # no number of such a tensor can be read
    ids, mask = (torch.zeros(2, 8, dtype=torch.long, device="meta") for _ in range(2))
    callback.on_batches([{"input_ids": ids, "source_ids": ids}, {"input_ids": ids, "attention_mask": mask}], 0.01)
    assert callback.tokens.device.type == "meta" and callback.positions == 32 and callback.rows == 4


def test_tokens_are_those_that_no_padding_fills():
    callback = ThroughputCallback({"photos": 1.0, "lines": 1.0})
    for _ in range(3):
        ids = torch.tensor([[0, 0, 1, -1], [1, 1, 1, -1]])
        callback.on_batches(
            [{"input_ids": ids, "source_ids": ids}, {"input_ids": ids, "attention_mask": ids >= 0}], 0.01
        )
    assert int(callback.tokens) == 36 and callback.by_source.tolist() == [6, 12]
    callback.on_step_end(None, None, None)
    assert callback.figures(step=3)["padding_share"] == 0.25
