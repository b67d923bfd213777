# SPDX-License-Identifier: Apache-2.0
"""Reading of images of any kind, and pixel values back to images: shared by both image processor backends."""

import base64
import binascii
import errno
import functools
import math
import os
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling, SizeDict, is_pil_image, is_valid_image
from transformers.utils import logging

from .large_images_moma import (
    apply_orientation,
    load_reduced,
    refuse_costly_files,
    shrink_by_averaging,
    shrink_factor,
    to_8_bits,
)
from .processor_errors_moma import InputError


if TYPE_CHECKING:
    # the mixin stands before either backend, and either has the methods that it calls
    from transformers.image_processing_backends import TorchvisionBackend as _Backend
else:
    _Backend = object

logger = logging.get_logger(__name__)

_URL_TIMEOUT_SECONDS = 60
# Formats that Pillow decodes itself, in memory; for others it starts programs, such as Ghostscript for EPS.
_FORMATS = frozenset("AVIF BMP DIB GIF ICNS ICO JPEG JPEG2000 MPO PCX PNG PPM QOI SGI TGA TIFF WEBP".split())
# The ends of a side that is longer than this many times the other are cropped before resizing.
_MAX_ASPECT_RATIO = 8


def open_image(source: str) -> Image.Image:
    """Open an image from a path, an `http(s)://` address, a `data:image/...` address or a base64 string.

    Unlike `transformers.image_utils.load_image` the mode of the file is kept, so that transparency and 16-bit values
    reach the image processor.
    """
    is_file = os.path.isfile(source)
    is_address = not is_file and source.startswith(("http://", "https://"))
    if is_file:
        data = Path(source).read_bytes()
    elif is_address:
        data = _fetch(source)
    else:
        data = _decode_base64(source)
    refuse_costly_files(data, repr(source[:200]))
    try:
        image = Image.open(BytesIO(data), formats=_known_formats())
    # decoders raise errors of any type
    except Exception as error:
        subject = "the file" if is_file or is_address else "no such file exists, and as base64 it"
        # of a file that Pillow does not know it says no more than where its bytes lie in memory
        detail = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        is_large = isinstance(error, Image.DecompressionBombError)
        why = "too large" if is_large else "truncated, damaged or of another kind"
        raise InputError(
            f"images: {source[:200]!r} cannot be opened as an image: {subject} is {why}{detail}."
        ) from error
    if is_file:
        # errors name the file by this attribute
        image.filename = source
    return image


def _fetch(address: str) -> bytes:
    try:
        with urlopen(address, timeout=_URL_TIMEOUT_SECONDS) as response:
            return response.read()
    # a server that closes the connection raises an error of both kinds
    except OSError as error:
        # which of several addresses it is, the error does not say
        kind = URLError if isinstance(error, URLError) else type(error)
        raise kind(f"{address[:200]!r} cannot be fetched: {error}") from error
    except (HTTPException, ValueError) as error:
        raise InputError(
            f"images: {address[:200]!r} cannot be fetched ({error!r}): it is malformed, or its server broke off."
        ) from error


def _decode_base64(source: str) -> bytes:
    encoded = source.partition(",")[2] if source.startswith("data:image/") else source
    # encoders break lines, and use either alphabet with or without padding
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


def holds_items(value: Any) -> bool:
    """Return whether a value is a list of items or, as a column of a data set, read like one; no item itself."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def iter_image_sources(images: Any) -> Iterator:
    """Yield the images of a nested list one by one, without opening any."""
    if isinstance(images, (str, os.PathLike)) or is_pil_image(images):
        yield images
    elif holds_items(images):
        for entry in images:
            yield from iter_image_sources(entry)
    elif is_valid_image(images):
        if images.ndim > 3:
            yield from (image for entry in images for image in iter_image_sources(entry))
        else:
            yield images
    else:
        raise TypeError(
            "images: expected PIL images, arrays, tensors, paths or addresses (or lists of them), got "
            f"{type(images).__name__}."
        )


def clean_pil_image(image: Image.Image, is_own: bool = False) -> Image.Image:
    """Decode a PIL image, turn it upright (EXIF orientation) and scale 16-bit greyscale to 8 bits.

    An image of more than 33 million pixels becomes smaller, so that it does not take gigabytes of memory: a JPEG that
    nobody else holds is decoded to a half, a quarter or an eighth of its sides, of others squares of pixels are
    averaged. Neither side gets shorter than 2,048 pixels by that.
    """
    try:
        if is_own:
            load_reduced(image)
        else:
            image.load()
        factor = shrink_factor(image.size)
        if factor == 1:
            image = apply_orientation(image)
    # decoders raise errors of any type
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        name = getattr(image, "filename", "") or "an image from memory"
        raise InputError(f"images: {name} cannot be decoded, the file is truncated or damaged ({error}).") from error
    if 0 in image.size:
        raise InputError(f"images: got an empty image of size {image.size}.")
    return to_8_bits(image) if factor == 1 else shrink_by_averaging(image, factor)


def clean_array_image(image: "np.ndarray | torch.Tensor", do_rescale: bool | None) -> "np.ndarray | torch.Tensor":
    """Bring an image given as an array to 8-bit integers, or to 32-bit floats where no rescaling follows."""
    if 0 in image.shape:
        raise InputError(f"images: got an empty image of shape {tuple(image.shape)}.")
    if isinstance(image, torch.Tensor):
        if image.dtype == torch.uint8:
            # elsewhere it would be resized by another filter, and get other codes
            return image.cpu()
        tensor = image.detach().cpu()
        # NumPy has no bfloat16
        values = tensor.numpy() if not tensor.is_floating_point() else tensor.float().numpy()
    else:
        values = image
    if values.dtype.kind not in "biuf":
        raise InputError(f"images: an image of type {values.dtype} holds no real numbers, so these cannot be colours.")
    is_float = np.issubdtype(values.dtype, np.floating)
    if is_float and not np.isfinite(values).all():
        raise InputError("images: an image holds NaN or infinite values.")
    if is_float and not do_rescale:
        return values.astype(np.float32)
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    # of either byte order
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return np.round(values / 257.0).astype(np.uint8)
    if values.min() < 0 or values.max() > 255:
        raise InputError(
            f"images: an image of type {values.dtype} holds values from {values.min()} to {values.max()}; expected 0 "
            "to 255, or the type uint16 for 16-bit values."
        )
    if is_float and values.max() <= 1.0:
        logger.warning_once(
            "An image of floating point values from 0 to 1 is about to be divided by 255. Pass values from 0 to "
            "255, or `do_rescale=False`."
        )
    # resizing rounds and clips only 8-bit values
    return np.round(values).astype(np.uint8)


class MomaImageInputMixin(_Backend):
    """Reading and writing of images for [`MomaImageProcessor`] and [`MomaImageProcessorPil`].

    It stands before a Transformers backend class in the list of bases.
    """

    do_convert_rgb: bool = True
    do_resize: bool = True
    # a dictionary here, a `SizeDict` with attributes once a backend has read it
    size: Any = {"shortest_edge": 64}
    default_to_square: bool = False
    resample = PILImageResampling.LANCZOS
    do_center_crop: bool = True
    crop_size: Any = {"height": 64, "width": 64}
    do_pad: bool = False
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: list[float] = [0.5, 0.5, 0.5]
    image_std: list[float] = [0.5, 0.5, 0.5]

    @classmethod
    def for_resolution(cls, resolution: int | tuple[int, int], **kwargs) -> Self:
        """Build an image processor for a VQ model of a resolution."""
        height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
        crop = {"height": height, "width": width}
        return cls(size={"shortest_edge": min(height, width)}, crop_size=crop, **kwargs)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Replace every path, address or base64 string in a (nested) list by the PIL image that it names.

        Args:
            image_url_or_urls (`str`, `PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a nested list of these):
                The images.

        Returns:
            The same structure, with images in place of names.

        Raises:
            TypeError: an entry is neither an image nor the name of one.
            ValueError: a name leads to no image.
        """
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(entry) for entry in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, os.PathLike)):
            image = open_image(os.fspath(image_url_or_urls))
            # Pillow keeps a decoded image in its object, and the list keeps the object: large ones are reduced first
            return image if shrink_factor(image.size) == 1 else clean_pil_image(image, is_own=True)
        if is_valid_image(image_url_or_urls):
            # an array without a channel axis is greyscale, which Transformers does not take for an image
            is_flat = not is_pil_image(image_url_or_urls) and image_url_or_urls.ndim == 2
            return image_url_or_urls[None] if is_flat else image_url_or_urls
        raise TypeError(
            "images: expected PIL images, arrays, tensors, paths or addresses (or lists of them), got "
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
        do_pad: bool | None = None,
        **kwargs,
    ) -> Any:
        """Turn one image into the backend's channels-first array.

        It is brought to 8 bits, transparency composited on white. Of a side much longer than the other the far ends,
        which the centre crop drops, are left out before resizing; for a crop that is no square, all that lies outside
        of the largest box of its shape.
        """
        cropped = size if do_resize and do_center_crop and not do_pad else None
        fills = cropped is not None and _fills(cropped, crop_size)
        ratio = 0 if cropped is None or fills else _max_ratio(cropped, crop_size)

        def box(height: int, width: int) -> tuple[int, int, int, int]:
            if fills:
                return _box_of_shape(height, width, crop_size.height, crop_size.width)
            return _centre_box(height, width, ratio) if ratio else (0, 0, height, width)

        if is_pil_image(image):
            image = clean_pil_image(image)
            top, left, bottom, right = box(image.height, image.width)
            if (bottom - top, right - left) != (image.height, image.width):
                image = image.crop((left, top, right, bottom))
            return super().process_image(image, do_rescale=do_rescale, **kwargs)
        array = self._process_array(clean_array_image(image, do_rescale), do_rescale=do_rescale, **kwargs)
        top, left, bottom, right = box(array.shape[-2], array.shape[-1])
        return array[..., top:bottom, left:right]

    def _process_array(self, image: Any, **kwargs) -> Any:
        try:
            return super().process_image(image, **kwargs)
        # of the base class, which does not name what it was given
        except ValueError as error:
            raise InputError(
                f"images: an array of shape {tuple(image.shape)} is no image ({error}): its first or last axis has "
                "1, 3 or 4 channels."
            ) from error

    def _preprocess(self, images: list, *args, **kwargs) -> BatchFeature:
        size, crop_size = kwargs.get("size"), kwargs.get("crop_size")
        if kwargs.pop("do_pad", None) and kwargs.get("do_resize") and crop_size is not None:
            images = [self._padded(image, crop_size, kwargs.get("resample")) for image in images]
            kwargs["do_resize"] = kwargs["do_center_crop"] = False
        # the backend pads with black, behind the crop
        kwargs["do_pad"] = False
        is_cropped = kwargs.get("do_resize") and kwargs.get("do_center_crop")
        if is_cropped and size is not None and crop_size is not None and _fills(size, crop_size):
            # the images have this shape up to less than a pixel
            kwargs["size"] = SizeDict(height=crop_size.height, width=crop_size.width)
        return super()._preprocess(images, *args, **kwargs)

    def _padded(self, image: Any, crop_size: Any, resample: Any) -> Any:
        """Return an image resized as a whole to fit into `crop_size`, in the middle of white.

        It is resized first: a strip of one pixel's width, padded to a square as it is, would take gigabytes.
        """
        height, width = image.shape[-2:]
        scale = min(crop_size.height / height, crop_size.width / width)
        rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
        resized = self.resize(image, SizeDict(height=rows, width=columns), resample=resample)
        values = torch.as_tensor(resized)
        white = 1 if values.is_floating_point() else 255
        padded = values.new_full((*values.shape[:-2], crop_size.height, crop_size.width), white)
        top, left = (crop_size.height - rows) // 2, (crop_size.width - columns) // 2
        padded[..., top : top + rows, left : left + columns] = values
        return padded.numpy() if isinstance(resized, np.ndarray) else padded

    def resize(self, image: Any, size: SizeDict, **kwargs) -> Any:
        """Resize as the backend does, floating point values quantised to 256 steps of their range.

        The range is at least [0, 1]. Without it filters overshoot, and PIL guesses the range.
        """
        is_array = isinstance(image, np.ndarray)
        values: torch.Tensor = torch.from_numpy(image) if is_array else image
        if not values.is_floating_point():
            return super().resize(image, size, **kwargs)
        # a range for each image, so that it does not depend on the rest of the batch
        low = values.amin((-3, -2, -1), keepdim=True).clamp(max=0)
        width = values.amax((-3, -2, -1), keepdim=True).clamp(min=1) - low
        steps = ((values - low) / width * 255).round().to(torch.uint8)
        given: Any = steps.numpy() if is_array else steps
        resized = super().resize(given, size, **kwargs)
        values = torch.as_tensor(resized).to(values.dtype) / 255 * width + low
        return values.numpy() if is_array else values

    def postprocess(self, images: torch.Tensor, return_tensors: str = "PIL.Image.Image") -> BatchFeature:
        """Turn pixel values, such as those of a VQ decoder, back into images.

        It undoes normalising and rescaling. Values outside the range are clipped.

        Args:
            images (`torch.Tensor` or `np.ndarray` of shape `(batch_size, 3, height, width)` or `(3, height, width)`):
                Pixel values as `preprocess` returns them: in [-1, 1] by default.
            return_tensors (`str`, *optional*, defaults to `"PIL.Image.Image"`):
                `"PIL.Image.Image"` for a list of PIL images, `"pt"` or `"np"` for 8-bit integers of shape
                `(batch_size, 3, height, width)`.

        Returns:
            `BatchFeature`: with one field, `pixel_values`.

        Raises:
            ValueError: the shape is wrong, or a value is not finite.
        """
        images = torch.as_tensor(images, device="cpu").detach().float()
        images = images[None] if images.ndim == 3 else images
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputError(f"images: expected the shape (batch_size, 3, height, width), got {tuple(images.shape)}.")
        if not torch.isfinite(images).all():
            raise InputError("images: the pixel values hold NaN or infinity; the VQ weights may be damaged.")
        if self.do_normalize:
            std = images.new_tensor(self.image_std).view(1, 3, 1, 1)
            mean = images.new_tensor(self.image_mean).view(1, 3, 1, 1)
            images = images * std + mean
        if self.do_rescale:
            images = images / self.rescale_factor
        pixels = images.round().clamp(0, 255).to(torch.uint8)
        if return_tensors == "PIL.Image.Image":
            pil_images = [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).contiguous().numpy()]
            return BatchFeature(data={"pixel_values": pil_images})
        return BatchFeature(data={"pixel_values": pixels}, tensor_type=return_tensors)


def _fills(size: SizeDict, crop_size: Any) -> bool:
    """Return whether a crop that is no square is to be filled: a shortest edge alone leaves a part of it black."""
    if not size.shortest_edge or size.longest_edge or crop_size.height == crop_size.width:
        return False
    return size.shortest_edge == min(crop_size.height, crop_size.width)


def _box_of_shape(height: int, width: int, rows: int, columns: int) -> tuple[int, int, int, int]:
    """Return top, left, bottom and right of the largest centred box of the shape of `rows` x `columns`."""
    box_height = min(height, max(1, round(width * rows / columns)))
    box_width = min(width, max(1, round(height * columns / rows)))
    top, left = (height - box_height) // 2, (width - box_width) // 2
    return top, left, top + box_height, left + box_width


def _max_ratio(size: SizeDict, crop_size: Any) -> int:
    """Return the aspect ratio beyond which the ends of an image are sure to be cropped, 0 where none is."""
    if not size.shortest_edge or size.longest_edge:
        return 0
    return max(_MAX_ASPECT_RATIO, 2 * math.ceil(max(crop_size.height, crop_size.width) / size.shortest_edge))


def _centre_box(height: int, width: int, ratio: int) -> tuple[int, int, int, int]:
    """Return top, left, bottom and right of the centre.

    A strip one pixel wide is a file of some bytes, and resized as a whole would take gigabytes.
    """
    longest = ratio * min(height, width)
    # the same parity as the whole, so that the centre stays where it is
    rows = longest + (height - longest) % 2 if height > longest else height
    columns = longest + (width - longest) % 2 if width > longest else width
    top, left = (height - rows) // 2, (width - columns) // 2
    return top, left, top + rows, left + columns
