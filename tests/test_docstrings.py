# SPDX-License-Identifier: Apache-2.0
"""What ruff does not see of docstrings: every argument that they describe has its type, and none is left out."""

import ast
import importlib
import re
from pathlib import Path
from typing import NamedTuple

import pytest


ROOT = Path(__file__).resolve().parent.parent
# folders whose docstrings are not held to it
PACKAGES = {"tokenization": set(), "modeling_moma": set()}
# "name (`type`, *optional*, defaults to `x`):" in a line of its own, as Transformers writes it
TYPED = re.compile(r"^\s*(\w+) \((?:\[?`[^`]+`\]?.*)\):$", re.MULTILINE)
# the description stands below, indented: "name (`type`): description" is another style
INLINE = re.compile(r"^\s*\w+ \(\[?`[^`]+`\]?[^)]*\): .*$", re.MULTILINE)


class Documented(NamedTuple):
    """A function, or a class and the arguments of its `__init__` or its fields."""

    name: str
    docstring: str
    arguments: list[str]
    takes_more: bool
    has_decorator: bool


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
    return Documented(name, ast.get_docstring(node) or "", names, takes_more, has_decorator)


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


def faults(source: str, exported: set[str]) -> list[str]:
    """What is wrong with the docstrings of a module; `exported` are the names in the `__all__` of its package."""
    wrong = []
    for entry in documented(source):
        wrong += [
            f"{entry.name}: {line.strip()!r}: its text belongs below" for line in INLINE.findall(entry.docstring)
        ]
        sections = dict(re.findall(r"^(Args|Attributes):\n(.*?)(?=^\S|\Z)", entry.docstring, re.MULTILINE | re.DOTALL))
        if not sections:
            # a docstring of one line has the shapes of tensors in itself
            is_short = entry.name not in exported and "\n" not in entry.docstring
            if set(entry.arguments) - {"kwargs"} and not is_short and not entry.has_decorator:
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


@pytest.mark.parametrize("package", PACKAGES)
def test_arguments_in_docstrings_have_types(package):
    exported = set(importlib.import_module(package).__all__)
    paths = sorted(path for path in (ROOT / package).rglob("*.py") if not PACKAGES[package] & set(path.parts))
    found = {str(path.relative_to(ROOT)): faults(path.read_text(), exported) for path in paths}
    assert {path: wrong for path, wrong in found.items() if wrong} == {}


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
        (
            GOOD.replace("`):\n            A num", "`): A num"),
            ["f: 'a (`int`): A number.': its text belongs below", "f: a has no type"],
        ),
        ("Read.", ["f: it has no Args"]),
    ],
)
def test_missing_types_and_missing_arguments_are_found(docstring, expected):
    source = f'def f(a, b="x"):\n    """{docstring}"""\n'
    assert faults(source, {"f"}) == expected
