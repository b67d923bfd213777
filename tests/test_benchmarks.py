# SPDX-License-Identifier: Apache-2.0
import copy
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.__main__ import main as compare_speed
from benchmarks.speed import comparison, measures
from benchmarks.speed.cases import CASES
from benchmarks.speed.comparison import report
from benchmarks.speed.measures import PeakMemory
from benchmarks.speed.models import CONTENDERS, SHAPES, build, mixed_tokens
from modeling_moma.depth_moma import MomaDepthRouter
from modeling_moma.routing_moma import MomaRouter


@pytest.fixture
def tiny_cases(monkeypatch):
    """All cases at a size that takes no time."""
    monkeypatch.setattr(measures, "_STREAMED_BYTES", 2**20)
    for name, case in CASES.items():
        monkeypatch.setitem(CASES, name, replace(case, shape="tiny", length=64, rows=min(case.rows, 4)))


@pytest.mark.parametrize(
    ("name", "figures"),
    [("train-4t4i-packed", (5, 7)), ("optimizer-4t4i", ()), ("prefill-depth", (5,)), ("decode-token-choice", (5, 6))],
)
def test_a_case_is_checked_timed_and_reported(tiny_cases, tmp_path, capsys, name, figures):
    assert compare_speed([name, "--threads", "1", "--rounds", "1", "--device", "cpu", "--report", str(tmp_path)]) == 0
    (report,) = tmp_path.iterdir()
    assert report.read_text() in capsys.readouterr().out
    lines = [line.strip("| ").split(" | ") for line in report.read_text().splitlines() if line.startswith(f"| {name}")]
    case = CASES[name]
    assert [line[2] for line in lines[1:]] == [case.ours, *case.peers]
    assert float(lines[1][4]) == 1 and float(lines[0][4]) > 0
    cells = report.read_text().splitlines()[6].split("|")[1:-1]
    for place in figures:
        # a number, without the bold of a bar that is not met and the bar of a floor
        assert float(cells[place].strip().strip("*").split(" ")[0]) >= 0, (place, cells)
    for said in (f"torch {torch.__version__}", "Transformers 5.", "Python 3.", "CPU ("):
        assert said in report.read_text()


def test_every_case_names_contenders_and_shapes_that_there_are(capsys):
    for case in CASES.values():
        assert {case.ours, *case.peers} <= set(CONTENDERS) and case.shape in SHAPES
        assert case.kind in ("train", "optimizer", "prefill", "decode")
    assert compare_speed(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(CASES)
    with pytest.raises(SystemExit):
        compare_speed(["no-such-case"])
    assert "no-such-case" in capsys.readouterr().err


def test_the_gate_finds_experts_that_compute_something_else(monkeypatch):
    model = build("4t4i", SHAPES["tiny"], 64, "cpu")
    measures.check(copy.deepcopy(model), SHAPES["tiny"])
    original = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *args: 1.01 * original(*args))
    with pytest.raises(AssertionError):
        measures.check(model, SHAPES["tiny"])


def test_the_gate_finds_a_gradient_that_is_missing_and_documents_that_see_one_another(monkeypatch):
    fast, plain = (build("4t4i", SHAPES["tiny"], 64, "cpu") for _ in range(2))
    ids_BT = mixed_tokens(SHAPES["tiny"], 2, 32)
    batch = {"input_ids": ids_BT, "labels": ids_BT, "position_ids": torch.arange(16).repeat(2, 2)}
    measures.compare_gradients(fast, plain, **batch)
    fast.model.norm.weight.requires_grad_(False)
    with pytest.raises(AssertionError, match=r"model\.norm\.weight: one of the two"):
        measures.compare_gradients(fast, plain, **batch)
    fast.model.norm.weight.requires_grad_(True)
    monkeypatch.setattr(fast, "forward", lambda position_ids, **rest: type(fast).forward(fast, **rest))
    with pytest.raises(AssertionError):
        measures.compare_gradients(fast, plain, **batch)


def test_contenders_begin_a_round_in_turn():
    order = []

    def runner(name):
        device = SimpleNamespace(type="cpu")
        return SimpleNamespace(prepare=lambda: None, work=lambda: order.append(name), device=device)

    times = measures.in_turn([runner(name) for name in "abc"], rounds=3, warm_up=1)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc" and [len(own) for own in times] == [3, 3, 3]


@pytest.mark.parametrize(
    ("ratio", "floor", "missed", "bold"),
    [(0.7, 3.2, {"floor": 3.2}, "**1.3**"), (0.9, 1.2, {"ratio": 0.9}, "**0.75**"), (0.7, 1.2, {}, None)],
)
def test_the_bar_that_is_missed_is_bold(ratio, floor, missed, bold):
    case = replace(next(iter(CASES.values())), bar=0.75, bar_of_floor=1.3)
    rows = [comparison.Row("ours", 1.0, 1.0, floor_ratio=floor), comparison.Row("theirs", 1.0, ratio)]
    outcome = comparison.Outcome(case, 1, 0.0, rows)
    assert outcome.missed() == missed
    page = report([outcome], "command", 1, "cpu", "machine", {})
    assert re.findall(r"\*\*[0-9.]+\*\*", page) == ([bold] if bold else [])
    assert "kept at most 0.00 cores" in page


def test_figures_of_a_busy_machine_are_refused():
    comparison.check_quiet(0.1)
    with pytest.raises(comparison.BusyMachineError, match=r"0\.50 cores"):
        comparison.check_quiet(0.5)


def test_tokens_have_the_share_of_words_that_was_asked_for():
    shape = SHAPES["small"]
    for share in (0.5, 0.1):
        ids_BT = mixed_tokens(shape, 8, 2048, share)
        assert (ids_BT < shape.first_code).float().mean().item() == pytest.approx(share, abs=0.05)
    assert not torch.equal(ids_BT[0] < shape.first_code, ids_BT[1] < shape.first_code)


def test_peak_memory_counts_what_lives_at_once():
    there = torch.zeros(4000)
    with PeakMemory([there]) as memory:
        first = torch.zeros(1000)
        del first
        there[5:].add_(1)
        second = torch.ones(500) + torch.ones(500)
    assert memory.peak == 6000 and memory.now == 2000
    del second


def test_contenders_give_every_expert_and_depth_layer_its_share():
    shape = SHAPES["tiny"]
    model = build("mod-4t4i", shape, 128, "cpu").eval()
    taken, offered, experts = [], [], []

    def count_depth(module, args, output):
        taken.append(int(output[1].chosen_BT.sum()))
        offered.append(output[1].chosen_BT.numel())

    for module in model.modules():
        if isinstance(module, MomaDepthRouter):
            module.register_forward_hook(count_depth)
        elif isinstance(module, MomaRouter):
            module.register_forward_hook(
                lambda module, args, output: experts.append((output[1].token_P.numel(), args[0].shape[0]))
            )
    with torch.no_grad():
        for seed in range(8):
            model(mixed_tokens(shape, 4, 128, seed=seed), use_cache=False)
    pairs, tokens = map(sum, zip(*experts))
    assert pairs / tokens == pytest.approx(1, abs=0.1)
    assert sum(taken) / sum(offered) == pytest.approx(model.config.depth_capacity, abs=0.05)


@pytest.mark.parametrize(
    ("words", "reason"),
    [(["train-4t4i", "--minutes", "-1"], "the time was over"), (["train-4t4i-large"], "needs a GPU")],
)
def test_cases_that_are_left_out_are_named(tiny_cases, capsys, words, reason):
    assert compare_speed([*words, "--device", "cpu"]) == 0
    assert f"- {words[0]}: {reason}" in capsys.readouterr().out


def test_a_case_that_fails_ends_no_other_and_stands_in_the_report(tiny_cases, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise torch.OutOfMemoryError("no room\nfor it")

    monkeypatch.setitem(CONTENDERS, "dense", fail)
    command = ["--threads", "1", "--rounds", "1", "--no-details", "--device", "cpu", "--report", str(tmp_path)]
    for others in (["train-16t16i"], []):
        assert compare_speed(["train-4t4i", *others, *command]) == 1
    # an earlier report of the day stays
    reports = [path.read_text() for path in tmp_path.iterdir()]
    assert len(reports) == 2
    assert all("- train-4t4i: OutOfMemoryError: no room for it" in page for page in reports)
    assert sum("| train-16t16i | 1 | 16t16i | 4t4i |" in page for page in reports) == 1
    assert "Written: " in capsys.readouterr().err
