# SPDX-License-Identifier: Apache-2.0
"""The card of a model repository: metadata that the Hub understands, links that lead somewhere, measured numbers."""

import math
import posixpath
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from urllib.parse import unquote

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..errors_moma import InputError
from .folder import read_json


EVALUATION_FILE = "evaluation.json"
FIXED_METADATA = {"library_name": "transformers", "pipeline_tag": "any-to-any"}
DATASET_ADDRESS = "https://huggingface.co/datasets"

# parts of a report that are no measurements of the model's own: its settings, and other models
NOT_MEASURED = frozenset(
    (
        "models training settings tokens images dense nearest_neighbour majority real reconstructed shuffled "
        "originals reconstructions known bm25_names bm25_names_and_tags bm25_neighbours chance control moma-emoji "
        "seconds"
    ).split()
)
# a routing that sees the future is measured, too, but never reported as quality
NO_QUALITY = "not a measure of quality"
# the card rounds to four decimals
TOLERANCE = 5.01e-5

_HEAD = re.compile(r"\A(---\r?\n)(.*?)(\r?\n---[ \t]*(?:\r?\n|\Z))", re.DOTALL)
_CODE = re.compile(r"^(```|~~~).*?^\1[^\n]*$|`[^`\n]*`", re.DOTALL | re.MULTILINE)
# a target in angle brackets may have spaces
_LINK = re.compile(r"""(?<=\]\()\s*(?:<(?P<bracketed>[^<>\n]+)>|(?P<markdown>[^)\s>]+))|\bsrc=["'](?P<html>[^"']+)""")


def measured_numbers(report: dict) -> list[float]:
    """Return all numbers in the report of an evaluation that say how good the model is."""
    numbers = []
    for name, value in report.items():
        if name in NOT_MEASURED or NO_QUALITY in name:
            continue
        if isinstance(value, dict):
            numbers += measured_numbers(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            numbers.append(value)
    return numbers


def _named_datasets(metadata: dict) -> list[str]:
    names = metadata.get("datasets") or []
    names = [names] if isinstance(names, str) else list(names)
    for entry in metadata.get("model-index") or []:
        names += [result["dataset"]["type"] for result in entry["results"]]
    return list(dict.fromkeys(names))


def _target(link: re.Match) -> str:
    return link["bracketed"] or link["markdown"] or link["html"]


def with_datasets(text: str, datasets: Mapping[str, str]) -> str:
    """Put the Hub's ids of data sets in the place of local paths: in `datasets`, in `model-index`, and in links."""
    if not datasets:
        return text
    head = _HEAD.match(text)
    metadata = yaml.safe_load(head[2]) if head else {}
    for local, identifier in datasets.items():
        if local not in _named_datasets(metadata):
            raise InputError(f"`datasets` maps {local!r}, but the card names {_named_datasets(metadata)}: misspelt?")
        try:
            validate_repo_id(identifier)
        except HFValidationError as error:
            raise InputError(
                f"`datasets` maps {local!r} to {identifier!r}, which is no id of the Hub: {error}"
            ) from error
    if head is None:
        return text
    names = metadata.get("datasets") or []
    metadata["datasets"] = [datasets.get(name, name) for name in ([names] if isinstance(names, str) else names)]
    for entry in metadata.get("model-index") or []:
        for result in entry["results"]:
            result["dataset"]["type"] = datasets.get(result["dataset"]["type"], result["dataset"]["type"])

    def link(match: re.Match) -> str:
        target = _target(match)
        path = re.sub(r"^(\.\./)+", "", posixpath.normpath(target)).removesuffix("/README.md")
        for local, identifier in datasets.items():
            if path == local:
                return match[0].replace(target, f"{DATASET_ADDRESS}/{identifier}")
            if path.startswith(f"{local}/"):
                file = path.removeprefix(f"{local}/")
                return match[0].replace(target, f"{DATASET_ADDRESS}/{identifier}/blob/main/{file}")
        return match[0]

    body = _LINK.sub(link, text[head.end() :])
    return f"{head[1]}{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).rstrip()}{head[3]}{body}"


def check_card(text: str, files: Mapping[str, Path], folder: str | Path, given: Collection[str] = ()) -> Iterator[str]:
    """Check a card beside the files that go with it."""
    yield from check_links(text, files)
    head = _HEAD.match(text)
    if not head:
        yield "README.md has no metadata: it must begin with a line `---`, YAML, and a second line `---`."
        return
    try:
        card = ModelCard(text)
        data: ModelCardData = card.data  # pyright: ignore[reportAssignmentType]
        metadata = yaml.safe_load(head[2])
        names = _named_datasets(metadata)
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        yield f"README.md: the metadata cannot be read: {error}"
        return
    for field, value in FIXED_METADATA.items():
        if metadata.get(field) != value:
            yield (
                f"README.md: {field} is {metadata.get(field)!r}, not {value!r}: by it the Hub knows how the model "
                "is loaded."
            )
    if not isinstance(data.license, str):
        yield f"README.md: license is {data.license!r}: name that of the weights, such as apache-2.0."
    if not isinstance(data.tags, list) or not data.tags:
        yield f"README.md: tags is {data.tags!r}: a list is needed, such as [moma]."
    if not isinstance(metadata.get("datasets"), (list, str)):
        yield (
            f"README.md: datasets is {metadata.get('datasets')!r}: list the Hub's ids of what it was trained on, or "
            "write `datasets: []` where none is on the Hub."
        )
    for name in names:
        yield from check_dataset(name, folder, is_given=name in given)
    yield from check_numbers(data, files)


def check_dataset(name: str, folder: str | Path, is_given: bool = False) -> Iterator[str]:
    """Check that a data set is named by an id of the Hub, not by a path of this machine unless it was given as id."""
    places = (Path.cwd(), *Path(folder).resolve().parents)
    if not isinstance(name, str):
        yield f"README.md: the data set {name!r} is no text."
    elif not is_given and any((place / name).exists() for place in places):
        yield (
            f"README.md: the data set {name!r} is a path of this machine, which the Hub would take for somebody's "
            f"repository: give its id with --dataset {name}=USER/NAME, the same again where the name is "
            "that id, or take it out of the card."
        )
    else:
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            yield f"README.md: the data set {name!r} is no id of the Hub: {error}"


def check_links(text: str, files: Collection[str]) -> Iterator[str]:
    """Check that every relative link and image of the card leads to a file that goes with it."""
    for match in _LINK.finditer(_CODE.sub("", text)):
        target = _target(match)
        if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//|#", target):
            continue
        path = posixpath.normpath(unquote(re.split(r"[?#]", target)[0]))
        if path.startswith(("..", "/")):
            yield (
                f"README.md: the link {target!r} leads out of the folder, and nowhere on the Hub: write the full "
                "address; for a data set, --dataset does."
            )
        elif path not in files and not any(name.startswith(f"{path}/") for name in files):
            yield f"README.md: the link {target!r} leads to no file of the folder: renamed, or not copied?"


def check_numbers(data: ModelCardData, files: Mapping[str, Path]) -> Iterator[str]:
    """Check that every value of `model-index` stands in the folder's report, up to the card's rounding."""
    results = data.eval_results or []
    if results and EVALUATION_FILE not in files:
        yield (
            f"README.md: model-index has {len(results)} values, but {EVALUATION_FILE} is missing, which must have "
            "them: put the report of the evaluation beside the card, or leave model-index out."
        )
        return
    try:
        report = read_json(files[EVALUATION_FILE]) if results else {}
    except ValueError as error:
        yield str(error)
        return
    measured = measured_numbers(report)
    for result in results:
        field = f"README.md: model-index, {result.task_type}, {result.metric_name or result.metric_type}"
        value = result.metric_value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            yield f"{field} is {value!r}, which is no number."
        elif not any(math.isclose(value, number, rel_tol=TOLERANCE, abs_tol=TOLERANCE) for number in measured):
            yield (
                f"{field} is {value!r}, which {EVALUATION_FILE} does not measure: edited by hand, or of an older "
                "evaluation?"
            )
