# SPDX-License-Identifier: Apache-2.0
import json
import shutil

import pytest
import torch
from PIL import Image

from compare_upcycling import main
from emoji_recipe.upcycling_comparison import CAUSAL, by_seed_length, compare, comparison_report, settings_of
from helpers.tiny import tiny_processor, write_tokens
from modeling_moma import MomaConfig, flops_per_token
from modeling_moma.cli.pretrain import main as pretrain
from modeling_moma.cli.upcycle import main as upcycle
from modeling_moma.training.examples import open_documents
from modeling_moma.training.measures import EXPERT_CHOICE, LOSSES, load_model
from modeling_moma.training.runs import read_run


STEPS, BATCH = 4, 4
LENGTHS = (1, 2)
SPLITS = {"train": 12, "validation": 6, "test": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two random seeds of a training of four steps from scratch, and of seeds of one and two steps, upcycled."""
    folder = tmp_path_factory.mktemp("compare")
    processor = tiny_processor()
    processor.save_pretrained(folder / "processor")
    write_tokens(folder / "tokens", processor, **SPLITS)
    config = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "max_position_embeddings": 64}
    for name, experts in (("4t4i", 4), ("1t1i", 1)):
        num_experts = {"text": experts, "image": experts}
        (folder / f"{name}.json").write_text(
            json.dumps({"model": {**config, "num_hidden_layers": 2, "num_experts": num_experts}})
        )

    def train(seed, output, *options):
        paths = ["--processor", str(folder / "processor"), "--tokens", str(folder / "tokens"), "--output", str(output)]
        settings = f"--steps {STEPS} --batch-size {BATCH} --eval-steps 2 --warmup-steps 1 --logging-steps 1"
        pretrain([*paths, *settings.split(), "--save-steps", "1", "--seed", str(seed), *map(str, options)])

    for seed in range(2):
        train(seed, folder / f"scratch-{seed}", folder / "4t4i.json")
        train(seed, folder / f"seed-{seed}", folder / "1t1i.json", "--stop-at", max(LENGTHS))
        for length in LENGTHS:
            grown = folder / f"grown-{length}-{seed}"
            upcycle(["--model", f"{folder}/seed-{seed}/checkpoint-{length}", "--to", "4t4i", "--output", str(grown)])
            train(seed, folder / f"from-{length}-{seed}", "--model", grown)
    return folder


def arguments(folder, output, lengths=LENGTHS, seeds=(0, 1)):
    scratch = [str(folder / f"scratch-{seed}") for seed in (0, 1)]
    upcycled = [str(folder / f"from-{length}-{seed}") for seed in seeds for length in lengths]
    inputs = ["--processor", str(folder / "processor"), "--tokens", str(folder / "tokens")]
    options = ["--split", "test", "--output", str(output), "--batch-size", "3"]
    return ["--scratch", *scratch, "--upcycled", *upcycled, *inputs, *options]


@pytest.fixture(scope="module")
def output(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("report") / "upcycling.json"
    main(arguments(folder, output))
    return output


@pytest.fixture(scope="module")
def report(output):
    return json.loads(output.read_text())


def test_losses_are_the_means_over_target_tokens_under_the_causal_routing(folder, report):
    processor = tiny_processor()
    model = load_model(folder / "from-2-1", "cpu")
    run = report["runs"]["2"][1]
    sums, counts = {"text": 0.0, "image": 0.0}, {"text": 0, "image": 0}
    for held_out in open_documents(str(folder / "tokens"), processor, "test")[0].held_out():
        ids = torch.tensor([held_out])
        with torch.inference_mode():
            losses = -model(input_ids=ids).logits[0].log_softmax(-1)
        for place, target in enumerate(ids[0, 1:].tolist()):
            modality = "image" if target in processor.image_token_ids else "text"
            sums[modality] += losses[place, target].item()
            counts[modality] += 1
    for name in sums:
        assert run["loss"][CAUSAL][name] == pytest.approx(sums[name] / counts[name], rel=1e-5)
    overall = sum(sums.values()) / sum(counts.values())
    assert run["loss"][CAUSAL]["overall"] == pytest.approx(overall, rel=1e-5)
    assert run["loss"][CAUSAL] != run["loss"][EXPERT_CHOICE] and "sees the future" in EXPERT_CHOICE


def test_flops_count_the_steps_of_the_seed_without_routers(folder, report):
    tokens = report["tokens_of_example"]
    length = round(sum(tokens.values()))

    def step(name):
        fields = json.loads((folder / f"{name}.json").read_text())["model"]
        config = MomaConfig(**fields, **tiny_processor().token_layout())
        costs = {modality: flops_per_token(config, modality, length, training=True) for modality in tokens}
        return BATCH * sum(tokens[modality] * costs[modality] for modality in tokens)

    assert step("1t1i") < step("4t4i")
    for first_step, part in zip((0, *LENGTHS), report["summary"]["lengths"], strict=True):
        assert (part["first_step"], part["share"]) == (first_step, first_step / STEPS)
        expected = first_step * step("1t1i") + (STEPS - first_step) * step("4t4i")
        for run in report["runs"][str(first_step)]:
            assert (run["first_step"], run["steps"]) == (first_step, STEPS)
            assert run["flops"] == pytest.approx(expected, rel=1e-9)
        if first_step:
            assert part["flops_ratio"]["mean"] == pytest.approx(expected / (STEPS * step("4t4i")))
            assert part["equal_flops"]


def test_training_curves_go_on_where_the_seed_ended(report):
    for runs in report["runs"].values():
        for run in runs:
            curve = run["training_curve"]
            assert [point["step"] for point in curve] == [1, 2, 3, 4]
            assert curve[-1]["flops"] == run["flops"]
    text = report["tokens_of_example"]["text"] - 1
    image = report["tokens_of_example"]["image"]
    point = report["runs"]["2"][0]["training_curve"][2]
    assert point["overall"] == pytest.approx((text * point["text"] + image * point["image"]) / (text + image))
    # what a seed logged is the same in the runs that grew from it
    seeds = [report["runs"][length][0]["training_curve"][0] for length in ("1", "2")]
    assert seeds[0] == seeds[1] != report["runs"]["0"][0]["training_curve"][0]


def test_markdown_says_what_the_json_says_and_the_plot_is_a_picture(output, report):
    text = output.with_suffix(".md").read_text()
    assert text == comparison_report(report, "upcycling.png")
    for part in report["summary"]["lengths"]:
        for name in LOSSES:
            loss = part["loss"][CAUSAL][name]
            assert f"| {loss['mean']:.4f} ± {loss['std']:.4f} |" in text
    for runs in report["runs"].values():
        for run in runs:
            for loss in run["loss"].values():
                assert f"| {run['seed']} | {run['flops']:.4e} | {loss['text']:.4f} | {loss['image']:.4f} |" in text
    for words in (report["command"], report["date"], "8 examples of the test split", "3 in a batch", "`threshold`"):
        assert words in text
    # `upcycle` turns the noise on
    assert "(upcycling.png)" in text and "Gumbel noise 1.0" in text and "noise on their routers" in text
    with Image.open(output.with_suffix(".png")) as picture:
        assert picture.format == "PNG" and min(picture.size) > 500
        picture.load()
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_runs_that_do_not_pair_up_are_told(folder, tmp_path):
    output = tmp_path / "report.json"
    with pytest.raises(ValueError, match=r"seeds \[0, 1\], those upcycled after 2 steps \[0\]"):
        main(arguments(folder, output, seeds=(0,), lengths=(2,)))
    with pytest.raises(ValueError, match=r"after 1 steps \[0, 0, 1\]"):
        main(arguments(folder, output, seeds=(0, 0, 1), lengths=(1,)))
    assert not output.exists()


def test_runs_on_the_wrong_side_are_told():
    grown, scratch = ({"first_step": step, "seed": 0, "folder": f"run-{step}"} for step in (3, 0))
    with pytest.raises(ValueError, match="run-3.*wrong side"):
        by_seed_length([grown], [grown])
    with pytest.raises(ValueError, match="run-0.*`first_step`"):
        by_seed_length([scratch], [scratch])


def test_an_older_run_without_the_key_counts_as_from_scratch(folder, tmp_path):
    run = shutil.copytree(folder / "scratch-0", tmp_path / "run")
    described = json.loads((run / "run.json").read_text())
    del described["first_step"]
    (run / "run.json").write_text(json.dumps(described))
    tokens = {"text": 4.0, "image": 16.0}
    assert read_run(run, tokens) == read_run(folder / "scratch-0", tokens)


def known_run(first_step, seed, loss, flops=1e15, **fields):
    curve = [{"step": step, "flops": flops * step / 100} | dict.fromkeys(LOSSES, 9 - step / 50) for step in (50, 100)]
    losses = {CAUSAL: dict.fromkeys(LOSSES, loss), EXPERT_CHOICE: dict.fromkeys(LOSSES, loss - 1)}
    run = {"folder": "", "seed": seed, "steps": 100, "first_step": first_step, "flops": flops, "loss": losses}
    routings = {"training_routing": "expert_choice", "inference_routing": "threshold"}
    settings = {"gumbel_noise": 0.0, "gumbel_noise_steps": None, "normalize_gates": False}
    settings |= {"learning_rate": 0.001, "warmup_steps": 5}
    return {**run, **routings, **settings, "curve": curve, "training_curve": curve, **fields}


def known_report(upcycled, scratch=(3.0, 3.2), **fields):
    """Losses of two random seeds by the length of the seed."""
    groups = {0: [known_run(0, seed, loss) for seed, loss in enumerate(scratch)]}
    for length, losses in upcycled.items():
        groups[length] = [known_run(length, seed, loss, **fields) for seed, loss in enumerate(losses)]
    head = {"command": "python x", "date": "2026-01-01", "examples": 8, "split": "test", "batch_size": 32}
    runs = {str(length): runs for length, runs in groups.items()}
    return {**head, "summary": compare(groups), "runs": runs}


def test_known_numbers_give_the_known_words():
    text = comparison_report(known_report({10: (2.8, 2.9), 20: (2.9, 3.5)}), "a.png")
    for line in (
        "from scratch: 1.0000 to 1.0000.",
        "- Causal text loss: the best upcycled one (seed of 10 steps, 10 %) is 0.2500 nats better than training from "
        "scratch (2.8500 ± 0.0707 against 3.1000 ± 0.1414; better for 2 of 2 random seeds).",
        "in the overall causal loss: reached.",
        "| from scratch | 3.1000 ± 0.1414 | 3.1000 ± 0.1414 | 3.1000 ± 0.1414 |  |  |  |",
        "| seed of 20 steps, 20 % | 3.2000 ± 0.4243 | 3.2000 ± 0.4243 | 3.2000 ± 0.4243 | 0.1000 ± 0.2828 | "
        "1.0000 ± 0.0000 | 1.00x, 1.00x |",
        f"| seed of 10 steps, 10 %, {EXPERT_CHOICE} | 1 | 1.0000e+15 | 1.9000 |",
    ):
        assert line in text, line


def test_words_follow_the_loser():
    text = comparison_report(known_report({10: (3.4, 3.5), 20: (3.0, 3.3)}), "a.png")
    sentence = "(seed of 20 steps, 20 %) is 0.0500 nats worse than training from scratch (3.1500 ± 0.2121 against "
    assert sentence + "3.1000 ± 0.1414; better for 0 of 2 random seeds), no more than runs" in text
    assert "overall causal loss: not reached." in text


def test_unequal_flops_give_no_verdict_and_one_seed_has_no_spread():
    assert "no verdict at equal FLOPs" in comparison_report(known_report({10: (2.8, 2.9)}, flops=1.1e15), "a.png")
    text = comparison_report(known_report({10: (2.8,)}, scratch=(3.0,)), "a.png")
    assert "1 random seed each, 100 steps" in text and "better for 1 of 1 random seeds" in text
    assert "differ among" not in text


def test_settings_name_what_is_on_and_where_runs_differ():
    runs = [known_run(10, 0, 3.0), known_run(10, 1, 3.0, gumbel_noise=1.0, normalize_gates=True, learning_rate=0.002)]
    assert settings_of(runs) == (
        "peak learning rate 0.001 or 0.002, warm-up steps 5, Gumbel noise 0.0 or 1.0, normalized gates False or True"
    )
    assert settings_of(runs[:1]) == "peak learning rate 0.001, warm-up steps 5"


def test_runs_with_unlike_routings_are_not_compared():
    groups = {0: [known_run(0, 0, 3.0)], 10: [known_run(10, 0, 3.0, inference_routing="auxiliary")]}
    with pytest.raises(ValueError, match="inference_routing"):
        compare(groups)
