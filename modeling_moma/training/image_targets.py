# SPDX-License-Identifier: Apache-2.0
"""What codes of images are to tell beside pixels: words of captions, and the features of a teacher."""

import math
import re
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from tokenization.configuration_moma_vq import MomaVQConfig
from tokenization.modeling_moma_vq import MomaVQOutput
from tokenization.perceptual_moma_vq import MomaVQPerceptualNetwork

from ..data.sources import TRAIN, Source, undecoded_rows
from ..errors_moma import InputError
from ..utils.atomic_files import atomic_write
from .image_store import ArrayWriter, ImageStore, read_array, read_whole_array, take, to_pixel_values


# a word of fewer captions is not asked for, nor more words than these
FEWEST_CAPTIONS, MOST_WORDS = 20, 8192
HIDDEN_SIZE = 384
# of no word, beyond the last one of a caption
NONE = -1


class CaptionWordHead(nn.Module):
    """Codes `(batch, embed_dim, grid, grid)` to scores of words `(batch, words)`."""

    def __init__(self, embed_dim: int, words: int):
        super().__init__()
        self.conv1 = nn.Conv2d(embed_dim, HIDDEN_SIZE, 3, padding=1)
        self.conv2 = nn.Conv2d(HIDDEN_SIZE, HIDDEN_SIZE, 3, padding=1)
        self.scores = nn.Linear(HIDDEN_SIZE, words)

    def forward(self, quantized: torch.Tensor) -> torch.Tensor:
        """Map vectors of codes `(batch, embed_dim, grid, grid)` to `(batch, words)`."""
        hidden_states = F.gelu(self.conv2(F.gelu(self.conv1(quantized))))
        return self.scores(hidden_states.mean(dim=(2, 3)))


def caption_words(text: str) -> list[str]:
    """Return the words of a caption, each once and in lower case."""
    return list(dict.fromkeys(re.findall(r"\w+", text.lower())))


def read_captions(sources: list[Source], places: np.ndarray) -> list[list[str]]:
    """Return the words of the first caption of each image, none where its source has no captions."""
    words: list[list[str]] = [[] for _ in places]
    for number, source in enumerate(sources):
        columns = source.kind.stored_columns()
        if not source.kind.has_captions:
            continue
        images = np.flatnonzero(places[:, 0] == number)
        by_row = dict(zip(places[images, 1].tolist(), images.tolist()))
        rows = source.open(source.split_names()[TRAIN]).select_columns(columns)
        for row, values in enumerate(undecoded_rows(rows)):
            if row in by_row:
                words[by_row[row]] = caption_words(next(source.kind.row_texts(values), ""))
    return words


class CaptionTraining:
    """The head with its optimizer, and the term that it adds to an image tokenizer's loss.

    The term is the cross-entropy to the words of the caption, each of which counts by the logarithm of how rare it is.
    """

    def __init__(
        self,
        weight: float,
        sources: list[Source],
        store: ImageStore,
        config: MomaVQConfig,
        learning_rate: float,
        seed: int,
        device: torch.device,
    ):
        captions = read_captions(sources, store.places)
        counts = Counter(word for words in captions for word in words)
        kept = [(word, count) for word, count in counts.most_common(MOST_WORDS) if count >= FEWEST_CAPTIONS]
        if not kept:
            raise InputError(
                f"caption_weight={weight}: of {len(counts):,} words in the captions of {len(captions):,} images none "
                f"stands in {FEWEST_CAPTIONS} or more. Sources of captions have `image` and `text`."
            )
        self.vocabulary = [word for word, _ in kept]
        numbers = {word: number for number, word in enumerate(self.vocabulary)}
        found = [[numbers[word] for word in words if word in numbers] for words in captions]
        longest = max(map(len, found))
        # words of each image, (images, longest)
        self.words = torch.tensor([entry + [NONE] * (longest - len(entry)) for entry in found], dtype=torch.int32)
        # a word of every caption tells nothing
        self.rarity = torch.tensor([math.log(len(captions) / count) for _, count in kept], device=device)
        self.weight, self.device = weight, device
        # the model's random numbers stay what they are without it
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = CaptionWordHead(config.embed_dim, len(kept))
        self.head = self.head.to(device).train()
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=learning_rate, betas=(0.9, 0.99), fused=True)

    def term(self, output: MomaVQOutput, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the term of the tokenizer's loss, and the loss before its weight."""
        words = self.words[indices].long().to(self.device)
        weights = self.rarity[words.clamp(min=0)] * (words != NONE)
        total = weights.sum(dim=1, keepdim=True)
        scores = self.head(output.quantized).float()
        found = torch.log_softmax(scores, dim=-1).gather(1, words.clamp(min=0))
        of_image = -(found * weights / total.clamp(min=torch.finfo(total.dtype).tiny)).sum(dim=1)
        loss = of_image.sum() / (total > 0).sum().clamp(min=1)
        return self.weight * loss, loss

    def step(self) -> None:
        """Take a step of the head, whose gradients the tokenizer's loss gave."""
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs."""
        return {
            "vocabulary": self.vocabulary,
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from [`CaptionTraining.state_dict`]."""
        self._check_same_words(state)
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _check_same_words(self, state: dict[str, Any]) -> None:
        # a score belongs to the word of its number, so the order has to be the same, too
        pairs = enumerate(zip_longest(state["vocabulary"], self.vocabulary), 1)
        difference = next(
            (f"word {number} was {old!r} then and is {new!r} now" for number, (old, new) in pairs if old != new),
            None,
        )
        if difference is not None:
            raise InputError(
                f"--resume: caption_weight={self.weight}: the captions have other words than at the first start, "
                f"{difference}. Has a source another `text`? Resume with that of the first start, or give a new "
                "`--output`."
            )


# the teacher sees images at one small size, whatever theirs is
TEACHER_BATCH = 128
# images whose features give mean and deviation where not all are computed
NUM_STANDARDS = 16_384


class SemanticTargets:
    """Standardised features of images without augmentation, float32.

    Where a training is to see each image at least once, the features of all are computed first and kept beside the
    images; a training that ends before has them computed batch by batch.
    """

    def __init__(
        self, teacher: MomaVQPerceptualNetwork, store: ImageStore, num_uses: int, bf16: bool, device: torch.device
    ):
        self.teacher, self.store, self.bf16, self.device = teacher, store, bf16, device
        self.kept: torch.Tensor | None = None
        if num_uses >= len(store.train):
            self.kept = torch.from_numpy(self._open(store.folder / f"features-{'bf16' if bf16 else 'fp32'}.npy"))
            known = self.kept
        else:
            spread = np.linspace(0, len(store.train) - 1, min(NUM_STANDARDS, len(store.train))).astype(int)
            places = torch.from_numpy(spread).split(TEACHER_BATCH)
            batches = [self._features(take(store.train, batch)) for batch in tqdm(places, desc="teacher features")]
            known = torch.cat(batches)
        # of a single image there is no unbiased one
        std = known.std(dim=0, correction=min(1, len(known) - 1))
        self.mean, self.std = known.mean(dim=0).to(device), std.clamp(min=1e-3).to(device)
        held_out = torch.from_numpy(store.held_out).split(TEACHER_BATCH)
        self.held_out = self._standardise(torch.cat([self._features(batch) for batch in held_out]))

    def of(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the features of training images, `(images, feature_dim)`."""
        if self.kept is not None:
            return self._standardise(self.kept[indices])
        return self._standardise(self._features(take(self.store.train, indices)))

    def _standardise(self, features: torch.Tensor) -> torch.Tensor:
        return (features.to(self.device) - self.mean) / self.std

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            return self.teacher.features(to_pixel_values(images, self.device)).cpu()

    def _open(self, path: Path) -> np.ndarray:
        features = read_whole_array(path, len(self.store.train))
        if features is None:
            atomic_write(path, self._write)
            features = read_array(path)
        return features

    def _write(self, path: Path) -> None:
        images = self.store.train
        with ArrayWriter(path, (self.teacher.feature_dim,), np.float32) as writer:
            for start in tqdm(range(0, len(images), TEACHER_BATCH), desc="teacher features"):
                batch = torch.from_numpy(images[start : start + TEACHER_BATCH])
                writer.extend(self._features(batch).numpy())
