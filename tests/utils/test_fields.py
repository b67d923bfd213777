# SPDX-License-Identifier: Apache-2.0
"""Dataclasses as the one definition of fields: what they take, and what a user is told of all else."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from modeling_moma.utils.fields import Count, Float, Int, OnOff, Share, choices, descriptions, read_fields


@dataclass(frozen=True)
class Part:
    __pydantic_config__ = {"extra": "forbid"}

    text: str
    share: Share


@dataclass(frozen=True)
class Base:
    """
    What others have, too.

    Args:
        steps: steps of
            a training. They count.
        unused: said again below.
    """

    steps: Count = 3
    unused: int = 0


@dataclass(frozen=True)
class Settings(Base):
    """
    Settings.

    Args:
        rate (`float`, *optional*, defaults to `1.0`):
            largest one: of all.
        unused: of nothing.

    Returns:
        nothing: at all.
    """

    rate: Annotated[Float, Field(gt=0)] = 1.0
    held_out: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    limit: Count | None = None
    source: str | dict[str, Any] | None = None
    mode: Literal["a", "b"] = "a"
    switch: Annotated[Literal["auto", "on", "off"], OnOff] = "auto"
    parts: tuple[Part, ...] = ()
    names: list[str] = field(default_factory=list)
    is_packed: bool = True
    seed: Int = 0


def test_the_docstring_says_what_a_field_is():
    assert descriptions(Settings) == {
        "steps": "steps of a training. They count.",
        "rate": "largest one: of all.",
        "unused": "of nothing.",
    }
    assert descriptions(Part) == {}


def test_values_of_yaml_become_those_of_the_fields():
    given = {"rate": "1e-3", "switch": True, "parts": [{"text": "x", "share": 1}], "seed": "4", "limit": None}
    settings = read_fields(Settings, given, "RECIPE")
    assert settings == Settings(rate=1e-3, switch="on", parts=(Part("x", 1.0),), seed=4)
    assert type(settings.seed) is int and type(settings.rate) is float


@pytest.mark.parametrize(
    "given, said",
    [
        ({"steps": 0}, "RECIPE: steps = 0 must be at least 1: steps of a training. They count."),
        ({"steps": 2.5}, "RECIPE: steps = 2.5 must be an integer: steps of a training. They count."),
        ({"steps": True}, "RECIPE: steps = True must be a number: steps of a training. They count."),
        ({"rate": float("nan")}, "RECIPE: rate = nan must be above 0: largest one: of all."),
        ({"held_out": 1}, "RECIPE: held_out = 1 must be at least 0 and below 1."),
        ({"source": 3}, "RECIPE: source = 3 must be a text or a mapping."),
        ({"mode": "c"}, "RECIPE: mode = 'c' must be one of 'a', 'b'."),
        ({"parts": [{"text": "x", "share": 2}]}, "RECIPE: parts[0].share = 2 must be at most 1."),
        ({"parts": [{"text": "x"}]}, "RECIPE: parts[0] = {'text': 'x'} must be a mapping with 'share'."),
        ({"names": "x"}, "RECIPE: names = 'x' must be a list."),
        ({"is_packed": "maybe"}, "RECIPE: is_packed = 'maybe' must be true or false."),
        ({"sed": 1}, "RECIPE: 'sed' is no field of Settings. Did you mean 'seed'? It takes"),
        ({7: 1}, "RECIPE: 7 is no field of Settings. It takes"),
    ],
)
def test_what_no_field_takes_is_named_with_what_it_may_be(given, said):
    with pytest.raises(ValueError) as raised:
        read_fields(Settings, given, "RECIPE", "Settings")
    assert str(raised.value).startswith(said) and "\n" not in str(raised.value)


def test_nested_name_that_is_unknown_is_named():
    with pytest.raises(ValueError, match=r"parts\[0\].*without 'extra'"):
        read_fields(Settings, {"parts": [{"text": "x", "share": 1, "extra": 1}]}, "RECIPE")


def test_missing_field_is_named():
    with pytest.raises(ValueError, match="RECIPE: this section needs 'share'; it has ..text..*"):
        read_fields(Part, {"text": "x"}, "RECIPE")


def test_choices_are_found_in_any_type():
    assert choices(Literal["a", "b"]) == choices(list[Literal["a", "b"]] | None) == ("a", "b")
    assert choices(Annotated[Literal["a"], OnOff]) == ("a",) and choices(dict[str, int] | None) == ()
