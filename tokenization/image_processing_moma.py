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
"""Image processor of MoMa, torchvision backend."""

from transformers.image_processing_backends import TorchvisionBackend
from transformers.processing_utils import ImagesKwargs, Unpack

from .image_input_moma import MomaImageInputMixin


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

    def __init__(self, **kwargs: Unpack[ImagesKwargs]):
        super().__init__(**kwargs)


__all__ = ["MomaImageProcessor"]
