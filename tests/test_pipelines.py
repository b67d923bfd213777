# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from transformers import TextStreamer, pipeline
from transformers.utils import logging

from helpers.tiny import noise_images, tiny_model, tiny_processor


@pytest.fixture(scope="module")
def processor():
    processor = tiny_processor()
    processor.tokenizer.padding_side = "left"
    return processor


@pytest.fixture(scope="module")
def model(processor):
    return tiny_model(processor)


@pytest.fixture(scope="module")
def any_to_any(model, processor):
    return pipeline("any-to-any", model=model, processor=processor)


@pytest.fixture(scope="module")
def images():
    return noise_images(2)


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    """A checkpoint with its processor."""
    folder = tmp_path_factory.mktemp("moma")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


class Pieces(TextStreamer):
    """Keeps what it is given instead of printing it."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.pieces = []

    def on_finalized_text(self, text, stream_end=False):
        self.pieces.append(text)


def greedy(model, processor, inputs, **kwargs):
    """Greedy text after each prompt."""
    ids = model.generate(**inputs, do_sample=False, **kwargs)
    return processor.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_an_image_in_words_out(any_to_any, model, processor, images):
    answers = any_to_any(images=images[0], text="<image>", max_new_tokens=4, return_full_text=False)
    inputs = processor(images=images[0], text="<image>", return_tensors="pt")
    assert [answer["generated_text"] for answer in answers] == greedy(model, processor, inputs, max_new_tokens=4)


def test_words_in_an_image_out(any_to_any, model, processor):
    (answer,) = any_to_any(text="noto: red apple", generation_mode="image")
    inputs = processor(text="noto: red apple", return_tensors="pt")
    codes = model.decode_image_tokens(model.generate(**inputs, generation_mode="image", do_sample=False))
    (expected,) = processor.decode_images(codes)
    assert answer["generated_image"].size == (16, 16)
    assert np.array_equal(answer["generated_image"], expected)


def test_an_image_in_a_prompt_is_not_taken_for_the_drawing(any_to_any, model, processor, images):
    texts, shown = ["<image> castle", "noto: red apple", "<image> <image> moon"], [[images[0]], [], images]
    answers = any_to_any(text=texts, images=shown, generation_mode="image")
    assert [answer["input_text"] for answer in answers] == texts
    for text, row, answer in zip(texts, shown, answers):
        inputs = processor(text=text, images=row or None, return_tensors="pt")
        ids = model.generate(**inputs, generation_mode="image", do_sample=False)
        codes = model.decode_image_tokens(ids)
        assert len(codes) == len(row) + 1
        (expected,) = processor.decode_images(codes[-1:])
        (alone,) = any_to_any(text=text, images=row or None, generation_mode="image")
        assert np.array_equal(alone["generated_image"], expected)
        assert np.array_equal(answer["generated_image"], expected)


def test_a_batch_of_unequal_prompts_gives_the_words_of_each_alone(any_to_any, images):
    rows = [("<image>", [images[0]]), ("noto: red apple <image>", [images[1]])]
    wanted = {"max_new_tokens": 4, "return_full_text": False}
    answers = any_to_any(text=[text for text, _ in rows], images=[shown for _, shown in rows], **wanted)
    alone = [any_to_any(text=text, images=shown, **wanted)[0] for text, shown in rows]
    assert [answer["generated_text"] for answer in answers] == [answer["generated_text"] for answer in alone]


def test_a_chat_with_an_image(model, processor, images):
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    chat = [{"role": "user", "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "name it"}]}]
    (answer,) = pipe(text=[chat], max_new_tokens=4)
    inputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    said = greedy(model, processor, inputs, max_new_tokens=4)[0]
    assert answer[0]["generated_text"][-1] == {"role": "assistant", "content": said}


def test_words_are_streamed_as_they_come(any_to_any, processor):
    streamer = Pieces(processor.tokenizer)
    (answer,) = any_to_any(
        text="noto: red", max_new_tokens=8, return_full_text=False, generate_kwargs={"streamer": streamer}
    )
    assert len(streamer.pieces) > 1 and "".join(streamer.pieces) == answer["generated_text"]


def test_text_generation_loads_the_checkpoint_and_continues_a_prompt(folder, model, processor):
    pipe = pipeline("text-generation", model=str(folder))
    (answer,) = pipe("noto: red", max_new_tokens=4, do_sample=False)
    inputs = processor(text="noto: red", return_tensors="pt")
    assert answer["generated_text"] == "noto: red" + greedy(model, processor, inputs, max_new_tokens=4)[0]


def test_text_generation_pads_a_batch_on_the_left(model, processor):
    tokenizer = tiny_processor().tokenizer
    tokenizer.padding_side = "right"
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["noto: red", "twemoji: green apple and a castle"]
    together = pipe(prompts, batch_size=2, max_new_tokens=4, do_sample=False)
    for prompt, (answer,) in zip(prompts, together):
        inputs = processor(text=prompt, return_tensors="pt")
        assert answer["generated_text"] == prompt + greedy(model, processor, inputs, max_new_tokens=4)[0]


@pytest.mark.parametrize("task", ["any-to-any", "image-text-to-text", "text-generation"])
def test_no_pipeline_calls_the_model_unsupported(task, model, processor, caplog):
    logger = logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    try:
        pipeline(task, model=model, processor=processor, tokenizer=processor.tokenizer)
    finally:
        logger.removeHandler(caplog.handler)
    assert "not supported" not in caplog.text
