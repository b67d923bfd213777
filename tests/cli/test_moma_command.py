# SPDX-License-Identifier: Apache-2.0
"""The command `moma`: its list of verbs, what it does with a name that is none, and where verbs find their modules."""

import importlib
import subprocess
import sys

import pytest

from modeling_moma import MomaConfig
from modeling_moma.cli.main import VERBS, main
from modeling_moma.errors_moma import InputError
from tokenization.processor_errors_moma import InputError as ProcessorInputError


def test_help_lists_every_verb_with_one_line(capsys):
    for arguments in (["--help"], ["-h"], []):
        assert main(arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        listed = {line.split()[0]: line for line in lines if line.startswith("  ")}
        assert list(listed) == list(VERBS)
        assert all(len(line) < 120 and len(line.split()) > 2 for line in listed.values())


def test_unknown_verb_is_named_with_the_known_ones(capsys):
    assert main(["trian"]) == 2
    error = capsys.readouterr().err
    assert "'trian'" in error and all(verb in error for verb in VERBS)


def fail_in_a_call():
    int("none")


def fail_by_a_plain_error():
    raise ValueError("none of its callers gave this")


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "serve"])
def test_help_of_a_verb_names_the_command(verb, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([verb, "--help"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: moma {verb} ")


# every verb twice in one process: what an import prints stands in the first answer alone
_ALL_HELP = """
import os
import sys
from modeling_moma.cli.main import VERBS, main
for verb in (None, *VERBS):
    for _ in range(2):
        os.write(1, b"\\0")
        try:
            main(["--help"] if verb is None else [verb, "--help"])
        except SystemExit as end:
            assert not end.code, end.code
        sys.stdout.flush()
"""


def test_help_prints_nothing_but_help(tmp_path):
    done = subprocess.run([sys.executable, "-c", _ALL_HELP], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    before, *answers = done.stdout.split("\0")
    assert before == "" and len(answers) == 2 * (len(VERBS) + 1)
    for verb, first, second in zip(["VERB", *VERBS], answers[::2], answers[1::2]):
        assert first == second
        assert first.strip().lower().startswith(f"usage: moma {verb.lower()} ")


def test_every_verb_has_a_main():
    for module in VERBS.values():
        assert callable(importlib.import_module(f"modeling_moma.cli.{module}").main)


def test_what_is_wrong_with_an_input_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("sources: {photos: {data: photos, image: image, text: label, wieght: 1}}")
    assert main(["tokenize", "recipe.yaml", "--processor", "none", "--output", "out"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "wieght" in error and "Traceback" not in error


def test_field_of_a_configuration_that_is_out_of_range_is_one_line(monkeypatch, capsys):
    module = importlib.import_module("modeling_moma.cli.push")
    monkeypatch.setattr(module, "main", lambda: MomaConfig(hidden_size=-1))
    assert main(["push"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "hidden_size" in error


@pytest.mark.parametrize("error_class", [InputError, ProcessorInputError])
def test_input_error_of_either_package_is_one_line(error_class, monkeypatch, capsys):
    def fail():
        raise error_class("`--model` 'x':\nit is none.")

    monkeypatch.setattr(importlib.import_module("modeling_moma.cli.push"), "main", fail)
    assert main(["push"]) == 2
    assert capsys.readouterr().err == "error: `--model` 'x': it is none.\n"


@pytest.mark.parametrize("fail", [fail_in_a_call, fail_by_a_plain_error])
def test_defect_keeps_its_traceback(fail, monkeypatch):
    monkeypatch.setattr(importlib.import_module("modeling_moma.cli.push"), "main", fail)
    with pytest.raises(ValueError, match="none") as raised:
        main(["push"])
    assert raised.type is ValueError


def test_module_and_command_are_the_same(tmp_path):
    command = [sys.executable, "-m", "modeling_moma", "plan", "--preset", "moma-90m-4t4i", "--gpus", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "Recommended" in done.stdout and done.stderr == "", done.stderr
