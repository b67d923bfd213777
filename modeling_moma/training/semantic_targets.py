# SPDX-License-Identifier: Apache-2.0
"""The teacher's features of the training images: kept in a file, or computed anew for each batch of a large set."""

from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from tokenization.perceptual_moma_vq import MomaVQPerceptualNetwork

from ..utils.atomic_files import atomic_write
from .array_file import ArrayWriter, read_array, read_whole_array
from .image_store import ImageStore, take, to_pixel_values


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
