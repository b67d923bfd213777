# SPDX-License-Identifier: Apache-2.0
"""Training examples of the emoji data: a caption and a picture's codes, in either order."""

import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_from_disk

from .. import MomaConfig


TAG_CAPTION_SHARE = 0.25
UNCONDITIONAL_SHARE = 0.1


def label_caption(style: str, label: str) -> str:
    """The caption of a picture, `"noto: red apple"`."""
    return f"{style}: {label}"


def tag_caption(style: str, keywords: list[str]) -> str:
    """A further caption made of keywords, `"noto tags: fruit, red"`; never mistaken for a label."""
    return f"{style} tags: {', '.join(keywords)}"


def caption_texts(split: Dataset) -> list[str]:
    """All captions of a split, what the text tokenizer is trained on."""
    texts = []
    for style, label, keywords in zip(split["style"], split["label"], split["keywords"]):
        texts.append(label_caption(style, label))
        if keywords:
            texts.append(tag_caption(style, keywords))
    return texts


class CaptionExamples(torch.utils.data.Dataset):
    """A stream of examples in which the index decides everything, so a resumed run sees what the killed one would.

    A picture-first example is `<bos> picture caption <eos>`, the other kind `<bos> caption picture <eos>`. A quarter
    of the captions are keywords; a tenth of the text-first examples have no caption, which guidance needs.

    Args:
        codes: columns `codes` (augmented codings of one picture, `[A, image_seq_length]`), `style`, `label`,
            `keywords`.
        processor: gives the ids.
        length: examples of the stream; each pass over the pictures has an order of its own.
        seed: of everything random.
    """

    def __init__(self, codes: Dataset, processor, length: int, seed: int = 0):
        self.codes = np.asarray(codes.with_format("numpy")["codes"], dtype=np.int64)
        self.columns = list(zip(codes["style"], codes["label"], codes["keywords"]))
        self.processor = processor
        self.length, self.seed = length, seed
        self._epoch, self._order = -1, np.arange(0)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        epoch, place = divmod(index, len(self.columns))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.columns))
        rng = np.random.default_rng([self.seed, 1, index])
        row = self._order[place]
        style, label, keywords = self.columns[row]
        codes = self.codes[row, rng.integers(self.codes.shape[1])]
        picture_first = rng.random() < 0.5
        text = label_caption(style, label)
        if keywords and rng.random() < TAG_CAPTION_SHARE:
            text = tag_caption(style, list(rng.permutation(keywords)))
        if not picture_first and rng.random() < UNCONDITIONAL_SHARE:
            text = ""
        return {"input_ids": example_ids(self.processor, text, codes, picture_first)}


def load_codes(folder: str) -> DatasetDict:
    """The splits that `moma tokenize` has written."""
    return load_from_disk(folder)  # pyright: ignore[reportReturnType]


def held_out_examples(codes: Dataset, processor) -> list[dict[str, list[int]]]:
    """Both orders of every picture, un-augmented (the first coding), with its label: what losses are measured on."""
    first = np.asarray(codes.with_format("numpy")["codes"], dtype=np.int64)[:, 0]
    rows = list(zip(first, codes["style"], codes["label"]))
    return [
        {"input_ids": example_ids(processor, label_caption(style, label), picture, picture_first)}
        for picture_first in (True, False)
        for picture, style, label in rows
    ]


def example_ids(processor, text: str, codes: np.ndarray, picture_first: bool) -> list[int]:
    """Token ids of one example.

    Args:
        processor: gives tokenizer and the ids of a picture.
        text: the caption, may be empty.
        codes: `[image_seq_length]`.
        picture_first: the order of the two.
    """
    tokenizer = processor.tokenizer
    picture = processor.picture_ids(codes)
    words = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    middle = [*picture, *words] if picture_first else [*words, *picture]
    return [tokenizer.bos_token_id, *middle, tokenizer.eos_token_id]


def evenly_spaced(examples: list, number: int | None) -> list:
    """So many of the examples; all where there are not more, or without a number."""
    number = min(number or len(examples), len(examples))
    return [examples[index * len(examples) // number] for index in range(number)]


def check_layout(config: MomaConfig, layout: dict):
    """Raise `ValueError` where a saved model reads token ids otherwise than the processor writes them."""
    for name, value in layout.items():
        # rows of the embedding beyond the tokenizer's tokens do no harm
        is_fine = getattr(config, name) >= value if name == "vocab_size" else getattr(config, name) == value
        if not is_fine:
            raise ValueError(
                f"`--model` has {name} = {getattr(config, name)}, the processor's is {value}: were they made together?"
            )
