# SPDX-License-Identifier: Apache-2.0
"""Tests of the image tokenizer's configuration."""

import pytest
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig

from tokenization.configuration_moma_vq import MomaVQConfig


def test_defaults_are_those_of_chameleon():
    ours, theirs = MomaVQConfig(), ChameleonVQVAEConfig()
    names = ChameleonVQVAEConfig.__annotations__.keys() & MomaVQConfig.__annotations__.keys()
    assert len(names) == 12 and ours.downsample_factor == 16
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}


@pytest.mark.parametrize(
    ("name", "resolution", "codes"), [("small", 64, 64), ("medium-256", 256, 256), ("medium-1024", 256, 1024)]
)
def test_presets_give_their_number_of_codes(name, resolution, codes):
    config = MomaVQConfig.from_preset(name, num_embeddings=7)
    assert config.resolution == resolution and (config.resolution // config.downsample_factor) ** 2 == codes
    # overrides win
    assert config.num_embeddings == 7


def test_an_unknown_preset_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'tiny'.*full.*small"):
        MomaVQConfig.from_preset("tiny")


@pytest.mark.parametrize(
    "fields",
    [
        {"norm_type": "batch"},
        {"attn_type": "linear"},
        {"double_latent": True},
        {"resolution": 100},
        {"base_channels": 48},
        {"codebook_decay": 1.0},
        {"codebook_decay": 0.0},
        {"num_embeddings": 0},
        {"embed_dim": 0},
        {"num_res_blocks": 0},
        {"patch_size": 0},
        {"semantic_dim": 0},
        {"channel_multiplier": []},
        {"channel_multiplier": [1, 0]},
        {"dropout": 1.0},
        {"beta": -0.1},
        {"perceptual_weight": -1.0},
        {"base_channels": "many"},
    ],
)
def test_an_invalid_field_is_named(fields):
    (name,) = fields
    with pytest.raises(Exception, match=name):
        MomaVQConfig(**fields)
