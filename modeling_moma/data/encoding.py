# SPDX-License-Identifier: Apache-2.0
"""Token ids of documents: what stands in a caption or a text is never a special token."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tokenization import MomaProcessor


# of an image processor, what decides on pixels
PIXEL_SETTINGS = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)


class DocumentEncoder:
    """
    Makes documents of texts and of the codes of pictures.

    Args:
        processor: gives tokenizer and the ids of a picture.
    """

    def __init__(self, processor: MomaProcessor):
        self.processor = processor
        layout = processor.token_layout()
        self.bos: int = layout["bos_token_id"]
        self.eos: int = layout["eos_token_id"]
        self._backend = plain_backend(processor.tokenizer)

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text, without any that begin or end it; `<image>` and the like are characters in it."""
        return self._backend.encode(text, add_special_tokens=False).ids if text else []

    def caption(self, text: str, codes: Any, picture_first: bool) -> list[int]:
        """`<bos> picture caption <eos>`, or `<bos> caption picture <eos>`, of codes `[image_seq_length]`."""
        picture, words = self.processor.picture_ids(codes), self.text_ids(text)
        middle = [*picture, *words] if picture_first else [*words, *picture]
        return [self.bos, *middle, self.eos]

    def document(self, parts: Sequence[Any]) -> list[int]:
        """`<bos> ... <eos>` of texts, and of codes `[image_seq_length]` wherever a part is none."""
        ids = [self.bos]
        for part in parts:
            ids += self.text_ids(part) if isinstance(part, str) else self.processor.picture_ids(part)
        return [*ids, self.eos]


def plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the tokenizer that reads special tokens in a text as the characters that they are."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def processor_fingerprint(processor: MomaProcessor) -> str:
    """A hash of all that decides on the ids of texts and pictures: tokenizer, image processor and VQ weights."""
    digest = hashlib.sha256(plain_backend(processor.tokenizer).to_str().encode())
    settings = processor.image_processor.to_dict()
    kept = {name: settings.get(name) for name in PIXEL_SETTINGS}
    digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, values in sorted(processor.vq_model.state_dict().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(values.float().cpu().numpy()).tobytes())
    return digest.hexdigest()[:32]


__all__ = ["PIXEL_SETTINGS", "DocumentEncoder", "plain_backend", "processor_fingerprint"]
