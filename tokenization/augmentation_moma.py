# SPDX-License-Identifier: Apache-2.0
"""Random shifts, scales, rotations and colours of images, a whole batch at a time, on tensors."""

import math

import torch
import torch.nn.functional as F

from .processor_errors_moma import InputError


MAX_ROTATION = math.radians(8)
# The largest shift, in halves of the side.
MAX_SHIFT = 0.1
SCALES = (0.9, 1.15)
FILLS = ("white", "reflection")
# The darkness of each colour channel is scaled by a factor between 1 minus this and 1 plus this.
MAX_COLOUR_SHIFT = 0.12
# Random numbers drawn for each image of three channels.
NUM_DRAWS = 8


def augment_images(
    pixel_values: torch.Tensor,
    generator: torch.Generator | None = None,
    probability: float = 0.75,
    fill: str = "white",
) -> torch.Tensor:
    r"""Shift, scale and rotate images and vary their colours, each by a small random amount.

    White stays white. Nothing is mirrored: flags, letters and arrows would change their meaning.

    Args:
        pixel_values (`torch.FloatTensor` of shape `(batch_size, channels, height, width)`):
            Images in [-1, 1] on a white background.
        generator (`torch.Generator`, *optional*):
            Source of the random numbers, a CPU generator; by default the global one. Equal states give equal images.
        probability (`float`, *optional*, defaults to 0.75):
            Share of the images that is augmented.
        fill (`str`, *optional*, defaults to `"white"`):
            How pixels from outside the image are filled: `"white"`, or `"reflection"` for the image mirrored at its
            edges, which suits photos.

    Returns:
        `torch.FloatTensor` of the same shape, in [-1, 1].

    Raises:
        ValueError: `pixel_values` is not a batch of floating-point images, or `fill` is unknown.
    """
    if fill not in FILLS:
        raise InputError(f"fill={fill!r} is unknown; use one of {FILLS}.")
    if pixel_values.ndim != 4 or not pixel_values.is_floating_point():
        raise InputError(
            "pixel_values must be floating-point of shape (batch_size, channels, height, width), got "
            f"{pixel_values.dtype} of {tuple(pixel_values.shape)}."
        )
    batch_size, channels = pixel_values.shape[:2]
    # numbers in [-1, 1), a row for each image; drawn on the CPU so that every device gets the same
    draws = torch.rand(batch_size, 5 + channels, generator=generator).to(pixel_values) * 2 - 1
    is_augmented = draws[:, 0] < probability * 2 - 1
    angle = draws[:, 1] * MAX_ROTATION
    middle, spread = sum(SCALES) / 2, (SCALES[1] - SCALES[0]) / 2
    # the grid maps the result's positions to the source's, so it holds the inverse of the scale
    inverse = 1 / (middle + spread * draws[:, 2])
    cosine, sine, shift = angle.cos() * inverse, angle.sin() * inverse, draws[:, 3:5] * MAX_SHIFT
    # both axes of the grid are 2 long, whatever the sides of an image are
    aspect = pixel_values.shape[2] / pixel_values.shape[3]
    across, down = [cosine, -sine * aspect, shift[:, 0]], [sine / aspect, cosine, shift[:, 1]]
    matrix = torch.stack([torch.stack(across, dim=1), torch.stack(down, dim=1)], dim=1)
    grid = F.affine_grid(matrix, list(pixel_values.shape), align_corners=False)
    # white has a darkness of 0, so the zeros of the padding become white
    padding = "zeros" if fill == "white" else "reflection"
    darkness = F.grid_sample(1 - pixel_values, grid, mode="bilinear", padding_mode=padding, align_corners=False)
    gain = 1 + MAX_COLOUR_SHIFT * draws[:, 5:]
    result = (1 - darkness * gain[:, :, None, None]).clamp(-1, 1)
    return torch.where(is_augmented[:, None, None, None], result, pixel_values)
