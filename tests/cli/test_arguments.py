# SPDX-License-Identifier: Apache-2.0
"""Command lines from dataclasses: flags, help and errors of one definition."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest

from modeling_moma.cli.arguments import Flag, FlagParser, parse_fields
from modeling_moma.utils.fields import Count, Share


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
        views: codings of an image.
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
    tasks: Count = 64
    views: Annotated[Count, Flag(section="labeler")] = 1


NEEDED = ["recipe.yaml", "--output", "out", "--folder", "here"]


def parse(*arguments):
    return parse_fields(Arguments, "Does it.", list(arguments), required=("target",))


def test_flags_give_the_fields():
    assert parse(*NEEDED) == Arguments(recipe="recipe.yaml", output="out", folder="here")
    more = ["--prompt", "a", "--prompt", "b", "--sources", "x", "y", "--batch-size", "7", "--top-p", ".5"]
    args = parse(*NEEDED, *more, "--no-probe", "--resume", "--tasks=2", "--mode", "text")
    assert (args.prompt, args.sources, args.batch_size, args.top_p) == (["a", "b"], ["x", "y"], 7, 0.5)
    assert parse(*NEEDED, "--set", "labeler.views=3", "--set", "labeler.views=5").views == 5
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
        ([*NEEDED, "--set", "labeler.views=0"], "labeler.views = '0' must be at least 1: codings of an image."),
        ([*NEEDED, "--set", "labeler.view=2"], "Did you mean 'labeler.views'"),
        ([*NEEDED, "--set", "views=2"], "it is no section.field=value"),
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
    assert "--tasks TASKS how many (default: 64)" in text
    assert text.endswith("labeler.views: codings of an image (default: 1)")
