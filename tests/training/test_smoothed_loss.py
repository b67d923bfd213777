# SPDX-License-Identifier: Apache-2.0
"""Smoothed labels under `moma pretrain` against a loop over tokens."""

import pytest
import torch
from transformers.trainer_pt_utils import LabelSmoother

from helpers.tiny import tiny_config
from modeling_moma.loss_moma import causal_lm_loss
from modeling_moma.training.stage_trainer import SmoothedLoss


EPSILON = 0.2


def rows(config, seed=0):
    """Logits and labels of two rows with tokens of both modalities, some of which are ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 12, config.vocab_size, generator=generator, dtype=torch.float32)
    labels = torch.randint(0, config.vocab_size, (2, 12), generator=generator)
    first_code = config.modality_token_ranges["image"][0][0]
    labels[:, 3:7] = torch.randint(first_code, first_code + 4, (2, 4), generator=generator)
    labels[0, 8:] = labels[1, :2] = -100
    return logits, labels


def loop(config, logits, labels, divisor):
    """The loss token by token."""
    total, count = 0.0, 0
    (first, stop), *_ = config.modality_token_ranges["image"]
    weights = config.modality_loss_weights or {}
    for row, targets in zip(logits, labels):
        for place in range(len(targets) - 1):
            target = int(targets[place + 1])
            if target == -100:
                continue
            log_probs = row[place].log_softmax(-1)
            smoothed = -(1 - EPSILON) * log_probs[target] - EPSILON * log_probs.mean()
            weight = weights.get("image" if first <= target < stop else "text", 1.0)
            total = total + weight * smoothed + config.z_loss_coef * row[place].logsumexp(-1) ** 2
            count += 1
    return total / (divisor or count)


@pytest.mark.parametrize("divisor", [None, 50, torch.tensor(50)])
@pytest.mark.parametrize("fields", [{}, {"modality_loss_weights": {"text": 5.0, "image": 0.5}, "z_loss_coef": 1e-2}])
def test_smoothed_labels_weigh_as_the_model_says_in_training(fields, divisor):
    config = tiny_config(**fields)
    logits, labels = rows(config)
    found, expected = (logits.clone().requires_grad_() for _ in range(2))
    smoothed = SmoothedLoss(config, EPSILON)({"logits": found}, labels, num_items_in_batch=divisor)
    wanted = loop(config, expected, labels, divisor)
    torch.testing.assert_close(smoothed, wanted)
    smoothed.backward()
    wanted.backward()
    torch.testing.assert_close(found.grad, expected.grad)


def test_smoothed_labels_are_those_of_transformers_where_nothing_is_weighed():
    config = tiny_config(modality_loss_weights={"text": 5.0}, z_loss_coef=1e-2)
    logits, labels = rows(config)
    expected = LabelSmoother(EPSILON)({"logits": logits}, labels, shift_labels=True)
    # in an evaluation; by Trainer a model may return a tuple
    torch.testing.assert_close(SmoothedLoss(config, EPSILON)((logits,), labels), expected)
    plain = causal_lm_loss(config, logits, labels, training=False).loss
    torch.testing.assert_close(SmoothedLoss(config, 0.0)((logits,), labels), plain)
