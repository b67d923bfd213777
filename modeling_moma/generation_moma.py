# SPDX-License-Identifier: Apache-2.0
"""Text, images and other modalities from the stock `generate`, and their codes out of what it generated.

The grammar stands in logits processors, which keep what is written a valid mix of text and of frames of other
modalities. Whether a row stands inside a frame is read from its ids at every step, so that beams, drafted candidates
and rows in different states need no bookkeeping.

Shape suffixes: B rows, T positions, V vocabulary.
"""

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.generation import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.utils import GenerateOutput
from transformers.utils import logging

from .compat_moma import GenerationCompat
from .configuration_moma import MomaConfig
from .cpu_moma import is_on_cpu
from .errors_moma import InputError
from .frames_moma import IMAGE, INTERLEAVED, TEXT, ModalityFrame, in_ranges, open_frame_codes
from .routing_moma import RULES
from .token_groups_moma import seen_positions, token_modalities


logger = logging.get_logger(__name__)


class FrameLogitsProcessor(LogitsProcessor):
    """Inside a frame only its codes and, when it may end, its end; outside neither codes nor ends.

    A frame of fixed length ends after its last code. One of any length may end after its first code, and must end
    where only one token is left.
    """

    is_moma_grammar = True

    def __init__(self, config: MomaConfig, max_length: int):
        self.frames = config.frames
        self.max_length = max_length
        ids_V = torch.arange(config.vocab_size)
        outside_V = ~_all_codes(config)
        outside_V[[frame.end for frame in self.frames.values()]] = False
        allowed_SV = torch.stack([outside_V, *(frame.is_code(ids_V) for frame in self.frames.values())])
        # banned tokens by state: outside all frames, then inside the frame of each modality
        self.banned_SV = ~allowed_SV

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Give all tokens but those that may come next a score of minus infinity, `[B, V]`."""
        return self._continued(input_ids, scores, [frame.open_codes(input_ids) for frame in self.frames.values()])

    def _continued(self, input_ids: torch.Tensor, scores: torch.Tensor, counts: list[torch.Tensor]) -> torch.Tensor:
        """Return the scores of what may come next, given how many codes `[B]` of each modality's frame are written."""
        # copied in the first step alone
        self.banned_SV = self.banned_SV.to(scores.device)
        state_B = sum((count_B >= 0).long() * index for index, count_B in enumerate(counts, start=1))
        banned_BV = self.banned_SV.index_select(0, state_B)  # pyright: ignore[reportArgumentType]
        is_last_place = input_ids.shape[1] + 1 >= self.max_length
        frames = list(self.frames.values())
        for frame, count_B in zip(frames, counts):
            if frame.length is None:
                banned_BV[:, frame.end] &= count_B < 1
        scores = scores.masked_fill(banned_BV, -torch.inf)
        for frame, count_B in zip(frames, counts):
            must_end_B = (count_B >= 1) & is_last_place if frame.length is None else count_B == frame.length
            force_token_(scores, must_end_B, frame.end)
        return scores


class TextOnlyLogitsProcessor(LogitsProcessor):
    """Text only: never a code of any modality, nor the begin or end of a frame."""

    is_moma_grammar = True

    def __init__(self, config: MomaConfig):
        self.banned_V = _all_codes(config)
        for frame in config.frames.values():
            self.banned_V[[frame.begin, frame.end]] = True

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Give all codes and tokens of frames a score of minus infinity, `[B, V]`."""
        # copied in the first step alone
        self.banned_V = self.banned_V.to(scores.device)
        return scores.masked_fill(self.banned_V, -torch.inf)


class OneFrameLogitsProcessor(FrameLogitsProcessor):
    """Outside a frame: its begin, as long as the row has not finished one, and then the end of the row."""

    def __init__(
        self, config: MomaConfig, max_length: int, frame: ModalityFrame, prompt_length: int, stop_token_id: int
    ):
        super().__init__(config, max_length)
        self.frame = frame
        self.prompt_length = prompt_length
        self.stop_token_id = stop_token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Give all tokens but those that continue the frame a score of minus infinity, `[B, V]`."""
        counts = [frame.open_codes(input_ids) for frame in self.frames.values()]
        scores = self._continued(input_ids, scores, counts)
        outside_B = counts[list(self.frames).index(self.frame.modality)] < 0
        done_B = (input_ids[:, self.prompt_length :] == self.frame.end).any(dim=1)
        force_token_(scores, outside_B & ~done_B, self.frame.begin)
        force_token_(scores, outside_B & done_B, self.stop_token_id)
        return scores


class FittingFrameLogitsProcessor(LogitsProcessor):
    """No begin of a frame where the shortest complete one no longer fits."""

    def __init__(self, config: MomaConfig, max_length: int):
        self.frames = config.frames
        self.max_length = max_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Give tokens that begin a frame a score of minus infinity where it would not fit, `[B, V]`."""
        num_new = self.max_length - input_ids.shape[1]
        too_long = [frame.begin for frame in self.frames.values() if frame.fewest_codes + 2 > num_new]
        if too_long:
            scores = scores.clone()
            # a list of them would be copied to the device
            for token_id in too_long:
                scores[:, token_id] = -torch.inf
        return scores


class CaptionBeginLogitsProcessor(LogitsProcessor):
    """Some tokens never begin the text behind a frame that stands alone: what a caption of its own is not to be."""

    def __init__(self, config: MomaConfig, token_ids: Sequence[int], prompt_length: int, pad_token_id: int | None):
        self.frames = config.frames
        self.token_ids, self.prompt_length = list(token_ids), prompt_length
        self.is_text_V = ~_all_codes(config)
        around = [token for frame in self.frames.values() for token in (frame.begin, frame.end)]
        others = [token for token in (config.bos_token_id, pad_token_id) if token is not None]
        self.is_text_V[[*around, *others]] = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Give these tokens a score of minus infinity in rows that are one frame and nothing else yet, `[B, V]`."""
        if input_ids.shape[1] != self.prompt_length:
            return scores
        self.is_text_V = self.is_text_V.to(input_ids.device)
        ends_BT = torch.stack([input_ids == frame.end for frame in self.frames.values()]).any(dim=0)
        is_alone_B = ends_BT[:, -1] & (ends_BT.sum(dim=1) == 1) & ~self.is_text_V[input_ids].any(dim=1)
        scores = scores.clone()
        for token_id in self.token_ids:
            scores[:, token_id].masked_fill_(is_alone_B, -torch.inf)
        return scores


class FrameEndCriteria(StoppingCriteria):
    """A row ends with its frame: for beams, whose scores are means over all their tokens, a forced one included."""

    def __init__(self, frame: ModalityFrame, prompt_length: int):
        self.end_token_id = frame.end
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        """Return True for rows that have ended their frame, `[B]`."""
        return (input_ids[:, -1] == self.end_token_id) & (input_ids.shape[1] > self.prompt_length)


def force_token_(scores: torch.Tensor, rows_B: torch.Tensor, token_id: int) -> None:
    """Leave one token to some of the rows."""
    # most steps force no row
    if is_on_cpu(rows_B) and not rows_B.any():
        return
    scores.masked_fill_(rows_B[:, None], -torch.inf)
    # log-probability 0: a forced token costs a beam nothing, and is possible even where another processor forbade it
    scores[:, token_id].masked_fill_(rows_B, 0.0)


def _all_codes(config: MomaConfig) -> torch.Tensor:
    ranges = [bounds for ranges in config.modality_token_ranges.values() for bounds in ranges]
    return in_ranges(torch.arange(config.vocab_size), ranges)


# new tokens that the stock loop generates by default
STOCK_NEW_TOKENS = 20
# what a model's own configuration says against repeated words means no codes, many of which are alike
OF_WORDS = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
# options that say how tokens are chosen: whoever gives one of them has a way of their own
CHOOSING = frozenset(
    {"do_sample", "temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}
    | {"num_beams", "guidance_scale", "penalty_alpha", "constraints", "force_words_ids"}
)
# of drafted tokens, and of routing, which the unconditional branch of the stock guidance does not follow or get
DRAFTING = ("prompt_lookup_num_tokens", "assistant_model", "assistant_early_exit")
ROUTING = ("routing", "depth_routing")
# options that say how much is generated; the stock loop heeds the second where the first is nowhere
LENGTHS = ("max_new_tokens", "max_length")


class MomaGenerationMixin(GenerationCompat):
    """Adds `generation_mode` to the stock `generate`, and reads the codes out of what it generated."""

    config: MomaConfig

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        *,
        generation_mode: str | None = None,
        caption_suppress_tokens: Sequence[int] | None = None,
        **kwargs,
    ) -> GenerateOutput | torch.Tensor:
        r"""Generate as the stock method does, under a grammar for images and other modalities.

        All decoding strategies and arguments of the stock method are available.

        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The prompts, padded on the left; also as `input_ids`. They may hold images, and may end inside one.
            generation_config (`GenerationConfig`, *optional*):
                As in the stock method.
            logits_processor (`LogitsProcessorList`, *optional*):
                The caller's own processors; the grammar comes after them.
            generation_mode (`str`, *optional*):
                By default that of `generation_config`, or of the model's, or else `"text"`.

                - `"text"`: no token of another modality.
                - `"image"`, or another modality of `config.frames`: one frame (an image, a sound) in each row and
                  nothing else. Its begin is written unless the prompt ends with it; a frame that the prompt has begun
                  is finished. Without `max_new_tokens` or `max_length` among the arguments the length is what the
                  frame needs; one of any length may go on to the end of the context. Where neither
                  `generation_config` nor any option by which tokens are chosen is given (`do_sample`, `temperature`,
                  `num_beams`, `guidance_scale`, ...), those of an image are the model's own, a `dict` in its
                  `generation_config.image_sampling`, if there is one; without its guidance where tokens are drafted
                  or `routing` is given.
                - `"interleaved"`: text, with frames where the model begins one. A frame that no longer fits into
                  `max_new_tokens` is not begun.
            caption_suppress_tokens (`Sequence[int]`, *optional*):
                Tokens that do not begin the text behind an image, or another frame, that stands alone: the end of a
                document where some have no caption, or what begins other texts than names. By default those of
                `generation_config`, or of the model's; `[]` for none.
            kwargs (`Any`):
                As in the stock method. With `guidance_scale` other than 1 the unconditional branch sees
                `negative_prompt_ids`, by default the beginning token, then what the prompt holds of a frame that it
                has begun, and what is generated. To go on from a `cache`, give the ids of all turns, or the new ones
                alone and an `attention_mask` over the cached positions and theirs; a frame that is open in the cache
                goes on with the ids of all turns alone. Beside `inputs_embeds`, `input_ids` tell their modalities.

        Returns:
            `torch.LongTensor` or `ModelOutput`: as from the stock method, prompts included. Rows end at
            `config.max_position_embeddings`, whatever length is asked for.

        Raises:
            ValueError: an unknown mode; a suppressed token that is none; an `image_sampling` of other options; an
                empty, all-padding or too long prompt; a cache that holds all of it; a paged cache; a modality that the
                configuration has no frame for; too few tokens for a frame; a prompt that ends inside a frame of a
                modality that the mode does not write, or in embeddings without ids, or that begins inside one, behind
                a cache; guidance together with `routing`, or with a decoding strategy whose unconditional branch
                would go wrong; `prefill_chunk_size` together with `inputs_embeds`.
        """
        mode = self._option("generation_mode", generation_config, {"generation_mode": generation_mode})
        mode = TEXT if mode is None else mode
        self._check_mode(mode)
        if mode == IMAGE and generation_config is None and CHOOSING.isdisjoint(kwargs):
            own = own_image_sampling(self.generation_config)
            # a guidance that nobody asked for is no reason to refuse what does not go with it
            is_unguided = any(kwargs.get(name) is not None for name in (*DRAFTING, *ROUTING))
            kwargs |= {name: value for name, value in own.items() if name != "guidance_scale" or not is_unguided}
        own_rule = self.config.training_routing if self.training else self.config.inference_routing
        rule = RULES.get(kwargs.get("routing") or own_rule)
        if rule is not None and not rule.is_causal:
            advice = "Leave out `routing`." if kwargs.get("routing") else "Call `model.eval()` first."
            logger.warning_once(
                f"`generate` routes by {rule.name!r}, whose experts choose among the tokens of a step: each new token "
                f"meets more of them than in training. {advice}"
            )
        processors = LogitsProcessorList(logits_processor or [])
        # an assistant model is called with the processors of the model that it drafts for, which may come from
        # another copy of this module
        if any(getattr(processor, "is_moma_grammar", False) for processor in processors):
            return self._generate(inputs, generation_config, processors, kwargs)
        self._check_options(generation_config, kwargs)
        prompt = self._prompt_ids(inputs, kwargs)
        _check_prompt(prompt, self._option("pad_token_id", generation_config, kwargs), self.config, kwargs)
        num_before = _positions_before(prompt, kwargs)
        embeds = kwargs.get("inputs_embeds")
        if embeds is not None and prompt.shape == embeds.shape[:2] and kwargs.get("mm_token_type_ids") is None:
            kwargs["mm_token_type_ids"] = token_modalities(self.config, prompt)
        if self.config.modality_token_ranges:
            generation_config = self._follow_grammar(mode, prompt, num_before, generation_config, processors, kwargs)
            suppressed = {"caption_suppress_tokens": caption_suppress_tokens}
            ids = _checked_tokens(self._option("caption_suppress_tokens", generation_config, suppressed), self.config)
            # behind a cache nothing tells whether a frame stands alone
            may_caption = bool(self.config.frames) and not num_before and prompt.shape[1] > 0
            if ids and mode in (TEXT, INTERLEAVED) and may_caption:
                pad_token_id = self._option("pad_token_id", generation_config, kwargs)
                processors.append(CaptionBeginLogitsProcessor(self.config, ids, prompt.shape[1], pad_token_id))
        if num_before:
            width = _width(prompt, kwargs)
            context = self._context_left(num_before + width)
            # the stock loop counts ids alone
            if context is not None and context < self._new_tokens(width, generation_config, kwargs):
                generation_config = _with_new_tokens(max(context, 1), generation_config, kwargs)
        return self._generate(inputs, generation_config, processors, kwargs)

    def _generate(
        self,
        inputs: torch.Tensor | None,
        generation_config: GenerationConfig | None,
        processors: LogitsProcessorList,
        kwargs: dict,
    ) -> GenerateOutput | torch.Tensor:
        """Run the stock method, and pad beams after their end."""
        output: Any = super().generate(inputs, generation_config, processors, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        option = partial(self._option, generation_config=generation_config, kwargs=kwargs)
        pad_token_id, ends = option("pad_token_id"), option("eos_token_id")
        ends = [] if ends is None else torch.as_tensor(ends).flatten().tolist()
        ends += [each.end_token_id for each in kwargs.get("stopping_criteria") or () if hasattr(each, "end_token_id")]
        # the stock search takes a padding token of id 0 for none
        if (option("num_beams") or 1) > 1 and pad_token_id is not None and ends:
            sequences_BT = output if isinstance(output, torch.Tensor) else output.sequences
            ids = kwargs.get("input_ids") if inputs is None else inputs
            new_BT = sequences_BT[:, 0 if ids is None else ids.shape[1] :]
            is_end_BT = torch.isin(new_BT, new_BT.new_tensor(ends))
            new_BT.masked_fill_(is_end_BT.cumsum(1) > is_end_BT.long(), int(pad_token_id))
        return output

    def decode_image_tokens(self, image_tokens: torch.Tensor) -> torch.Tensor:
        """Take the images' codes out of token ids, as the VQ model and the processor want them.

        Args:
            image_tokens (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Token ids, of which all images are taken, also those of the prompt.

        Returns:
            `torch.LongTensor`: codes from 0, row by row, in order, `(num_images, image_seq_length)`. Its attribute
            `last_of_rows` names the last image of each row, which the processor's `post_process_multimodal_output`
            takes.

        Raises:
            ValueError: the model writes no images, an image is incomplete, or a code stands outside an image.
        """
        frame = self._frame(IMAGE)
        codes = frame.read_codes(image_tokens, "image_tokens")
        count_B = (image_tokens == frame.begin).sum(dim=1)
        # the stock pipeline hands these codes alone to the processor, which could not tell the rows apart
        codes.last_of_rows = (count_B.cumsum(0) - 1)[count_B > 0]  # pyright: ignore[reportAttributeAccessIssue]
        # all images have one length, so this is a tensor
        return codes  # pyright: ignore[reportReturnType]

    def decode_modality_tokens(self, ids: torch.Tensor, modality: str) -> torch.Tensor | list[torch.Tensor]:
        """Take the codes of a modality's frames out of token ids, as its codec wants them.

        Args:
            ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Token ids, of which all frames of the modality are taken, also those of the prompt.
            modality (`str`):
                One of `config.frames`.

        Returns:
            `torch.LongTensor | list[torch.LongTensor]`: codes from 0, row by row, in order, `(num_frames, length)`, or
            where the length of a frame varies one tensor `(num_codes,)` for each.

        Raises:
            ValueError: a modality without a frame, a frame that is incomplete, or a code outside a frame.
        """
        return self._frame(modality).read_codes(ids)

    def _frame(self, modality: str) -> ModalityFrame:
        frames = self.config.frames
        if modality not in frames:
            fields = "`begin_image_token_id` and `end_image_token_id`" if modality == IMAGE else "`modality_frames`"
            raise InputError(
                f"The configuration has no frame for {modality!r}, only for {list(frames)}: "
                f"`modality_token_ranges[{modality!r}]` and {fields} are needed. A model without frames can use "
                "generation_mode='text' alone."
            )
        return frames[modality]

    def _check_mode(self, mode: str) -> None:
        modes = (TEXT, INTERLEAVED, *self.config.frames)
        if mode in (IMAGE, *self.config.modality_token_ranges):
            self._frame(mode)
        if mode not in modes:
            raise InputError(f"`generation_mode` must be one of {modes}, got {mode!r}.")
        if mode == INTERLEAVED and len(modes) == 2:
            self._frame(IMAGE)

    def _check_options(self, generation_config: GenerationConfig | None, kwargs: dict) -> None:
        if self._option("cache_implementation", generation_config, kwargs) == "paged":
            raise InputError(
                "`cache_implementation` is 'paged': continuous batching heeds no `generation_mode`, `attention_mask` "
                "or `logits_processor`. Call `generate_batch` with lists of ids, without padding."
            )
        if kwargs.get("inputs_embeds") is not None and self._option("prefill_chunk_size", generation_config, kwargs):
            raise InputError(
                "`prefill_chunk_size` cannot be combined with `inputs_embeds`: the stock loop cuts ids alone. Leave "
                "one of the two out."
            )

    def _prompt_ids(self, inputs: torch.Tensor | None, kwargs: dict) -> torch.Tensor:
        """Return the ids that the loop starts from: none with `inputs_embeds`, the first token without a prompt."""
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        embeds = kwargs.get("inputs_embeds")
        if prompt is None and embeds is not None:
            return torch.empty(embeds.shape[0], 0, dtype=torch.long, device=embeds.device)
        if prompt is None:
            return torch.full((1, 1), self.config.bos_token_id or 0, device=self.device)
        return prompt

    def _follow_grammar(
        self,
        mode: str,
        prompt: torch.Tensor,
        num_before: int,
        generation_config: GenerationConfig | None,
        processors: LogitsProcessorList,
        kwargs: dict,
    ) -> GenerationConfig | None:
        """Add what a mode needs to the processors and arguments, and return the generation config with its length."""
        _check_embedded_end(prompt, self.config, kwargs)
        if num_before:
            _check_begins(prompt, num_before, self.config.frames, kwargs)
        frame = self.config.frames.get(mode)
        width = _width(prompt, kwargs)
        is_sized = any(
            kwargs.get(name) is not None or getattr(generation_config, name, None) is not None for name in LENGTHS
        )
        if is_sized or frame is None:
            num_new = self._new_tokens(width, generation_config, kwargs)
        else:
            num_new = self._frame_tokens(frame, prompt, num_before + width)
            generation_config = _with_new_tokens(num_new, generation_config, kwargs)
        if frame is not None:
            given = {name for name in OF_WORDS if getattr(generation_config, name, None) is not None}
            kwargs.update({name: off for name, off in OF_WORDS.items() if name not in {*kwargs, *given}})
        # a mode of one frame alone ends its rows by a token of the grammar
        stop = -1 if frame is None else self._stop_token(mode, generation_config, kwargs)
        processors += self._grammar(mode, prompt, width, num_before, num_new, stop)
        if frame is not None and (self._option("num_beams", generation_config, kwargs) or 1) > 1:
            criteria = [*(kwargs.get("stopping_criteria") or []), FrameEndCriteria(frame, prompt.shape[1])]
            kwargs["stopping_criteria"] = StoppingCriteriaList(criteria)
        if self.config.frames:
            kwargs.update(self._guidance(prompt, generation_config, kwargs))
        return generation_config

    def _context_left(self, prompt_width: int) -> int | None:
        """Return the positions of the context after a prompt; `None` where it has no end."""
        # scaled rotary embeddings are made to go beyond
        if self.config.rope_parameters["rope_type"] != "default":
            return None
        return self.config.max_position_embeddings - prompt_width

    def _frame_tokens(self, frame: ModalityFrame, prompt: torch.Tensor, prompt_width: int) -> int:
        """Return new tokens for one frame in each row, as the default."""
        needed = int(frame.missing_tokens(prompt).max())
        if frame.length is not None:
            return needed
        # never below what a frame needs: a prompt too long for it raises by its length
        return max(self.config.max_position_embeddings - prompt_width, needed)

    def _grammar(
        self, mode: str, prompt: torch.Tensor, width: int, num_before: int, num_new: int, stop: int
    ) -> list[LogitsProcessor]:
        """Return the processors of a mode, after a check that a token, and every frame, fits."""
        frames = self.config.frames
        for modality, frame in frames.items():
            open_B = frame.open_codes(prompt) >= 0
            if mode not in (modality, INTERLEAVED) and open_B.any():
                raise InputError(
                    f"The prompt of row {int(open_B.nonzero()[0])} ends inside a frame of {modality!r}, which "
                    f"generation_mode={mode!r} cannot continue: use generation_mode={modality!r} or 'interleaved', or "
                    "end the frame."
                )
        prompt_width = num_before + width
        context = self._context_left(prompt_width)
        if context is not None and context < 1:
            raise InputError(
                f"A prompt of {prompt_width} positions leaves no room for a new token in `max_position_embeddings` "
                f"({self.config.max_position_embeddings}): shorten the prompt."
            )
        if mode == TEXT:
            return [TextOnlyLogitsProcessor(self.config)]
        if num_new < 1:
            raise InputError(
                f"The prompt has {width} tokens, and `max_length` leaves {num_new} for new ones: give "
                "`max_new_tokens`, or a larger `max_length`."
            )
        needed = 0
        for modality, frame in frames.items():
            missing_B = frame.missing_tokens(prompt)
            if mode == INTERLEAVED:
                missing_B = torch.where(frame.open_codes(prompt) >= 0, missing_B, 0)
            if mode in (modality, INTERLEAVED):
                needed = max(needed, int(missing_B.max()))
        if needed > num_new:
            advice = "" if mode == INTERLEAVED else f", or leave both out with generation_mode={mode!r}"
            raise InputError(
                f"A whole frame needs {needed} new tokens, but there is room for {num_new}: raise "
                f"`max_new_tokens` to at least {needed} (or `max_length` to {needed + width}){advice}."
            )
        if context is not None and needed > context:
            raise InputError(
                f"A prompt of {prompt_width} positions and a frame that needs {needed} new tokens exceed "
                f"`max_position_embeddings` ({self.config.max_position_embeddings}): shorten the prompt."
            )
        max_length = prompt.shape[1] + (num_new if context is None else min(num_new, context))
        if mode == INTERLEAVED:
            return [
                FrameLogitsProcessor(self.config, max_length),
                FittingFrameLogitsProcessor(self.config, max_length),
            ]
        return [OneFrameLogitsProcessor(self.config, max_length, frames[mode], prompt.shape[1], stop)]

    def _option(self, name: str, generation_config: GenerationConfig | None, kwargs: dict) -> Any:
        sources = (
            kwargs.get(name),
            getattr(generation_config, name, None),
            getattr(self.generation_config, name, None),
        )
        return next((value for value in sources if value is not None), None)

    def _new_tokens(self, prompt_width: int, generation_config: GenerationConfig | None, kwargs: dict) -> int:
        """Return how many new tokens the stock loop has room for: a number of them goes before a whole length."""
        for name, taken in zip(LENGTHS, (0, prompt_width)):
            # `None` as an argument unsets what a configuration says
            value = kwargs[name] if name in kwargs else self._option(name, generation_config, {})
            if value is not None:
                return value - taken
        return STOCK_NEW_TOKENS

    def _stop_token(self, mode: str, generation_config: GenerationConfig | None, kwargs: dict) -> int:
        for name in ("eos_token_id", "pad_token_id"):
            value = self._option(name, generation_config, kwargs)
            value = value.flatten().tolist() if isinstance(value, torch.Tensor) else value
            value = next(iter(value), None) if isinstance(value, (list, tuple)) else value
            if value is not None:
                return int(value)
        raise InputError(f"generation_mode={mode!r} needs an `eos_token_id` or a `pad_token_id` to end rows with.")

    def _guidance(
        self, prompt: torch.Tensor, generation_config: GenerationConfig | None, kwargs: dict
    ) -> dict[str, torch.Tensor | None]:
        """Return the negative prompt of the stock guidance for each row of the loop; by default it is empty."""
        scale = self._option("guidance_scale", generation_config, kwargs)
        ids, mask = kwargs.get("negative_prompt_ids"), kwargs.get("negative_prompt_attention_mask")
        if ids is None and mask is not None:
            raise InputError(
                "`negative_prompt_attention_mask` is given without `negative_prompt_ids`, whose mask it is."
            )
        if scale in (None, 1):
            if ids is not None:
                logger.warning_once(
                    f"`negative_prompt_ids` change nothing at `guidance_scale` = {scale}: 5 steers away from them."
                )
            return {}
        if not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise InputError(f"`guidance_scale` = {scale!r}: needs a finite number, 1 for no guidance.")
        for name, off in {"num_beams": 1, **dict.fromkeys(DRAFTING)}.items():
            if self._option(name, generation_config, kwargs) not in (None, off):
                raise InputError(
                    f"`guidance_scale` cannot be combined with `{name}`: the unconditional branch of the stock loop "
                    "follows neither reordered beams nor drafted tokens. Use greedy decoding or sampling."
                )
        for name in ROUTING:
            if kwargs.get(name) is not None:
                raise InputError(
                    f"`guidance_scale` cannot be combined with `{name}`, which the unconditional branch of the stock "
                    "loop does not get: set the rule in the model's configuration, as `inference_routing`."
                )
        if ids is None:
            if self.config.bos_token_id is None:
                return {}
            ids, mask = _unconditional_prompt(self.config.frames, prompt, self.config.bos_token_id)
        elif ids.shape[0] != prompt.shape[0]:
            raise InputError(
                f"`negative_prompt_ids` has {ids.shape[0]} rows, but there are {prompt.shape[0]} prompts: each needs "
                "one."
            )
        else:
            ids, mask = _with_open_frames(self.config.frames, prompt, ids, mask)
        copies = self._option("num_return_sequences", generation_config, kwargs) or 1
        return {
            "negative_prompt_ids": ids.repeat_interleave(copies, dim=0),
            "negative_prompt_attention_mask": None if mask is None else mask.repeat_interleave(copies, dim=0),
        }


def own_image_sampling(generation_config: GenerationConfig | None) -> dict[str, Any]:
    """Return how a model's images are drawn where the caller does not say it."""
    chosen = getattr(generation_config, "image_sampling", None) or {}
    if not isinstance(chosen, dict) or not CHOOSING.issuperset(chosen):
        raise InputError(
            f"`generation_config.image_sampling` = {chosen!r} must hold options by which tokens are chosen, of "
            f"{sorted(CHOOSING)}."
        )
    return chosen


def _checked_tokens(ids: Any, config: MomaConfig) -> Sequence[int]:
    """Return token ids, none for `None`, or raise where they are none of the model's."""
    ids = [] if ids is None else ids
    is_list = isinstance(ids, (list, tuple))
    if not is_list or not all(type(token) is int and 0 <= token < config.vocab_size for token in ids):
        raise InputError(f"`caption_suppress_tokens` = {ids!r} must be a list of ids below {config.vocab_size}.")
    return ids


def _width(prompt: torch.Tensor, kwargs: dict) -> int:
    return prompt.shape[1] or kwargs["inputs_embeds"].shape[1]


def _with_new_tokens(
    num_new: int, generation_config: GenerationConfig | None, kwargs: dict
) -> GenerationConfig | None:
    """Let the stock loop write so many tokens; what the caller gave is left as it is."""
    if generation_config is None or any(kwargs.get(name) is not None for name in LENGTHS):
        kwargs["max_new_tokens"] = num_new
        return generation_config
    generation_config = copy.deepcopy(generation_config)
    generation_config.max_new_tokens = num_new
    return generation_config


def _positions_before(prompt: torch.Tensor, kwargs: dict) -> int:
    """Return how many positions a cache holds of earlier turns whose ids are not among those of the prompt."""
    num_seen = int(seen_positions(kwargs.get("cache", kwargs.get("past_key_values"))))
    embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
    width = prompt.shape[1] if embeds is None else embeds.shape[1]
    # by its width the stock loop tells new ids from those of all turns; embeddings are always taken for all
    if embeds is None and isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] > width:
        return num_seen
    if num_seen >= width:
        raise InputError(
            f"`cache` holds {num_seen} positions and the prompt has {width}, so none is left to go on from: give the "
            "ids of all turns, or new ones alone with an `attention_mask` over the cached positions and theirs, or "
            "`crop` the cache."
        )
    return 0


def _check_prompt(prompt: torch.Tensor, pad_token_id: int | None, config: MomaConfig, kwargs: dict) -> None:
    if not isinstance(prompt, torch.Tensor):
        kind = type(prompt).__name__
        raise InputError(f"`input_ids` is a {kind}: give a tensor of shape (batch_size, sequence_length).")
    if prompt.ndim != 2:
        raise InputError(f"`input_ids` must have two dimensions, rows and positions, got shape {tuple(prompt.shape)}.")
    if prompt.shape[0] == 0 or (prompt.shape[1] == 0 and kwargs.get("inputs_embeds") is None):
        raise InputError(
            f"`input_ids` is empty, its shape is {tuple(prompt.shape)}: a prompt needs one token at least, such as "
            "the beginning token."
        )
    mask = kwargs.get("attention_mask")
    if mask is None and prompt.shape[1] and pad_token_id not in (config.bos_token_id, config.eos_token_id):
        # as the stock loop makes it
        mask = prompt != pad_token_id
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return
    # with a cache it covers what came before, and embeddings have a width of their own
    may_be_wider = any(kwargs.get(name) is not None for name in ("cache", "past_key_values", "inputs_embeds"))
    if len(mask) != len(prompt) or (not may_be_wider and mask.shape[1] != prompt.shape[1]):
        raise InputError(
            f"`attention_mask` has the shape {tuple(mask.shape)}, but the prompt's is {tuple(prompt.shape)}."
        )
    if not mask.any(dim=1).all():
        row = int((~mask.any(dim=1)).nonzero()[0])
        raise InputError(f"`attention_mask`: row {row} is all padding; a prompt needs one token at least.")


def _check_begins(prompt: torch.Tensor, num_before: int, frames: dict[str, ModalityFrame], kwargs: dict) -> None:
    """Raise at rows that go on with a code: the ids that the cache has seen, and the frame's begin, are not here."""
    first_B1 = kwargs["attention_mask"][:, num_before:].long().argmax(dim=1, keepdim=True)
    for modality, frame in frames.items():
        is_inside_B = frame.is_code(prompt.gather(1, first_B1)).squeeze(1)
        if is_inside_B.any():
            raise InputError(
                f"`input_ids`: row {int(is_inside_B.nonzero()[0])} goes on inside a frame of {modality!r} that began "
                "among the cached positions: give the ids of all turns with the `cache`."
            )


def _check_embedded_end(prompt: torch.Tensor, config: MomaConfig, kwargs: dict) -> None:
    """Raise at rows of embeddings that end with a code: without their ids nothing tells how the frame goes on."""
    types = kwargs.get("mm_token_type_ids")
    if prompt.shape[1] or types is None:
        return
    for index, modality in enumerate(config.modalities):
        is_inside_B = types[:, -1] == index
        if modality in config.frames and is_inside_B.any():
            raise InputError(
                f"`inputs_embeds`: by `mm_token_type_ids` row {int(is_inside_B.nonzero()[0])} ends inside a frame of "
                f"{modality!r}, which cannot be continued without the codes: give `input_ids` beside the embeddings."
            )


def _unconditional_prompt(
    frames: dict[str, ModalityFrame], prompt: torch.Tensor, bos_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the beginning token, and what each prompt already holds of an open frame; padded on the left."""
    open_B = open_frame_codes(frames, prompt)
    width = prompt.shape[1] + 1
    start_B = torch.where(open_B >= 0, width - 2 - open_B, width - 1)
    ids = nn.functional.pad(prompt, (1, 0)).scatter(1, start_B[:, None], bos_token_id)
    mask = (torch.arange(width, device=prompt.device) >= start_B[:, None]).long()
    first = int(start_B.min())
    return ids[:, first:], mask[:, first:]


def _with_open_frames(
    frames: dict[str, ModalityFrame], prompt: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return negative prompts that end with what the prompts hold of open frames; those that end in one have it."""
    open_B = open_frame_codes(frames, prompt).masked_fill(open_frame_codes(frames, ids) >= 0, -1)
    if not (open_B >= 0).any():
        return ids, mask
    is_seen_BT = torch.ones_like(ids).bool() if mask is None else mask.bool()
    counts = (open_B + 1).tolist()
    rows = [
        torch.cat([row[is_seen_T], written[written.shape[0] - count :]])
        for row, is_seen_T, written, count in zip(ids, is_seen_BT, prompt, counts)
    ]
    width = max(map(len, rows))
    # ids that the mask hides are no matter
    padded = [nn.functional.pad(row, (width - len(row), 0)) for row in rows]
    is_token = [torch.arange(-width, 0, device=row.device) >= -len(row) for row in rows]
    return torch.stack(padded), torch.stack(is_token).long()
