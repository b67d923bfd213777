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
"""Pictures inside the stock `generate`: logits processors that keep the output a valid mix of text and pictures.

A picture is a begin-of-image token, exactly `config.image_seq_length` codes, and an end-of-image token. Whether a row
stands inside one is read from its ids at every step, so that beams, drafted candidates and rows in different states
need no bookkeeping.

Shape suffixes: B rows, T positions, V vocabulary.
"""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers.generation import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from .configuration_moma import MomaConfig


GENERATION_MODES = ("text", "image", "interleaved")
IMAGE = "image"
# new tokens that the stock loop generates when nobody says how many
STOCK_NEW_TOKENS = 20


class PictureTokens:
    """Which ids are codes, begin-of-image and end-of-image, and how far a row is into a picture.

    Args:
        config (`MomaConfig`): gives the ids and the number of codes of one picture.

    Raises:
        ValueError: the configuration has no picture tokens.
    """

    def __init__(self, config: MomaConfig):
        if not self.exist_in(config):
            raise ValueError(
                "The configuration has no picture tokens: `modality_token_ranges['image']`, `begin_image_token_id` "
                f"and `end_image_token_id` are needed, got {config.modality_token_ranges}, "
                f"{config.begin_image_token_id} and {config.end_image_token_id}. A text-only model can use "
                "generation_mode='text' alone."
            )
        self.ranges = config.modality_token_ranges[IMAGE]
        self.begin = config.begin_image_token_id
        self.end = config.end_image_token_id
        self.length = config.image_seq_length
        self.code_V = self.is_code(torch.arange(config.vocab_size))

    @staticmethod
    def exist_in(config: MomaConfig) -> bool:
        """Whether a model of this configuration can write pictures."""
        frame = (config.begin_image_token_id, config.end_image_token_id)
        return IMAGE in config.modality_token_ranges and None not in frame

    def is_code(self, ids: torch.Tensor) -> torch.Tensor:
        """True where an id is a picture code."""
        found = torch.zeros_like(ids, dtype=torch.bool)
        for start, stop in self.ranges:
            found |= (ids >= start) & (ids < stop)
        return found

    def to_codes(self, ids: torch.Tensor) -> torch.Tensor:
        """Code numbers, from 0, of ids that are codes."""
        codes = torch.zeros_like(ids)
        first = 0
        for start, stop in self.ranges:
            codes = torch.where((ids >= start) & (ids < stop), ids - start + first, codes)
            first += stop - start
        return codes

    def open_codes(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Codes that each row has written of the picture it is in, `[B]`; -1 for rows that are in none."""
        # a column before the row, so that rows of codes alone and empty rows have a last id that is no code
        ids = nn.functional.pad(ids_BT, (1, 0), value=-1)
        places = torch.arange(ids.shape[1], device=ids.device)
        last_B = torch.where(self.is_code(ids), 0, places).amax(dim=1)
        inside_B = ids.gather(1, last_B[:, None])[:, 0] == self.begin
        return torch.where(inside_B, (ids.shape[1] - 1 - last_B).clamp(max=self.length), -1)


class PictureLogitsProcessor(LogitsProcessor):
    """Inside a picture only codes, after the last of them the end-of-image; outside neither of the two.

    Args:
        tokens (`PictureTokens`): the ids.
    """

    def __init__(self, tokens: PictureTokens):
        self.tokens = tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        tokens = self.tokens
        code_V = tokens.code_V.to(scores.device)
        count_B = tokens.open_codes(input_ids)
        scores = scores.masked_fill(code_V != (count_B >= 0)[:, None], -torch.inf)
        scores[:, tokens.end] = -torch.inf
        return _force(scores, count_B == tokens.length, tokens.end)


class NoPictureLogitsProcessor(LogitsProcessor):
    """Text only: never a code, begin-of-image or end-of-image.

    Args:
        tokens (`PictureTokens`): the ids.
    """

    def __init__(self, tokens: PictureTokens):
        self.tokens = tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.masked_fill(self.tokens.code_V.to(scores.device), -torch.inf)
        scores[:, [self.tokens.begin, self.tokens.end]] = -torch.inf
        return scores


class OnePictureLogitsProcessor(LogitsProcessor):
    """Outside a picture: its begin, as long as the row has not finished one, and then the end of the row.

    Args:
        tokens (`PictureTokens`): the ids.
        prompt_length (`int`): positions of the prompt, whose own pictures do not count.
        stop_token_id (`int`): token that ends a row.
    """

    def __init__(self, tokens: PictureTokens, prompt_length: int, stop_token_id: int):
        self.tokens = tokens
        self.prompt_length = prompt_length
        self.stop_token_id = stop_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        outside_B = self.tokens.open_codes(input_ids) < 0
        done_B = (input_ids[:, self.prompt_length :] == self.tokens.end).any(dim=1)
        scores = _force(scores, outside_B & ~done_B, self.tokens.begin)
        return _force(scores, outside_B & done_B, self.stop_token_id)


class FittingPictureLogitsProcessor(LogitsProcessor):
    """No begin-of-image where the whole picture no longer fits.

    Args:
        tokens (`PictureTokens`): the ids.
        max_length (`int`): positions of the prompt and everything generated.
    """

    def __init__(self, tokens: PictureTokens, max_length: int):
        self.tokens = tokens
        self.max_length = max_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if input_ids.shape[1] + self.tokens.length + 2 > self.max_length:
            scores = scores.clone()
            scores[:, self.tokens.begin] = -torch.inf
        return scores


class PictureEndCriteria(StoppingCriteria):
    """A row ends with its picture: for beams, whose scores are means over all their tokens, a forced one included.

    Args:
        tokens (`PictureTokens`): the ids.
        prompt_length (`int`): positions of the prompt, whose own pictures do not count.
    """

    def __init__(self, tokens: PictureTokens, prompt_length: int):
        self.tokens = tokens
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        return (input_ids[:, -1] == self.tokens.end) & (input_ids.shape[1] > self.prompt_length)


GRAMMAR = (PictureLogitsProcessor, NoPictureLogitsProcessor)


def _force(scores: torch.Tensor, rows_B: torch.Tensor, token_id: int) -> torch.Tensor:
    # log-probability 0: a forced token costs a beam nothing, and is possible even where another processor forbade it
    forced = torch.full_like(scores, -torch.inf)
    forced[:, token_id] = 0.0
    return torch.where(rows_B[:, None], forced, scores)


class MomaGenerationMixin(GenerationMixin):
    """Adds `generation_mode` to the stock `generate`, and reads the codes out of what it generated."""

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        *,
        generation_mode: str | None = "text",
        **kwargs,
    ):
        r"""
        The stock `generate` with a grammar for pictures; all its decoding strategies and arguments are available.

        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The prompts, padded on the left; also as `input_ids`. They may hold pictures, and may end inside one.
            generation_config (`GenerationConfig`, *optional*):
                As in the stock method.
            logits_processor (`LogitsProcessorList`, *optional*):
                The caller's own processors; the grammar comes after them.
            generation_mode (`str`, *optional*, defaults to `"text"`):
                - `"text"` (also `None`): no picture tokens.
                - `"image"`: one picture in each row and nothing else. Begin-of-image is written unless the prompt
                  ends with it; a picture that the prompt has begun is finished. Without `max_new_tokens` or
                  `max_length` the length is what the picture needs.
                - `"interleaved"`: text, with pictures where the model begins one. A picture that no longer fits into
                  `max_new_tokens` is not begun.
            kwargs:
                As in the stock method. With `guidance_scale` other than 1 and no `negative_prompt_ids`, the
                unconditional branch sees the beginning token and the picture alone.

        Returns:
            `torch.LongTensor` or `ModelOutput`: as from the stock method, prompts included. Rows end at
            `config.max_position_embeddings`, whatever length is asked for.

        Raises:
            ValueError: an unknown mode; an empty or all-padding prompt; pictures asked of a text-only model; no room
                for a whole picture; a prompt that ends inside a picture in text mode; guidance together with a
                decoding strategy whose unconditional branch would go wrong.
        """
        mode = "text" if generation_mode is None else generation_mode
        if mode not in GENERATION_MODES:
            raise ValueError(f"`generation_mode` must be one of {GENERATION_MODES}, got {generation_mode!r}.")
        processors = LogitsProcessorList(logits_processor or [])
        # an assistant model is called with the processors of the model that it drafts for
        if any(isinstance(processor, GRAMMAR) for processor in processors):
            return super().generate(inputs, generation_config, processors, **kwargs)
        prompt = self._prompt_ids(inputs, kwargs)
        _check_prompt(prompt, kwargs)
        if mode != "text" or PictureTokens.exist_in(self.config):
            tokens = PictureTokens(self.config)
            width = prompt.shape[1] or kwargs["inputs_embeds"].shape[1]
            room = _new_tokens(width, kwargs.get, generation_config)
            if mode == "image" and room is None:
                room = int(_missing_tokens(tokens, prompt).max())
                if generation_config is None:
                    kwargs["max_new_tokens"] = room
                else:
                    generation_config = copy.deepcopy(generation_config)
                    generation_config.max_new_tokens = room
            elif room is None:
                room = _new_tokens(width, {}.get, self.generation_config) or STOCK_NEW_TOKENS
            processors += self._grammar(mode, tokens, prompt, width, room)
            if mode == "image":
                stop = self._stop_token(generation_config, kwargs)
                processors.append(OnePictureLogitsProcessor(tokens, prompt.shape[1], stop))
                if (self._option("num_beams", generation_config, kwargs) or 1) > 1:
                    criteria = [*(kwargs.get("stopping_criteria") or []), PictureEndCriteria(tokens, prompt.shape[1])]
                    kwargs["stopping_criteria"] = StoppingCriteriaList(criteria)
            kwargs.update(self._guidance(tokens, prompt, generation_config, kwargs))
        return super().generate(inputs, generation_config, processors, **kwargs)

    def _prepare_generated_length(self, generation_config, **kwargs):
        """The stock lengths, but none that leads beyond the positions that the model has seen."""
        generation_config = super()._prepare_generated_length(generation_config, **kwargs)
        # scaled rotary embeddings are made to go beyond
        if self.config.rope_parameters["rope_type"] == "default":
            # rows of embeddings are not among the ids that are counted
            width = kwargs["inputs_tensor"].shape[1]
            is_apart = kwargs["model_input_name"] == "inputs_embeds" and kwargs["input_ids_length"] != width
            limit = self.config.max_position_embeddings - (width if is_apart else 0)
            generation_config.max_length = min(generation_config.max_length, limit)
        return generation_config

    def _beam_search(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        """The stock search, whose rows are padded after their end: a padding token of id 0 counts as none there."""
        output = super()._beam_search(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)
        if generation_config._pad_token_tensor is None or generation_config._eos_token_tensor is None:
            return output
        stops = generation_config._eos_token_tensor
        for criterion in stopping_criteria:
            if isinstance(criterion, PictureEndCriteria):
                stops = torch.cat([stops, stops.new_tensor([criterion.tokens.end])])
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        # in place, whichever of the two was returned
        new_BT = sequences[:, input_ids.shape[1] :]
        is_stop_BT = torch.isin(new_BT, stops)
        new_BT.masked_fill_(is_stop_BT.cumsum(1) > is_stop_BT.long(), generation_config._pad_token_tensor)
        return output

    def _get_candidate_generator(self, generation_config, *args, **kwargs):
        """The stock generator of drafts, which may draft beyond the longest row by itself."""
        generator = super()._get_candidate_generator(generation_config, *args, **kwargs)
        draft, longest = generator.get_candidates, generation_config.max_length

        def draft_within(input_ids, *args, **kwargs):
            candidate_ids, logits = draft(input_ids, *args, **kwargs)
            # the model adds a token of its own to the drafts
            num_drafts = max(0, min(candidate_ids.shape[1], longest - 1) - input_ids.shape[1])
            candidate_ids = candidate_ids[:, : input_ids.shape[1] + num_drafts]
            return candidate_ids, None if logits is None else logits[:, :num_drafts]

        generator.get_candidates = draft_within
        return generator

    def decode_image_tokens(self, image_tokens: torch.LongTensor) -> torch.LongTensor:
        """Take the pictures' codes out of token ids, as the VQ model and the processor want them.

        Args:
            image_tokens (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Token ids, of which all pictures are taken, also those of the prompt.

        Returns:
            `torch.LongTensor` of shape `(num_pictures, image_seq_length)`: codes from 0, row by row, in order.

        Raises:
            ValueError: a picture is incomplete, or a code stands outside a picture.
        """
        tokens = PictureTokens(self.config)
        if image_tokens.ndim != 2:
            raise ValueError(f"`image_tokens` must have two dimensions, got shape {tuple(image_tokens.shape)}.")
        # what ends too early is completed by ids that are neither code nor end
        ids = nn.functional.pad(image_tokens, (0, tokens.length + 1), value=-1)
        row_P, column_P = (ids == tokens.begin).nonzero(as_tuple=True)
        offsets = torch.arange(1, tokens.length + 2, device=ids.device)
        pictures = ids[row_P[:, None], column_P[:, None] + offsets]
        codes, ends = pictures[:, :-1], pictures[:, -1]
        is_code = tokens.is_code(codes)
        whole_P = is_code.all(dim=1) & (ends == tokens.end)
        if not whole_P.all():
            bad = int((~whole_P).nonzero()[0])
            raise ValueError(
                f"`image_tokens`: the picture at row {int(row_P[bad])}, position {int(column_P[bad])} is incomplete, "
                f"with {int(is_code[bad].cumprod(dim=0).sum())} codes before another token; a picture has "
                f"{tokens.length} codes and an end-of-image token. Generate with generation_mode='image'."
            )
        num_codes = int(tokens.is_code(image_tokens).sum())
        if num_codes != codes.numel():
            raise ValueError(
                f"`image_tokens`: {num_codes - codes.numel()} codes stand outside the {len(codes)} pictures found. "
                "Pass the sequences from their begin-of-image tokens on."
            )
        return tokens.to_codes(codes)

    def _prompt_ids(self, inputs, kwargs):
        """The ids that the loop starts from: none in rows of `inputs_embeds`, the beginning token without a prompt."""
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        embeds = kwargs.get("inputs_embeds")
        if prompt is None and embeds is not None:
            return torch.empty(embeds.shape[0], 0, dtype=torch.long, device=embeds.device)
        if prompt is None:
            return torch.full((1, 1), self.config.bos_token_id or 0, device=self.device)
        return prompt

    def _grammar(self, mode, tokens, prompt, prompt_width, room):
        """Processors of a mode, after a check that every picture has its room."""
        open_B = tokens.open_codes(prompt) >= 0
        if mode == "text":
            if open_B.any():
                raise ValueError(
                    f"The prompt of row {int(open_B.nonzero()[0])} ends inside a picture, which text cannot continue: "
                    "use generation_mode='image' or 'interleaved', or end the picture."
                )
            return [NoPictureLogitsProcessor(tokens)]
        context = None
        # scaled rotary embeddings are made to go beyond
        if self.config.rope_parameters["rope_type"] == "default":
            context = self.config.max_position_embeddings - prompt_width
        missing_B = _missing_tokens(tokens, prompt)
        needed = int(missing_B.max()) if mode == "image" else int(torch.where(open_B, missing_B, 0).max())
        if needed > room:
            raise ValueError(
                f"A picture of {tokens.length} codes needs {needed} new tokens, but there is room for {room}: raise "
                f"`max_new_tokens` to at least {needed} (or `max_length` to {needed + prompt_width}), or leave both "
                "out with generation_mode='image'."
            )
        if context is not None and needed > context:
            raise ValueError(
                f"A prompt of {prompt_width} positions and a picture that needs {needed} new tokens exceed "
                f"`max_position_embeddings` ({self.config.max_position_embeddings}): shorten the prompt."
            )
        if mode == "image":
            return [PictureLogitsProcessor(tokens)]
        fitting = room if context is None else min(room, context)
        return [PictureLogitsProcessor(tokens), FittingPictureLogitsProcessor(tokens, prompt.shape[1] + fitting)]

    def _option(self, name, generation_config, kwargs):
        sources = (
            kwargs.get(name),
            getattr(generation_config, name, None),
            getattr(self.generation_config, name, None),
        )
        return next((value for value in sources if value is not None), None)

    def _stop_token(self, generation_config, kwargs):
        for name in ("eos_token_id", "pad_token_id"):
            value = self._option(name, generation_config, kwargs)
            value = value[0] if isinstance(value, (list, tuple)) else value
            if value is not None:
                return int(value)
        raise ValueError("generation_mode='image' needs an `eos_token_id` or a `pad_token_id` to end rows with.")

    def _guidance(self, tokens, prompt, generation_config, kwargs):
        """The negative prompt of the stock guidance: one row for every row of the loop, unconditional by default."""
        if self._option("guidance_scale", generation_config, kwargs) in (None, 1):
            return {}
        for name in ("num_beams", "prompt_lookup_num_tokens", "assistant_model"):
            if self._option(name, generation_config, kwargs) not in (None, 1):
                raise ValueError(
                    f"`guidance_scale` cannot be combined with `{name}`: the unconditional branch of the stock loop "
                    "follows neither reordered beams nor drafted tokens. Use greedy decoding or sampling."
                )
        ids, mask = kwargs.get("negative_prompt_ids"), kwargs.get("negative_prompt_attention_mask")
        if ids is None:
            if self.config.bos_token_id is None:
                return {}
            ids, mask = _unconditional_prompt(tokens, prompt, self.config.bos_token_id)
        elif ids.shape[0] != prompt.shape[0]:
            raise ValueError(
                f"`negative_prompt_ids` has {ids.shape[0]} rows, but there are {prompt.shape[0]} prompts: each needs "
                "one."
            )
        copies = self._option("num_return_sequences", generation_config, kwargs) or 1
        return {
            "negative_prompt_ids": ids.repeat_interleave(copies, dim=0),
            "negative_prompt_attention_mask": None if mask is None else mask.repeat_interleave(copies, dim=0),
        }


def _check_prompt(prompt, kwargs):
    if prompt.ndim != 2:
        raise ValueError(f"`input_ids` must have two dimensions, rows and positions, got shape {tuple(prompt.shape)}.")
    if prompt.shape[0] == 0 or (prompt.shape[1] == 0 and kwargs.get("inputs_embeds") is None):
        raise ValueError(
            f"`input_ids` is empty, its shape is {tuple(prompt.shape)}: a prompt needs one token at least, such as "
            "the beginning token."
        )
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and not mask.any(dim=1).all():
        row = int((~mask.any(dim=1)).nonzero()[0])
        raise ValueError(f"`attention_mask`: row {row} is all padding; a prompt needs one token at least.")


def _new_tokens(prompt_width, get_argument, generation_config):
    """Room for new tokens that the arguments, or else a generation config, ask for; `None` without such a wish."""
    for get in (get_argument, lambda name: getattr(generation_config, name, None)):
        if get("max_new_tokens") is not None:
            return get("max_new_tokens")
        if get("max_length") is not None:
            return get("max_length") - prompt_width
    return None


def _missing_tokens(tokens, prompt):
    """New tokens that complete the picture of each row, `[B]`, its begin included where it has none yet."""
    open_B = tokens.open_codes(prompt)
    return torch.where(open_B >= 0, tokens.length - open_B + 1, tokens.length + 2)


def _unconditional_prompt(tokens, prompt, bos_token_id):
    """The beginning token, and what each prompt already holds of an open picture; padded on the left."""
    open_B = tokens.open_codes(prompt)
    width = prompt.shape[1] + 1
    start_B = torch.where(open_B >= 0, width - 2 - open_B, width - 1)
    ids = nn.functional.pad(prompt, (1, 0)).scatter(1, start_B[:, None], bos_token_id)
    mask = (torch.arange(width, device=prompt.device) >= start_B[:, None]).long()
    first = int(start_B.min())
    return ids[:, first:], mask[:, first:]


__all__ = [
    "GENERATION_MODES",
    "FittingPictureLogitsProcessor",
    "MomaGenerationMixin",
    "NoPictureLogitsProcessor",
    "OnePictureLogitsProcessor",
    "PictureEndCriteria",
    "PictureLogitsProcessor",
    "PictureTokens",
]
