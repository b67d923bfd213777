# SPDX-License-Identifier: Apache-2.0
"""Make a random text model of the shape of SmolLM2-135M, to try a conversion where the real one cannot be had."""

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_moma.data.sources import source_texts
from modeling_moma.training.recipe import read_recipe
from modeling_moma.utils.atomic_files import write_folder_aside
from tokenization import train_text_tokenizer


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="recipes/emoji.yaml", help="whose captions the tokenizer learns from")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True)
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)
    tokenizer = train_text_tokenizer(source_texts(read_recipe(args.recipe).sources, 1_000_000), vocab_size=2000)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=args.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        initializer_range=0.041666666666666664,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)

    def write(folder: Path):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    write_folder_aside(args.output, write)
    print(f"{args.output}: {model.num_parameters():,} random parameters")


if __name__ == "__main__":
    main()
