# SPDX-License-Identifier: Apache-2.0
"""What an image takes from its caption and a caption from its image, against a loop over single pairs."""

from statistics import fmean, stdev

import pytest
import torch

from helpers.tiny import tiny_model
from modeling_moma.evaluation.evaluate import MeasureSettings, measure_sources
from modeling_moma.evaluation.held_out import CaptionedImages, HeldOutSource
from modeling_moma.evaluation.report import report_tables
from modeling_moma.evaluation.retrieval import measure_information


CAPTIONS = ["noto: red apple", "castle", " ", "red <eos> fruit"]


@pytest.fixture(scope="module")
def parts(processor):
    codes = torch.randint(0, 32, (4, 16), generator=torch.Generator().manual_seed(0))
    model = tiny_model(processor, num_experts={"text": 2, "image": 2}, initializer_range=0.3)
    return model, processor, CaptionedImages(codes, CAPTIONS)


@torch.no_grad()
def loop_nats(model, before, after, without=None):
    """Nats of the ids `after` behind `before`, the first of them among all but one token."""
    logits = model(input_ids=torch.tensor([[*before, *after]])).logits[0].double()
    total = 0.0
    for place, token in enumerate(after):
        row = logits[len(before) - 1 + place]
        if place == 0 and without is not None:
            row = row.index_fill(0, torch.tensor([without]), -torch.inf)
        total -= row.log_softmax(-1)[token].item()
    return total


def test_nats_are_those_of_a_loop_over_pairs_with_words(parts):
    model, processor, rows = parts
    bos, eos = processor.tokenizer.bos_token_id, processor.tokenizer.eos_token_id
    found = measure_information(model, processor, rows, batch_size=2)
    nats = {"image": [], "caption": []}
    for text, codes in zip(rows.captions, rows.codes):
        if not text.strip():
            continue
        words = processor.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        framed = processor.image_ids(codes)
        begin, image = framed[0], framed[1:-1]
        nats["image"].append((loop_nats(model, [bos, begin], image), loop_nats(model, [bos, *words, begin], image)))
        alone = loop_nats(model, [bos], [*words, begin], without=begin)
        nats["caption"].append((alone, loop_nats(model, [bos, *framed], [*words, eos])))
    assert found["pairs"] == 3
    for name, values in nats.items():
        taken = [alone - other for alone, other in values]
        assert found[name]["alone"] == pytest.approx(fmean(alone for alone, _ in values), abs=1e-3)
        assert found[name]["with_other"] == pytest.approx(fmean(other for _, other in values), abs=1e-3)
        assert found[name]["taken"] == pytest.approx(fmean(taken), abs=1e-3)
        assert found[name]["standard_error"] == pytest.approx(stdev(taken) / 3**0.5, abs=1e-3)
    image, caption = found["image"]["taken"], found["caption"]["taken"]
    assert found["ratio"] == (pytest.approx(image / caption) if caption > 0 else None)


def test_one_pair_is_refused_and_the_table_says_who_takes_from_whom(parts):
    model, processor, rows = parts
    with pytest.raises(ValueError, match="1 pairs"):
        measure_information(model, processor, CaptionedImages(rows.codes[:2], ["red", ""]), 4)
    sources = {"emoji": HeldOutSource([], rows)}
    found = measure_sources(model, processor, sources, MeasureSettings(("information",), batch_size=4))
    lines = report_tables(found).splitlines()
    assert lines[2].startswith("| emoji, image and its caption | ") and lines[3].endswith("| 3 |")
