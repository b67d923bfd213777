# SPDX-License-Identifier: Apache-2.0
import os

import pytest
import torch
import torch.nn.functional as F
from transformers import TrainingArguments
from transformers.distributed import DistributedConfig
from transformers.modeling_outputs import CausalLMOutput

from helpers.calibration_reference import (
    ALL_MODELS,
    MODELS,
    build,
    padded_batches,
    plain_records,
    state_of,
    text_only,
)
from helpers.processes import run_group
from helpers.reference import GROUPS
from helpers.tiny import mixed_ids, tiny_model
from modeling_moma import MomaForCausalLM
from modeling_moma.calibration.auxiliary_training import (
    PAPER_THRESHOLD,
    AuxiliaryRouterTrainer,
    add_auxiliary_routers,
    auxiliary_report,
    only_auxiliary_trainable,
)
from modeling_moma.calibration.observation import named_routers
from modeling_moma.calibration.thresholds import calibrate_auxiliary_thresholds, calibrate_thresholds
from modeling_moma.errors_moma import InputError


def examples(number=24, length=16):
    return [{"input_ids": ids.tolist()} for ids in mixed_ids(rows=number, length=length, seed=7)]


def collate(rows):
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}


def make_trainer(model, folder, rows=None, **fields):
    arguments = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **fields,
    }
    rows = examples() if rows is None else rows
    return AuxiliaryRouterTrainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collate,
    )


def auxiliary_parameters(model):
    return {name: parameter for name, parameter in model.named_parameters() if ".auxiliary." in name}


def main_state(model):
    return {name: value for name, value in state_of(model).items() if ".auxiliary." not in name}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def plain_loss(model, batch):
    """Mean over routers with tokens of the mean over pairs of -log of the probability of what is true."""
    losses = []
    for name, (pairs, _) in plain_records(model, batch).items():
        auxiliary = model.get_submodule(name).auxiliary
        total = torch.zeros(())
        for _, _, _, is_member, x_D, column in pairs:
            inner = F.silu(auxiliary.up_proj.weight @ x_D)
            probability = torch.sigmoid(auxiliary.down_proj.weight[column] @ inner)
            total = total - torch.log(probability if is_member else 1 - probability)
        if pairs:
            losses.append(total / len(pairs))
    return sum(losses) / len(losses)


@ALL_MODELS
def test_fresh_auxiliary_routers_leave_the_model_as_it_was(name):
    model = tiny_model(**MODELS[name]).eval()
    before, parameters = state_of(model), dict(model.named_parameters())
    flags = {key: parameter.requires_grad for key, parameter in parameters.items()}
    batch = padded_batches()[0]
    with torch.no_grad():
        logits = model(**batch).logits
        added = add_auxiliary_routers(model)
        assert torch.equal(added(**batch).logits, logits)
    assert added is model
    assert_same(before, main_state(model))
    assert all(dict(model.named_parameters())[key] is parameter for key, parameter in parameters.items())
    assert {key: parameter.requires_grad for key, parameter in parameters.items()} == flags
    fresh = auxiliary_parameters(model)
    assert not any(parameter.requires_grad for parameter in fresh.values())
    assert {key: value.shape for key, value in state_of(model).items()} == {
        key: value.shape for key, value in state_of(tiny_model(**MODELS[name], auxiliary_routers=True)).items()
    }
    spread = torch.cat([parameter.flatten() for parameter in fresh.values()]).std().item()
    assert spread == pytest.approx(model.config.initializer_range, rel=0.1)
    assert all((router.auxiliary.threshold == PAPER_THRESHOLD).all() for router in named_routers(model).values())


def test_what_cannot_get_auxiliary_routers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="auxiliary_routers=True"):
        add_auxiliary_routers(build("4t4i"))
    with pytest.raises(ValueError, match="without routers"):
        add_auxiliary_routers(tiny_model(**GROUPS["1t1i"]))
    with pytest.raises(ValueError, match="add_auxiliary_routers"):
        make_trainer(tiny_model(**GROUPS["4t4i"]), tmp_path)
    with pytest.raises(ValueError, match="auxiliary_routers=False"):
        auxiliary_report(tiny_model(**GROUPS["4t4i"]), padded_batches())


def test_arguments_that_hooks_cannot_serve_are_refused(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="`model_init` is given"):
        AuxiliaryRouterTrainer(model_init=lambda: build("4t4i"), args=arguments)
    with pytest.raises(ValueError, match="torch_compile=True"):
        make_trainer(build("4t4i"), tmp_path, torch_compile=True)
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match="n_gpu = 2.*torchrun"):
        AuxiliaryRouterTrainer(model=build("4t4i"), args=arguments)


def test_a_forward_without_routers_is_told(tmp_path):
    class Elsewhere(MomaForCausalLM):
        def forward(self, *args, **kwargs):
            return CausalLMOutput(logits=torch.zeros(1))

    config = build("4t4i").config
    trainer = make_trainer(Elsewhere(config), tmp_path)
    with pytest.raises(ValueError, match="`model` is a Elsewhere whose forward ran none of its routers"):
        trainer.compute_loss(trainer.model, padded_batches()[0])


@ALL_MODELS
def test_loss_and_gradients_are_those_of_plain_loops(name, tmp_path):
    model = build(name)
    trainer = make_trainer(model, tmp_path)
    batch = padded_batches()[0]
    with only_auxiliary_trainable(model):
        loss = trainer.compute_loss(model.train(), {**batch, "labels": batch["input_ids"]})
        loss.backward()
        parameters = auxiliary_parameters(model)
        gradients = {key: parameter.grad.clone() for key, parameter in parameters.items()}
        assert all(p.grad is None for key, p in model.named_parameters() if key not in parameters)
        expected = plain_loss(model, batch)
        wanted = torch.autograd.grad(expected, list(parameters.values()))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for key, gradient in zip(parameters, wanted):
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["4t4i", "depth_by_modality"])
def test_without_a_modality_every_auxiliary_parameter_still_takes_part(name, tmp_path):
    model = build(name)
    trainer = make_trainer(model, tmp_path)
    with only_auxiliary_trainable(model):
        loss = trainer.compute_loss(model, text_only())
        loss.backward()
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss, plain_loss(model, text_only()), rtol=1e-5, atol=1e-6)
    for key, parameter in auxiliary_parameters(model).items():
        assert parameter.grad is not None, key
        assert (parameter.grad == 0).all() == (".groups.image." in key), key


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["2t3i", "depth_by_modality"])
def test_training_learns_membership_and_changes_nothing_else(name, bf16, tmp_path):
    model = build(name, attention_dropout=0.1)
    frozen = model.get_input_embeddings().weight.requires_grad_(False)
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    before = main_state(model)
    trainer = make_trainer(model, tmp_path, max_steps=40, learning_rate=0.03, bf16=bf16)
    first = trainer.evaluate()
    trainer.train()
    last = trainer.evaluate()
    assert_same(before, main_state(model))
    assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == flags
    assert not frozen.requires_grad
    assert not any(module._forward_hooks for module in model.modules())
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(parameter) for parameter in auxiliary_parameters(model).values()}
    assert last["eval_loss"] < 0.75 * first["eval_loss"]
    # chance is the true load
    for key in ("eval_precision", "eval_recall"):
        assert last[key] > 1.4 * last["eval_true_load"], key

    # training in bf16 leaves its casts around the model's forward
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    model.config.inference_routing = "auxiliary"
    model.eval().save_pretrained(tmp_path / "saved")
    loaded = MomaForCausalLM.from_pretrained(tmp_path / "saved").eval()
    ids = mixed_ids(seed=3)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits, logits, rtol=1e-5, atol=1e-5)
        assert (model(input_ids=ids, routing="threshold").logits - logits).abs().max() > 0.1
    assert_same(state_of(model), state_of(loaded))


def rules_of(router, values):
    cut, score, probability = values
    return {
        "auxiliary_0.5": probability >= 0.5,
        "auxiliary": probability >= router.auxiliary.threshold[cut].item(),
        "threshold": score >= router.threshold[cut].item(),
    }


def plain_row(router, pairs, cut=None):
    """Accuracy, precision, recall and load of each rule, pair by pair."""
    pairs = [pair for pair in pairs if cut is None or pair[0] == cut]
    rows = {}
    for rule in ("auxiliary_0.5", "auxiliary", "threshold"):
        taken = [rules_of(router, pair[:3])[rule] for pair in pairs]
        members = [pair[3] for pair in pairs]
        hits = sum(t and m for t, m in zip(taken, members))
        rows[rule] = {
            "accuracy": sum(t == m for t, m in zip(taken, members)) / len(pairs),
            "precision": hits / sum(taken) if any(taken) else None,
            "recall": hits / sum(members),
            "load": sum(taken) / len(pairs),
        }
    return rows


@ALL_MODELS
def test_report_counts_every_pair(name):
    model, batches = build(name), padded_batches()
    calibrate_thresholds(model, batches[:1])
    calibrate_auxiliary_thresholds(model, batches[1:2])
    before = state_of(model)
    rows = auxiliary_report(model.train(), batches)
    assert model.training
    assert_same(before, state_of(model))
    assert {row["router"] for row in rows} == set(named_routers(model))
    records = [plain_records(model, batch) for batch in batches]
    for row in rows:
        router = model.get_submodule(row["router"])
        pairs = [pair for record in records for pair in record[row["router"]][0]]
        for rule, expected in plain_row(router, pairs).items():
            loads = row["rules"][rule].pop("loads")
            assert row["rules"][rule] == expected
            by_cut = [plain_row(router, pairs, cut)[rule]["load"] for cut in range(len(loads))]
            assert loads == by_cut
        assert row["true_load"] == sum(pair[3] for pair in pairs) / len(pairs)


@pytest.mark.parametrize("name", ["4t4i", "depth"])
def test_evaluation_sums_up_all_routers(name, tmp_path):
    model = build(name)
    rows = examples(6)
    trainer = make_trainer(model, tmp_path, rows)
    metrics = trainer.evaluate(metric_key_prefix="test")
    batches = [collate(rows[:4]), collate(rows[4:])]
    pairs = []
    for batch in batches:
        for key, (some, _) in plain_records(model, {"input_ids": batch["input_ids"]}).items():
            pairs += [(rules_of(model.get_submodule(key), pair[:3])["auxiliary"], pair[3]) for pair in some]
    hits, taken = sum(t and m for t, m in pairs), sum(t for t, _ in pairs)
    members = sum(m for _, m in pairs)
    assert metrics["test_accuracy"] == pytest.approx(sum(t == m for t, m in pairs) / len(pairs))
    assert metrics["test_precision"] == pytest.approx(hits / taken)
    assert metrics["test_recall"] == pytest.approx(hits / members)
    assert metrics["test_load"] == pytest.approx(taken / len(pairs))
    assert metrics["test_true_load"] == pytest.approx(members / len(pairs))
    losses = [plain_loss(model, {"input_ids": batch["input_ids"]}).item() for batch in batches]
    assert metrics["test_loss"] == pytest.approx((4 * losses[0] + 2 * losses[1]) / 6, rel=1e-4)
    assert "test_accuracy" in trainer.state.log_history[-1]


def test_resumed_training_reaches_the_same_weights(tmp_path):
    whole = build("4t4i")
    make_trainer(whole, tmp_path / "whole", max_steps=6, save_strategy="steps", save_steps=3).train()
    resumed = build("4t4i")
    trainer = make_trainer(resumed, tmp_path / "resumed", max_steps=6)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same(state_of(whole), state_of(resumed))
    assert not any(parameter.requires_grad for parameter in auxiliary_parameters(resumed).values())


def two_modalities():
    """Rows that a process of two gets in turn: words, words, codes, codes, and so on."""
    generator = torch.Generator().manual_seed(0)
    ranges = [(26, 40), (8, 24)]
    rows = [torch.randint(*ranges[row // 2 % 2], (6,), generator=generator) for row in range(12)]
    return [{"input_ids": row.tolist()} for row in rows]


def train_in_order(model, folder, **fields):
    fields = {"max_steps": 3, "per_device_train_batch_size": 2, "train_sampling_strategy": "sequential", **fields}
    trainer = make_trainer(model, folder, two_modalities(), per_device_eval_batch_size=2, **fields)
    trainer.train()
    return trainer


def calibrate_all(model, batches):
    return calibrate_thresholds(model, batches), calibrate_auxiliary_thresholds(model, batches)


def one_of_two(rank, folder):
    # by which Accelerate takes up the group that is there
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="0")
    model = build("depth_by_modality_4t4i")
    trainer = train_in_order(model, folder / "run")
    assert trainer.args.world_size == 2
    metrics = trainer.evaluate()
    mine = collate(two_modalities()[2 * rank : 2 * rank + 2])
    rows = calibrate_all(model, [mine])
    torch.save({"state": model.state_dict(), "metrics": metrics, "rows": rows}, folder / f"rank{rank}.pt")


def be_refused(rank, folder):
    model = MomaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
    with pytest.raises(InputError, match="`model` is split by FSDP"):
        calibrate_thresholds(model, [collate(two_modalities()[:2])])


def test_a_model_that_fsdp_has_split_is_not_observed(tmp_path):
    build("depth_by_modality_4t4i").save_pretrained(tmp_path)
    run_group(be_refused, tmp_path)


def test_one_rank_may_have_text_only_and_the_other_images_only(tmp_path):
    run_group(one_of_two, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert_same(first["state"], second["state"])
    assert first["rows"] == second["rows"]

    model = build("depth_by_modality_4t4i")
    # batches that two processes take at once are two accumulated ones here
    trainer = train_in_order(model, tmp_path / "single", gradient_accumulation_steps=2)
    metrics = trainer.evaluate()
    rows = two_modalities()
    expected = calibrate_all(model, [collate(rows[:2]), collate(rows[2:4])])
    for key, value in model.state_dict().items():
        torch.testing.assert_close(first["state"][key], value, rtol=1e-4, atol=1e-5, msg=key)
    for key in ("eval_loss", "eval_accuracy", "eval_recall", "eval_load"):
        assert first["metrics"][key] == pytest.approx(metrics[key], rel=1e-4)
    for actual_rows, expected_rows in zip(first["rows"], expected):
        assert [row["tokens"] for row in actual_rows] == [row["tokens"] for row in expected_rows]
        assert [row["rules"] for row in actual_rows] == [row["rules"] for row in expected_rows]
