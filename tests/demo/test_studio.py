# SPDX-License-Identifier: Apache-2.0
"""A model as the page asks it: images while their codes arrive, from `generate` in a thread to a visitor."""

import threading

import numpy as np
import pytest
import torch

from helpers.tiny import noise_images, tiny_model, tiny_processor
from modeling_moma.demo.studio import PAPER, DemoSession, PartialImages, stream_ids


# 16 codes of 4 x 4 pixels each
SIDE, PATCH, WHOLE = 16, 4, 16


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(SIDE)


@pytest.fixture(scope="module")
def model(processor):
    return tiny_model(processor)


@pytest.fixture(scope="module")
def studio(model, processor):
    return DemoSession(model, processor, "tiny")


def covered(image) -> int:
    """Patches of the paper's colour."""
    patches = np.asarray(image).reshape(4, PATCH, 4, PATCH, 3).swapaxes(1, 2).reshape(WHOLE, -1, 3)
    return sum((patch == PAPER).all() for patch in patches)


def test_patches_without_a_code_are_paper_and_the_others_are_what_the_decoder_makes_of_them(processor):
    (codes,) = processor.encode_images(noise_images(1))
    (whole,) = processor.decode_images([codes])
    partial = PartialImages(processor)
    none, five, all_of_them = partial.decode([[], codes[:5], codes])
    assert [covered(image) for image in (none, five, all_of_them)] == [WHOLE, WHOLE - 5, 0]
    assert np.array_equal(all_of_them, whole)
    rest = processor.decode_images([codes[:5] + partial.white[5:]])[0]
    assert np.array_equal(np.asarray(five)[:PATCH], np.asarray(rest)[:PATCH])
    assert (np.asarray(five)[PATCH:, PATCH:] == PAPER).all()
    with pytest.raises(ValueError, match="16 codes, got 17"):
        partial.decode([[*codes, 0]])


def test_words_and_an_unfinished_image_come_as_parts(processor):
    (codes,) = processor.encode_images(noise_images(1))
    words = processor.tokenizer("red apple", add_special_tokens=False)["input_ids"]
    image = processor.image_ids(codes)
    partial = PartialImages(processor)
    text, whole, unfinished = partial.parts([*words, *image, *image[:4]])
    assert text == "red apple" and covered(whole) == 0 and covered(unfinished) == WHOLE - 3
    assert partial.parts(words) == ["red apple"]
    assert [covered(part) for part in partial.parts(image[:1])] == [WHOLE]


def test_the_stream_is_what_generate_gives_step_by_step(model, processor):
    inputs = dict(processor(text=["noto: red apple", "noto: red apple"], return_tensors="pt"))
    arguments = {"generation_mode": "image", "do_sample": False}
    expected = model.generate(**inputs, **arguments)[:, inputs["input_ids"].shape[1] :]
    seen = list(stream_ids(model, inputs, 5, **arguments))
    # begin, codes and end
    assert [ids.shape[1] for ids in seen] == [5, 10, 15, WHOLE + 2]
    assert all(torch.equal(ids, expected[:, : ids.shape[1]]) for ids in seen)


def test_a_stream_that_is_closed_ends_its_thread_and_errors_come_through(model, processor):
    inputs = dict(processor(text=["noto: red apple"], return_tensors="pt"))
    before = threading.active_count()
    stream = stream_ids(model, inputs, 1, generation_mode="text", max_new_tokens=80, do_sample=False, eos_token_id=[])
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="generation_mode"):
        next(stream_ids(model, inputs, 1, generation_mode="smell"))
    assert threading.active_count() == before


def test_drawing_shows_more_of_each_image_until_it_is_whole(studio):
    views = list(studio.draw("noto: red apple", count=2, temperature=1.0, guidance_scale=2.0, seed=3))
    counts = [codes for codes, _ in views]
    assert counts[0] < WHOLE / 2 and counts == sorted(counts) and counts[-1] == WHOLE
    for codes, images in views:
        assert [covered(image) for image in images] == [WHOLE - codes] * 2
    last = views[-1][1]
    assert not np.array_equal(*last), "side by side, not the same"
    again = list(studio.draw("noto: red apple", count=2, temperature=1.0, guidance_scale=2.0, seed=3))[-1][1]
    assert all(np.array_equal(one, other) for one, other in zip(last, again, strict=True))


def test_drawings_are_sampled_as_the_model_has_it(studio, monkeypatch):
    assert studio.image_sampling() == (1.0, 1.0)
    own = {"do_sample": True, "temperature": 0.5, "top_k": 0, "guidance_scale": 2.0}
    monkeypatch.setattr(studio.model.generation_config, "image_sampling", own, raising=False)
    assert studio.image_sampling() == (0.5, 2.0)
    by_default, said = (
        list(studio.draw("apple", seed=3, **more))[-1][1] for more in ({}, {"temperature": 0.5, "guidance_scale": 2.0})
    )
    assert np.array_equal(by_default[0], said[0])
    own["do_sample"] = False
    assert studio.image_sampling() == (0.0, 2.0)


def test_two_drawings_at_once_are_those_that_each_would_be_alone(studio):
    prompts, alone, together = ("red apple", "castle"), {}, {}

    def draw(words, results):
        results[words] = list(studio.draw(words, temperature=0.3, seed=1))[-1][1][0]

    for words in prompts:
        draw(words, alone)
    threads = [threading.Thread(target=draw, args=(words, together)) for words in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not np.array_equal(alone["red apple"], alone["castle"])
    assert all(np.array_equal(alone[words], together[words]) for words in prompts)


def test_an_abandoned_drawing_leaves_the_model_to_the_next(studio):
    stream = studio.draw("castle")
    next(stream)
    stream.close()
    assert list(studio.draw("castle"))[-1][0] == WHOLE


def test_special_tokens_of_a_visitor_are_characters_and_places_need_their_images(studio, processor):
    ids = studio._inputs("<eos> <|image_7|>", [])["input_ids"][0].tolist()
    assert processor.tokenizer.eos_token_id not in ids
    assert not set(ids) & set(processor.image_token_ids)
    image = noise_images(1)[0]
    (codes,) = processor.encode_images([image])
    placed = studio._inputs("red <image> apple", [image])["input_ids"][0].tolist()
    first = studio._inputs("red apple", [image])["input_ids"][0].tolist()
    frame = processor.image_ids(codes)
    assert first[1 : 1 + len(frame)] == frame and placed[1 : 1 + len(frame)] != frame
    assert set(frame) <= set(placed)
    with pytest.raises(ValueError, match="2 places for images .* but 1 images"):
        studio._inputs("<image> and <image>", [image])


@pytest.mark.parametrize("temperature", [1e-300, -1, 1e9, float("nan"), "4"])
def test_temperatures_and_words_that_nothing_can_be_made_of_are_refused(studio, temperature):
    with pytest.raises(ValueError, match="it must be 0, or from 0.001 to 100.0"):
        next(studio.draw("red apple", 1, temperature))
    with pytest.raises(ValueError, match="words: expected a text, got list"):
        next(studio.draw(["red apple"], 1))


def test_answers_end_with_the_context_and_a_prompt_without_room_is_refused(studio):
    for parts in studio.answer("red apple", [], temperature=1.0, num_images=4):
        assert parts
    with pytest.raises(ValueError, match="128 at most"):
        next(studio.answer("red apple " * 200, []))
    with pytest.raises(ValueError, match="shorten"):
        studio.route(None, "red apple " * 200)
