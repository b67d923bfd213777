# SPDX-License-Identifier: Apache-2.0

import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer

from helpers.text_sources import CHAT, CHATML
from helpers.tiny import TEXTS, noise_images
from modeling_moma import MomaForCausalLM
from modeling_moma.data.kinds.interleaved import read_messages
from modeling_moma.data.sources import read_sources
from tokenization import MomaProcessor
from tokenization.text_tokenizer_moma import with_image_parts


INDENTED = "  {% for message in messages %}\n    {{ message.content }}\n  {% endfor %}\nend"
NEWLINE_FIRST = "\n\n {{ messages | length }}\n{%- for message in messages %}\n{{ message.content }}{% endfor %}"


def converted_chat(source, convert, folder):
    """The source's tokenizer with a template, and the processor of what it was converted into."""
    with_template = AutoTokenizer.from_pretrained(source)
    with_template.chat_template = CHATML
    with_template.save_pretrained(source)
    convert(source)
    processor = MomaProcessor.from_pretrained(folder / "moma")
    return with_template, processor


def test_processor_beside_the_model_reads_text_as_the_source_did(source, convert, tmp_path):
    with_template, processor = converted_chat(source, convert, tmp_path)
    expected = AutoTokenizer.from_pretrained(source)(TEXTS)["input_ids"]
    assert processor(text=TEXTS)["input_ids"] == expected
    for one in (processor, processor.tokenizer, AutoTokenizer.from_pretrained(tmp_path / "moma")):
        assert one.apply_chat_template(CHAT, tokenize=False) == with_template.apply_chat_template(CHAT, tokenize=False)
    config = MomaForCausalLM.from_pretrained(tmp_path / "moma").config
    layout = processor.token_layout()
    assert {name: getattr(config, name) for name in layout} == layout
    assert processor.tokenizer.model_max_length == config.max_position_embeddings


IMAGE_CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Name it."}]},
    {"role": "assistant", "content": "red apple"},
]


CHATS = {
    "chatml": (CHATML, CHAT, True),
    "no-system": (CHATML, CHAT[1:], False),
    "indented": (INDENTED, CHAT, False),
    "newline-first": (NEWLINE_FIRST, [{"role": "user", "content": ""}], True),
}


@pytest.mark.parametrize("template, chat, prompt", CHATS.values(), ids=CHATS)
def test_template_of_the_source_stays_for_texts_to_the_character(template, chat, prompt, tokenizer):
    changed, options = with_image_parts(template), {"tokenize": False, "add_generation_prompt": prompt}
    expected = tokenizer.apply_chat_template(chat, chat_template=template, **options)
    assert tokenizer.apply_chat_template(chat, chat_template=changed, **options) == expected
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in chat]
    assert tokenizer.apply_chat_template(parts, chat_template=changed, **options) == expected
    assert with_image_parts(changed) == changed


def test_template_of_the_source_takes_images_and_leaves_messages_without_content(tokenizer):
    changed = with_image_parts(CHATML)
    text = tokenizer.apply_chat_template(IMAGE_CHAT, chat_template=changed, tokenize=False)
    assert "<|im_start|>user\n<image>Name it.<|im_end|>\n" in text
    calls = "{% for m in messages %}{{ m.role }} {{ m.content is none }} {{ m.tool_calls | default('') }};{% endfor %}"
    chat = [{"role": "assistant", "content": None, "tool_calls": ["add"]}, {"role": "user", "content": "x"}]
    expected = tokenizer.apply_chat_template(chat, chat_template=calls, tokenize=False)
    assert tokenizer.apply_chat_template(chat, chat_template=with_image_parts(calls), tokenize=False) == expected
    audio = [{"role": "user", "content": [{"type": "audio"}]}]
    with pytest.raises(TemplateError, match="must be of type text or image, got audio"):
        tokenizer.apply_chat_template(audio, chat_template=changed, tokenize=False)


def test_image_in_a_chat_becomes_its_codes(source, convert, tmp_path):
    _, processor = converted_chat(source, convert, tmp_path)
    image = noise_images(1)[0]
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Name it."}]}]
    ids = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)["input_ids"]
    frame = processor.image_ids(processor.encode_images([image])[0])
    start = ids[0].index(frame[0])
    assert ids[0][start : start + len(frame)] == frame
    # what a training on chats makes of the same messages
    kind = read_sources({"chats": {"data": "nowhere", "messages": "messages"}})[0].kind
    row = {"messages": [*chat, {"role": "assistant", "content": "red apple"}]}
    text, items = read_messages(kind, row, processor)
    assert [(item.modality, item.value) for item in items] == [("image", image)] and text.count("<image>") == 1
