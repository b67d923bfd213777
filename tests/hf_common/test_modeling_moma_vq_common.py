# SPDX-License-Identifier: Apache-2.0
"""Transformers' own common model tests, run against the VQ model."""

import tempfile
import unittest

import torch
from transformers import set_seed
from transformers_common_tests.test_modeling_common import ModelTesterMixin

from helpers.hf_overrides import AveragedVQOverrides, VQOverrides
from tokenization import MomaVQConfig, MomaVQModel


class MomaVQModelTester:
    """A tiny configuration and images, with the attributes that the mixin reads."""

    batch_size = 3
    is_training = True

    def __init__(self, parent, **fields):
        self.parent = parent
        self.fields = fields

    def get_config(self):
        layout = {
            "resolution": 16,
            "channel_multiplier": [1, 2],
            "base_channels": 32,
            "latent_channels": 32,
            "embed_dim": 8,
            "num_embeddings": 32,
            "num_res_blocks": 1,
        }
        return MomaVQConfig(**{**layout, **self.fields})

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        shape = (self.batch_size, config.in_channels, config.resolution, config.resolution)
        inputs = {"pixel_values": torch.rand(shape) * 2 - 1}
        if config.semantic_dim is not None:
            inputs["semantic_targets"] = torch.randn(self.batch_size, config.semantic_dim)
        return config, inputs


class MomaVQCommonTests(ModelTesterMixin):
    all_model_classes = (MomaVQModel,)
    fields = {}

    def setUp(self):
        super().setUp()
        set_seed(0)
        self.model_tester = MomaVQModelTester(self, **self.fields)


class ChameleonVQModelTest(VQOverrides, MomaVQCommonTests, unittest.TestCase):
    """The layout of Chameleon: norms, attention, a codebook trained by gradient."""

    fields = {"attn_resolutions": [8]}


class SmallVQModelTest(AveragedVQOverrides, MomaVQCommonTests, unittest.TestCase):
    """The layout of moma-emoji: no norms, a codebook of moving averages, trunk and semantic head."""

    fields = {
        "channel_multiplier": [1],
        "patch_size": 4,
        "norm_type": "none",
        "attn_type": None,
        "codebook_decay": 0.98,
        "use_trunk": True,
        "semantic_dim": 5,
    }

    def test_what_gets_no_gradient_asks_for_none_when_built_and_when_loaded(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        built = MomaVQModel(config)
        with tempfile.TemporaryDirectory() as folder:
            built.save_pretrained(folder)
            loaded, info = MomaVQModel.from_pretrained(folder, output_loading_info=True)
        self.assertFalse(info["missing_keys"])
        for model in (built, loaded, MomaVQModel.from_pretrained(None, config=config, state_dict=built.state_dict())):
            model(**inputs).loss.backward()
            frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
            self.assertEqual(frozen, {name for name, weight in model.named_parameters() if weight.grad is None})
            self.assertIn("quantize.embedding.weight", frozen)
            self.assertIn("encoder.trunk.stem.weight", frozen)
