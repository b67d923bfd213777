# SPDX-License-Identifier: Apache-2.0
"""`moma tokenize` on a cluster and `moma build-processor`: what is in their folders when they start."""

import json

import pytest

from helpers.tiny import tiny_processor
from modeling_moma.cli import build_processor, tokenize


def test_same_command_after_the_tasks_of_datatrove_writes_the_manifest(tmp_path, capsys):
    tiny_processor().save_pretrained(tmp_path / "processor")
    (tmp_path / "lines.txt").write_text("red apple\ncastle\ngreen apple\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"sources: {{lines: {{data: {tmp_path}/lines.txt, text: text, held_out: 0}}}}\n")
    command = [str(recipe), "--processor", str(tmp_path / "processor"), "--output", str(tmp_path / "tokens")]
    tokenize.main([*command, "--processes", "1"])
    manifest = tmp_path / "tokens" / "manifest.json"
    expected = json.loads(manifest.read_text())
    # as the tasks leave it
    manifest.unlink()
    tokenize.main(command)
    assert json.loads(manifest.read_text()) == expected
    assert "| lines, train | 3 |" in capsys.readouterr().out


def test_folders_of_something_else_are_left_as_they_are(tmp_path):
    processor = tiny_processor()
    processor.save_pretrained(tmp_path / "processor")
    processor.vq_model.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "lines.txt").write_text("red apple\ncastle\n")
    (tmp_path / "recipe.yaml").write_text(f"sources: {{lines: {{data: {tmp_path}/lines.txt, text: text}}}}\n")
    recipe, output = str(tmp_path / "recipe.yaml"), ["--output", str(tmp_path / "processor")]
    before = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "processor").rglob("*"))}
    with pytest.raises(ValueError, match="`--output`.* has files in it already"):
        tokenize.main([recipe, "--processor", str(tmp_path / "processor"), *output, "--processes", "1"])
    # tokens may be made with the processor that lies there
    with pytest.raises(ValueError, match="`--output`.* has files in it already"):
        build_processor.main(
            [recipe, "--image-tokenizer", str(tmp_path / "tokenizer"), *output, "--set", "processor.vocab_size=290"]
        )
    assert {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "processor").rglob("*"))} == before


def test_the_bar_of_texts_counts_shards(tmp_path, capsys):
    tiny_processor().save_pretrained(tmp_path / "processor")
    (tmp_path / "lines.txt").write_text("red apple\n" * 30)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"sources: {{lines: {{data: {tmp_path}/lines.txt, text: text, held_out: 0}}}}\n")
    command = [str(recipe), "--processor", str(tmp_path / "processor"), "--output", str(tmp_path / "tokens")]
    tokenize.main([*command, "--processes", "1", "--rows-per-shard", "10"])
    told = capsys.readouterr().err
    # of quick shards the bar may show the first and the last count alone
    assert "| 0/3 [" in told and "| 3/3 [" in told


@pytest.mark.parametrize("name, value", [("--rows-per-shard", 0), ("--rows-per-shard", -5), ("--processes", 0)])
def test_numbers_below_one_are_refused(capsys, name, value):
    with pytest.raises(SystemExit):
        tokenize.parse_arguments(["recipe.yaml", "--processor", "P", "--output", "T", name, str(value)])
    assert f"{name} = '{value}' must be at least 1" in capsys.readouterr().err
