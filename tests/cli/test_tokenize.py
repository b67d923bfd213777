# SPDX-License-Identifier: Apache-2.0
"""`moma tokenize` on a cluster: the command that submitted the jobs adds up what they wrote."""

import json

from helpers.tiny import tiny_processor
from modeling_moma.cli import tokenize


def test_same_command_after_the_jobs_of_a_cluster_writes_the_manifest(tmp_path, capsys):
    tiny_processor().save_pretrained(tmp_path / "processor")
    (tmp_path / "lines.txt").write_text("red apple\ncastle\ngreen apple\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"sources: {{lines: {{data: {tmp_path}/lines.txt, text: text, held_out: 0}}}}\n")
    command = [str(recipe), "--processor", str(tmp_path / "processor"), "--output", str(tmp_path / "tokens")]
    tokenize.main([*command, "--processes", "1"])
    manifest = tmp_path / "tokens" / "manifest.json"
    expected = json.loads(manifest.read_text())
    # as the jobs leave it
    manifest.unlink()
    tokenize.main([*command, "--engine", "slurm", "--partition", "any"])
    assert json.loads(manifest.read_text()) == expected
    assert "| lines, train | 3 |" in capsys.readouterr().out
