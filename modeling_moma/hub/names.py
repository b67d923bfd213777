# SPDX-License-Identifier: Apache-2.0
"""Names that are folders here or repositories on the Hub: what is wrong with one that is neither, in a few words."""

from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

from ..utils.messages import one_line


# timeout of the one request that finds out whether a repository exists
TIMEOUT_SECONDS = 10


def not_found_message(place: str, kind: Literal["model", "dataset"] = "model") -> str | None:
    """Return why a name that is no folder here cannot be read from the Hub, after one request."""
    missing = no_folder(place)
    try:
        validate_repo_id(place)
    except HFValidationError:
        return missing
    # a copy in the cache can be loaded without asking the Hub
    if _is_cached(place, kind):
        return None
    if constants.is_offline_mode():
        return f"{missing}, and the Hub is not asked (HF_HUB_OFFLINE)"
    try:
        HfApi().repo_info(place, repo_type=kind, timeout=TIMEOUT_SECONDS)
    except GatedRepoError:
        return f"{missing}, and on the Hub that name needs a permission: ask for it on its page and log in"
    except RepositoryNotFoundError:
        return f"{missing}, and the Hub has no such {kind}, or it is private and you are not logged in"
    # the HTTP clients of huggingface_hub differ in what they raise without a connection
    except Exception as error:
        reason = one_line(error, 200) or type(error).__name__
        return f"{missing}, and the Hub, where it might be, cannot be reached ({reason})"
    return None


def _is_cached(place: str, kind: str) -> bool:
    name = repo_folder_name(repo_id=place, repo_type=kind)
    if (Path(constants.HF_HUB_CACHE) / name / "snapshots").is_dir():
        return True
    if kind == "model":
        return False
    from datasets import config

    return (Path(config.HF_DATASETS_CACHE) / place.replace("/", "___")).is_dir()


def no_folder(place: str) -> str:
    """Say that there is no such folder, and what beside it is called nearly alike."""
    return f"there is no folder {place!r}{_suggestion(Path(place))}"


def _suggestion(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".") and entry != path]
    except OSError:
        return ""
    close = get_close_matches(path.name, names, 1, 0.75)
    return f" (did you mean {str(path.with_name(close[0]))!r}?)" if close else ""
