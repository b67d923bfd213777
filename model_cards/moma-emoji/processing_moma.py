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
"""Text and pictures to token ids with the real picture codes, and token ids back to text and pictures."""

import copy
import os
import re
from pathlib import Path

import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import TextInput
from transformers.utils import is_torchvision_available

from .image_input_moma import flat_sources
from .image_processing_moma import MomaImageProcessor
from .image_processing_pil_moma import MomaImageProcessorPil
from .modeling_moma_vq import MomaVQModel
from .text_tokenizer_moma import escape_special_tokens, is_escaped, name_image_token, special_beginning


VQ_SUBFOLDER = "vq_model"
# pictures that go through the VQ model at once, which bounds the memory of a large batch
ENCODE_CHUNK = 64
LABEL_PAD_ID = -100
_ANY_PICTURE = Image.new("L", (1, 1))
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")

# of a chat template, inside its loop over messages: sets `turn.text`, with a placeholder for every picture
MESSAGE_TEXT = (
    "{% set turn = namespace(text='') %}"
    "{% if message['content'] is string %}"
    "{% set turn.text = message['content'] %}"
    "{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{% set turn.text = turn.text + '<image>' %}"
    "{% elif part['type'] == 'text' %}{% set turn.text = turn.text + part['text'] %}"
    "{% else %}{{ raise_exception('content parts must be of type text or image, got ' + part['type']) }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
)
# turns end with <eos> and headers with a newline, so that no BPE token straddles the edge of a turn
DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token | default('', true) }}"
    "{% for message in messages %}" + MESSAGE_TEXT + "{{ message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ turn.text | trim }}{{ eos_token }}{% endgeneration %}"
    "{% else %}"
    "{{ turn.text | trim }}{{ eos_token }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)


class MomaProcessorKwargs(ProcessingKwargs, total=False):
    """
    return_labels (`bool`, *optional*, defaults to `False`):
        Whether to return `labels`: a copy of `input_ids` with -100 at padding and at the first token after it.
    """

    return_labels: bool


# trf-ignore: TRF057, documented by hand
class MomaProcessor(ProcessorMixin):
    r"""
    Joins an image processor, a text tokenizer and a VQ model. Each `<image>` in a text becomes `<|begin_image|>`, the
    `image_seq_length` codes of its picture, and `<|end_image|>`, in `input_ids`; the model needs no pixels. The token
    `<|image_7|>` stands for code 7: written in a text it is that code, as `<eos>` is the end of a turn. Text that you
    do not control goes through [`~MomaProcessor.escape_special_tokens`].

    The VQ model runs in float32, in evaluation mode, without gradients; the model that is passed in is put in that
    state. It stays where it is (on the CPU after `from_pretrained`); [`~MomaProcessor.to`] moves it.

    Args:
        image_processor ([`MomaImageProcessor`] or [`MomaImageProcessorPil`]):
            Its `crop_size` must equal the VQ model's resolution.
        tokenizer (`PreTrainedTokenizerFast`):
            A tokenizer with the picture tokens of [`add_picture_tokens`].
        vq_model ([`MomaVQModel`]):
            Turns pixel values into codes and back.
        chat_template (`str` or `dict[str, str]`, *optional*):
            Jinja template of a conversation; by default `DEFAULT_CHAT_TEMPLATE`, turns of `role`, newline, content,
            `<eos>`, with pictures in any turn.

    Attributes:
        image_token, image_token_id: the placeholder, which never occurs in `input_ids`.
        begin_image_token, begin_image_token_id, end_image_token, end_image_token_id: the frame of a picture.
        image_token_offset (`int`): id of code 0.
        image_token_ids (`list[int]`): ids of all codes. Begin and end of image count as text.
        image_seq_length (`int`): codes of one picture.
        codebook_size (`int`): number of codes.

    Raises:
        TypeError: if a part is of the wrong kind.
        ValueError: if the parts do not fit together.
    """

    valid_processor_kwargs = MomaProcessorKwargs
    return_labels = False
    image_token = "<image>"
    begin_image_token = "<|begin_image|>"
    end_image_token = "<|end_image|>"

    def __init__(self, image_processor, tokenizer, vq_model, chat_template=None):
        if chat_template is None:
            chat_template = DEFAULT_CHAT_TEMPLATE
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        # custom code may exist twice in one process, so its classes are recognised by what they can do
        if not hasattr(vq_model, "get_image_tokens") or not hasattr(vq_model, "decode_image_tokens"):
            raise TypeError(f"vq_model: expected a MomaVQModel, got {type(vq_model).__name__}.")
        self.vq_model = vq_model.float().eval()
        config = vq_model.config
        self.codebook_size = config.num_embeddings
        self.image_seq_length = (config.resolution // config.downsample_factor) ** 2
        self._check_image_processor(image_processor, config.resolution)
        self._read_vocabulary(tokenizer)

    def _check_image_processor(self, image_processor, resolution: int):
        crop, edge = image_processor.crop_size, image_processor.size.shortest_edge
        side = (crop.height, crop.width) if image_processor.do_center_crop and crop is not None else None
        # a shortest edge below the crop would be padded with black
        if side != (resolution, resolution) or (edge is not None and edge < resolution):
            raise ValueError(
                f"image_processor: shortest_edge={edge} and a crop of {side} do not fit the VQ model's resolution "
                f"{resolution}; build it with `{type(image_processor).__name__}.for_resolution({resolution})`."
            )

    def _read_vocabulary(self, tokenizer):
        vocab = tokenizer.get_vocab()
        fix = f"call `add_picture_tokens(tokenizer, {self.codebook_size})` on a tokenizer without picture tokens"
        for token in (self.image_token, self.begin_image_token, self.end_image_token, "<|image_0|>"):
            if token not in vocab:
                raise ValueError(f"tokenizer: it has no token {token!r}; {fix}.")
        if tokenizer.pad_token_id is None:
            raise ValueError(f"tokenizer: it has no padding token; {fix}.")
        count = 0
        while f"<|image_{count}|>" in vocab:
            count += 1
        if count != self.codebook_size:
            raise ValueError(
                f"tokenizer: it has {count} picture codes, but the VQ model has num_embeddings={self.codebook_size}; "
                f"{fix}."
            )
        self.image_token_offset = vocab["<|image_0|>"]
        for code in range(count):
            token = f"<|image_{code}|>"
            if vocab[token] != self.image_token_offset + code:
                raise ValueError(
                    f"tokenizer: {token!r} has the id {vocab[token]}, but the ids of the codes must follow one "
                    f"another from {self.image_token_offset} on; {fix}."
                )
        self.image_token_id = vocab[self.image_token]
        self.begin_image_token_id = vocab[self.begin_image_token]
        self.end_image_token_id = vocab[self.end_image_token]
        self._vocab_size = max(vocab.values()) + 1
        # tokenizers saved by earlier versions have no name for it
        name_image_token(tokenizer)

    @property
    def image_token_ids(self) -> list[int]:
        return list(range(self.image_token_offset, self.image_token_offset + self.codebook_size))

    @property
    def unused_input_names(self) -> list[str]:
        return ["pixel_values", "image_codes", "token_type_ids"]

    def to(self, device: "str | torch.device") -> "MomaProcessor":
        """
        Moves the VQ model. What the processor returns stays on the CPU.

        Args:
            device (`str` or `torch.device`):
                Where the VQ model shall run.

        Returns:
            [`MomaProcessor`]: itself.
        """
        self.vq_model.to(device)
        return self

    def token_layout(self) -> dict:
        """
        The part of a `MomaConfig` that follows from the vocabulary: `MomaConfig(**processor.token_layout(), ...)`.

        Returns:
            `dict`: `vocab_size`, `pad_token_id`, `bos_token_id`, `eos_token_id`, `begin_image_token_id`,
            `end_image_token_id`, `image_seq_length` and `modality_token_ranges` (half-open ranges of ids).
        """
        return {
            "vocab_size": self._vocab_size,
            "pad_token_id": self.tokenizer.pad_token_id,
            "bos_token_id": self.tokenizer.bos_token_id,
            "eos_token_id": self.tokenizer.eos_token_id,
            "begin_image_token_id": self.begin_image_token_id,
            "end_image_token_id": self.end_image_token_id,
            "image_seq_length": self.image_seq_length,
            "modality_token_ranges": {
                "image": [[self.image_token_offset, self.image_token_offset + self.codebook_size]]
            },
        }

    # trf-ignore: TRF057, documented by hand
    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        **kwargs: Unpack[MomaProcessorKwargs],
    ) -> BatchFeature:
        r"""
        Tokenises texts and the pictures in them.

        Args:
            images (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `str`, or a (nested) list of these, *optional*):
                Pictures, paths or addresses, in the order of the placeholders. A nested list holds one list for each
                text, empty where a text has no picture.
            text (`str` or `list[str]`):
                Texts, with `<image>` wherever a picture stands. `""` is a text of the beginning token alone.
            kwargs:
                Arguments of the tokenizer (`padding`, `padding_side`, `truncation`, `return_tensors`, ...) and the
                image processor, `return_labels` and `return_mm_token_type_ids`. `sanitize_control_tokens=True` reads
                what [`~MomaProcessor.escape_special_tokens`] has marked as plain text.

        Returns:
            [`BatchFeature`]: lists, or tensors of shape `(batch_size, sequence_length)` with `return_tensors`:

            - **input_ids** -- Token ids, picture codes included.
            - **attention_mask** -- 0 at padding.
            - **labels** -- With `return_labels=True`: `input_ids`, and -100 at padding and at the first token after
              padding, which would have to predict it.
            - **mm_token_type_ids** -- With `return_mm_token_type_ids=True`: 1 for picture codes, else 0.

        Raises:
            ValueError: if there is no text, if the number of pictures differs from the number of placeholders (in
                total, or in a row of a nested list), if truncation would cut a picture, if a row holds no token, or if
                escaped text comes without `sanitize_control_tokens=True`.
        """
        if text is None and images is not None:
            raise ValueError(
                "text: pictures become part of `input_ids`, so text=None has no place for them; pass "
                f"{self.image_token!r} for each picture, or call `encode_pictures(images)` for the bare codes."
            )
        return_labels = kwargs.pop("return_labels", self.return_labels)
        if kwargs.get("sanitize_control_tokens") and text is not None:
            # the tokenizer adds none to text that is marked
            begin = special_beginning(self.tokenizer) if kwargs.get("add_special_tokens", True) else ""
            kwargs["add_special_tokens"] = False
            text = begin + text if isinstance(text, str) else [begin + sample for sample in text]
        features = super().__call__(images=images, text=text, **kwargs)
        if return_labels:
            features["labels"] = self._make_labels(features)
        return features

    def escape_special_tokens(self, text: str) -> str:
        """
        Marks the special tokens in a text from outside, such as `<eos>`, `<image>` or `<|image_7|>`: a call with
        `sanitize_control_tokens=True` then reads them as the characters that they are. In a chat
        `apply_chat_template(..., sanitize_control_tokens=True)` does it with all that users say.

        Args:
            text (`str`):
                The text; marks that it holds already are removed.

        Returns:
            `str`: the marked text, to be put together with text of your own.
        """
        return escape_special_tokens(self.tokenizer, text)

    def _make_labels(self, features: BatchFeature):
        if "attention_mask" not in features:
            raise ValueError("return_labels: labels leave padding out by the attention mask; do not turn it off.")
        ids, mask = features["input_ids"], features["attention_mask"]
        if isinstance(ids, list):
            # of neighbours, the first of which predicts the second
            pairs = [zip(row, row_mask, [1, *row_mask]) for row, row_mask in zip(ids, mask)]
            return [[token if here and before else LABEL_PAD_ID for token, here, before in row] for row in pairs]
        is_label = mask * 1
        is_label[:, 1:] *= mask[:, :-1]
        return ids * is_label + LABEL_PAD_ID * (1 - is_label)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Drops a list of pictures that holds none, and leaves the others unopened until they are encoded."""
        if isinstance(images, (list, tuple)) and all(isinstance(row, (list, tuple)) and not row for row in images):
            images = None
        _, text, videos, audio = super().prepare_inputs_layout(text=text, videos=videos, audio=audio, **kwargs)
        return images, text, videos, audio

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Compares the number of pictures with that of placeholders, row by row where `images` is nested."""
        if videos is not None or audio is not None:
            raise ValueError("videos, audio: MoMa reads text and pictures only.")
        if not kwargs.get("sanitize_control_tokens") and any(map(is_escaped, text or [])):
            raise ValueError(
                "text: it holds marks of `escape_special_tokens`, which need `sanitize_control_tokens=True`."
            )
        if not text and images is None:
            raise ValueError(f"text: you need to provide at least one text to call {type(self).__name__}.")
        # the base class counts pictures, and would open them for it
        counted = None if images is None else [_ANY_PICTURE] * sum(1 for _ in flat_sources(images))
        super().validate_inputs(images=counted, text=text, **kwargs)
        if not isinstance(images, (list, tuple)) or not all(isinstance(row, (list, tuple)) for row in images):
            return
        if len(images) != len(text):
            raise ValueError(
                f"images: a nested list needs one list per text, got {len(images)} for {len(text)} texts."
            )
        for index, (row, sample) in enumerate(zip(images, text)):
            if len(row) != sample.count(self.image_token):
                raise ValueError(
                    f"text[{index}]: the number of {self.image_token} tokens in the prompts should be the same as the "
                    f"number of images passed, got {sample.count(self.image_token)} and {len(row)}."
                )

    def _process_images(self, images, **kwargs):
        codes = self.encode_pictures(images, **kwargs)
        processed = {"image_codes": codes}
        return processed, [self.replace_image_token(processed, index) for index in range(len(codes))]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """
        The text that takes the place of one placeholder.

        Args:
            image_inputs (`dict`):
                Holds `image_codes`, a list of codes for each picture.
            image_idx (`int`):
                Which picture.

        Returns:
            `str`: begin, codes and end of the picture.
        """
        codes = "".join(f"<|image_{code}|>" for code in image_inputs["image_codes"][image_idx])
        return f"{self.begin_image_token}{codes}{self.end_image_token}"

    def _check_special_mm_tokens(self, text, text_inputs, modalities):
        begin, end = re.escape(self.begin_image_token), re.escape(self.end_image_token)
        framed = rf"{begin}(?:<\|image_\d+\|>){{{self.image_seq_length}}}{end}"
        masks = text_inputs.get("attention_mask", [None] * len(text))
        for index, (sample, row, mask) in enumerate(zip(text, text_inputs["input_ids"], masks)):
            if len(row) == 0 or (mask is not None and max(mask) == 0):
                raise ValueError(
                    f"text[{index}]: {sample!r} gives no token at all; an empty text needs a tokenizer that adds a "
                    "beginning token."
                )
            begins = [position for position, token in enumerate(row) if token == self.begin_image_token_id]
            ends = {position for position, token in enumerate(row) if token == self.end_image_token_id}
            whole = sum(position + self.image_seq_length + 1 in ends for position in begins)
            expected = len(re.findall(framed, sample))
            if whole < expected:
                raise ValueError(
                    f"text[{index}]: {expected} pictures stand in the text, but {whole} in `input_ids`: truncation "
                    "would cut a picture. Raise `max_length` or turn truncation off."
                )

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """
        Number of code tokens of pictures, the same for every size.

        Args:
            image_sizes (`list[list[int]]`, *optional*):
                Height and width of each picture.

        Returns:
            `MultiModalData`: `num_image_tokens` (begin and end of image count as text) and `num_image_patches`.
        """
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.image_seq_length] * count, num_image_patches=[1] * count)

    def encode_pictures(self, images, **kwargs) -> list[list[int]]:
        """
        Turns pictures into codes, for instance in `datasets.Dataset.map(..., batched=True)`.

        Args:
            images (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `str`, or a list of these):
                Pictures.
            kwargs:
                Arguments of the image processor.

        Returns:
            `list[list[int]]`: for each picture `image_seq_length` codes in `[0, codebook_size)`, in raster order.
            Their token ids are `image_token_offset` higher.

        Raises:
            ValueError: if a picture cannot be read, or the image processor does not yield the VQ model's resolution.
        """
        kwargs["return_tensors"] = "pt"
        side = self.vq_model.config.resolution
        codes, waiting = [], []
        # one by one: of all pictures but one there are the resized pixels alone, and of no two the files
        for source in flat_sources(images):
            pixel_values = self.image_processor([self.image_processor.fetch_images(source)], **kwargs)["pixel_values"]
            if tuple(pixel_values.shape[-2:]) != (side, side):
                raise ValueError(
                    f"images_kwargs: the image processor yields {tuple(pixel_values.shape[-2:])} pixels, but the VQ "
                    f"model needs {(side, side)}; leave size and crop_size as they are."
                )
            waiting.append(pixel_values)
            if len(waiting) == ENCODE_CHUNK:
                codes += self._encode(waiting)
                waiting = []
        return codes + self._encode(waiting) if waiting else codes

    @torch.no_grad()
    def _encode(self, pixel_values):
        pixel_values = torch.cat(pixel_values).to(self.vq_model.device, torch.float32)
        return self.vq_model.get_image_tokens(pixel_values).tolist()

    def decode_pictures(self, codes: "torch.LongTensor | list[list[int]]") -> list[Image.Image]:
        """
        Turns codes into pictures.

        Args:
            codes (`torch.LongTensor` or nested list of shape `(num_pictures, image_seq_length)`):
                Codes in `[0, codebook_size)`, not token ids.

        Returns:
            `list[PIL.Image.Image]`: RGB pictures of the VQ model's resolution.

        Raises:
            ValueError: if the shape or a code is out of range.
        """
        codes = torch.as_tensor(codes, dtype=torch.long)
        if codes.ndim != 2 or codes.shape[1] != self.image_seq_length:
            raise ValueError(
                f"codes: expected the shape (num_pictures, {self.image_seq_length}), got {tuple(codes.shape)}. For "
                "whole sequences of token ids use `decode_parts`, or the model's `decode_image_tokens` first."
            )
        if codes.numel() == 0:
            return []
        if codes.min() < 0 or codes.max() >= self.codebook_size:
            raise ValueError(
                f"codes: values from {int(codes.min())} to {int(codes.max())} lie outside [0, {self.codebook_size}); "
                f"subtract image_token_offset={self.image_token_offset} from token ids."
            )
        pictures = []
        for chunk in codes.split(ENCODE_CHUNK):
            with torch.no_grad():
                pixel_values = self.vq_model.decode_image_tokens(chunk.to(self.vq_model.device))
            pictures.extend(self.image_processor.postprocess(pixel_values)["pixel_values"])
        return pictures

    def decode_parts(self, ids: "torch.LongTensor | list[int]", skip_special_tokens: bool = True, **kwargs) -> list:
        """
        Turns one sequence of token ids back into texts and pictures.

        Args:
            ids (`torch.LongTensor` or `list[int]` of shape `(sequence_length,)`):
                Token ids. Padding is dropped.
            skip_special_tokens (`bool`, *optional*, defaults to `True`):
                Whether to leave special tokens such as `<bos>` out of the texts.
            kwargs:
                Further arguments of the tokenizer's `decode`.

        Returns:
            `list[str | PIL.Image.Image]`: the parts in their order; empty texts are left out.

        Raises:
            ValueError: if a picture does not consist of exactly `image_seq_length` codes and its end token, or a code
                stands outside a picture.
        """
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        ids = [token for token in ids if token != self.tokenizer.pad_token_id]
        runs, codes = self._split_pictures(ids)
        pictures = iter(self.decode_pictures(codes) if codes else [])
        parts = []
        for run in runs:
            part = next(pictures) if run is None else self._decode_text(run, skip_special_tokens, kwargs)
            if part != "":
                parts.append(part)
        return parts

    def _decode_text(self, ids: list[int], skip_special_tokens: bool, kwargs: dict) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)

    def _split_pictures(self, ids: list[int]) -> tuple[list, list[list[int]]]:
        # a run is a list of text ids, or None where a picture stands
        runs, pictures = [[]], []
        first, stop = self.image_token_offset, self.image_token_offset + self.codebook_size
        position = 0
        while position < len(ids):
            if ids[position] == self.begin_image_token_id:
                end = position + 1 + self.image_seq_length
                codes = ids[position + 1 : end]
                found = next((n for n, token in enumerate(codes) if not first <= token < stop), len(codes))
                if found != self.image_seq_length or ids[end : end + 1] != [self.end_image_token_id]:
                    following = ids[position + 1 + found : position + 2 + found]
                    raise ValueError(
                        f"ids: the picture at position {position} is incomplete: {found} codes, of "
                        f"{self.image_seq_length}, and then {following or 'nothing'}, where the id "
                        f"{self.end_image_token_id} belongs; generate more tokens, or with generation_mode='image'."
                    )
                pictures.append([token - first for token in codes])
                runs += [None, []]
                position = end + 1
            elif first <= ids[position] < stop:
                raise ValueError(
                    f"ids: the code {ids[position]} at position {position} stands outside a picture; pass the "
                    f"sequence from its {self.begin_image_token} on."
                )
            else:
                runs[-1].append(ids[position])
                position += 1
        return runs, pictures

    def post_process_multimodal_output(
        self, generated_outputs, skip_special_tokens=True, generation_mode=None, **kwargs
    ):
        """
        Turns what a model generated into what a person can read or see. It serves the `any-to-any` pipeline.

        Args:
            generated_outputs (`torch.LongTensor`):
                For `"text"` and `"interleaved"`: token ids of shape `(batch_size, sequence_length)` or
                `(sequence_length,)`. For `"image"`: codes of shape `(num_pictures, image_seq_length)`, as the model's
                `decode_image_tokens` gives.
            skip_special_tokens (`bool`, *optional*, defaults to `True`):
                Whether to leave special tokens, picture codes among them, out of texts.
            generation_mode (`str`, *optional*):
                `"text"` (the default), `"image"` or `"interleaved"`.
            kwargs:
                Further arguments of the tokenizer's `decode`.

        Returns:
            `list[str]`, `list[PIL.Image.Image]`, or a list with the parts (texts and pictures) of each sequence.

        Raises:
            ValueError: if `generation_mode` is unknown, or a picture is incomplete.
        """
        if generation_mode is None or generation_mode == "text":
            return super().post_process_multimodal_output(generated_outputs, skip_special_tokens, **kwargs)
        if generation_mode == "image":
            return self.decode_pictures(generated_outputs)
        if generation_mode == "interleaved":
            if hasattr(generated_outputs, "tolist"):
                generated_outputs = generated_outputs.tolist()
            if not isinstance(generated_outputs[0], list):
                generated_outputs = [generated_outputs]
            return [self.decode_parts(row, skip_special_tokens, **kwargs) for row in generated_outputs]
        raise ValueError(f"generation_mode: expected 'text', 'image' or 'interleaved', got {generation_mode!r}.")

    def to_dict(self) -> dict:
        """The processor's settings; the VQ weights have files of their own."""
        settings = copy.copy(self)
        del settings.vq_model
        return super(MomaProcessor, settings).to_dict()

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """
        Writes all parts into one folder: settings, chat template and tokenizer at its top, the VQ model in the
        subfolder `vq_model`.

        Args:
            save_directory (`str` or `os.PathLike`):
                The folder; made where missing.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Whether to upload the processor as well.
            kwargs:
                `repo_id` (by default the folder's name) and further arguments of `push_to_hub`.

        Returns:
            `list[str]`: the settings file.
        """
        # the tokenizer saves the side that it was made with, not the one that it was given since
        self.tokenizer.init_kwargs["padding_side"] = self.tokenizer.padding_side
        files = super().save_pretrained(save_directory)
        # the base class leaves the map of the files that it has copied on the object, where loading never puts it
        self.__dict__.pop("auto_map", None)
        self.vq_model.save_pretrained(os.path.join(save_directory, VQ_SUBFOLDER))
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, **kwargs)
        return files

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        subfolder = kwargs.pop("subfolder", "")
        backend = kwargs.pop("backend", "torchvision" if is_torchvision_available() else "pil")
        # by class and not by an auto class, so that nothing need be registered for this package or its copy on the Hub
        image_processor_class = MomaImageProcessorPil if backend == "pil" else MomaImageProcessor
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        vq_model = kwargs.pop("vq_model", None)
        # each part takes the settings that it knows, as in the base class
        image_processor = image_processor_class.from_pretrained(
            pretrained_model_name_or_path, subfolder=subfolder, **kwargs
        )
        # a tokenizer keeps what it does not know, and would save it
        tokenizer_kwargs = {name: value for name, value in kwargs.items() if not hasattr(image_processor, name)}
        tokenizer = cls._load_tokenizer_from_pretrained(
            "tokenizer", pretrained_model_name_or_path, subfolder=subfolder, **tokenizer_kwargs
        )
        if vq_model is None:
            vq_model = MomaVQModel.from_pretrained(
                pretrained_model_name_or_path,
                subfolder=f"{subfolder}/{VQ_SUBFOLDER}" if subfolder else VQ_SUBFOLDER,
                dtype=torch.float32,
                **hub_kwargs,
            )
        return [image_processor, tokenizer, vq_model]


__all__ = ["DEFAULT_CHAT_TEMPLATE", "MomaProcessor"]
