# SPDX-License-Identifier: Apache-2.0
"""Put a trained model and its processor into one folder as they go to the Hub, without code: bf16, routers in fp32."""

import argparse
from pathlib import Path

import torch

from modeling_moma import MomaForCausalLM
from modeling_moma.utils.atomic_files import write_folder_aside
from tokenization import MomaProcessor


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a trained MomaForCausalLM")
    parser.add_argument("--processor", required=True, help="folder of its MomaProcessor")
    parser.add_argument("--output", required=True)
    args = parser.parse_args(arguments)
    model = MomaForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    # noise belongs to a stage of training; whoever trains the release further sets it anew
    model.config.gumbel_noise, model.config.gumbel_noise_steps = 0.0, None
    processor = MomaProcessor.from_pretrained(args.processor)
    # what truncation and pipelines cut at
    processor.tokenizer.model_max_length = model.config.max_position_embeddings

    def save(folder: Path):
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        # the processor saves what it computes in, fp32; these values are those of bf16
        processor.vq_model.to(torch.bfloat16).save_pretrained(folder / "vq_model")
        # `moma push` adds the code of the installed packages
        for code in folder.rglob("*.py"):
            code.unlink()

    write_folder_aside(args.output, save)


if __name__ == "__main__":
    main()
