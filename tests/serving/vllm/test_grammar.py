# SPDX-License-Identifier: Apache-2.0
"""The grammar row by row allows what the processors of `generate` allow, without vLLM."""

import re

import pytest
import torch

from helpers.tiny import tiny_config
from modeling_moma.errors_moma import InputError
from modeling_moma.frames_moma import IMAGE, TEXT
from modeling_moma.generation_moma import (
    INTERLEAVED,
    FittingFrameLogitsProcessor,
    FrameLogitsProcessor,
    OneFrameLogitsProcessor,
    TextOnlyLogitsProcessor,
)
from modeling_moma.serving.vllm import FREE, FrameGrammar, FrameRow, grammar


AUDIO = "audio"
# images of four codes, sounds of any number
CONFIG = tiny_config(
    modality_token_ranges={IMAGE: [[8, 16], [20, 24]], AUDIO: [[30, 36]]},
    num_experts={TEXT: 1, IMAGE: 1, AUDIO: 1},
    modality_frames={AUDIO: {"begin": 36, "end": 37, "length": None}},
)
BEGIN, END = CONFIG.begin_image_token_id, CONFIG.end_image_token_id
PROMPTS = {
    "words": [1, 26, 27],
    "a whole image": [1, BEGIN, 8, 9, 20, 21, END, 26],
    "inside an image": [1, 26, BEGIN, 8, 23],
    "at the end of an image's codes": [1, BEGIN, 8, 9, 20, 21],
    "one code too many": [1, BEGIN, 8, 9, 20, 21, 22],
    "inside a sound": [1, 36, 30, 31],
    "a sound just begun": [26, 36],
    "a code outside": [1, 8, 26],
    "codes of another modality in an image": [1, BEGIN, 8, 30],
}


def stock_processors(mode, prompt_length, max_length):
    """As `generate` makes them."""
    if mode == TEXT:
        return [TextOnlyLogitsProcessor(CONFIG)]
    if mode == INTERLEAVED:
        return [FrameLogitsProcessor(CONFIG, max_length), FittingFrameLogitsProcessor(CONFIG, max_length)]
    return [OneFrameLogitsProcessor(CONFIG, max_length, CONFIG.frames[mode], prompt_length, CONFIG.eos_token_id)]


def is_accepted(mode, prompt):
    """Whether `generate` goes on: a frame that the prompt has begun is one that the mode writes."""
    ids = torch.tensor([PROMPTS[prompt]])
    is_open = [modality for modality, frame in CONFIG.frames.items() if frame.open_codes(ids) >= 0]
    return mode == INTERLEAVED or is_open in ([], [mode])


CASES = [
    (mode, prompt) for mode in (TEXT, IMAGE, AUDIO, INTERLEAVED) for prompt in PROMPTS if is_accepted(mode, prompt)
]


@pytest.mark.parametrize(("mode", "prompt"), CASES)
def test_every_step_allows_what_the_stock_processors_allow(mode, prompt):
    grammar, ids = FrameGrammar(CONFIG), list(PROMPTS[prompt])
    length, max_length = len(ids), len(ids) + 24
    processors = stock_processors(mode, length, max_length)
    row = FrameRow(grammar, mode, ids, max_length)
    generator = torch.Generator().manual_seed(len(prompt))
    seen = set()
    while len(ids) < max_length:
        scores = torch.randn(1, CONFIG.vocab_size, generator=generator)
        # so that frames are begun as often as words are written
        scores[:, [BEGIN, 36]] += 2.0
        expected = scores.clone()
        for processor in processors:
            expected = processor(torch.tensor([ids]), expected)
        got = grammar.restrict(scores.clone(), {0: row.verdict()})
        assert torch.equal(got, expected), (ids, row.verdict())
        seen.add(row.verdict())
        ids.append(int(torch.softmax(got[0], -1).multinomial(1, generator=generator)))
        row.write(ids[-1:])
    assert mode == TEXT or len(seen) >= 2


def test_rows_of_a_batch_have_verdicts_of_their_own():
    grammar = FrameGrammar(CONFIG)
    modes = [TEXT, IMAGE, INTERLEAVED, IMAGE]
    prompts = [PROMPTS["words"], PROMPTS["inside an image"], PROMPTS["words"], PROMPTS["words"]]
    rows = [FrameRow(grammar, mode, prompt, 40) for mode, prompt in zip(modes, prompts)]
    logits = torch.randn(6, CONFIG.vocab_size)
    verdicts = {index: row.verdict() for index, row in enumerate(rows)}
    together = grammar.restrict(logits.clone(), verdicts)
    for index, row in enumerate(rows):
        assert torch.equal(together[index], grammar.restrict(logits[index : index + 1].clone(), {0: row.verdict()})[0])
    # rows without a grammar stay
    assert torch.equal(together[4:], logits[4:])


def test_a_forced_token_is_possible_even_where_another_processor_forbade_it():
    grammar = FrameGrammar(CONFIG)
    row = FrameRow(grammar, IMAGE, [1, BEGIN, 8, 9, 20, 21], 40)
    logits = grammar.restrict(torch.full((1, CONFIG.vocab_size), -torch.inf), {0: row.verdict()})
    assert logits[0].isfinite().nonzero().flatten().tolist() == [END]


def test_modes_of_a_model():
    assert FrameGrammar.modes(CONFIG) == [TEXT, FREE, INTERLEAVED, AUDIO, IMAGE]
    text_alone = tiny_config(
        modality_token_ranges={}, num_experts=1, begin_image_token_id=None, end_image_token_id=None
    )
    assert FrameGrammar.modes(text_alone) == [TEXT, FREE]
    with pytest.raises(ValueError, match="`mode` must be one of.*got 'video'"):
        FrameRow(FrameGrammar(CONFIG), "video", [1], 8)


@pytest.mark.parametrize("mode", ["video", ["image"], {"image": 1}, 3])
def test_a_mode_of_a_request_that_no_model_has_is_refused(monkeypatch, mode):
    monkeypatch.setattr(grammar, "SERVED_MODES", set())
    grammar.check_served("generation_mode", mode)
    grammar.SERVED_MODES.update(FrameGrammar.modes(CONFIG))
    grammar.check_served("generation_mode", "image")
    with pytest.raises(InputError, match="`generation_mode` must be one of .*got " + re.escape(repr(mode))):
        grammar.check_served("generation_mode", mode)
