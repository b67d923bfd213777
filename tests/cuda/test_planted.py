# SPDX-License-Identifier: Apache-2.0
"""Faults that are planted are found."""

import pytest
import torch

from helpers.cuda.cases import count
from helpers.cuda.compare import both, on_device
from helpers.cuda.limits import excess
from helpers.reference import GROUPS
from helpers.tiny import mixed_ids, tiny_model
from modeling_moma import documents_moma
from modeling_moma.routing_moma import MomaRouterBase


def test_a_wait_in_a_router_is_beyond_the_limits(device, monkeypatch):
    logits = MomaRouterBase.logits

    def waiting(router, hidden_states):
        found = logits(router, hidden_states)
        assert found.amax().item() < torch.inf
        return found

    monkeypatch.setattr(MomaRouterBase, "logits", waiting)
    part, counts = next(count("4t4i", device))
    lines = [line for line in excess("4t4i", part, counts) if " waits, " in line]
    assert len(lines) == 1
    # each of eight layers has a router for text and one for images
    assert "16 x" in lines[0] or not device.is_pretended


def test_a_mask_of_the_cpu_is_refused(device, monkeypatch):
    create = documents_moma.create_causal_mask
    monkeypatch.setattr(documents_moma, "create_causal_mask", lambda *args, **kwargs: create(*args, **kwargs).cpu())
    model, copied = both(tiny_model(**GROUPS["4t4i"]))
    ids = mixed_ids()
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": padding, "labels": ids}
    assert model(**inputs).loss.isfinite()
    with pytest.raises(RuntimeError, match="device"):
        copied(**on_device(inputs))
