# SPDX-License-Identifier: Apache-2.0
"""A model's repository on the Hub: its files, whether they load without the packages, and its one commit."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.dynamic_module_utils import get_relative_import_files
from yaml import YAMLError

import tokenization

from ..compat_moma import AUTO_MAP
from ..errors_moma import InputError
from ..utils.messages import one_line


CARD = "README.md"
DATASET_ADDRESS = "https://huggingface.co/datasets"
PACKAGES = (Path(__file__).resolve().parents[1], Path(tokenization.__file__).resolve().parent)
# modules that the `auto_map`s of a model and of its processor name
ROOTS = sorted({"processing_moma", "image_processing_moma", *(name.split(".")[0] for name in AUTO_MAP.values())})
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "additional_chat_templates/*",
    "vq_model/*",
    "*_codec/*",
)
# files of a repository: patterns of their names, in lower case
SENT = (
    "*.safetensors *.json *.py *.jinja *.model *.md *.txt *.bib *.cff license notice "
    "*.png *.jpg *.jpeg *.gif *.svg *.webp"
).split()
# hidden files, compiled code, states and logs of a training, and what may be a secret: patterns of a part of the path
LEFT_OUT = (
    ".* __pycache__ checkpoint-* global_step* pytorch_model_fsdp* optimizer* scheduler* zero_to_fp32.py runs logs "
    "wandb cache run.json trainer_state.json *token.json *token.txt *secret* *credentials*"
).split()
# a loader prefers one file of weights to an index, so those of an older revision must not stay beside the new ones
_WEIGHTS = re.compile(r"(?:vq_model/)?model(?:-\d+-of-\d+)?\.safetensors(?:\.index\.json)?")
_LOADING = """
import sys
sys.modules.update(dict.fromkeys(("modeling_moma", "tokenization")))
from transformers import AutoModelForCausalLM, AutoProcessor
try:
    AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
    loaded = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)[1]
    for kind in ("missing_keys", "unexpected_keys"):
        if loaded[kind]:
            raise ValueError(f"the weights have {len(loaded[kind])} {kind}, such as {min(loaded[kind])!r}")
except Exception as error:
    sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
"""


class UploadError(RuntimeError):
    """An upload that did not get to its commit."""


def check_repo_id(repo_id: str | None) -> None:
    """Check the name of a repository, without asking the Hub."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is no id of the Hub: {one_line(error)}") from error


def installed_code() -> dict[str, Path]:
    """Return the installed packages' files that model and processor are loaded from, by name."""
    roots = [package / f"{root}.py" for package in PACKAGES for root in ROOTS]
    found = [file for root in roots if root.is_file() for file in (root, *map(Path, get_relative_import_files(root)))]
    return {file.name: file for file in found}


def lay_out(
    folder: Path, model: str | Path, processor: str | Path | None = None, datasets: Mapping[str, str] | None = None
) -> list[str]:
    """Link the files of a repository into an empty folder; return what of the model's folder is left out.

    The processor's files come from its folder where one is given, and code that lacks from the installed packages.
    The card is copied, with the Hub's ids of data sets in the place of local paths.
    """
    for name, place in (("model", model), ("processor", processor)):
        if place is not None and not Path(place).is_dir():
            raise InputError(f"`{name}` is {str(place)!r}, which is no folder: save it with save_pretrained first.")
    files, left_out = _listed(Path(model))
    if processor is not None:
        files = {name: file for name, file in files.items() if not _is_of_processor(name)}
        added, _ = _listed(Path(processor))
        _add(files, {name: file for name, file in added.items() if name.endswith(".py") or _is_of_processor(name)})
    if not all(f"{root}.py" in files for root in ROOTS):
        _add(files, installed_code())
    if CARD not in files:
        raise InputError(f"{CARD} is missing: write a model card; docs/how-to/push.md shows the shortest one.")
    if {"model.safetensors", "model.safetensors.index.json"} <= files.keys():
        raise InputError("model.safetensors and model.safetensors.index.json: one is of an older save; remove it.")
    card = read_card(files.pop(CARD), datasets or {})
    for name, file in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(file.resolve())
    (folder / CARD).write_text(card, encoding="utf-8")
    return left_out


def _listed(folder: Path) -> tuple[dict[str, Path], list[str]]:
    files, left_out = {}, {}
    # links to files count as files, as the Hub's cache has them; links to folders are not followed
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        unwanted = [i for i, part in enumerate(parts) if any(fnmatch(part.lower(), pattern) for pattern in LEFT_OUT)]
        if unwanted:
            left_out["/".join(parts[: unwanted[0] + 1])] = None
        elif path.is_file() and any(fnmatch(path.name.lower(), pattern) for pattern in SENT):
            files["/".join(parts)] = path
        elif path.is_symlink() or not path.is_dir():
            left_out["/".join(parts)] = None
    return files, list(left_out)


def _is_of_processor(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in PROCESSOR_FILES)


def _add(files: dict[str, Path], added: Mapping[str, Path]) -> None:
    for name, file in added.items():
        if name in files and files[name].read_bytes() != file.read_bytes():
            raise InputError(f"{files[name]} and {file} are of two versions of the code: save both again with one.")
        files[name] = file


def read_card(path: Path, datasets: Mapping[str, str]) -> str:
    """Return a card with the Hub's ids of data sets in the place of local paths, in its metadata and in links."""
    try:
        text = path.read_text(encoding="utf-8")
        card = ModelCard(text)
    except (ValueError, YAMLError) as error:
        raise InputError(f"{CARD}: the metadata cannot be read: {one_line(error)}") from error
    if not card.data.get("license"):
        raise InputError(f"{CARD} has no license in its metadata: name that of the weights, such as apache-2.0.")
    names = card.data.get("datasets") or []
    names = [names] if isinstance(names, str) else names
    for local, identifier in datasets.items():
        if local not in names:
            raise InputError(f"`datasets` maps {local!r}, but the card names {names}: misspelt?")
        check_repo_id(identifier)
    for name in names:
        is_here = any((place / name).exists() for place in (Path.cwd(), *path.resolve().parents))
        if is_here and name not in (*datasets, *datasets.values()):
            raise InputError(
                f"{CARD}: the data set {name!r} is a path of this machine, which the Hub would take for somebody's "
                f"repository: give its id with --dataset {name}=USER/NAME, or take it out of the card."
            )
    if not datasets:
        return text
    card.data["datasets"] = [datasets.get(name, name) for name in names]
    for result in card.data.get("eval_results") or []:
        result.dataset_type = datasets.get(result.dataset_type, result.dataset_type)
    for local, identifier in datasets.items():
        link = rf"\]\((?:\.\./)*{re.escape(local)}(?:/README\.md)?\)"
        card.text = re.sub(link, f"]({DATASET_ADDRESS}/{identifier})", card.text)
    return str(card)


def check_loads(folder: Path) -> None:
    """Check that model and processor load from a folder alone, in a process that cannot import the packages."""
    with TemporaryDirectory() as cache:
        environment = {**os.environ, "HF_MODULES_CACHE": cache, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-P", "-c", _LOADING, str(folder)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
        raise InputError(
            f"the repository would not load: {reason}; is a file missing, edited, cut off or a pointer of Git LFS, or "
            "the processor in another folder (--processor)?"
        )


def push(
    folder: Path, repo_id: str, private: bool = False, revision: str | None = None, message: str = "Upload"
) -> str:
    """Send all files, commit them at once, and return the commit's address. What is missing of the repository is made.

    Weights and files of a processor that the folder has not are removed, for what loads would be changed by them.
    """
    api, branch = HfApi(), "main" if revision is None else revision
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    try:
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise InputError(f"{repo_id} is public already: make it private on the Hub, or leave --private out.")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = api.model_info(repo_id, revision=branch).sha
        there = set(api.list_repo_files(repo_id, revision=before)) - set(names)
        stale = [name for name in sorted(there) if _WEIGHTS.fullmatch(name) or _is_of_processor(name)]
        operations = [CommitOperationDelete(name) for name in stale]
        operations += [CommitOperationAdd(name, folder / name) for name in names]
        # HfApi.upload_folder may spread a folder over several commits
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=branch, parent_commit=before)
        return commit.commit_url
    except InputError:
        raise
    except Exception as error:
        raise UploadError(
            f"The upload to {repo_id} failed. Its commit comes last, and is whole or not at all: push again, after "
            f"`hf auth login` with a token that may write.\n{type(error).__name__}: {error}"
        ) from error
