# SPDX-License-Identifier: Apache-2.0
"""
Lists the private names of Transformers, Accelerate, Datasets, PEFT and torch that the packages use.

    python scripts/private_names.py

Private are names that begin with an underscore, also in `getattr(x, "_name")`, and internal modules. Those that
Transformers asks every model to set or to override are listed by themselves. Ends with status 1 where the table in
CONTRIBUTING.md has others than those that are found.
"""

import ast
import importlib
import importlib.util
import inspect
import re
import sys
from collections import defaultdict
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("modeling_moma", "tokenization")
LIBRARIES = ("transformers", "accelerate", "datasets", "peft", "torch")
# what is no name of the five, though they have it too
OTHERS = {
    "_blocks": "a network of efficientnet-lite-pytorch",
    "_instances": "tqdm",
    "_replace": "a named tuple",
    "_C": "the module of the name behind it",
}
INTERNAL = re.compile(r"(\w+\.)+_[a-z]|transformers\.(cli|models\.(?!auto\b))|datasets\.packaged_modules")
PRIVATE = re.compile(r"_[a-zA-Z]\w*")
# what every model of Transformers sets, overrides or reads: its loader, interfaces and processors look there
ASKED = re.compile(
    "_(init_weights|attn_implementation|experts_implementation|apply_gate|preprocess|process_images|"
    "check_special_mm_tokens|get_num_multimodal_tokens|no_split_modules|supports_.*|can_.*|tied_weights_keys|tp_plan|"
    "fsdp_plan|keep_in_fp32_modules.*|auto_class|layer_type)"
)
TABLE_ROW = re.compile(r"^\| `([\w.]+)` \|", re.MULTILINE)


def main() -> int:
    sys.path.insert(0, str(ROOT))
    found: dict[str, set[str]] = defaultdict(set)
    trees = {path: ast.parse(path.read_text()) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    own = set().union(*map(own_names, trees.values()))
    mentioned = library_names()
    for path, tree in trees.items():
        place = str(path.relative_to(ROOT))
        uses = used_names(tree, own) & mentioned - OTHERS.keys()
        for name in {*internal_modules(tree), *uses, *overridden_names(place, tree)}:
            found[name].add(place)
    asked = {name for name in found if ASKED.fullmatch(name)}
    for title, names in (("asked of every model", asked), ("private", found.keys() - asked)):
        print(f"{len(names)} {title}")
        for name in sorted(names):
            print(f"  {name}: {', '.join(sorted(found[name]))}")
    listed = set(TABLE_ROW.findall((ROOT / "CONTRIBUTING.md").read_text()))
    for name in sorted(found.keys() - asked - listed):
        print(f"{name}: CONTRIBUTING.md gives no reason for it", file=sys.stderr)
    for name in sorted(listed - found.keys()):
        print(f"{name}: CONTRIBUTING.md has it, and nothing uses it", file=sys.stderr)
    return int(listed != found.keys() - asked)


def own_names(tree: ast.Module) -> set[str]:
    """Return the private names that a file defines: functions, classes, variables, attributes of `self`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
    return names


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def internal_modules(tree: ast.Module) -> set[str]:
    """Return the internal modules that a file imports."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    inner = {name for name in modules if name.partition(".")[0] in LIBRARIES and INTERNAL.match(name)}
    return {name for name in inner if not any(name.startswith(f"{other}.") for other in inner)}


def used_names(tree: ast.Module, own: set[str]) -> set[str]:
    """Return private attributes that a file reads or sets, also by texts, and that the packages do not define."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not is_system(node.value):
            if node.attr not in own or (ASKED.fullmatch(node.attr) and not is_self(node.value)):
                names.add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            names |= {each.value for each in node.args if isinstance(each, ast.Constant)} - own
    return {name for name in names if isinstance(name, str) and PRIVATE.fullmatch(name)}


def is_system(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("os", "sys")


def overridden_names(place: str, tree: ast.Module) -> set[str]:
    """Return the private names of libraries that classes of a module override."""
    try:
        module = importlib.import_module(place.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    # vLLM has an environment of its own
    except ImportError:
        return set()
    names = set()
    for cls in vars(module).values():
        if inspect.isclass(cls) and cls.__module__ == module.__name__:
            bases = [base for base in cls.__mro__ if base.__module__.partition(".")[0] in LIBRARIES]
            names |= {name for name in vars(cls) if any(name in vars(base) for base in bases)}
    # metaclasses add some of their own
    return {name for name in names & own_names(tree) if PRIVATE.fullmatch(name)}


def library_names() -> set[str]:
    """Return all words with an underscore in front in the sources of the libraries."""
    words: set[str] = set()
    for library in LIBRARIES:
        spec = importlib.util.find_spec(library)
        for path in Path(spec.origin).parent.rglob("*.py"):
            words |= set(re.findall(r"\b_[a-zA-Z]\w*", path.read_text(errors="replace")))
    return words


if __name__ == "__main__":
    sys.exit(main())
