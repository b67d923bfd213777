# SPDX-License-Identifier: Apache-2.0
"""How much of the time that pictures take to become codes is the encoder's convolutions: the floor of tokenizing.

python -m benchmarks.picture_tokenizing
"""

import argparse
import statistics
from collections.abc import Sequence

from PIL import Image

import modeling_moma  # noqa: F401, so that the Auto classes know the picture tokenizer
from benchmarks.speed.clock import seconds, threads
from benchmarks.speed.profiles import own_seconds
from tokenization import MomaProcessor


def convolution_share(processor: MomaProcessor, pictures: list[Image.Image], rounds: int) -> tuple[float, float]:
    """
    The share, and pictures a second.

    The operations are timed by a profiler, which slows everything else: the whole is timed without it, in turns.
    """

    def encode() -> None:
        processor.encode_pictures(pictures)

    encode()
    shares, times = [], []
    for _ in range(rounds):
        times.append(seconds(encode, "cpu"))
        own = own_seconds(encode, "cpu", repeats=1)
        shares.append(sum(value for name, value in own.items() if "convolution" in name) / times[-1])
    return statistics.median(shares), len(pictures) / statistics.median(times)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.picture_tokenizing", description=__doc__)
    parser.add_argument("--model", default="model_cards/moma-emoji", help="a folder with a processor")
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    processor = MomaProcessor.from_pretrained(args.model)
    side = processor.vq_model.config.resolution
    pictures = [Image.effect_noise((side, side), 100).convert("RGB") for _ in range(args.pictures)]
    with threads(args.threads):
        share, rate = convolution_share(processor, pictures, args.rounds)
    print(f"{args.pictures} pictures of {side} pixels, {args.threads} thread(s), medians of {args.rounds} rounds:")
    print(f"{rate:.1f} pictures a second; convolutions take {share:.0%} of the time.")


if __name__ == "__main__":
    main()
