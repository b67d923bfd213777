# SPDX-License-Identifier: Apache-2.0
"""The nearest-neighbour judge, its floor, and the loss curves' FLOPs."""

import json

import pytest
import torch

from emoji_recipe.judge import ImageJudge, accuracies
from modeling_moma import MomaConfig, training_flops
from modeling_moma.training.loss_curves import read_run, savings


def row(style, label, subgroup="fruit", group="food"):
    return {"style": style, "label": label, "subgroup": subgroup, "group": group}


ROWS = [row("noto", "apple"), row("fluent", "pear"), row("twemoji", "cat", "animal", "nature")]
# mean colours stand for features
IMAGES = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])[:, :, None, None].expand(-1, -1, 4, 4)


def mean_colour(images):
    return images.mean(dim=(2, 3))


@pytest.fixture
def judge():
    return ImageJudge.from_batches(mean_colour, IMAGES.split(2), ROWS)


def test_nearest_is_the_most_similar_image_of_another_family(judge):
    reddish = torch.tensor([0.9, 0.5, 0.1])[None, :, None, None].expand(4, -1, 4, 4)
    found = judge.nearest(reddish.split(3), ["emojione", "noto", "fluent 3d", "fluent"])
    assert [neighbour["label"] for neighbour in found] == ["apple", "pear", "apple", "apple"]
    # pear is nearest for all but noto's own family once the apple is gone
    greenish = torch.tensor([0.1, 0.9, 0.5])[None, :, None, None].expand(2, -1, 4, 4)
    assert [neighbour["label"] for neighbour in judge.nearest([greenish], ["noto", "fluent flat"])] == ["pear", "cat"]


def test_similarity_is_the_angle_and_not_the_length(judge):
    dark = torch.tensor([0.0, 0.01, 0.009])[None, :, None, None].expand(1, -1, 4, 4)
    assert judge.nearest([dark], ["noto"])[0]["label"] == "pear"


def test_counts_that_differ_and_a_missing_other_family_are_refused(judge):
    with pytest.raises(ValueError, match="styles"):
        judge.nearest([IMAGES], ["noto"])
    with pytest.raises(ValueError, match="families"):
        ImageJudge(mean_colour, torch.eye(3)[:1], ROWS[:1]).nearest([IMAGES[:1]], ["noto"])
    with pytest.raises(ValueError, match="features"):
        ImageJudge(mean_colour, torch.eye(3), ROWS[:2])


def test_accuracies_count_each_level_and_no_answer_as_wrong():
    wanted = [ROWS[0]] * 4
    assert accuracies([ROWS[0], ROWS[1], ROWS[2], None], wanted) == {"label": 0.25, "subgroup": 0.5, "group": 0.5}
    with pytest.raises(ValueError, match="wanted"):
        accuracies([], [])


CONFIG = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "modality_token_ranges": {"image": [[100, 160]]},
    "image_seq_length": 6,
    "begin_image_token_id": 3,
    "end_image_token_id": 4,
}
TOKENS = {"text": 6.0, "image": 6.0}


def write_run(folder, losses, finished=True):
    folder.mkdir(parents=True, exist_ok=True)
    MomaConfig(**CONFIG).save_pretrained(folder)
    history = [
        {"step": 10 * index, "eval_loss": loss, "eval_text_loss": loss, "eval_image_loss": loss}
        for index, loss in enumerate(losses)
    ]
    history.insert(1, {"step": 5, "loss": 1.0})
    steps = 10 * (len(losses) - 1)
    if finished:
        history.append({"step": steps, "train_runtime": 7.3})
    # a step has two batches of 8
    run = folder if finished else folder.parent
    (run / "run.json").write_text(json.dumps({"examples_a_step": 16}))
    state = {"global_step": steps, "train_batch_size": 8, "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def test_run_is_read_with_its_flops_and_without_the_evaluation_before_training(tmp_path):
    write_run(tmp_path / "run", [5.0, 4.0, 3.0])
    run = read_run(tmp_path / "run", TOKENS)
    flops = 20 * 16 * training_flops(MomaConfig(**CONFIG), {"text": 6, "image": 6}, 12)
    assert run["flops"] == pytest.approx(flops)
    assert (run["steps"], run["batch_size"], run["examples"], run["seconds"]) == (20, 16, 320, 7.3)
    assert [(point["step"], point["text"]) for point in run["curve"]] == [(10, 4.0), (20, 3.0)]
    assert run["curve"][0]["flops"] == pytest.approx(flops / 2)


def test_seconds_of_a_resumed_run_cover_the_steps_since_its_last_start(tmp_path):
    write_run(tmp_path, [5.0, 4.0, 3.0])
    path = tmp_path / "trainer_state.json"
    state = json.loads(path.read_text())
    assert read_run(tmp_path, TOKENS)["timed_steps"] is None
    # 12 steps of 16, as the trainer rounds it
    state["log_history"][-1]["train_samples_per_second"] = 26.301
    path.write_text(json.dumps(state))
    assert read_run(tmp_path, TOKENS)["timed_steps"] == 12


def test_unfinished_run_is_read_from_its_last_checkpoint(tmp_path):
    write_run(tmp_path / "run" / "checkpoint-10", [5.0, 4.0], finished=False)
    write_run(tmp_path / "run" / "checkpoint-20", [5.0, 4.0, 3.0], finished=False)
    run = read_run(tmp_path / "run", TOKENS)
    assert (run["steps"], run["batch_size"], run["seconds"]) == (20, 16, None)


def test_a_resumed_run_has_each_step_once(tmp_path):
    write_run(tmp_path, [5.0, 4.0, 3.0])
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    again = {"step": 10, "eval_loss": 4.5, "eval_text_loss": 4.5, "eval_image_loss": 4.5}
    state["log_history"].insert(3, again)
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    curve = read_run(tmp_path, TOKENS)["curve"]
    assert [(point["step"], point["text"]) for point in curve] == [(10, 4.5), (20, 3.0)]


def test_folder_without_a_run_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        read_run(tmp_path / "nowhere", TOKENS)


def test_run_that_needs_half_the_steps_saves_half_the_flops(tmp_path):
    write_run(tmp_path / "dense", [5.0, 4.0, 3.5, 3.25, 3.0])
    write_run(tmp_path / "sparse", [5.0, 3.5, 3.0, 2.5, 2.0])
    runs = [read_run(tmp_path / name, TOKENS) for name in ("dense", "sparse")]
    assert savings(*runs)["text"] == {"value": pytest.approx(2.0), "bound": "exact"}
    assert savings(*reversed(runs))["image"]["bound"] == "at_most"
