# SPDX-License-Identifier: Apache-2.0
"""No threshold that a step or a calibration leaves is a score of its batch, so rounding moves nobody across it."""

import pytest
import torch

from helpers.calibration_reference import MODELS, build, padded_batches, plain_records
from helpers.reference import context_of, reference_cut
from helpers.tiny import tiny_config
from modeling_moma.calibration.thresholds import calibrate_auxiliary_thresholds, calibrate_thresholds
from modeling_moma.modeling_moma import MomaFeedForward
from modeling_moma.routing_moma import update_routers


# what another kernel makes of a score, generously
ROUNDING = 1e-6


@pytest.mark.parametrize("calibrate", [calibrate_thresholds, calibrate_auxiliary_thresholds])
@pytest.mark.parametrize("name", MODELS)
def test_a_calibration_leaves_no_threshold_that_is_a_score_of_its_batch(name, calibrate):
    model, batch = build(name), padded_batches()[0]
    calibrate(model, [batch])
    for key, (pairs, _) in plain_records(model, batch).items():
        router = model.get_submodule(key)
        column, cuts = (1, router.threshold) if calibrate is calibrate_thresholds else (2, router.auxiliary.threshold)
        margins = [abs(pair[column] - cuts[pair[0]].item()) / pair[column] for pair in pairs]
        assert min(margins) > ROUNDING, key


def cuts_after_a_step(x_ND, factor=1.0, weight=None):
    """A group's router after one step on these tokens, its threshold the batch's threshold, and whom the step took."""
    torch.manual_seed(0)
    config = tiny_config(num_experts=4, expert_capacity_factor=factor, training_routing="expert_choice")
    router = MomaFeedForward(config).groups["all"].router
    torch.nn.init.normal_(router.weight, std=0.5)
    if weight is not None:
        router.weight.data = weight
    context = context_of(config, torch.zeros(1, len(x_ND), dtype=torch.long), "expert_choice", track=True)
    _, selection = router(x_ND, context)
    update_routers(context, 0.0)
    return router, selection


def tokens(number):
    return torch.randn(number, tiny_config().hidden_size, generator=torch.Generator().manual_seed(number))


@pytest.mark.parametrize(("number", "factor"), [(1, 1.0), (2, 4.0), (5, 3.9), (16, 0.5), (301, 1.0)])
def test_whoever_is_taken_is_taken_again_however_the_sums_are_rounded(number, factor):
    x_ND = tokens(number)
    router, selection = cuts_after_a_step(x_ND, factor)
    expected_NE = torch.zeros(number, 4, dtype=torch.bool)
    expected_NE[selection.token_P, selection.expert_P] = True
    noise = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits_NE = router.logits(x_ND)
        rounded_NE = logits_NE * (1 + 4e-7 * torch.randn(number, 4, generator=noise))
        assert torch.equal(torch.sigmoid(rounded_NE) >= router.threshold, expected_NE)


def test_tokens_that_only_rounding_tells_apart_stay_on_one_side():
    # rows that begin alike, say: eight copies of each of nine tokens, none of which fits whole into the 18 best
    copies_ND = tokens(9).repeat_interleave(8, 0)
    noise = torch.Generator().manual_seed(1)
    rounded_ND = copies_ND * (1 + 1e-7 * torch.randn(copies_ND.shape, generator=noise))
    router, _ = cuts_after_a_step(rounded_ND)
    is_taken_NE = torch.sigmoid(router.logits(rounded_ND)) >= router.threshold
    assert torch.equal(is_taken_NE, is_taken_NE.view(9, 8, 4)[:, :1].expand(9, 8, 4).reshape(72, 4))
    assert (is_taken_NE.sum(0) == 24).all()


@pytest.mark.parametrize(
    ("kind", "factor"), [("spread", 2.3), ("spread", 0.1), ("tied", 1.0), ("all equal", 4.0), ("hopeless", 1.0)]
)
def test_a_cut_is_that_of_a_plain_loop(kind, factor):
    x_ND = tokens(23)
    # as few values as ties need; sigmoids of -200 are 0
    x_ND = {"tied": x_ND.round(), "all equal": x_ND[:1].expand(23, -1), "hopeless": 0 * x_ND - 200}.get(kind, x_ND)
    x_ND = x_ND * torch.eye(x_ND.shape[1])[:4].sum(0)
    router, _ = cuts_after_a_step(x_ND, factor, weight=torch.eye(x_ND.shape[1])[:4])
    lines = torch.sigmoid(x_ND[:, :4]).t().tolist()
    expected = [reference_cut(line, router.capacity(23)) for line in lines]
    assert router.threshold.tolist() == pytest.approx(expected, abs=1e-7)
