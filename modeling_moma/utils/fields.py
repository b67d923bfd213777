# SPDX-License-Identifier: Apache-2.0
"""Fields of recipes and command lines: a dataclass says their types, ranges and meaning, and pydantic checks them."""

import dataclasses
import functools
import inspect
import re
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from ..errors_moma import InputError


T = TypeVar("T")


def check_utf8(what: str, text: str) -> None:
    """Raise `ValueError` where a text of a command line holds bytes that are none in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} {text!r}: it is no text in UTF-8 (character {error.start}).") from error


def _is_number(value: Any) -> Any:
    if isinstance(value, bool):
        raise InputError("a number")
    return value


# YAML's `true` is not the number 1, and text such as 1e-3 may be one
Int = Annotated[int, BeforeValidator(_is_number)]
Float = Annotated[float, BeforeValidator(_is_number), Field(allow_inf_nan=False)]
NotNegative = Annotated[Float, Field(ge=0)]
Share = Annotated[Float, Field(ge=0, le=1)]
Count = Annotated[Int, Field(ge=1)]
# NumPy takes no other, and Transformers seeds it together with torch
Seed = Annotated[Int, Field(ge=0, lt=2**32)]
# YAML reads the words as truth
OnOff = BeforeValidator(lambda value: {True: "on", False: "off"}[value] if isinstance(value, bool) else value)


def read_fields(kind: type[T], values: Mapping[str, Any], where: str, holder: str = "this section") -> T:
    """Return a dataclass of values by name."""
    entries = dataclasses.fields(kind)  # pyright: ignore[reportArgumentType]
    refuse_unknown(values, [entry.name for entry in entries], where, holder)
    for entry in entries:
        has_default = entry.default is not dataclasses.MISSING or entry.default_factory is not dataclasses.MISSING
        if not has_default and entry.name not in values:
            raise InputError(f"{where}: {holder} needs {entry.name!r}; it has {list(values)}.")
    return kind(**{name: read_field(kind, name, value, f"{where}: {name}") for name, value in values.items()})


def read_field(kind: type, name: str, value: Any, where: str) -> Any:
    """Return a value as a field of a dataclass takes it."""
    try:
        return _adapter(kind, name).validate_python(value)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    place = _place(problems[0])
    # a value of several types has a problem with each of them
    words = dict.fromkeys(_in_words(problem) for problem in problems if _place(problem) == place)
    bounds = "" if place else _range(annotations(kind)[name])
    said = bounds if bounds and problems[0]["type"] in _OUT_OF_RANGE else f"must be {' or '.join(words)}"
    meaning = descriptions(kind).get(name, "") if not place else ""
    raise InputError(
        f"{where}{place} = {problems[0]['input']!r} {said}{': ' if meaning else ''}{meaning.rstrip('.')}."
    )


def refuse_unknown(
    given: Iterable[Any], known: Collection[str], where: str, holder: str, is_listed: bool = True
) -> None:
    """Raise `ValueError` where a name is none of those that are known."""
    unknown = sorted((name for name in given if name not in known), key=str)
    if not unknown:
        return
    close = get_close_matches(str(unknown[0]), list(known), 1)
    meant = f" Did you mean {close[0]!r}?" if close else "" if is_listed else " Is it misspelt?"
    listed = f" It takes {sorted(known)}." if is_listed else ""
    raise InputError(f"{where}: {unknown[0]!r} is no field of {holder}.{meant}{listed}")


@functools.cache
def annotations(kind: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields with what is said of them, by name."""
    return get_type_hints(kind, include_extras=True)


@functools.cache
def descriptions(kind: type) -> dict[str, str]:
    """Return what the docstrings of a dataclass and of its bases say of its fields, by name, each in one line."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        section = re.search(r"^Args:\n((?: +.*\n|\n)*)", inspect.cleandoc(base.__doc__ or "") + "\n", re.MULTILINE)
        name, own = "", {}
        for line in textwrap.dedent(section[1]).splitlines() if section else ():
            entry = re.match(r"(\w+)(?: \(.*?\))?:(?: (.*)|$)", line)
            name, text = (entry[1], entry[2] or "") if entry else (name, line.strip())
            own[name] = f"{own[name]} {text}".strip() if name in own else text
        found |= own
    return found


def choices(annotation: Any) -> tuple[Any, ...]:
    """Return the values that a type with [`Literal`] names, nothing where it names none."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(value for part in get_args(annotation) for value in choices(part))


_OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")
_NAMES = {"missing": "with", "unexpected_keyword_argument": "without"}
# expected type in words, by the first part of pydantic's error name
_WORDS = {
    "int": "an integer",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "a text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "dataclass": "a mapping",
}


def _in_words(problem: Any) -> str:
    """Return what a value must be, of an error of pydantic."""
    kind, told = problem["type"], problem.get("ctx", {})
    if kind == "value_error":
        return str(told["error"])
    if kind == "literal_error":
        return f"one of {told['expected'].replace(' or ', ', ')}"
    if kind in _OUT_OF_RANGE and kind != "finite_number":
        return _bounds(told)
    if kind in _NAMES:
        return f"a mapping {_NAMES[kind]} {problem['loc'][-1]!r}"
    return _WORDS.get(kind.split("_")[0]) or str(problem["msg"])


def _range(annotation: Any) -> str:
    """Return the range of a number, of all bounds that its type has."""
    found: dict[str, float] = {}
    for part in get_args(annotation):
        for bound in getattr(part, "metadata", ()):
            found |= {name: getattr(bound, name) for name in ("ge", "gt", "le", "lt") if hasattr(bound, name)}
    return f"must be {_bounds(found)}" if found else ""


def _bounds(found: Mapping[str, float]) -> str:
    if found.keys() >= {"ge", "le"}:
        return f"between {found['ge']:g} and {found['le']:g}"
    titles = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return " and ".join(f"{titles[name]} {found[name]:g}" for name in titles if name in found)


def _place(problem: Any) -> str:
    """Return where in a value an error is; names of fields follow an index, all other names are those of types."""
    # the input is then what ought to hold it
    path: Sequence[int | str] = problem["loc"][:-1] if problem["type"] in _NAMES else problem["loc"]
    parts = zip([None, *path], path)
    return "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" if isinstance(before, int) else ""
        for before, part in parts
    )


@functools.cache
def _adapter(kind: type, name: str) -> TypeAdapter:
    return TypeAdapter(annotations(kind)[name])
