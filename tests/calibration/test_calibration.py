# SPDX-License-Identifier: Apache-2.0
from collections import defaultdict

import pytest
import torch

from helpers.calibration_reference import (
    ALL_MODELS,
    build,
    expected_cuts,
    padded_batches,
    plain_records,
    state_of,
    text_only,
)
from helpers.packed_rows import lengths_of
from helpers.reference import GROUPS
from helpers.tiny import mixed_ids, tiny_model
from modeling_moma.calibration.observation import named_routers
from modeling_moma.calibration.thresholds import calibrate_auxiliary_thresholds, calibrate_thresholds


def changed_keys(before, model):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}


@ALL_MODELS
def test_thresholds_are_the_means_of_the_cuts_and_nothing_else_changes(name):
    model = build(name)
    batches = [*padded_batches(), text_only()]
    expected = expected_cuts(model, batches, "threshold")
    model.train()
    model.model.norm.eval()
    flags = [module.training for module in model.modules()]
    before = state_of(model)
    calibrate_thresholds(model, batches)
    for key, router in named_routers(model).items():
        means, votes = zip(*(expected[key][cut] for cut in range(router.threshold.shape[0])))
        torch.testing.assert_close(router.threshold, torch.tensor(means), rtol=1e-5, atol=1e-6)
        assert set(router.num_updates.flatten().tolist()) == set(votes)
    endings = (".threshold", ".num_updates")
    assert all(key.endswith(endings) and "auxiliary" not in key for key in changed_keys(before, model))
    assert [module.training for module in model.modules()] == flags
    assert not any(module._forward_hooks for module in model.modules())


def test_batches_of_a_training_may_be_observed():
    """Packed rows bring numbers along, and what counts their sources."""
    models = [tiny_model(**GROUPS["4t4i"]) for _ in range(2)]
    ids, position_ids = mixed_ids(2, 12), torch.arange(6).repeat(2, 2)
    rows = {"input_ids": ids, "position_ids": position_ids, "attention_mask": torch.ones_like(ids)}
    training = {**rows, "labels": ids, "source_ids": torch.zeros_like(ids), **lengths_of(position_ids)}
    for model, batch in zip(models, (rows, training), strict=True):
        calibrate_thresholds(model, [batch])
    state = models[0].state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in models[1].state_dict().items())


@ALL_MODELS
def test_auxiliary_thresholds_are_the_means_of_the_cuts_of_probabilities(name):
    model = build(name)
    batches = [*padded_batches(), text_only()]
    expected = expected_cuts(model, batches, "auxiliary")
    before = state_of(model)
    calibrate_auxiliary_thresholds(model, batches)
    for key, router in named_routers(model).items():
        means = [expected[key][cut][0] for cut in range(router.threshold.shape[0])]
        torch.testing.assert_close(router.auxiliary.threshold, torch.tensor(means), rtol=1e-5, atol=1e-6)
    assert all(key.endswith("auxiliary.threshold") for key in changed_keys(before, model))


@ALL_MODELS
def test_on_a_single_batch_the_auxiliary_load_is_the_true_load(name):
    # every id once, so that none tie in the first layer
    ids = torch.arange(8, 40)[torch.randperm(32, generator=torch.Generator().manual_seed(0))].view(2, 16)
    for row in calibrate_auxiliary_thresholds(build(name), [{"input_ids": ids}]):
        assert row["rules"]["auxiliary"]["loads"] == row["true_loads"], row
        # each one taken in error stands for one missed
        assert row["rules"]["auxiliary"]["precision"] == pytest.approx(row["rules"]["auxiliary"]["recall"])


@ALL_MODELS
def test_report_counts_what_the_new_thresholds_take(name):
    model, batches = build(name), padded_batches()
    rows = calibrate_thresholds(model, batches)
    tokens, taken, members = (defaultdict(int) for _ in range(3))
    for batch in batches:
        for key, (pairs, _) in plain_records(model, batch).items():
            for cut, score, _, is_member, _, _ in pairs:
                tokens[key, cut] += 1
                taken[key, cut] += score >= model.get_submodule(key).threshold[cut].item()
                members[key, cut] += is_member
    assert {row["router"] for row in rows} == set(named_routers(model))
    for row in rows:
        key = row["router"]
        cuts = range(model.get_submodule(key).threshold.shape[0])
        assert row["tokens"] == [tokens[key, cut] for cut in cuts]
        assert row["true_loads"] == [members[key, cut] / tokens[key, cut] for cut in cuts]
        assert row["rules"]["threshold"]["loads"] == [taken[key, cut] / tokens[key, cut] for cut in cuts]


def test_noise_and_warm_up_that_ended_in_training_do_not_begin_anew():
    model = build("depth", gumbel_noise=1.0, gumbel_noise_steps=30, routing_warmup_steps=20)
    routers = named_routers(model).values()
    with torch.no_grad():
        for router in routers:
            router.num_updates.fill_(50)
    calibrate_thresholds(model, padded_batches())
    assert all((router.num_updates == 50).all() for router in routers)

    ids = mixed_ids(seed=3)
    quiet = build("depth")
    quiet.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits, expected = (part.train()(input_ids=ids).logits for part in (model, quiet))
        assert torch.equal(logits, expected)
        # fewer steps, and there is noise
        for router in routers:
            router.num_updates.zero_()
        assert not torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    "fields, told",
    [
        ({}, None),
        ({"inference_routing": "auxiliary", "depth_inference_routing": "threshold"}, None),
        ({"inference_routing": "threshold", "depth_inference_routing": "auxiliary"}, None),
        ({"inference_routing": "auxiliary"}, "depth_inference_routing='auxiliary'"),
    ],
)
def test_thresholds_that_no_inference_routing_reads_are_told(fields, told, caplog):
    calibrate_thresholds(build("depth", **fields), padded_batches()[:1])
    assert ("are read under the routing 'threshold' alone" in caplog.text) == bool(told)
    assert (told or "") in caplog.text
    assert ("config.inference_routing='auxiliary'" in caplog.text) == bool(told)
    assert ("the model reads those of `calibrate_auxiliary_thresholds`" in caplog.text) == bool(told)
    assert "set config.inference_routing" not in caplog.text


def test_gumbel_noise_of_the_training_has_no_part():
    quiet, noisy = build("4t4i"), build("4t4i", gumbel_noise=1.0).train()
    for model in (quiet, noisy):
        calibrate_thresholds(model, padded_batches())
    for key, value in quiet.state_dict().items():
        assert torch.equal(value, noisy.state_dict()[key]), key


@pytest.mark.parametrize("calibrate", [calibrate_thresholds, calibrate_auxiliary_thresholds])
def test_what_never_had_a_token_keeps_its_threshold_and_is_named(calibrate, caplog):
    for name, silent in (("4t4i", "groups.image.router"), ("depth_by_modality", "depth_router ['image']")):
        model = build(name)
        router = next(router for key, router in named_routers(model).items() if key.endswith(silent.split(" ")[0]))
        with torch.no_grad():
            router.threshold.fill_(0.25)
            router.auxiliary.threshold.fill_(0.25)
        rows = calibrate(model, [text_only()])
        assert silent in caplog.text
        for threshold in (router.threshold, router.auxiliary.threshold):
            assert threshold[-1] == 0.25
        assert router.num_updates.flatten()[-1] == 0
        image_rows = [row for row in rows if row["group"] == "image"]
        assert all(row["true_load"] is None and row["tokens"] == [0] * 4 for row in image_rows)


@pytest.mark.parametrize("calibrate", [calibrate_thresholds, calibrate_auxiliary_thresholds])
@pytest.mark.parametrize(("name", "num_places"), [("4t4i", 1), ("depth", 12)])
def test_a_batch_whose_scores_are_no_numbers_has_no_vote(name, num_places, calibrate):
    model, batches = build(name), padded_batches()
    embeds = model.get_input_embeddings()(mixed_ids()).detach()
    embeds[:, :num_places] = torch.inf
    calibrate(model, batches)
    expected = state_of(model)
    calibrate(model, [*batches, {"inputs_embeds": embeds}])
    assert not changed_keys(expected, model)


@pytest.mark.parametrize("calibrate", [calibrate_thresholds, calibrate_auxiliary_thresholds])
def test_a_batch_that_raises_leaves_the_model_as_it_was(calibrate):
    model = build("depth").train()
    before = state_of(model)
    with pytest.raises(IndexError, match="outside the vocabulary"):
        calibrate(model, [*padded_batches(), {"input_ids": torch.full((1, 4), 40)}])
    assert not changed_keys(before, model)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_hidden_states_may_arise_under_another_routing():
    model, causal = build("depth"), build("depth")
    calibrate_thresholds(model, padded_batches())
    calibrate_thresholds(causal, padded_batches(), routing="threshold")
    first, second = (dict(named_routers(part)) for part in (model, causal))
    # nothing comes before the depth router of the first layer
    same = {key for key, router in first.items() if torch.equal(router.threshold, second[key].threshold)}
    assert same == {"model.layers.0.depth_router"}


def test_what_cannot_be_calibrated_is_refused():
    with pytest.raises(ValueError, match="`batches` is empty"):
        calibrate_thresholds(build("4t4i"), [])
    # one batch in place of a list, and ids without their name
    for batches, kind in (({"input_ids": mixed_ids()}, "str"), ([mixed_ids()], "Tensor")):
        with pytest.raises(ValueError, match=f"`batches` has a {kind} where"):
            calibrate_thresholds(build("4t4i"), batches)
    with pytest.raises(ValueError, match="without routers"):
        calibrate_thresholds(tiny_model(**GROUPS["1t1i"]), padded_batches())
    with pytest.raises(ValueError, match="auxiliary_routers=False"):
        calibrate_auxiliary_thresholds(tiny_model(**GROUPS["4t4i"]), padded_batches())
