# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from helpers.slow import slow
from modeling_moma.data.documents import shuffled_held_out
from modeling_moma.data.encoding import DocumentEncoder
from modeling_moma.data.kinds import CaptionDocuments
from modeling_moma.evaluation.losses import EXPERT_CHOICE, document_losses
from modeling_moma.evaluation.measures import encode_images, image_batches, load_model
from modeling_moma.hub.loading import refuse_non_finite
from modeling_moma.labelling.labeler import open_labeler
from modeling_moma.training.recipe import read_recipe


ROOT = Path(__file__).resolve().parent.parent
FOLDER, ICONS = (ROOT / "model_cards" / name for name in ("moma-emoji", "moma-icons"))
each_model = pytest.mark.parametrize("folder", [FOLDER, ICONS], ids=lambda folder: folder.name)
# of 32 held-out images; the report has those of all
LOSSES_OF_32 = {
    "causal": {"tokens": 4746, "text": 0.87144, "image": 3.26987, "overall": 2.94139},
    EXPERT_CHOICE: {"tokens": 4746, "text": 0.871, "image": 3.26986, "overall": 2.94130},
}


@each_model
def test_the_folder_stays_below_40_mb(folder):
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 40e6


@each_model
def test_a_wide_image_is_seen_whole(folder):
    labeler = open_labeler(str(folder))
    wide, marked = (Image.new("RGB", (128, 64), "white") for _ in range(2))
    for left in (0, 112):
        marked.paste("black", (left, 16, left + 16, 48))
    assert not torch.equal(*labeler.encode([wide, marked]))


@each_model
def test_weights_are_finite_and_bf16_but_for_the_routers(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    refuse_non_finite(model, folder.name)
    refuse_non_finite(processor.vq_model, folder.name)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.float32 if ".router." in name else torch.bfloat16), name
    assert model.config.vocab_size == processor.token_layout()["vocab_size"]


@each_model
def test_the_tokenizer_knows_the_placeholder_and_where_the_model_ends(folder):
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == config.max_position_embeddings == 512
    assert tokenizer.image_token == "<image>"


def test_the_model_of_icons_says_a_name_of_every_image():
    model = AutoModelForCausalLM.from_pretrained(ICONS, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(ICONS)
    (tags,) = processor.tokenizer("tags", add_special_tokens=False)["input_ids"]
    assert model.generation_config.caption_suppress_tokens == [processor.tokenizer.eos_token_id, tags]
    images = load_dataset(str(ROOT / "data" / "icons"), split="test")[:24]["image"]
    inputs = processor(images=[[image] for image in images], text=["<image>"] * len(images), return_tensors="pt")

    def captions(**settings):
        ids = model.generate(**inputs, generation_mode="text", do_sample=False, max_new_tokens=24, **settings)
        return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    said = captions()
    assert all(" (" in caption and not caption.startswith("tags") for caption in said), said
    # what the model would say by itself
    own = captions(caption_suppress_tokens=[])
    assert any(not caption for caption in own) and any(caption.startswith("tags: ") for caption in own), own
    # an image is begun as ever
    inputs = processor(text=["house (tabler, outline, red)"], return_tensors="pt")
    ids = model.generate(**inputs, generation_mode="interleaved", do_sample=False, max_new_tokens=80)
    assert [isinstance(part, str) for part in processor.decode_parts(ids[0])][:2] == [True, False]


def test_what_is_drawn_is_called_what_it_was_asked_for_by():
    labeler = open_labeler(str(ICONS))
    # of one word to three, so that prompts are padded
    names = ["heart", "key", "cloud", "frog", "folder download", "castle", "reload", "hand point down", "underline"]

    def called(prompts):
        inputs = labeler.processor(text=prompts, padding=True, padding_side="left", return_tensors="pt")
        torch.manual_seed(0)
        ids = labeler.model.generate(**inputs, generation_mode="image")
        guesses = labeler.names(labeler.model.decode_image_tokens(ids), 5)
        return sum(name in {guess.text for guess in some} for name, some in zip(names, guesses, strict=True))

    assert called([f"{name} (typical)" for name in names]) >= 7
    assert called([f"{name} (typical)" for name in [*names[1:], names[0]]]) <= 2


def test_the_folder_has_a_memory_that_knows_what_the_weights_do_not():
    image = Image.open(ROOT / "model_cards" / "moma-icons-space" / "examples" / "underline.png")
    labeler = open_labeler(str(ICONS))
    codes = labeler.encode([image])
    assert labeler.names(codes, 1)[0][0].text == "underline"
    assert "underline" in labeler.memory.names and len(labeler.memory) > 40_000
    labeler.take_memory(None)
    assert labeler.names(codes, 1)[0][0].text != "underline"


def losses_of_the_folder(limit):
    model, processor = load_model(str(FOLDER), "cpu"), AutoProcessor.from_pretrained(FOLDER)
    rows = load_dataset(str(ROOT / "data" / "emoji"), split="test")
    if limit:
        rows = rows.shuffle(seed=0).select(range(limit))
    codes = encode_images(processor, image_batches(rows, processor, 64, "images"))
    coded = [{**row, "codes": own[None].numpy()} for row, own in zip(rows.remove_columns("image"), codes)]
    kind = read_recipe(ROOT / "recipes" / "emoji.yaml").sources[0].kind
    examples = shuffled_held_out([CaptionDocuments.from_rows("emoji", kind, coded, DocumentEncoder(processor))], 0)
    routings = {"causal": "threshold", EXPERT_CHOICE: "expert_choice"}
    return {name: document_losses(model, processor, examples, 64, routing, name) for name, routing in routings.items()}


def assert_same_losses(losses, expected):
    for name, measured in losses.items():
        assert measured["targets"]["overall"] == expected[name]["tokens"], name
        # where experts choose among a batch a last bit, which CPUs round in ways of their own, may turn a choice
        tolerance = 2e-4 if name == EXPERT_CHOICE else 1e-4
        for part in ("text", "image", "overall"):
            assert measured[part] == pytest.approx(expected[name][part], abs=tolerance), (name, part)


def test_the_folder_as_it_is_loses_what_it_lost_on_some_images():
    assert_same_losses(losses_of_the_folder(32), LOSSES_OF_32)


def test_the_card_shows_the_losses_of_the_report():
    losses = json.loads((FOLDER / "evaluation.json").read_text())["loss"]["causal"]
    shown = " | ".join(f"{losses[part]:.3f}" for part in ("text", "image", "overall"))
    assert f"| MoMa, causal (threshold) | {shown} |" in (FOLDER / "README.md").read_text()


@slow
def test_the_folder_as_it_is_loses_what_its_report_says():
    report = json.loads((FOLDER / "evaluation.json").read_text())["loss"]
    assert_same_losses(losses_of_the_folder(None), report)


def test_icons_are_named_as_in_their_evaluation():
    samples = json.loads((ICONS / "evaluation.json").read_text())["names"]["test"]["samples"][:6]
    rows = load_dataset(str(ROOT / "data" / "icons"), split="test")
    places = {f"{row['set']}:{row['icon']}": place for place, row in enumerate(rows.select_columns(["set", "icon"]))}
    images = [rows[places[sample["icon"]]]["image"] for sample in samples]
    labeler = open_labeler(str(ICONS))
    found = labeler.names(labeler.encode(images), 5)
    for sample, guesses in zip(samples, found, strict=True):
        assert guesses[0].text == sample["names"][0]


def test_the_first_name_and_tag_are_the_same_however_many_are_asked_for():
    # two beams would find less likely ones of most of them
    images = load_dataset(str(ROOT / "data" / "icons"), split="test").select(range(0, 564, 47))["image"]
    labeler = open_labeler(str(ICONS))
    codes = labeler.encode(images)
    for find in (labeler.names, labeler.tags):
        assert [guesses[:1] for guesses in find(codes, 5)] == find(codes, 1)
