# SPDX-License-Identifier: Apache-2.0
"""What a model's likelihoods tell of images and their captions: which are pairs, and what one says of the other.

Shape suffixes:
    N pairs, Q queries, A answers, L codes of an image, P prefixes, C continuations, B continuations at once,
    T their length, V vocabulary.
"""

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import DynamicCache

from ..data.encoding import DocumentEncoder
from ..errors_moma import InputError
from .held_out import CaptionedImages


DEFAULT_PAIRS = 64
RECALL_AT = (1, 5)
# log-probabilities that rank, by their name in reports
CAPTION, IMAGE = "caption given image", "image given caption"


def measure_retrieval(
    model, processor, rows: CaptionedImages, batch_size: int, num_pairs: int = DEFAULT_PAIRS, seed: int = 0
) -> dict:
    """Rank every caption for every image and every image for every caption, by the model's likelihoods.

    A caption is scored by its words and `<eos>` behind the image, an image by its codes behind the caption and the
    token that begins an image. Equal captions are one answer, and so are images of equal codes.
    """
    num_pairs = min(num_pairs, len(rows))
    if num_pairs < 2:
        raise InputError(f"retrieval: {num_pairs} pairs of an image and its caption; there must be two to tell apart.")
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:num_pairs].tolist()
    images = [tuple(rows.codes[index].tolist()) for index in chosen]
    captions = [rows.captions[index] for index in chosen]
    # score each distinct caption once
    distinct_images, distinct_captions = list(dict.fromkeys(images)), list(dict.fromkeys(captions))
    image_N = torch.tensor([distinct_images.index(codes) for codes in images])
    caption_N = torch.tensor([distinct_captions.index(text) for text in captions])
    of_captions, of_images, prior = pair_scores(model, processor, distinct_images, distinct_captions, batch_size)
    encoder = DocumentEncoder(processor)
    # a caption ends with one more token
    lengths = torch.tensor([len(encoder.text_ids(text)) + 1 for text in distinct_captions])
    by_image = {
        CAPTION: of_captions,
        f"{CAPTION}, per token": of_captions / lengths,
        IMAGE: of_images.T,
    }
    by_caption = {
        IMAGE: of_images,
        f"{IMAGE}, less the image alone": of_images - prior,
        CAPTION: of_captions.T,
    }
    return {
        "pairs": num_pairs,
        "captions": {name: rank_figures(*ranks(score, image_N, caption_N)) for name, score in by_image.items()},
        "images": {name: rank_figures(*ranks(score, caption_N, image_N)) for name, score in by_caption.items()},
    }


def check_retrieval(source: str, num_images: int) -> None:
    """Raise `ValueError` where a source has too few captioned images for one to be told from another."""
    if num_images < 2:
        raise InputError(f"retrieval: the source {source!r} has {num_images} captioned images; it needs two at least.")


def pair_scores(
    model, processor, images: list[tuple[int, ...]], captions: list[str], batch_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-probabilities of all pairs, in nats."""
    framed = [processor.image_ids(list(codes)) for codes in images]
    codes = [ids[1:-1] for ids in framed]
    encoder = DocumentEncoder(processor)
    words = [[*encoder.text_ids(text), encoder.eos] for text in captions]
    shown = [encoder.opened(ids) for ids in framed]
    begin = framed[0][0]
    asked = [[*encoder.opened(ids[:-1]), begin] for ids in words]
    of_captions = continuation_log_probs(model, shown, words, batch_size, "captions of each image")
    of_images = continuation_log_probs(model, asked, codes, batch_size, "images of each caption")
    alone = [[*encoder.opened([]), begin]]
    (prior,) = continuation_log_probs(model, alone, codes, batch_size, "images of no caption")
    return of_captions, of_images, prior


def likeliest_drawings(
    model, processor, codes_QAL: torch.Tensor, captions: Sequence[str], batch_size: int = 64
) -> torch.Tensor:
    """Choose among several drawings of each caption the one of which the caption is likeliest, by the model itself."""
    if codes_QAL.ndim != 3 or len(codes_QAL) != len(captions) or not codes_QAL.shape[1]:
        raise InputError(
            f"`codes_QAL` has the shape {tuple(codes_QAL.shape)}, but for {len(captions)} captions it has to be "
            f"({len(captions)}, drawings of each, {processor.image_seq_length})."
        )
    if not all(caption.strip() for caption in captions):
        raise InputError("a caption has no words, by which drawings could be told apart.")
    encoder = DocumentEncoder(processor)
    shown = [encoder.opened(processor.image_ids(codes)) for codes in codes_QAL.flatten(0, 1).tolist()]
    words = [encoder.text_ids(caption) for caption in captions for _ in range(codes_QAL.shape[1])]
    scores_QA = paired_log_probs(model, shown, words, batch_size).view(codes_QAL.shape[:2])
    return scores_QA.argmax(dim=1)


def ranks(scores_QA: torch.Tensor, query_N: torch.Tensor, answer_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rank of every pair's answer among those that are wrong for its query."""
    is_right_QA = torch.zeros_like(scores_QA, dtype=torch.bool)
    is_right_QA[query_N, answer_N] = True
    is_wrong_NA = ~is_right_QA[query_N]
    own_N1 = scores_QA[query_N, answer_N].unsqueeze(1)
    # what is no number is neither above nor below another
    is_ahead_NA = is_wrong_NA & ~(scores_QA[query_N] < own_N1)
    return 1 + is_ahead_NA.sum(dim=1), 1 + is_wrong_NA.sum(dim=1)


def rank_figures(rank_N: torch.Tensor, candidates_N: torch.Tensor) -> dict:
    """Return what is told of ranks, and what chance would reach."""
    rank, candidates = rank_N.double(), candidates_N.double()
    harmonic = (1 / torch.arange(1, int(candidates_N.max()) + 1).double()).cumsum(0)
    return {
        **{f"recall@{k}": (rank <= k).double().mean().item() for k in RECALL_AT},
        "mean_reciprocal_rank": (1 / rank).mean().item(),
        # the mean of the middle two of an even number
        "median_rank": rank.quantile(0.5).item(),
        "chance": {
            **{f"recall@{k}": (k / candidates).clamp(max=1).mean().item() for k in RECALL_AT},
            "mean_reciprocal_rank": (harmonic[candidates_N - 1] / candidates).mean().item(),
            "median_rank": ((candidates + 1) / 2).mean().item(),
        },
    }


def check_information(source: str, captions: Sequence[str]) -> None:
    """Raise `ValueError` where a source has too few captions with words."""
    number = sum(bool(text.strip()) for text in captions)
    if number < 2:
        raise InputError(f"information: the source {source!r} has {number} images with words; it needs two at least.")


def measure_information(model, processor, rows: CaptionedImages, batch_size: int) -> dict:
    """Return by how many nats captions make their images likelier, and images their captions.

    Were the model's two directions parts of one distribution, both numbers would be the same mutual information. A
    model that draws what it is asked for takes as much from a caption as it takes from an image when it names it.

    An image's codes are scored behind its caption and behind nothing; a caption's words and what ends them behind its
    image and, before an image, behind nothing. That an image or words come first is none of what is scored.
    """
    encoder = DocumentEncoder(processor)
    pairs = [
        (encoder.text_ids(text), image) for text, image in zip(rows.captions, rows.codes.tolist()) if text.strip()
    ]
    if len(pairs) < 2:
        raise InputError(f"information: {len(pairs)} pairs of an image and its caption; there must be two at least.")
    words = [ids for ids, _ in pairs]
    framed = [processor.image_ids(image) for _, image in pairs]
    begin, codes = framed[0][0], [ids[1:-1] for ids in framed]
    nothing = [encoder.opened([])] * len(pairs)

    def nats(before, after):
        return -paired_log_probs(model, before, after, batch_size)

    image = {
        "alone": nats([[*ids, begin] for ids in nothing], codes),
        "with_other": nats([[*encoder.opened(ids), begin] for ids in words], codes),
    }
    caption = {
        "alone": nats(nothing, [[*ids, begin] for ids in words]) + _words_come_first(model, nothing[0], begin),
        "with_other": nats([encoder.opened(ids) for ids in framed], [[*ids, encoder.eos] for ids in words]),
    }
    found: dict = {"pairs": len(pairs)}
    for name, by_condition in (("image", image), ("caption", caption)):
        taken_N = by_condition["alone"] - by_condition["with_other"]
        found[name] = {condition: values_N.mean().item() for condition, values_N in by_condition.items()}
        found[name] |= {
            "taken": taken_N.mean().item(),
            "standard_error": taken_N.std().item() / math.sqrt(len(pairs)),
        }
    by_image, by_caption = found["image"]["taken"], found["caption"]["taken"]
    return {**found, "ratio": by_image / by_caption if by_caption > 0 else None}


@torch.no_grad()
def _words_come_first(model, ids: list[int], begin: int) -> float:
    """Return the log-probability that a document does not begin with an image."""
    logits_V = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1]
    return torch.log1p(-logits_V.double().softmax(-1)[begin]).item()


@torch.no_grad()
def continuation_log_probs(
    model,
    prefixes: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    batch_size: int,
    description: str = "scores",
) -> torch.Tensor:
    """Return `log p(continuation | prefix)` in nats, summed over the tokens of the continuation.

    Every prefix is read once; its continuations go on from the cache of it.
    """
    if not all(map(len, prefixes)) or not all(map(len, continuations)):
        raise InputError("`prefixes` or `continuations` has an empty one: each needs one token at least.")
    scores_PC = torch.empty(len(prefixes), len(continuations), dtype=torch.float64)
    # rows of about one length pad little
    order = sorted(range(len(continuations)), key=lambda index: len(continuations[index]))
    for row, prefix in enumerate(tqdm(prefixes, desc=description)):
        ids = torch.tensor([list(prefix)], device=model.device)
        cache = DynamicCache(config=model.config)
        last_V = model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            scores_PC[row, chosen] = _scores(model, cache, last_V, [continuations[index] for index in chosen]).cpu()
    return scores_PC


def _scores(model, cache: DynamicCache, last_V: torch.Tensor, continuations: list[Sequence[int]]) -> torch.Tensor:
    """Return the scores `[B]` of continuations of the prefix that the cache holds, whose last logits are `last_V`."""
    lengths_B = torch.tensor([len(ids) for ids in continuations])
    rows = [torch.as_tensor(ids, dtype=torch.long) for ids in continuations]
    # id 0 is a token like any other: the mask hides what stands behind the end
    ids_BT = pad_sequence(rows, batch_first=True).to(model.device)
    is_token_BT = (torch.arange(ids_BT.shape[1]) < lengths_B[:, None]).to(model.device)
    scores_B = last_V.double().log_softmax(-1)[ids_BT[:, 0]]
    if ids_BT.shape[1] == 1:
        return scores_B
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(len(rows))
    # the last token predicts nothing; a row that ends earlier has padding for it
    seen_BT = torch.ones(len(rows), int(cache.get_seq_length()), dtype=torch.bool, device=model.device)
    mask_BS = torch.cat([seen_BT, is_token_BT[:, :-1]], dim=1).long()
    logits_BTV = model(input_ids=ids_BT[:, :-1], attention_mask=mask_BS, cache=cache, use_cache=True).logits
    return scores_B - _losses(logits_BTV, ids_BT, is_token_BT)


def _losses(logits_BTV: torch.Tensor, ids_BT: torch.Tensor, is_scored_BT: torch.Tensor) -> torch.Tensor:
    """Return the sums `[B]` of the cross-entropies of scored tokens by the logits of the positions before them."""
    losses_BT = F.cross_entropy(logits_BTV.float().transpose(1, 2), ids_BT[:, 1:], reduction="none")
    return (losses_BT.double() * is_scored_BT[:, 1:]).sum(dim=1)


@torch.no_grad()
def paired_log_probs(
    model, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], batch_size: int
) -> torch.Tensor:
    """Return `log p(continuation | prefix)` in nats for each prefix with the continuation of its own."""
    if not all(map(len, prefixes)) or not all(map(len, continuations)) or len(prefixes) != len(continuations):
        raise InputError("`prefixes` and `continuations` are to be pairs, and to have one token at least each.")
    scores = []
    for start in range(0, len(prefixes), batch_size):
        chosen = slice(start, start + batch_size)
        pairs = list(zip(prefixes[chosen], continuations[chosen]))
        rows = [torch.tensor([*prefix, *continuation]) for prefix, continuation in pairs]
        ids_BT = pad_sequence(rows, batch_first=True).to(model.device)
        place_T = torch.arange(ids_BT.shape[1])
        begins_B1 = torch.tensor([[len(prefix)] for prefix, _ in pairs])
        lengths_B1 = torch.tensor([[len(row)] for row in rows])
        is_scored_BT = ((place_T >= begins_B1) & (place_T < lengths_B1)).to(model.device)
        mask_BT = (place_T < lengths_B1).long().to(model.device)
        logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[:, :-1]
        scores.append(-_losses(logits_BTV, ids_BT, is_scored_BT).cpu())
    return torch.cat(scores)
