# SPDX-License-Identifier: Apache-2.0
"""Files that visitors bring: which of them are pictures that can be used."""

from pathlib import Path

from PIL import Image

from tokenization.image_input_moma import clean_pil_picture, open_picture


MOST_BYTES = 10 * 2**20
MOST_PIXELS = 40_000_000
TOO_MANY_PIXELS = f"This picture has more than {MOST_PIXELS // 10**6} million pixels: make it smaller."


def read_upload(path: str, folder: str) -> Image.Image:
    """
    Opens, checks and decodes an uploaded picture.

    Args:
        path: of the file, as the visitor's browser names it.
        folder: where uploads lie; a request made by hand may name any file of this machine.

    Returns:
        The picture, upright, in an 8-bit mode.

    Raises:
        ValueError: it was not uploaded, is no picture, damaged, empty or too large; says so to the visitor, without
            naming files here.
    """
    if not Path(path).resolve().is_relative_to(Path(folder).resolve()):
        raise ValueError("This file was not uploaded to this page.")
    try:
        picture = open_picture(path)
    except Exception as error:
        # Pillow itself refuses sizes that it takes for an attack
        if isinstance(error.__cause__, Image.DecompressionBombError):
            raise ValueError(TOO_MANY_PIXELS) from error
        raise ValueError(
            "This file is not a picture that can be read: it is damaged or of another kind. Take a PNG, JPEG, WebP or "
            "GIF file."
        ) from error
    # by the header: a small file may hold more pixels than there is memory
    if picture.width * picture.height > MOST_PIXELS:
        raise ValueError(TOO_MANY_PIXELS)
    try:
        return clean_pil_picture(picture)
    except Exception as error:
        raise ValueError("This picture cannot be decoded: the file is truncated or damaged.") from error


__all__ = ["MOST_BYTES", "MOST_PIXELS", "read_upload"]
