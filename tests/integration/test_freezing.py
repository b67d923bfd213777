# SPDX-License-Identifier: Apache-2.0
"""One modality's experts learn, the other's or all else stay as they are."""

import pytest

from helpers.mixed import FirstStep, build_trainer, changed, copied_state, mixed_examples
from helpers.tiny import tiny_model
from modeling_moma import calibrate_thresholds, freeze_all_but, freeze_groups, unfreeze
from tokenization import MomaDataCollator


FIELDS = {
    "4t4i": {"shared_expert_intermediate_size": {"text": 8, "image": 8}},
    "token_choice": {"training_routing": "token_choice"},
    "1t1i": {"num_experts": {"text": 1, "image": 1}},
    "depth": {"num_hidden_layers": 3, "depth_layers": [1], "depth_capacity": 0.5},
    "untied": {"untied_attention": True},
}


def is_of(modality, name):
    """Whether a tensor is of a modality's group, or of its projections and norms of untied attention."""
    parts = (f".groups.{modality}.", f".modalities.{modality}.", f"norm.{modality}.")
    return any(part in name for part in parts)


@pytest.mark.parametrize(
    "name, frozen", [("4t4i", "image"), ("token_choice", "text"), ("depth", "text"), ("untied", "text")]
)
def test_frozen_group_stays_bit_by_bit_under_weight_decay(name, frozen, processor, tmp_path):
    model = tiny_model(processor, **FIELDS[name])
    learning = "image" if frozen == "text" else "text"
    freeze_groups(model, [frozen])
    before, step = copied_state(model), FirstStep()
    build_trainer(model, processor, tmp_path, callbacks=[step], max_steps=3, weight_decay=0.5).train()
    moved = changed(before, model.state_dict())
    assert not [name for name in moved | step.gradients.keys() if is_of(frozen, name)]
    # all else learns, but for biases that this routing does not read
    expected = {name for name in before if not is_of(frozen, name) and not name.endswith("balance_bias")}
    assert expected <= moved
    assert any(is_of(learning, name) for name in expected)


def test_thresholds_of_a_frozen_group_can_be_fitted_afterwards(processor, tmp_path):
    model = tiny_model(processor)
    freeze_groups(model, ["text", "image"])
    before = copied_state(model)
    calibrate_thresholds(model, [MomaDataCollator(processor.tokenizer)(mixed_examples(processor))])
    moved = changed(before, model.state_dict())
    assert {name.rsplit(".", 1)[1] for name in moved} == {"threshold", "num_updates"}
    assert any(".groups.text." in name for name in moved)


def rows_that_moved(before, after, name):
    return (before[name] != after[name]).any(-1).nonzero().flatten().tolist()


def tokens_of_images(config):
    (frame,) = config.frames.values()
    return sorted({frame.begin, frame.end, *(id for start, stop in frame.ranges for id in range(start, stop))})


@pytest.mark.parametrize("name, is_tied", [("4t4i", True), ("1t1i", False), ("depth", False), ("untied", False)])
def test_all_but_a_group_and_the_rows_of_its_tokens_stays_bit_by_bit(name, is_tied, processor, tmp_path):
    model = tiny_model(processor, **FIELDS[name], tie_word_embeddings=is_tied)
    matrices = freeze_all_but(model, ["image"])
    assert matrices == ["model.embed_tokens.weight"] + ([] if is_tied else ["lm_head.weight"])
    before = copied_state(model)
    build_trainer(model, processor, tmp_path, max_steps=3).train()
    after = model.state_dict()
    embeddings = {"model.embed_tokens.weight", "lm_head.weight"}
    moved = {name for name in changed(before, after) - embeddings if not name.endswith("balance_bias")}
    assert moved == {name for name in before if is_of("image", name) and not name.endswith("balance_bias")}
    # every token of images is a target, so all of its rows of the head learn
    assert rows_that_moved(before, after, "lm_head.weight") == tokens_of_images(model.config)
    read = rows_that_moved(before, after, "model.embed_tokens.weight")
    assert read and set(read) <= set(tokens_of_images(model.config))


def rows_with_gradients(model, processor):
    model.zero_grad()
    model(**MomaDataCollator(processor.tokenizer)(mixed_examples(processor))).loss.backward()
    return (model.lm_head.weight.grad != 0).any(-1).nonzero().flatten().tolist()


def test_another_freezing_takes_the_place_of_the_first_and_all_is_undone(processor):
    model = tiny_model(processor, auxiliary_routers=True)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    images, everything = tokens_of_images(model.config), list(range(model.config.vocab_size))
    (frame,) = model.config.frames.values()
    # those that begin and end a frame are written among texts
    texts = [token for token in everything if not any(start <= token < stop for start, stop in frame.ranges)]
    freeze_all_but(model, ["image"])
    assert rows_with_gradients(model, processor) == images
    freeze_all_but(model, ["text"])
    assert rows_with_gradients(model, processor) == texts
    freeze_all_but(model, ["image", "text"])
    assert rows_with_gradients(model, processor) == everything
    freeze_all_but(model, ["image"])
    freeze_groups(model, ["text"])
    unfreeze(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert rows_with_gradients(model, processor) == everything


@pytest.mark.parametrize("groups, said", [(["audio"], "audio.*text.*image"), ([], "nothing would learn")])
def test_groups_that_cannot_learn_alone_are_refused(groups, said, processor):
    with pytest.raises(ValueError, match=said):
        freeze_all_but(tiny_model(processor), groups)
