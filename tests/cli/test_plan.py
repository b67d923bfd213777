# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest

from modeling_moma.cli.main import main as moma
from modeling_moma.cli.plan import TABLE, duration
from modeling_moma.configuration_moma import MomaConfig
from modeling_moma.planning import plans
from modeling_moma.utils import atomic_files


ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "how-to" / "scaling.md"


def main(arguments):
    return moma(["plan", *arguments])


def test_the_table_lists_layouts_that_fit_and_recommends_the_first(capsys):
    assert main(["--preset", "moma-1.4b-4t4i", "--gpus", "64", "--top", "3", "--steps", "1000"]) == 0
    table, note = capsys.readouterr().out.split("\n\n")
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert len(rows) == 3
    assert all(float(row[1]) <= 72 for row in rows)
    assert note.startswith(f"Recommended: {rows[0][0]}, ")
    assert "1,000 steps take" in note
    assert "Do not fit, even one sequence at a time: DDP 64 (" in note


@pytest.mark.parametrize("steps", ["0", "-5"])
def test_a_number_of_steps_is_positive(steps, capsys):
    with pytest.raises(SystemExit):
        main(["--preset", "moma-90m-4t4i", "--steps", steps])
    assert "--steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(120_000, "1.4 days"), (86_400, "1.0 days"), (5_400, "1.5 hours"), (150, "2.5 minutes"), (0.34, "0.3 seconds")],
)
def test_short_trainings_are_told_in_smaller_units(seconds, told):
    assert duration(seconds) == told


def test_json_holds_every_layout_in_bytes_and_seconds(capsys):
    assert main(["--preset", "moma-1.4b-4t4i", "--gpus", "64", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["arguments"]["gpus"] == 64
    assert report["plans"][0]["layout"]["name"] == "HSDP 8 x 8"
    assert report["plans"][0]["memory"]["total"] < 72e9 < report["do_not_fit"][0]["least_memory"]
    exchanges = {item["name"] for plan in report["plans"] for item in plan["collectives"]}
    assert {"weights", "experts", "tokens to experts"} <= exchanges


def test_the_overview_has_the_fastest_layout_of_every_preset(capsys):
    assert main(["--overview"]) == 0
    rows = dict(line.strip("| ").split(" | ", 1) for line in capsys.readouterr().out.splitlines()[2:])
    assert list(rows) == MomaConfig.preset_names()
    assert rows["moma-90m-4t4i"].startswith("one copy, 9 GB | DDP 8, ")
    assert rows["moma-1.4b-4t4i"].startswith("does not fit | FSDP 8, 70 GB | HSDP 8 x 8, ")


def test_a_config_serves_as_well_as_a_preset(capsys):
    for config in ("model_cards/moma-emoji", "model_cards/moma-emoji/config.json"):
        arguments = ["--config", str(ROOT / config), "--gpus", "1", "--sequence-length", "128"]
        assert main([*arguments, "--tokens-per-gpu", "8192"]) == 0
        assert "Recommended: one copy" in capsys.readouterr().out


def test_where_nothing_fits_the_smallest_need_is_told(capsys):
    assert main(["--preset", "moma-1.4b-4t4i", "--gpus", "1"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "no layout fits 1 GPUs of 80 GB: the smallest, one copy, needs 1" in output.err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--preset", "moma-90m-4t4i", "--gpus", "9"], "no whole number of nodes"),
        (["--preset", "moma-90m-4t4i", "--set", "hardware.utilization=2"], "`utilization` is a share"),
        (["--preset", "moma-90m-4t4i", "--set", "hardware.flop=2"], "Did you mean 'hardware.flops'"),
        (["--preset", "moma-90m-4t4i", "--set", "flops=2"], "it is no section.field=value"),
        (["--preset", "moma-90m-4t4i", "--set", "hardware.flops=many"], "flops = 'many' must be a number"),
        (["--config", "nowhere"], "nowhere"),
        (["--write", "nowhere.md"], "nowhere.md"),
        (["--write", ""], "--write '': it names no document"),
        (["--write", str(DOCUMENT), "--gpus", "64"], "--write takes no --gpus,"),
        (["--preset", "moma-90m-4t4i", "--json", "--top", "1", "--steps", "5"], "--json takes no --steps, --top,"),
        (["--overview", "--gpus", "64", "--json"], "--overview takes no --gpus, --json,"),
    ],
)
def test_bad_arguments_are_told_in_one_line(arguments, match, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert match in error and error.startswith("error: ")


def test_an_incomplete_config_is_told_with_the_likely_cause(capsys):
    assert main(["--config", str(ROOT / "recipes" / "emoji.yaml")]) == 2
    error = capsys.readouterr().err.strip()
    assert "emoji.yaml: no complete MomaConfig. Does it lack the token layout" in error
    assert error.startswith("error: ") and "\n" not in error


@pytest.mark.parametrize(
    ("option", "content", "match"),
    [
        ("--config", b"[1]", "no complete MomaConfig"),
        ("--config", b"\xff", "no complete MomaConfig"),
        ("--config", b'{"model_type": "llama", "hidden_size": 64}', "`model_type` is 'llama'; a MoMa's says 'moma'"),
        ("--config", b"{}", "`model_type` is None"),
        ("--write", b"\xff", "can't decode byte 0xff"),
        ("--write", b'<!-- plan: --preset "moma -->\n<!-- /plan -->\n', "cannot be read: No closing quotation"),
    ],
)
def test_a_file_of_something_else_is_told_in_one_line(option, content, match, tmp_path, capsys):
    path = tmp_path / "file"
    path.write_bytes(content)
    assert main([option, str(path)]) == 2
    error = capsys.readouterr().err.strip()
    assert match in error and str(path) in error and error.startswith("error: ") and "\n" not in error


@pytest.mark.parametrize("fields", [{"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, {"dtype": "fp8"}])
def test_a_field_that_transformers_cannot_read_is_told_in_one_line(fields, tmp_path, capsys):
    config = json.loads(MomaConfig.from_preset("moma-90m-4t4i").to_json_string())
    (tmp_path / "config.json").write_text(json.dumps({**config, **fields}))
    assert main(["--config", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: --config {tmp_path}/config.json: no complete MomaConfig.") and "\n" not in error


def test_defect_keeps_its_traceback(monkeypatch):
    def fail(*args):
        raise ValueError("none of the arguments did this")

    monkeypatch.setattr(plans, "plan_training", fail)
    with pytest.raises(ValueError, match="none of the arguments"):
        main(["--preset", "moma-90m-4t4i"])


def test_a_folder_without_a_config_is_refused(tmp_path, capsys):
    assert main(["--config", str(tmp_path)]) == 2
    assert "the folder has no config.json" in capsys.readouterr().err


def test_tables_of_a_document_are_computed_anew(tmp_path, capsys):
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- plan: --preset moma-90m-4t4i --gpus 1 -->\nold\n<!-- /plan -->\nafter\n")
    assert main(["--write", str(document)]) == 0
    text = document.read_text()
    assert text.startswith("before\n<!-- plan: --preset moma-90m-4t4i --gpus 1 -->\n| layout |")
    assert text.endswith("days.\n<!-- /plan -->\nafter\n") or text.endswith("GPU.\n<!-- /plan -->\nafter\n")
    assert "old" not in text
    (tmp_path / "none.md").write_text("no table")
    assert main(["--write", str(tmp_path / "none.md")]) == 2
    assert "no table between" in capsys.readouterr().err


def test_a_link_stays_one_and_line_ends_are_kept(tmp_path, capsys):
    document, link = tmp_path / "page.md", tmp_path / "link.md"
    document.write_bytes("é\r\n<!-- plan: --preset moma-90m-4t4i --gpus 1 -->\r\nold\r\n<!-- /plan -->\r\n".encode())
    link.symlink_to(document)
    assert main(["--write", str(link)]) == 0
    assert link.is_symlink()
    written = document.read_bytes()
    assert written.startswith("é\r\n".encode()) and b"| layout |" in written and b"old" not in written
    assert written.count(b"\n") == written.count(b"\r\n")
    document.write_text("<!-- plan: --preset moma-90m-4t4i --json -->\n<!-- /plan -->\n")
    assert main(["--write", str(document)]) == 2
    assert "make no table: leave out --json" in capsys.readouterr().err


def test_a_document_that_cannot_be_written_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise PermissionError("not here")

    monkeypatch.setattr(atomic_files, "atomic_write", refuse)
    document = tmp_path / "page.md"
    document.write_text("<!-- plan: --preset moma-90m-4t4i --gpus 1 -->\n<!-- /plan -->\n")
    assert main(["--write", str(document)]) == 2
    assert capsys.readouterr().err == f"error: --write {document}: not here\n"


def test_the_page_on_scaling_holds_what_the_script_computes(tmp_path):
    copy = tmp_path / "scaling.md"
    copy.write_text(DOCUMENT.read_text())
    assert len(TABLE.findall(copy.read_text())) >= 3
    assert main(["--write", str(copy)]) == 0
    assert copy.read_text() == DOCUMENT.read_text(), "run: moma plan --write docs/how-to/scaling.md"
