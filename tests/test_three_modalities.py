# SPDX-License-Identifier: Apache-2.0
"""Three modalities, given in another order than that of their names: what each has learnt stays its own."""

import pytest
import torch

from helpers.depth_reference import SelectionLog
from helpers.tiny import IMAGE_IDS, tiny_model
from modeling_moma import MomaForCausalLM


STEPS = 60


@pytest.fixture(scope="module")
def model():
    """Trained for a while, so that its depth routers have learnt another cut for each modality."""
    model = tiny_model(
        modality_token_ranges={"speech": [[30, 40]], "image": [list(IMAGE_IDS)]},
        num_experts={"speech": 2, "image": 3, "text": 2},
        num_hidden_layers=3,
        depth_layers=[0, 1],
        depth_capacity={"text": 0.5, "speech": 0.9, "image": 0.1},
        vocab_size=48,
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        model(torch.randint(3, 48, (4, 24), generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 48, (4, 24), generator=torch.Generator().manual_seed(1))


def depth_shares(model, ids):
    """Share of each modality's tokens that each depth layer takes, and the logits."""
    log = SelectionLog(model)
    with torch.no_grad():
        logits = model(ids).logits
    names = {"speech": (ids >= 30) & (ids < 40), "image": (ids >= IMAGE_IDS[0]) & (ids < IMAGE_IDS[1])}
    shares = {
        name: [log.chosen[layer][-1][member].float().mean().item() for layer in log.chosen]
        for name, member in names.items()
    }
    return shares, logits


def test_capacities_and_cuts_are_those_of_their_modality(model, ids):
    shares, _ = depth_shares(model, ids)
    assert min(shares["speech"]) > 0.6 and max(shares["image"]) < 0.4


def test_saved_and_loaded_modalities_keep_their_cuts(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = MomaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.modalities == model.config.modalities == ["text", "image", "speech"]
    (shares, logits), (expected_shares, expected) = depth_shares(loaded, ids), depth_shares(model, ids)
    assert shares == expected_shares
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
