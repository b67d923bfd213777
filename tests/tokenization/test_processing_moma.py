# SPDX-License-Identifier: Apache-2.0

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, AutoTokenizer

from helpers.forked_python import run_python
from helpers.tiny import noise_images, tiny_vq_model
from tokenization import (
    MomaImageProcessor,
    MomaImageProcessorPil,
    MomaProcessor,
    MomaVQConfig,
    add_image_tokens,
    train_text_tokenizer,
)
from tokenization.processor_errors_moma import InputError


ROOT = Path(__file__).resolve().parents[2]
CODES = 32
SIDE = 16
LENGTH = 16
TEXTS = ["noto: red apple", "twemoji: green apple", "user\nassistant\n"] * 3


def make_image_processor(side=SIDE, cls=MomaImageProcessor):
    return cls(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def make_tokenizer(codes=CODES):
    tokenizer = train_text_tokenizer(TEXTS, vocab_size=290)
    return add_image_tokens(tokenizer, codes) if codes else tokenizer


@pytest.fixture
def processor():
    return MomaProcessor(make_image_processor(), make_tokenizer(), tiny_vq_model())


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(3)]


def image_ids(processor, image):
    codes = processor.encode_images([image])[0]
    ids = [processor.image_token_offset + code for code in codes]
    return [processor.begin_image_token_id, *ids, processor.end_image_token_id]


def test_placeholder_becomes_the_real_codes_of_its_image(processor, images):
    first, second = (image_ids(processor, image) for image in images[:2])
    assert first != second and len(first) == LENGTH + 2
    out = processor(images=images[:2], text="<image> red <image>")
    red = processor.tokenizer(" red ", add_special_tokens=False)["input_ids"]
    assert out["input_ids"] == [[processor.tokenizer.bos_token_id, *first, *red, *second]]
    assert processor.image_token_id not in out["input_ids"][0]
    expected = processor.vq_model.get_image_tokens(
        processor.image_processor(images[0], return_tensors="pt")["pixel_values"]
    )
    assert [token - processor.image_token_offset for token in first[1:-1]] == expected[0].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_of_rows_with_no_one_and_two_images(processor, images, side):
    images = [[], [images[0]], [images[1], images[2]]]
    text = ["apple", "<image> red", "<image><image>"]
    out = processor(
        images=images,
        text=text,
        padding=True,
        padding_side=side,
        return_tensors="pt",
        return_labels=True,
        return_mm_token_type_ids=True,
    )
    for row, (row_images, row_text) in enumerate(zip(images, text)):
        alone = processor(images=[row_images], text=[row_text])["input_ids"][0]
        kept = out["attention_mask"][row].bool()
        assert out["input_ids"][row][kept].tolist() == alone
        assert kept[-1 if side == "left" else 0]
        # nothing before the first token could predict it
        first_label = alone[0] if kept[0] else -100
        assert out["labels"][row][kept].tolist() == [first_label, *alone[1:]]
        assert (out["labels"][row][~kept] == -100).all()
        first = processor.image_token_offset
        is_code = (out["input_ids"][row] >= first) & (out["input_ids"][row] < first + CODES)
        assert out["mm_token_type_ids"][row].tolist() == is_code.long().tolist()
        assert is_code.sum() == LENGTH * len(row_images)


@pytest.mark.parametrize("side, return_tensors", [("left", None), ("right", "np"), ("left", "pt")])
def test_labels_are_what_the_ids_are(processor, side, return_tensors):
    options = {"padding": True, "padding_side": side, "return_labels": True, "return_tensors": return_tensors}
    out = processor(text=["red apple", "red"], **options)
    assert type(out["labels"]) is type(out["input_ids"])
    ids, labels = ([list(row) for row in out[name]] for name in ("input_ids", "labels"))
    assert labels[0] == ids[0]
    expected = [-100, -100, *ids[1][2:]] if side == "left" else [*ids[1][:-1], -100]
    assert labels[1] == expected


def test_labels_of_rows_of_unequal_lengths(processor):
    texts = ["red", "red apple castle"]
    out = processor(text=texts, return_tensors="np", return_labels=True)
    assert out["labels"].dtype == out["input_ids"].dtype == object
    assert [row.tolist() for row in out["labels"]] == processor(text=texts, return_labels=True)["labels"]
    assert [row.tolist() for row in out["labels"]] == [row.tolist() for row in out["input_ids"]]


HOSTILE = "<eos> <image> <|image_3|> <|begin_image|><|end_image|><bos>"


def test_escaped_text_is_the_characters_that_it_is(processor, images):
    text = f"<image> red {processor.escape_special_tokens(HOSTILE)} apple<eos>"
    out = processor(images=[[images[0]], []], text=[text, "red"], sanitize_control_tokens=True)
    ids = out["input_ids"][0]
    tokenizer = processor.tokenizer
    special = {token.content for token in tokenizer.added_tokens_decoder.values()}
    found = [token for token in tokenizer.convert_ids_to_tokens(ids) if token in special]
    codes = [token for token in found if token.startswith("<|image_")]
    assert len(codes) == LENGTH and found == ["<bos>", "<|begin_image|>", *codes, "<|end_image|>", "<eos>"]
    words = tokenizer.decode(ids[LENGTH + 3 :])
    assert words == f" red {HOSTILE} apple<eos>"
    # what holds no special token is read as ever, its neighbours included
    assert out["input_ids"][1] == processor(text="red")["input_ids"][0]
    harmless = "red apple, a < b > c <|image"
    assert processor.escape_special_tokens(harmless) == harmless


def test_escaped_text_in_a_batch_is_padded_and_labelled(processor):
    texts = [processor.escape_special_tokens("<eos>red"), "red"]
    options = {"padding": True, "padding_side": "left", "return_labels": True, "return_tensors": "pt"}
    out = processor(text=texts, sanitize_control_tokens=True, **options)
    assert out["attention_mask"][1].tolist()[0] == 0 and out["attention_mask"][0].all()
    assert processor.tokenizer.eos_token_id not in out["input_ids"]
    assert out["labels"][0].tolist() == out["input_ids"][0].tolist()
    bare = processor(text=texts[0], sanitize_control_tokens=True, add_special_tokens=False)["input_ids"][0]
    assert bare == out["input_ids"][0].tolist()[1:]


def test_marks_cannot_be_forged_and_are_not_lost(processor):
    marked = processor.escape_special_tokens("<eos>")
    # from outside they are removed before the text is marked
    assert processor.escape_special_tokens(marked) == marked
    with pytest.raises(ValueError, match="sanitize_control_tokens=True"):
        processor(text=["red", marked])


def test_users_of_a_chat_cannot_write_special_tokens(processor, images):
    parts = [{"type": "image", "image": images[0]}, {"type": "text", "text": HOSTILE}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": "red"}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    ids = processor.apply_chat_template(chat, sanitize_control_tokens=True, **options)["input_ids"][0]
    assert (ids == processor.tokenizer.eos_token_id).sum() == 2
    assert (ids == processor.begin_image_token_id).sum() == 1
    assert processor.tokenizer.decode(ids).count(HOSTILE) == 1


def test_special_tokens_after_a_text_are_not_guessed(processor):
    tokenizer = copy.deepcopy(processor.tokenizer)
    eos = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[eos])
    other = MomaProcessor(processor.image_processor, tokenizer, processor.vq_model)
    with pytest.raises(ValueError, match="after a text"):
        other(text=["red"], sanitize_control_tokens=True)
    assert other(text=["red"], sanitize_control_tokens=True, add_special_tokens=False)["input_ids"]


def test_the_tokenizer_names_the_placeholder(processor, tmp_path):
    assert processor.tokenizer.image_token == processor.image_token
    assert processor.tokenizer.image_token_id == processor.image_token_id
    processor.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).image_token == "<image>"


@pytest.mark.parametrize("images", [None, [], [[], []]])
def test_text_alone(processor, images):
    out = processor(images=images, text=["red apple", ""])
    assert list(out) == processor.model_input_names == ["input_ids", "attention_mask"]
    assert out["input_ids"][1] == [processor.tokenizer.bos_token_id]
    assert processor.decode(out["input_ids"][0], skip_special_tokens=True) == "red apple"
    assert processor.batch_decode(out["input_ids"], skip_special_tokens=True) == ["red apple", ""]


def test_texts_may_be_what_is_read_once(processor, images):
    texts = ["<image> red", "apple"]
    out = processor(images=images[0], text=iter(texts))
    assert out["input_ids"] == processor(images=images[0], text=texts)["input_ids"]


@pytest.mark.parametrize(
    ("count", "text", "message"),
    [
        (2, ["<image>"], "tokens in the prompts should be the same as the number of"),
        (1, ["<image><image>"], "tokens in the prompts should be the same as the number of"),
        (0, ["<image>"], "images: the number of <image> tokens .* got 1 and 0"),
        (1, None, "text=None"),
        (0, None, "at least one text"),
        (0, [], "at least one text"),
        (0, 5, "got int"),
        (0, b"red", "got bytes"),
        (0, {"role": "user", "content": "red"}, "got dict; messages of a chat go through `apply_chat_template`"),
        (0, {"red"}, "got set"),
    ],
)
def test_wrong_number_of_images_raises(processor, images, count, text, message):
    with pytest.raises(ValueError, match=message):
        processor(images=images[:count] or None, text=text)


def test_images_in_the_wrong_row_raise_though_the_total_is_right(processor, images):
    with pytest.raises(ValueError, match=r"text\[0\]: the number of <image> tokens in the prompts should be the same"):
        processor(images=[[], images[:2]], text=["<image>", "<image>"])
    with pytest.raises(
        InputError, match="images: some rows are lists and others are not; give one list for each text"
    ):
        processor(images=[[images[0], images[1]], images[2]], text=["<image>", "<image><image>"])
    with pytest.raises(ValueError, match="one list per text"):
        processor(images=[images[:2]], text=["<image>", "<image>"])


@pytest.mark.parametrize("name", ["text_pair", "text_target", "text_pair_target"])
def test_second_texts_are_refused(processor, name):
    with pytest.raises(InputError, match=f"^{name}: .* write both into `text`"):
        processor(text=["red"], **{name: ["<image>"]})
    with pytest.raises(InputError, match=f"^{name}:"):
        processor(text=["red"], text_kwargs={name: ["<image>"]})


def test_truncation_that_cuts_an_image_raises(processor, images):
    with pytest.raises(ValueError, match="would cut one"):
        processor(images=images[0], text="<image> red", truncation=True, max_length=LENGTH)
    whole = processor(images=images[0], text="<image> red", truncation=True, max_length=LENGTH + 3)
    assert whole["input_ids"][0][-1] == processor.end_image_token_id


def test_rows_that_overflow_are_compared_with_their_own_texts(processor, images):
    options = {"truncation": True, "max_length": LENGTH + 4, "return_overflowing_tokens": True}
    long = "red apple " * LENGTH
    out = processor(text=[long, "<image> red"], images=images[0], **options)
    *overflow, last = out["overflow_to_sample_mapping"]
    assert len(overflow) > 1 and set(overflow) == {0} and last == 1
    assert out["input_ids"][-1] == processor(text="<image> red", images=images[0])["input_ids"][0]
    with pytest.raises(ValueError, match=r"text\[1\]: 1 of image .* would cut one"):
        processor(text=["red", f"{long}<image>"], images=images[0], **options)


def test_an_open_image_may_be_written_as_a_prompt(processor):
    ids = processor(text="red<|begin_image|><|image_5|>")["input_ids"][0]
    assert ids[-2:] == [processor.begin_image_token_id, processor.image_token_offset + 5]


def test_empty_text_without_special_tokens_raises(processor):
    with pytest.raises(ValueError, match="no token at all"):
        processor(text=["red", ""], add_special_tokens=False)


def test_call_time_size_that_the_vq_model_does_not_take_raises(processor, images):
    with pytest.raises(ValueError, match="leave size and crop_size"):
        processor(images=images[0], text="<image>", images_kwargs={"crop_size": {"height": 8, "width": 8}})
    for size in ({"shortest_edge": SIDE - 1}, {"height": SIDE, "width": SIDE - 1}, SIDE - 1):
        with pytest.raises(ValueError, match="smaller than the VQ model's"):
            processor(images=images[0], text="<image>", size=size)
    processor(images=images[0], text="<image>", size={"shortest_edge": SIDE + 1})


def test_images_that_are_not_resized_are_cropped_and_not_filled_up(processor, images):
    (codes,) = processor.encode_images(images[0], do_resize=False)
    # of 24 by 20 pixels
    assert [codes] == processor.encode_images(images[0].crop((4, 2, 20, 18)))
    for size in ((SIDE - 1, SIDE), (2 * SIDE, SIDE - 1)):
        with pytest.raises(InputError, match=r"do_resize=False leaves an image of .* smaller than .*\(16, 16\)"):
            processor(images=images[0].resize(size), text="<image>", do_resize=False)


def test_parts_come_back_in_order(processor, images):
    out = processor(images=images[:2], text="red <image> apple <image>", padding="max_length", max_length=64)
    parts = processor.decode_parts(out["input_ids"][0])
    assert [part if isinstance(part, str) else part.size for part in parts] == [
        "red ",
        (SIDE, SIDE),
        " apple ",
        (SIDE, SIDE),
    ]
    drawn = processor.decode_images(processor.encode_images(images[:2]))
    assert [np.array_equal(a, b) for a, b in zip(drawn, [parts[1], parts[3]])] == [True, True]
    assert not np.array_equal(drawn[0], drawn[1])


def test_ends_of_documents_come_back_from_a_tokenizer_that_pads_with_them(processor, images):
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    other = MomaProcessor(processor.image_processor, tokenizer, processor.vq_model)
    eos, red = tokenizer.eos_token_id, tokenizer("red", add_special_tokens=False)["input_ids"]
    image = image_ids(processor, images[0])
    ids = [eos, eos, *red, eos, *image, *red, eos, eos, eos]
    first, drawn, last = other.decode_parts(ids, skip_special_tokens=False)
    assert (first, drawn.size, last) == ("red<eos>", (SIDE, SIDE), "red<eos>")
    assert other.decode_parts([eos, eos]) == []


def test_incomplete_and_stray_codes_raise(processor, images):
    ids = image_ids(processor, images[0])
    for broken in (ids[:-1], ids[:-2], ids[:4] + ids[5:], ids[:4] + [5] + ids[5:], ids + ids[:3]):
        with pytest.raises(ValueError, match="incomplete"):
            processor.decode_parts(torch.tensor(broken))
    with pytest.raises(ValueError, match="outside a frame of 'image'"):
        processor.decode_parts(ids[1:])


def test_what_are_no_ids_or_codes_is_refused_by_name(processor, images):
    ids = torch.tensor([image_ids(processor, images[0])])
    for rows in (ids, ids.tolist(), list(ids)):
        with pytest.raises(ValueError, match="ids: expected those of one sequence, got 1 rows"):
            processor.decode_parts(rows)
    with pytest.raises(ValueError, match="ids: -100 is no token id"):
        processor.decode_parts([5, -100])
    codes = processor.encode_images(images[:1])
    for made in (processor.decode_images, lambda values: processor.image_ids(values[0])):
        with pytest.raises(ValueError, match="codes: .* whole numbers, got"):
            made(torch.tensor(codes) + 0.9)
    assert processor.post_process_multimodal_output([], generation_mode="interleaved") == []


def test_codes_of_images_may_be_a_list_of_tensors(processor, images):
    codes = processor.encode_images(images)
    expected = processor.decode_images(codes)
    for rows in (list(torch.tensor(codes)), list(np.array(codes))):
        for decoded in (processor.decode_images(rows), processor.decode_items("image", rows)):
            assert all(np.array_equal(ours, theirs) for ours, theirs in zip(decoded, expected, strict=True))


@pytest.mark.parametrize(
    ("codes", "message"),
    [([[0] * 5], "one image has 16 codes, got 5"), ([[CODES] * LENGTH], "lie outside"), ([0], "expected a row")],
)
def test_codes_out_of_range_raise(processor, codes, message):
    with pytest.raises(ValueError, match=message):
        processor.decode_images(codes)


def test_post_processing_of_text_images_and_both(processor, images):
    out = processor(images=images[0], text="red <image> apple", return_tensors="pt")["input_ids"]
    assert processor.post_process_multimodal_output(out, skip_special_tokens=True) == ["red  apple"]
    assert processor.post_process_multimodal_output(out, generation_mode="text") == ["red  apple"]
    codes = torch.tensor(processor.encode_images(images))
    drawn = processor.post_process_multimodal_output(codes, skip_special_tokens=True, generation_mode="image")
    assert [image.size for image in drawn] == [(SIDE, SIDE)] * 3
    (parts,) = processor.post_process_multimodal_output(out, generation_mode="interleaved")
    assert parts[0] == "red " and np.array_equal(parts[1], drawn[0]) and parts[2] == " apple"
    with pytest.raises(ValueError, match="'audio'"):
        processor.post_process_multimodal_output(out, generation_mode="audio")


def test_number_of_multimodal_tokens_equals_the_token_types(processor, images):
    data = processor._get_num_multimodal_tokens(image_sizes=[(20, 24), (9, 9)])
    out = processor(images=images[:2], text="<image><image>", return_mm_token_type_ids=True)
    assert sum(data["num_image_tokens"]) == sum(out["mm_token_type_ids"][0]) and data["num_image_patches"] == [1, 1]


def test_token_layout_follows_the_vocabulary(processor):
    layout = processor.token_layout()
    vocab = processor.tokenizer.get_vocab()
    assert layout == {
        "vocab_size": len(processor.tokenizer),
        "pad_token_id": vocab["<pad>"],
        "bos_token_id": vocab["<bos>"],
        "eos_token_id": vocab["<eos>"],
        "begin_image_token_id": vocab["<|begin_image|>"],
        "end_image_token_id": vocab["<|end_image|>"],
        "image_seq_length": LENGTH,
        "modality_token_ranges": {"image": [[vocab["<|image_0|>"], vocab[f"<|image_{CODES - 1}|>"] + 1]]},
    }


def test_parts_that_do_not_fit_raise():
    vq_model = tiny_vq_model()
    with pytest.raises(ValueError, match=r"add_image_tokens\(tokenizer, 32\)"):
        MomaProcessor(make_image_processor(), make_tokenizer(codes=None), vq_model)
    with pytest.raises(ValueError, match="it has 8 image codes, but the VQ model has num_embeddings=32"):
        MomaProcessor(make_image_processor(), make_tokenizer(codes=8), vq_model)
    wide = {"height": SIDE, "width": SIDE}
    for misfit in (
        make_image_processor(side=8),
        MomaImageProcessor(size={"shortest_edge": 8}, crop_size=wide),
        MomaImageProcessor(size={"shortest_edge": SIDE}, crop_size=wide, do_center_crop=False),
    ):
        with pytest.raises(ValueError, match="do not fit the VQ model's resolution 16"):
            MomaProcessor(misfit, make_tokenizer(), vq_model)
    with pytest.raises(TypeError, match="vq_model"):
        MomaProcessor(make_image_processor(), make_tokenizer(), torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="image_processor"):
        MomaProcessor(make_tokenizer(), make_image_processor(), vq_model)
    scattered = train_text_tokenizer(TEXTS, vocab_size=290)
    scattered.add_tokens(["<image>", "<|begin_image|>", "<|end_image|>", "<|image_1|>"], special_tokens=True)
    scattered.add_tokens([f"<|image_{code}|>" for code in range(CODES)], special_tokens=True)
    with pytest.raises(ValueError, match="must follow one another"):
        MomaProcessor(make_image_processor(), scattered, vq_model)


def test_vq_model_is_put_in_float32_evaluation_mode(images):
    vq_model = tiny_vq_model().bfloat16().train()
    processor = MomaProcessor(make_image_processor(), make_tokenizer(), vq_model).to("cpu")
    assert processor.vq_model.dtype == torch.float32 and not processor.vq_model.training
    assert len(processor.encode_images(images)) == 3


def test_codes_of_images_do_not_depend_on_autocast(processor):
    noise = noise_images(64)
    codes = processor.encode_images(noise)
    with torch.autocast("cpu", torch.bfloat16):
        assert processor.encode_images(noise) == codes


def assert_same(loaded, processor, images):
    text = "<image> red"
    assert loaded(images=images[0], text=text) == processor(images=images[0], text=text)
    codes = processor.encode_images(images)
    for ours, theirs in zip(processor.decode_images(codes), loaded.decode_images(codes)):
        assert np.array_equal(ours, theirs)
    assert loaded.chat_template == processor.chat_template and loaded.token_layout() == processor.token_layout()


def test_saved_and_loaded_processor_is_the_same(processor, images, tmp_path):
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "vq_model" / "model.safetensors").exists() and (tmp_path / "chat_template.jinja").exists()
    loaded = MomaProcessor.from_pretrained(tmp_path)
    assert_same(loaded, processor, images)
    assert loaded.model_input_names == processor.model_input_names
    assert type(MomaProcessor.from_pretrained(tmp_path, backend="pil").image_processor) is MomaImageProcessorPil
    assert "Pil" not in (tmp_path / "processor_config.json").read_text()
    AutoProcessor.register(MomaVQConfig, MomaProcessor, exist_ok=True)
    assert_same(AutoProcessor.from_pretrained(tmp_path), processor, images)


class DarkImageProcessor(MomaImageProcessor):
    """One whose images get other codes."""


def test_an_image_processor_of_ones_own_is_not_replaced_without_a_word(processor, tmp_path, caplog):
    processor.save_pretrained(tmp_path / "plain")
    processor.image_processor = make_image_processor(cls=DarkImageProcessor)
    processor.save_pretrained(tmp_path / "own")
    MomaProcessor.from_pretrained(tmp_path / "plain")
    assert not caplog.text
    MomaProcessor.from_pretrained(tmp_path / "own")
    assert "own: its image processor was a DarkImageProcessor, and is loaded as MomaImageProcessor" in caplog.text


def test_own_chat_template_is_kept(tmp_path):
    processor = MomaProcessor(make_image_processor(), make_tokenizer(), tiny_vq_model(), chat_template="{{ 'hi' }}")
    processor.save_pretrained(tmp_path)
    assert MomaProcessor.from_pretrained(tmp_path).apply_chat_template([{"role": "user", "content": "x"}]) == "hi"


def test_forked_processes_code_images_after_their_parent_has(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    script = (
        "import sys, torch\n"
        "import modeling_moma\n"
        "from datasets import Dataset\n"
        "from PIL import Image\n"
        "from transformers import AutoProcessor\n"
        "torch.set_num_threads(2)\n"
        "processor = AutoProcessor.from_pretrained(sys.argv[1])\n"
        "images = [Image.effect_noise((96, 96), 99).convert('RGB') for _ in range(64)]\n"
        "codes = processor.encode_images(images)\n"
        "def code(batch):\n"
        "    coded = processor.encode_images(batch['image'])\n"
        "    assert torch.get_num_threads() == 2 and len(processor.decode_images(coded)) == len(coded)\n"
        "    return {'codes': coded}\n"
        "rows = Dataset.from_dict({'image': images}).map(code, batched=True, batch_size=32, num_proc=2)\n"
        "assert rows['codes'][:] == codes\n"
    )
    done = run_python(["-c", script, tmp_path], cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("form", [None, "numpy", "torch"])
def test_columns_of_a_data_set_are_read_as_lists(form, processor, images):
    data = Dataset.from_dict({"image": images, "text": [f"<image>apple {n}" for n in range(3)]}).with_format(form)
    expected = processor(images=images, text=data["text"][:])["input_ids"]
    assert processor(images=data["image"], text=data["text"])["input_ids"] == expected
    assert processor.encode_images(data["image"]) == processor.encode_images(images)


def test_no_codes_are_no_images(processor):
    assert (
        processor.encode_images([]) == processor.decode_images([]) == processor.decode_images(torch.empty(0, 16)) == []
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_sides_of_padding_and_truncation_are_saved(side, processor, tmp_path):
    processor.tokenizer.padding_side = processor.tokenizer.truncation_side = side
    processor.save_pretrained(tmp_path)
    loaded = MomaProcessor.from_pretrained(tmp_path)
    assert loaded.tokenizer.padding_side == loaded.tokenizer.truncation_side == side
    options = {"text": "noto: red apple", "truncation": True, "max_length": 3}
    assert loaded(**options)["input_ids"] == processor(**options)["input_ids"]
