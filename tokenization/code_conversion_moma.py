# SPDX-License-Identifier: Apache-2.0
"""Conversions between the items of each modality, their codes and token ids, in both directions."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.image_processing_utils import get_size_dict
from transformers.processing_utils import ProcessorMixin

from .codecs_moma import ModalityCodec
from .image_input_moma import MomaImageInputMixin, iter_image_sources
from .image_tokenizers_moma import LibraryImageTokenizer
from .modeling_moma_vq import MomaVQModel
from .processor_errors_moma import InputError
from .text_tokenizer_moma import IMAGE
from .token_frames_moma import TokenFrame, split_frames


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


class CodeConversionMixin(ProcessorMixin):
    """The methods of [`MomaProcessor`] that convert between items, codes and token ids."""

    tokenizer: PreTrainedTokenizerFast
    image_processor: MomaImageInputMixin
    vq_model: MomaVQModel | LibraryImageTokenizer
    codecs: dict[str, ModalityCodec]
    frames: dict[str, TokenFrame]
    codebook_size: int
    image_seq_length: int
    image_size: tuple[int, int]
    image_grid: tuple[int, int]
    image_token_offset: int
    begin_image_token_id: int
    end_image_token_id: int
    _vocab_size: int

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
        return codes + self._encode(pending) if pending else codes

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
        codes = [as_list(item_codes) for item_codes in self.codecs[modality].encode(items)]
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
        if modality == IMAGE:
            return self.decode_images(codes)
        codes = [as_list(item_codes) for item_codes in codes]
        for item_codes in codes:
            frame.check_codes(item_codes)
        return [self.codecs[modality].decode(item_codes) for item_codes in codes]

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
        return self._frame(modality).ids(as_list(codes))

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """Return the text that takes the place of one placeholder."""
        return self.frames[IMAGE].text(image_inputs["image_codes"][image_idx])

    def create_mm_token_type_ids(self, input_ids: list) -> list[list[int]]:
        """Return for each code the place of its modality in `MomaConfig.modalities`, and 0 for text."""
        types = {token: place for place, frame in enumerate(self.frames.values(), 1) for token in range(*frame.bounds)}
        return [[types.get(token, 0) for token in as_list(row)] for row in input_ids]

    def _frame(self, modality: str) -> TokenFrame:
        if modality not in self.frames:
            raise InputError(
                f"modality: {modality!r} is none of {list(self.frames)}; pass `codecs={{{modality!r}: codec}}`."
            )
        return self.frames[modality]

    @_own_threads()
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
        if isinstance(codes, (list, tuple)):
            # no images, as `encode_images` has no codes for
            if not codes:
                return []
            codes = [row.tolist() if hasattr(row, "tolist") else row for row in codes]
        code_table = torch.as_tensor(codes)
        if code_table.is_floating_point() and code_table.numel():
            raise InputError(f"codes: expected whole numbers, got {code_table.dtype}.")
        code_table = code_table.long()
        if code_table.ndim != 2 or code_table.shape[1] != self.image_seq_length:
            raise InputError(
                f"codes: expected the shape (num_images, {self.image_seq_length}), got {tuple(code_table.shape)}. "
                "For whole sequences of token ids use `decode_parts`, or the model's `decode_image_tokens` first."
            )
        if code_table.numel() == 0:
            return []
        if code_table.min() < 0 or code_table.max() >= self.codebook_size:
            raise InputError(
                f"codes: values from {int(code_table.min())} to {int(code_table.max())} lie outside "
                f"[0, {self.codebook_size}); subtract image_token_offset={self.image_token_offset} from token ids."
            )
        images = []
        for chunk in code_table.split(ENCODE_CHUNK):
            with torch.no_grad():
                pixel_values = self.vq_model.decode_image_tokens(chunk.to(self.vq_model.device))
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
        ids = as_list(ids)
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
            part = self._decode_text(run, skip_special_tokens, kwargs) if modality is None else next(items[modality])
            if modality is not None or part != "":
                parts.append(part)
        return parts

    def _decode_text(self, ids: list[int], skip_special_tokens: bool, kwargs: dict) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)
        # one sequence gives a string, a batch a list
        return text  # pyright: ignore[reportReturnType]

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


def as_list(values: Any) -> list[int]:
    """Return a list of numbers."""
    return values.tolist() if hasattr(values, "tolist") else list(values)
