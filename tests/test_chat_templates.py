# SPDX-License-Identifier: Apache-2.0
"""Chats with images, in the template of every new processor and in that of the released model."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoProcessor, AutoTokenizer

from helpers.tiny import noise_images, tiny_processor
from modeling_moma.data.encoding import DocumentEncoder, caption_chat_template
from tokenization.text_tokenizer_moma import DEFAULT_CHAT_TEMPLATE


CARD = Path(__file__).resolve().parent.parent / "model_cards" / "moma-emoji"
TEMPLATES = {"default": DEFAULT_CHAT_TEMPLATE, "captions": caption_chat_template()}


@pytest.fixture(params=TEMPLATES)
def processor(request):
    processor = tiny_processor()
    processor.chat_template = processor.tokenizer.chat_template = TEMPLATES[request.param]
    return processor


@pytest.fixture(scope="module")
def images():
    return noise_images(4)


@pytest.fixture(scope="module")
def conversation(images):
    """Two images in one turn of the user, two around words in one of the assistant."""
    shown, *drawn = [{"type": "image", "image": image} for image in images[1:]]
    return [
        {"role": "user", "content": [{"type": "image", "image": images[0]}, shown]},
        {"role": "assistant", "content": "noto: red apple"},
        {"role": "user", "content": [{"type": "text", "text": "castle"}]},
        {"role": "assistant", "content": [drawn[0], {"type": "text", "text": " and "}, drawn[1]]},
    ]


def words(processor, text):
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_assistant_mask_covers_its_words_its_images_and_the_end(processor, conversation, images, side):
    out = processor.apply_chat_template(
        [conversation, conversation[2:], conversation[:2]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": side},
    )
    eos = processor.tokenizer.eos_token_id
    named = [*words(processor, "noto: red apple"), eos]
    drawn = [
        *processor.image_ids(processor.encode_images(images[2:3])[0]),
        *words(processor, " and "),
        *processor.image_ids(processor.encode_images(images[3:])[0]),
        eos,
    ]
    learnt = [ids[mask.bool()].tolist() for ids, mask in zip(out["input_ids"], out["assistant_masks"])]
    assert learnt == [named + drawn, drawn, named]
    assert not (out["assistant_masks"].bool() & (out["attention_mask"] == 0)).any()


def test_a_prompt_is_the_beginning_of_the_whole_conversation(processor, conversation):
    for turns in (1, 3):
        prompt = processor.apply_chat_template(
            conversation[:turns], tokenize=True, return_dict=True, add_generation_prompt=True
        )
        whole = processor.apply_chat_template(conversation[: turns + 1], tokenize=True, return_dict=True)
        (prompt,), (whole,) = prompt["input_ids"], whole["input_ids"]
        assert whole[: len(prompt)] == prompt
        assert prompt[0] == processor.tokenizer.bos_token_id and prompt[-1] != processor.tokenizer.eos_token_id


def test_a_saved_template_is_loaded_with_processor_and_tokenizer_alone(processor, conversation, tmp_path):
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    processor.save_pretrained(tmp_path)
    assert (
        AutoProcessor.from_pretrained(tmp_path).apply_chat_template(conversation, add_generation_prompt=True) == text
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False) == text


def test_chats_of_captions_are_training_examples(images):
    processor = tiny_processor()
    processor.chat_template = TEMPLATES["captions"]
    codes = np.asarray(processor.encode_images(images[:1])[0])
    image, caption = {"type": "image", "image": images[0]}, {"type": "text", "text": "noto: red apple"}
    for parts, image_first in (((image, caption), True), ((caption, image), False)):
        chat = [{"role": "user", "content": [parts[0]]}, {"role": "assistant", "content": [parts[1]]}]
        (ids,) = processor.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
        assert ids == DocumentEncoder(processor).caption("noto: red apple", codes, image_first)
        system = [{"role": "system", "content": "You are a helpful assistant."}]
        (with_system,) = processor.apply_chat_template(system + chat, tokenize=True, return_dict=True)["input_ids"]
        assert with_system == ids


def test_the_released_model_has_the_template_of_captions_and_pads_on_the_left():
    processor = AutoProcessor.from_pretrained(CARD)
    assert processor.chat_template == processor.tokenizer.chat_template == TEMPLATES["captions"]
    assert processor.tokenizer.padding_side == "left"
