# SPDX-License-Identifier: Apache-2.0
"""`moma pretrain` where not all learns: adapters that end up in the weights, one group and the rows of its tokens."""

import json

import pytest
import torch
from safetensors.torch import load_file

from helpers.tiny import TRAINED, tiny_model, tiny_processor, trainer_flags, write_training
from modeling_moma import MomaForCausalLM, upcycle
from modeling_moma.cli.pretrain import main, parse_arguments
from modeling_moma.errors_moma import InputError
from modeling_moma.hub.loading import open_model
from modeling_moma.training.checkpoints import last_checkpoint
from modeling_moma.training.freezing import with_adapters


pytest.importorskip("peft")

SHAPES = {
    "1t1i, tied": {"num_experts": {"text": 1, "image": 1}, "tie_word_embeddings": True},
    "4t4i": {"num_experts": {"text": 4, "image": 4}},
    "shared": {"num_experts": {"text": 2, "image": 2}, "shared_expert_intermediate_size": {"text": 8, "image": 8}},
    "untied": {"num_experts": {"text": 2, "image": 2}, "untied_attention": True},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    write_training(folder)
    for name, fields in SHAPES.items():
        recipe = {"model": {**TRAINED, **fields}}
        (folder / f"{name}.json").write_text(json.dumps(recipe))
    return folder


def arguments(inputs, shape, output, *more):
    paths = ["--processor", inputs / "processor", "--tokens", inputs / "tokens", "--output", output]
    sizes = {"max_steps": 6, "per_device_train_batch_size": 4, "eval_steps": 6, "save_steps": 3, "warmup_steps": 1}
    given = trainer_flags(**sizes, logging_steps=1, learning_rate=0.01)
    return [str(text) for text in (inputs / f"{shape}.json", *paths, *given, *more)]


def start(inputs, shape, folder):
    """A model of that shape, to tell afterwards what has moved."""
    fields = json.loads((inputs / f"{shape}.json").read_text())["model"]
    config = MomaForCausalLM.config_class(**fields, **tiny_processor().token_layout())
    model = MomaForCausalLM(config)
    model.save_pretrained(folder)
    return model


def tokens_of_images(config):
    (frame,) = config.frames.values()
    return {frame.begin, frame.end, *(id for bounds in frame.ranges for id in range(*bounds))}


def rows_that_moved(before, after, name):
    return (after[name] != before[name]).any(-1).nonzero().flatten().tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_adapters_learn_and_end_up_in_the_weights(shape, inputs, tmp_path):
    before = start(inputs, shape, tmp_path / "start").state_dict()
    more = ("--model", tmp_path / "start", "--lora-rank", "4", "--freeze-groups", "text")
    main(arguments(inputs, shape, tmp_path / "out", *more))
    assert not list((tmp_path / "out").glob("adapter*"))
    adapters = str(last_checkpoint(tmp_path / "out"))
    with pytest.raises(InputError, match="holds adapters over '.*start', and whole weights are needed"):
        main(arguments(inputs, shape, tmp_path / "further", "--model", adapters, "--restart-data"))
    model = MomaForCausalLM.from_pretrained(tmp_path / "out")
    after = model.state_dict()
    assert after.keys() == before.keys()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    learning = {name for name in before if "self_attn" in name and name.endswith("proj.weight")}
    # those of its modality are frozen with a group
    learning -= {name for name in learning if ".modalities.text." in name}
    learning |= {name for name in before if ".groups.image." in name and "router" not in name}
    embeddings = {"model.embed_tokens.weight", "lm_head.weight"}
    assert moved == learning | embeddings
    for name in embeddings:
        rows = rows_that_moved(before, after, name)
        assert rows and set(rows) <= tokens_of_images(model.config)


def test_a_resumed_run_of_adapters_ends_as_the_whole_one(inputs, tmp_path):
    more = ("--lora-rank", "4")
    main(arguments(inputs, "4t4i", tmp_path / "whole", *more))
    main(arguments(inputs, "4t4i", tmp_path / "again", *more))
    for left in ("model.safetensors", "trainer_state.json"):
        (tmp_path / "again" / left).unlink()
    last = tmp_path / "again" / "checkpoint-6"
    last.rename(tmp_path / "gone")
    with pytest.raises(InputError, match="names no base model, so its adapters fit nothing"):
        open_model(str(tmp_path / "gone"))
    main(arguments(inputs, "4t4i", tmp_path / "again", *more, "--resume"))
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    for name, tensor in whole.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_adapters_stand_beside_what_an_upcycled_seed_has_kept(inputs, tmp_path):
    model = upcycle(start(inputs, "1t1i, tied", tmp_path), {"text": 2, "image": 2}, keep_seed=True)
    names = {name.split("base_model.model.")[1] for name, _ in with_adapters(model, 2).named_parameters()}
    for group in ("text", "image"):
        assert any(f"groups.{group}.shared_expert.up_proj.lora_A" in name for name in names)
        assert any(f"groups.{group}.experts" in name and "lora_A" in name for name in names)


@pytest.mark.parametrize(
    "more, said",
    [
        (("--lora-rank", "0"), "--lora-rank.*0"),
        (("--lora-rank", "4", "--freeze-groups", "audio"), "audio.*text.*image"),
    ],
)
def test_what_cannot_be_adapted_is_refused(more, said, inputs, tmp_path):
    with pytest.raises(ValueError, match=said):
        main(arguments(inputs, "4t4i", tmp_path, *more))


def test_frozen_groups_that_leave_nothing_to_adapt_are_named(inputs):
    config = tiny_model(tiny_processor(), untied_attention=True).config
    with pytest.raises(InputError, match="`--freeze-groups` .*text.*leaves nothing that `--lora-rank`"):
        with_adapters(MomaForCausalLM(config), 2, ["text", "image"])
    # attention that all modalities share is left
    assert with_adapters(tiny_model(tiny_processor()), 2, ["text", "image"]).peft_config


@pytest.mark.parametrize("other", [("--train-groups", "image"), ("--stop-at", "3")])
def test_adapters_go_neither_with_groups_alone_nor_with_stages(other, inputs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(arguments(inputs, "4t4i", tmp_path, "--lora-rank", "4", *other))
    assert "--lora-rank goes with neither" in capsys.readouterr().err


def test_one_group_and_the_rows_of_its_tokens_learn_alone_under_weight_decay(inputs, tmp_path):
    model = start(inputs, "4t4i", tmp_path / "start")
    before = model.state_dict()
    more = ("--model", tmp_path / "start", "--train-groups", "image", *trainer_flags(weight_decay=0.5))
    main(arguments(inputs, "4t4i", tmp_path / "out", *more))
    after = load_file(tmp_path / "out" / "model.safetensors")
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    outside = {name for name in moved if ".groups.image." not in name}
    assert any(".groups.image.experts" in name for name in moved)
    assert outside == {"lm_head.weight", "model.embed_tokens.weight"}
    for name in outside:
        assert set(rows_that_moved(before, after, name)) <= tokens_of_images(model.config)


def test_freezing_and_training_alone_exclude_each_other(inputs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(arguments(inputs, "4t4i", tmp_path, "--freeze-groups", "text", "--train-groups", "image"))
    assert "--train-groups: not allowed with argument --freeze-groups" in capsys.readouterr().err
