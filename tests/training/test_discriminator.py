# SPDX-License-Identifier: Apache-2.0
"""Tests of the patch discriminator that an image tokenizer may be trained against."""

import pytest
import torch

from modeling_moma.training.discriminator import AdversarialTraining, PatchDiscriminator, hinge_loss
from tokenization.configuration_moma_vq import MomaVQConfig
from tokenization.modeling_moma_vq import MomaVQModel


CPU = torch.device("cpu")
CONFIG = MomaVQConfig.from_preset(
    "small",
    **{"use_trunk": False, "semantic_dim": None, "base_channels": 16, "latent_channels": 16, "num_embeddings": 32},
    **{"resolution": 32, "perceptual_weight": 0.0},
)


def smooth_images(count, generator):
    """Images of a few soft spots, in [-1, 1]."""
    small = torch.rand(count, 3, 4, 4, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(small, size=(32, 32), mode="bilinear")


def test_the_discriminator_learns_to_tell_images_from_noise():
    generator = torch.Generator().manual_seed(0)
    training = AdversarialTraining(1.0, 0, CONFIG, seed=0, device=CPU)
    for _ in range(12):
        noise = torch.rand(8, 3, 32, 32, generator=generator) * 2 - 1
        loss = training.train_step(smooth_images(8, generator), noise)
    assert loss < 0.3
    with torch.no_grad():
        real = training.discriminator(smooth_images(16, generator))
        fake = training.discriminator(torch.rand(16, 3, 32, 32, generator=generator) * 2 - 1)
    assert real.mean() > 0.3 and fake.mean() < -0.3


@pytest.mark.parametrize(("side", "patches"), [(24, 1), (32, 2), (64, 6), (256, 30)])
def test_there_is_a_verdict_for_each_patch(side, patches):
    assert PatchDiscriminator().eval()(torch.zeros(1, 3, side, side)).shape == (1, 1, patches, patches)


def test_one_verdict_depends_on_a_patch_of_70_pixels():
    pixels = torch.zeros(1, 3, 256, 256, requires_grad=True)
    PatchDiscriminator().eval()(pixels)[0, 0, 15, 15].backward()
    rows = pixels.grad.abs().sum(dim=(0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == 70


def test_the_hinge_loss_asks_for_a_distance_of_one():
    assert hinge_loss(torch.tensor([1.0, 5.0]), torch.tensor([-1.0, -3.0])) == 0
    assert hinge_loss(torch.tensor([0.0]), torch.tensor([0.0])) == 1
    assert hinge_loss(torch.tensor([-1.0]), torch.tensor([1.0])) == 2


def gradients(model, loss):
    model.zero_grad()
    loss.backward(retain_graph=True)
    return model.decoder.conv_out.weight.grad.clone()


def test_the_term_pulls_at_the_last_layer_as_hard_as_the_pixels_do():
    torch.manual_seed(0)
    model = MomaVQModel(CONFIG)
    training = AdversarialTraining(0.5, 0, CONFIG, seed=0, device=CPU)
    output = model(smooth_images(4, torch.Generator().manual_seed(0)))
    term, plain = training.term(model, output)
    by_term, by_pixels = gradients(model, term), gradients(model, output.reconstruction_loss)
    assert by_term.norm() == pytest.approx(0.5 * by_pixels.norm().item(), rel=0.02)
    # the discriminator gets no gradient from it, and is ready for its own step
    assert all(p.grad is None and p.requires_grad for p in training.discriminator.parameters())
    assert isinstance(plain, float)


def test_it_begins_at_its_start_and_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    training = AdversarialTraining(1.0, 5, CONFIG, seed=0, device=CPU)
    assert torch.equal(torch.rand(2), expected)
    assert [training.is_on(step) for step in (0, 4, 5, 6)] == [False, False, True, True]
    other = AdversarialTraining(1.0, 5, CONFIG, seed=0, device=CPU)
    for name, tensor in training.discriminator.state_dict().items():
        assert torch.equal(other.discriminator.state_dict()[name], tensor)


def test_images_too_small_for_it_are_refused():
    config = MomaVQConfig.from_preset("small", resolution=16)
    with pytest.raises(ValueError, match="adversarial_weight=1.0: images of 16 pixels"):
        AdversarialTraining(1.0, 0, config, seed=0, device=CPU)
