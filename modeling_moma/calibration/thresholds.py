# SPDX-License-Identifier: Apache-2.0
"""Thresholds computed from a few batches, and how well causal rules hit the top K that they stand for.

Shape suffixes:
    N tokens that compete for a router (one group's, or a depth layer's), padding excluded, D hidden size,
    S scores of a token (one for each expert; one of a depth router),
    C thresholds of a router (one for each expert, or for each pool of a depth router).
"""

from collections.abc import Callable, Iterable

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..configuration_moma import RULES
from ..depth_moma import MomaDepthRouter
from ..errors_moma import InputError
from .observation import RouterRecord, named_routers, run_observed
from .selection_counts import SelectionCounts, sum_over_ranks


logger = logging.get_logger(__name__)


def calibrate_thresholds(
    model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]], routing: str = "expert_choice"
) -> list[dict]:
    """Compute the `threshold` of all routers anew, for a model that was trained elsewhere or under other rules.

    A threshold becomes the plain mean of the batches' thresholds, each midway between the K-th best score and the next
    lower one, with `K` as in training. `num_updates` becomes the number of batches that had tokens to judge by where
    it was less, and never falls: it is the clock of `gumbel_noise_steps` and `routing_warmup_steps`, too, and what has
    run out in training must not begin anew. Nothing else of the model changes, and nothing at all when a batch raises.
    With several processes each brings its own batches, and all get the same result.

    An expert or pool without tokens in a batch has no vote there. Without any vote it keeps its threshold, and a
    warning names it. Another one tells where no inference routing of the config would read the thresholds.

    Args:
        model (`PreTrainedModel`):
            a `MomaForCausalLM` or `MomaModel`; changed in place.
        batches (`Iterable[dict[str, torch.Tensor]]`):
            inputs of the model, of the batch size of the training where possible. `labels` are left out. They are run
            twice.
        routing (`str`, *optional*, defaults to `"expert_choice"`):
            the routing under which the hidden states arise.

    Returns:
        `list[dict]`: see [`auxiliary_report`], with the rule `"threshold"` alone, on the same batches.

    Raises:
        ValueError: there is no batch, or the model has no routers.
    """
    batches = list(batches)
    routers = named_routers(model)
    _warn_if_unread(model.config)
    thresholds = _mean_thresholds(model, batches, lambda record: record.threshold_C, routing)
    report = _calibrated_report(model, batches, "threshold", "scores_NS", thresholds, routing)
    with torch.no_grad():
        for name, (mean_C, count_C) in thresholds.items():
            router = routers[name]
            router.threshold.copy_(torch.where(count_C > 0, mean_C, router.threshold))
            votes = count_C if router.num_updates.ndim else count_C[0]
            router.num_updates.copy_(torch.maximum(router.num_updates, votes))
    return report


def _warn_if_unread(config: PreTrainedConfig) -> None:
    routings = {"inference_routing": config.inference_routing}
    if config.depth_layers:
        routings["depth_inference_routing"] = config.depth_inference_routing or config.inference_routing
    if not any(RULES[routing].reads_threshold for routing in routings.values()):
        fields = " and ".join(f"config.{name}={value!r}" for name, value in routings.items())
        if any(RULES[routing].needs_auxiliary for routing in routings.values()):
            advice = (
                "the model reads those of `calibrate_auxiliary_thresholds`, which `moma calibrate` computes as well."
            )
        else:
            advice = "set config.inference_routing='threshold', or pass routing='threshold', to use them."
        logger.warning(
            "The thresholds that are calibrated here are read under the routing 'threshold' alone, and the model has "
            f"{fields}: {advice}"
        )


def calibrate_auxiliary_thresholds(
    model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]], routing: str = "expert_choice"
) -> list[dict]:
    """Set the `threshold` of all auxiliary routers so that they take as many tokens as the top K holds.

    A classifier with a threshold of one half need not take the right number of tokens. Here each expert, and each pool
    of a depth layer, gets the mean over the batches of its threshold, midway between the K-th best predicted
    probability and the next lower one. All else is as in [`calibrate_thresholds`].

    Probabilities of logits above about 12 are 1 but for rounding, and count as equal. When more than K tokens tie so
    at the threshold, all of them are taken; the report's `load` counts them.

    Args:
        model (`PreTrainedModel`):
            with `config.auxiliary_routers`, trained; changed in place.
        batches (`Iterable[dict[str, torch.Tensor]]`):
            held-out inputs, see [`calibrate_thresholds`].
        routing (`str`, *optional*, defaults to `"expert_choice"`):
            the routing under which the hidden states arise.

    Returns:
        `list[dict]`: see [`auxiliary_report`], with the rule `"auxiliary"` alone, on the same batches.

    Raises:
        ValueError: there is no batch, or the model has no auxiliary routers.
    """
    batches = list(batches)
    routers = named_routers(model)
    require_auxiliary_routers(model)
    thresholds = _mean_thresholds(model, batches, lambda record: record.predicted_threshold_C, routing)
    report = _calibrated_report(model, batches, "auxiliary", "predicted_NS", thresholds, routing)
    with torch.no_grad():
        for name, (mean_C, count_C) in thresholds.items():
            threshold = routers[name].auxiliary.threshold
            threshold.copy_(torch.where(count_C > 0, mean_C, threshold))
    return report


def require_auxiliary_routers(model: PreTrainedModel):
    """Check that a model has auxiliary routers."""
    if not model.config.auxiliary_routers:
        raise InputError(
            "`model` has config.auxiliary_routers=False: give it some with add_auxiliary_routers(model), or load what "
            "`moma train-auxiliary-routers` wrote."
        )


def _mean_thresholds(
    model: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    threshold_of: Callable[[RouterRecord], torch.Tensor],
    routing: str,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the mean over the batches of all processes, and the number of batches that voted, by router."""
    routers = named_routers(model)
    sums = {name: torch.zeros(2, *router.threshold.shape, dtype=torch.float64) for name, router in routers.items()}

    def observe(record: RouterRecord):
        threshold_C = threshold_of(record).cpu().double()
        # scores that are no numbers have no vote
        is_finite_C = threshold_C.isfinite() & record.threshold_C.cpu().isfinite()
        count_C = record.count_C.cpu().double() * is_finite_C
        sums[record.name] += torch.stack([threshold_C.nan_to_num() * count_C, count_C])

    run_observed(model, batches, observe, routing)
    thresholds = {}
    for name, (sum_C, count_C) in sum_over_ranks(sums, model.device).items():
        if not count_C.all():
            pools = model.config.depth_pools if isinstance(routers[name], MomaDepthRouter) else []
            silent = [pool for pool, votes in zip(pools, count_C) if not votes] if len(pools) > 1 else ""
            logger.warning(
                f"No batch had tokens with finite scores for {name} {silent or ''}: what had no vote keeps its "
                "threshold."
            )
        like_C = routers[name].threshold
        thresholds[name] = ((sum_C / count_C.clamp(min=1)).to(like_C), count_C.to(like_C))
    return thresholds


def _calibrated_report(
    model: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    rule: str,
    values: str,
    thresholds: dict[str, tuple[torch.Tensor, torch.Tensor]],
    routing: str,
) -> list[dict]:
    def take(record: RouterRecord) -> torch.Tensor:
        mean_C, count_C = thresholds[record.name]
        old_C = record.router.threshold if rule == "threshold" else record.router.auxiliary.threshold
        return getattr(record, values) >= torch.where(count_C > 0, mean_C, old_C)[record.threshold_index_NS]

    counts = SelectionCounts({rule: take})
    run_observed(model, batches, counts.add, routing)
    counts.reduce(model.device)
    return counts.rows()
