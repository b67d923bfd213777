# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F

from tokenization import MomaVQConfig, MomaVQModel
from tokenization.modeling_moma_vq import TRUNK_WIDTH, MomaVQSameConv, MomaVQTrunk
from tokenization.perceptual_moma_vq import MomaVQPerceptualNetwork


@pytest.fixture(scope="module")
def network():
    return MomaVQPerceptualNetwork().network


@pytest.fixture
def trunk(network):
    trunk = MomaVQTrunk(downsample_factor=8)
    trunk.load_imagenet_weights(network)
    return trunk


def test_features_equal_those_of_the_network_the_weights_come_from(trunk, network):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    resized = F.interpolate(images, scale_factor=2.0, mode="bilinear", align_corners=False)
    with torch.no_grad():
        expected = F.relu6(network._conv_stem((resized * 127.5 + 0.5) / 128))
        for block in network._blocks[: len(trunk.blocks)]:
            expected = block(expected)
    expected = F.layer_norm(expected.permute(0, 2, 3, 1), (TRUNK_WIDTH,)).permute(0, 3, 1, 2)
    torch.testing.assert_close(trunk(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("side", [7, 8])
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


@pytest.mark.parametrize("side", [32, 64, 96])
def test_the_grid_is_that_of_the_codes(trunk, side):
    assert trunk(torch.zeros(1, 3, side, side)).shape == (1, TRUNK_WIDTH, side // 8, side // 8)


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


def test_a_model_without_trunk_has_no_weights_of_one():
    config = MomaVQConfig.from_preset("small", use_trunk=False, base_channels=16, latent_channels=16)
    assert not any("trunk" in name for name in MomaVQModel(config).state_dict())
