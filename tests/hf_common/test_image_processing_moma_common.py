# SPDX-License-Identifier: Apache-2.0
"""Transformers' own common image processor tests, run against both backends."""

import unittest

from transformers import set_seed
from transformers_common_tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin

from helpers.hf_overrides import ImageProcessorOverrides
from tokenization import MomaImageProcessor, MomaImageProcessorPil


class MomaImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent):
        settings = {
            "do_resize": True,
            "size": {"shortest_edge": 20},
            "do_center_crop": True,
            "crop_size": {"height": 18, "width": 18},
            "do_rescale": True,
            "do_normalize": True,
            "image_mean": [0.5, 0.4, 0.3],
            "image_std": [0.5, 0.6, 0.7],
            "do_convert_rgb": True,
        }
        super().__init__(parent, max_resolution=80, **settings)

    def _get_image_processing_classes(self):
        return {"torchvision": MomaImageProcessor, "pil": MomaImageProcessorPil}


class MomaImageProcessingTest(ImageProcessorOverrides, ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = MomaImageProcessingTester
    test_cast_dtype = True

    def setUp(self):
        super().setUp()
        set_seed(0)
