# SPDX-License-Identifier: Apache-2.0
"""What ruff does not see of docstrings: names of the reference describe their arguments, other functions none."""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest


ROOT = Path(__file__).resolve().parent.parent
# "name (`type`, *optional*, defaults to `x`):" in a line of its own, as Transformers writes it
TYPED = re.compile(r"^\s*(\w+) \((?:\[?`[^`]+`\]?.*)\):$", re.MULTILINE)
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):\n(.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL)
# the description stands below, indented: "name (`type`): description" is another style
INLINE = re.compile(r"^\s*\w+ \(\[?`[^`]+`\]?[^)]*\): .*$", re.MULTILINE)


class Documented(NamedTuple):
    """A function, or a class and the arguments of its `__init__` or its fields."""

    name: str
    docstring: str
    arguments: list[str]
    takes_more: bool
    has_decorator: bool
    is_class: bool


def reference() -> tuple[set[tuple[str, str]], set[str]]:
    """The functions, classes and methods that the pages of the reference list, by package or module, and the methods
    that come from classes above them.
    """
    listed, inherited = set(), set()
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        for block in re.split(r"^::: ", page.read_text(), flags=re.MULTILINE)[1:]:
            place, _, name = block.split()[0].rpartition(".")
            listed.add((place, name))
            for kind, members in re.findall(r"^ +(inherited_|)members: \[(.*)\]$", block, re.MULTILINE):
                if kind:
                    inherited.update(members.split(", "))
                else:
                    listed.update((place, f"{name}.{member}") for member in members.split(", "))
    return listed, inherited


def read(node: ast.FunctionDef | ast.ClassDef, name: str, function: ast.FunctionDef | None) -> Documented:
    """The docstring of a node, and the arguments of its function, for a class the `__init__` where it has one."""
    names, takes_more = [], False
    if function is not None:
        given = function.args
        names = [one.arg for one in [*given.posonlyargs, *given.args, *given.kwonlyargs]]
        names += [one.arg for one in (given.vararg, given.kwarg) if one is not None]
        names = [name for name in names if name not in ("self", "cls")]
        takes_more = given.kwarg is not None
    elif any(ast.unparse(one).startswith("dataclass") for one in node.decorator_list):
        names = [one.target.id for one in node.body if isinstance(one, ast.AnnAssign)]
    else:
        # those of its base class
        takes_more = True
    # it writes the arguments that all models share
    has_decorator = any("auto_docstring" in ast.unparse(one) for one in node.decorator_list)
    is_class = isinstance(node, ast.ClassDef)
    return Documented(name, ast.get_docstring(node) or "", names, takes_more, has_decorator, is_class)


def documented(source: str) -> list[Documented]:
    """The public functions, classes and methods of a module."""
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name[0] != "_":
            found.append(read(node, node.name, node))
        if isinstance(node, ast.ClassDef) and node.name[0] != "_":
            methods = {one.name: one for one in node.body if isinstance(one, ast.FunctionDef)}
            found.append(read(node, node.name, methods.get("__init__")))
            public = [one for one in methods.values() if one.name[0] != "_" or one.name == "__call__"]
            found += [read(one, f"{node.name}.{one.name}", one) for one in public]
    return found


def faults(source: str, listed: set[str], inherited: set[str]) -> list[str]:
    """What is wrong with the docstrings of a module, some names of which the reference lists."""
    wrong = []
    for entry in documented(source):
        wrong += [
            f"{entry.name}: {line.strip()!r}: its text belongs below" for line in INLINE.findall(entry.docstring)
        ]
        sections = dict(SECTION.findall(entry.docstring))
        is_inherited = "." in entry.name and entry.name.partition(".")[2] in inherited
        is_listed = entry.name in listed or is_inherited
        # fields of records may be described anywhere
        if sections and not (is_listed or entry.is_class or entry.has_decorator):
            wrong.append(f"{entry.name}: {', '.join(sections)} of a name that no page of the reference lists")
            continue
        if not {"Args", "Attributes"} & set(sections):
            # a method of one line says what it takes by its names
            is_short = "." in entry.name and "\n" not in entry.docstring
            if is_listed and set(entry.arguments) - {"kwargs"} and not (is_short or entry.has_decorator):
                wrong.append(f"{entry.name}: it has no Args")
            continue
        typed = TYPED.findall(sections.get("Args", ""))
        # the fields of a record may stand among its attributes, properties beside them
        described = {*typed, *TYPED.findall(sections.get("Attributes", ""))}
        missing = [name for name in entry.arguments if name not in described and name[0] != "_"]
        if set(typed) - set(entry.arguments):
            # the names that kwargs may have stand in its place
            missing = [name for name in missing if name != "kwargs"]
        wrong += [f"{entry.name}: {name} has no type" for name in missing]
        if not entry.takes_more:
            wrong += [
                f"{entry.name}: {name} is no argument" for name in typed if name not in [*entry.arguments, "self"]
            ]
    return wrong


@pytest.mark.parametrize("package", ["modeling_moma", "tokenization"])
def test_docstrings_describe_the_arguments_of_the_reference(package):
    listed, inherited = reference()
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        names = {name for place, name in listed if f"{module}.".startswith(f"{place}.")}
        found[module] = faults(path.read_text(), names, inherited)
    assert {module: wrong for module, wrong in found.items() if wrong} == {}


GOOD = """Read.

    Args:
        a (`int`):
            A number.
        b (`str`, *optional*, defaults to `"x"`):
            A name.
    """


@pytest.mark.parametrize(
    "docstring, expected",
    [
        (GOOD, []),
        (GOOD.replace(" (`int`)", ""), ["f: a has no type"]),
        (GOOD.replace("b (", "c ("), ["f: b has no type", "f: c is no argument"]),
        ("Read.", ["f: it has no Args"]),
    ],
)
def test_missing_types_and_missing_arguments_are_found(docstring, expected):
    source = f'def f(a, b="x"):\n    """{docstring}"""\n'
    assert faults(source, {"f"}, set()) == expected
