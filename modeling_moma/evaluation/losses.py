# SPDX-License-Identifier: Apache-2.0
"""Causal losses of a source by modality, with the figures that follow from them: perplexity, bits for each code."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..configuration_moma import RULES, MomaConfig
from ..errors_moma import InputError
from ..frames_moma import TEXT
from ..routing_moma import MomaRouterBase
from .measures import EXPERT_CHOICE, ModalityLosses, loss_outputs


CAUSAL = "causal"
# text targets but for the tokens that begin and end an image or the like, of which most are certain
WORDS = "words"


def source_losses(
    model, processor, documents: Sequence[dict], batch_size: int, seed: int = 0, name: str = "losses"
) -> dict[str, dict]:
    """Return losses under the model's inference routing and, where trained under `expert_choice`, under that."""
    documents = list(documents)
    check_lengths(model.config, documents, name)
    # rows of about one length pad little, and a causal loss does not depend on the neighbours
    by_length = sorted(documents, key=lambda document: len(document["input_ids"]))
    result = {CAUSAL: document_losses(model, processor, by_length, batch_size, None, f"{name}, {CAUSAL}")}
    if trains_by_expert_choice(model):
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
        mixed = [documents[index] for index in order]
        result[EXPERT_CHOICE] = document_losses(
            model, processor, mixed, batch_size, "expert_choice", f"{name}, expert_choice"
        )
    return result


def check_lengths(config: MomaConfig, documents: list[dict], name: str):
    """Raise `ValueError` where there are no documents, none with a target, or one is longer than the context."""
    lengths = [len(document["input_ids"]) for document in documents]
    if not lengths or max(lengths) < 2:
        raise InputError(
            f"{name}: there are no held-out documents of two tokens or more; was `--limit` or the split 0?"
        )
    limit = config.max_position_embeddings
    # scaled rotary embeddings are made to go beyond
    if max(lengths) > limit and config.rope_parameters["rope_type"] == "default":
        raise InputError(
            f"{name}: document {lengths.index(max(lengths))} has {max(lengths)} tokens, but the model reads "
            f"`max_position_embeddings` = {limit}. Tokenize for sequences of that length."
        )


def trains_by_expert_choice(model) -> bool:
    """Return whether training routes by `expert_choice`, so that a loss under it says something of training."""
    rules = {model.config.training_routing}
    if model.config.depth_layers:
        rules.add(model.config.depth_training_routing or model.config.training_routing)
    has_routers = any(isinstance(module, MomaRouterBase) for module in model.modules())
    return has_routers and any(not RULES[rule].is_causal for rule in rules)


def document_losses(
    model, processor, documents: Sequence[dict], batch_size: int, routing: str | None, description: str
) -> dict:
    """Return the losses of documents under one routing."""
    losses, frames = ModalityLosses(), FrameLosses(model.config)
    for inputs, output in loss_outputs(model, processor, list(documents), batch_size, routing, description):
        losses.add(output)
        frames.add(inputs["labels"], output.logits)
    sums = {**losses.sums, WORDS: losses.sums[TEXT] - frames.sum}
    counts = {**losses.counts, WORDS: losses.counts[TEXT] - frames.count}
    means = {part: sums[part] / counts[part] if counts[part] else None for part in sums}
    words = means[WORDS]
    codes = {part: means[part] for part in losses.counts if part != TEXT}
    total = sum(losses.counts.values())
    return {
        "overall": sum(losses.sums.values()) / total,
        **means,
        "perplexity": None if words is None else perplexity(words),
        "bits_per_code": {part: None if nats is None else nats / math.log(2) for part, nats in codes.items()},
        "targets": {"overall": total, **counts},
    }


def perplexity(nats: float) -> float:
    """Return the perplexity of a loss, infinite where it is more than a number holds."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


class FrameLosses:
    """Adds up the losses of the tokens that begin and end images and the like."""

    def __init__(self, config: MomaConfig):
        tokens = [token for frame in config.frames.values() for token in (frame.begin, frame.end)]
        self._tokens = torch.tensor(tokens, dtype=torch.long)
        self.sum, self.count = 0.0, 0

    def add(self, labels: torch.Tensor, logits: torch.Tensor):
        """Add those of a batch: labels `[B, T]`, -100 where there is no target, and logits `[B, T, V]`."""
        targets = labels[:, 1:]
        is_frame = torch.isin(targets, self._tokens.to(targets.device))
        self.sum += float(F.cross_entropy(logits[:, :-1][is_frame].float(), targets[is_frame], reduction="sum"))
        self.count += int(is_frame.sum())
