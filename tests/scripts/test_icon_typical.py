# SPDX-License-Identifier: Apache-2.0
"""Typical icons: whose names a model finds likeliest, in black, and drawings that are nearly one."""

import numpy as np
import pytest
import torch
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import build_typical_icons
from helpers.icons import write_icons
from helpers.tiny import tiny_model, tiny_processor
from icon_evaluation.samples import open_split, order
from icon_evaluation.typical import KnownDrawings, candidates, in_black, name_scores, typical_caption
from image_sets.icon_images import COLOURS, paint, unpaint
from modeling_moma.data.encoding import DocumentEncoder


PROCESSOR = tiny_processor()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_model(PROCESSOR, initializer_range=0.3).eval()


@pytest.fixture(scope="module")
def built(model, tmp_path_factory):
    """A folder of typical icons, and the data and the model that they are of."""
    folder = tmp_path_factory.mktemp("built")
    for name in ("data", "model"):
        (folder / name).mkdir()
    write_icons(folder / "data", ["train"], count=40, colour="red")
    model.save_pretrained(folder / "model")
    PROCESSOR.save_pretrained(folder / "model")
    words = ["--model", str(folder / "model"), "--data", str(folder / "data"), "--output", str(folder / "typical")]
    assert build_typical_icons.main([*words, "--batch-size", "3"]) == 0
    return folder


def columns_of(rows):
    return {name: [row[name] for row in rows] for name in ("name", "family", "colour", "set", "icon")}


@pytest.mark.parametrize("colour", sorted(COLOURS))
def test_paint_can_be_taken_off(colour):
    greys = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    difference = unpaint(paint(greys, colour), colour).astype(int) - greys
    # a light colour has few values between its own and white
    assert np.abs(difference).max() <= 2


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["Cog", "cog", "key", ""]), st.integers(0, 11), st.sampled_from([None, "red"])),
        max_size=60,
    )
)
def test_candidates_are_one_of_each_maker_and_eight_of_several(drawn):
    rows = [
        {"name": name, "family": f"maker{maker}", "colour": colour, "set": f"set{maker}", "icon": str(number)}
        for number, (name, maker, colour) in enumerate(drawn)
    ]
    found = candidates(columns_of(rows))
    for name in ("cog", "key"):
        own = [row for row in rows if row["name"].lower() == name]
        painted = {row["family"] for row in own if row["colour"]}
        makers = painted or {row["family"] for row in own}
        chosen = [rows[candidate.row] for candidate in found if candidate.name == name]
        assert len(chosen) == (min(len(makers), 8) if len(makers) > 2 else 0)
        assert len({row["family"] for row in chosen}) == len(chosen)
        if painted:
            assert all(row["colour"] for row in chosen)
        for row in chosen:
            rivals = [other for other in own if other["family"] == row["family"] and (other["colour"] or not painted)]
            assert row == min(rivals, key=lambda other: order(other["set"], other["icon"]))
    assert {candidate.name for candidate in found} <= {"cog", "key"}


def test_icons_are_black_or_as_they_are():
    image = Image.new("RGB", (4, 4), COLOURS["teal"])
    assert in_black([image, image], ["teal", None])[:, 0, 0].tolist() == [[0, 0, 0], list(COLOURS["teal"])]
    assert typical_caption({"name": "Red-Apple"}) == "red apple (typical)"


def test_scores_of_names_are_those_of_the_plain_loop(model):
    names = ["house", "red apple", "key"]
    codes = torch.randint(PROCESSOR.vq_model.config.num_embeddings, (3, PROCESSOR.image_seq_length))
    tokenizer = PROCESSOR.tokenizer
    for name, own, score in zip(names, codes, name_scores(model, PROCESSOR, codes, names, 2), strict=True):
        encode = DocumentEncoder(PROCESSOR).text_ids
        words = [*encode(name), encode("x (")[len(encode("x"))]]
        before = [tokenizer.bos_token_id, *PROCESSOR.image_ids(own.tolist())]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*before, *words]]), use_cache=False).logits[0]
        expected = sum(
            logits[len(before) - 1 + place].log_softmax(-1)[word].item() for place, word in enumerate(words)
        )
        assert score.item() == pytest.approx(expected, abs=1e-4)


def test_a_folder_of_typical_icons_is_one_that_a_recipe_reads(built):
    data = load_dataset("parquet", data_files=str(built / "typical" / "train.parquet"))["train"]
    train = open_split(str(built / "data"), "train")
    names = {name.lower() for name in train["name"]}
    assert set(data["name"]) == names
    assert {image.size for image in data["image"]} == {train[0]["image"].size}
    again = build_typical_icons.main(
        ["--model", str(built / "model"), "--data", str(built / "data"), "--output", str(built / "again")]
    )
    assert again == 0
    # however many are scored at once
    assert (built / "again" / "train.parquet").read_bytes() == (built / "typical" / "train.parquet").read_bytes()


def test_drawings_that_are_nearly_known_ones_are_told(built):
    icons = open_split(str(built / "typical"), "train")
    known = KnownDrawings(icons, PROCESSOR, 4)
    pixels = PROCESSOR.image_processor(icons["image"][:], return_tensors="pt")["pixel_values"]
    images = PROCESSOR.decode_images(PROCESSOR.vq_model.get_image_tokens(pixels))
    names = icons["name"][:]
    assert len(known) == len(icons) and known.shares(images, names) == {"of_their_name": 1.0, "any": 1.0}
    assert known.shares(images, ["no such name"] * len(names)) == {"of_their_name": 0.0, "any": 1.0}
    blank = [Image.new("RGB", images[0].size, "white")] * len(names)
    assert known.shares(blank, names) == {"of_their_name": 0.0, "any": 0.0}
