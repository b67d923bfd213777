# SPDX-License-Identifier: Apache-2.0
import json
import math
import shutil

import pytest

from compare_depth import main, parse_arguments
from emoji_recipe.depth_comparison import CAUSAL, DEPTH_EXPERT_CHOICE, compare, comparison_report
from helpers.tiny import tiny_documents, tiny_processor, write_tokens
from modeling_moma import MomaConfig, training_flops
from modeling_moma.cli.pretrain import main as pretrain
from modeling_moma.training.measures import EXPERT_CHOICE, LOSSES, gaps
from modeling_moma.training.runs import tokens_of_example, training_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two seeds of two trainings of two steps."""
    folder = tmp_path_factory.mktemp("compare")
    processor = tiny_processor()
    processor.save_pretrained(folder / "processor")
    write_tokens(folder / "tokens", processor, train=12, validation=6, test=4)
    config = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "max_position_embeddings": 64}
    depth = {"depth_layers": [0, 2], "depth_training_routing": "threshold"}
    for name, fields in (("plain", {"num_hidden_layers": 2}), ("depth", {"num_hidden_layers": 3, **depth})):
        (folder / f"{name}.json").write_text(json.dumps({"model": {**config, **fields}}))
        for seed in range(2):
            options = f"--steps 2 --batch-size 4 --eval-steps 2 --warmup-steps 1 --seed {seed} --output"
            paths = {"--processor": "processor", "--tokens": "tokens"}
            given = [text for option, path in paths.items() for text in (option, str(folder / path))]
            pretrain([str(folder / f"{name}.json"), *given, *options.split(), str(folder / f"{name}-{seed}")])
    return folder


def arguments(folder, output, models=("plain-0", "plain-1"), depth=("depth-0", "depth-1")):
    runs = ["--models", *(str(folder / name) for name in models), "--depth", *(str(folder / name) for name in depth)]
    inputs = ["--processor", str(folder / "processor"), "--tokens", str(folder / "tokens")]
    return [*runs, *inputs, "--split", "test", "--output", str(output)]


def history(run):
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


def test_report_holds_flops_losses_gaps_and_loads(folder, tmp_path, capsys):
    main(arguments(folder, tmp_path / "report.json"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["split"], report["examples"], report["batch_size"]) == ("test", 8, 32)
    tokens = report["tokens_of_example"]
    for side, name in (("without", "plain"), ("with_depth", "depth")):
        config = MomaConfig.from_pretrained(folder / f"{name}-0")
        for seed, run in enumerate(report["runs"][side]):
            assert (run["seed"], run["steps"], run["examples"]) == (seed, 2, 8)
            if name == "depth":
                # what the layers took in training, not what they were meant to take
                (log,) = [log for log in history(folder / f"{name}-{seed}") if "text_depth_load" in log]
                loads = {modality: log[f"{modality}_depth_load"] for modality in ("text", "image")}
                assert run["depth_load"] == loads
                config.depth_capacity = loads
            assert run["flops"] == pytest.approx(8 * training_flops(config, tokens, round(sum(tokens.values()))))
            assert run["gap"][EXPERT_CHOICE] == gaps(run["loss"][CAUSAL], run["loss"][EXPERT_CHOICE])
    plain, depth = (report["runs"][side][0] for side in ("without", "with_depth"))
    assert DEPTH_EXPERT_CHOICE in depth["loss"] and DEPTH_EXPERT_CHOICE not in plain["loss"]
    assert [layer["layer"] for layer in depth["layers"]] == [0, 2] and "layers" not in plain
    for layer in depth["layers"]:
        assert 0 <= layer["load"] <= 1
        assert sum(layer["mix_of_chosen"].values()) == pytest.approx(1 if layer["load"] else 0)
    text = (tmp_path / "report.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "8 examples of the test split" in text and "32 in a batch" in text and "sees the future" in text


def test_wrong_runs_are_told(folder, tmp_path):
    output = tmp_path / "report.json"
    with pytest.raises(SystemExit):
        parse_arguments(arguments(folder, output, depth=("depth-0",)))
    with pytest.raises(ValueError, match="wrong side"):
        main(arguments(folder, output, ("depth-0",), ("plain-0",)))
    with pytest.raises(ValueError, match="not pairs"):
        main(arguments(folder, output, ("plain-0",), ("depth-1",)))
    assert not output.exists()


def test_unfinished_run_is_told(folder, tmp_path):
    run = shutil.copytree(folder / "plain-0", tmp_path / "run")
    described = json.loads((run / "run.json").read_text())
    described["arguments"]["steps"] = 3
    (run / "run.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="2 of 3 steps"):
        training_of(run, {"text": 4.0, "image": 16.0})
    del described["arguments"]
    (run / "run.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="arguments"):
        training_of(run, {"text": 4.0, "image": 16.0})


def run_of(seed, flops, causal, oracle, load=None):
    loss = {CAUSAL: dict.fromkeys(LOSSES, causal), EXPERT_CHOICE: dict.fromkeys(LOSSES, oracle)}
    run = {
        "seed": seed,
        "flops": flops,
        "loss": loss,
        "gap": {EXPERT_CHOICE: gaps(loss[CAUSAL], loss[EXPERT_CHOICE])},
    }
    if load is not None:
        shares = {"text": load, "image": 1 - load}
        layer = {"layer": 2, "load": load, "load_by_modality": shares, "mix_of_chosen": shares, "error_rate": 0.02}
        run["layers"] = [layer]
    return run


def known(flops=1e15):
    without = [run_of(0, 1e15, 2.2, 2.0), run_of(1, 1e15, 2.1, 2.0)]
    return without, [run_of(0, flops, 2.018, 2.0, 0.25), run_of(1, flops, 2.0, 2.0, 0.35)]


def report_of(without, with_depth):
    summary = compare(without, with_depth)
    runs = {"without": without, "with_depth": with_depth}
    return {"split": "test", "examples": 8, "batch_size": 32, "runs": runs, "summary": summary}


def test_known_numbers_give_the_known_table():
    text = comparison_report(report_of(*known()))
    for line in (
        "over those without: 1.000 ± 0.000.",
        "- Causal text loss: better with depth, for 2 of 2 seeds; with minus without -0.1410 ± 0.0580 nats.",
        f"with depth lies above that under {EXPERT_CHOICE} by 0.45 ± 0.64 %; aim of at most 0.5 %: reached.",
        f"| without depth, {CAUSAL} | 1 | 1.000e+15 | 2.1000 | 2.1000 | 2.1000 |",
        f"| **with depth, {CAUSAL}** | mean |  | 2.0090 ± 0.0127 |",
        f"| without depth, to {EXPERT_CHOICE} | 0 | 10.00 % | 10.00 % | 10.00 % |",
        f"| **without depth, to {EXPERT_CHOICE}** | mean | 7.50 ± 3.54 % |",
        "| 2 | 30.0 ± 7.1 % | 30.0 ± 7.1 % | 70.0 ± 7.1 % | 30.0 ± 7.1 % | 70.0 ± 7.1 % | 2.0 ± 0.0 % |",
    ):
        assert line in text, line


def test_unequal_flops_give_no_verdict():
    assert "no verdict at equal FLOPs" in comparison_report(report_of(*known(1.1e15)))
    assert "no verdict" not in comparison_report(report_of(*known(1.01e15)))


def test_one_seed_has_no_spread():
    without, with_depth = known()
    summary = compare(without[:1], with_depth[:1])
    assert summary["with_depth"]["gap"][EXPERT_CHOICE]["text"]["std"] is None
    assert "±" not in comparison_report(report_of(without[:1], with_depth[:1]))


def test_the_loser_is_not_called_a_winner():
    without, with_depth = known()
    for run, loss in zip(with_depth, (2.3, 2.05)):
        run["loss"][CAUSAL] = dict.fromkeys(LOSSES, loss)
    part = compare(without, with_depth)["difference"]["overall"]
    assert (part["winner"], part["seeds_for_winner"]) == ("without depth", 1)
    assert part["mean"] == pytest.approx(0.025) and part["std"] == pytest.approx(0.15 / math.sqrt(2))


def test_flops_follow_the_tokens_of_the_training_stream(folder):
    processor = tiny_processor()
    tokens = tokens_of_example(tiny_documents(processor, 1), processor, 64)
    fewer = {**tokens, "image": tokens["image"] / 2}
    assert training_of(folder / "plain-0", fewer)["flops"] < training_of(folder / "plain-0", tokens)["flops"]
