# SPDX-License-Identifier: Apache-2.0
"""
Plants faults in lines of the packages, one at a time, and says which of them the tests catch.

    python scripts/plant_faults.py draw faults.json --seed 1 --number 40 --also-in 7828eca modeling_moma/*.py
    python scripts/plant_faults.py run faults.json

Drawn are lines that stand once in those files, with `--also-in` those that stand once in the files of that revision,
too, so that `run` compares the two in two checkouts. `run` changes files of its checkout and puts them back: nothing
else may work there. The tests are those of the folder with the file's name or room, the nearest by name first. A fault
that escapes is planted again as a `raise`: where that escapes too, no test runs the line, and the fault does not
count. Results are kept after each fault, and what has one is not run again.
"""

import argparse
import ast
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from modeling_moma.utils.atomic_files import atomic_write


# of one test: what takes longer counts as caught
SECONDS = 240
SWAPS = {
    **{ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.And: "or", ast.Or: "and", ast.Is: "is not", ast.IsNot: "is"},
    **{ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="},
    **{ast.In: "not in", ast.NotIn: "in"},
}
PACKAGES = ("modeling_moma", "tokenization")


def faults_of(source: str) -> list[tuple[str, str]]:
    """Return pairs of a line that stands once in a source and the line with one fault in it."""
    lines = source.splitlines()
    pairs = []

    def swap(line: int, start: int, stop: int, text: str) -> None:
        old = lines[line - 1].encode()
        pairs.append((lines[line - 1], (old[:start] + text.encode() + old[stop:]).decode()))

    def between(left: ast.expr, right: ast.expr, operator: ast.AST) -> None:
        if left.end_lineno == right.lineno and type(operator) in SWAPS and left.end_col_offset is not None:
            swap(right.lineno, left.end_col_offset, right.col_offset, f" {SWAPS[type(operator)]} ")

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp):
            between(node.left, node.right, node.op)
        elif isinstance(node, ast.BoolOp):
            between(node.values[0], node.values[1], node.op)
        elif isinstance(node, ast.Compare):
            between(node.left, node.comparators[0], node.ops[0])
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            swap(node.lineno, node.col_offset, node.operand.col_offset, "")
        elif isinstance(node, ast.Constant) and type(node.value) in (bool, int) and node.end_lineno == node.lineno:
            value: Any = node.value
            changed = not value if isinstance(value, bool) else value + 1
            swap(node.lineno, node.col_offset, node.end_col_offset or 0, str(changed))
    counts = Counter(lines)
    return [(old, new) for old, new in dict.fromkeys(pairs) if counts[old] == 1 and is_code(source, old, new)]


def is_code(source: str, old: str, new: str) -> bool:
    """Return whether the source still compiles with a fault: operands in brackets do not end where their text does."""
    try:
        compile(source.replace(old, new, 1), "faulty", "exec")
    except SyntaxError:
        return False
    return True


def draw(args: argparse.Namespace) -> None:
    faults = [pair for path in args.paths for pair in faults_of(path.read_text())]
    if args.also_in:
        listed = subprocess.check_output(["git", "ls-tree", "-r", "--name-only", args.also_in, *PACKAGES], text=True)
        names = [name for name in listed.splitlines() if name.endswith(".py")]
        shown = [subprocess.check_output(["git", "show", f"{args.also_in}:{name}"], text=True) for name in names]
        counts = Counter("".join(shown).splitlines())
        faults = [(old, new) for old, new in faults if counts[old] == 1]
    drawn: list[tuple[str, str]] = random.Random(args.seed).sample(sorted(faults), min(args.number, len(faults)))
    write(args.file, [{"old": old, "new": new} for old, new in drawn])


def write(file: Path, faults: list[dict[str, str]]) -> None:
    atomic_write(file, lambda path: path.write_text(json.dumps(faults, indent=1)))


def file_with(line: str) -> Path | None:
    """Return the only file of the packages that has a line."""
    paths = [path for folder in PACKAGES for path in sorted(Path(folder).rglob("*.py"))]
    found = [path for path in paths if line in path.read_text().splitlines()]
    return found[0] if len(found) == 1 else None


def tests_of(path: Path) -> list[str]:
    """Return the test files of a file's room, those that share the start of its name first."""
    package, *rooms = path.parts[:-1]
    room = rooms[0] if rooms else {"modeling_moma": "modeling"}.get(package, package)
    files = sorted(str(file) for file in Path("tests", room).rglob("test_*.py"))
    start = path.stem.split("_")[0]
    return sorted(files, key=lambda file: start not in file)


def is_caught(path: Path, source: str, tests: list[str]) -> bool:
    """Return whether tests fail with this source in place of a file's."""
    kept = path.read_text()
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", "--timeout", str(SECONDS), *tests]
    try:
        path.write_text(source)
        environment = {**os.environ, "PYTHONPATH": os.getcwd(), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(command, env=environment, capture_output=True).returncode != 0
    finally:
        path.write_text(kept)


def run(args: argparse.Namespace) -> None:
    faults = json.loads(args.file.read_text())
    for fault in faults:
        path = file_with(fault["old"])
        if "result" in fault or path is None:
            continue
        source, tests = path.read_text(), tests_of(path)
        indent = fault["old"][: len(fault["old"]) - len(fault["old"].lstrip())]
        fault["file"] = str(path)
        if is_caught(path, source.replace(fault["old"], fault["new"], 1), tests):
            fault["result"] = "caught"
        else:
            stop = f"{indent}raise AssertionError\n{fault['old']}"
            fault["result"] = "escaped" if is_caught(path, source.replace(fault["old"], stop, 1), tests) else "not run"
        write(args.file, faults)
        print(f"{fault['result']}: {path}: {fault['old'].strip()}  ->  {fault['new'].strip()}", flush=True)
    print(dict(Counter(fault.get("result", "not found") for fault in faults)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["draw", "run"])
    parser.add_argument("file", type=Path, help="of the faults, and of their results")
    parser.add_argument("paths", type=Path, nargs="*", help="files to draw from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=40)
    parser.add_argument("--also-in", metavar="REVISION", help="draw lines that this revision has, too")
    args = parser.parse_intermixed_args()
    {"draw": draw, "run": run}[args.mode](args)


if __name__ == "__main__":
    main()
