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
"""Image processor of MoMa, PIL backend."""

from transformers.image_processing_backends import PilBackend
from transformers.processing_utils import ImagesKwargs, Unpack

from .image_input_moma import MomaImageInputMixin


# trf-ignore: TRF057, documented by hand
class MomaImageProcessorPil(MomaImageInputMixin, PilBackend):
    r"""Resizes, crops and rescales images for the VQ model (PIL backend, for where torchvision is missing).

    Arguments and pixels are those of [`MomaImageProcessor`].
    """

    def __init__(self, **kwargs: Unpack[ImagesKwargs]):
        super().__init__(**kwargs)


__all__ = ["MomaImageProcessorPil"]
