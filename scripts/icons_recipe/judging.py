# SPDX-License-Identifier: Apache-2.0
"""What drawings show, by a linear judge of ImageNet features that real icons and reconstructions are shown first."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from icons_recipe.neighbours import TrainIcons
from icons_recipe.samples import Sample, normalised
from modeling_moma.errors_moma import InputError
from modeling_moma.evaluation.captions import derangement
from modeling_moma.evaluation.drawings import all_features
from modeling_moma.evaluation.measures import decode_images


# the judge knows the most frequent names of the training icons
KNOWN_NAMES = 500
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 10, 256, 1e-3, 1e-2


@dataclass(frozen=True)
class LinearJudge:
    """Multinomial logistic regression from features of an image to its name.

    Args:
        names: that it knows.
        mean: of the training images' features, `[D]`.
        std: their deviation, `[D]`.
        linear: from standardised features to a logit of each name.
        train_images: that it was fitted to.
    """

    names: list[str]
    mean: torch.Tensor
    std: torch.Tensor
    linear: nn.Linear
    train_images: int

    @torch.inference_mode()
    def figures(self, features: torch.Tensor, wanted: Sequence[str]) -> dict[str, float]:
        """
        Returns the shares `top1` and `top5` of images whose name the judge finds likeliest, or among its first five.

        Args:
            features: `[N, D]`.
            wanted: the name of each image, one that the judge knows.
        """
        place = {name: number for number, name in enumerate(self.names)}
        own_N1 = torch.tensor([[place[name]] for name in wanted])
        logits_NC = self.linear((features.float() - self.mean) / self.std)
        found_N5 = logits_NC.topk(min(5, len(self.names)), dim=1).indices
        is_right_N5 = found_N5 == own_N1
        return {"top1": is_right_N5[:, 0].double().mean().item(), "top5": is_right_N5.any(1).double().mean().item()}


def frequent_names(columns: dict[str, list], count: int = KNOWN_NAMES) -> list[str]:
    """Returns the most frequent names of the training icons, of equally frequent ones those that come first."""
    return [name for name, _ in Counter(map(normalised, columns["name"])).most_common(count)]


def fit_judge(train: TrainIcons, names: Sequence[str], seed: int = 0) -> LinearJudge:
    """
    Fits the judge to all training images of some names whose features are known.

    Args:
        train: with features `[F, D]`.
        names: that it is to know.
        seed: of the order of images.

    Raises:
        InputError: the features are those of no image, or of images of one name alone.
    """
    place = {name: number for number, name in enumerate(names)}
    label_F = np.asarray([place.get(normalised(train.columns["name"][row]), -1) for row in train.rows.tolist()])
    known = np.flatnonzero(label_F >= 0)
    if len(np.unique(label_F[known])) < 2:
        raise InputError(
            f"the judge has {len(known)} training images of its {len(names)} names, too few to tell names apart; "
            "--features or more --train-images give it others."
        )
    label_M, features_MD = torch.from_numpy(label_F[known]), torch.from_numpy(np.array(train.features[known])).float()
    mean, std = features_MD.mean(dim=0), features_MD.std(dim=0).clamp(min=1e-3)
    features_MD = (features_MD - mean) / std
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(features_MD.shape[1], len(names))
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * -(-len(known) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in tqdm(range(EPOCHS), desc="judge"):
        for batch in torch.randperm(len(known), generator=generator).split(BATCH):
            loss = F.cross_entropy(linear(features_MD[batch]), label_M[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return LinearJudge(list(names), mean, std, linear.requires_grad_(False), len(known))


def judge_drawings(
    processor,
    judge: LinearJudge,
    sample: Sample,
    drawn_NSL: torch.Tensor,
    likeliest_NL: torch.Tensor,
    extract: Callable[[torch.Tensor], torch.Tensor],
    batch_size: int,
) -> dict:
    """
    Shows the judge held-out icons, their reconstructions and drawings of their captions.

    Args:
        processor: a `MomaProcessor`.
        judge: see `fit_judge`.
        sample: held-out icons whose names the judge knows.
        drawn_NSL: codes of several drawings of each, see `likeliest_of`.
        likeliest_NL: codes of one of these.
        extract: pixel values `[B, 3, H, W]` in [-1, 1] to features `[B, D]`.
        batch_size: images at once.

    Returns:
        `captions`, `names`, `train_images` (numbers); `originals`, `reconstructions`, `drawn` (a mean over seeds),
        `likeliest` and `shuffled` (drawings judged by another icon's name), `top1` and `top5` each; `by_seed`, the
        `top1` of each seed's drawings; `ratios`, `drawn` over `reconstructions` and over `originals`, of `top1`,
        `None` where the latter is 0.
    """
    names = [normalised(row["name"]) for row in sample.rows]

    def seen(codes: torch.Tensor) -> torch.Tensor:
        return all_features(extract, decode_images(processor, codes, batch_size))

    drawn = [seen(codes) for codes in drawn_NSL.unbind(1)]
    by_seed = [judge.figures(features, names) for features in drawn]
    others = [names[place] for place in derangement(len(names))]
    found = {
        "originals": judge.figures(sample.features, names),
        "reconstructions": judge.figures(seen(sample.codes), names),
        "drawn": means(by_seed),
        "likeliest": judge.figures(seen(likeliest_NL), names),
        "shuffled": means([judge.figures(features, others) for features in drawn]),
    }
    top1 = {name: figures["top1"] for name, figures in found.items()}
    return {
        "captions": len(names),
        "names": len(judge.names),
        "train_images": judge.train_images,
        **found,
        "by_seed": [figures["top1"] for figures in by_seed],
        "ratios": {
            name: top1["drawn"] / top1[name] if top1[name] else None for name in ("reconstructions", "originals")
        },
    }


def means(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns the mean of each figure."""
    return {name: fmean(entry[name] for entry in figures) for name in figures[0]}
