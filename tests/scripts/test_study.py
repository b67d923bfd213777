# SPDX-License-Identifier: Apache-2.0
"""The study: recipes of equal cost, one stream of data, runs that resume, rows that are kept, a page that follows."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import study
import study_report
from helpers.mixture import WEIGHTS, write_mixture
from helpers.processes import start_process
from helpers.slow import slow
from helpers.tiny import tiny_processor
from modeling_moma import MomaConfig
from modeling_moma.data.documents import TokenFolder
from modeling_moma.errors_moma import InputError
from modeling_moma.planning.costs import flops_per_token
from modeling_moma.training.pretraining import training_stream
from modeling_moma.training.recipe import read_recipe
from modeling_moma.training.stage_trainer import StageTrainer, StopAt
from study import RECIPES, Counts, Run, count_stream, flops_a_token


ROOT = Path(__file__).resolve().parents[2]
SMALL, LARGE = 5, 8
DENSE, UPCYCLED = Run("dense", 1, (SMALL, LARGE)), Run("4t4i-shared-upcycled", 1, (SMALL, LARGE))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder of work with the tokens of a small mixture; a million tokens have three steps here."""
    folder = tmp_path_factory.mktemp("study")
    tiny_processor().save_pretrained(folder / "processor")
    recipe = write_mixture(folder / "data")
    content = yaml.safe_load(recipe.read_text())
    del content["samples"]
    for source in content["sources"].values():
        source["splits"] = {"train": "train[10:]", "validation": "train[:2]", "test": "train[5:7]"}
        del source["held_out"]
    shipped = yaml.safe_load((ROOT / "recipes" / "study.yaml").read_text())
    content |= {"model": {**shipped["model"], "max_position_embeddings": 96}, "trainer": {"learning_rate": 4e-3}}
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        numbers = {"ROWS": 2, "ROW_TOKENS": 96, "LONGEST": 12, "WARMUP_STEPS": 2, "CURVE_STEPS": 3, "SEED_MILLIONS": 2}
        for name, value in {"RECIPE": recipe, "PROCESSOR": folder / "processor", **numbers}.items():
            patch.setattr(study, name, value)
        study.prepare(folder / "work")
        yield folder / "work"


def config_of(recipe):
    base = yaml.safe_load((ROOT / "recipes" / "study.yaml").read_text())["model"]
    layout = {**tiny_processor().token_layout(), "vocab_size": 3000}
    return MomaConfig(**base | RECIPES[recipe] | layout)


COUNTS = Counts({"text": 0.3, "image": 0.7}, {"text": 80.0, "image": 80.0}, {})


def cost(config):
    return flops_a_token(config, COUNTS) - 6 * config.hidden_size * config.vocab_size


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - {"dense-wide"}))
def test_every_recipe_costs_what_dense_costs_but_for_its_routers(recipe):
    config, dense = config_of(recipe), cost(config_of("dense"))
    routers = 3 * 2 * config.hidden_size * 16 * config.num_hidden_layers
    assert -0.002 * dense <= cost(config) - dense <= routers + 0.002 * dense


def test_the_wide_dense_model_has_as_many_parameters_as_all_experts_and_costs_three_times_as_much():
    dense, wide, experts = map(config_of, ("dense", "dense-wide", "4t4i-shared-upcycled"))
    assert wide.num_parameters() == pytest.approx(experts.num_parameters(), rel=0.01)
    assert 3.0 < cost(wide) / cost(dense) < 3.2


def test_the_recipes_own_training_is_the_dense_run_of_twenty_million_tokens():
    shipped = read_recipe(ROOT / "recipes" / "study.yaml")
    trainer = shipped.trainer
    assert trainer["learning_rate"] == study_report.LEARNING_RATES["0.5M"]
    assert (trainer["max_steps"], trainer["warmup_steps"]) == (study.steps_of(20), study.WARMUP_STEPS)
    assert trainer["per_device_train_batch_size"] == study.ROWS
    assert shipped.data.sequence_length == study.ROW_TOKENS


def test_flops_are_those_of_every_document_alone(work):
    recipe = read_recipe(study.RECIPE)
    stream = training_stream(recipe.data, TokenFolder(work / "tokens", tiny_processor()), recipe.sources, 40, 1)
    fields = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = MomaConfig(**fields, num_experts=8, **tiny_processor().token_layout())
    ((first, last),) = config.modality_token_ranges["image"]
    total, number = 0.0, 0
    for index in range(len(stream)):
        example = stream[index]
        starts = [*(example["position_ids"] == 0).nonzero().flatten().tolist(), len(example["position_ids"])]
        for start, end in zip(starts, starts[1:]):
            if example["source_ids"][start] >= 0:
                for token in example["input_ids"][start:end].tolist():
                    modality = "image" if first <= token < last else "text"
                    total += flops_per_token(config, modality, end - start, training=True)
                    number += 1
    counts = count_stream(stream, list(WEIGHTS), config)
    assert flops_a_token(config, counts) == pytest.approx(total / number, rel=1e-9)
    by_source = {name: sum(shares.values()) for name, shares in counts.shares.items()}
    assert by_source == pytest.approx(WEIGHTS, abs=0.08)


def train_with_kills(run, budget, work, monkeypatch):
    """Train a branch whose process dies in every fourth step, and return its last checkpoint and the deaths."""
    ends = StopAt.on_step_end
    # on over all starts: the first steps of trunk and branch are hit, and some in between
    steps, kills = iter(range(1, 200)), 0

    def killed(self, args, state, control, **kwargs):
        if next(steps) % 4 == 0:
            raise KeyboardInterrupt
        return ends(self, args, state, control, **kwargs)

    with monkeypatch.context() as context:
        context.setattr(StopAt, "on_step_end", killed)
        while True:
            try:
                return study.train_branch(run, budget, work), kills
            except KeyboardInterrupt:
                kills += 1


def other_work(work, folder):
    folder.mkdir()
    (folder / "tokens").symlink_to(work / "tokens")
    return folder


def test_a_killed_run_ends_as_one_that_was_not_and_all_read_the_same_rows(work, tmp_path, monkeypatch):
    """Of an upcycled model: its seed's tokens are its first, and its schedule begins anew."""
    seen = []
    step = StageTrainer.training_step

    def record(self, model, inputs, *rest):
        seen.append(inputs["input_ids"])
        return step(self, model, inputs, *rest)

    with monkeypatch.context() as context:
        context.setattr(StageTrainer, "training_step", record)
        checkpoint = study.train_branch(UPCYCLED, SMALL, work)
        study.train_branch(DENSE, SMALL, work)
    steps, leaves = study.steps_of(SMALL), 12
    assert len(seen) == 2 * steps and torch.equal(torch.stack(seen[:steps]), torch.stack(seen[steps:]))
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    rates = {entry["step"]: entry["learning_rate"] for entry in log if "learning_rate" in entry}
    assert rates[leaves] == UPCYCLED.learning_rate
    # the last of the steps of its decay
    assert rates[steps] == pytest.approx(UPCYCLED.learning_rate / (steps - leaves))
    config = MomaConfig.from_pretrained(checkpoint)
    assert config.num_experts == {"text": 4, "image": 4} and config.gumbel_noise_steps == study.steps_of(2)
    resumed, kills = train_with_kills(UPCYCLED, SMALL, other_work(work, tmp_path / "killed"), monkeypatch)
    assert kills >= 3 and resumed.name == checkpoint.name
    found, wanted = (load_file(folder / "model.safetensors") for folder in (resumed, checkpoint))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_budgets_of_the_plan_have_their_rows_once(work, tmp_path, monkeypatch, capsys):
    results = tmp_path / "results" / "runs.parquet"
    monkeypatch.setattr(study, "PLAN", (DENSE, Run("1t1i", 1, (SMALL,))))
    train, failing = study.train_branch, True

    def fail_first(run, *rest):
        if failing and run == DENSE:
            raise OSError("no space")
        return train(run, *rest)

    monkeypatch.setattr(study, "train_branch", fail_first)
    arguments = ["--work", str(work), "--results", str(results)]
    assert study.main(arguments) == 1
    assert f"{DENSE.name}: not finished" in capsys.readouterr().err
    failing = False
    assert study.main(arguments) == study.main(arguments) == 0
    rows = study.read_rows(results)
    assert [(row["recipe"], row["budget"]) for row in rows] == [("1t1i", SMALL), ("dense", SMALL), ("dense", LARGE)]
    assert all(row["seconds"] > 0 and row["tokens"] == study.steps_of(row["budget"]) * 2 * 96 for row in rows)
    (*_, opened) = study_report.read_opened(results)
    assert {entry["source"] for entry in opened["losses"]} == set(WEIGHTS)
    losses, shares = study_report.losses_of(opened), opened["counts"]["tokens"]
    assert losses["overall"] == pytest.approx(sum(shares[name] * losses[name] for name in shares), rel=0.02)
    assert json.loads(opened["curve"])[-1]["tokens"] == opened["tokens"]
    assert study.main([*arguments, "--list"]) == 0
    assert f"{DENSE.name}: {SMALL}M done, {LARGE}M done" in capsys.readouterr().out


@slow
def test_steps_are_timed_in_turns(work, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "ROUNDS", 2)
    assert study.time_steps(work, tmp_path / "times.json") == 0
    seconds = json.loads((tmp_path / "times.json").read_text())["seconds"]
    assert seconds.keys() == RECIPES.keys() and all(len(found) == 2 and min(found) > 0 for found in seconds.values())


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
    assert study.revision(tmp_path) == commit
    code.write_text("b")
    assert study.revision(tmp_path) == f"{commit}-dirty"


def test_a_pause_does_not_count_as_training():
    points = [{"tokens": 1e6 * number, "tokens_per_second": rate} for number, rate in ((1, 1e4), (2, 10.0), (3, 1e4))]
    assert study.training_seconds([*points, {"tokens": 3e6}]) == pytest.approx(300)


def add_all(path, numbers):
    for number in numbers:
        study.add_row(path, {"run": f"run {number}", "budget": 1, "value": number})


@slow
def test_rows_of_many_processes_are_all_kept(tmp_path):
    path = tmp_path / "runs.parquet"
    processes = [start_process(add_all, path, range(start, 12, 3)) for start in range(3)]
    for process in processes:
        process.join()
    assert sorted(entry["value"] for entry in study.read_rows(path)) == list(range(12))


def test_tokens_needed_lie_on_the_curve_between_and_beyond_its_points():
    # a loss that falls by 1 with every tenfold
    points = [(1e6, 5.0), (1e7, 4.0), (1e8, 3.0)]
    for loss, tokens in ((5.0, 1e6), (4.5, 10**6.5), (3.0, 1e8), (2.5, 10**8.5), (5.5, 10**5.5)):
        assert study_report.tokens_needed(points, loss) == pytest.approx(tokens)
    for curve in (points[:1], [(1e6, 3.0), (1e7, 3.0)]):
        with pytest.raises(InputError, match="two points are needed, and a loss that falls"):
            study_report.tokens_needed(curve, 2.0)


def result(recipe, millions, image, text, seed=1, flops=6e6, data="all"):
    """A row of the results, as far as the report reads it."""
    entries = [
        {"split": "test", "routing": "causal", "source": "icons", "modality": modality, "loss": loss}
        for modality, loss in (("image", image), ("text", text))
    ]
    shares = {"image": 0.75, "text": 0.25}
    return {
        **{"run": f"{recipe}-{seed}", "recipe": recipe, "size": "0.5M", "seed": seed, "data": data},
        **{"learning_rate": 4e-3, "budget": millions, "tokens": millions * 1e6, "flops_a_token": flops},
        **{"flops_a_token_without_head": flops - 2e6, "active_parameters": 5e5, "parameters": 1e6},
        **{"losses": entries, "counts": {"tokens": shares, "shares": {"icons": shares}}},
    }


def test_a_saving_is_denses_tokens_over_the_recipes_at_equal_flops():
    dense = [result("dense", 10, 4.0, 2.0), result("dense", 100, 3.0, 1.0)]
    other = result("4t4i", 10, 3.5, 2.0, flops=7.5e6)
    assert study_report.losses_of(other) == pytest.approx({"image": 3.5, "text": 2.0, "overall": 3.125})
    image = study_report.saving(other, dense, "image")
    assert (image.flops, image.tokens) == pytest.approx((10**0.5 * 6 / 7.5, 10**0.5)) and not image.is_beyond
    # what dense itself needed is its own measure
    assert study_report.saving(dense[0], dense, "overall").flops == pytest.approx(1.0)
    # dense has come to a loss of 3 in images and to no lower one, and begins with one of 4
    for loss in (2.9, 4.2):
        assert study_report.saving(result("4t4i", 10, loss, 2.0), dense, "image").is_beyond
    rows = [*dense, other, result("dense", 10, 1.0, 1.0, seed=2)]
    assert study_report.partners(other, rows) == dense
    # where dense has not come as far there is nothing to compare with
    assert study_report.partners({**other, "budget": 200}, rows) == []


def test_the_page_shows_what_the_rows_say(tmp_path):
    shipped = ROOT / "docs" / "study.md"
    page, figure = tmp_path / "study.md", tmp_path / "study.svg"
    page.write_text(re.sub("(?s)(<!-- study: start -->).*(<!-- study: end -->)", r"\1\2", shipped.read_text()))
    assert study_report.main(["--page", str(page), "--figure", str(figure)]) == 0
    assert page.read_text() == shipped.read_text(), "run scripts/study_report.py"
    numbers = [
        re.search("numbers [0-9a-f]{16}", path.read_text()) for path in (figure, ROOT / "docs/images/study.svg")
    ]
    assert numbers[0].group() == numbers[1].group() and "images/study.svg" in shipped.read_text()
