# SPDX-License-Identifier: Apache-2.0
"""What both image processor backends share: reading pictures of any kind, and pixel values back to pictures."""

import base64
import binascii
import errno
import functools
import math
import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling, SizeDict, is_pil_image, is_valid_image
from transformers.utils import logging

from .large_pictures_moma import load_small, shrink_factor, shrunk_upright, to_8_bits, upright
from .processor_errors_moma import InputError


if TYPE_CHECKING:
    # or the other one
    from transformers.image_processing_backends import TorchvisionBackend as _Backend
else:
    _Backend = object

logger = logging.get_logger(__name__)

_URL_TIMEOUT_SECONDS = 60
# what Pillow decodes by itself, in memory; others start programs, such as Ghostscript for EPS
_FORMATS = frozenset("AVIF BMP DIB GIF ICNS ICO JPEG JPEG2000 MPO PCX PNG PPM QOI SGI TGA TIFF WEBP".split())
# sides of a picture may differ by this factor before the ends of the longer one, which the crop drops, are not resized
_LARGEST_RATIO = 8


def open_picture(source: str) -> Image.Image:
    """
    Opens a picture from a path, an `http(s)://` address, a `data:image/...` address or a base64 string.

    Unlike `transformers.image_utils.load_image` the mode of the file is kept, so that transparency and 16-bit values
    reach the image processor.

    Args:
        source (`str`):
            Where the picture is.

    Returns:
        `PIL.Image.Image`: the picture, not decoded yet; it keeps no file open.

    Raises:
        ValueError: if `source` is none of the four, or what it holds is no picture.
        OSError: if the address or the file cannot be read.
    """
    is_file = os.path.isfile(source)
    is_address = not is_file and source.startswith(("http://", "https://"))
    if is_file:
        data = Path(source).read_bytes()
    elif is_address:
        with urlopen(source, timeout=_URL_TIMEOUT_SECONDS) as response:
            data = response.read()
    else:
        data = _from_base64(source)
    try:
        image = Image.open(BytesIO(data), formats=_known_formats())
    # a decoder may fail in any way
    except Exception as error:
        subject = "the file" if is_file or is_address else "no such file exists, and as base64 it"
        raise InputError(
            f"images: {source[:200]!r} cannot be opened as a picture: {subject} is truncated, damaged or of "
            f"another kind ({error})."
        ) from error
    if is_file:
        # what errors name
        image.filename = source
    return image


def _from_base64(source: str) -> bytes:
    encoded = source.partition(",")[2] if source.startswith("data:image/") else source
    # tools break lines, and write either alphabet with or without padding
    encoded = "".join(encoded.split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(
            f"images: {source[:200]!r} is neither an existing file, an http(s) address, a data:image address "
            "nor a base64 string."
        ) from error


@functools.cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(_FORMATS.intersection(Image.OPEN))


def flat_sources(images: Any) -> Iterator:
    """
    Yields the pictures of a nested list one by one, without opening any.

    Args:
        images (`str`, `os.PathLike`, `PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a nested list of these):
            Arrays of four dimensions hold several pictures.

    Raises:
        TypeError: if an entry is none of these.
    """
    if isinstance(images, (list, tuple)):
        for entry in images:
            yield from flat_sources(entry)
    elif isinstance(images, (str, os.PathLike)) or is_pil_image(images):
        yield images
    elif is_valid_image(images):
        if images.ndim > 3:
            yield from (picture for entry in images for picture in flat_sources(entry))
        else:
            yield images
    else:
        raise TypeError(
            "images: expected PIL pictures, arrays, tensors, paths or addresses (or lists of them), got "
            f"{type(images).__name__}."
        )


def clean_pil_picture(image: Image.Image) -> Image.Image:
    """
    Decodes a PIL picture, turns it upright (EXIF orientation) and scales 16-bit greyscale to 8 bits.

    A picture of more than 33 million pixels comes out smaller, neither side below 2,048 pixels by that, so that it
    takes no gigabytes: a JPEG is decoded to a half, a quarter or an eighth, of others squares of pixels are averaged.

    Args:
        image (`PIL.Image.Image`):
            A picture of any mode. Modes `I` and `I;16*` are read as 16-bit greyscale, 0 to 65535.

    Returns:
        `PIL.Image.Image`: the picture, in an 8-bit mode.

    Raises:
        ValueError: if the file ends too early or is damaged, if the picture is empty, or if its values have no known
            range (mode `F`, or mode `I` outside 0 to 65535).
    """
    try:
        load_small(image)
        factor = shrink_factor(image.size)
        if factor == 1:
            image = upright(image)
    # a decoder may fail in any way
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        name = getattr(image, "filename", "") or "a picture from memory"
        raise InputError(f"images: {name} cannot be decoded, the file is truncated or damaged ({error}).") from error
    if 0 in image.size:
        raise InputError(f"images: got an empty picture of size {image.size}.")
    return to_8_bits(image) if factor == 1 else shrunk_upright(image, factor)


def clean_array_picture(image: "np.ndarray | torch.Tensor", do_rescale: bool | None) -> "np.ndarray | torch.Tensor":
    """
    Brings a picture given as an array to 8-bit integers, or to 32-bit floats where nothing rescales them later on.

    Args:
        image (`np.ndarray` or `torch.Tensor`):
            Booleans, 8-bit integers, unsigned 16-bit integers (scaled to 8 bits), other integers from 0 to 255, or
            floating point numbers of any width: from 0 to 255 with `do_rescale`, rounded.
        do_rescale (`bool`, *optional*):
            Whether the image processor divides by 255 later on, which makes floats from 0 to 1 nearly black.

    Returns:
        `np.ndarray` or `torch.Tensor`: the picture.

    Raises:
        ValueError: if the picture is empty, or holds NaN, infinity, complex numbers, or values outside 0 to 255 where
            they are about to be divided by 255.
    """
    if 0 in image.shape:
        raise InputError(f"images: got an empty picture of shape {tuple(image.shape)}.")
    if isinstance(image, torch.Tensor):
        if image.dtype == torch.uint8:
            return image
        tensor = image.detach().cpu()
        # NumPy has no bfloat16
        values = tensor.numpy() if not tensor.is_floating_point() else tensor.float().numpy()
    else:
        values = image
    if np.issubdtype(values.dtype, np.complexfloating):
        raise InputError(f"images: a picture of type {values.dtype} holds complex numbers, which are no colours.")
    is_float = np.issubdtype(values.dtype, np.floating)
    if is_float and not np.isfinite(values).all():
        raise InputError("images: a picture holds NaN or infinite values.")
    if is_float and not do_rescale:
        return values.astype(np.float32)
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype == np.uint16:
        return np.round(values / 257.0).astype(np.uint8)
    if values.min() < 0 or values.max() > 255:
        raise InputError(
            f"images: a picture of type {values.dtype} holds values from {values.min()} to {values.max()}; expected 0 "
            "to 255, or the type uint16 for 16-bit values."
        )
    if is_float and values.max() <= 1.0:
        logger.warning_once(
            "A picture of floating point values from 0 to 1 is about to be divided by 255. Pass values from 0 to "
            "255, or `do_rescale=False`."
        )
    # resizing rounds and clips 8-bit values alone
    return np.round(values).astype(np.uint8)


class MomaImageInputMixin(_Backend):
    """
    Reading and writing of pictures for [`MomaImageProcessor`] and [`MomaImageProcessorPil`]. It stands before a
    Transformers backend class in the list of bases.
    """

    do_convert_rgb: bool = True
    do_resize: bool = True
    # what backends make of it has attributes
    size: Any = {"shortest_edge": 64}
    default_to_square: bool = False
    resample = PILImageResampling.LANCZOS
    do_center_crop: bool = True
    crop_size: Any = {"height": 64, "width": 64}
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: list[float] = [0.5, 0.5, 0.5]
    image_std: list[float] = [0.5, 0.5, 0.5]

    @classmethod
    def for_resolution(cls, resolution: int, **kwargs) -> Self:
        """
        An image processor for a VQ model of this resolution.

        Args:
            resolution (`int`):
                `vq_model.config.resolution`, in pixels.
            kwargs:
                Further fields.
        """
        crop = {"height": resolution, "width": resolution}
        return cls(size={"shortest_edge": resolution}, crop_size=crop, **kwargs)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """
        Replaces every path, address or base64 string in a (nested) list by the PIL picture that it names.

        Args:
            image_url_or_urls (`str`, `PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a nested list of these):
                The pictures.

        Returns:
            The same structure, holding pictures only.
        """
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(entry) for entry in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, os.PathLike)):
            picture = open_picture(os.fspath(image_url_or_urls))
            # the list of all pictures would keep a large one as it was decoded
            return picture if shrink_factor(picture.size) == 1 else clean_pil_picture(picture)
        if is_valid_image(image_url_or_urls):
            # an array without a channel axis is greyscale, which the library takes for no picture at all
            is_flat = not is_pil_image(image_url_or_urls) and image_url_or_urls.ndim == 2
            return image_url_or_urls[None] if is_flat else image_url_or_urls
        raise TypeError(
            "images: expected PIL pictures, arrays, tensors, paths or addresses (or lists of them), got "
            f"{type(image_url_or_urls).__name__}."
        )

    def process_image(
        self,
        image: Any,
        do_rescale: bool | None = None,
        do_resize: bool | None = None,
        size: SizeDict | None = None,
        do_center_crop: bool | None = None,
        crop_size: Any = None,
        **kwargs,
    ) -> Any:
        """
        Turns one picture into the backend's channels-first array, after bringing it to 8 bits. Transparency is
        composited on white. Of a line of pixels the far ends, which the crop drops, are left out.
        """
        ratio = _ratio_kept(size, crop_size) if do_resize and do_center_crop and size is not None else 0
        if is_pil_image(image):
            image = clean_pil_picture(image)
            if ratio:
                top, left, bottom, right = _middle(image.height, image.width, ratio)
                image = image.crop((left, top, right, bottom))
            return super().process_image(image, do_rescale=do_rescale, **kwargs)
        array = super().process_image(clean_array_picture(image, do_rescale), do_rescale=do_rescale, **kwargs)
        if ratio:
            top, left, bottom, right = _middle(array.shape[-2], array.shape[-1], ratio)
            array = array[..., top:bottom, left:right]
        return array

    def resize(self, image: Any, size: SizeDict, **kwargs) -> Any:
        """
        Resizes as the backend does; floating point values in 256 steps of their range, [0, 1] where they fit into it.

        Filters overshoot floats, and PIL guesses their range.
        """
        is_array = isinstance(image, np.ndarray)
        values: torch.Tensor = torch.from_numpy(image) if is_array else image
        if not values.is_floating_point():
            return super().resize(image, size, **kwargs)
        # of each picture, whatever others are resized with it
        low = values.amin((-3, -2, -1), keepdim=True).clamp(max=0)
        width = values.amax((-3, -2, -1), keepdim=True).clamp(min=1) - low
        steps = ((values - low) / width * 255).round().to(torch.uint8)
        given: Any = steps.numpy() if is_array else steps
        resized = super().resize(given, size, **kwargs)
        values = torch.as_tensor(resized).to(values.dtype) / 255 * width + low
        return values.numpy() if is_array else values

    def postprocess(self, images: torch.Tensor, return_tensors: str = "PIL.Image.Image") -> BatchFeature:
        """
        Turns pixel values, such as a VQ decoder gives, back into pictures. It undoes normalising and rescaling; what
        lies outside the range is clipped.

        Args:
            images (`torch.Tensor` or `np.ndarray` of shape `(batch_size, 3, height, width)` or `(3, height, width)`):
                Pixel values as `preprocess` returns them: in [-1, 1] by default.
            return_tensors (`str`, *optional*, defaults to `"PIL.Image.Image"`):
                `"PIL.Image.Image"` for a list of PIL pictures, `"pt"` or `"np"` for 8-bit integers of shape
                `(batch_size, 3, height, width)`.

        Returns:
            `BatchFeature` with one field, `pixel_values`.

        Raises:
            ValueError: if the shape is another one or a value is not finite.
        """
        images = torch.as_tensor(images).detach().float().cpu()
        images = images[None] if images.ndim == 3 else images
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputError(f"images: expected the shape (batch_size, 3, height, width), got {tuple(images.shape)}.")
        if not torch.isfinite(images).all():
            raise InputError("images: the pixel values hold NaN or infinity; the VQ weights may be damaged.")
        if self.do_normalize:
            std = torch.tensor(self.image_std).view(1, 3, 1, 1)
            mean = torch.tensor(self.image_mean).view(1, 3, 1, 1)
            images = images * std + mean
        if self.do_rescale:
            images = images / self.rescale_factor
        pixels = images.round().clamp(0, 255).to(torch.uint8)
        if return_tensors == "PIL.Image.Image":
            pictures = [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).contiguous().numpy()]
            return BatchFeature(data={"pixel_values": pictures})
        return BatchFeature(data={"pixel_values": pixels}, tensor_type=return_tensors)


def _ratio_kept(size: SizeDict, crop_size: Any) -> int:
    """By how much one side of a picture may exceed the other before the rest is certain to be cropped; 0: never."""
    if not size.shortest_edge or size.longest_edge:
        return 0
    return max(_LARGEST_RATIO, 2 * math.ceil(max(crop_size.height, crop_size.width) / size.shortest_edge))


def _middle(height: int, width: int, ratio: int) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of the middle: a line of pixels, resized whole, takes gigabytes for some bytes."""
    longest = ratio * min(height, width)
    # of the same parity, so that the centre stays where it is
    rows = longest + (height - longest) % 2 if height > longest else height
    columns = longest + (width - longest) % 2 if width > longest else width
    top, left = (height - rows) // 2, (width - columns) // 2
    return top, left, top + rows, left + columns
