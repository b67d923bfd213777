# SPDX-License-Identifier: Apache-2.0
"""Tests of the head that tells the words of captions from an image tokenizer's codes."""

import json
import math

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from modeling_moma.cli.train_image_tokenizer import main, parse_arguments
from modeling_moma.errors_moma import InputError
from modeling_moma.training import image_tokenizer
from modeling_moma.training.image_store import open_store, read_image_sources
from modeling_moma.training.image_targets import CaptionTraining, caption_words, read_captions
from tokenization.configuration_moma_vq import MomaVQConfig
from tokenization.modeling_moma_vq import MomaVQModel, MomaVQOutput


CPU = torch.device("cpu")
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (30, 60, 220)}
CONFIG = {
    **{"base_channels": 16, "channel_multiplier": [1, 1], "num_res_blocks": 1, "embed_dim": 8, "num_embeddings": 32},
    **{"latent_channels": 16, "resolution": 32, "patch_size": 4, "norm_type": "none", "codebook_decay": 0.9},
}


SETTINGS = {"batch_size": 8, "warmup_steps": 2, "save_every": 4}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Squares with captions such as "a red square", of which one is empty and one image is damaged, and a text."""
    folder = tmp_path_factory.mktemp("captions")
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    features = Features({"image": ImageFeature(), "colour": Value("string")})
    for split, size in (("train", 90), ("validation", 6)):
        rows = []
        for row in range(size):
            colour = list(COLOURS)[rng.integers(3)]
            pixels = np.full((32, 32, 3), 255, dtype=np.uint8)
            y, x = rng.integers(0, 16, size=2)
            pixels[y : y + 16, x : x + 16] = COLOURS[colour]
            image = {"bytes": b"no image"} if row == 5 else Image.fromarray(pixels)
            rows.append({"image": image, "colour": "" if row == 7 else colour})
        Dataset.from_list(rows, features=features).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": "words"}) + "\n" for _ in range(9)))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    content = {
        "sources": {
            "words": {"data": str(folder / "texts.jsonl"), "text": "text"},
            "squares": {"data": str(folder / "data"), "image": "image", "text": "a {colour} square"},
        },
        "image_tokenizer": {"config": str(folder / "config.json"), **SETTINGS},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


def training_of(recipe, folder, weight=0.5):
    sources, _ = read_image_sources(str(recipe))
    store = open_store(folder / "images", sources, 32, 6)
    return CaptionTraining(weight, sources, store, MomaVQConfig(**CONFIG), 1e-3, 0, CPU), sources, store


def test_words_of_a_caption():
    assert caption_words("Red house, red-brown (mdi: 24h)") == ["red", "house", "brown", "mdi", "24h"]
    assert caption_words("Überraschung 顔 -- !") == ["überraschung", "顔"]
    assert caption_words("") == []


def test_captions_are_those_of_their_images(recipe, tmp_path):
    _, sources, store = training_of(recipe, tmp_path)
    # the damaged image is left out, the one without a caption is not
    assert store.places.tolist() == [[0, row] for row in range(90) if row != 5]
    captions = read_captions(sources, store.places)
    assert captions[6] == []
    for image, words in zip(store.train, captions):
        if words:
            pixel = image.reshape(3, -1)[:, image.sum(axis=0).argmin()]
            assert tuple(pixel) == COLOURS[words[1]]


def test_a_store_of_an_earlier_release_is_read_anew(recipe, tmp_path):
    _, sources, store = training_of(recipe, tmp_path)
    (store.folder / "places.npy").unlink()
    again = open_store(store.folder, sources, 32, 6)
    assert np.array_equal(again.places, store.places) and np.array_equal(again.train, store.train)


def test_the_term_is_the_cross_entropy_to_words_by_their_rarity(recipe, tmp_path):
    training, sources, store = training_of(recipe, tmp_path)
    captions = read_captions(sources, store.places)
    indices = torch.tensor([0, 6, 17, 40])
    quantized = torch.randn(4, 8, 8, 8, requires_grad=True)
    term, loss = training.term(MomaVQOutput(quantized=quantized), indices)
    # a word of all captions but one still counts, by very little
    counts = {word: sum(word in words for words in captions) for word in training.vocabulary}
    assert set(counts) == {"a", "square", *COLOURS}
    expected = []
    log_probabilities = torch.log_softmax(training.head(quantized), dim=-1)
    for row, image in enumerate(indices.tolist()):
        weights = {word: math.log(len(captions) / counts[word]) for word in captions[image]}
        for word, weight in weights.items():
            number = training.vocabulary.index(word)
            expected.append(-log_probabilities[row, number] * weight / sum(weights.values()))
    torch.testing.assert_close(loss, sum(expected) / 3)
    torch.testing.assert_close(term, 0.5 * loss)
    term.backward()
    assert quantized.grad[0].abs().sum() > 0 and quantized.grad[1].abs().sum() == 0


def test_a_batch_without_captions_has_a_term_of_zero(recipe, tmp_path):
    training, _, _ = training_of(recipe, tmp_path)
    quantized = torch.randn(1, 8, 8, 8, requires_grad=True)
    term, _ = training.term(MomaVQOutput(quantized=quantized), torch.tensor([6]))
    term.backward()
    assert term == 0 and quantized.grad.abs().sum() == 0


def test_codes_learn_what_captions_speak_of(recipe, tmp_path):
    """With the term a head tells the colour; the model that is left holds none of it."""
    losses = []
    flags = (
        "--set",
        "image_tokenizer.caption_weight=1",
        "image_tokenizer.steps=40",
        "image_tokenizer.augmentation=none",
        "image_tokenizer.held_out_images=4",
    )
    command = [str(recipe), "--output", str(tmp_path / "run"), *flags]
    main(command, lambda _, summary: losses.append(summary["caption"]))
    # three colours and nothing else, which are guessed at ln 3
    assert np.mean(losses[-5:]) < 0.6 < math.log(3) < losses[0]
    assert not [name for name in MomaVQModel.from_pretrained(tmp_path / "run").state_dict() if "caption" in name]


def test_a_resumed_run_ends_like_an_uninterrupted_one(recipe, tmp_path):
    class Killed(Exception):
        pass

    def kill(step, _):
        if step == 6:
            raise Killed

    flags = ("--set", "image_tokenizer.caption_weight=0.5", "image_tokenizer.steps=8")
    main([str(recipe), "--output", str(tmp_path / "whole"), *flags])
    with pytest.raises(Killed):
        main([str(recipe), "--output", str(tmp_path / "parts"), *flags], kill)
    main([str(recipe), "--output", str(tmp_path / "parts"), *flags, "--resume"])
    whole, parts = (
        torch.load(tmp_path / run / "checkpoint-0000008" / image_tokenizer.STATE_FILE) for run in ("whole", "parts")
    )
    for name, tensor in whole["captions"]["head"].items():
        assert torch.equal(parts["captions"]["head"][name], tensor), name
    first, second = (MomaVQModel.from_pretrained(tmp_path / run).state_dict() for run in ("whole", "parts"))
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    with pytest.raises(ValueError, match="caption_weight = 0.5 there and 0.0 now"):
        main([str(recipe), "--output", str(tmp_path / "whole"), "--set", "image_tokenizer.steps=8", "--resume"])


@pytest.mark.parametrize(
    "text, difference",
    [
        ("a {colour} circle", "word 2 was 'square' then and is 'circle' now"),
        ("a square of {colour}", "word 3 was '[a-z]*' then and is 'of' now"),
    ],
    ids=["as many words", "more words"],
)
def test_a_run_is_not_resumed_with_captions_of_other_words(recipe, tmp_path, text, difference):
    training, _, _ = training_of(recipe, tmp_path)
    other = tmp_path / "recipe.yaml"
    other.write_text(recipe.read_text().replace("a {colour} square", text))
    later, _, _ = training_of(other, tmp_path)
    state = training.state_dict()
    with pytest.raises(InputError, match=f"--resume: caption_weight=0.5: .*{difference}"):
        later.load_state_dict(state)


def test_images_without_captions_are_refused(recipe, tmp_path):
    data = str(recipe.parent / "data")
    flags = (
        "--set",
        f"image_tokenizer.config={recipe.parent / 'config.json'}",
        "image_tokenizer.steps=2",
        "image_tokenizer.caption_weight=0.1",
    )
    with pytest.raises(ValueError, match="caption_weight=0.1: of 0 words in the captions of 89 images none stands in"):
        main([data, "--output", str(tmp_path / "run"), *flags])


def test_a_negative_weight_is_refused(recipe, tmp_path):
    with pytest.raises(InputError, match="caption_weight = -1 must be at least 0"):
        parse_arguments([str(recipe), "--output", str(tmp_path), "--set", "image_tokenizer.caption_weight=-1"])
