# SPDX-License-Identifier: Apache-2.0
"""Three modalities, given in another order than that of their names: what each has learnt stays its own."""

from pathlib import Path

import pytest
import torch

from helpers.depth_reference import SelectionLog
from helpers.hub_server import HubServer, run_client
from helpers.tiny import IMAGE_IDS, tiny_model
from modeling_moma import MomaForCausalLM


ROOT = Path(__file__).resolve().parent.parent
STEPS = 60
PUSH_AND_LOAD = """
import sys
import torch
from transformers import AutoModelForCausalLM
import modeling_moma

folder, inputs, output = sys.argv[1:]
AutoModelForCausalLM.from_pretrained(folder).push_to_hub("someone/three")
model = AutoModelForCausalLM.from_pretrained("someone/three")
with torch.no_grad():
    torch.save(model(torch.load(inputs)).logits, output)
"""


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


def test_types_of_embeddings_mean_the_same_after_loading(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = MomaForCausalLM.from_pretrained(tmp_path)
    types = torch.zeros_like(ids)
    types[(ids >= IMAGE_IDS[0]) & (ids < IMAGE_IDS[1])] = 1
    types[(ids >= 30) & (ids < 40)] = 2
    for each in (model, loaded):
        with torch.no_grad():
            embeds = each.get_input_embeddings()(ids)
            logits = each(inputs_embeds=embeds, mm_token_type_ids=types).logits
            torch.testing.assert_close(logits, each(ids).logits, rtol=0, atol=1e-5)


def test_pushed_and_loaded_from_the_hub_it_gives_the_same_logits(model, ids, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    torch.save(ids, tmp_path / "ids.pt")
    arguments = (tmp_path / "saved", tmp_path / "ids.pt", tmp_path / "logits.pt")
    with HubServer(tmp_path / "hub").running() as server:
        result = run_client(server, tmp_path / "home", "-c", PUSH_AND_LOAD, *arguments, folder=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    _, expected = depth_shares(model, ids)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=1e-5)
