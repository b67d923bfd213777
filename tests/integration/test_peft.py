# SPDX-License-Identifier: Apache-2.0
"""LoRA by PEFT on attention, on packed experts and on the networks of one-expert groups."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.mixed import FirstStep, build_trainer, changed, copied_state, losses, mixed_examples
from helpers.tiny import tiny_model
from modeling_moma import MomaForCausalLM, MomaMetricsCallback
from tokenization import MomaDataCollator


peft = pytest.importorskip("peft")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
DEPTH = {"num_hidden_layers": 3, "depth_layers": [1], "depth_capacity": 0.5}
# fields of the model, what LoRA adapts, and how many matrices or stacks that is
TARGETS = {
    "attention by modality": ({"untied_attention": True}, {"target_modules": ATTENTION}, 2 * 2 * 4),
    # a width that grouped products refuse
    "experts of one group": (
        {"intermediate_size": 20},
        {"target_parameters": ["groups.image.experts.gate_up_proj", "groups.image.experts.down_proj"]},
        2 * 2,
    ),
    "groups of one expert": (
        {"num_experts": {"text": 1, "image": 1}},
        {"target_modules": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]},
        2 * 2 * 3,
    ),
    "depth": (
        DEPTH,
        {"target_modules": ATTENTION, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        3 * 4 + 3 * 2 * 2,
    ),
}


def trained_adapter(base, processor, output, callbacks=(), **targets):
    """The base under LoRA after a few steps of the Trainer, saved in `output`."""
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=16, **targets))
    trainer = build_trainer(model, processor, output, callbacks=callbacks, max_steps=9, learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    return trainer, model.eval()


@torch.no_grad()
def logits(model, processor):
    batch = MomaDataCollator(processor.tokenizer)(mixed_examples(processor, 4))
    return model.eval()(**batch).logits


@pytest.mark.parametrize("fields, targets, count", TARGETS.values(), ids=TARGETS)
def test_lora_trains_and_is_the_same_saved_reloaded_and_merged(fields, targets, count, processor, tmp_path):
    base = tiny_model(processor, **fields)
    original, before, step = copy.deepcopy(base), copied_state(base), FirstStep()
    trainer, model = trained_adapter(base, processor, tmp_path / "adapter", callbacks=[step], **targets)

    assert all(".lora_" in name for name in step.gradients)
    lora_b = [gradient for name, gradient in step.gradients.items() if ".lora_B." in name]
    assert len(lora_b) == count and all(gradient.abs().sum() > 0 for gradient in lora_b)
    # three batches are all examples
    assert sum(losses(trainer)[-3:]) < sum(losses(trainer)[:3])

    expected = logits(model, processor)
    assert (expected - logits(original, processor)).abs().max() > 1e-3
    reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(original), tmp_path / "adapter")
    assert torch.equal(logits(reloaded, processor), expected)
    # routers and their thresholds are the base's
    after = model.get_base_model().state_dict()
    routers = [name for name in before if "router." in name]
    assert bool(routers) == any("router" in name for name, _ in model.named_modules())
    for name in routers:
        assert torch.equal(after[name], before[name]), name

    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, processor), expected, rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(plain) is MomaForCausalLM and plain.state_dict().keys() == before.keys()
    torch.testing.assert_close(logits(plain, processor), expected, rtol=0, atol=1e-5)


def test_routers_to_save_learn_and_travel_with_the_adapter(processor, tmp_path):
    base = tiny_model(processor, **DEPTH)
    original = copy.deepcopy(base)
    targets = {"target_modules": ATTENTION, "modules_to_save": ["router", "depth_router"]}
    trainer, model = trained_adapter(base, processor, tmp_path, callbacks=[MomaMetricsCallback()], **targets)
    reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(original), tmp_path)
    assert torch.equal(logits(reloaded, processor), logits(model, processor))
    merged = reloaded.merge_and_unload()
    moved = changed(original.state_dict(), merged.state_dict())
    kinds = ("router.weight", "router.threshold", "router.num_updates")
    assert {name for name in original.state_dict() if name.endswith(kinds)} <= moved
    assert "experts" not in " ".join(moved)
    torch.testing.assert_close(logits(merged, processor), logits(model, processor), rtol=0, atol=1e-5)
    log = next(log for log in trainer.state.log_history if "text_loss" in log)
    assert {"image_loss", "text_uncovered", "image_peak_load", "text_depth_load"} <= log.keys()


def test_routers_to_save_go_by_the_configuration_of_their_model(processor, tmp_path):
    targets = peft.LoraConfig(r=4, target_modules=ATTENTION, modules_to_save=["router", "depth_router"])
    peft.get_peft_model(tiny_model(processor, **DEPTH), targets).save_pretrained(tmp_path)
    adapted = peft.PeftModel.from_pretrained(tiny_model(processor, **DEPTH), tmp_path)
    changes = {"normalize_gates": True, "num_experts_per_tok": 2, "inference_routing": "token_choice"}
    for model in (adapted, adapted.merge_and_unload()):
        model.config.update(changes)
        expected = logits(tiny_model(processor, **DEPTH, **changes), processor)
        torch.testing.assert_close(logits(model, processor), expected, rtol=0, atol=1e-5)
        model.config.update({"normalize_gates": False})
        assert (logits(model, processor) - expected).abs().max() > 1e-4
