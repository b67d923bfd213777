# SPDX-License-Identifier: Apache-2.0
"""Renders icons, colours the monochrome ones, and reduces images to what near-identity is measured on."""

import hashlib
import io

import numpy as np
from PIL import Image

from icons_recipe.animation import settle
from image_sets.iconify import icon_svg


RESOLUTION = 64
WEBP_QUALITY = 90
COLOURS = {
    "black": (0, 0, 0),
    "red": (214, 40, 40),
    "orange": (240, 130, 20),
    "yellow": (240, 195, 20),
    "green": (40, 150, 60),
    "teal": (20, 150, 150),
    "blue": (40, 90, 210),
    "purple": (130, 60, 180),
    "pink": (235, 100, 165),
    "brown": (130, 80, 45),
    "grey": (128, 128, 128),
}
BLACK_SHARE = 1 / 3
GREY_SIDE = 16

_BRIGHTNESS = np.array((0.299, 0.587, 0.114))


def choose_colour(prefix: str, icon: str) -> str:
    """Returns the colour of a monochrome icon, by a hash of set and name: a third is black, the rest is even."""
    digest = hashlib.sha256(f"{prefix}:{icon}".encode()).digest()
    if int.from_bytes(digest[:4]) < BLACK_SHARE * 2**32:
        return "black"
    others = [name for name in COLOURS if name != "black"]
    return others[int.from_bytes(digest[4:8]) % len(others)]


def render_icon(icon_set: dict, icon: dict) -> np.ndarray:
    """Renders an icon with black as its current colour, on white, in the middle: uint8 of shape (64, 64, 3)."""
    # whoever measures a model has no icons to render
    import resvg_py

    document = settle(icon_svg(icon_set, icon, size=RESOLUTION).replace("currentColor", "#000"))
    png = resvg_py.svg_to_bytes(svg_string=document, background="#ffffff", skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def is_grey(pixels: np.ndarray) -> bool:
    """Tells whether an image has no colour but black, white and what lies between."""
    return bool((pixels == pixels[..., :1]).all())


def paint(pixels: np.ndarray, colour: str) -> np.ndarray:
    """Replaces black by a colour of `COLOURS`, and the greys by its lighter shades."""
    ink = (255 - pixels.astype(np.float32)) / 255 * (255 - np.array(COLOURS[colour], dtype=np.float32))
    return (255 - ink).round().astype(np.uint8)


def unpaint(pixels: np.ndarray, colour: str) -> np.ndarray:
    """Returns an image of a colour of `COLOURS` in black: the inverse of `paint`, but for what files lose."""
    ink = 255 - np.array(COLOURS[colour], dtype=np.float32)
    # the share of ink by least squares over the channels
    share = np.clip((255 - pixels.astype(np.float32)) @ ink / (ink @ ink), 0, 1)
    return np.repeat((255 * (1 - share)).round().astype(np.uint8)[..., None], 3, axis=-1)


def encode(pixels: np.ndarray) -> bytes:
    """Returns an image as a lossy WebP file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="WEBP", quality=WEBP_QUALITY, method=4)
    return buffer.getvalue()


def decode(webp: bytes) -> np.ndarray:
    """Returns the RGB pixels of a stored image, uint8 of shape (64, 64, 3)."""
    return np.asarray(Image.open(io.BytesIO(webp)).convert("RGB"))


def small_grey(pixels: np.ndarray, colour: str | None = None) -> np.ndarray:
    """
    Reduces an image to 16x16 grey values, as if it had been drawn in black.

    Args:
        pixels: uint8 of shape (64, 64, 3).
        colour: the colour of `COLOURS` that the image is painted in. By default its own colours turn to grey.

    Returns:
        uint8 of shape (256,), 255 for white.
    """
    # lossy files blur colours more than brightness
    ink = (255 - pixels.astype(np.float64)) @ _BRIGHTNESS
    if colour is not None:
        ink = np.clip(ink / ((255 - np.array(COLOURS[colour])) @ _BRIGHTNESS), 0, 1) * 255
    step = RESOLUTION // GREY_SIDE
    blocks = ink.reshape(GREY_SIDE, step, GREY_SIDE, step).mean(axis=(1, 3))
    return (255 - blocks).round().astype(np.uint8).reshape(-1)


def image_hash(pixels: np.ndarray) -> str:
    """Returns the sha256 of a stored image's RGB pixels, in hexadecimal."""
    return hashlib.sha256(pixels.tobytes()).hexdigest()
