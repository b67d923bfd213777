# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from helpers.depth_reference import SelectionLog
from helpers.processes import run_group
from helpers.reference import GROUPS, trainable
from helpers.tiny import tiny_model


DEPTH = {"num_hidden_layers": 3, "depth_layers": [0, 2], "routing_warmup_steps": 1}
MODELS = {
    **GROUPS,
    "depth": {**GROUPS["4t4i"], **DEPTH, "depth_capacity": 0.5},
    "depth_by_modality": {
        **GROUPS["1t1i"],
        **DEPTH,
        "depth_capacity": {"text": 0.5, "image": 0.25},
        # frozen ones, which no process waits for
        "auxiliary_routers": True,
    },
}
BATCHES = {"text": torch.arange(26, 38).view(2, 6), "images": torch.arange(8, 20).view(2, 6)}
STEPS = 2


def build(name, routing):
    model = tiny_model(**MODELS[name], training_routing=routing)
    if name == "depth":
        # the first layer prefers any word to any image code
        direction = torch.zeros(model.config.hidden_size)
        direction[0] = 3.0
        embeddings = model.get_input_embeddings().weight.data
        embeddings[BATCHES["text"].flatten()] += direction
        embeddings[BATCHES["images"].flatten()] -= direction
        model.model.layers[0].depth_router.weight.data += direction
    return model


def train(rank, folder, name, routing):
    """One of two processes: text only on rank 0, images only on rank 1."""
    model = build(name, routing)
    log = SelectionLog(model)
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    ids = list(BATCHES.values())[rank]
    losses = []
    # the second step hangs or raises when the first left a gradient out
    for _ in range(STEPS):
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
    result = {
        "losses": losses,
        "gradients": {key: parameter.grad for key, parameter in trainable(model)},
        "routers": {key: value for key, value in model.state_dict().items() if "router." in key},
        "chosen": {layer: [chosen.sum().item() for chosen in calls] for layer, calls in log.chosen.items()},
    }
    torch.save(result, folder / f"rank{rank}.pt")


def single_process(name, routing):
    """Losses, mean gradients and routers' states of two processes that each compute one batch alone."""
    losses, total, states = [], {}, []
    for ids in BATCHES.values():
        model = build(name, routing)
        losses.append([])
        for _ in range(STEPS):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            losses[-1].append(loss.item())
        for key, parameter in trainable(model):
            total[key] = total.get(key, 0) + parameter.grad / 2
        states.append(model.state_dict())
    return losses, total, states


def mean_threshold(key, states):
    """The mean over those processes that had a token to judge by."""
    thresholds = torch.stack([state[key] for state in states])
    updates = [state[key.replace("threshold", "num_updates")] for state in states]
    has_seen = torch.stack([(update > 0).expand_as(state[key]) for update, state in zip(updates, states)])
    return (thresholds * has_seen).sum(0) / has_seen.sum(0)


def run_two(tmp_path, name, routing):
    run_group(train, tmp_path, name, routing)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for key, value in first["routers"].items():
        assert torch.equal(value, second["routers"][key]), key
        if key.endswith("router.threshold"):
            # each group has seen the rank that has its tokens
            assert (value != 0.5).all(), key
    return first, second


@pytest.mark.parametrize(
    ("name", "routing"),
    [
        ("4t4i", "expert_choice"),
        ("shared_by_modality", "token_choice"),
        ("depth", "expert_choice"),
        ("depth_by_modality", "expert_choice"),
    ],
)
def test_one_rank_may_be_text_only_and_the_other_images_only(name, routing, tmp_path):
    first, second = run_two(tmp_path, name, routing)
    losses, gradients, states = single_process(name, routing)
    assert first["losses"] == pytest.approx(losses[0], abs=1e-5)
    assert second["losses"] == pytest.approx(losses[1], abs=1e-5)
    for key, expected in gradients.items():
        for result in (first, second):
            assert torch.allclose(result["gradients"][key], expected, atol=1e-5), key
    for key, value in first["routers"].items():
        if key.endswith("num_updates"):
            assert (value == STEPS).all(), key
        if ".auxiliary." in key:
            assert torch.equal(value, build(name, routing).state_dict()[key]), key
        if key.endswith("router.threshold"):
            assert torch.allclose(value, mean_threshold(key, states), atol=1e-6), key


def test_one_rank_may_choose_all_for_a_depth_layer_and_the_other_none(tmp_path):
    first, second = run_two(tmp_path, "depth", "threshold")
    # half of either while it warms up, then what reaches the ranks' common threshold
    assert first["chosen"][0] == [6, 12]
    assert second["chosen"][0] == [6, 0]
    _, _, states = single_process("depth", "threshold")
    key = "model.layers.0.depth_router.threshold"
    assert torch.allclose(first["routers"][key], mean_threshold(key, states), atol=1e-6)
    assert first["routers"][key].item() == pytest.approx(0.5, abs=0.1)
    for key, gradient in first["gradients"].items():
        assert torch.isfinite(gradient).all(), key
        assert torch.equal(gradient, second["gradients"][key]), key
