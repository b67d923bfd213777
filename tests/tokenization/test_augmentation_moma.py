# SPDX-License-Identifier: Apache-2.0
"""Tests of the batched augmentation."""

import pytest
import torch

from tokenization.augmentation_moma import augment_pictures


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pictures():
    # a dark square, off the middle, on white
    pictures = torch.ones(64, 3, 32, 32)
    pictures[:, :, 4:14, 16:28] = -0.5
    return pictures


def test_equal_generators_give_equal_pictures(pictures):
    first = augment_pictures(pictures, generator())
    assert torch.equal(first, augment_pictures(pictures, generator()))
    assert not torch.equal(first, augment_pictures(pictures, generator(1)))


def test_shape_and_range_stay(pictures):
    result = augment_pictures(pictures, generator())
    assert result.shape == pictures.shape and result.dtype == pictures.dtype
    assert result.min() >= -1 and result.max() <= 1


def test_white_stays_white():
    white = torch.ones(8, 3, 16, 16)
    torch.testing.assert_close(augment_pictures(white, generator(), probability=1.0), white)


def test_corners_are_filled_with_the_mirrored_picture_where_asked():
    black = -torch.ones(32, 3, 16, 16)
    assert (augment_pictures(black, generator(), probability=1.0) == 1).any()
    reflected = augment_pictures(black, generator(), probability=1.0, fill="reflection")
    # colours still change a little
    assert reflected.max() < -0.7
    with pytest.raises(ValueError, match="fill='mirror'"):
        augment_pictures(black, fill="mirror")


def test_the_share_of_changed_pictures_is_the_probability():
    pictures = torch.rand(2000, 3, 8, 8, generator=generator()) * 2 - 1
    for probability in (0.0, 0.25, 1.0):
        result = augment_pictures(pictures, generator(), probability=probability)
        changed = (result != pictures).flatten(1).any(dim=1).float().mean().item()
        assert changed == pytest.approx(probability, abs=0.05)


def test_pictures_are_never_mirrored(pictures):
    # the square lies at the top right, and the changes are too small to move it anywhere else
    result = augment_pictures(pictures, generator(), probability=1.0)
    darkness = (1 - result).mean(dim=1)
    assert (darkness[:, :16, 16:].sum(dim=(1, 2)) > 0.8 * darkness.sum(dim=(1, 2))).all()


def test_integer_pictures_are_refused(pictures):
    with pytest.raises(ValueError, match="uint8"):
        augment_pictures((pictures * 127).to(torch.uint8))
