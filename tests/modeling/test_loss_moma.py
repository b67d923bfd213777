# SPDX-License-Identifier: Apache-2.0
"""The loss from chunks of logits against the loss from all of them."""

import pytest
import torch

from helpers.reference import trainable
from helpers.tiny import mixed_ids, tiny_config, tiny_model
from modeling_moma import devices_moma, loss_moma
from modeling_moma.errors_moma import InputError
from modeling_moma.loss_moma import causal_lm_loss


@pytest.mark.parametrize(
    ("fields", "tied", "num_device_rows"),
    [
        ({}, True, None),
        ({"z_loss_coef": 0.01, "modality_loss_weights": {"text": 3.0}}, False, None),
        ({"z_loss_coef": 0.01, "modality_loss_weights": {"text": 3.0}}, True, 7),
        ({}, False, 2),
        ({}, False, 100),
    ],
)
def test_loss_without_logits_is_the_loss_with_them(monkeypatch, fields, tied, num_device_rows):
    """On a CPU and on a device, whose chunks have as many rows as their bytes allow."""
    monkeypatch.setattr(loss_moma, "CHUNK", 5)
    model = tiny_model(tie_word_embeddings=tied, **fields).train()
    if num_device_rows is not None:
        monkeypatch.setattr(devices_moma, "_CPU", ())
        monkeypatch.setattr(loss_moma, "_CHUNK_BYTES", num_device_rows * 4 * model.config.vocab_size)
    ids, mask = mixed_ids(), torch.ones_like(mixed_ids())
    mask[0, :2] = 0
    results = []
    for skip_logits in (False, True):
        model.zero_grad()
        out = model(ids, attention_mask=mask, labels=ids, use_cache=False, skip_logits=skip_logits)
        (2 * out.loss).backward()
        results.append((out, {name: parameter.grad.clone() for name, parameter in trainable(model)}))
    (whole, expected), (chunked, gradients) = results
    assert chunked.logits is None and whole.logits is not None
    torch.testing.assert_close(chunked.loss, whole.loss)
    for name, loss in whole.modality_losses.items():
        torch.testing.assert_close(chunked.modality_losses[name], loss)
        assert chunked.modality_tokens[name] == whole.modality_tokens[name]
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    with torch.no_grad():
        outputs = [model.eval()(ids, labels=ids, skip_logits=skip_logits) for skip_logits in (False, True)]
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss)


def test_gradients_in_bf16_are_as_near_as_those_of_all_logits_at_once():
    torch.manual_seed(0)
    number, config = 16 * loss_moma.CHUNK, tiny_config()
    states, labels = torch.randn(1, number, 16), torch.randint(0, config.vocab_size, (1, number))
    weight = torch.randn(config.vocab_size, 16)
    found = []
    for dtype, in_chunks in ((torch.float64, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        head = torch.nn.Linear(16, config.vocab_size, bias=False, dtype=dtype)
        head.weight.data.copy_(weight.bfloat16())
        x = states.bfloat16().to(dtype).requires_grad_()
        given, more = (x, {"head": head}) if in_chunks else (head(x), {})
        # a divisor that bf16 cannot hold
        causal_lm_loss(
            config, given, None, training=True, num_items_in_batch=4099, shift_labels=labels, **more
        ).loss.backward()
        found.append((head.weight.grad.double(), x.grad.double()))
    for exact, whole, chunked in zip(*found, strict=True):
        assert (chunked - exact).norm() < 1.2 * (whole - exact).norm() < 6e-3 * exact.norm()


@pytest.mark.parametrize(
    ("name", "num_labels", "training", "skip_logits"),
    [("labels", 8, False, True), ("labels", 64, True, False), ("shift_labels", 8, True, True)],
)
def test_labels_that_do_not_fit_the_logits_are_refused(name, num_labels, training, skip_logits):
    model, ids = tiny_model().train(training), mixed_ids(1, 64)
    labels = {name: mixed_ids(1, num_labels)}
    given = {"logits_to_keep": 32, "skip_logits": skip_logits, "use_cache": False}
    with pytest.raises(InputError, match=rf"`{name}` has the shape \(1, {num_labels}\), .* \(1, 32\)"):
        model(ids, **given, **labels)
    assert model(ids, **given, **{name: ids[:, 32:]}).loss.isfinite()


@pytest.mark.parametrize(
    "places",
    [
        [-12, -7],
        [index < 3 for index in range(12)],
        # of each row its own
        [[0, 9], [4, 2], [11, 5]],
        [[index % (row + 2) == 1 for index in range(12)] for row in range(3)],
    ],
)
def test_of_kept_positions_the_padding_is_known(places):
    """Rows padded on the right, of which the last columns are padding while the kept positions are not."""
    model, ids = tiny_model().eval(), mixed_ids(3, 12)
    mask, kept = torch.ones_like(ids), torch.tensor(places)
    mask[0, 8:], mask[1, 5:] = 0, 0
    targets = torch.nn.functional.pad(ids, (0, 1))[:, 1:].masked_fill(mask.diff(append=mask[:, -1:]) != 0, -100)
    targets.masked_fill_(mask == 0, -100)
    logits = model(ids, attention_mask=mask).logits
    places_of_rows = kept if kept.ndim == 2 else kept.expand(len(ids), -1)

    def at_places(x):
        return torch.cat([row[places] for row, places in zip(x, places_of_rows)])

    expected = torch.nn.functional.cross_entropy(at_places(logits), at_places(targets))
    shifted = at_places(torch.nn.functional.pad(ids, (0, 1))[:, 1:])
    # of different numbers of places there are no rows
    shifted = shifted if kept.ndim == 2 and kept.dtype == torch.bool else shifted.view(len(ids), -1)
    out = model(ids, attention_mask=mask, shift_labels=shifted, logits_to_keep=kept)
    torch.testing.assert_close(out.loss, expected)


def test_labels_of_positions_chosen_at_will_have_to_be_shifted():
    model, ids = tiny_model().eval(), mixed_ids(3, 12)
    kept = torch.tensor([2, 3, 4, 9])
    for labels in (ids, ids[:, kept]):
        with pytest.raises(InputError, match="`labels` come with a tensor `logits_to_keep`.*give `shift_labels`"):
            model(ids, labels=labels, logits_to_keep=kept)


def test_loss_without_logits_holds_those_of_a_chunk():
    from benchmarks.speed.measures import PeakMemory

    torch.manual_seed(0)
    model = tiny_model(vocab_size=4096, max_position_embeddings=512).train()
    ids = torch.randint(0, 60, (8, 512))
    peaks = []
    for skip_logits in (False, True):
        with PeakMemory() as memory:
            model(ids, labels=ids, use_cache=False, skip_logits=skip_logits).loss.backward()
        peaks.append(memory.peak)
        model.zero_grad()
    logits = 4 * ids.numel() * 4096
    assert peaks[0] > 2 * logits and peaks[1] < logits / 2
