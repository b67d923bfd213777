# SPDX-License-Identifier: Apache-2.0
"""What `scripts/text_ability.py` measures, on a small model and a few texts."""

import json
import math

import pytest
import torch

import text_ability
from helpers.tiny import tiny_model, tiny_processor


GLOSSES = ["red apple: a fruit that is red", "castle: a large house"]
PAGE = [{"type": "text", "text": "a red house"}, {"type": "image", "path": "x.png"}, {"type": "text", "text": "apple"}]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    processor = tiny_processor()
    tiny_model(processor, max_position_embeddings=512).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    (folder / "gloss.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in GLOSSES))
    (folder / "manual.jsonl").write_text(json.dumps({"title": "a", "segments": PAGE}) + "\n")
    return folder


def measure(inputs, output, *more):
    flags = ["--model", inputs / "model", "--gloss", inputs / "gloss.jsonl", "--manual", inputs / "manual.jsonl"]
    flags += ["--new-tokens", "2", "--output", output]
    text_ability.main([str(flag) for flag in (*flags, *more)])
    return json.loads(output.read_text())


def plain_perplexity(inputs, texts, window, without=()):
    """Document by document, without padding."""
    model = text_ability.AutoModelForCausalLM.from_pretrained(inputs / "model").eval()
    tokenizer = text_ability.AutoTokenizer.from_pretrained(inputs / "model")
    losses, without = [], torch.tensor(without, dtype=torch.long)
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        for start in range(0, len(ids), window):
            piece = torch.tensor([ids[start : start + window]])
            if piece.shape[1] > 1:
                with torch.no_grad():
                    scores = model(piece).logits[0].index_fill(-1, without, -torch.inf).log_softmax(-1)
                losses += (-scores[:-1].gather(1, piece[0, 1:, None])).flatten().tolist()
    return math.exp(sum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize("window", [256, 5])
def test_perplexities_are_those_of_single_documents(inputs, tmp_path, window):
    report = measure(inputs, tmp_path / "report.json", "--window", str(window))
    for name, texts in {"gloss": GLOSSES, "manual": ["a red house\n\napple"]}.items():
        perplexity, tokens = plain_perplexity(inputs, texts, window)
        assert report[name]["tokens"] == tokens
        assert report[name]["perplexity"] == pytest.approx(perplexity, rel=1e-4)
        (frame,) = tiny_model(tiny_processor()).config.frames.values()
        pictures = [frame.begin, frame.end, *(id for bounds in frame.ranges for id in range(*bounds))]
        among_words, _ = plain_perplexity(inputs, texts, window, pictures)
        assert report[name]["perplexity_of_words"] == pytest.approx(among_words, rel=1e-4) and among_words < perplexity


def test_twenty_prompts_are_answered(inputs, tmp_path):
    said = measure(inputs, tmp_path / "report.json", "--limit", "1")["answers"]
    assert list(said) == text_ability.COMPLETIONS + text_ability.QUESTIONS and len(said) == 20
