# Copyright 2026 The modeling-moma authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Put a trained model and its processor into one folder as they go to the Hub, without code: bf16, routers in fp32."""

import argparse
from pathlib import Path

import torch

from modeling_moma import MomaForCausalLM
from modeling_moma.training.files import write_folder_aside
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
