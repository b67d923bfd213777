# SPDX-License-Identifier: Apache-2.0
"""Token ids of documents: what stands in a caption or a text is never a special token; and captions as a chat."""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tokenization import MomaProcessor
from tokenization.codecs_moma import save_codecs
from tokenization.text_tokenizer_moma import IMAGE, beginning_ids, message_text, with_beginning

from ..errors_moma import InputError
from ..hub.loading import open_processor


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


def caption_chat_template(modalities: Sequence[str] = (IMAGE,), has_bos: bool = True) -> str:
    """Return the chat template for a model that learnt captions and nothing else.

    A message of the user and its answer are one training example, `<bos> image caption <eos>` or `<bos> caption image
    <eos>`. What a system message says has no place in one.
    """
    beginning = "bos_token + " if has_bos else ""
    return (
        "{% for message in messages %}" + message_text(modalities) + "{% if message['role'] == 'user' %}"
        "{{ " + beginning + "(turn.text | trim) }}"
        "{% elif message['role'] == 'assistant' %}"
        "{% generation %}{{ (turn.text | trim) + eos_token }}{% endgeneration %}"
        "{% endif %}"
        "{% endfor %}"
    )


def has_caption_template(processor: MomaProcessor) -> bool:
    """Return whether a processor's chat template is that of captions alone."""
    return processor.chat_template in [
        caption_chat_template(list(processor.frames), has_bos) for has_bos in (True, False)
    ]


def template_digest(processor: MomaProcessor) -> str:
    """Return a hash of a processor's chat template, which decides on the documents of chats."""
    return hashlib.sha256(json.dumps(processor.chat_template).encode()).hexdigest()[:32]


class DocumentEncoder:
    """Makes documents of texts and of the codes of images.

    They begin as a prompt does: with what the tokenizer puts before a text, `<bos>` or nothing.
    """

    def __init__(self, processor: MomaProcessor):
        self.processor = processor
        self.beginning = beginning_ids(processor.tokenizer)
        # asked once, as documents are made by the thousand
        self._alone = with_beginning(processor.tokenizer, [])
        self.eos: int = processor.token_layout()["eos_token_id"]
        self._backend = plain_backend(processor.tokenizer)
        tokenizer = processor.tokenizer
        for token, number in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids):
            # what is unknown in a text may be anything, and ends nothing
            if number != tokenizer.unk_token_id and number in self.text_ids(token):
                raise InputError(
                    f"the processor's text tokenizer, a {type(self._backend.model).__name__}, reads {token!r} in a "
                    "text as the special token, so that a text could end its document: take one whose vocabulary "
                    "does not give special tokens as words, as byte-pair encodings do."
                )

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a text, without any that begin or end it; `<image>` and the like are characters in it."""
        return self._backend.encode(text, add_special_tokens=False).ids if text else []

    def caption(self, text: str, codes: Any, image_first: bool) -> list[int]:
        """Return the ids of `<bos> image caption <eos>`, or of `<bos> caption image <eos>`.

        An image of no caption, second, has `<bos>` before it whatever the tokenizer, as the prompt `""` has.
        """
        return self.pair(IMAGE, text, codes, image_first)

    def pair(self, modality: str, text: str, codes: Any, text_second: bool) -> list[int]:
        """Return the ids of a document of an item, such as a sound, and its text."""
        item, words = self.processor.frame_ids(modality, codes), self.text_ids(text)
        first, second = (item, words) if text_second else (words, item)
        return [*self.opened(first), *second, self.eos]

    def opened(self, ids: Sequence[int]) -> list[int]:
        """Return the ids of the first part of a document with what comes before it, see [`with_beginning`]."""
        return [*self.beginning, *ids] or self._alone

    def document(self, parts: Sequence[Any]) -> list[int]:
        """Return the ids of `<bos> ... <eos>` of texts, and of codes `[image_seq_length]` where a part is none."""
        ids = [*self.beginning]
        for part in parts:
            ids += self.text_ids(part) if isinstance(part, str) else self.processor.image_ids(part)
        return [*ids, self.eos]


@functools.lru_cache(maxsize=1)
def loaded_encoder(folder: str) -> tuple[DocumentEncoder, str]:
    """Return a processor, loaded once in every process, and its fingerprint."""
    processor = open_processor(folder)
    fingerprint = processor_fingerprint(processor)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with_channels_last(processor)
    return DocumentEncoder(processor.to(device)), fingerprint


def with_channels_last(processor: MomaProcessor) -> MomaProcessor:
    """Lay the weights of a processor's image tokenizer out as CPUs convolve faster with, and return the processor."""
    # convolutions over time have five dimensions, which this format has not
    if all(weight.ndim != 5 for weight in processor.vq_model.parameters()):
        processor.vq_model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return processor


def plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Return a copy of the tokenizer that reads special tokens in a text as the characters that they are."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def processor_fingerprint(processor: MomaProcessor) -> str:
    """Return a hash of all that decides on ids: tokenizer, image processor, VQ weights, and files of other codecs."""
    digest = hashlib.sha256(plain_backend(processor.tokenizer).to_str().encode())
    settings = processor.image_processor.to_dict()
    kept = {name: settings.get(name) for name in PIXEL_SETTINGS}
    if settings.get("do_pad"):
        kept["do_pad"] = True
    digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, values in sorted(processor.vq_model.state_dict().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(values.float().cpu().numpy()).tobytes())
    if processor.codecs:
        with TemporaryDirectory() as folder:
            save_codecs(processor.codecs, folder)
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file():
                    digest.update(str(path.relative_to(folder)).encode())
                    digest.update(path.read_bytes())
    return digest.hexdigest()[:32]
