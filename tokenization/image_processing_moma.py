# Copyright 2026 The modeling-moma authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Image processors of MoMa: images of any kind to pixel values, by torchvision or PIL, and back."""

import math
import os
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling, SizeDict, is_pil_image, is_valid_image

from .image_input_moma import clean_array_image, clean_pil_image, open_image, shrink_factor
from .processor_errors_moma import InputError


# the mixin stands before either backend, and either has the methods that it calls
_Backend = TorchvisionBackend if TYPE_CHECKING else object

# The ends of a side that is longer than this many times the other are cropped before resizing.
_MAX_ASPECT_RATIO = 8


# trf-ignore: TRF057, documented by the two processors
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
        size: Any = None,
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
        cropped = size if do_resize and do_center_crop and not do_pad else SizeDict()
        if is_pil_image(image):
            image = clean_pil_image(image)
            top, left, bottom, right = _kept_box(image.height, image.width, cropped, crop_size)
            if (bottom - top, right - left) != (image.height, image.width):
                image = image.crop((left, top, right, bottom))
            return super().process_image(image, do_rescale=do_rescale, **kwargs)
        image = clean_array_image(image, do_rescale)
        try:
            array = super().process_image(image, do_rescale=do_rescale, **kwargs)
        # of the base class, which does not name what it was given
        except ValueError as error:
            raise InputError(
                f"images: an array of shape {tuple(image.shape)} is no image ({error}): its first or last axis has "
                "1, 3 or 4 channels."
            ) from error
        top, left, bottom, right = _kept_box(array.shape[-2], array.shape[-1], cropped, crop_size)
        return array[..., top:bottom, left:right]

    def _preprocess(self, images: list, *args, **kwargs) -> BatchFeature:
        size: Any = kwargs["size"]
        crop_size: Any = kwargs["crop_size"]
        if kwargs.pop("do_pad", None) and kwargs.get("do_resize") and kwargs["crop_size"] is not None:
            images = [self._padded(image, crop_size, kwargs.get("resample")) for image in images]
            kwargs["do_resize"] = kwargs["do_center_crop"] = False
        # the backend pads with black, behind the crop
        kwargs["do_pad"] = False
        if kwargs.get("do_resize") and kwargs.get("do_center_crop") and _fills(size, crop_size):
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


def _kept_box(height: int, width: int, size: SizeDict, crop_size: Any) -> tuple[int, int, int, int]:
    """Return top, left, bottom and right of the middle of an image outside of which the crop keeps nothing.

    A strip one pixel wide is a file of some bytes, and resized as a whole would take gigabytes.
    """
    rows, columns = height, width
    if _fills(size, crop_size):
        rows = min(height, max(1, round(width * crop_size.height / crop_size.width)))
        columns = min(width, max(1, round(height * crop_size.width / crop_size.height)))
    elif size.shortest_edge and not size.longest_edge:
        crop_ratio = math.ceil(max(crop_size.height, crop_size.width) / size.shortest_edge)
        longest = max(_MAX_ASPECT_RATIO, 2 * crop_ratio) * min(height, width)
        # the same parity as the whole, so that the centre stays where it is
        rows = min(height, longest + (height - longest) % 2)
        columns = min(width, longest + (width - longest) % 2)
    top, left = (height - rows) // 2, (width - columns) // 2
    return top, left, top + rows, left + columns


# trf-ignore: TRF057, documented by hand
class MomaImageProcessor(MomaImageInputMixin, TorchvisionBackend):
    r"""Resizes, crops and rescales images for the VQ model (torchvision backend).

    The shortest edge is resized with Lanczos filtering and the centre is cropped to a square, as Chameleon does: of an
    image that is not square the ends of the longer side are lost. With `do_pad` it is kept whole. Greyscale, palette,
    16-bit greyscale and transparent images become 8-bit RGB, transparency composited on white.

    Args:
        do_convert_rgb (`bool`, *optional*, defaults to `True`):
            Whether to convert every image to RGB.
        do_resize (`bool`, *optional*, defaults to `True`):
            Whether to resize.
        size (`dict[str, int]`, *optional*, defaults to `{"shortest_edge": 64}`):
            Length of the shortest edge after resizing, in pixels.
        resample (`PILImageResampling`, *optional*, defaults to `LANCZOS`):
            Filter used when resizing.
        do_center_crop (`bool`, *optional*, defaults to `True`):
            Whether to crop the centre.
        crop_size (`dict[str, int]`, *optional*, defaults to `{"height": 64, "width": 64}`):
            Height and width after cropping, in pixels. It must equal the resolution of the VQ model.
        do_pad (`bool`, *optional*, defaults to `False`):
            Whether to resize images to fit into `crop_size`, whole and in the middle of white, in place of cropping
            them; images of the shape of `crop_size` stay the same. It does nothing without `do_resize`.
        do_rescale (`bool`, *optional*, defaults to `True`):
            Whether to multiply by `rescale_factor`.
        rescale_factor (`float`, *optional*, defaults to 1 / 255):
            Factor that brings 8-bit values to [0, 1].
        do_normalize (`bool`, *optional*, defaults to `True`):
            Whether to subtract `image_mean` and divide by `image_std`.
        image_mean (`list[float]`, *optional*, defaults to `[0.5, 0.5, 0.5]`):
            Mean per channel. With the default `image_std` the result lies in [-1, 1].
        image_std (`list[float]`, *optional*, defaults to `[0.5, 0.5, 0.5]`):
            Standard deviation per channel.
    """


# trf-ignore: TRF057, documented by hand
class MomaImageProcessorPil(MomaImageInputMixin, PilBackend):
    r"""Resizes, crops and rescales images for the VQ model (PIL backend, for where torchvision is missing).

    Arguments and pixels are those of [`MomaImageProcessor`].
    """


__all__ = ["MomaImageProcessor", "MomaImageProcessorPil"]
