# SPDX-License-Identifier: Apache-2.0
"""Causal losses of a source by modality, with the figures that follow from them: perplexity, bits for each code."""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from tokenization import MomaDataCollator

from ..configuration_moma import RULES, MomaConfig
from ..errors_moma import InputError
from ..frames_moma import TEXT
from ..routing_moma import MomaRouterBase


CAUSAL = "causal"
# name of that routing in reports, never without its warning
EXPERT_CHOICE = "expert_choice (sees the future, not a measure of quality)"
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


@torch.no_grad()
def document_losses(
    model, processor, documents: Sequence[dict], batch_size: int, routing: str | None, description: str
) -> dict:
    """Return the losses of documents under one routing."""
    collate = MomaDataCollator(processor.tokenizer)
    frames = model.config.frames.values()
    frame_ids = torch.tensor([token for frame in frames for token in (frame.begin, frame.end)], device=model.device)
    sums, counts = defaultdict(float), defaultdict(int)
    frame_sum, frame_count = 0.0, 0
    for start in tqdm(range(0, len(documents), batch_size), desc=description):
        batch = collate(list(documents[start : start + batch_size]))
        inputs = {name: values.to(model.device) for name, values in batch.items()}
        output = model(**inputs, routing=routing)
        for modality, loss in output.modality_losses.items():
            count = int(output.modality_tokens[modality])
            sums[modality] += float(loss) * count
            counts[modality] += count
        targets = inputs["labels"][:, 1:]
        is_frame = torch.isin(targets, frame_ids)
        logits = output.logits[:, :-1][is_frame].float()
        frame_sum += float(F.cross_entropy(logits, targets[is_frame], reduction="sum"))
        frame_count += int(is_frame.sum())
    overall, total = sum(sums.values()), sum(counts.values())
    modalities = [modality for modality in counts if modality != TEXT]
    sums[WORDS], counts[WORDS] = sums[TEXT] - frame_sum, counts[TEXT] - frame_count
    means = {part: sums[part] / counts[part] if counts[part] else None for part in sums}
    words, codes = means[WORDS], {part: means[part] for part in modalities}
    return {
        "overall": overall / total,
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
