# SPDX-License-Identifier: Apache-2.0
"""What a decoder's configuration in Transformers and `MomaConfig` call by the same name."""

SAME_NAMED_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_dropout",
    "tie_word_embeddings",
)
