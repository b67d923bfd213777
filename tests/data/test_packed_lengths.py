# SPDX-License-Identifier: Apache-2.0
"""Where documents lie in a batch of packed rows, as flash attention wants to know it."""

import pytest
import torch
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from modeling_moma.data.packing import PackedCollator


NAMES = ["cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"]


def rows_of(layout):
    positions = [torch.cat([torch.arange(length) for length in lengths]) for lengths in layout]
    return [{"input_ids": torch.ones_like(row), "position_ids": row} for row in positions]


def random_layout(generator, num_rows, length):
    layout = []
    for _ in range(num_rows):
        starts = sorted(torch.randperm(length - 1, generator=generator)[:5].add(1).tolist())
        layout.append([end - start for start, end in zip([0, *starts], [*starts, length])])
    return layout


@pytest.mark.parametrize("num_rows", [1, 2, 7])
def test_the_collator_hands_over_where_documents_begin(num_rows):
    generator = torch.Generator().manual_seed(num_rows)
    for layout in ([[9]] * num_rows, [[1] * 9] * num_rows, random_layout(generator, num_rows, 40)):
        batch = PackedCollator(None)(rows_of(layout))
        starts = [0]
        for length in (length for lengths in layout for length in lengths):
            starts.append(starts[-1] + length)
        longest = max(max(lengths) for lengths in layout)
        assert list(batch) == ["input_ids", "position_ids", *NAMES]
        assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == starts
        assert batch["cu_seq_lens_q"].dtype == batch["cu_seq_lens_k"].dtype == torch.int32
        # tensors would be waited for in every layer
        assert type(batch["max_length_q"]) is type(batch["max_length_k"]) is int
        assert batch["max_length_q"] == batch["max_length_k"] == longest
        (expected, _), (expected_longest, _) = prepare_fa_kwargs_from_position_ids(batch["position_ids"])
        assert torch.equal(batch["cu_seq_lens_q"], expected) and expected_longest == longest


def test_examples_that_are_not_packed_have_no_lengths():
    assert PackedCollator(lambda rows: {"input_ids": len(rows)})([{"input_ids": [1]}] * 3) == {"input_ids": 3}
