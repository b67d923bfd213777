# SPDX-License-Identifier: Apache-2.0
"""Small text models with random weights, as conversions find them, and faults in their files."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config


SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True, rms_norm_eps=1e-3),
    "llama-wide-heads": LlamaConfig(**SIZES, head_dim=12, attention_bias=True),
    "llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE, hidden_act="gelu"),
    "llama-yarn": LlamaConfig(**SIZES, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
    "qwen2": Qwen2Config(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen2-released": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "qwen3-biased": Qwen3Config(**SIZES, head_dim=16, attention_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
}
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is <image>? "},
    {"role": "assistant", "content": "A place\nfor an image."},
]
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are helpful<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save_source(folder: Path, config, tokenizer, dtype=torch.float32, **kwargs):
    """A random text model with its tokenizer; large weights, so that differences would show."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float(name.endswith("norm.weight")), std=0.2)
    model.to(dtype).save_pretrained(folder, **kwargs)
    tokenizer.save_pretrained(folder)
    return model


def assert_nothing_written(folder: Path, name="moma"):
    assert not [path for path in folder.iterdir() if name in path.name]


def edit_config(source: Path, **fields):
    config = json.loads((source / "config.json").read_text()) | fields
    (source / "config.json").write_text(json.dumps(config))


def edit_tensors(source: Path, key: str, edit):
    """Applies `edit(tensors, key)` to the shard that holds a key."""
    index = json.loads((source / "model.safetensors.index.json").read_text())
    shard = source / index["weight_map"][key]
    tensors = load_file(shard)
    edit(tensors, key)
    save_file(tensors, shard)
    index["weight_map"] = {name: place for name, place in index["weight_map"].items() if place != shard.name}
    index["weight_map"] |= dict.fromkeys(tensors, shard.name)
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
