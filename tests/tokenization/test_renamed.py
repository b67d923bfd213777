# SPDX-License-Identifier: Apache-2.0
"""Old names of the package work for one release: they warn with the new name and do the same."""

import pytest
import torch

import tokenization
from helpers.tiny import noise_images, tiny_processor


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.mark.parametrize("old, new", [("encode_pictures", "encode_images"), ("picture_ids", "image_ids")])
def test_old_methods_warn_with_the_new_name_and_give_the_same(processor, old, new):
    codes = processor.encode_images(noise_images(2))
    argument = noise_images(2) if old == "encode_pictures" else codes[0]
    with pytest.warns(FutureWarning, match=rf"`{old}` is `{new}` now") as caught:
        found = getattr(processor, old)(argument)
    assert found == getattr(processor, new)(argument)
    # shown at the caller's line
    assert caught[0].filename == __file__


def test_old_decoder_warns_with_the_new_name_and_gives_the_same(processor):
    codes = processor.encode_images(noise_images(1))
    with pytest.warns(FutureWarning, match="`decode_pictures` is `decode_images` now"):
        (found,) = processor.decode_pictures(codes)
    assert found.tobytes() == processor.decode_images(codes)[0].tobytes()


def test_old_functions_warn_with_the_new_name_and_give_the_same():
    tokenizer = tokenization.train_text_tokenizer(["red"] * 3, vocab_size=300)
    with pytest.warns(FutureWarning, match="`add_picture_tokens` is `add_image_tokens` now"):
        assert tokenization.add_picture_tokens(tokenizer, 8) is tokenizer
    assert "<|image_7|>" in tokenizer.get_vocab()
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    with pytest.warns(FutureWarning, match="`augment_pictures` is `augment_images` now"):
        found = tokenization.augment_pictures(images, torch.Generator().manual_seed(0))
    assert torch.equal(found, tokenization.augment_images(images, torch.Generator().manual_seed(0)))


def test_old_names_are_no_part_of_the_public_ones():
    assert not [name for name in tokenization.__all__ if "picture" in name]
    with pytest.raises(AttributeError):
        tokenization.open_pictures  # noqa: B018
