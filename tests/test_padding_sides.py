# SPDX-License-Identifier: Apache-2.0
"""Losses do not depend on where padding stands: by the collator, by the processor's labels, and by the mask alone."""

import pytest
import torch

from helpers.tiny import noise_images, tiny_model
from tokenization import MomaDataCollator


TEXTS = ["<image>a fish<eos>", "red apple<eos>", "noto: a castle<image><eos>"]
# a routing under which rows do not meet, nor steps
FIELDS = {
    "training_routing": "token_choice",
    "router_bias_update_rate": 0.0,
    "modality_loss_weights": {"text": 5.0},
    "z_loss_coef": 1e-2,
}


def collated(processor, rows, side):
    processor.tokenizer.padding_side = side
    return MomaDataCollator(processor.tokenizer, pad_to_multiple_of=8)([{"input_ids": row} for row in rows])


def labelled(processor, side, return_tensors="pt"):
    noise = iter(noise_images(2))
    images = [[next(noise)] if "<image>" in text else [] for text in TEXTS]
    return processor(
        images=images, text=TEXTS, padding=True, padding_side=side, return_labels=True, return_tensors=return_tensors
    )


def masked_only(processor, side):
    inputs = labelled(processor, side)
    return {**inputs, "labels": inputs["input_ids"].clone()}


def from_collator(processor, side):
    rows = labelled(processor, side, None)
    ids = [[i for i, kept in zip(*pair) if kept] for pair in zip(rows["input_ids"], rows["attention_mask"])]
    return collated(processor, ids, side)


def run(model, inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return output, gradients


def alone(model, inputs):
    """Sums over rows without padding, each by itself: losses, counts of targets and gradients."""
    model.zero_grad()
    total = int((inputs["labels"][:, 1:] != -100).sum())
    loss, sums, counts = 0.0, {}, {}
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"]):
        row = ids[mask.bool()][None]
        output = model(input_ids=row, labels=row, num_items_in_batch=total)
        output.loss.backward()
        loss += output.loss.item()
        for modality, mean in output.modality_losses.items():
            count = int(output.modality_tokens[modality])
            counts[modality] = counts.get(modality, 0) + count
            sums[modality] = sums.get(modality, 0.0) + mean.item() * count
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return loss, {modality: sums[modality] / counts[modality] for modality in sums}, counts, gradients


@pytest.mark.parametrize(
    ("side", "labels_of", "training"),
    [
        ("left", from_collator, True),
        ("right", labelled, True),
        ("left", masked_only, True),
        ("right", masked_only, False),
    ],
)
def test_padded_rows_lose_as_much_as_rows_alone(processor, side, labels_of, training):
    model = tiny_model(processor, **FIELDS).train(training)
    inputs = labels_of(processor, side)
    assert inputs["attention_mask"][:, 0 if side == "left" else -1].min() == 0
    output, gradients = run(model, inputs)
    loss, modality_losses, counts, expected = alone(model, from_collator(processor, side))
    assert output.loss.item() == pytest.approx(loss, abs=1e-5)
    assert {name: int(count) for name, count in output.modality_tokens.items()} == counts
    for modality, mean in modality_losses.items():
        assert output.modality_losses[modality].item() == pytest.approx(mean, abs=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-5, msg=name)


def total_loss(output):
    return sum(int(count) * output.modality_losses[name].item() for name, count in output.modality_tokens.items())


def test_a_cached_prefix_counts_in_the_mask(processor):
    model = tiny_model(processor)
    inputs = masked_only(processor, "left")
    width = inputs["input_ids"].shape[1]
    whole = model(**inputs)
    # within the shortest row
    seen = width - 2
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    cache = model(input_ids=ids[:, :seen], attention_mask=mask[:, :seen], use_cache=True).cache
    rest = model(input_ids=ids[:, seen:], attention_mask=mask, cache=cache, labels=ids[:, seen:])
    # the first of the rest is predicted by the prefix
    first = model(input_ids=ids[:, : seen + 1], attention_mask=mask[:, : seen + 1], labels=ids[:, : seen + 1])
    assert total_loss(rest) + total_loss(first) == pytest.approx(total_loss(whole), rel=1e-5)
