# SPDX-License-Identifier: Apache-2.0
"""The card: valid for the Hub, and every number from the report."""

import copy
import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import RepoCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from emoji_recipe.model_card import aim_table, card_metadata, render_card, report_table, write_card
from modeling_moma.evaluation.measures import EXPERT_CHOICE


ROOT = Path(__file__).resolve().parents[2]


def shares(label, subgroup, group, **more):
    return {"label": label, "subgroup": subgroup, "group": group, **more}


def losses(text, image, overall):
    return {"text": text, "image": image, "overall": overall, "tokens": 1000}


def model(parameters, active, experts):
    return {
        "parameters": parameters,
        "active_parameters": active,
        "capacity_factor": {"text": 1.0, "image": 1.0},
        "num_experts": {"text": experts, "image": experts},
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "training_routing": "expert_choice",
        "modality_loss_weights": {"text": 5.0},
    }


def run(seconds):
    curve = [{"step": 1, "flops": 1e12, "overall": 4.0, "text": 3.0, "image": 5.0}]
    return {"steps": 77, "batch_size": 48, "examples": 3696, "seconds": seconds, "flops": 7.7e13, "curve": curve}


SCORES = shares(0.1234, 0.4567, 0.6789, style=0.8765, known_label=0.7654)
REPORT = {
    "command": "python scripts/evaluate_emoji.py --model model_cards/moma-emoji",
    "split": "test",
    "pictures": 581,
    "dtype": "float32",
    "models": {"model": model(12_345_678, 6_543_210, 4), "dense": model(6_543_211, 6_543_211, 1)},
    "image_seq_length": 64,
    "resolution": 64,
    "tokenizer": {"psnr": 22.34, "codes_used": 987, "codebook_size": 1024, "perplexity": 765.4},
    "loss": {
        "causal": losses(1.111, 4.111, 3.555),
        EXPERT_CHOICE: losses(1.011, 4.011, 3.444),
        "dense": losses(1.222, 4.222, 3.666),
    },
    "captions": {
        "model": SCORES,
        "dense": SCORES,
        "nearest_neighbour": shares(0.28, 0.66, 0.82),
        "majority": shares(0.001, 0.08, 0.17),
        "by_style": {"noto": {"pictures": 100, "model": SCORES, "nearest_neighbour": shares(0.33, 0.77, 0.89)}},
        "samples": [{"style": "noto", "label": "red apple", "caption": "noto: pe|ar\n"}],
    },
    "drawings": {
        "settings": {"temperature": 0.9, "top_k": 50, "top_p": 1.0, "guidance_scale": 2.5, "seed": 3},
        "real": shares(0.28, 0.66, 0.82),
        "reconstructed": shares(0.2, 0.5, 0.7),
        "drawn": shares(0.05, 0.24, 0.4),
        "shuffled": shares(0.0, 0.02, 0.1),
    },
    "training": {"tokens_of_example": {"text": 14.2, "image": 64.0}, "model": run(4321.0), "dense": run(None)},
    "eta": {
        "text": {"value": 1.234, "bound": "exact"},
        "image": {"value": 0.95, "bound": "at_most"},
        "overall": {"value": 1.1, "bound": "exact"},
    },
}


def test_metadata_is_valid_for_the_hub_and_holds_measured_numbers():
    card = RepoCard(render_card(REPORT))
    metadata = ModelCardData(**card_metadata(REPORT))
    assert card.data.to_dict()["model-index"] == card_metadata(REPORT)["model-index"]
    assert (metadata.library_name, metadata.pipeline_tag, metadata.license) == (
        "transformers",
        "any-to-any",
        "apache-2.0",
    )
    _, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    values = {(result.task_type, result.metric_name): result.metric_value for result in results}
    assert values["image-to-text", "label, exact match"] == 0.1234
    assert values["text-to-image", "subgroup accuracy"] == 0.24
    assert values["any-to-any", "text tokens, nats"] == 1.111


def test_card_prints_the_report_and_its_command():
    card = render_card(REPORT)
    for text in (
        REPORT["command"],
        "12.3M parameters, 6.5M",
        "4 text, 4 image experts in each of 6 layers",
        "| MoMa, causal (threshold) | 1.111 | 4.111 | 3.555 |",
        f"| MoMa, {EXPERT_CHOICE} | 1.011 | 4.011 | 3.444 |",
        "| dense, causal | 1.222 | 4.222 | 3.666 |",
        "text 1.23x, image < 0.95x, overall 1.10x",
        "| MoMa | 12.3 % | 45.7 % | 67.9 % |",
        "| noto | 100 | 12.3 % | 45.7 % | 33.0 % | 77.0 % |",
        "| drawn from captions | 5.0 % | 24.0 % | 40.0 % |",
        "temperature=0.9, top_k=50, top_p=1.0, guidance_scale=2.5",
        "22.3 dB",
        "text tokens weigh 5 times as much",
        "77 | 3,696 | 7.70e+13 | 4,321 |",
        "| noto: red apple | noto: pe\\|ar |",
    ):
        assert text in card, text
    assert "{" not in card.split("---", 2)[2]


def test_seconds_of_a_resumed_run_name_the_steps_that_they_cover():
    report = copy.deepcopy(REPORT)
    report["training"]["model"]["timed_steps"] = 33
    assert "7.70e+13 | 4,321 (last 33 steps) |" in render_card(report)
    report["training"]["model"]["timed_steps"] = 77
    assert "7.70e+13 | 4,321 |" in render_card(report)


def test_the_card_of_the_released_model_is_what_would_be_written_now(tmp_path):
    released = ROOT / "model_cards" / "moma-emoji"
    for name in ("evaluation.json", "depth_comparison.json", "depth_comparison.md"):
        shutil.copy(released / name, tmp_path)
    write_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == (released / "README.md").read_text()


def test_aims_say_what_is_not_reached():
    rows = dict(line.strip("| ").rsplit(" | ", 1) for line in aim_table(REPORT).splitlines()[2:])
    assert list(rows.values()) == ["yes", "yes", "yes", "yes", "no"]
    worse = copy.deepcopy(REPORT)
    worse["loss"]["causal"]["image"] = 4.3
    worse["captions"]["model"]["label"] = 0.09
    worse["drawings"]["drawn"]["subgroup"] = 0.25
    rows = dict(line.strip("| ").rsplit(" | ", 1) for line in aim_table(worse).splitlines()[2:])
    assert list(rows.values()) == ["yes", "no", "no", "yes", "yes"]


def test_report_without_a_baseline_is_printed_but_makes_no_card():
    report = copy.deepcopy(REPORT)
    for part in ("models", "loss", "captions"):
        del report[part]["dense"]
    del report["training"], report["eta"]
    assert "MoMa, causal" in report_table(report)
    with pytest.raises(ValueError, match="--baseline"):
        render_card(report)


DEPTH = {
    "split": "test",
    "examples": 1162,
    "runs": {"without": [{"steps": 90}], "with_depth": [{"steps": 80}]},
    "summary": {"seeds": 2},
}
FINDINGS = "- Causal text loss: better without depth.\n- Causal image loss: better without depth."


def test_card_tells_what_depth_would_lose():
    card = render_card(REPORT, DEPTH, FINDINGS)
    for text in ("90 steps without depth layers", "80 with more layers", "2 seeds each", "1162 examples", FINDINGS):
        assert text in card, text
    assert "Mixture of depths" not in render_card(REPORT)


def test_card_is_written_from_the_measurements_in_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="evaluation.json"):
        write_card(tmp_path)
    (tmp_path / "evaluation.json").write_text(json.dumps(REPORT))
    write_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == render_card(REPORT)
    (tmp_path / "depth_comparison.json").write_text(json.dumps(DEPTH))
    (tmp_path / "depth_comparison.md").write_text(f"{FINDINGS}\n\n| table |\n")
    write_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == render_card(REPORT, DEPTH, FINDINGS)
