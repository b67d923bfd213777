# SPDX-License-Identifier: Apache-2.0
"""The models that Transformers' common tests are run against."""

import torch

from modeling_moma import MomaConfig, MomaForCausalLM, MomaModel


# ids 1 to 19 are text: the overfit test trains on them
LAYOUT = {
    "vocab_size": 99,
    "pad_token_id": 0,
    "bos_token_id": 90,
    "eos_token_id": 91,
    "begin_image_token_id": 92,
    "end_image_token_id": 93,
    "image_seq_length": 4,
    "modality_token_ranges": {"image": [[40, 80]]},
}


class MomaModelTester:
    """Tiny configurations and mixed batches, with the attributes that the mixins read."""

    base_model_class = MomaModel
    causal_lm_class = MomaForCausalLM
    batch_size = 3
    seq_length = 12
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    is_training = True

    def __init__(self, parent, **fields):
        self.parent = parent
        self.fields = fields

    def get_config(self):
        return MomaConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            max_position_embeddings=512,
            **{"intermediate_size": 32, **LAYOUT, **self.fields},
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        input_ids = torch.randint(1, 90, (self.batch_size, self.seq_length))
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            # used with inputs_embeds, where no ids tell the modality
            "mm_token_type_ids": ((input_ids >= 40) & (input_ids < 80)).long(),
        }
        return config, inputs
