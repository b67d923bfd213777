# Copyright 2026 The modeling-moma authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
import numpy as np
import pytest
from PIL import Image
from transformers import pipeline

from tiny import tiny_model, tiny_processor


@pytest.fixture(scope="module")
def any_to_any():
    processor = tiny_processor()
    return pipeline("any-to-any", model=tiny_model(processor), processor=processor)


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def test_a_picture_in_words_out(any_to_any, picture):
    (answer,) = any_to_any(images=picture, text="<image>", max_new_tokens=4)
    assert isinstance(answer["generated_text"], str)


def test_words_in_a_picture_out(any_to_any):
    (answer,) = any_to_any(text="noto: red apple", generation_mode="image")
    assert answer["generated_image"].size == (16, 16)


def test_several_prompts_give_a_picture_each(any_to_any):
    answers = any_to_any(text=["noto: red apple", "castle"], generation_mode="image")
    pictures = [answer[0] if isinstance(answer, list) else answer for answer in answers]
    assert [picture["generated_image"].size for picture in pictures] == [(16, 16)] * 2


def test_a_chat_with_a_picture(any_to_any, picture):
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what is it?"}],
        }
    ]
    (answer,) = any_to_any(text=chat, max_new_tokens=4, return_full_text=False)
    assert isinstance(answer["generated_text"], str)
