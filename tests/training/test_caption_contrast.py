# SPDX-License-Identifier: Apache-2.0
"""The contrast of captions with others' images: which pairs it finds, what they cost, and what it does to a model."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tiny import TRAINED, four_steps, logged_losses, tiny_model, write_training
from modeling_moma import MomaForCausalLM
from modeling_moma.cli.pretrain import main, parse_arguments
from modeling_moma.documents_moma import packed_lengths
from modeling_moma.errors_moma import InputError
from modeling_moma.training.caption_contrast import CaptionContrast
from modeling_moma.training.pretraining import build_trainer
from modeling_moma.training.recipe import ContrastFields, read_recipe
from tokenization.token_frames_moma import TokenFrame


PAD, BOS, EOS, CODES = 0, 1, 2, 4
FRAME = TokenFrame("image", 8, 16, 24, 25, CODES)
CAUSAL = {"training_routing": "token_choice", "inference_routing": "token_choice"}
WORDS, IMAGES = st.lists(st.integers(26, 39), max_size=3), st.lists(st.integers(8, 23), min_size=CODES, max_size=CODES)


@st.composite
def documents(draw):
    """Ids, and the place of the codes where the document is one image behind a caption, else `None`."""
    before, image, kind = draw(WORDS), draw(IMAGES), draw(st.sampled_from(["captioned", "first", "two", "text"]))
    framed = [FRAME.begin, *image, FRAME.end]
    if kind == "text":
        return [BOS, *before, 26, EOS], None
    if kind == "two":
        return [BOS, *before, *framed, *framed, EOS], None
    if kind == "first":
        return [BOS, *framed, *before, EOS], None
    return [BOS, *before, *framed, EOS], len(before) + 2 if before else None


def packed(rows):
    """A batch of rows of documents, and the places of the codes of their pairs among all positions."""
    length = max(sum(len(ids) for ids, _ in row) for row in rows) + 1
    batch = {name: torch.zeros(len(rows), length, dtype=torch.long) for name in ("input_ids", "position_ids")}
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    places = []
    for index, row in enumerate(rows):
        place = 0
        for ids, image in row:
            here = slice(place, place + len(ids))
            batch["input_ids"][index, here] = torch.tensor(ids)
            batch["position_ids"][index, here] = torch.arange(len(ids))
            batch["attention_mask"][index, here] = 1
            if image is not None:
                places.append(index * length + place + image)
            place += len(ids)
        batch["position_ids"][index, place:] = torch.arange(length - place)
    batch["labels"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    return batch, places


def contrast(model=None, **fields):
    return CaptionContrast(model, ContrastFields(**fields), FRAME, BOS)  # pyright: ignore[reportArgumentType]


def check_pairs(batch, places):
    """The pairs of a batch are those at the places, each with the codes of the next one."""
    found = contrast()
    pairs = found.pairs(batch)
    flat = batch["input_ids"].flatten().tolist()
    codes = [flat[place : place + CODES] for place in places]
    others = [codes[(index + 1) % len(codes)] for index in range(len(codes))]
    expected = [(place, *both) for place, *both in zip(places, codes, others, strict=True) if both[0] != both[1]]
    got = [
        (place[0], right, wrong)
        for place, is_pair, right, wrong in zip(*(values.tolist() for values in pairs), strict=True)
        if is_pair
    ]
    assert got == expected
    doubled = found.with_wrong_images(batch, pairs)
    changed = torch.tensor(flat)
    for place, _, wrong in expected:
        changed[place : place + CODES] = torch.tensor(wrong)
    right, wrong = doubled["input_ids"].chunk(2)
    assert torch.equal(right, batch["input_ids"]) and wrong.flatten().tolist() == changed.tolist()
    labels, nothing = doubled["labels"].chunk(2)
    assert torch.equal(labels, batch["labels"]) and (nothing == -100).all()
    assert all(
        torch.equal(doubled[name], values.repeat(2, 1))
        for name, values in batch.items()
        if "_ids" not in name and name != "labels"
    )


@given(st.lists(st.lists(documents(), min_size=1, max_size=4), min_size=1, max_size=3))
@settings(deadline=None, max_examples=80)
def test_pairs_are_captions_with_one_image_behind_them(rows):
    check_pairs(*packed(rows))


@given(st.lists(documents(), min_size=1, max_size=5), st.booleans())
@settings(deadline=None, max_examples=60)
def test_rows_that_are_documents_may_be_padded_on_either_side(found, is_left):
    length = max(len(ids) for ids, _ in found) + 2
    ids_BS = torch.full((len(found), length), PAD)
    mask_BS, places = torch.zeros_like(ids_BS), []
    for row, (ids, image) in enumerate(found):
        begin = length - len(ids) if is_left else 0
        ids_BS[row, begin : begin + len(ids)], mask_BS[row, begin : begin + len(ids)] = torch.tensor(ids), 1
        if image is not None:
            places.append(row * length + begin + image)
    check_pairs({"input_ids": ids_BS, "attention_mask": mask_BS, "labels": ids_BS.clone()}, places)


def image_log_prob(model, ids, image):
    """The log-probability of the codes of a document that stands alone."""
    log_probs = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return sum(log_probs[place - 1, ids[place]] for place in range(image, image + CODES))


def with_codes(document, codes):
    ids, image = document
    return [*ids[:image], *codes, *ids[image + CODES :]], image


def test_costs_and_gradients_are_those_of_documents_alone():
    torch.manual_seed(1)
    model = tiny_model(**CAUSAL)
    reference = copy.deepcopy(model).eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(0.05 * torch.randn_like(weights))
    plain = copy.deepcopy(model)
    captioned = [
        (
            [BOS, *range(26, 26 + words), FRAME.begin, *torch.randint(8, 24, (CODES,)).tolist(), FRAME.end, EOS],
            words + 2,
        )
        for words in (1, 3, 2)
    ]
    text = ([BOS, 30, 31, EOS], None)
    batch, _ = packed([[captioned[0], text, captioned[1]], [captioned[2]]])
    fields = {"weight": 0.3, "beta": 0.5, "wrong_weight": 7.0}
    found = contrast(reference, **fields)
    batch |= packed_lengths(batch["position_ids"])
    pairs = found.pairs(batch)
    doubled = found.with_wrong_images(batch, pairs)
    for name, values in packed_lengths(doubled["position_ids"]).items():
        assert torch.equal(torch.as_tensor(values), torch.as_tensor(doubled[name])), name
    right_P, wrong_P = found.log_ratios(doubled, pairs, model(**doubled).logits)
    cost = (found.costs(right_P, wrong_P) * pairs.is_pair_P).sum()
    cost.backward()

    expected = torch.zeros(())
    for index, document in enumerate(captioned):
        next_ids, next_image = captioned[(index + 1) % len(captioned)]
        ratios = [
            image_log_prob(plain, *each) - image_log_prob(reference, *each).detach()
            for each in (document, with_codes(document, next_ids[next_image : next_image + CODES]))
        ]
        right, wrong = (torch.sigmoid(sign * 0.5 * ratio) for sign, ratio in zip((1, -1), ratios, strict=True))
        expected = expected - (2 * 0.3 / (0.5 * 8)) * (right.log() + 7 * wrong.log())
    expected.backward()
    torch.testing.assert_close(cost, expected, atol=1e-5, rtol=1e-5)
    for (name, weights), others in zip(model.named_parameters(), plain.parameters(), strict=True):
        if others.grad is not None:
            torch.testing.assert_close(weights.grad, others.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contrast")
    processor = write_training(folder)
    tiny_model(processor, max_position_embeddings=64, **CAUSAL).save_pretrained(folder / "seed")
    for name, section in {"contrast": {"weight": 20.0, "beta": 0.1, "wrong_weight": 5.0}, "plain": None}.items():
        for is_packed in (True, False):
            recipe = {"model": TRAINED, "data": {"sequence_length": 64, "packed": is_packed}}
            recipe |= {"contrast": section} if section else {}
            (folder / f"{name}-{is_packed}.json").write_text(json.dumps(recipe))
    return folder


def logs_of(output, name):
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [log[name] for log in history if name in log]


def test_right_images_become_likelier_and_wrong_ones_less_likely():
    torch.manual_seed(0)
    model = tiny_model(**CAUSAL)
    rows = [
        [([BOS, 26 + row, FRAME.begin, *torch.randint(8, 24, (CODES,)).tolist(), FRAME.end, EOS], 3)]
        for row in range(6)
    ]
    batch, _ = packed(rows)
    found = contrast(copy.deepcopy(model).eval(), beta=0.5, wrong_weight=1.0)
    pairs = found.pairs(batch)
    doubled = found.with_wrong_images(batch, pairs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        right_P, wrong_P = found.log_ratios(doubled, pairs, model(**doubled).logits)
        optimizer.zero_grad()
        found.costs(right_P, wrong_P)[pairs.is_pair_P].sum().backward()
        optimizer.step()
    assert pairs.is_pair_P.sum() == 6
    assert right_P[pairs.is_pair_P].min() > 1 and wrong_P[pairs.is_pair_P].max() < -3


@pytest.mark.parametrize("is_packed", [True, False])
def test_a_training_begins_where_right_and_wrong_images_are_level(inputs, tmp_path, is_packed):
    main(four_steps(inputs, tmp_path / "out", f"contrast-{is_packed}", "--model", str(inputs / "seed")))
    gaps, costs = (logs_of(tmp_path / "out", f"contrast_{name}") for name in ("gap", "loss"))
    assert abs(gaps[0]) < 1e-4 and gaps[-1] != 0
    # softplus(0) for the right image and five times for the wrong one
    assert costs[0] == pytest.approx(2 * 20 / (0.1 * 6) * 6 * math.log(2), rel=1e-4)
    # what is saved is a plain model
    assert isinstance(MomaForCausalLM.from_pretrained(tmp_path / "out"), MomaForCausalLM)


def test_the_first_loss_is_that_of_a_training_without_and_the_contrast(inputs, tmp_path):
    for name in ("plain", "contrast"):
        main(four_steps(inputs, tmp_path / name, f"{name}-True", "--model", str(inputs / "seed")))
    pairs, costs = (logs_of(tmp_path / "contrast", f"contrast_{name}") for name in ("pairs", "loss"))
    state = json.loads((tmp_path / "contrast" / "trainer_state.json").read_text())
    trainer = build_trainer(parse_arguments(four_steps(inputs, tmp_path / "x", "plain-True")))
    targets = [int((trainer.train_dataset[index]["labels"] != -100).sum()) for index in range(4)]
    with_contrast, without = logged_losses(tmp_path / "contrast"), logged_losses(tmp_path / "plain")
    assert with_contrast[0] - without[0] == pytest.approx(pairs[0] * costs[0] / sum(targets), rel=1e-3)
    # the held-out losses have no contrast
    assert state["log_history"][-2]["eval_loss"] < with_contrast[-1]
    assert logs_of(tmp_path / "plain", "contrast_gap") == []
    flos = [
        json.loads((tmp_path / name / "trainer_state.json").read_text())["total_flos"]
        for name in ("contrast", "plain")
    ]
    assert flos[0] == pytest.approx(flos[1] * 8 / 3)


def test_a_resumed_training_compares_with_the_model_that_it_began_at(inputs, tmp_path):
    more = ("--model", str(inputs / "seed"))
    main(four_steps(inputs, tmp_path / "whole", "contrast-True", *more))
    main(four_steps(inputs, tmp_path / "stopped", "contrast-True", *more, "--stop-at", "2"))
    main(four_steps(inputs, tmp_path / "stopped", "contrast-True", *more, "--resume"))
    for name in ("loss", "contrast_gap"):
        whole = logs_of(tmp_path / "whole", name)
        assert len(whole) == 4
        assert logs_of(tmp_path / "stopped", name) == pytest.approx(whole, abs=1e-5)


def test_another_contrast_is_another_run(inputs, tmp_path):
    more = ("--model", str(inputs / "seed"))
    main(four_steps(inputs, tmp_path / "out", "contrast-True", *more, "--stop-at", "2"))
    recipe = json.loads((inputs / "contrast-True.json").read_text())
    recipe["contrast"]["beta"] = 0.2
    (inputs / "other.json").write_text(json.dumps(recipe))
    with pytest.raises(InputError, match="contrast: beta = 0.1 there and 0.2 now"):
        main(four_steps(inputs, tmp_path / "out", "other", *more, "--resume"))
    with pytest.raises(InputError, match="contrast = .* there and None now"):
        main(four_steps(inputs, tmp_path / "out", "plain-True", *more, "--resume"))


def test_accumulated_batches_share_a_denominator(inputs, tmp_path):
    """The contrast is a sum over the step's captions, so that what is not split into pairs anew is the same."""
    arguments = four_steps(inputs, tmp_path / "out", "contrast-True", "--model", str(inputs / "seed"))
    trainer = build_trainer(parse_arguments([*arguments, "--gradient-accumulation-steps", "2"]))
    batches = [trainer.data_collator([trainer.train_dataset[index] for index in pair]) for pair in ((0, 1), (2, 3))]
    batches = [{name: values for name, values in batch.items() if name != "source_ids"} for batch in batches]
    trainer.model.train()
    targets = sum((batch["labels"] != -100).sum() for batch in batches)
    apart = [trainer.compute_loss(trainer.model, batch, num_items_in_batch=targets) for batch in batches]
    own = [trainer.compute_loss(trainer.model, batch) * (batch["labels"] != -100).sum() for batch in batches]
    torch.testing.assert_close(sum(apart), sum(own) / targets, atol=0, rtol=1e-4)


def test_a_model_to_begin_at_is_asked_for(inputs, tmp_path):
    with pytest.raises(InputError, match="contrast: .*give `--model`"):
        main(four_steps(inputs, tmp_path / "out", "contrast-True"))
    assert not (tmp_path / "out" / "run.json").exists()


def test_noise_on_the_images_that_are_compared_is_refused(inputs, tmp_path):
    recipe = json.loads((inputs / "contrast-True.json").read_text())
    recipe["data"]["code_noise"] = 0.3
    (inputs / "noisy.json").write_text(json.dumps(recipe))
    with pytest.raises(InputError, match="contrast: .*code_noise = 0.3"):
        main(four_steps(inputs, tmp_path / "out", "noisy", "--model", str(inputs / "seed")))


def test_routing_that_sees_the_future_is_refused(inputs, tmp_path):
    model = MomaForCausalLM.from_pretrained(inputs / "seed")
    model.config.training_routing = "expert_choice"
    model.save_pretrained(tmp_path / "seed")
    with pytest.raises(InputError, match="trains by 'expert_choice'.*'token_choice'"):
        main(four_steps(inputs, tmp_path / "out", "contrast-True", "--model", str(tmp_path / "seed")))


@pytest.mark.parametrize("fields", [{"beta": 0}, {"weight": -1}, {"wrong_weight": True}, {"lambda": 3}])
def test_fields_are_checked(tmp_path, fields):
    (tmp_path / "recipe.json").write_text(json.dumps({"contrast": fields}))
    with pytest.raises(InputError, match=f"contrast.*{next(iter(fields))}"):
        read_recipe(tmp_path / "recipe.json")
