# SPDX-License-Identifier: Apache-2.0
"""Tests of the batched augmentation."""

import pytest
import torch

from tokenization.augmentation_moma import augment_images


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images():
    # a dark square, off the middle, on white
    images = torch.ones(64, 3, 32, 32)
    images[:, :, 4:14, 16:28] = -0.5
    return images


def test_equal_generators_give_equal_images(images):
    first = augment_images(images, generator())
    assert torch.equal(first, augment_images(images, generator()))
    assert not torch.equal(first, augment_images(images, generator(1)))


def bar_angles(images):
    """Angle of the bar in each image in radians, from the direction in which its darkness spreads most."""
    angles = []
    for image in images:
        row_N, column_N = torch.nonzero(image[0] < 1, as_tuple=True)
        places = torch.stack([column_N, row_N]).double()
        darkness_N = (1 - image[0, row_N, column_N]).double()
        across, down = torch.linalg.eigh(torch.cov(places, aweights=darkness_N)).eigenvectors[:, 1]
        angles.append(torch.atan(down / across) if abs(across) > abs(down) else -torch.atan(across / down))
    return torch.stack(angles)


@pytest.mark.parametrize("sides", [(96, 96), (96, 192), (192, 96)])
def test_rectangles_are_turned_without_being_sheared(sides):
    lying, standing = torch.ones(24, 3, *sides), torch.ones(24, 3, *sides)
    middle_row, middle_column = sides[0] // 2, sides[1] // 2
    lying[:, :, middle_row - 3 : middle_row + 3, middle_column - 25 : middle_column + 25] = -1
    standing[:, :, middle_row - 25 : middle_row + 25, middle_column - 3 : middle_column + 3] = -1
    first, second = (bar_angles(augment_images(x, generator(), probability=1.0)) for x in (lying, standing))
    assert first.abs().max() > 0.1
    torch.testing.assert_close(first, second, atol=0.003, rtol=0)


def test_white_stays_white():
    white = torch.ones(8, 3, 16, 16)
    torch.testing.assert_close(augment_images(white, generator(), probability=1.0), white)


def test_corners_are_filled_with_the_mirrored_image_where_asked():
    black = -torch.ones(32, 3, 16, 16)
    assert (augment_images(black, generator(), probability=1.0) == 1).any()
    reflected = augment_images(black, generator(), probability=1.0, fill="reflection")
    # colours still change a little
    assert reflected.max() < -0.7
    with pytest.raises(ValueError, match="fill='mirror'"):
        augment_images(black, fill="mirror")


def test_the_share_of_changed_images_is_the_probability():
    images = torch.rand(2000, 3, 8, 8, generator=generator()) * 2 - 1
    for probability in (0.0, 0.25, 1.0):
        result = augment_images(images, generator(), probability=probability)
        changed = (result != images).flatten(1).any(dim=1).float().mean().item()
        assert changed == pytest.approx(probability, abs=0.05)


def test_images_are_never_mirrored(images):
    # the square lies at the top right, and the changes are too small to move it anywhere else
    result = augment_images(images, generator(), probability=1.0)
    darkness = (1 - result).mean(dim=1)
    assert (darkness[:, :16, 16:].sum(dim=(1, 2)) > 0.8 * darkness.sum(dim=(1, 2))).all()


def test_integer_images_are_refused(images):
    with pytest.raises(ValueError, match="uint8"):
        augment_images((images * 127).to(torch.uint8))
