# SPDX-License-Identifier: Apache-2.0
"""Trainers of TRL, with image codes among the labels."""

import math

import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from transformers import Trainer

from helpers.mixed import losses, mixed_examples
from helpers.tiny import noise_images, tiny_model
from modeling_moma import MomaForCausalLM, MomaMetricsCallback


trl = pytest.importorskip("trl")


class OwnLossSFTTrainer(trl.SFTTrainer):
    """As docs/how-to/fine-tune.md gives it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


@pytest.fixture(scope="module")
def images():
    return noise_images(4)


def settings(**fields):
    sizes = {"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True}
    return {**sizes, **quiet, **fields}


def build_sft(model, processing_class, dataset, output, trainer_class=trl.SFTTrainer, callbacks=(), **fields):
    return trainer_class(
        model=model,
        args=trl.SFTConfig(str(output), **settings(**{"max_length": None, **fields})),
        train_dataset=dataset,
        processing_class=processing_class,
        callbacks=list(callbacks),
    )


def tokenised(processor, rows=4):
    return Dataset.from_list(mixed_examples(processor, rows))


def talks(images):
    """One asks for an image and gets it, the other shows one and is told what it is."""
    parts = List({"type": Value("string"), "text": Value("string")})
    features = Features(messages=List({"role": Value("string"), "content": parts}), images=List(ImageFeature()))

    def turn(role, *content):
        parts = [
            {"type": "image", "text": None} if part is None else {"type": "text", "text": part} for part in content
        ]
        return {"role": role, "content": parts}

    draw = [turn("user", "red apple"), turn("assistant", None)]
    read = [turn("user", None, "what is it?"), turn("assistant", "castle")]
    rows = {"messages": [draw, read], "images": [[image] for image in images[:2]]}
    return Dataset.from_dict(rows, features=features)


def one_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


def codes_in(ids, processor):
    first = processor.image_token_offset
    return ids[(ids >= first) & (ids < first + processor.codebook_size)]


def test_conversations_with_images_in_any_turn_are_learnt(processor, images, tmp_path):
    model = tiny_model(processor)
    sizes = {"max_steps": 10, "per_device_train_batch_size": 2}
    trainer = build_sft(model, processor, talks(images), tmp_path, callbacks=[MomaMetricsCallback()], **sizes)
    batch = one_batch(trainer)
    assert "pixel_values" not in batch
    for row in batch["labels"]:
        found = codes_in(row, processor) - processor.image_token_offset
        assert found.tolist() in processor.encode_images(images[:2])
    trainer.train()
    found = losses(trainer)
    assert found[-1] < found[0] - 0.3
    # loads of experts are logged here, too; the losses by modality need the model's own loss
    assert losses(trainer, "image_uncovered") and not losses(trainer, "image_loss")


def test_loss_of_the_answers_alone_counts_images_that_are_answers(processor, images, tmp_path):
    options = {"per_device_train_batch_size": 2, "assistant_only_loss": True}
    trainer = build_sft(tiny_model(processor), processor, talks(images), tmp_path, **options)
    labels = one_batch(trainer)["labels"]
    texts = {processor.tokenizer.decode(row[row != -100], skip_special_tokens=False) for row in labels}
    [codes] = processor.encode_images(images[:1])
    drawn = "".join(["<|begin_image|>", *(f"<|image_{code}|>" for code in codes), "<|end_image|>"])
    assert {text.replace(" ", "") for text in texts} == {f"{drawn}<eos>", "castle<eos>"}


def test_packed_rows_are_those_of_the_documents_apart(processor, tmp_path):
    model = tiny_model(processor, num_experts={"text": 1, "image": 1}, z_loss_coef=0.0)
    apart = build_sft(model, processor.tokenizer, tokenised(processor), tmp_path)
    packed = build_sft(model, processor.tokenizer, tokenised(processor), tmp_path, packing=True, max_length=128)
    batch = one_batch(packed)
    assert batch["input_ids"].shape[0] == 1 and "attention_mask" not in batch
    with torch.no_grad():
        loss = model.eval()(**one_batch(apart)).loss
        torch.testing.assert_close(model(**batch).loss, loss, rtol=1e-5, atol=1e-5)


def test_fused_head_gives_plain_cross_entropy_and_leaves_our_terms_out(processor, tmp_path):
    """What is lost: weights of modalities and the z-loss. Nothing of it, with the model's own loss."""
    found = {}
    for weights in (None, {"text": 5.0}):
        for trainer_class in (trl.SFTTrainer, OwnLossSFTTrainer):
            model = tiny_model(processor, modality_loss_weights=weights, z_loss_coef=0.1 if weights else 0.0)
            callback = MomaMetricsCallback()
            trainer = build_sft(
                model, processor.tokenizer, tokenised(processor), tmp_path, trainer_class, callbacks=[callback]
            )
            trainer.train()
            found[trainer_class, bool(weights)] = losses(trainer)[0]
    assert losses(trainer, "image_loss") and losses(trainer, "text_loss")
    plain = found[trl.SFTTrainer, False]
    assert found[OwnLossSFTTrainer, False] == pytest.approx(plain, abs=1e-5)
    assert found[trl.SFTTrainer, True] == pytest.approx(plain, abs=1e-5)
    assert found[OwnLossSFTTrainer, True] > plain + 1


PROMPTS = ["noto: red apple", "noto: green apple", "fluent 3d: castle", "noto tags: fruit"]


def policy(processor, folder, alike, **fields):
    """A model from the disk, where its trainer finds the reference again."""
    fields = {"num_experts": {"text": 4, "image": 4}, "routing_warmup_steps": 0, **fields}
    tiny_model(processor, **fields).save_pretrained(folder / "model")
    model = MomaForCausalLM.from_pretrained(folder / "model")
    if alike:
        model.config.training_routing = model.config.inference_routing
    return model


DEPTH = {"num_hidden_layers": 3, "depth_layers": [1], "depth_capacity": 0.5}


def preferences(processor, folder, model, ref_model=None):
    """A step of DPO where one answer of each pair is an image."""
    image = processor.replace_image_token({"image_codes": [list(range(16))]}, 0)
    rows = [{"prompt": prompt, "chosen": f" {image}", "rejected": " castle red"} for prompt in PROMPTS]
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=ref_model,
        args=trl.DPOConfig(str(folder), **settings(max_length=None)),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor.tokenizer,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(("alike", "fields"), [(False, {}), (True, DEPTH)], ids=["as configured", "as it infers"])
def test_preferences_begin_at_the_reference_where_a_policy_trains_as_it_infers(processor, tmp_path, alike, fields):
    trainer = preferences(processor, tmp_path, policy(processor, tmp_path, alike, **fields))
    # of a policy that is its reference
    assert (losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)) == alike
    first, stop = trainer.model.config.modality_token_ranges["image"][-1]
    assert sum(first <= token < stop for token in trainer.train_dataset[0]["chosen_ids"]) == 16


@pytest.mark.parametrize("alike", [False, True], ids=["as configured", "as it infers"])
def test_rewards_begin_at_the_reference_where_a_policy_trains_as_it_infers(processor, tmp_path, alike):
    model = policy(processor, tmp_path, alike)
    args = trl.GRPOConfig(str(tmp_path), **settings(beta=0.1, num_generations=2, max_completion_length=6))
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **kwargs: [float(len(text)) for text in completions],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=processor.tokenizer,
    )
    trainer.train()
    assert (losses(trainer, "kl")[0] == pytest.approx(0, abs=1e-7)) == alike
