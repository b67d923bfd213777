# SPDX-License-Identifier: Apache-2.0
"""One commit that holds a complete model, so that every revision on the Hub loads."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..errors_moma import InputError
from ..utils.atomic_files import check_new_folder, write_folder_aside
from ..utils.messages import one_line
from .card import check_card, with_datasets
from .folder import PROCESSOR_FILES, VQ_FOLDER, check_files, gather


CARD = "README.md"
# a loader prefers one file of weights to an index, so those of an older revision must not stay beside the new ones
_WEIGHTS = re.compile(rf"(?:{VQ_FOLDER}/)?model(?:-\d+-of-\d+)?\.safetensors(?:\.index\.json)?")


class UploadError(RuntimeError):
    """An upload that did not get to its commit; the message says what the repository holds."""


@dataclass(frozen=True)
class Upload:
    """What a commit will hold."""

    files: dict[str, Path | bytes]
    left_out: dict[str, str]

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size


def check_repo_id(repo_id: str | None) -> None:
    """Check the name of a repository, without asking the Hub."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"--repo-id: {repo_id!r} is no id of the Hub: {one_line(error)}") from error


def prepare(
    model: str | Path, processor: str | Path | None = None, datasets: Mapping[str, str] | None = None
) -> Upload:
    """Gather a repository from local folders and check it. Nothing is sent."""
    files, left_out = gather(model, processor)
    datasets = datasets or {}
    problems = list(check_files(files))
    contents: dict[str, Path | bytes] = {**files}
    if CARD in files:
        try:
            text = files[CARD].read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError("\n".join([*problems, f"README.md is no text in UTF-8: {error}"])) from error
        try:
            changed = with_datasets(text, datasets)
        except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
            # a card that cannot be read is told by its check
            changed, problems = text, [*problems, f"README.md: {error}"]
        problems += check_card(changed, files, Path(model), given=datasets.values())
        if changed != text:
            contents[CARD] = changed.encode("utf-8")
    if problems and left_out:
        problems.append("Left out: " + ", ".join(f"{name} ({reason})" for name, reason in left_out.items()))
    if problems:
        raise InputError("\n".join(dict.fromkeys(problems)))
    return Upload(contents, left_out)


def write_repository(upload: Upload, folder: str | Path) -> Path:
    """Write a repository into a folder, as it would lie on the Hub."""
    check_new_folder(folder)

    def write(aside: Path):
        for name, content in upload.files.items():
            path = aside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                shutil.copyfile(content, path)

    return write_folder_aside(folder, write)


def push(
    upload: Upload,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload model and processor",
) -> CommitInfo:
    """Send all files, then commit them at once. A repository or branch that is missing is created."""
    api, branch, is_there, before = HfApi(), revision or "main", False, None
    try:
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        is_there = True
        if private and not api.model_info(repo_id).private:
            raise UploadError(f"{repo_id} is public already: make it private on the Hub, or leave --private out.")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = api.model_info(repo_id, revision=branch).sha
        there = api.list_repo_files(repo_id, revision=before)
        stale = [name for name in there if _is_replaced(name) and name not in upload.files]
        operations = [CommitOperationDelete(name) for name in stale]
        operations += [CommitOperationAdd(name, content) for name, content in upload.files.items()]
        # HfApi.upload_folder may spread a folder over several commits
        return api.create_commit(repo_id, operations, commit_message=message, revision=branch, parent_commit=before)
    except UploadError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UploadError(
            f"The upload to {repo_id} failed. {_state(api, repo_id, branch, before, is_there)}\n{reason}"
        ) from error


def _is_replaced(name: str) -> bool:
    """Return whether a file belongs to weights or processor: one of an older revision would change what loads."""
    return _WEIGHTS.fullmatch(name) is not None or any(fnmatch(name, pattern) for pattern in PROCESSOR_FILES)


def _state(api: HfApi, repo_id: str, branch: str, before: str | None, is_there: bool) -> str:
    if before is None and is_there:
        return f"No file was sent. The repository is there: it was made just now, or before; {branch} may be missing."
    if before is None:
        return (
            "Nothing was sent. Is the name right, and are you logged in (`hf auth login`) with a token that may write?"
        )
    try:
        now = api.model_info(repo_id, revision=branch).sha
    except Exception:
        return f"The Hub does not say what {branch} is now; it was {before}, and a commit is whole or not at all."
    if now == before:
        return f"Nothing was committed: {branch} is still {before}, whole and as it was. Push again to go on."
    return (
        f"{branch} was {before} and is now {now}: the commit was made, or somebody else made one. Look before pushing."
    )
