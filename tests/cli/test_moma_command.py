# SPDX-License-Identifier: Apache-2.0
"""The command `moma`: its subcommands, what it does with a name that is none, and where it finds their modules."""

import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from PIL import Image

from helpers.forked_python import own_words, run_python
from helpers.tiny import tiny_model, tiny_processor
from modeling_moma import MomaConfig
from modeling_moma.cli import convert, evaluate, generate, plan
from modeling_moma.cli.main import SUBCOMMANDS, main
from modeling_moma.cli.starting import starts_command
from modeling_moma.convert import llama
from modeling_moma.errors_moma import InputError
from modeling_moma.evaluation import evaluate as measuring
from modeling_moma.evaluation import retrieval
from modeling_moma.frames_moma import IMAGE, TEXT
from modeling_moma.generation_moma import INTERLEAVED
from modeling_moma.planning.plans import GIGA, Hardware
from modeling_moma.training.tokenizer_settings import TokenizerSettings
from modeling_moma.utils.fields import annotations, choices, descriptions
from tokenization.audio_codecs_moma import AUDIO
from tokenization.configuration_moma_vq import PRESETS
from tokenization.processor_errors_moma import InputError as ProcessorInputError


def test_help_lists_every_subcommand_with_one_line(capsys):
    for arguments in (["--help"], ["-h"], []):
        assert main(arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        listed = {line.split()[0]: line for line in lines if line.startswith("  ")}
        assert list(listed) == list(SUBCOMMANDS)
        assert all(len(line) < 120 and len(line.split()) > 2 for line in listed.values())


def test_unknown_subcommand_is_named_with_the_known_ones(capsys):
    assert main(["trian"]) == 2
    error = capsys.readouterr().err
    assert "'trian'" in error and all(subcommand in error for subcommand in SUBCOMMANDS)


@pytest.mark.parametrize("errors, printed", [("strict", b"\\u65e5.png \xe9\n"), ("replace", b"?.png \xe9\n")])
def test_names_that_the_encoding_of_the_output_lacks_are_escaped(errors, printed, monkeypatch):
    module = importlib.import_module("modeling_moma.cli.label")
    monkeypatch.setattr(module, "parse_arguments", lambda: None)
    monkeypatch.setattr(module, "run", lambda args: print("日.png é"))
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", errors=errors, newline="\n")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["label"]) == 0
    assert stream.buffer.getvalue() == printed and stream.errors == errors


def stop(args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("subcommand", ["tokenize", "pretrain", "evaluate"])
def test_who_stops_a_command_reads_how_it_goes_on(subcommand, monkeypatch, capsys):
    module = importlib.import_module(f"modeling_moma.cli.{SUBCOMMANDS[subcommand]}")
    monkeypatch.setattr(module, "parse_arguments", lambda: None)
    monkeypatch.setattr(module, "run", stop)
    assert main([subcommand]) == 130
    line = capsys.readouterr().err
    assert line.startswith("stopped.") and line.count("\n") == 1
    assert ("--resume" in line, "goes on" in line) == (subcommand == "pretrain", subcommand != "evaluate")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_is_no_error(unbuffered):
    command = [sys.executable, "-m", "modeling_moma", "--help"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 141)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_one_line(unbuffered):
    command = [sys.executable, "-m", "modeling_moma", "--help"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: what this command prints cannot be written: [Errno 28]")


def test_a_command_needs_no_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["--help"]) == 0


def fail_in_a_call():
    int("none")


def fail_by_a_plain_error():
    raise ValueError("none of its callers gave this")


@pytest.mark.parametrize("subcommand", SUBCOMMANDS)
def test_help_of_a_subcommand_names_the_command(subcommand, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([subcommand, "--help"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: moma {subcommand} ")


# every subcommand twice in one process, as the command has it: what an import prints stands in the first answer alone
ALL_HELP = """
import json
import os
import sys
from time import process_time
sys.argv, sys.orig_argv = ["-m"], ["python", "-m", "modeling_moma"]
from modeling_moma.cli.main import SUBCOMMANDS, main
import modeling_moma

def ask(subcommand):
    for _ in range(2):
        os.write(1, b"\\0")
        try:
            main(["--help"] if subcommand is None else [subcommand, "--help"])
        except SystemExit as end:
            assert not end.code, end.code
        sys.stdout.flush()

imported = {}
for subcommand in (None, *SUBCOMMANDS):
    ask(subcommand)
    imported[str(subcommand)] = [name for name in sys.modules if "." not in name]
seconds = process_time()

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
registered = ["moma" in CONFIG_MAPPING]
modeling_moma.freeze_groups
registered.append(type(AutoConfig.for_model("moma")) is modeling_moma.MomaConfig)
assert set(modeling_moma.__all__) <= set(dir(modeling_moma))
os.write(1, b"\\0" + json.dumps({"imported": imported, "seconds": seconds, "registered": registered}).encode())
"""
# in the order in which they are asked
ASKED = ["SUBCOMMAND", *SUBCOMMANDS]


def ask_all_help(folder):
    """The answers, and what is told of the process that gives them."""
    # a library's file that has such a warning tells it when it is first compiled
    command = [sys.executable, "-W", "ignore::SyntaxWarning", "-c", ALL_HELP]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert (done.returncode, own_words(done.stderr)) == (0, "")
    before, *answers, told = done.stdout.split("\0")
    assert before == "" and len(answers) == 2 * len(ASKED)
    return answers, json.loads(told)


@pytest.fixture(scope="module")
def all_help(tmp_path_factory):
    return ask_all_help(tmp_path_factory.mktemp("help"))


def test_help_prints_nothing_but_help(all_help):
    answers, _ = all_help
    for subcommand, first, second in zip(ASKED, answers[::2], answers[1::2]):
        assert first == second
        assert first.strip().lower().startswith(f"usage: moma {subcommand.lower()} ")


HEAVY = {"torch", "transformers", "datasets", "numpy", "PIL", "huggingface_hub", "tokenization"}


def test_help_of_every_subcommand_needs_neither_torch_nor_transformers(all_help):
    _, told = all_help
    assert len(told["imported"]) == len(ASKED)
    for subcommand, names in told["imported"].items():
        assert "modeling_moma" in names and not HEAVY & set(names), subcommand


# of a processor, for all help
SECONDS = 1.0


def test_help_takes_a_moment(all_help, tmp_path):
    # what else a machine does lengthens it now and then
    told = [all_help[1]["seconds"]]
    assert told[0] < SECONDS or any(ask_all_help(tmp_path)[1]["seconds"] < SECONDS for _ in range(2))


def test_public_name_registers_the_auto_classes_first(all_help):
    assert all_help[1]["registered"] == [False, True]


MODULE = [sys.executable, "-m", "modeling_moma"]
SCRIPT = Path(sys.executable).parent / "moma"


def imported(command, *arguments):
    """Names of the packages that a command imports, and what it prints."""
    done = subprocess.run([command[0], "-X", "importtime", *command[1:], *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = re.findall(r"^import time:.*\| +([\w.]+)$", done.stderr, flags=re.MULTILINE)
    return {name.split(".")[0] for name in names}, done.stdout


@pytest.mark.parametrize("subcommand", [None, "pretrain"])
def test_help_needs_neither_torch_nor_transformers(subcommand):
    names, text = imported(MODULE, *([] if subcommand is None else [subcommand]), "--help")
    assert "modeling_moma" in names and text.startswith("usage: moma")
    assert not names & HEAVY


@pytest.mark.skipif(not SCRIPT.is_file(), reason="the package is not installed")
def test_script_needs_neither_torch_nor_transformers():
    names, text = imported([sys.executable, str(SCRIPT)], "--help")
    assert text.startswith("usage: moma") and not names & {"torch", "transformers", "tokenization"}


def test_only_the_command_puts_the_auto_classes_off(tmp_path, monkeypatch):
    script = tmp_path / "bin" / "moma"
    script.parent.mkdir()
    script.write_text("")
    linked = tmp_path / "moma"
    linked.symlink_to(script)
    elsewhere = tmp_path / "elsewhere" / "moma"
    elsewhere.parent.mkdir()
    elsewhere.write_text("")
    monkeypatch.setattr(sys, "executable", str(script.parent / "python"))
    python = ["python", "-X", "dev", "-m"]
    for argv, orig_argv, expected in (
        ([str(script), "--help"], ["python", str(script)], True),
        ([str(linked)], ["python", str(linked)], True),
        # of somebody else, not there, or with the command's arguments already taken
        ([str(elsewhere)], ["python", str(elsewhere)], False),
        (["moma"], ["python"], False),
        (["moma plan", "--gpus", "1"], ["python", str(script)], False),
        # a process that it spawns runs the script once more
        ([str(script)], ["python", "-c", "from multiprocessing.spawn ...", "--multiprocessing-fork"], False),
        (["-m", "--help"], [*python, "modeling_moma", "--help"], True),
        (["-m"], [*python, "pytest", "-m", "modeling_moma"], False),
        (["-c"], ["python", "-c", "import modeling_moma"], False),
        ([""], ["python"], False),
        ([], ["python"], False),
    ):
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sys, "orig_argv", orig_argv)
        assert starts_command() is expected, argv


@pytest.mark.skipif(not SCRIPT.is_file(), reason="the package is not installed")
def test_processes_that_the_script_starts_know_the_auto_classes(tmp_path):
    processor = tiny_processor()
    tiny_model(processor).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    rows = [json.dumps({"text": "a word"}) for _ in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "recipe.yaml").write_text('sources: {rows: {data: rows.jsonl, text: "{text}"}}')
    arguments = ["tokenize", "recipe.yaml", "--processor", "model", "--output", "tokens", "--processes", "2"]
    command = [sys.executable, str(SCRIPT), *arguments, "--rows-per-shard", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and "| rows, train" in done.stdout, done.stderr
    # a model's folder asks to run its code where its type is unknown
    assert "custom code" not in done.stdout + done.stderr


def test_command_loads_a_model_without_its_code(tmp_path):
    processor = tiny_processor()
    tiny_model(processor).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for path in (tmp_path / "model").glob("*.py"):
        path.unlink()
    arguments = ["generate", "--model", "model", "--prompt", "x", "--output", "x.png"]
    done = subprocess.run([*MODULE, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "x.png").size == (16, 16)


def test_help_and_library_have_the_same_choices():
    # the library takes the name of any modality that has a frame
    assert get_args(generate.Mode) == (TEXT, IMAGE, INTERLEAVED, AUDIO)
    assert get_args(evaluate.Measure) == measuring.MEASURES
    assert evaluate.Arguments.retrieval_pairs == retrieval.DEFAULT_PAIRS
    of_llama = annotations(convert.Llama)
    assert choices(of_llama["code_rows"]) == llama.CODE_ROWS
    assert choices(of_llama["image_group"]) == llama.IMAGE_GROUPS
    assert f"a preset ({', '.join(PRESETS)})" in descriptions(TokenizerSettings)["config"]
    assert plan.GIGA == GIGA
    assert plan.hardware_of(plan.parse_arguments(["--overview"])) == Hardware()


def test_every_subcommand_has_a_main():
    for module in SUBCOMMANDS.values():
        for name in ("parse_arguments", "run", "main"):
            assert callable(getattr(importlib.import_module(f"modeling_moma.cli.{module}"), name))


def test_what_is_wrong_with_an_input_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("sources: {photos: {data: photos, image: image, text: label, wieght: 1}}")
    assert main(["tokenize", "recipe.yaml", "--processor", "none", "--output", "out"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "wieght" in error and "Traceback" not in error


def test_field_of_a_configuration_that_is_out_of_range_is_one_line(monkeypatch, capsys):
    module = importlib.import_module("modeling_moma.cli.push")
    monkeypatch.setattr(module, "parse_arguments", lambda: MomaConfig(hidden_size=-1))
    assert main(["push"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "hidden_size" in error


@pytest.mark.parametrize("error_class", [InputError, ProcessorInputError])
def test_input_error_of_either_package_is_one_line(error_class, monkeypatch, capsys):
    def fail():
        raise error_class("`--model` 'x':\nit is none.")

    monkeypatch.setattr(importlib.import_module("modeling_moma.cli.push"), "parse_arguments", fail)
    assert main(["push"]) == 2
    assert capsys.readouterr().err == "error: `--model` 'x': it is none.\n"


@pytest.mark.parametrize("fail", [fail_in_a_call, fail_by_a_plain_error])
def test_defect_keeps_its_traceback(fail, monkeypatch):
    monkeypatch.setattr(importlib.import_module("modeling_moma.cli.push"), "parse_arguments", fail)
    with pytest.raises(ValueError, match="none") as raised:
        main(["push"])
    assert raised.type is ValueError


@pytest.mark.parametrize(
    "message",
    ["[gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:1", "Parent directory x does not exist."],
)
def test_a_training_that_loses_another_of_its_processes_says_so_in_one_line(message, monkeypatch, capsys):
    def lose(args):
        raise RuntimeError(message)

    monkeypatch.setattr(plan, "run", lose)
    # one process alone has none to lose
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(RuntimeError):
        main(["plan", "--preset", "moma-90m-4t4i", "--gpus", "8"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["plan", "--preset", "moma-90m-4t4i", "--gpus", "8"]) == 1
    assert capsys.readouterr().err == "error: another process of this training has ended; its own message says why.\n"


def test_module_and_command_are_the_same(tmp_path):
    done = run_python([*MODULE[1:], "plan", "--preset", "moma-90m-4t4i", "--gpus", "1"], cwd=tmp_path)
    assert done.returncode == 0 and "Recommended" in done.stdout and own_words(done.stderr) == "", done.stderr
