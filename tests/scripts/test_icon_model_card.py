# SPDX-License-Identifier: Apache-2.0
"""The card of the model of icons: valid for the Hub, every number from the report, and what is not reached."""

import copy
import json
import sys

import pytest
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import RepoCard
from huggingface_hub.repocard_data import model_index_to_eval_results

import write_card as write_card_script
from icons_recipe.model_card import (
    MEMORY_COMMAND,
    RECIPES,
    STAGES,
    aims,
    card_metadata,
    coverage_table,
    render_card,
    report_tables,
    search_table,
    write_card,
)
from icons_recipe.samples import HELD_OUT
from modeling_moma.hub.card import measured_numbers
from modeling_moma.training.recipe import read_recipe


def shares(top1, top5):
    more = {"top1_or_alias": top1 + 0.01, "top5_or_alias": top5 + 0.01, "word_in_common": 0.512}
    return {"top1": top1, "top5": top5, **more}


def taken(nats):
    return {"alone": 99.0, "with_other": 99.0 - nats, "taken": nats, "standard_error": 0.21}


def information(image, of_caption):
    return {"pairs": 300, "image": taken(image), "caption": taken(of_caption), "ratio": image / of_caption}


NAMED = {
    "images": 300,
    "model": shares(0.2345, 0.4567),
    "model_of_views": shares(0.2468, 0.4812),
    "with_memory": shares(0.2612, 0.5123),
    "with_memory_of_views": shares(0.2714, 0.5326),
    "nearest_neighbour": shares(0.1234, 0.3456),
    "ranked": {
        "images": 40,
        "names": 1540,
        "recall@1": 0.321,
        "recall@5": 0.654,
        "mean_reciprocal_rank": 0.41,
        "median_rank": 2.0,
        "chance": {"recall@1": 0.001, "recall@5": 0.003},
    },
    "samples": [{"icon": "tabler:key", "name": "key", "names": ["key", "lo|ck\n"], "neighbour": ["pin"]}],
}
TAGGED = {
    "images": 210,
    "tags": 7.25,
    "model": {"recall": 0.2111, "precision": 0.1999},
    "model_of_views": {"recall": 0.2222, "precision": 0.2002},
    "with_memory": {"recall": 0.3333, "precision": 0.3003},
    "with_memory_of_views": {"recall": 0.3444, "precision": 0.3004},
    "nearest_neighbour": {"recall": 0.3111, "precision": 0.2999},
    "samples": [{"icon": "tabler:key", "keywords": ["lock"], "tags": ["lock", "door"]}],
}
SEARCHED = {
    "images": 300,
    "queries": 100,
    "wanted": 1.4,
    "model": 0.3579,
    "with_memory": 0.7632,
    "with_file_names": 0.8421,
    "bm25_names": 0.0123,
    "bm25_names_and_tags": 0.7531,
    "bm25_neighbours": 0.2468,
    "chance": 0.0333,
}
SEARCHES = {"unnamed": SEARCHED, "any": {**SEARCHED, "bm25_names": 0.5}}
REPORT = {
    "command": "python scripts/evaluate_icons.py --model model_cards/moma-icons --write-card",
    "dtype": "float32",
    "model": {
        "parameters": 12_345_678,
        "active_parameters": 6_543_210,
        "capacity_factor": {"text": 1.0, "image": 1.0},
        "num_experts": {"text": 4, "image": 4},
        "num_hidden_layers": 6,
        "training_routing": "expert_choice",
    },
    "image_seq_length": 64,
    "resolution": 64,
    "train_icons": 270_452,
    "views": 4,
    "memory": {"images": 49_321, "names": 10_028, "tagged_names": 13_816, "bytes": 1_987_654, "share": 0.5},
    "neighbour_images": 270_111,
    "tokenizer": {"psnr": 22.34, "codes_used": 987, "codebook_size": 2048, "perplexity": 765.4},
    "names": dict.fromkeys(HELD_OUT, NAMED),
    "emoji": {
        "images": 581,
        "model": {"top1": 0.2525, "top5": 0.4848, "word_in_common": 0.61},
        "with_memory": {"top1": 0.2626, "top5": 0.4949, "word_in_common": 0.62},
        "moma-emoji": 0.1919,
        "nearest_neighbour": 0.3838,
    },
    "fit": {"train": {"images": 299, **shares(0.2987, 0.5012)}, "test": {"images": 123, **shares(0.17, 0.29)}},
    "tags": {**dict.fromkeys(HELD_OUT, TAGGED), "test_pairs": None},
    "search": {
        **dict.fromkeys(HELD_OUT, SEARCHES),
        "test_words": None,
    },
    "drawings": {
        "captions": 160,
        "names": 500,
        "train_images": 39_876,
        "settings": {"do_sample": True, "temperature": 0.9, "top_k": 7, "guidance_scale": 2.5, "seeds": [0, 1]},
        "originals": {"top1": 0.6, "top5": 0.8},
        "reconstructions": {"top1": 0.4, "top5": 0.7},
        "drawn": {"top1": 0.2987, "top5": 0.55},
        "likeliest": {"top1": 0.3876, "top5": 0.66},
        "shuffled": {"top1": 0.002, "top5": 0.01},
        "by_seed": [0.2787, 0.3187],
        "ratios": {"reconstructions": 0.74675, "originals": 0.49783},
    },
    "information": {
        "plain": {"model": information(4.51, 6.0), "control": information(3.0, 5.0)},
        "coloured": {"model": information(7.77, 8.0), "control": information(3.0, 5.0)},
    },
    "coverage": {"text": [0.71, 0.81], "image": [0.69, 0.91]},
    "seconds": {"names": 240.0, "drawings": 61.0},
}


def rendered(report=REPORT):
    return render_card(report, {name: read_recipe(RECIPES / name) for name in STAGES})


def test_metadata_is_valid_for_the_hub_and_holds_measured_numbers():
    card = RepoCard(rendered())
    metadata = ModelCardData(**card_metadata(REPORT))
    assert (metadata.library_name, metadata.pipeline_tag, metadata.license) == (
        "transformers",
        "any-to-any",
        "apache-2.0",
    )
    _, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    values = {result.metric_name: result.metric_value for result in results}
    assert values == {
        "name, top-1": 0.2612,
        "name, top-5": 0.5123,
        "name, top-5, 4 views": 0.5326,
        "makers' tags among the first 8": 0.3333,
        "recall@10 of tags not in the names": 0.8421,
        "top-1 accuracy": 0.2987,
        "top-5 accuracy": 0.55,
    }


def test_values_of_other_models_are_none_of_the_models_own():
    numbers = measured_numbers(REPORT)
    assert {0.2345, 0.3579, 0.2987, 0.2525, 0.5326, 0.7632, 0.8421} <= set(numbers)
    assert not {0.1234, 0.0123, 0.7531, 0.6, 0.4, 0.0333, 0.1919, 3.0} & set(numbers)


def test_card_prints_the_report_its_command_and_the_recipe():
    card, stages = rendered(), [read_recipe(RECIPES / name) for name in STAGES]
    for text in (
        REPORT["command"],
        "12.3M parameters, 6.5M",
        "4 text, 4 image experts in each of 6 layers",
        "| `test`, MoMa | 300 | 23.4 % | 45.7 % |",
        "| `test`, MoMa, 4 views | 300 | 24.7 % | 48.1 % |",
        "| `test`, MoMa and memory | 300 | 26.1 % | 51.2 % |",
        "| `test`, MoMa and memory, 4 views | 300 | 27.1 % | 53.3 % |",
        "A memory of 49,321 training icons of 10,028 names, in `memory/images.safetensors` (2.0 MB)",
        MEMORY_COMMAND,
        "| this model and its memory | 26.3 % | 49.5 % |",
        "| `train` | 299 | 29.9 % | 50.1 % | 51.2 % |",
        "With `--views 4`, or `views=4`",
        "| `test`, ImageNet neighbour | 300 | 12.3 % | 34.6 % |",
        "| `test_words` | 40 | 1,540 | 32.1 % | 65.4 % | 2 | 0.3 % |",
        "| this model | 25.2 % | 48.5 % |",
        "| `moma-emoji`, greedy | 19.2 % | - |",
        "| `test`, MoMa | 210 | 7.2 | 21.1 % | 20.0 % |",
        "| `test`, MoMa and memory, 4 views | 210 | 7.2 | 34.4 % | 30.0 % |",
        "| `test`, ImageNet neighbour | 210 | 7.2 | 31.1 % | 30.0 % |",
        "| `test`, tags not in the names | 300 | 100 | 35.8 % | 76.3 % | 84.2 % | 1.2 % | 75.3 % | 24.7 % | 3.3 % |",
        "| `test`, any tags | 300 | 100 | 35.8 % | 76.3 % | 84.2 % | 50.0 % | 75.3 % |",
        "| drawn, in its maker's style, the likeliest of all seeds | 38.8 % | 66.0 % |",
        "finds\n29.9 % right, in the mean of seeds, ± 2.8 points between them",
        "| `name (style, colour)` | 300 | 7.77 ± 0.21 | 8.00 ± 0.21 |",
        "| image | 69.0 % | 91.0 % |",
        "| `tabler:key` | key | key, lo\\|ck | lock, door | pin |",
        "temperature=0.9, top_k=7, guidance_scale=2.5",
        "270,452 icons to train on",
        "39,876\ntraining icons",
        "22.3 dB",
        *(f"`recipes/{name}`" for name in STAGES),
        "`recipes/moma-icons-typical.yaml`, from those weights:",
        "- projections and each expert by Muon, the rest by AdamW.",
        *(f"{recipe.trainer['max_steps']:,} steps" for recipe in stages),
        f"captions `{stages[0].sources[0].kind.text}`",
    ):
        assert text in card, text
    template = card.split("---", 2)[2].replace("{name}", "").replace("{label}", "")
    for column in ("style", "colour", "keywords", "aliases"):
        template = template.replace(f"{{{column}}}", "")
    assert "{" not in template.replace("num_experts={", "")


def test_card_says_how_tokens_are_routed():
    chosen = copy.deepcopy(REPORT)
    chosen["model"]["training_routing"] = "token_choice"
    texts = [rendered(report) for report in (REPORT, chosen)]
    assert ["capacity factor 1; at inference each expert takes" in text for text in texts] == [True, False]
    assert ["best expert of its group (`token_choice`)" in text for text in texts] == [False, True]


def test_aims_say_what_is_not_reached_and_whose_captions_are_compared():
    found = {aim: (measured, reached) for aim, measured, reached in aims(REPORT)}
    assert [reached for _, reached in found.values()] == [True, True, False, True, True, True, True, False]
    assert ("53.3 %", True) in found.values() and ("84.2 % against 75.3 %", True) in found.values()
    assert any("the control's captions" in aim for aim in found) and ("4.51 of 5.00 nats", True) in found.values()
    assert ("69.0 % at least", False) in found.values()
    alone = copy.deepcopy(REPORT)
    del alone["information"]["plain"]["control"]
    (aim, measured, reached), *_ = aims(alone)
    assert "no other was measured as a control" in aim and measured == "4.51 of 6.00 nats" and not reached


def test_drawings_asked_for_as_typical_count_and_what_they_owe_is_said():
    report = copy.deepcopy(REPORT)
    drawings = report["drawings"]
    drawings["typical"] = drawings | {
        "drawn": {"top1": 0.4321, "top5": 0.6543},
        "likeliest": {"top1": 0.5432, "top5": 0.7654},
        "shuffled": {"top1": 0.003, "top5": 0.02},
        "by_seed": [0.4221, 0.4421],
        "settings": drawings["settings"] | {"guidance_scale": 1.5},
        "known": {
            "icons": 12_345,
            "reconstructions": {"of_their_name": 0.0123, "any": 0.0456},
            "drawn": {"of_their_name": 0.2345, "any": 0.3456},
        },
    }
    found = {aim: (measured, reached) for aim, measured, reached in aims(report)}
    assert found["drawings (`typical`), judged: at least 0.5 of the originals'"] == ("43.2 % of 60.0 %", True)
    card = rendered(report)
    for text in (
        "| drawn, typical, one | 43.2 % | 65.4 % |",
        "| drawn, in its maker's style, one | 29.9 % | 55.0 % |",
        "finds\n43.2 % right, in the mean of seeds, ± 1.4 points between them",
        "in a maker's style with colour and temperature=0.9, top_k=7, guidance_scale=2.5.",
        "do_sample=True, temperature=0.9, top_k=7, guidance_scale=1.5)",
        "23.4 % of them are nearly one of the 12,345 icons of",
        "of the held-out icons' reconstructions, in black, 1.2 % and 4.6 % are",
    ):
        assert text in card, text
    values = [
        metric["value"]
        for result in card_metadata(report)["model-index"][0]["results"]
        for metric in result["metrics"]
    ]
    assert {0.4321, 0.6543} <= set(values) and 0.2987 not in values
    assert 0.4321 in measured_numbers(report) and 0.2345 not in measured_numbers(drawings["typical"])


def test_a_model_without_a_memory_is_measured_alone():
    report = copy.deepcopy(REPORT)
    report["memory"] = None
    for kind in ("names", "tags", "search"):
        for found in report[kind].values():
            for entry in found.values() if kind == "search" and found else [found]:
                for key in [key for key in entry or () if key.startswith("with_memory")]:
                    del entry[key]
    report["search"]["test"]["unnamed"]["with_file_names"] = 0.7421
    del report["emoji"]["with_memory"]
    card = rendered(report)
    assert "and memory" not in card and "A memory of" not in card
    assert "| `test`, tags not in the names | 300 | 100 | 35.8 % | 74.2 % | 1.2 % | 75.3 % | 24.7 % | 3.3 % |" in card
    assert [reached for *_, reached in aims(report)] == [True, True, False, True, True, True, False, False]


def test_what_could_not_be_measured_is_left_out():
    report = copy.deepcopy(REPORT)
    report["coverage"], report["search"]["test"], report["tags"]["test"] = {}, None, None
    report["emoji"] = None
    assert "several experts" in coverage_table(report) and "`test`," not in search_table(report)
    assert len(aims(report)) == 5 and "recall@10" not in str(card_metadata(report))
    assert "| key, lo\\|ck | - |" in rendered(report) and report_tables(report)
    del report["names"]["test"]
    with pytest.raises(ValueError, match="no names of 'test'"):
        rendered(report)


def test_card_is_written_from_the_measurements_in_the_folder(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="evaluation.json"):
        write_card(tmp_path)
    (tmp_path / "evaluation.json").write_text(json.dumps(REPORT))
    monkeypatch.setattr(sys, "argv", ["write_card.py", "--model", str(tmp_path)])
    write_card_script.main()
    assert (tmp_path / "README.md").read_text() == rendered()
