# SPDX-License-Identifier: Apache-2.0
"""The stock `Trainer` with its usual switches."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.mixed import FirstStep, build_trainer, changed, copied_state, losses, mixed_examples
from helpers.tiny import tiny_model
from modeling_moma import depth_moma
from modeling_moma.routing_moma import MomaRouterBase


LOSS = {"modality_loss_weights": {"text": 5.0}, "z_loss_coef": 0.01}
# momentum 1 keeps the cuts where they are: other micro-batches then change nothing
FIXED = {"routing_warmup_steps": 0, "threshold_momentum": 1 - 1e-12}
DEPTH = {"num_hidden_layers": 3, "depth_layers": [1]}
TOKENWISE = {
    "1t1i": {"num_experts": {"text": 1, "image": 1}},
    "token_choice": {"training_routing": "token_choice", "router_bias_update_rate": 0.0},
    "threshold": {"training_routing": "threshold", **FIXED},
    "depth": {"training_routing": "threshold", **DEPTH, **FIXED},
}


def settled(model):
    """The model with routers that look back on many steps."""
    for module in model.modules():
        if isinstance(module, MomaRouterBase):
            module.num_updates.fill_(1e9)
    return model


def first_step(model, processor, output, **fields):
    """Loss and gradients of one optimizer step."""
    step = FirstStep()
    trainer = build_trainer(model, processor, output, callbacks=[step], **fields)
    trainer.train()
    assert step.gradients
    return losses(trainer)[0], step.gradients


def assert_same_step(found, expected, tolerance=1e-5):
    assert found[0] == pytest.approx(expected[0], abs=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=tolerance, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("name, smoothing", [("1t1i", 0.1), ("token_choice", 0.0), ("threshold", 0.0), ("depth", 0.0)])
def test_accumulated_micro_batches_equal_one_large_batch(name, smoothing, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(depth_moma, "_MOMENTUM", FIXED["threshold_momentum"])
    model = settled(tiny_model(processor, **TOKENWISE[name], **LOSS))
    sizes = {"label_smoothing_factor": smoothing}
    whole = first_step(copy.deepcopy(model), processor, tmp_path, per_device_train_batch_size=6, **sizes)
    sizes |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6}
    assert_same_step(first_step(model, processor, tmp_path, **sizes), whole)


def test_weights_in_bf16_train_too_and_leave_routers_in_fp32(processor, tmp_path):
    tiny_model(processor, **DEPTH).save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    trainer = build_trainer(model, processor, tmp_path, bf16=True, max_steps=8, learning_rate=1e-2)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    trainer.save_model(tmp_path / "trained")
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "trained").state_dict()
    wide = {name for name, tensor in state.items() if tensor.dtype == torch.float32}
    assert wide == {name for name in state if "router." in name}


def test_resumed_training_ends_bit_equal_to_an_uninterrupted_one(processor, tmp_path):
    fields = {**DEPTH, "gumbel_noise": 0.5, "gumbel_noise_steps": 20}
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    options |= {"lr_scheduler_type": "linear", "max_grad_norm": 1.0, "weight_decay": 0.1}
    options |= {"per_device_train_batch_size": 2}
    whole = build_trainer(tiny_model(processor, **fields), processor, tmp_path, **options)
    whole.train()
    state = copied_state(whole.model)
    # other weights, which the checkpoint replaces
    other = tiny_model(processor, **fields, initializer_range=0.5)
    resumed = build_trainer(other, processor, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert not changed(state, resumed.model.state_dict())
    assert losses(resumed) == losses(whole)
    counters = [tensor for name, tensor in state.items() if name.endswith("num_updates")]
    assert counters and all((counter == 12).all() for counter in counters)


def test_evaluation_is_causal_and_in_plain_nats(processor, tmp_path):
    examples = mixed_examples(processor, 4)
    trainer = build_trainer(tiny_model(processor, **DEPTH, **LOSS), processor, tmp_path, examples, max_steps=3)
    trainer.train()
    found = trainer.evaluate()["eval_loss"]
    batch = trainer.data_collator(examples)
    with torch.no_grad():
        causal, oracle = (trainer.model.eval()(**batch, routing=name) for name in ("threshold", "expert_choice"))
        targets = batch["labels"][:, 1:]
        plain = torch.nn.functional.cross_entropy(causal.logits[:, :-1].flatten(0, 1), targets.flatten())
    assert found == pytest.approx(causal.loss.item(), abs=1e-6) == pytest.approx(plain.item(), abs=1e-6)
    assert abs(found - oracle.loss.item()) > 1e-4


def test_best_model_comes_back_and_weights_alone_are_saved(processor, tmp_path):
    # the worst is called the best, so that the last checkpoint is not it
    options = {"max_steps": 4, "learning_rate": 1e-2, "save_only_model": True, "load_best_model_at_end": True}
    options |= {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = build_trainer(tiny_model(processor, output_router_logits=True), processor, tmp_path, **options)
    trainer.train()
    assert losses(trainer, "eval_loss")[1] < losses(trainer, "eval_loss")[0]
    predictions = trainer.predict(mixed_examples(processor, 4))
    assert predictions.predictions.shape == (*predictions.label_ids.shape, trainer.model.config.vocab_size)
    assert not (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    # who may read the settings may read the weights
    assert len({path.stat().st_mode for path in (tmp_path / "checkpoint-2").iterdir() if path.is_file()}) == 1
    best, last = (AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}") for step in (2, 4))
    assert not changed(best.state_dict(), trainer.model.state_dict())
    moved = changed(last.state_dict(), trainer.model.state_dict())
    assert {name.rsplit(".", 1)[1] for name in moved} >= {"threshold", "num_updates", "gate_up_proj"}
