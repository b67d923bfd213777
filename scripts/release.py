# SPDX-License-Identifier: Apache-2.0
"""Put a trained model and its processor into one folder as they go to the Hub, without code: bf16, routers in fp32."""

import argparse
import sys
from pathlib import Path

import torch

from modeling_moma.data.examples import check_layout
from modeling_moma.errors_moma import InputError
from modeling_moma.hub.loading import open_model, open_processor, require_plain_weights
from modeling_moma.utils.atomic_files import check_writable, write_folder_aside


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a trained MomaForCausalLM")
    parser.add_argument("--processor", required=True, help="folder of its MomaProcessor")
    parser.add_argument("--output", required=True)
    args = parser.parse_args(arguments)
    try:
        release(args.model, args.processor, args.output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def release(model_folder: str, processor_folder: str, output: str):
    """
    Writes the folder of a release.

    Args:
        model_folder: of a trained `MomaForCausalLM`.
        processor_folder: of its `MomaProcessor`.
        output: the folder that is written.

    Raises:
        InputError: either cannot be opened, lacks weights or has some that are not finite, or they are no pair.
    """
    check_writable(output)
    model = open_model(model_folder, dtype=torch.bfloat16)
    require_plain_weights("--model", model_folder, model.config)
    # noise belongs to a stage of training; whoever trains the release further sets it anew
    model.config.gumbel_noise, model.config.gumbel_noise_steps = 0.0, None
    processor = open_processor(processor_folder)
    check_layout(model.config, processor.token_layout())
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

    write_folder_aside(output, save)


if __name__ == "__main__":
    sys.exit(main())
