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
"""The processor: texts, images and items of other modalities to token ids, and back."""

import base64
import copy
import os
import shutil
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.image_processing_utils import get_size_dict
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import TextInput
from transformers.utils import is_torchvision_available, logging, resolve_revision

# registers its classes: a saved processor of sounds is loaded with no module of its own
from .audio_codecs_moma import AUDIO
from .audio_input_moma import SoundError, read_sound
from .codecs_moma import ModalityCodec, check_codec, codec_types, load_codecs, save_codecs
from .image_input_moma import holds_items, iter_image_sources
from .image_processing_moma import MomaImageInputMixin, MomaImageProcessor, MomaImageProcessorPil
from .image_tokenizers_moma import (
    LibraryImageTokenizer,
    library_class,
    load_image_tokenizer,
    number_of_codes,
    own_image_size,
    pixels_per_code,
)
from .modeling_moma_vq import MomaVQModel
from .processor_errors_moma import InputError
from .text_tokenizer_moma import (
    IMAGE,
    TokenFrame,
    beginning_ids,
    default_chat_template,
    escape_special_tokens,
    is_escaped,
    name_image_token,
    replace_placeholders,
    special_beginning,
    split_frames,
    with_beginning,
)


logger = logging.get_logger(__name__)

VQ_SUBFOLDER = "vq_model"
LABEL_PAD_ID = -100
PARTS = ("image_processor", "tokenizer", "vq_model", "chat_template", "codecs")
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
# Images in one pass of the VQ model, which bounds the memory of a large batch.
ENCODE_CHUNK = 64
# the process that imported this, of which others may be forks
_PROCESS = os.getpid()


@contextmanager
def _own_threads() -> Iterator[None]:
    """Compute on one thread in a forked process: it has none of its parent's, and would wait for them forever."""
    threads = torch.get_num_threads()
    if os.getpid() == _PROCESS or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class MomaProcessorKwargs(ProcessingKwargs, total=False):
    """Arguments of a call of [`MomaProcessor`], beside those of Transformers."""

    return_labels: bool


# trf-ignore: TRF057, documented by hand
class MomaProcessor(ProcessorMixin):
    r"""Join an image processor, a text tokenizer and a VQ model.

    Each `<image>` in a text becomes `<|begin_image|>`, the `image_seq_length` codes of its image, and `<|end_image|>`,
    in `input_ids`; the model needs no pixels. The token `<|image_7|>` stands for code 7: written in a text it is that
    code, as `<eos>` is the end of a turn. Text that you do not control goes through
    [`~MomaProcessor.escape_special_tokens`].

    Other modalities have a codec each, see [`ModalityCodec`]: with `codecs={"audio": codec}` each `<audio>` becomes
    `<|begin_audio|>`, the codes of its sound, and `<|end_audio|>`, and `processor(text=..., audio=[...])` takes them.
    Codecs of sounds are [`MelCodec`] and [`LibraryAudioCodec`]; chats have parts of type `audio` then.

    The image tokenizer is a [`MomaVQModel`], or one that Transformers has: `JanusVQVAE` (that of LlamaGen) or
    `Emu3VQVAE`, whose images may be of any height and width in multiples of the pixels of a code; all images of a
    processor have one size, the `crop_size` of its image processor.

    The VQ model runs in float32, in evaluation mode, without gradients; the model that is passed in is put into that
    state. It stays on its device (the CPU after `from_pretrained`); [`~MomaProcessor.to`] moves it.

    Args:
        image_processor ([`MomaImageProcessor`] or [`MomaImageProcessorPil`]):
            Its `crop_size` must equal the resolution of a [`MomaVQModel`]; for other image tokenizers it decides on
            the size of images.
        tokenizer (`PreTrainedTokenizerFast`):
            A tokenizer with the image tokens of [`add_image_tokens`].
        vq_model ([`MomaVQModel`], `JanusVQVAE` or `Emu3VQVAE`):
            Turns pixel values into codes and back. One of Transformers is found again as `vq_model.model`.
        chat_template (`str` or `dict[str, str]`, *optional*):
            Jinja template of a conversation; by default turns of `role`, newline, content, `<eos>`, with images, and
            items of the modalities that have a codec, in any turn.
        codecs (`dict[str, ModalityCodec]`, *optional*):
            A codec for each further modality, by its name. The tokenizer needs the tokens of [`add_modality_tokens`]
            for each.

    Attributes:
        image_token (`str`):
            The placeholder of an image in a text, which never occurs in `input_ids`; its id is `image_token_id`.
        begin_image_token (`str`):
            The token before the codes of an image; its id is `begin_image_token_id`.
        end_image_token (`str`):
            The token after the codes of an image; its id is `end_image_token_id`.
        image_token_offset (`int`):
            Id of code 0.
        image_token_ids (`list[int]`):
            Ids of all codes. Begin and end of image count as text.
        image_seq_length (`int`):
            Codes of one image, the product of `image_grid`.
        image_size (`tuple[int, int]`):
            Height and width of all images, in pixels.
        image_grid (`tuple[int, int]`):
            Rows and columns of the codes of one image.
        codebook_size (`int`):
            Number of codes.
        frames (`dict[str, TokenFrame]`):
            Ids of begin, codes and end of each modality, by its name.

    Raises:
        TypeError: the VQ model or a codec is of the wrong kind.
        ValueError: the parts do not fit together.
    """

    valid_processor_kwargs = MomaProcessorKwargs
    return_labels = False
    image_token = "<image>"
    begin_image_token = "<|begin_image|>"
    end_image_token = "<|end_image|>"
    # items of the modalities with a codec, set on the copy of the processor that a call works with
    _codec_items: dict[str, list] = {}

    def __init__(
        self,
        image_processor: MomaImageInputMixin,
        tokenizer: PreTrainedTokenizerFast,
        vq_model: MomaVQModel | LibraryImageTokenizer | PreTrainedModel,
        chat_template: str | dict | None = None,
        codecs: dict[str, ModalityCodec] | None = None,
    ):
        if chat_template is None:
            chat_template = default_chat_template([IMAGE, *sorted(codecs or {})])
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.vq_model = self._take_image_tokenizer(vq_model, image_processor)
        self.codebook_size = number_of_codes(self.vq_model.config)
        self.image_seq_length = self.image_grid[0] * self.image_grid[1]
        self.codecs = dict(codecs or {})
        for modality, codec in self.codecs.items():
            check_codec(modality, codec)
        self._read_vocabulary(tokenizer)

    def _take_image_tokenizer(self, vq_model: Any, image_processor: MomaImageInputMixin) -> Any:
        """Return the image tokenizer, made ready, and note the size and the grid of images."""
        crop, edge = image_processor.crop_size, image_processor.size.shortest_edge
        size = (crop.height, crop.width) if image_processor.do_center_crop and crop is not None else None
        # code from the Hub makes a second class of the same name, so the class says nothing
        is_own = hasattr(vq_model, "get_image_tokens") and hasattr(vq_model, "decode_image_tokens")
        if isinstance(vq_model, LibraryImageTokenizer):
            vq_model, is_own = vq_model.model, False
        if not is_own:
            library_class(vq_model)
        expected = own_image_size(vq_model.config) if is_own else size
        # a crop larger than the shortest edge would be padded with black
        if size is None or size != expected or (edge is not None and edge < min(size)):
            wanted = own_image_size(vq_model.config) or (256, 256)
            given = wanted[0] if wanted[0] == wanted[1] else wanted
            raise InputError(
                f"image_processor: shortest_edge={edge} and a crop of {size} do not fit the VQ model's resolution "
                f"{given}; build it with `{type(image_processor).__name__}.for_resolution({given})`."
            )
        self.image_size = size
        if not is_own:
            vq_model = LibraryImageTokenizer(vq_model, size)
        factor = pixels_per_code(vq_model.config)
        self.image_grid = (size[0] // factor, size[1] // factor)
        return vq_model.float().eval()

    @property
    def has_image_decoder(self) -> bool:
        """Whether codes can be turned into images."""
        return getattr(self.vq_model.config, "use_decoder", True)

    def _read_vocabulary(self, tokenizer: PreTrainedTokenizerFast) -> None:
        image = TokenFrame.from_tokenizer(
            tokenizer, IMAGE, self.codebook_size, self.image_seq_length, "the VQ model has num_embeddings"
        )
        self.frames = {IMAGE: image}
        for modality, codec in self.codecs.items():
            source = f"its codec {type(codec).__name__} has num_codes"
            self.frames[modality] = TokenFrame.from_tokenizer(
                tokenizer, modality, codec.num_codes, codec.length, source
            )
        # `MomaConfig` numbers modalities in this order
        self.frames = dict(sorted(self.frames.items()))
        if tokenizer.pad_token_id is None:
            raise InputError("tokenizer: it has no padding token; `add_image_tokens` adds one.")
        vocab = tokenizer.get_vocab()
        self.image_token_offset = image.offset
        self.image_token_id = vocab[self.image_token]
        self.begin_image_token_id = image.begin
        self.end_image_token_id = image.end
        self._vocab_size = max(vocab.values()) + 1
        # pipelines look for it there
        name_image_token(tokenizer)

    @property
    def image_token_ids(self) -> list[int]:
        """Ids of all image codes, from `image_token_offset` on."""
        return list(range(*self.frames[IMAGE].bounds))

    @property
    def unused_input_names(self) -> list[str]:
        """Names that the image processor or the tokenizer returns and the model does not take."""
        return ["pixel_values", "image_codes", "token_type_ids"]

    def to(self, device: "str | torch.device") -> "MomaProcessor":
        """Move the VQ model, and codecs that have a method `to`. What the processor returns stays on the CPU."""
        self.vq_model.to(device)
        for codec in self.codecs.values():
            if hasattr(codec, "to"):
                codec.to(device)  # pyright: ignore[reportAttributeAccessIssue]
        return self

    # trf-ignore: TRF057, documented by hand
    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        **kwargs: Unpack[MomaProcessorKwargs],
    ) -> BatchFeature:
        r"""Tokenise texts and the images, sounds and other items in them.

        Args:
            images (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `str`, or a (nested) list of these, *optional*):
                Images, paths or addresses, in the order of the placeholders. A nested list holds one list for each
                text, empty where a text has no image.
            text (`str` or `list[str]`):
                Texts, with `<image>` wherever an image stands. `""` becomes the beginning token alone,
                also where the tokenizer puts none before other texts.
            kwargs (`Any`):
                Items of each modality with a codec, by its name (`audio=[...]`): one, a list in the order of the
                placeholders, or a list of one list for each text (so no item may itself be a list). `sampling_rate`,
                that of the samples in `audio`, is compared with the codec's. Arguments of the tokenizer (`padding`,
                `padding_side`, `truncation`, `return_tensors`, ...) and the image processor, `return_labels` and
                `return_mm_token_type_ids`. `sanitize_control_tokens=True` reads what
                [`~MomaProcessor.escape_special_tokens`] has marked as plain text.

        Returns:
            `BatchFeature`: lists, or tensors of shape `(batch_size, sequence_length)` with `return_tensors`:

            - **input_ids** -- Token ids, codes included.
            - **attention_mask** -- 0 at padding.
            - **labels** -- With `return_labels=True`: `input_ids`, and -100 at padding and at the first token after
              padding, which would have to predict it.
            - **mm_token_type_ids** -- With `return_mm_token_type_ids=True`: for codes the place of their modality in
              `MomaConfig.modalities` (1 for images where they are the only one), else 0.

        Raises:
            ValueError: there is no text, the number of images or items differs from the number of placeholders
                (in total, or in a row of a nested list), truncation would cut an image or item, a row holds no
                token, escaped text comes without `sanitize_control_tokens=True`, or there is a second text
                (`text_pair`, `text_target`).
        """
        given: dict[str, Any] = dict(kwargs)
        _refuse_second_texts(given)
        processor = self._with_codec_items(given, text)
        if text is None and images is not None:
            raise InputError(
                "text: images become part of `input_ids`, so text=None has no place for them; pass "
                f"{self.image_token!r} for each image, or call `encode_images(images)` for the bare codes."
            )
        if text is not None and not isinstance(text, str):
            text = _list_of_texts(text)
        _check_texts([text] if isinstance(text, str) else text or [])
        return_labels = given.pop("return_labels", self.return_labels)
        if text is not None and given.get("add_special_tokens", True):
            text = self._fill_empty_texts(text)
        if given.get("sanitize_control_tokens") and text is not None:
            # the tokenizer adds no special tokens to marked text
            begin = special_beginning(self.tokenizer) if given.get("add_special_tokens", True) else ""
            given["add_special_tokens"] = False
            text = begin + text if isinstance(text, str) else [begin + sample for sample in text]
        features = super(MomaProcessor, processor).__call__(images=images, text=text, **given)
        if return_labels:
            features["labels"] = self._make_labels(features)
        return features

    def _fill_empty_texts(self, text: TextInput | list[TextInput]) -> TextInput | list[TextInput]:
        """Replace empty texts by the beginning token where the tokenizer would give them no token at all."""
        is_one = isinstance(text, str)
        if "" not in ([text] if is_one else text) or beginning_ids(self.tokenizer):
            return text
        opening = "".join(self.tokenizer.convert_ids_to_tokens(with_beginning(self.tokenizer, [])))
        return opening if is_one else [sample or opening for sample in text]

    def _with_codec_items(self, kwargs: dict, text: TextInput | list[TextInput] | None) -> "MomaProcessor":
        self._check_sampling_rate(kwargs)
        items = {modality: kwargs.pop(modality, None) for modality in self.codecs}
        items = {modality: value for modality, value in items.items() if value is not None}
        if not items:
            return self
        if text is None:
            modality = next(iter(items))
            raise InputError(
                f"text: what {modality}= holds becomes part of `input_ids`, so text=None has no place for it; pass "
                f"'<{modality}>' for each item, or call `encode_items({modality!r}, items)` for the bare codes."
            )
        # a copy that holds the items, since the base class would not pass them on
        processor = copy.copy(self)
        processor._codec_items = {
            modality: list(value) if holds_items(value) else [value] for modality, value in items.items()
        }
        return processor

    def _check_sampling_rate(self, kwargs: dict) -> None:
        if AUDIO not in self.codecs:
            return
        wanted = getattr(self.codecs[AUDIO], "sampling_rate", None)
        of_audio = (kwargs.get("audio_kwargs") or {}).get("sampling_rate")
        for given in (kwargs.pop("sampling_rate", None), of_audio):
            if None not in (given, wanted) and given != wanted:
                raise InputError(
                    f"sampling_rate: {given} samples of a second, and the codec of {AUDIO} takes {wanted}; resample, "
                    "or pass paths of files or `{'array': ..., 'sampling_rate': ...}`, which are resampled."
                )

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs) -> Any:
        """Turn conversations into texts or, with `tokenize=True`, into ids; sounds are read at their codec's rate."""
        rate = getattr(self.codecs.get(AUDIO), "sampling_rate", None)
        given = {**kwargs, **(kwargs.get("processor_kwargs") or {})}
        given |= given.get("audio_kwargs") or {}
        # another backend that the call asks for reads them itself
        if rate is not None and kwargs.get("tokenize") and given.get("load_audio_backend") in (None, "soundfile"):
            conversation = _with_read_sounds(conversation, rate)
            if given.get("sampling_rate") is None:
                kwargs["processor_kwargs"] = {**(kwargs.get("processor_kwargs") or {}), "sampling_rate": rate}
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    def escape_special_tokens(self, text: str) -> str:
        """Mark the special tokens in untrusted text, such as `<eos>`, `<image>` or `<|image_7|>`.

        A call with `sanitize_control_tokens=True` then reads them as plain characters. In a chat
        `apply_chat_template(..., sanitize_control_tokens=True)` does it with all that users say.
        """
        return escape_special_tokens(self.tokenizer, text)

    def _make_labels(self, features: BatchFeature) -> torch.Tensor | np.ndarray | list[list[int]]:
        if "attention_mask" not in features:
            raise InputError("return_labels: labels leave padding out by the attention mask; do not turn it off.")
        ids, mask = features["input_ids"], features["attention_mask"]
        # NumPy keeps rows of unequal lengths as objects
        if isinstance(ids, list) or ids.ndim == 1:
            # a label needs a token and one before it, from which it is predicted
            pairs = [zip(row, row_mask, [1, *row_mask]) for row, row_mask in zip(ids, mask)]
            labels = [[token if here and before else LABEL_PAD_ID for token, here, before in row] for row in pairs]
            return labels if isinstance(ids, list) else np.array([np.array(row) for row in labels], dtype=object)
        is_label = mask * 1
        is_label[:, 1:] *= mask[:, :-1]
        return ids * is_label + LABEL_PAD_ID * (1 - is_label)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Drop nested lists without any image; images stay unopened until they are encoded."""
        if isinstance(images, (list, tuple)) and all(isinstance(row, (list, tuple)) and not row for row in images):
            images = None
        _, text, videos, audio = super().prepare_inputs_layout(text=text, videos=videos, audio=audio, **kwargs)
        return images, text, videos, audio

    def validate_inputs(
        self, images: Any = None, text: list[str] | None = None, videos: Any = None, audio: Any = None, **kwargs
    ):
        """Raise `ValueError` where the numbers of images, items and placeholders differ, row by row if nested."""
        if videos is not None or audio is not None or "audios" in kwargs:
            raise InputError(
                "videos, audio: this processor reads text and images only; give it a codec for more, "
                "`codecs={'audio': codec}`."
            )
        if not kwargs.get("sanitize_control_tokens") and any(map(is_escaped, text or [])):
            raise InputError(
                "text: it holds marks of `escape_special_tokens`, which need `sanitize_control_tokens=True`."
            )
        if not text:
            raise InputError(f"text: you need to provide at least one text to call {type(self).__name__}.")
        for modality in self.frames:
            _check_items(modality, images if modality == IMAGE else self._codec_items.get(modality), text)

    def _process_images(self, images: Any, **kwargs) -> tuple[dict[str, list[list[int]]], list[str]]:
        codes = self.encode_images(images, **kwargs)
        processed = {"image_codes": codes}
        return processed, [self.replace_image_token(processed, index) for index in range(len(codes))]

    def get_text_with_replacements(
        self, text, images_replacements=(), videos_replacements=(), audio_replacements=()
    ) -> tuple[list[str], list[list[dict]]]:
        """Replace the placeholders of images as the base class does, and those of modalities with a codec."""
        replacements = {IMAGE: images_replacements}
        for modality, rows in self._codec_items.items():
            is_nested = all(isinstance(row, (list, tuple)) for row in rows)
            codes = self.encode_items(modality, [item for row in rows for item in row] if is_nested else rows)
            replacements[modality] = [self.frames[modality].text(item_codes) for item_codes in codes]
        return replace_placeholders(text, replacements)

    def _check_special_mm_tokens(self, text: list[str], text_inputs: BatchFeature, modalities: list[str]) -> None:
        rows = text_inputs["input_ids"]
        masks = text_inputs.get("attention_mask", [None] * len(rows))
        # with `return_overflowing_tokens` a text may give several rows
        sources = text_inputs.get("overflow_to_sample_mapping", range(len(text)))
        for index, row, mask in zip(_as_list(sources), rows, masks, strict=True):
            sample = text[index]
            if len(row) == 0 or (mask is not None and max(mask) == 0):
                raise InputError(
                    f"text[{index}]: {sample!r} gives no token at all; an empty text is the beginning token alone, "
                    "so leave `add_special_tokens` on, and name the tokenizer's `bos_token` if it has none."
                )
            row = _as_list(row)
            for modality, frame in self.frames.items():
                found, expected = frame.count_in_ids(row), frame.count_in_text(sample)
                if found < expected:
                    raise InputError(
                        f"text[{index}]: {expected} of {modality} stand in the text, but {found} in `input_ids`: "
                        "truncation would cut one. Raise `max_length` or turn truncation off."
                    )

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs) -> MultiModalData:
        """Count the code tokens of images, the same for every size."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.image_seq_length] * count, num_image_patches=[1] * count)

    def token_layout(self) -> dict:
        """Return the fields of a `MomaConfig` that follow from the vocabulary.

        Use it as `MomaConfig(**processor.token_layout(), ...)`.

        Returns:
            `dict`: `vocab_size`, `pad_token_id`, `bos_token_id`, `eos_token_id`, `begin_image_token_id`,
            `end_image_token_id`, `image_seq_length` and `modality_token_ranges` (half-open ranges of ids); with codecs
            also `modality_frames`.
        """
        layout = {
            "vocab_size": self._vocab_size,
            "pad_token_id": self.tokenizer.pad_token_id,
            "bos_token_id": self.tokenizer.bos_token_id,
            "eos_token_id": self.tokenizer.eos_token_id,
            "begin_image_token_id": self.begin_image_token_id,
            "end_image_token_id": self.end_image_token_id,
            "image_seq_length": self.image_seq_length,
            "modality_token_ranges": {modality: [frame.bounds] for modality, frame in self.frames.items()},
        }
        if self.codecs:
            layout["modality_frames"] = {
                modality: {"begin": frame.begin, "end": frame.end, "length": frame.length}
                for modality, frame in self.frames.items()
                if modality != IMAGE
            }
        return layout

    @_own_threads()
    def encode_images(self, images: Any, **kwargs) -> list[list[int]]:
        """Turn images into codes, for instance in `datasets.Dataset.map(..., batched=True, num_proc=2)`.

        Args:
            images (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `str`, or a sequence of these):
                Images, paths or addresses; also a column of a data set.
            kwargs (`Any`):
                Arguments of the image processor.

        Returns:
            `list[list[int]]`: for each image `image_seq_length` codes in `[0, codebook_size)`, in raster order.
            Their token ids are `image_token_offset` higher.

        Raises:
            ValueError: an image cannot be read, or the image processor does not yield the VQ model's resolution, or
                would fill it up with black.
        """
        kwargs["return_tensors"] = "pt"
        if kwargs.get("size") is not None and kwargs.get("do_resize") is not False:
            self._check_size(kwargs["size"])
        codes, pending = [], []
        # one by one, so that a single file is open and a single image in memory at its full size
        for source in iter_image_sources(images):
            image = self.image_processor.fetch_images(source)
            if not kwargs.get("do_resize", self.image_processor.do_resize):
                self._check_unresized(image, kwargs)
            pixel_values = self.image_processor([image], **kwargs)["pixel_values"]
            if tuple(pixel_values.shape[-2:]) != self.image_size:
                raise InputError(
                    f"images_kwargs: the image processor yields {tuple(pixel_values.shape[-2:])} pixels, but the VQ "
                    f"model needs {self.image_size}; leave size and crop_size as they are."
                )
            pending.append(pixel_values)
            if len(pending) == ENCODE_CHUNK:
                codes += self._encode(pending)
                pending = []
        return codes + (self._encode(pending) if pending else [])

    def _check_size(self, size: Any) -> None:
        height, width = self.image_size
        least = {"height": height, "width": width}
        least |= {"shortest_edge": min(height, width), "longest_edge": max(height, width)}
        given = dict(get_size_dict(size, default_to_square=False))
        # a crop larger than the image would be padded with black
        if any((given.get(name) or side) < side for name, side in least.items()):
            raise InputError(
                f"images_kwargs: size={given} makes images smaller than the VQ model's {self.image_size} pixels; "
                "leave size and crop_size as they are."
            )

    def _check_unresized(self, image: Any, kwargs: dict) -> None:
        uncropped: dict[str, Any] = {**kwargs, "do_center_crop": False}
        pixel_values = self.image_processor([image], **uncropped)["pixel_values"]
        # the crop would pad it with black
        if any(given < side for given, side in zip(pixel_values.shape[-2:], self.image_size)):
            raise InputError(
                f"images_kwargs: do_resize=False leaves an image of {tuple(pixel_values.shape[-2:])} pixels smaller "
                f"than the VQ model's {self.image_size}; leave do_resize as it is."
            )

    @torch.no_grad()
    def _encode(self, pixel_values: list[torch.Tensor]) -> list[list[int]]:
        batch = torch.cat(pixel_values).to(self.vq_model.device, torch.float32)
        return self.vq_model.get_image_tokens(batch).tolist()

    def encode_items(self, modality: str, items: list) -> list[list[int]]:
        """Turn items of a modality into codes.

        Args:
            modality (`str`):
                `"image"`, or a modality with a codec.
            items (`list`):
                Whatever its codec takes.

        Returns:
            `list[list[int]]`: the codes of each item, from 0. `frame_ids` turns them into token ids.

        Raises:
            ValueError: the modality has no codec, or the codec returns an invalid number or value of codes.
        """
        self._frame(modality)
        if modality == IMAGE:
            return self.encode_images(items)
        codes = [_as_list(item_codes) for item_codes in self.codecs[modality].encode(items)]
        if len(codes) != len(items):
            raise InputError(f"{modality}: its codec gave codes of {len(codes)} items for {len(items)}.")
        for item_codes in codes:
            self.frames[modality].check_codes(item_codes)
        return [[int(code) for code in item_codes] for item_codes in codes]

    def decode_items(self, modality: str, codes: torch.Tensor | list) -> list:
        """Turn codes of a modality into items.

        Args:
            modality (`str`):
                `"image"`, or a modality with a codec.
            codes (`torch.LongTensor` or `list`):
                Codes of each item, not token ids, as the model's `decode_modality_tokens` returns them.

        Returns:
            `list`: the items, as the codec returns them.

        Raises:
            ValueError: the modality has no codec, or the number or a value of the codes is invalid.
        """
        frame = self._frame(modality)
        rows = [_as_list(item_codes) for item_codes in codes]
        for row in rows:
            frame.check_codes(row)
        if modality != IMAGE:
            return [self.codecs[modality].decode(row) for row in rows]
        return self._decode_images(rows)

    def image_ids(self, codes: torch.Tensor | list[int]) -> list[int]:
        """Return the token ids of one image: [`~MomaProcessor.frame_ids`] of `"image"`.

        Args:
            codes (`torch.LongTensor` or `list[int]` of shape `(image_seq_length,)`):
                Codes of the image.

        Returns:
            `list[int]`: begin of image, codes and end of image.

        Raises:
            ValueError: the number or a value of the codes is invalid.
        """
        return self.frame_ids(IMAGE, codes)

    def frame_ids(self, modality: str, codes: torch.Tensor | list[int]) -> list[int]:
        """Return the token ids of one item, as they stand in `input_ids`.

        Args:
            modality (`str`):
                `"image"`, or a modality with a codec.
            codes (`torch.LongTensor` or `list[int]` of shape `(num_codes,)`):
                Codes of the item, from 0.

        Returns:
            `list[int]`: its begin, codes and end.

        Raises:
            ValueError: the modality has no codec, or the number or a value of the codes is invalid.
        """
        return self._frame(modality).ids(_as_list(codes))

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """Return the text that takes the place of one placeholder."""
        return self.frames[IMAGE].text(image_inputs["image_codes"][image_idx])

    def create_mm_token_type_ids(self, input_ids: list) -> list[list[int]]:
        """Return for each code the place of its modality in `MomaConfig.modalities`, and 0 for text."""
        types = {token: place for place, frame in enumerate(self.frames.values(), 1) for token in range(*frame.bounds)}
        return [[types.get(token, 0) for token in _as_list(row)] for row in input_ids]

    def _frame(self, modality: str) -> TokenFrame:
        if modality not in self.frames:
            raise InputError(
                f"modality: {modality!r} is none of {list(self.frames)}; pass `codecs={{{modality!r}: codec}}`."
            )
        return self.frames[modality]

    def decode_images(self, codes: torch.Tensor | list) -> list[Image.Image]:
        """Turn codes into images.

        Args:
            codes (`torch.LongTensor` or `list` of shape `(num_images, image_seq_length)`):
                Codes in `[0, codebook_size)`, not token ids; a list may hold a tensor for each image.

        Returns:
            `list[PIL.Image.Image]`: RGB images of the VQ model's resolution.

        Raises:
            ValueError: the shape is wrong, or a code lies outside the codebook.
        """
        return self.decode_items(IMAGE, codes)

    @_own_threads()
    @torch.no_grad()
    def _decode_images(self, codes: list[list[int]]) -> list[Image.Image]:
        images = []
        for start in range(0, len(codes), ENCODE_CHUNK):
            chunk = torch.tensor(codes[start : start + ENCODE_CHUNK], device=self.vq_model.device)
            pixel_values = self.vq_model.decode_image_tokens(chunk)
            images.extend(self.image_processor.postprocess(pixel_values)["pixel_values"])
        return images

    def decode_parts(self, ids: torch.Tensor | list[int], skip_special_tokens: bool = True, **kwargs) -> list:
        """Turn one sequence of token ids back into texts, images and items of other modalities.

        Args:
            ids (`torch.LongTensor` or `list[int]` of shape `(sequence_length,)`):
                Token ids. Padding is dropped; that of a tokenizer which pads with `<eos>` at the ends alone, where one
                is kept behind the last token.
            skip_special_tokens (`bool`, *optional*, defaults to `True`):
                Whether to leave special tokens such as `<bos>` out of the texts.
            kwargs (`Any`):
                Further arguments of the tokenizer's `decode`.

        Returns:
            `list[str | PIL.Image.Image | Any]`: the parts in their order; empty texts are left out.

        Raises:
            ValueError: an image does not consist of exactly `image_seq_length` codes and its end token, an item of
                another modality is incomplete, a code stands outside of both, or `ids` are several rows or no ids.
        """
        ids = _as_list(ids)
        if ids and isinstance(ids[0], (list, torch.Tensor)):
            raise InputError(f"ids: expected those of one sequence, got {len(ids)} rows: decode them one by one.")
        if min(ids, default=0) < 0:
            raise InputError(f"ids: {min(ids)} is no token id: labels have -100 where no loss is wanted.")
        runs = split_frames(self._without_padding(ids), self.frames)
        items = {
            modality: iter(self.decode_items(modality, codes))
            for modality in self.frames
            if (codes := [run for owner, run in runs if owner == modality])
        }
        parts = []
        for modality, run in runs:
            if modality is not None:
                parts.append(next(items[modality]))
            elif text := self.tokenizer.decode(run, skip_special_tokens=skip_special_tokens, **kwargs):
                parts.append(text)
        return parts

    def post_process_multimodal_output(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **kwargs,
    ) -> list:
        """Turn what a model generated into texts, images and items, as the `any-to-any` pipeline asks for it.

        Args:
            generated_outputs (`torch.LongTensor`):
                For `"text"` and `"interleaved"`: token ids of shape `(batch_size, sequence_length)` or
                `(sequence_length,)`. For `"image"`: codes of shape `(num_images, image_seq_length)`; of what the
                model's `decode_image_tokens` returns the last image of each row is taken, as a prompt may hold others.
                For a modality with a codec: the list of codes that `decode_modality_tokens` returns, or token ids of
                shape `(batch_size, sequence_length)`, of which the last item of each row is taken likewise.
            skip_special_tokens (`bool`, *optional*, defaults to `True`):
                Whether to leave special tokens, image codes among them, out of texts.
            generation_mode (`str`, *optional*):
                `"text"` (the default), `"interleaved"`, `"image"` or a modality with a codec.
            kwargs (`Any`):
                Further arguments of the tokenizer's `decode`.

        Returns:
            `list`: texts, images or a codec's items; for `"interleaved"` the parts of each sequence, as `decode_parts`
            returns them.

        Raises:
            ValueError: `generation_mode` is unknown, or an image is incomplete.
        """
        if generation_mode is None or generation_mode == "text":
            return super().post_process_multimodal_output(generated_outputs, skip_special_tokens, **kwargs)
        if generation_mode in self.frames:
            if generation_mode == IMAGE:
                last = getattr(generated_outputs, "last_of_rows", None)
                generated_outputs = generated_outputs if last is None else generated_outputs[last]
            elif isinstance(generated_outputs, torch.Tensor):
                generated_outputs = [self._last_item(generation_mode, row) for row in generated_outputs.tolist()]
            return self.decode_items(generation_mode, generated_outputs)
        if generation_mode == "interleaved":
            if hasattr(generated_outputs, "tolist"):
                generated_outputs = generated_outputs.tolist()
            if len(generated_outputs) and not isinstance(generated_outputs[0], list):
                generated_outputs = [generated_outputs]
            return [self.decode_parts(row, skip_special_tokens, **kwargs) for row in generated_outputs]
        modes = ["text", "interleaved", *self.frames]
        raise InputError(f"generation_mode: expected one of {modes}, got {generation_mode!r}.")

    def _without_padding(self, ids: list[int]) -> list[int]:
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        places = [place for place, token in enumerate(ids) if token != pad]
        if pad != eos or not places:
            return [ids[place] for place in places]
        # between other tokens it ends a document
        return ids[places[0] : places[-1] + 2]

    def _last_item(self, modality: str, ids: list[int]) -> list[int]:
        runs = split_frames(self._without_padding(ids), self.frames)
        codes = [run for owner, run in runs if owner == modality]
        if not codes:
            raise InputError(f"generated_outputs: a row of token ids has no {modality}; generate it, or pass codes.")
        return codes[-1]

    def to_dict(self) -> dict:
        """Return the settings, without the VQ model and the codecs, which have files of their own."""
        settings = copy.copy(self)
        del settings.vq_model, settings.codecs
        output = super(MomaProcessor, settings).to_dict()
        if self.codecs:
            output["codec_types"] = codec_types(self.codecs)
        return output

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Write all parts into one folder.

        Settings, chat template and tokenizer are at its top, the VQ model is in the subfolder `vq_model`, each codec
        in `{modality}_codec`.

        Args:
            save_directory (`str` or `os.PathLike`):
                The folder, which is created if it does not exist.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Whether to upload the processor as well.
            kwargs (`Any`):
                `repo_id` (by default the folder's name) and further arguments of `push_to_hub`.

        Returns:
            `list[str]`: the settings file.

        Raises:
            ValueError: a codec is not registered; nothing has been written.
        """
        # last of all, it would leave the settings of this processor beside the codecs of an older one
        codec_types(self.codecs, needs_names=True)
        # the tokenizer saves the sides of its creation, not later ones
        for side in ("padding_side", "truncation_side"):
            self.tokenizer.init_kwargs[side] = getattr(self.tokenizer, side)
        files = super().save_pretrained(save_directory)
        # the base class sets it for the files that it copies and leaves it on the object; loading never sets it
        self.__dict__.pop("auto_map", None)
        self.vq_model.save_pretrained(os.path.join(save_directory, VQ_SUBFOLDER))
        save_codecs(self.codecs, save_directory)
        # as [`MomaVQModel`] does, for classes of Transformers
        with suppress(OSError):
            for path in Path(save_directory).glob("*/*.safetensors"):
                shutil.copymode(files[0], path)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, **kwargs)
        return files

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "MomaProcessor":
        """Load all parts from a folder or a repository."""
        parts = {name: kwargs.pop(name, None) for name in PARTS}
        # all parts come from one state of the repository
        kwargs["revision"] = resolve_revision(
            pretrained_model_name_or_path,
            kwargs.pop("revision", None) or "main",
            token=kwargs.get("token"),
            local_files_only=kwargs.get("local_files_only", False),
            cache_dir=kwargs.get("cache_dir"),
        )
        settings, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        subfolder = kwargs.pop("subfolder", "")
        backend = kwargs.pop("backend", "torchvision" if is_torchvision_available() else "pil")
        # an auto class would need classes that are registered, which those of code from the Hub are not
        image_processor_class = MomaImageProcessorPil if backend == "pil" else MomaImageProcessor
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        if parts["image_processor"] is None:
            saved_type = (settings.get("image_processor") or {}).get("image_processor_type")
            if saved_type not in (None, MomaImageProcessor.__name__, MomaImageProcessorPil.__name__):
                logger.warning(
                    "%s: its image processor was a %s, and is loaded as %s: codes may be others. Pass "
                    "`image_processor=` one that you load yourself.",
                    pretrained_model_name_or_path,
                    saved_type,
                    image_processor_class.__name__,
                )
            # each part takes the settings that it has
            parts["image_processor"] = image_processor_class.from_pretrained(
                pretrained_model_name_or_path, subfolder=subfolder, **kwargs
            )
        if parts["tokenizer"] is None:
            # a tokenizer would keep and save settings of the image processor
            tokenizer_kwargs = {
                name: value for name, value in kwargs.items() if not hasattr(parts["image_processor"], name)
            }
            if "moma" not in CONFIG_MAPPING:
                # without the package of the model Transformers would ask whether the folder's code may tell its type
                tokenizer_kwargs.setdefault("config", PreTrainedConfig())
            parts["tokenizer"] = AutoTokenizer.from_pretrained(
                pretrained_model_name_or_path, subfolder=subfolder, **tokenizer_kwargs
            )
        if parts["vq_model"] is None:
            parts["vq_model"] = load_image_tokenizer(
                pretrained_model_name_or_path,
                subfolder=f"{subfolder}/{VQ_SUBFOLDER}" if subfolder else VQ_SUBFOLDER,
                dtype=torch.float32,
                **hub_kwargs,
            )
        if parts["codecs"] is None:
            types = settings.get("codec_types") or {}
            parts["codecs"] = load_codecs(types, pretrained_model_name_or_path, subfolder, **hub_kwargs)
        if parts["chat_template"] is None:
            parts["chat_template"] = settings.get("chat_template")
        return cls(**parts)


def _as_list(values: Any) -> list[int]:
    """Return a list of numbers; a single number stays one."""
    if hasattr(values, "tolist"):
        return values.tolist()
    return values if hasattr(values, "__index__") else list(values)


def _refuse_second_texts(kwargs: dict) -> None:
    """Raise `ValueError` for texts beside `text`, in which placeholders would stay: no image is put into them."""
    for name in ("text_pair", "text_target", "text_pair_target"):
        if kwargs.get(name) is not None or (kwargs.get("text_kwargs") or {}).get(name) is not None:
            raise InputError(
                f"{name}: a row has one text, so write both into `text`; no image would be put into a second one."
            )


def _list_of_texts(texts: Any) -> list:
    """Return several texts as a list, which can be read more than once; raise where they have no order or are none."""
    # a message of a chat would be read as the names of its fields
    if isinstance(texts, (bytes, Mapping, Set)) or not hasattr(texts, "__iter__"):
        raise InputError(
            f"text: expected a string or a list of strings, got {type(texts).__name__}; messages of a chat go through "
            "`apply_chat_template`."
        )
    return list(texts)


def _check_texts(texts: Any) -> None:
    """Raise `ValueError` for what is no text, and for half a pair of surrogates, which has no tokens."""
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"text: expected a string or a list of strings, got a list with {type(text).__name__}.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"text: half a pair of surrogates (\\u{ord(text[error.start]):04x}) at character {error.start} of "
                f"{text[:40]!r} is no text."
            ) from None


def _with_read_sounds(conversation: Any, sampling_rate: int, where: str = "conversation") -> Any:
    """Return a conversation, or a list of them, whose parts of type `audio` hold samples."""
    if isinstance(conversation, (list, tuple)):
        return [
            _with_read_sounds(entry, sampling_rate, f"{where}[{index}]") for index, entry in enumerate(conversation)
        ]
    if not isinstance(conversation, dict):
        return conversation
    if isinstance(conversation.get("content"), (list, tuple)):
        parts = _with_read_sounds(conversation["content"], sampling_rate, f"{where}['content']")
        return {**conversation, "content": parts}
    if conversation.get("type") != AUDIO:
        return conversation
    sound = next((conversation[name] for name in (AUDIO, "url", "path") if conversation.get(name) is not None), None)
    if sound is None:
        return {"type": AUDIO}
    try:
        return {"type": AUDIO, AUDIO: _read_part_sound(sound, sampling_rate)}
    except SoundError as error:
        raise InputError(f"{where}: {error}") from error


def _read_part_sound(sound: Any, sampling_rate: int) -> np.ndarray:
    try:
        return read_sound(sound, sampling_rate)
    except SoundError as error:
        if error.reason != "sound missing" or not isinstance(sound, str):
            raise
        try:
            # a file's bytes in base64, bare or behind `data:`, which Transformers takes in chats
            return read_sound(base64.b64decode(sound.rpartition(",")[2], validate=True), sampling_rate)
        except ValueError:
            raise error from None


def _check_items(modality: str, rows: Any, texts: list[str]) -> None:
    """Raise `ValueError` where the number of items differs from that of placeholders, row by row if rows are lists."""
    name, placeholder = "images" if modality == IMAGE else modality, f"<{modality}>"
    kinds = {isinstance(row, (list, tuple)) for row in rows} if isinstance(rows, (list, tuple)) else set()
    # from some rows alone the texts of the others would not be known
    if len(kinds) > 1:
        raise InputError(
            f"{name}: some rows are lists and others are not; give one list for each text, or one flat list."
        )
    is_nested = kinds == {True}
    groups = rows if is_nested else [[] if rows is None else rows]
    passed = [sum(1 for _ in iter_image_sources(group)) if modality == IMAGE else len(group) for group in groups]
    placed = [text.count(placeholder) for text in texts]
    if is_nested and len(passed) != len(placed) and sum(passed) == sum(placed):
        raise InputError(f"{name}: a nested list needs one list per text, got {len(passed)} for {len(placed)} texts.")
    numbers = [(name, sum(placed), sum(passed))]
    if is_nested:
        numbers += [(f"text[{index}]", *pair) for index, pair in enumerate(zip(placed, passed))]
    for where, expected, given in numbers:
        if given != expected:
            raise InputError(
                f"{where}: the number of {placeholder} tokens in the prompts should be the same as the number of "
                f"{name} passed, got {expected} and {given}."
            )


__all__ = ["MomaProcessor"]
