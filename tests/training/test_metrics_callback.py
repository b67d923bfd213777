# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother
from transformers.utils import logging

from helpers.tiny import tiny_model, tiny_processor
from modeling_moma import (
    MomaMetricsCallback,
    devices_moma,
    experts_implementations_moma,
    initialize_code_embeddings,
)
from modeling_moma.configuration_moma import rule_names
from modeling_moma.routing_moma import MomaRouter
from modeling_moma.training.metrics_callback import check_best_metric, evaluation_figures
from tokenization import MomaDataCollator


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def make_trainer(processor, examples, tmp_path, **fields):
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=4,
        prediction_loss_only=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(
        model=tiny_model(processor, **fields),
        args=arguments,
        train_dataset=examples,
        eval_dataset=examples[:4],
        data_collator=MomaDataCollator(processor.tokenizer),
        callbacks=[MomaMetricsCallback()],
    )


def make_examples(processor, length=8):
    generator = torch.Generator().manual_seed(0)
    first, stop = processor.image_token_offset, processor.image_token_offset + processor.codebook_size
    rows = []
    for _ in range(length):
        codes = torch.randint(first, stop, (processor.image_seq_length,), generator=generator).tolist()
        rows.append({"input_ids": [processor.begin_image_token_id, *codes, processor.end_image_token_id, 5, 6]})
    return rows


AUXILIARY = {"auxiliary_routers": True, "inference_routing": "auxiliary", "num_hidden_layers": 3, "depth_layers": [1]}


@pytest.mark.parametrize("fields", [{}, AUXILIARY], ids=["plain", "auxiliary"])
def test_trainer_logs_the_loss_of_each_modality_and_the_load(fields, processor, tmp_path):
    examples = make_examples(processor)
    trainer = make_trainer(processor, examples, tmp_path, **fields)
    trainer.train()
    training = next(log for log in trainer.state.log_history if "text_loss" in log)
    evaluation = next(log for log in trainer.state.log_history if "eval_text_loss" in log)
    # expert choice balances by construction
    assert training["image_peak_load"] == pytest.approx(1.0)
    assert 0 < training["image_uncovered"] < 1
    assert set(evaluation) >= {"eval_image_loss", "eval_text_uncovered", "eval_image_covered_twice"}

    batch = MomaDataCollator(processor.tokenizer)(examples[:4])
    with torch.no_grad():
        output = trainer.model.eval()(**batch)
    for modality in ("text", "image"):
        assert evaluation[f"eval_{modality}_loss"] == pytest.approx(output.modality_losses[modality].item(), rel=1e-4)


def test_the_loss_of_an_evaluation_is_the_mean_over_its_tokens_whatever_the_batch(processor, tmp_path):
    """`Trainer` takes the mean over batches, and chooses the best model by what its callbacks leave."""
    examples = [*make_examples(processor, 3), *({"input_ids": [5, 6, 7]} for _ in range(5))]
    trainer = make_trainer(processor, examples, tmp_path)
    trainer.callback_handler.callbacks = [MomaMetricsCallback(averages_eval_loss=True)]
    trainer.callback_handler.callbacks[0].attach(trainer.model)
    sums = torch.zeros(2)
    with torch.no_grad():
        for example in examples:
            ids = torch.tensor([example["input_ids"]])
            logits = trainer.model.eval()(ids).logits[0, :-1]
            sums += torch.tensor([cross_entropy(logits, ids[0, 1:], reduction="sum").item(), ids.shape[1] - 1])
    for size in (1, 3, 8):
        trainer.args.per_device_eval_batch_size = size
        found = trainer.evaluate(examples)
        assert found["eval_loss"] == pytest.approx((sums[0] / sums[1]).item(), rel=1e-4)
        assert trainer.state.log_history[-1]["eval_loss"] == found["eval_loss"]


class OtherEvaluation(TrainerCallback):
    """Evaluates on other examples, under another prefix, before the trainer's own evaluation."""

    def __init__(self, trainer, examples):
        self.trainer, self.examples = trainer, examples

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.trainer.evaluate(self.examples, metric_key_prefix="test")


def test_an_evaluation_under_another_prefix_has_figures_of_its_own(processor, tmp_path):
    examples, others = make_examples(processor), [{"input_ids": [5, 6, 7]}] * 2
    logs = []
    for runs_other in (False, True):
        trainer = make_trainer(processor, examples, tmp_path)
        if runs_other:
            trainer.add_callback(OtherEvaluation(trainer, others))
        trainer.train()
        logs.append(trainer.state.log_history)
    timed = ("runtime", "per_second")
    expected, found = (
        [
            {key: value for key, value in log.items() if not key.endswith(timed)}
            for log in history
            if "test_loss" not in log
        ]
        for history in logs
    )
    assert found == expected
    other = next(log for log in logs[1] if "test_loss" in log)
    assert other["test_text_loss"] == pytest.approx(other["test_loss"], rel=1e-4)
    assert "text_loss" not in other


def test_the_main_training_moves_no_auxiliary_router(processor, tmp_path):
    trainer = make_trainer(processor, make_examples(processor), tmp_path, **AUXILIARY)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    moved = {key for key, value in trainer.model.state_dict().items() if not torch.equal(value, before[key])}
    assert not any(".auxiliary." in key for key in moved)
    assert {key for key in before if key.endswith(("router.weight", "router.threshold"))} <= moved


def test_hooks_are_gone_after_training(processor, tmp_path):
    trainer = make_trainer(processor, make_examples(processor), tmp_path)
    trainer.train()
    assert not any(module._forward_hooks for module in trainer.model.modules())


class Interrupt(TrainerCallback):
    """Ends a training as a user does."""

    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_a_training_that_was_interrupted_leaves_nothing_to_the_next_one(processor, tmp_path):
    examples, logs = make_examples(processor), {}
    callback = MomaMetricsCallback()
    stopped = make_trainer(processor, examples, tmp_path)
    stopped.callback_handler.callbacks = [callback, Interrupt()]
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    for name, callbacks in (("fresh", [MomaMetricsCallback()]), ("used", [callback])):
        trainer = make_trainer(processor, examples, tmp_path, initializer_range=0.3)
        trainer.callback_handler.callbacks = callbacks + trainer.callback_handler.callbacks[:-1]
        trainer.train()
        logs[name] = [
            {key: value for key, value in log.items() if "image" in key} for log in trainer.state.log_history
        ]
    assert logs["used"] == logs["fresh"] and all(logs["used"][:-1])
    assert not any(module._forward_hooks for module in stopped.model.modules())


def test_an_evaluation_that_nobody_listens_to_is_told_of(processor, tmp_path, caplog):
    trainer = make_trainer(processor, make_examples(processor), tmp_path)
    trainer.callback_handler.callbacks = [MomaMetricsCallback(averages_eval_loss=True)]
    logging.warning_once.cache_clear()
    trainer.evaluate()
    assert "`callback.attach(model)` before `evaluate()`" in caplog.text


def test_smoothed_labels_are_shifted(processor, tmp_path):
    examples = make_examples(processor)
    trainer = make_trainer(processor, examples, tmp_path)
    trainer.label_smoother = LabelSmoother(epsilon=0.2)
    batch = MomaDataCollator(processor.tokenizer)(examples[:4])
    model = trainer.model.eval()
    with torch.no_grad():
        log_probs = model(**batch).logits[:, :-1].log_softmax(-1)
        loss = trainer.compute_loss(model, dict(batch))
    targets = batch["labels"][:, 1:]
    expected = -0.8 * log_probs.gather(2, targets.unsqueeze(2)).mean() - 0.2 * log_probs.mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_alike_codes_start_with_alike_embeddings(processor):
    model = tiny_model(processor, hidden_size=64)
    codebook = torch.randn(processor.codebook_size, 8)
    codebook[1] = codebook[0] + 0.01
    words = model.get_input_embeddings().weight[: processor.image_token_offset].clone()
    initialize_code_embeddings(model, codebook)
    weight = model.get_input_embeddings().weight
    codes = weight[processor.image_token_offset : processor.image_token_offset + processor.codebook_size]
    distances = torch.cdist(codes, codes)
    assert distances[0, 1] < 0.1 * distances[0, 2:].min()
    assert codes.std().item() == pytest.approx(model.config.initializer_range, rel=0.05)
    assert torch.equal(weight[: processor.image_token_offset], words)


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_codebook_of_equal_vectors_is_refused(processor, value):
    model = tiny_model(processor)
    before = model.get_input_embeddings().weight.clone()
    with pytest.raises(ValueError, match="codebook_KC.*equal"):
        initialize_code_embeddings(model, torch.full((processor.codebook_size, 8), value))
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_codebook_of_another_size_is_refused(processor):
    with pytest.raises(ValueError, match="codebook_KC"):
        initialize_code_embeddings(tiny_model(processor), torch.randn(7, 8))


class DrawSamples(TrainerCallback):
    """Draws after every step, in the mode that the training left the model in."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        assert model.training
        model.generate(torch.tensor([[1, 5]]), generation_mode="image", do_sample=True)
        with torch.no_grad():
            model(torch.tensor([[1, 5, 6]]), labels=torch.tensor([[1, 5, 6]]))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"training_routing": "token_choice"},
        {"training_routing": "threshold", "routing_warmup_steps": 2},
        {"num_hidden_layers": 3, "depth_layers": [1], "depth_capacity": {"text": 0.5, "image": 0.25}},
        {"gumbel_noise": 1.0, "gumbel_noise_steps": 3},
    ],
    ids=["expert_choice", "token_choice", "threshold", "depth", "noise"],
)
def test_samples_drawn_in_training_mode_move_no_router(fields, processor):
    model = tiny_model(processor, **fields).train()
    callback = MomaMetricsCallback()
    callback.attach(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ids = torch.tensor([[1, 5, 6, processor.begin_image_token_id]])
    model.generate(ids, generation_mode="image", do_sample=False)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            model(ids, labels=ids)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert callback._averages(training=True) == {}


def test_a_training_that_draws_samples_ends_as_one_that_does_not(processor, tmp_path):
    states, logs = [], []
    for callbacks in ([], [DrawSamples()]):
        torch.manual_seed(0)
        trainer = make_trainer(processor, make_examples(processor), tmp_path)
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train()
        states.append(trainer.model.state_dict())
        times = ("runtime", "per_second")
        history = trainer.state.log_history
        logs.append([{k: v for k, v in log.items() if not k.endswith(times)} for log in history])
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    assert logs[0] == logs[1] and "text_loss" in logs[0][0]


@torch.no_grad()
@pytest.mark.parametrize("has_kernel", [True, False])
@pytest.mark.parametrize("routing", rule_names())
def test_figures_are_the_same_where_a_selection_has_a_row_for_every_pair(monkeypatch, processor, routing, has_kernel):
    batch = MomaDataCollator(processor.tokenizer)(make_examples(processor))
    averages = []
    for is_device in (False, True):
        if is_device:
            monkeypatch.setattr(devices_moma, "_CPU", ())
            monkeypatch.setattr(experts_implementations_moma, "_has_kernel", lambda dtype, sizes: has_kernel)
            monkeypatch.setattr(torch, "bincount", None)
        model, callback = tiny_model(processor, auxiliary_routers=True), MomaMetricsCallback()
        callback.attach(model)
        model(**batch, routing=routing)
        averages.append(callback._averages(training=False))
    assert averages[1] == pytest.approx(averages[0], rel=1e-5)
    figures = ("uncovered", "covered_twice", "peak_load")
    assert set(averages[0]) >= {f"{group}_{name}" for group in ("text", "image") for name in figures}


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"num_hidden_layers": 3, "depth_layers": [1]}], ids=["plain", "depth"])
def test_uncovered_tokens_are_shares_of_all_tokens_however_they_come_in_batches(processor, fields):
    model, callback = tiny_model(processor, **fields), MomaMetricsCallback()
    callback.attach(model)
    counts = {name: torch.zeros(3) for name in ("text", "image")}

    def count(module, args, output):
        logits_NE, selection = output
        taken_N = torch.bincount(selection.token_P, minlength=len(logits_NE))
        counts[module.group] += torch.tensor([(taken_N == 0).sum(), (taken_N > 1).sum(), len(taken_N)])

    for module in model.modules():
        if isinstance(module, MomaRouter):
            module.register_forward_hook(count)
    for width in (3, 14, 8):
        model(torch.tensor([[5, 6, *make_examples(processor)[0]["input_ids"]][:width]]))
    averages = callback._averages(training=False)
    for group, (uncovered, twice, number) in counts.items():
        assert averages[f"{group}_uncovered"] == pytest.approx(float(uncovered / number))
        assert averages[f"{group}_covered_twice"] == pytest.approx(float(twice / number))


def test_steps_with_a_static_cache_are_not_counted(processor):
    ids = torch.tensor([[1, 5, 6, 7]])
    averages = []
    for max_new_tokens in (1, 4):
        model, callback = tiny_model(processor), MomaMetricsCallback()
        callback.attach(model)
        model.generate(ids, max_new_tokens=max_new_tokens, do_sample=False, cache_implementation="static")
        averages.append(callback._averages(training=False))
    assert averages[0] == averages[1] != {}


def choosing(tmp_path, eval_strategy="steps", **fields):
    return TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], eval_strategy=eval_strategy, eval_steps=2, **fields
    )


BEST = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize(
    "fields, sets, message",
    [
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau"},
            {"a": 1, "b": 2},
            "reduce_lr_on_plateau' goes by .*'eval_a_loss'",
        ),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, {"a": 1}, "save_strategy = 'best' goes by"),
        (
            {"save_strategy": "best", "metric_for_best_model": "loss"},
            None,
            "save_strategy = 'best', and no source has",
        ),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, None, "reduce_lr_on_plateau', and no source has"),
        (
            {"save_strategy": "best", "metric_for_best_model": "loss", "eval_strategy": "no"},
            [1],
            "goes by an evaluation, and",
        ),
        ({**BEST, "metric_for_best_model": "text_depth_load"}, [1], "'text_depth_load', but no evaluation gives it"),
        ({**BEST, "metric_for_best_model": "text_peak_load"}, [1], "'text_peak_load', but no evaluation gives it"),
    ],
)
def test_figures_that_no_evaluation_gives_are_refused(tmp_path, fields, sets, message):
    config = tiny_model(tiny_processor(), num_experts={"text": 1, "image": 2}).config
    with pytest.raises(ValueError, match=message):
        check_best_metric(choosing(tmp_path, **fields), config, sets)


@pytest.mark.parametrize(
    "fields, sets",
    [
        ({}, None),
        ({**BEST}, [1]),
        ({**BEST, "metric_for_best_model": "eval_image_peak_load"}, [1]),
        ({"save_strategy": "best", "metric_for_best_model": "eval_a_text_loss"}, {"a": 1}),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, [1]),
    ],
)
def test_figures_that_evaluations_give_are_taken(tmp_path, fields, sets):
    config = tiny_model(tiny_processor(), num_experts={"text": 1, "image": 2}).config
    check_best_metric(choosing(tmp_path, **fields), config, sets)


@pytest.mark.parametrize(
    "fields",
    [{}, {"depth_layers": [0]}, {"num_experts": {"text": 1, "image": 2}}, {"num_experts": 4}, {"num_experts": 1}],
)
def test_named_figures_are_those_that_an_evaluation_gives(processor, tmp_path, fields):
    trainer = make_trainer(processor, make_examples(processor), tmp_path, **fields)
    trainer.train()
    given = {name for log in trainer.state.log_history for name in log if name.startswith("eval_")}
    given -= {f"eval_{name}" for name in ("runtime", "samples_per_second", "steps_per_second")}
    assert given == {f"eval_{name}" for name in evaluation_figures(trainer.model.config)}
