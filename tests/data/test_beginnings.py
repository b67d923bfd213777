# SPDX-License-Identifier: Apache-2.0
"""Documents of a training begin as prompts do, whatever the tokenizer puts before a text."""

import pytest
import torch
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import AutoTokenizer

from helpers.released import RELEASED
from helpers.tiny import TEXTS, noise_images, tiny_model, tiny_processor
from modeling_moma.data.encoding import DocumentEncoder, caption_chat_template, has_caption_template
from modeling_moma.evaluation.measures import write_captions
from modeling_moma.evaluation.retrieval import pair_scores
from tokenization import MomaProcessor, train_text_tokenizer
from tokenization.text_tokenizer_moma import beginning_ids, with_beginning


def processor_that_begins(with_bos: bool) -> MomaProcessor:
    processor = tiny_processor()
    if not with_bos:
        # as the tokenizers of SmolLM2 and Qwen: a beginning token that they have and do not add
        processor.tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)
    return processor


@pytest.fixture(params=[True, False], ids=["adds-bos", "adds-none"])
def processor(request):
    return processor_that_begins(request.param)


@pytest.mark.parametrize("text", ["noto: red apple", ""])
def test_training_begins_as_the_prompt_does(processor, text):
    encoder = DocumentEncoder(processor)
    image = noise_images(1)[0]
    codes = processor.encode_images([image])[0]
    eos = processor.tokenizer.eos_token_id

    prompt = processor(text=text)["input_ids"][0]
    assert encoder.caption(text, codes, image_first=False) == [*prompt, *processor.image_ids(codes), eos]

    prompt = processor(images=[image], text="<image>")["input_ids"][0]
    assert encoder.caption(text, codes, image_first=True) == [*prompt, *encoder.text_ids(text), eos]


def test_a_chat_begins_as_the_training_does(processor):
    processor.chat_template = caption_chat_template(has_bos=bool(beginning_ids(processor.tokenizer)))
    assert has_caption_template(processor)
    (image,), text = noise_images(1), "noto: red apple"
    codes, encoder = processor.encode_images([image])[0], DocumentEncoder(processor)
    for user, assistant, image_first in (("image", text, True), (text, "image", False)):
        contents = [[{"type": "image", "image": image}] if said == "image" else said for said in (user, assistant)]
        chat = [{"role": role, "content": said} for role, said in zip(("user", "assistant"), contents)]
        (ids,) = processor.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
        assert ids == encoder.caption(text, codes, image_first)


def test_the_released_tokenizer_begins_with_its_bos():
    tokenizer = AutoTokenizer.from_pretrained(RELEASED)
    assert beginning_ids(tokenizer) == [tokenizer.bos_token_id]
    ids = tokenizer("noto: red apple", add_special_tokens=False)["input_ids"]
    assert (
        with_beginning(tokenizer, ids) == [tokenizer.bos_token_id, *ids] == tokenizer("noto: red apple")["input_ids"]
    )
    assert with_beginning(tokenizer, []) == [tokenizer.bos_token_id]


def test_what_stands_after_a_text_is_no_beginning():
    tokenizer = train_text_tokenizer(TEXTS * 3, vocab_size=300)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    special = [("<bos>", bos), ("<eos>", eos)]
    for single, expected in (("$A <eos>", []), ("<eos> <bos> $A <eos>", [eos, bos])):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
        assert beginning_ids(tokenizer) == expected
        assert with_beginning(tokenizer, [7]) == [*expected, 7]


@pytest.mark.parametrize("sanitize", [False, True])
def test_an_empty_text_is_the_beginning_token(processor, sanitize):
    bos = processor.tokenizer.bos_token_id
    assert processor(text="", sanitize_control_tokens=sanitize)["input_ids"] == [[bos]]
    out = processor(text=["", "red apple"], padding=True, padding_side="left", return_tensors="pt")
    alone = processor(text=["red apple"])["input_ids"][0]
    assert out["input_ids"][out["attention_mask"].bool()].tolist() == [bos, *alone]


@torch.no_grad()
def test_measures_ask_as_training_taught(processor):
    model = tiny_model(processor, initializer_range=0.3)
    images = noise_images(2)
    codes = torch.tensor(processor.encode_images(images))

    inputs = processor(images=images, text=["<image>"] * 2, return_tensors="pt")
    ids = model.generate(**inputs, generation_mode="text", max_new_tokens=5, do_sample=False)
    expected = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert write_captions(model, processor, codes, batch_size=2, max_new_tokens=5) == expected

    _, drawn, prior = pair_scores(model, processor, [tuple(row) for row in codes.tolist()], ["red", "noto"], 2)
    for text, scores in (("red", drawn[0]), ("noto", drawn[1]), ("", prior)):
        for image, score in zip(codes.tolist(), scores):
            prompt = processor(text=text)["input_ids"][0]
            whole = torch.tensor([[*prompt, *processor.image_ids(image)]])
            log_probs = model(input_ids=whole).logits[0, :-1].log_softmax(-1).gather(1, whole[0, 1:, None])
            assert float(log_probs[len(prompt) : -1].sum()) == pytest.approx(float(score), abs=1e-3)
