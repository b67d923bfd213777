# SPDX-License-Identifier: Apache-2.0
"""Retrieval by likelihood: where the true caption stands among many for an image, and the true image for a caption.

Shape suffixes:
    N pairs, Q queries, A answers, L codes of an image.
"""

from collections.abc import Sequence

import torch

from ..data.encoding import DocumentEncoder
from ..errors_moma import InputError
from .held_out import CaptionedImages
from .scoring import continuation_log_probs, paired_log_probs


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
