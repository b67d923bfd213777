# SPDX-License-Identifier: Apache-2.0
"""The code that travels with a model: which files of the installed packages a configuration's `auto_map` leads to."""

import ast
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import tokenization


PACKAGES = (Path(__file__).resolve().parents[1], Path(tokenization.__file__).resolve().parent)


@lru_cache(maxsize=256)
def code_facts(source: bytes) -> tuple[frozenset[str], frozenset[str]]:
    """Return the classes of a module, and the sibling modules that it imports."""
    tree, siblings = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            siblings |= {node.module} if node.module else {alias.name for alias in node.names}
    return frozenset(node.name for node in tree.body if isinstance(node, ast.ClassDef)), frozenset(siblings)


def code_closure(files: Mapping[str, Path], references: Iterable[str]) -> set[str]:
    """Return the files of code that the references name, with all that these import relatively, where they exist."""
    pending, found = [reference.split("--")[-1].split(".")[0] + ".py" for reference in references], set()
    while pending:
        name = pending.pop()
        if name in found or name not in files:
            continue
        found.add(name)
        try:
            pending += [f"{module}.py" for module in code_facts(files[name].read_bytes())[1]]
        except (SyntaxError, ValueError):
            # `check_code` tells of it
            continue
    return found


def installed_code(references: Iterable[str]) -> dict[str, Path]:
    """Return the installed packages' files for the classes of an `auto_map`, with all that these import."""
    files = {path.name: path for package in PACKAGES for path in sorted(package.glob("*_moma*.py"))}
    return {name: files[name] for name in sorted(code_closure(files, references))}
