# SPDX-License-Identifier: Apache-2.0
"""Text, images and other modalities from the stock `generate`, and their codes out of what it generated.

The grammar stands in logits processors, which keep what is written a valid mix of text and of frames of other
modalities. Whether a row stands inside a frame is read from its ids at every step, so that beams, drafted candidates
and rows in different states need no bookkeeping.

Shape suffixes: B rows, T positions, V vocabulary.
"""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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
from transformers.generation.utils import GenerateOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .configuration_moma import MomaConfig
from .devices_moma import is_on_cpu
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
        # moved to the device once, in the first step
        self.banned_SV = self.banned_SV.to(scores.device)
        is_open_BS = torch.stack(counts, dim=1) >= 0
        banned_BV = self.banned_SV[is_open_BS.any(dim=1) * (is_open_BS.int().argmax(dim=1) + 1)]
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
        # moved to the device once, in the first step
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
            # one at a time, as a tensor of ids would need a copy to the device
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
    # on a CPU the test is cheap, and most steps force no row
    if is_on_cpu(rows_B) and not rows_B.any():
        return
    scores.masked_fill_(rows_B[:, None], -torch.inf)
    # log-probability 0: a forced token costs a beam nothing, and is possible even where another processor forbade it
    scores[:, token_id].masked_fill_(rows_B, 0.0)


def _all_codes(config: MomaConfig) -> torch.Tensor:
    ranges = [bounds for ranges in config.modality_token_ranges.values() for bounds in ranges]
    return in_ranges(torch.arange(config.vocab_size), ranges)


# new tokens where no length is given, as in the stock loop
DEFAULT_NEW_TOKENS = 20
# a model's own penalties of repetition are meant for words and are off in images, where codes repeat
OF_WORDS = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
# options that choose a way of decoding: a caller who gives one of them does not get the model's `image_sampling`
CHOOSING = frozenset(
    {"do_sample", "temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}
    | {"num_beams", "guidance_scale", "penalty_alpha", "constraints", "force_words_ids"}
)
# options that go with no guidance: its unconditional branch does not follow drafted tokens, nor get a routing rule
UNGUIDED = ("prompt_lookup_num_tokens", "assistant_model", "assistant_early_exit", "routing", "depth_routing")


if TYPE_CHECKING:
    # for type checkers: every class with this mixin is a PreTrainedModel
    class _StockGeneration(PreTrainedModel, GenerationMixin): ...
else:
    _StockGeneration = GenerationMixin


class MomaGenerationMixin(_StockGeneration):
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
            ValueError: a mode of no frame; a prompt that its `attention_mask` hides or does not fit; a too long one;
                a cache that holds all of it; a paged cache; too few tokens for a frame; a prompt that ends inside a
                frame of a modality that the mode does not write, or that begins inside one, behind a cache; guidance
                together with `routing`, or with a decoding strategy whose unconditional branch would go wrong.
        """
        options = self._options(generation_config, kwargs)
        frames = self.config.frames
        mode = generation_mode or options.get("generation_mode") or TEXT
        modes = (TEXT, INTERLEAVED, *frames) if frames else (TEXT,)
        if mode not in modes:
            raise InputError(f"`generation_mode` must be one of {modes}, got {mode!r}.")
        if options.get("cache_implementation") == "paged":
            raise InputError(
                "`cache_implementation` is 'paged': continuous batching heeds no `generation_mode`, `attention_mask` "
                "or `logits_processor`. Call `generate_batch` with lists of ids, without padding."
            )
        if mode == IMAGE and generation_config is None and CHOOSING.isdisjoint(kwargs):
            own = own_image_sampling(self.generation_config)
            # the model's own guidance, which the caller did not ask for, gives way to options that exclude guidance
            if any(options.get(name) is not None for name in UNGUIDED):
                own.pop("guidance_scale", None)
            kwargs, options = kwargs | own, options | own
        self._warn_of_routing(kwargs.get("routing"))
        processors = LogitsProcessorList(logits_processor or [])
        # an assistant model is called with the processors of the model that it drafts for, which may come from
        # another copy of this module
        if any(getattr(processor, "is_moma_grammar", False) for processor in processors):
            return self._generate(inputs, generation_config, processors, kwargs, options)

        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        if prompt is None and embeds is not None:
            prompt = torch.empty(embeds.shape[0], 0, dtype=torch.long, device=embeds.device)
        elif prompt is None:
            prompt = inputs = torch.full((1, 1), self.config.bos_token_id or 0, device=self.device)
        elif embeds is not None and kwargs.get("mm_token_type_ids") is None:
            kwargs["mm_token_type_ids"] = token_modalities(self.config, prompt)
        width = prompt.shape[1] if embeds is None else embeds.shape[1]
        if isinstance(mask, torch.Tensor) and mask.ndim == 2 and not mask.any(dim=1).all():
            row = int((~mask.any(dim=1)).nonzero()[0])
            raise InputError(f"`attention_mask`: row {row} is all padding; a prompt needs one token at least.")
        num_before = self._positions_before(prompt, width, kwargs)

        frame = frames.get(mode)
        num_new = self._new_tokens(mode, prompt, num_before, width, options)
        changes: dict[str, Any] = {"max_new_tokens": num_new, "max_length": None}
        num_drafts = options.get("prompt_lookup_num_tokens") or 0
        if self._context(num_before + width) < num_new + num_drafts:
            # prompt lookup would draft beyond the last position; greedy output is the same without it
            changes["prompt_lookup_num_tokens"] = None
        if frame is not None:
            given = {*kwargs, *(name for name in OF_WORDS if getattr(generation_config, name, None) is not None)}
            changes |= {name: off for name, off in OF_WORDS.items() if name not in given}
        if frames:
            kwargs |= self._guidance(prompt, options)

        max_length = prompt.shape[1] + num_new
        if frame is not None:
            stop = [*_token_ids(options.get("eos_token_id")), *_token_ids(options.get("pad_token_id"))][0]
            processors.append(OneFrameLogitsProcessor(self.config, max_length, frame, prompt.shape[1], stop))
            if (options.get("num_beams") or 1) > 1:
                criteria = [*(kwargs.get("stopping_criteria") or []), FrameEndCriteria(frame, prompt.shape[1])]
                kwargs["stopping_criteria"] = StoppingCriteriaList(criteria)
        elif mode == INTERLEAVED:
            processors.append(FrameLogitsProcessor(self.config, max_length))
            processors.append(FittingFrameLogitsProcessor(self.config, max_length))
        elif self.config.modality_token_ranges:
            processors.append(TextOnlyLogitsProcessor(self.config))
        if caption_suppress_tokens is None:
            caption_suppress_tokens = options.get("caption_suppress_tokens")
        # with cached tokens the prompt is not whole, so it is unknown whether a frame stands alone
        if caption_suppress_tokens and frames and frame is None and prompt.shape[1] and not num_before:
            pad_token_id = options.get("pad_token_id")
            processors.append(
                CaptionBeginLogitsProcessor(self.config, caption_suppress_tokens, prompt.shape[1], pad_token_id)
            )
        if generation_config is None:
            return self._generate(inputs, None, processors, kwargs | changes, options)
        # changes go into a copy of the configuration, as the stock method warns of options passed beside one
        generation_config = copy.deepcopy(generation_config)
        generation_config.update(**changes)
        kwargs = {name: value for name, value in kwargs.items() if name not in changes}
        return self._generate(inputs, generation_config, processors, kwargs, options)

    def _options(self, generation_config: GenerationConfig | None, kwargs: dict) -> dict[str, Any]:
        """Return all arguments and options, as the stock method resolves them."""
        resolved = GenerationConfig() if generation_config is None else copy.deepcopy(generation_config)
        resolved.update(**self.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
        return {**vars(resolved), **kwargs}

    def _warn_of_routing(self, routing: str | None) -> None:
        rule = RULES.get(routing or (self.config.training_routing if self.training else self.config.inference_routing))
        if rule is not None and not rule.is_causal:
            advice = "Leave out `routing`." if routing else "Call `model.eval()` first."
            logger.warning_once(
                f"`generate` routes by {rule.name!r}, whose experts choose among the tokens of a step: each new token "
                f"meets more of them than in training. {advice}"
            )

    def _generate(
        self,
        inputs: torch.Tensor | None,
        generation_config: GenerationConfig | None,
        processors: LogitsProcessorList,
        kwargs: dict,
        options: dict,
    ) -> GenerateOutput | torch.Tensor:
        """Run the stock method, and pad beams after their end."""
        stock: Any = super()
        output = stock.generate(inputs, generation_config, processors, **kwargs)
        pad_token_id, ends = options.get("pad_token_id"), _token_ids(options.get("eos_token_id"))
        ends += [each.end_token_id for each in kwargs.get("stopping_criteria") or () if hasattr(each, "end_token_id")]
        # the stock beam search treats a padding token of id 0 as missing
        if (options.get("num_beams") or 1) > 1 and pad_token_id is not None and ends:
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
        codes: Any = frame.read_codes(image_tokens, "image_tokens")
        count_B = (image_tokens == frame.begin).sum(dim=1)
        # the stock pipeline passes only these codes to the processor, which tells rows apart by this attribute
        codes.last_of_rows = (count_B.cumsum(0) - 1)[count_B > 0]
        return codes

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

    def _positions_before(self, prompt: torch.Tensor, width: int, kwargs: dict) -> int:
        """Return how many positions a cache holds of earlier turns whose ids are not among those of the prompt."""
        num_seen = int(seen_positions(kwargs.get("cache", kwargs.get("past_key_values"))))
        mask = kwargs.get("attention_mask")
        # by the mask's width the stock loop tells ids of this turn from those of all; embeddings are taken as all
        if kwargs.get("inputs_embeds") is None and isinstance(mask, torch.Tensor) and mask.shape[-1] != width:
            if mask.shape != (len(prompt), num_seen + width):
                raise InputError(
                    f"`attention_mask` has the shape {tuple(mask.shape)}, but the prompt's is {tuple(prompt.shape)}."
                )
            first_B1 = mask[:, num_seen:].long().argmax(dim=1, keepdim=True)
            for modality, frame in self.config.frames.items():
                is_inside_B1 = frame.is_code(prompt.gather(1, first_B1))
                if is_inside_B1.any():
                    raise InputError(
                        f"`input_ids`: row {int(is_inside_B1.nonzero()[0, 0])} goes on inside a frame of "
                        f"{modality!r} that began among the cached positions: give the ids of all turns."
                    )
            return num_seen
        if num_seen >= width:
            raise InputError(
                f"`cache` holds {num_seen} positions and the prompt has {width}, so none is left to go on from: give "
                "the ids of all turns, or new ones alone with an `attention_mask` over the cached positions and "
                "theirs, or `crop` the cache."
            )
        return 0

    def _context(self, num_positions: int) -> float:
        """Return the positions that are left behind a prompt: scaled rotary embeddings are made to go beyond."""
        is_scaled = self.config.rope_parameters["rope_type"] != "default"
        return float("inf") if is_scaled else self.config.max_position_embeddings - num_positions

    def _new_tokens(self, mode: str, prompt: torch.Tensor, num_before: int, width: int, options: dict) -> int:
        """Return how many tokens the stock loop is to write, after a check that every frame fits."""
        needed = 1
        for modality, frame in self.config.frames.items():
            is_open_B, missing_B = frame.open_codes(prompt) >= 0, frame.missing_tokens(prompt)
            if mode in (modality, INTERLEAVED):
                needed = max(needed, int((missing_B if mode == modality else missing_B * is_open_B).max()))
            elif is_open_B.any():
                raise InputError(
                    f"The prompt of row {int(is_open_B.nonzero()[0])} ends inside a frame of {modality!r}, which "
                    f"generation_mode={mode!r} cannot continue: use generation_mode={modality!r} or 'interleaved', or "
                    "end the frame."
                )
        frame, limit = self.config.frames.get(mode), self.config.max_position_embeddings
        # `max_new_tokens` goes before `max_length`, as in the stock loop
        if options.get("max_new_tokens") is not None:
            num_new = options["max_new_tokens"]
        elif options.get("max_length") is not None:
            num_new = options["max_length"] - width
        elif frame is None:
            num_new = DEFAULT_NEW_TOKENS
        else:
            num_new = needed if frame.length is not None else max(limit - num_before - width, needed)
        if needed > num_new:
            raise InputError(
                f"generation_mode={mode!r} needs {needed} new tokens, but there is room for {num_new}: raise "
                f"`max_new_tokens` to at least {needed} (or `max_length` to {needed + width})."
            )
        context = self._context(num_before + width)
        if needed > context:
            raise InputError(
                f"A prompt of {num_before + width} positions leaves no room for {needed} new tokens in "
                f"`max_position_embeddings` ({limit}): shorten the prompt."
            )
        return int(min(num_new, context))

    def _guidance(self, prompt: torch.Tensor, options: dict) -> dict[str, torch.Tensor | None]:
        """Return the negative prompt of the stock guidance for each row of the loop; by default it is empty."""
        scale, ids = options.get("guidance_scale"), options.get("negative_prompt_ids")
        if scale in (None, 1):
            if ids is not None:
                logger.warning_once(
                    f"`negative_prompt_ids` change nothing at `guidance_scale` = {scale}: 5 steers away from them."
                )
            return {}
        for name, off in {"num_beams": 1, **dict.fromkeys(UNGUIDED)}.items():
            if options.get(name) not in (None, off):
                raise InputError(
                    f"`guidance_scale` cannot be combined with `{name}`: the unconditional branch of the stock loop "
                    "follows neither reordered beams nor drafted tokens nor a rule of routing."
                )
        mask = options.get("negative_prompt_attention_mask")
        if ids is None:
            begin = self.config.bos_token_id
            if begin is None:
                return {}
            ids, mask = prompt.new_full((prompt.shape[0], 1), begin), None
        ids, mask = _with_open_frames(self.config.frames, prompt, ids, mask)
        copies = options.get("num_return_sequences") or 1
        return {
            "negative_prompt_ids": ids.repeat_interleave(copies, dim=0),
            "negative_prompt_attention_mask": None if mask is None else mask.repeat_interleave(copies, dim=0),
        }


def own_image_sampling(generation_config: GenerationConfig | None) -> dict[str, Any]:
    """Return how a model's images are drawn where the caller does not say it."""
    return dict(getattr(generation_config, "image_sampling", None) or {})


def _token_ids(value: Any) -> list[int]:
    """Return the ids of an option that is one, several or none of them."""
    return [] if value is None else torch.as_tensor(value).flatten().tolist()


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
    # padding ids are hidden by the mask, so any id will do
    padded = [nn.functional.pad(row, (width - len(row), 0)) for row in rows]
    is_token = [torch.arange(-width, 0, device=row.device) >= -len(row) for row in rows]
    return torch.stack(padded), torch.stack(is_token).long()
