# SPDX-License-Identifier: Apache-2.0
"""Turn the pictures of a data set into codes, training pictures in several augmented codings."""

import argparse

import torch
from datasets import DatasetDict, load_dataset

import modeling_moma  # noqa: F401, without it a processor that lies beside a model asks to run the model's code
from tokenization import MomaProcessor
from tokenization.augmentation_moma import augment_pictures

from ..training.files import replace_folder
from ..training.precision import supports_bf16


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processor", required=True, help="folder of a MomaProcessor")
    parser.add_argument(
        "--data", required=True, help="data set with a column `image`, and a split named train to augment"
    )
    parser.add_argument("--codings", type=int, default=9, help="codings of a training picture; the first is plain")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True, help="folder for the data set of codes")
    args = parser.parse_args(arguments)

    processor = MomaProcessor.from_pretrained(args.processor)
    generator = torch.Generator().manual_seed(args.seed)

    @torch.inference_mode()
    def encode(batch, num_codings):
        pictures = processor.image_processor(batch["image"], return_tensors="pt")["pixel_values"]
        codings = [processor.vq_model.get_image_tokens(pictures)]
        # augmented codings are noise by intent, so the faster precision serves
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=supports_bf16("cpu")):
            while len(codings) < num_codings:
                codings.append(processor.vq_model.get_image_tokens(augment_pictures(pictures, generator, 1.0)))
        return {"codes": torch.stack(codings, dim=1).tolist()}

    result = DatasetDict()
    for name, split in load_dataset(args.data).items():
        result[name] = split.map(
            encode,
            batched=True,
            batch_size=args.batch_size,
            fn_kwargs={"num_codings": args.codings if name == "train" else 1},
            remove_columns=["image"],
            # the generator's state is no part of the fingerprint
            load_from_cache_file=False,
            desc=f"{name}: pictures to codes",
        )
    # whole, and nothing of another processor's codes beside it
    replace_folder(args.output, result.save_to_disk)
