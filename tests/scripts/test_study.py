# SPDX-License-Identifier: Apache-2.0
"""The study: recipes of equal cost, one stream of data, runs that resume, rows that are kept, figures that follow."""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
import yaml
from safetensors.torch import load_file

import study as study_script
import study_report
from helpers.mixture import WEIGHTS, write_mixture
from helpers.processes import start_process
from helpers.slow import slow
from helpers.tiny import mixed_ids, tiny_model, tiny_processor
from modeling_moma import MomaConfig
from modeling_moma.calibration.observation import named_routers
from modeling_moma.cli import tokenize
from modeling_moma.data.documents import TokenFolder
from modeling_moma.errors_moma import InputError
from modeling_moma.evaluation.routing_images import record_routing
from modeling_moma.planning.costs import flops_per_token
from modeling_moma.token_groups_moma import token_modalities
from modeling_moma.training.pretraining import training_stream
from modeling_moma.training.recipe import read_recipe
from modeling_moma.training.stage_trainer import StageTrainer, StopAt
from study import measure_again
from study_recipe import reporting, training
from study_recipe.grid import (
    CLAIMED,
    CONTROLS,
    COSTLIER,
    FRESH_SEEDS,
    LEVERS,
    PLAN,
    RECIPES,
    SIZES,
    Pace,
    Run,
    Seed,
    model_fields,
)
from study_recipe.measuring import (
    SPLITS,
    Counts,
    count_stream,
    experts_met,
    flops_a_token,
    revision,
    row,
    training_seconds,
)
from study_recipe.preparing import prepare
from study_recipe.rows import add_row, has_row, read_rows
from study_recipe.timing import step_seconds
from study_recipe.training import Study, log_of, train_branch


ROOT = Path(__file__).resolve().parents[2]
# a million has three steps here
PACE = Pace(rows=2, row_tokens=96, longest=12, warmup_steps=2, curve_steps=3)
SMALL, LARGE = 5, 8
RUN = Run("4t4i-shared", "0.5M", 1, (SMALL, LARGE))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    tiny_processor().save_pretrained(folder / "processor")
    recipe = write_mixture(folder / "data")
    content = yaml.safe_load(recipe.read_text())
    del content["samples"]
    for source in content["sources"].values():
        source["splits"] = {"train": "train[10:]", "validation": "train[:2]", "test": "train[5:7]"}
        del source["held_out"]
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    tokens = folder / "tokens" / "all"
    tokenize.main([str(recipe), "--processor", f"{folder}/processor", "--output", str(tokens), "--processes", "1"])
    return Study(recipe, folder / "processor", folder / "tokens", folder / "runs", PACE)


def stream_of(study, length=40, seed=1):
    recipe, processor = read_recipe(study.recipe), tiny_processor()
    return training_stream(recipe.data, TokenFolder(study.tokens / "all", processor), recipe.sources, length, seed)


def config_of(recipe, size="0.5M"):
    base = yaml.safe_load((ROOT / "recipes" / "study.yaml").read_text())["model"]
    layout = {**tiny_processor().token_layout(), "vocab_size": 3000}
    return MomaConfig(**base | model_fields(Run(recipe, size, 0, ())) | layout)


@pytest.mark.parametrize("size", SIZES)
def test_every_recipe_costs_what_dense_costs_but_for_its_routers(size):
    counts = count_of(text=0.3, image=0.7, length=80.0)
    dense = flops_a_token(config_of("dense", size), counts, with_head=False)
    for recipe in set(RECIPES) - set(COSTLIER):
        config = config_of(recipe, size)
        routers = 3 * 2 * config.hidden_size * 16 * config.num_hidden_layers
        # widths are whole numbers; a depth layer saves attention over its keys, too
        slack = 0.04 if config.depth_layers else 0.002
        difference = flops_a_token(config, counts, with_head=False) - dense
        assert -slack * dense <= difference <= routers + 0.002 * dense


def test_the_wide_dense_model_has_as_many_parameters_as_all_experts_and_costs_three_times_as_much():
    dense, wide, experts = (config_of(recipe) for recipe in ("dense", "dense-wide", "4t4i-shared"))
    assert wide.num_parameters() == pytest.approx(experts.num_parameters(), rel=0.01)
    counts = count_of(text=0.3, image=0.7, length=80.0)
    cost, wide_cost = (flops_a_token(config, counts, with_head=False) for config in (dense, wide))
    assert 3.0 < wide_cost / cost < 3.2


def test_where_text_alone_skips_a_layer_each_modality_costs_what_it_costs_without():
    control, skipping = (config_of(recipe) for recipe in ("4t4i-shared", "4t4i-shared-depth-text"))
    # all that is spared is attention over keys of text, by both
    for share, spared in ((0.0, 0.01), (1.0, 0.03)):
        counts = count_of(text=share, image=1 - share, length=80.0)
        cost = flops_a_token(control, counts, with_head=False)
        assert (1 - spared) * cost <= flops_a_token(skipping, counts, with_head=False) < cost
    assert skipping.group_intermediate_size("text") > control.group_intermediate_size("text")
    assert skipping.group_intermediate_size("image") == control.group_intermediate_size("image")


@pytest.mark.parametrize("size, millions", [("0.5M", 0.5), ("1M", 1.0), ("2.5M", 2.5)])
def test_sizes_have_the_active_parameters_that_they_are_called_by(size, millions):
    config = config_of("dense", size)
    active = config.num_parameters(active=True) - config.vocab_size * config.hidden_size
    assert active / 1e6 == pytest.approx(millions, rel=0.06)


def test_the_shipped_recipe_is_the_dense_run_of_twenty_million_tokens():
    shipped = read_recipe(ROOT / "recipes" / "study.yaml")
    run = Run("dense", "0.5M", 0, (20,))
    assert shipped.model == shipped.model | model_fields(run)
    assert shipped.trainer["learning_rate"] == run.learning_rate
    pace = Pace()
    assert shipped.trainer["max_steps"] == pace.steps(20) and shipped.trainer["warmup_steps"] == pace.warmup_steps
    assert shipped.trainer["per_device_train_batch_size"] == pace.rows
    assert shipped.data.sequence_length == pace.row_tokens


def count_of(text, image, length):
    return Counts({"text": text, "image": image}, {"text": length, "image": length}, {})


def test_flops_are_those_of_every_document_alone(study):
    stream, config = stream_of(study), small_config()
    counts = count_stream(stream, list(WEIGHTS), config)
    total, number = 0.0, 0
    for index in range(len(stream)):
        example = stream[index]
        starts = [*(example["position_ids"] == 0).nonzero().flatten().tolist(), len(example["position_ids"])]
        for start, end in zip(starts, starts[1:]):
            if example["source_ids"][start] < 0:
                continue
            for token in example["input_ids"][start:end].tolist():
                modality = "image" if is_code(config, token) else "text"
                total += flops_per_token(config, modality, end - start, training=True)
                number += 1
    assert flops_a_token(config, counts, with_head=True) == pytest.approx(total / number, rel=1e-9)
    assert sum(counts.tokens.values()) == pytest.approx(1)
    by_source = {name: sum(shares.values()) for name, shares in counts.shares.items()}
    assert by_source == pytest.approx(WEIGHTS, abs=0.08)


def small_config():
    fields = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}
    return MomaConfig(**fields, num_experts=8, **tiny_processor().token_layout())


def is_code(config, token):
    return any(begin <= token < end for begin, end in config.modality_token_ranges["image"])


def train_with_kills(study, run, budget, monkeypatch):
    """Train a branch whose process dies in every fourth step, and return its last checkpoint and the deaths."""
    ends = StopAt.on_step_end
    # on over all starts: the first steps of trunk and branch are hit, and some in between
    steps = iter(range(1, 200))

    def killed(self, args, state, control, **kwargs):
        if next(steps) % 4 == 0:
            raise KeyboardInterrupt
        return ends(self, args, state, control, **kwargs)

    kills = 0
    with monkeypatch.context() as context:
        context.setattr(StopAt, "on_step_end", killed)
        while True:
            try:
                return train_branch(study, run, budget), kills
            except KeyboardInterrupt:
                kills += 1


def assert_same_weights(found, wanted):
    assert found.name == wanted.name
    found, wanted = load_file(found / "model.safetensors"), load_file(wanted / "model.safetensors")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# an upcycled run is stopped and goes on below
@slow
def test_a_stopped_run_ends_as_one_that_was_not_and_a_larger_budget_goes_on(study, tmp_path, monkeypatch):
    whole, stopped = replace(study, runs=tmp_path / "whole"), replace(study, runs=tmp_path / "stopped")
    expected = [train_branch(whole, RUN, budget) for budget in (SMALL, LARGE)]
    for budget, wanted in zip((SMALL, LARGE), expected):
        checkpoint, kills = train_with_kills(stopped, RUN, budget, monkeypatch)
        assert checkpoint.name == f"checkpoint-{PACE.steps(budget)}" and kills >= 3
        assert_same_weights(checkpoint, wanted)


def test_an_upcycled_run_goes_on_in_the_data_of_its_seed(study, tmp_path, monkeypatch):
    """The seed's tokens are its first, its schedule begins anew, and a kill in any part of it changes nothing."""
    recipe = {**RECIPES["4t4i-shared"], "upcycled": Seed("1t1i-shared", 2, "4t4i")}
    monkeypatch.setitem(RECIPES, "4t4i-shared-upcycled", recipe)
    run = Run("4t4i-shared-upcycled", "0.5M", 1, (SMALL,))
    whole, stopped = replace(study, runs=tmp_path / "whole"), replace(study, runs=tmp_path / "stopped")
    seen = []
    step = StageTrainer.training_step

    def record(self, model, inputs, *rest):
        seen.append(inputs["input_ids"])
        return step(self, model, inputs, *rest)

    with monkeypatch.context() as context:
        context.setattr(StageTrainer, "training_step", record)
        checkpoint = train_branch(whole, run, SMALL)
        train_branch(whole, Run("dense", "0.5M", 1, (SMALL,)), SMALL)
    assert len(seen) == 2 * PACE.steps(SMALL)
    assert torch.equal(torch.stack(seen[: PACE.steps(SMALL)]), torch.stack(seen[PACE.steps(SMALL) :]))
    rates = {entry["step"]: entry["learning_rate"] for entry in log_of(checkpoint) if "learning_rate" in entry}
    assert rates[PACE.branch_step(SMALL)] == run.learning_rate
    # the last of the steps of its decay
    last = 1 / (PACE.steps(SMALL) - PACE.branch_step(SMALL))
    assert rates[PACE.steps(SMALL)] == pytest.approx(last * run.learning_rate)
    config = MomaConfig.from_pretrained(checkpoint)
    assert config.num_experts == {"text": 4, "image": 4} and config.gumbel_noise_steps == PACE.steps(2)
    resumed, kills = train_with_kills(stopped, run, SMALL, monkeypatch)
    assert kills >= 3
    assert_same_weights(resumed, checkpoint)


def test_a_decay_goes_on_from_the_trunk_and_falls_to_nothing(study):
    checkpoint = train_branch(study, RUN, LARGE)
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    rates = {entry["step"]: entry["learning_rate"] for entry in log if "learning_rate" in entry}
    leaves, end = PACE.branch_step(LARGE), PACE.steps(LARGE)
    assert len({rate for step, rate in rates.items() if PACE.warmup_steps < step <= leaves}) == 1
    falling = [rate for step, rate in sorted(rates.items()) if step > leaves]
    assert falling == sorted(falling, reverse=True) and falling[-1] < max(rates.values()) / 4
    schedule = torch.load(checkpoint / "scheduler.pt", weights_only=False)
    assert schedule["last_epoch"] == end and schedule["_last_lr"] == pytest.approx([0.0] * len(schedule["_last_lr"]))


def test_all_recipes_of_a_seed_read_the_same_rows_in_the_same_order(study, monkeypatch):
    seen = {}
    for recipe in ("dense", "8x", "6t2i-shared"):
        take = StageTrainer.training_step

        def listening(self, model, inputs, num_items_in_batch=None, take=take, recipe=recipe):
            seen.setdefault(recipe, []).append(inputs["input_ids"].clone())
            return take(self, model, inputs, num_items_in_batch)

        monkeypatch.setattr(StageTrainer, "training_step", listening)
        train_branch(study, Run(recipe, "0.5M", 3, ()), 2)
        monkeypatch.undo()
    dense = torch.stack(seen["dense"])
    assert len(dense) == PACE.steps(2)
    assert all(torch.equal(torch.stack(ids), dense) for ids in seen.values())


def test_a_row_has_the_losses_of_every_split_and_is_put_in_its_place_once(study, tmp_path):
    path = tmp_path / "results" / "runs.parquet"
    checkpoint = train_branch(study, RUN, LARGE)
    result = row(study, RUN, LARGE, checkpoint, ROOT)
    add_row(path, result)
    add_row(path, {**result, "seconds": 1.0})
    (found,) = map(reporting.opened, read_rows(path))
    assert found["seconds"] == 1.0 and has_row(path, RUN.name, LARGE) and not has_row(path, RUN.name, SMALL)
    assert {(entry["split"], entry["routing"]) for entry in found["losses"]} == {
        (split, routing) for split in SPLITS for routing in ("causal", "oracle")
    }
    assert {entry["source"] for entry in found["losses"]} == set(WEIGHTS)
    assert [point["tokens"] for point in found["curve"]][-1] == PACE.steps(LARGE) * PACE.step_tokens
    for kind in ("training", "oracle", "causal"):
        losses = reporting.losses_of(found, kind, "test")
        shares = found["counts"]["tokens"]
        assert losses["overall"] == pytest.approx(sum(shares[name] * losses[name] for name in shares), rel=0.02)
    assert list(tmp_path.glob("results/*.parquet")) == [path]


@pytest.mark.parametrize(
    "fields",
    [{"num_experts": 4}, {"num_experts": {"text": 4, "image": 1}}, {"depth_layers": [1], "depth_capacity": 0.5}],
)
def test_experts_that_a_token_meets_are_counted_by_modality(fields):
    torch.manual_seed(0)
    model = tiny_model(**fields).eval()
    for router in named_routers(model).values():
        router.threshold.fill_(0.5)
    ids = mixed_ids()[:1]
    modality_T = token_modalities(model.config, ids)[0].tolist()
    routed = record_routing(model, ids[0])
    found = {(entry["layer"], entry["modality"]): entry for entry in experts_met(model, {"input_ids": ids})}
    groups = {name: group for group, members in model.config.expert_groups.items() for name in members}
    names = [name for name in model.config.modalities if model.config.group_num_experts(groups[name]) > 1]
    assert found.keys() == {(layer, name) for layer in range(model.config.num_hidden_layers) for name in names}
    for (layer, name), entry in found.items():
        asked = [
            len(routed.experts[layer][place])
            for place, index in enumerate(modality_T)
            if model.config.modalities[index] == name and not routed.skipped[layer][place]
        ]
        assert entry["causal"] == pytest.approx(sum(asked) / len(asked))
    # experts that choose take as many tokens as their capacity says
    if isinstance(fields.get("num_experts"), int):
        shares = {
            name: modality_T.count(index) / len(modality_T) for index, name in enumerate(model.config.modalities)
        }
        assert sum(shares[name] * found[0, name]["oracle"] for name in names) == pytest.approx(1.0)


def test_finished_branches_are_measured_again_and_keep_what_tells_of_their_training(study, tmp_path):
    path = tmp_path / "runs.parquet"
    checkpoint = train_branch(study, RUN, LARGE)
    result = row(study, RUN, LARGE, checkpoint, ROOT)
    old = {name: value for name, value in result.items() if name != "experts"}
    add_row(path, {**old, "revision": "abc", "losses": "[]"})
    # a run whose checkpoints are gone
    add_row(path, {**old, "run": "other", "recipe": "dense"})
    measure_again(study, RUN, path)
    rows = {entry["run"]: reporting.opened(entry) for entry in read_rows(path)}
    assert rows[RUN.name]["revision"] == "abc" and rows[RUN.name]["losses"] == json.loads(result["losses"])
    assert rows[RUN.name]["experts"] == json.loads(result["experts"]) and rows["other"]["experts"] is None
    assert "4t4i-shared" in reporting.experts_table(list(rows.values()))


def test_results_that_are_not_committed_yet_are_no_change_of_the_code(tmp_path):
    def git(*arguments):
        names = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        found = subprocess.run(["git", "-C", tmp_path, *names, *arguments], check=True, capture_output=True, text=True)
        return found.stdout.strip()

    code, results = tmp_path / "code.py", tmp_path / "docs" / "study" / "runs.parquet"
    results.parent.mkdir(parents=True)
    code.write_text("a")
    results.write_text("a")
    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    results.write_text("b")
    commit = git("rev-parse", "--short=12", "HEAD")
    assert revision(tmp_path) == commit
    code.write_text("b")
    assert revision(tmp_path) == f"{commit}-dirty"


def test_a_pause_does_not_count_as_training():
    points = [{"tokens": 1e6 * number, "tokens_per_second": rate} for number, rate in ((1, 1e4), (2, 10.0), (3, 1e4))]
    assert training_seconds([*points, {"tokens": 3e6}]) == pytest.approx(300)


def add_all(path, numbers):
    for number in numbers:
        add_row(path, {"run": f"run {number}", "budget": 1, "value": number})


def test_rows_of_many_processes_are_all_kept(tmp_path):
    path = tmp_path / "runs.parquet"
    processes = [start_process(add_all, path, range(start, 12, 3)) for start in range(3)]
    for process in processes:
        process.join()
    assert sorted(entry["value"] for entry in read_rows(path)) == list(range(12))
    assert pyarrow.parquet.read_table(path).num_rows == 12


def test_tokens_needed_lie_on_the_curve_between_and_beyond_its_points():
    # a loss that falls by 1 with every tenfold
    points = [(1e6, 5.0), (1e7, 4.0), (1e8, 3.0)]
    for loss, tokens in ((5.0, 1e6), (4.5, 10**6.5), (3.0, 1e8), (2.5, 10**8.5), (5.5, 10**5.5)):
        assert reporting.tokens_needed(points, loss) == pytest.approx(tokens)
    with pytest.raises(InputError, match="1 points"):
        reporting.tokens_needed(points[:1], 4.0)
    with pytest.raises(InputError, match="does not fall"):
        reporting.tokens_needed([(1e6, 3.0), (1e7, 3.0)], 2.0)


def result(recipe, tokens, losses, seed=1, flops=6e6):
    entries = [
        {"split": split, "routing": "causal", "source": "icons", "modality": modality, "loss": loss, "targets": 10}
        for split in SPLITS
        for modality, loss in losses.items()
    ]
    return {
        **{"run": f"{recipe}-{seed}", "recipe": recipe, "size": "0.5M", "seed": seed, "data": "all"},
        **{"learning_rate": 1e-3, "budget": round(tokens / 1e6), "tokens": tokens, "flops_a_token": flops},
        **{"flops_a_token_without_head": flops - 2e6, "active_parameters": 5e5, "parameters": 1e6, "embeddings": 4e5},
        **{"config": {}, "hardware": {}, "losses": entries},
        "counts": {"tokens": {"image": 0.75, "text": 0.25}, "shares": {"icons": {"image": 0.75, "text": 0.25}}},
        "curve": [{"tokens": tokens, "image_loss": losses["image"], "text_loss": losses["text"]}],
    }


def test_a_saving_is_denses_tokens_over_the_recipes_at_equal_flops():
    dense = [
        result("dense", 1e7, {"image": 4.0, "text": 2.0}),
        result("dense", 1e8, {"image": 3.0, "text": 1.0}),
    ]
    other = result("4t4i", 1e7, {"image": 3.5, "text": 2.0}, flops=7.5e6)
    better = result("4t4i", 1e7, {"image": 2.9, "text": 2.0}, flops=7.5e6)
    assert reporting.losses_of(other, "causal", "test") == pytest.approx({"image": 3.5, "text": 2.0, "overall": 3.125})
    image = reporting.saving(other, dense, "causal", "test", "image")
    assert image.tokens == pytest.approx(10**0.5 * 6 / 7.5) and image.without_head == pytest.approx(10**0.5 * 4 / 5.5)
    assert reporting.saving(other, dense, "training", "test", "text").tokens == pytest.approx(0.8)
    # what dense itself needed is its own measure
    assert reporting.saving(dense[0], dense, "causal", "test", "overall").tokens == pytest.approx(1.0)
    # dense has come to a loss of 3 in images and to no lower one, and begins with one of 4
    worse = result("4t4i", 1e7, {"image": 4.2, "text": 2.0}, flops=7.5e6)
    assert not image.is_beyond
    assert all(reporting.saving(row, dense, "causal", "test", "image").is_beyond for row in (better, worse))
    rows = [*dense, other, result("dense", 1e7, {"image": 1.0, "text": 1.0}, seed=2)]
    assert reporting.partners(other, rows) == dense
    # where dense has not come as far there is nothing to compare with
    assert reporting.partners({**other, "budget": 200}, rows) == []
    assert "| 0.5M | all | 10M | 4t4i | 1 |" in reporting.saving_table(rows, "test")


def test_each_seed_stands_by_itself_beside_dense_of_its_budget():
    def at(recipe, millions, loss, seed):
        return result(recipe, 1e6 * millions, {"image": loss, "text": loss - 1}, seed)

    rows = [at("dense", millions, loss, seed) for seed in (1, 2) for millions, loss in ((10, 3.0), (20, 2.8))]
    rows += [at("4t4i", 10, 2.9, 2), at("4t4i", 10, 2.7, 1), at("4t4i", 10, 2.7, 3)]
    first, second = (line for line in read_table(reporting.seed_table(rows, "test")) if line[3] == "4t4i")
    # half of the first doubling and a half beyond it, in the logarithm; the third seed has no dense
    assert first[4:] == ["1", "2.83", "2.83", "2.83", "-0.300", "-0.300", "-0.300", "28M (has 10M to 20M)"]
    assert second[4:] == ["2", "1.41", "1.41", "1.41", "-0.100", "-0.100", "-0.100", "14M"]


def test_a_lever_stands_beside_what_it_changes_and_beside_dense():
    def at(recipe, loss, data="shipped", seed=1):
        return {**result(recipe, 1e7, {"image": loss, "text": loss - 1}, seed), "data": data}

    rows = [at("dense", 3.0), at("4t4i", 2.9), at("4t4i-c2", 2.7), at("4t4i-shared", 2.8), at("4t4i-c2", 9.0, "all")]
    # of another seed there is no control
    rows += [at("4t4i-c2", 9.0, seed=2), at("1t1i", 3.0, "all"), at("untied-1t1i", 2.5, "all")]
    found = read_table(reporting.lever_table(rows, "test"))
    assert found == [
        ["0.5M", "shipped", "10M", "1", "4t4i-c2", "4t4i", *["-0.200"] * 3, *["-0.300"] * 3],
        ["0.5M", "all", "10M", "1", "untied-1t1i", "1t1i", *["-0.500"] * 3, *[""] * 3],
    ]


def test_a_twelfth_of_the_icons_stands_beside_all_of_them_and_beside_dense():
    def at(recipe, loss, data):
        return {**result(recipe, 1e7, {"image": loss, "text": loss}), "data": data}

    rows = [at("dense", 3.0, "shipped"), at("4t4i", 2.9, "shipped"), at("1t1i", 2.8, "all")]
    rows += [at("dense", 3.3, "shipped-twelfth"), at("4t4i", 3.1, "shipped-twelfth"), at("1t1i", 3.2, "twelfth")]
    assert read_table(reporting.repetition_table(rows, "test")) == [
        ["0.5M", "twelfth", "10M", "1", "1t1i", *["+0.400"] * 3, *[""] * 3],
        ["0.5M", "shipped-twelfth", "10M", "1", "4t4i", *["+0.200"] * 3, *["-0.200"] * 3],
        ["0.5M", "shipped-twelfth", "10M", "1", "dense", *["+0.300"] * 3, *["+0.000"] * 3],
    ]


def test_in_seconds_a_saving_counts_the_time_of_steps():
    def at(recipe, millions, loss):
        return result(recipe, 1e6 * millions, {"image": loss, "text": loss})

    rows = [at("dense", 10, 3.0), at("dense", 20, 2.8), at("4t4i", 10, 2.8), at("8x", 10, 2.8)]
    times = {"size": "0.5M", "seconds": {"dense": [1.0, 2.0, 4.0], "4t4i": [2.0, 2.5, 5.0]}}
    cells = {line[3]: line for line in read_table(reporting.saving_table(rows, "test", times))}
    # half the tokens, in steps of 1.25 times the time
    assert cells["4t4i"][-1] == "1.60" and cells["8x"][-1] == ""
    assert ["4t4i", "2500", "1.25"] in read_table(reporting.time_table(times))


def test_claims_stand_on_fresh_seeds_that_have_all_recipes():
    *others, best = CLAIMED
    rows = []
    for seed, gap in {FRESH_SEEDS[0]: 0.1, FRESH_SEEDS[1]: 0.2, 1: 5.0}.items():
        for recipe in CLAIMED:
            loss = 3.0 if recipe == best else 3.0 + gap
            rows.append(result(recipe, 1e7, {"image": loss, "text": loss}, seed=seed))
    rows.append({**rows[0], "seed": FRESH_SEEDS[2]})
    rows = [{**entry, "learning_rate": SIZES["0.5M"].learning_rate} for entry in rows]
    lines = read_table(reporting.fresh_table(rows, "test"))
    assert [line[2] for line in lines] == [*map(str, FRESH_SEEDS[:2]), "mean"]
    assert lines[0][3:] == ["-0.1000"] * 3 * len(others) and set(lines[2][3:]) == {"-0.1500 ± 0.0707"}


def test_what_a_token_costs_is_compared_with_dense_of_its_own_seed():
    def at(recipe, seed, flops):
        return result(recipe, 1e7, {"image": 3.0, "text": 3.0}, seed, flops)

    rows = [at("dense", 0, 5e6), at("dense", 1, 6e6), at("4t4i", 1, 6.4e6), at("8x", 2, 9e6)]
    ratios = {line[2]: line[-1] for line in read_table(reporting.cost_table(rows))}
    assert ratios == {"dense": "1.000", "4t4i": "1.100"}


def drawn_numbers(path):
    return re.search("numbers [0-9a-f]{16}", path.read_text()).group()


def test_figures_draw_runs_at_their_sizes_own_learning_rate(tmp_path):
    def at(recipe, millions, loss, rate=SIZES["0.5M"].learning_rate):
        tokens = 1e6 * millions
        held_out = {"eval_icons_image_loss": loss, "eval_icons_text_loss": loss}
        curve = [{"tokens": tokens, "learning_rate": rate, **held_out}]
        entry = result(recipe, tokens, {"image": loss, "text": loss})
        return {**entry, "run": f"{recipe}-{rate}", "learning_rate": rate, "curve": curve}

    rows = [at("dense", 10, 3.0), at("dense", 20, 2.8), at("4t4i", 10, 2.9), at("4t4i", 20, 2.6)]
    # of the other rate dense has one budget alone, and of seed 2 none
    others = [at("dense", 20, 2.9, 1e-3), at("4t4i", 20, 2.5, 1e-3), {**at("4t4i", 20, 2.4), "seed": 2}]
    for number, drawn in enumerate((rows, rows + others, rows[:3])):
        reporting.draw_gaps(drawn, tmp_path / f"gaps-{number}.svg", "all")
        reporting.draw_savings(drawn, "test", tmp_path / f"eta-{number}.svg")
    for name in ("gaps", "eta"):
        first, more, fewer = (drawn_numbers(tmp_path / f"{name}-{number}.svg") for number in range(3))
        assert first == more != fewer


def read_table(text):
    return [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in text.splitlines()[2:]]


@slow
def test_steps_are_timed_in_turns(study):
    runs = [RUN, replace(RUN, recipe="dense")]
    found = step_seconds(study, {run: train_branch(study, run, LARGE) for run in runs}, rounds=2, steps=1)
    assert found.keys() == {run.recipe for run in runs}
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in found.values())


@pytest.mark.parametrize("parameters, savings", [(5e6, [0.70, 0.94, 1.08, 1.26]), (1e6, [0.81, 1.18, 1.41, 1.73])])
def test_the_law_gives_what_its_coefficients_say(parameters, savings):
    found = [reporting.law_saving(4, parameters, tokens) for tokens in (1e7, 5e7, 1e8, 2e8)]
    assert found == pytest.approx(savings, abs=0.006)
    tokens = reporting.law_tokens(4, parameters, savings[1])
    assert reporting.law_saving(4, parameters, tokens) == pytest.approx(savings[1])
    assert f"| {parameters / 1e6:g} M |" in reporting.plan_table() or parameters == 5e6


def test_every_lever_is_trained_beside_what_it_changes():
    runs = {run.recipe: run for run in PLAN if run.data == "shipped" and run.seed == 1}
    assert runs.keys() == {*CONTROLS, *LEVERS} and CONTROLS[0] == "dense"
    assert len({(run.seed, run.budgets, run.size, run.rate) for run in runs.values()}) == 1


def test_the_law_counts_embeddings_among_active_parameters():
    rows = [result("dense", millions * 1e6, {"image": loss, "text": loss}) for millions, loss in ((10, 3), (20, 2))]
    lines = read_table(reporting.slope_table([*rows, result("4t4i", 1e7, {"image": 2.5, "text": 2.5})], "test"))
    assert [line[2:4] + line[5:] for line in lines] == [["4t4i", "20", f"{reporting.law_saving(4, 9e5, 1e7):.2f}"]]


def test_a_run_that_fails_leaves_the_others_their_turn(tmp_path, monkeypatch, capsys):
    taken = []

    def fail_first(study, run, *rest):
        taken.append(run.name)
        if len(taken) == 1:
            raise OSError("no space")

    monkeypatch.setattr(study_script, "work_on", fail_first)
    assert study_script.main(["--work", str(tmp_path), "--data", "shipped"]) == 1
    assert taken == [run.name for run in PLAN if run.data == "shipped"]
    assert f"{taken[0]}: not finished" in capsys.readouterr().err


@pytest.mark.parametrize("program, status", [("pass", 0), ("raise SystemExit(1)", 1), ("os.kill(os.getpid(), 9)", 1)])
def test_a_worker_that_dies_is_told_by_the_status(tmp_path, monkeypatch, program, status):
    script = tmp_path / "worker.py"
    script.write_text(f"import os\n{program}\n")
    monkeypatch.setattr(study_script, "__file__", str(script))
    assert study_script.main(["--work", str(tmp_path / "work"), "--processes", "2"]) == status


def test_the_plan_is_listed_by_data_and_budget(capsys):
    assert study_script.main(["--list", "--data", "shipped", "--up-to", "10", "--results", "none.parquet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "0.5M-dense-shipped-seed1: 10M" and "0.5M-dense-shipped-seed7: 10M" in lines
    assert len(lines) == sum(run.data == "shipped" and run.budgets[0] <= 10 for run in PLAN)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--processes", "0"], "--processes 0: it must be at least 1"),
        (["--time", "--measure"], "--time: not together with --measure"),
        (["--prepare", "--processes", "2"], "--processes 2: --prepare takes one run after the other"),
        (["--measure", "--minutes", "5"], "--minutes 5: --measure goes on to its end"),
        (["--only", "0.5M-dense-seed1", "--data", "shipped"], "of the plan nothing is left"),
        (["--up-to", "1"], "of the plan nothing is left"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(tmp_path, arguments, message, capsys):
    with pytest.raises(SystemExit):
        study_script.main(["--work", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err


def test_budgets_that_are_not_asked_for_are_not_measured_again(tmp_path, monkeypatch, capsys):
    path = tmp_path / "runs.parquet"
    words = ["--work", str(tmp_path), "--measure", "--only", "0.5M-dense-seed1", "--results", str(path)]
    assert study_script.main(words) == 1
    assert "has no row of these runs" in capsys.readouterr().err
    for budget in (10, 20):
        add_row(path, {"run": "0.5M-dense-seed1", "budget": budget})
    assert study_script.main([*words, "--up-to", "10"]) == 0
    assert "10 million" in (told := capsys.readouterr().out) and "20 million" not in told


def test_shipped_data_are_read_through_the_processor_that_the_repository_has(study, tmp_path, monkeypatch):
    """Made without a tokenizer of the study's own, trained and measured."""
    monkeypatch.setattr(training, "SHIPPED", study.processor)
    asked = replace(study, processor=tmp_path / "none", tokens=tmp_path / "tokens", runs=tmp_path / "runs")
    prepare(asked, tmp_path, {"shipped"})
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["tokens"]
    run = replace(RUN, recipe="dense", data="shipped")
    result = row(asked, run, SMALL, train_branch(asked, run, SMALL), ROOT)
    assert result["run"] == "0.5M-dense-shipped-seed1" and json.loads(result["losses"])


def test_the_page_shows_what_the_rows_say(tmp_path, capsys):
    shipped = ROOT / "docs" / "study.md"
    page = tmp_path / "study.md"
    page.write_text(re.sub("(?s)(<!-- study: start -->).*(<!-- study: end -->)", r"\1\2", shipped.read_text()))
    assert study_report.main(["--page", str(page), "--figures", str(tmp_path)]) == 0
    assert page.read_text() == shipped.read_text(), "run scripts/study_report.py"
    for name in ("study-eta.svg", "study-gaps.svg", "study-levers.svg"):
        assert drawn_numbers(tmp_path / name) == drawn_numbers(ROOT / "docs" / "images" / name)
        assert f"images/{name}" in shipped.read_text()


def test_names_of_the_plan_are_those_of_one_run_each():
    assert len({run.name for run in PLAN}) == len(PLAN)
    assert all(list(run.budgets) == sorted(run.budgets) for run in PLAN)
