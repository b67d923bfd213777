# SPDX-License-Identifier: Apache-2.0
import copy
import json

import pytest
import torch

from compare_routings import main
from emoji_recipe.routing_comparison import (
    AT_PAPER_THRESHOLD,
    CAUSAL_RULES,
    ORACLE,
    RULES,
    auxiliary_routers,
    comparison_report,
    loss_table,
    paper_thresholds,
    router_table,
    verdict,
)
from helpers.tiny import tiny_documents, tiny_model, tiny_processor, write_tokens
from modeling_moma.routing_moma import MomaRouterBase
from modeling_moma.training.examples import shuffled_held_out
from modeling_moma.training.measures import LOSSES, load_model
from tokenization import MomaDataCollator


BATCH = 3


# of unlike lengths, so that batches are padded
LABELS = ["apple", "castle of the green apples", "red apple", "fruit"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with auxiliary routers that matter, cut at a threshold of its own each."""
    folder = tmp_path_factory.mktemp("routings")
    processor = tiny_processor()
    processor.save_pretrained(folder / "processor")
    write_tokens(folder / "tokens", processor, labels=LABELS, test=4)
    model = tiny_model(processor, auxiliary_routers=True, num_experts={"text": 4, "image": 2}, depth_layers=[1])
    with torch.no_grad():
        for router in (module for module in model.modules() if isinstance(module, MomaRouterBase)):
            # at their small initialisation all scores would be about one half
            router.weight.normal_(std=0.3)
            for weight in router.auxiliary.parameters():
                weight.normal_(std=0.6)
            router.auxiliary.threshold.uniform_(0.4, 0.6)
    model.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder / "model", "cpu")


@pytest.fixture(scope="module")
def batches():
    processor = tiny_processor()
    examples = shuffled_held_out([tiny_documents(processor, 4, labels=LABELS)], seed=0)
    collate = MomaDataCollator(processor.tokenizer)
    batches = [collate(examples[start : start + BATCH]) for start in range(0, len(examples), BATCH)]
    assert len(examples) == 8 and any((batch["attention_mask"] == 0).any() for batch in batches)
    return batches


def arguments(folder, output, *options):
    inputs = ["--model", str(folder / "model"), "--processor", str(folder / "processor")]
    inputs += ["--tokens", str(folder / "tokens"), "--output", str(output), "--batch-size", str(BATCH)]
    return [*inputs, *map(str, options)]


@pytest.fixture(scope="module")
def output(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("report") / "routings.json"
    main(arguments(folder, output))
    return output


@pytest.fixture(scope="module")
def report(output):
    return json.loads(output.read_text())


def losses_of(model, batches, routing):
    """Mean losses, token by token."""
    ranges = model.config.modality_token_ranges["image"]
    sums, counts = dict.fromkeys(("text", "image"), 0.0), dict.fromkeys(("text", "image"), 0)
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            log_probs = model(**inputs, routing=routing, depth_routing=routing).logits.log_softmax(-1)
        for row, ids in enumerate(batch["input_ids"].tolist()):
            for place, target in enumerate(ids[1:]):
                if not batch["attention_mask"][row, place + 1]:
                    continue
                modality = "image" if any(start <= target < stop for start, stop in ranges) else "text"
                sums[modality] -= log_probs[row, place, target].item()
                counts[modality] += 1
    losses = {name: sums[name] / counts[name] for name in sums}
    return {**losses, "overall": sum(sums.values()) / sum(counts.values())}


def test_losses_are_those_of_each_routing_and_gaps_are_relative_to_the_oracle(model, batches, report):
    expected = {routing: losses_of(model, batches, routing) for routing in ("expert_choice", "threshold", "auxiliary")}
    cut_at_half = copy.deepcopy(model)
    for router in auxiliary_routers(cut_at_half):
        router.threshold.fill_(0.5)
    expected[AT_PAPER_THRESHOLD] = losses_of(cut_at_half, batches, "auxiliary")
    for rule in RULES:
        for name in LOSSES:
            assert report["loss"][rule][name] == pytest.approx(expected[rule][name], rel=1e-5), (rule, name)
    assert len({round(losses["overall"], 6) for losses in report["loss"].values()}) == len(RULES)
    for rule in CAUSAL_RULES:
        for name in LOSSES:
            gap = report["loss"][rule][name] / report["loss"][ORACLE][name] - 1
            assert report["gap"][rule][name] == pytest.approx(gap)


def test_precision_and_recall_of_a_group_are_those_of_a_plain_loop(model, batches, report):
    """Of the first layer, whose input no routing has touched yet."""
    router = model.model.layers[0].mlp.groups["text"].router
    taken = {rule: [] for rule in ("truth", *CAUSAL_RULES)}

    def note(module, args, output):
        hidden, _ = args
        probabilities = torch.sigmoid(router.auxiliary(hidden))
        truth = torch.zeros_like(probabilities, dtype=torch.bool)
        for expert, tokens in enumerate(output[1].token_EK.tolist()):
            truth[tokens, expert] = True
        taken["truth"].append(truth)
        taken["threshold"].append(torch.sigmoid(output[0]) >= router.threshold)
        taken["auxiliary"].append(probabilities >= router.auxiliary.threshold)
        taken[AT_PAPER_THRESHOLD].append(probabilities >= 0.5)

    handle = router.register_forward_hook(note)
    with torch.no_grad():
        for batch in batches:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            model(**inputs, routing="expert_choice")
    handle.remove()
    taken = {rule: torch.cat(flags).flatten().tolist() for rule, flags in taken.items()}
    (row,) = [row for row in report["routers"] if (row["layer"], row["group"]) == (0, "text")]
    for rule in CAUSAL_RULES:
        hits = sum(mine and true for mine, true in zip(taken[rule], taken["truth"]))
        found = row["rules"][rule]
        assert found["precision"] == pytest.approx(hits / sum(taken[rule]))
        assert found["recall"] == pytest.approx(hits / sum(taken["truth"]))
        assert found["load"] == pytest.approx(sum(taken[rule]) / len(taken[rule]))
        agreed = sum(mine == true for mine, true in zip(taken[rule], taken["truth"]))
        assert found["accuracy"] == pytest.approx(agreed / len(taken[rule]))
    assert row["true_load"] == pytest.approx(sum(taken["truth"]) / len(taken["truth"]))


def test_every_layer_and_group_has_a_row_and_markdown_says_what_the_json_says(output, report):
    places = [(row["layer"], row["group"]) for row in report["routers"]]
    assert sorted(places) == [(0, "image"), (0, "text"), (1, "depth"), (1, "image"), (1, "text")]
    text = output.with_suffix(".md").read_text()
    assert text == comparison_report(report)
    for rule, title in RULES.items():
        gap = report["gap"].get(rule)
        behind = {name: f" ({100 * gap[name]:+.2f} %)" if rule != ORACLE else "" for name in LOSSES}
        numbers = " | ".join(f"{report['loss'][rule][name]:.4f}{behind[name]}" for name in LOSSES)
        assert f"| {title} | {numbers} |" in text
    for row in report["routers"]:
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {row['layer']}, {row['group']} |")]
        for rule in row["rules"].values():
            shares = [rule[name] for name in ("accuracy", "precision", "recall", "load")]
            cell = " / ".join("–" if share is None else f"{100 * share:.1f}" for share in shares)
            assert f"| {cell} |" in line
    assert "sees the future" in text and report["command"] in text and report["date"] in text


def test_report_holds_the_tables(output, report):
    text = output.with_suffix(".md").read_text()
    assert text == comparison_report(report)
    assert loss_table(report) in text and router_table(report["routers"]) in text


def test_thresholds_come_back_even_after_an_error(model):
    routers = auxiliary_routers(model)
    before = [router.threshold.clone() for router in routers]
    with pytest.raises(KeyboardInterrupt):
        with paper_thresholds(model):
            assert all((router.threshold == 0.5).all() for router in routers)
            raise KeyboardInterrupt
    assert all(torch.equal(router.threshold, threshold) for router, threshold in zip(routers, before))


def test_models_without_calibrated_auxiliary_routers_are_told():
    processor = tiny_processor()
    with pytest.raises(ValueError, match="no auxiliary routers"):
        auxiliary_routers(tiny_model(processor))
    with pytest.raises(ValueError, match="never calibrated"):
        auxiliary_routers(tiny_model(processor, auxiliary_routers=True))


def known(**overall):
    """A result with the overall losses of all rules, 2.0 where not given."""
    loss = {rule: dict.fromkeys(LOSSES, overall.get(rule.replace(".", "_"), 2.0)) for rule in RULES}
    gap = {rule: dict.fromkeys(LOSSES, loss[rule]["overall"] / loss[ORACLE]["overall"] - 1) for rule in CAUSAL_RULES}
    return {"loss": loss, "gap": gap}


def test_words_follow_the_numbers():
    text = verdict(known(threshold=2.01, auxiliary=2.05, auxiliary_0_5=2.1))
    assert "Best of the causal rules: `threshold`" in text and "lies 0.50 % above the oracle's" in text
    assert "1 % above: reached" in text and "lowers the overall loss by 0.0500 nats" in text
    text = verdict(known(threshold=2.2, auxiliary=2.1, auxiliary_0_5=2.05))
    assert "`auxiliary`, cut at 0.5 (the paper), whose overall loss lies 2.50 % above" in text
    assert "above: not reached" in text and "raises the overall loss by 0.0500 nats" in text
    text = verdict(known(auxiliary=1.99, auxiliary_0_5=1.99))
    assert "`auxiliary`, cut at 0.5" in text and "lies 0.50 % below" in text and "changes nothing" in text


def test_known_numbers_give_the_known_rows():
    text = loss_table(known(threshold=2.02, auxiliary=1.99, auxiliary_0_5=2.1))
    assert "| 2.0000 | 2.0000 | 2.0000 |" in text
    assert "| `threshold` | 2.0200 (+1.00 %) | 2.0200 (+1.00 %) | 2.0200 (+1.00 %) |" in text
    assert "| `auxiliary`, calibrated cuts | 1.9900 (-0.50 %) | 1.9900 (-0.50 %) | 1.9900 (-0.50 %) |" in text
    rule = {"accuracy": 0.7, "precision": None, "recall": 0.0, "load": 0.123}
    row = {"layer": 3, "group": "image", "true_load": 0.25, "rules": dict.fromkeys(CAUSAL_RULES, rule)}
    cell = "70.0 / – / 0.0 / 12.3"
    assert f"| 3, image | 25.0 | {cell} | {cell} | {cell} |" in router_table([row])
    # a calibration has one rule
    table = router_table([{**row, "rules": {"threshold": rule}}])
    assert table.endswith(f"| 3, image | 25.0 | {cell} |") and "auxiliary" not in table
