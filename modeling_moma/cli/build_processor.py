# SPDX-License-Identifier: Apache-2.0
"""Join a picture tokenizer and a text tokenizer, trained on captions, into one processor."""

import argparse

import torch
from datasets import load_dataset

from tokenization import MomaImageProcessor, MomaProcessor, MomaVQModel, add_picture_tokens, train_text_tokenizer

from ..training.chat import CHAT_TEMPLATE
from ..training.examples import caption_texts
from ..training.files import write_folder_aside


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True, help="folder of a trained MomaVQModel")
    parser.add_argument("--data", required=True, help="data set whose training captions the BPE learns from")
    parser.add_argument(
        "--vocab-size", type=int, default=2000, help="text tokens, before the picture tokens are added"
    )
    parser.add_argument("--output", required=True, help="folder for the processor")
    args = parser.parse_args()

    # rounded to bf16 as the released weights are, so that the codes of the training data are those of the release
    vq_model = MomaVQModel.from_pretrained(args.tokenizer, dtype=torch.bfloat16)
    tokenizer = train_text_tokenizer(caption_texts(load_dataset(args.data, split="train")), args.vocab_size)
    tokenizer = add_picture_tokens(tokenizer, vq_model.config.num_embeddings)
    # prompts of a batch have to end side by side
    tokenizer.padding_side = "left"
    image_processor = MomaImageProcessor.for_resolution(vq_model.config.resolution)
    processor = MomaProcessor(image_processor, tokenizer, vq_model, chat_template=CHAT_TEMPLATE)
    write_folder_aside(args.output, processor.save_pretrained)
    print(f"{args.output}: {len(tokenizer)} tokens, {processor.image_seq_length} a picture")
