# SPDX-License-Identifier: Apache-2.0

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tokenization import add_image_tokens, train_text_tokenizer


TEXTS = ["noto: red apple", "twemoji: green apple", "fluent flat: red heart"] * 5


def foreign_tokenizer():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "apple": 1, "</s>": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="</s>")


def test_special_tokens_come_first_and_sequences_begin_with_bos():
    tokenizer = train_text_tokenizer(TEXTS, vocab_size=300)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    ids = tokenizer("noto: red apple")["input_ids"]
    assert ids[0] == 1 and 2 not in ids and tokenizer("")["input_ids"] == [1]
    assert len(tokenizer) <= 300 and len(ids) < len("noto: red apple")


@pytest.mark.parametrize("text", ["naïve  café\n\tété", "日本語 🍎👩‍🚀", "  two spaces , and . marks !", "\x00\u200d"])
def test_any_text_comes_back_unchanged(text):
    tokenizer = add_image_tokens(train_text_tokenizer(TEXTS, vocab_size=300), 8)
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_bad_arguments_raise():
    with pytest.raises(TypeError, match="texts"):
        train_text_tokenizer("one string")
    with pytest.raises(ValueError, match="vocab_size: 100"):
        train_text_tokenizer(TEXTS, vocab_size=100)
    with pytest.raises(ValueError, match="codebook_size: 0"):
        add_image_tokens(train_text_tokenizer(TEXTS, vocab_size=300), 0)
    with pytest.raises(TypeError, match="fast tokenizer"):
        add_image_tokens(object(), 8)


@pytest.mark.parametrize("make", [lambda: train_text_tokenizer(TEXTS, vocab_size=300), foreign_tokenizer])
def test_code_ids_are_contiguous_and_survive_saving(make, tmp_path):
    tokenizer = add_image_tokens(make(), 2000)
    codes = [f"<|image_{code}|>" for code in range(2000)]
    first = tokenizer.convert_tokens_to_ids("<|image_0|>")
    assert tokenizer.convert_tokens_to_ids(codes) == list(range(first, first + 2000))
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "apple<|begin_image|><|image_7|><|image_1999|><|end_image|> apple<image>"
    assert loaded(text) == tokenizer(text) and len(loaded) == len(tokenizer)
    ids = loaded(text, add_special_tokens=False)["input_ids"]
    assert first + 7 in ids and first + 1999 in ids
    assert "image_7" not in loaded.decode(ids, skip_special_tokens=True)


def test_foreign_tokenizer_gains_only_what_it_lacks():
    tokenizer = add_image_tokens(foreign_tokenizer(), 8)
    assert tokenizer.eos_token == "</s>" and tokenizer.pad_token == "<pad>" and tokenizer.bos_token == "<bos>"
    assert tokenizer("apple")["input_ids"] == [1]


def test_adding_twice_is_harmless_and_another_size_raises():
    tokenizer = add_image_tokens(train_text_tokenizer(TEXTS, vocab_size=300), 8)
    size = len(tokenizer)
    assert len(add_image_tokens(tokenizer, 8)) == size
    for other in (4, 16):
        with pytest.raises(ValueError, match=f"exactly {other}"):
            add_image_tokens(tokenizer, other)
