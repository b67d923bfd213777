# SPDX-License-Identifier: Apache-2.0
"""Command lines from dataclasses: flags, help and errors of one definition."""

import argparse
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest

from modeling_moma.cli.arguments import Flag, FlagParser, add_renamed, parse_fields
from modeling_moma.utils.fields import Count, FormerName, Share


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """
    Args:
        recipe: the file.
        output: where all of it goes, 100% of it.
        prompt: words; give it again for more rows.
        sources: these alone.
        mode: what comes out.
        batch_size: rows at once.
        top_p: share of the probability.
        resume: go on.
        probe: do not compare.
        repo_id: a name.
        folder: a place.
        tasks: how many.
    """

    recipe: Annotated[str, Flag(metavar="RECIPE", is_positional=True)]
    output: str
    prompt: Annotated[list[str], Flag(is_repeated=True)] = field(default_factory=list)
    sources: Annotated[list[str] | None, Flag(metavar="NAME")] = None
    mode: Literal["text", "image"] | None = None
    batch_size: Count = 3
    top_p: Share = 1.0
    resume: bool = False
    probe: Annotated[bool, Flag(name="--no-probe")] = True
    repo_id: Annotated[str | None, Flag(one_of="target")] = None
    folder: Annotated[str | None, Flag(one_of="target")] = None
    tasks: Annotated[Count, Flag(section="on a cluster")] = 64


NEEDED = ["recipe.yaml", "--output", "out", "--folder", "here"]


def parse(*arguments):
    return parse_fields(Arguments, "Does it.", list(arguments), required=("target",))


def test_flags_give_the_fields():
    assert parse(*NEEDED) == Arguments(recipe="recipe.yaml", output="out", folder="here")
    more = ["--prompt", "a", "--prompt", "b", "--sources", "x", "y", "--batch-size", "7", "--top-p", ".5"]
    args = parse(*NEEDED, *more, "--no-probe", "--resume", "--tasks=2", "--mode", "text")
    assert (args.prompt, args.sources, args.batch_size, args.top_p) == (["a", "b"], ["x", "y"], 7, 0.5)
    assert (args.probe, args.resume, args.tasks, args.mode) == (False, True, 2, "text")


def test_only_what_is_given_is_read():
    given = FlagParser(Arguments).read([*NEEDED, "--batch-size", "3"])
    assert given == {"recipe": "recipe.yaml", "output": "out", "folder": "here", "batch_size": 3}


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([*NEEDED, "--top-p", "2"], "--top-p = '2' must be between 0 and 1: share of the probability."),
        ([*NEEDED, "--batch-size", "0"], "--batch-size = '0' must be at least 1: rows at once."),
        ([*NEEDED, "--batch-size", "x"], "--batch-size = 'x' must be an integer: rows at once."),
        ([*NEEDED, "--mode", "sound"], "argument --mode: invalid choice: 'sound'"),
        ([*NEEDED, "--repo-id", "a/b"], "argument --repo-id: not allowed with argument --folder"),
        ([*NEEDED, "--resum"], "unrecognized arguments: --resum"),
        (["recipe.yaml", "--output", "out"], "one of the arguments --repo-id --folder is required"),
        (["--output", "out", "--folder", "here"], "the following arguments are required: RECIPE"),
    ],
)
def test_what_is_wrong_is_one_line_below_the_usage(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(*arguments)
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert said in line


def test_help_is_the_docstring_with_the_defaults():
    text = " ".join(FlagParser(Arguments, description="Does it.").format_help().split())
    assert "RECIPE the file" in text and "where all of it goes, 100% of it --prompt" in text
    assert "--batch-size BATCH_SIZE rows at once (default: 3)" in text
    assert "--top-p TOP_P share of the probability (default: 1.0)" in text
    assert "--sources NAME [NAME ...] these alone --mode {text,image} what comes out --batch-size" in text
    assert "--no-probe do not compare --repo-id" in text
    assert text.endswith("on a cluster: --tasks TASKS how many (default: 64)")


@dataclass(frozen=True, kw_only=True)
class Renamed:
    held_out_rows: Annotated[Count, FormerName("held_out_lines")] = 8


def test_an_old_flag_is_read_with_a_warning_that_says_the_new_one(capsys):
    said = "^--held-out-lines is --held-out-rows now; the old name goes with the next release"
    with pytest.warns(FutureWarning, match=said):
        assert FlagParser(Renamed).read(["--held-out-lines", "3"]) == {"held_out_rows": 3}
    with pytest.warns(FutureWarning), pytest.raises(SystemExit):
        FlagParser(Renamed).read(["--held-out-lines", "0"])
    assert "--held-out-rows = '0' must be at least 1" in capsys.readouterr().err


def test_the_new_flag_warns_nobody_and_help_shows_it_alone(recwarn):
    assert FlagParser(Renamed).read(["--held-out-rows", "3"]) == {"held_out_rows": 3}
    assert not recwarn.list and "lines" not in FlagParser(Renamed).format_help()


def test_parsers_of_scripts_keep_type_and_default_of_a_renamed_flag():
    parser = argparse.ArgumentParser()
    add_renamed(parser, "--rows", "--lines", type=int, default=4)
    assert parser.parse_args([]).rows == 4 and parser.parse_args(["--rows", "3"]).rows == 3
    with pytest.warns(FutureWarning, match="^--lines is --rows now"):
        assert parser.parse_args(["--lines", "3"]).rows == 3
