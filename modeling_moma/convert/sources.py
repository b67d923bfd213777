# SPDX-License-Identifier: Apache-2.0
"""Where a checkpoint comes from: a folder, a GGUF file in one, or a name on the Hub."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..hub.names import not_found_message
from ..utils.messages import one_line
from .gguf import GgufReader
from .reading import CheckpointError, CheckpointReader, TensorSource


# configuration, index and tokenizer; no weights
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]


def open_source(source: str | Path, gguf_file: str | None = None, allow_pickle: bool = False) -> TensorSource:
    """Open a checkpoint of Transformers."""
    folder = Path(source)
    if folder.is_file():
        raise CheckpointError(f"{source}: it is a file, and the folder of a checkpoint is needed.")
    is_name = not folder.is_dir()
    if is_name:
        folder = fetch(str(source), gguf_file, allow_pickle)
    reader = CheckpointReader(folder, allow_pickle) if gguf_file is None else GgufReader(folder, gguf_file)
    if is_name:
        # the folder's is a hash
        reader.label = str(source) if gguf_file is None else f"{source}/{gguf_file}"
    return reader


def fetch(name: str, gguf_file: str | None = None, allow_pickle: bool = False) -> Path:
    """Fetch a repository of the Hub, as far as a conversion reads it."""
    fetched = (
        f"Without a network fetch it elsewhere, `hf download {name} --local-dir FOLDER`, and pass --source FOLDER."
    )
    problem = not_found_message(name)
    if problem is not None:
        raise CheckpointError(f"{name}: {problem}. {fetched}")
    # and not those of other formats beside them, such as consolidated.safetensors
    weights = ["model*.safetensors", *(["pytorch_model*.bin"] if allow_pickle else [])]
    patterns = [*_SMALL_FILES, *(weights if gguf_file is None else [gguf_file])]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    # the last is what a failed connection raises; the first is one of it
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = one_line(error)
        raise CheckpointError(
            f"{name}: there is no such folder, and as a name on the Hub it cannot be fetched: {reason} {fetched}"
        ) from error
