# SPDX-License-Identifier: Apache-2.0
"""The files of a model repository: which of a folder's go to the Hub, and whether they load there."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from tokenization import MomaVQConfig, MomaVQModel

from ..configuration_moma import MomaConfig
from ..errors_moma import InputError
from ..modeling_moma import MomaForCausalLM
from ..utils.messages import one_line
from .code import code_closure, code_facts, installed_code
from .loading import saved_tensors
from .token_ids import GENERATION_FILE, TOKEN_FILES, VQ_FOLDER, token_problems


# name -> what makes it, for the message where it is missing
REQUIRED = {
    "config.json": "save the model with save_pretrained",
    GENERATION_FILE: "save the model, not its configuration alone, with save_pretrained",
    "processor_config.json": "the folder holds no processor; give that of the processor with --processor",
    "tokenizer.json": "the folder holds no processor; give that of the processor with --processor",
    "tokenizer_config.json": "the folder holds no processor; give that of the processor with --processor",
    f"{VQ_FOLDER}/config.json": "the folder holds no image tokenizer; give that of the processor with --processor",
    "README.md": "write a model card; docs/how-to/push.md shows the shortest one",
}
# files of a codec by its registered name, in its folder; codecs of others have what they like
CODEC_FILES = {
    "mel": ("codec_config.json", "codebook.safetensors"),
    "transformers": ("codec_config.json", "config.json"),
}
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "additional_chat_templates/*",
    f"{VQ_FOLDER}/*",
    "*_codec/*",
)
# files of a repository: patterns of their names, in lower case
SENT = (
    "*.safetensors *.json *.py *.jinja *.model *.md *.txt *.bib *.cff license notice "
    "*.png *.jpg *.jpeg *.gif *.svg *.webp"
).split()
# files of training, and secrets, are left out: pattern of a part of the path, and the reason
LEFT_OUT = {
    ".*": "hidden",
    "__pycache__": "compiled code",
    "checkpoint-*": "a state of the training",
    "global_step*": "a state of the training",
    "pytorch_model_fsdp*": "a state of the training",
    "optimizer*": "a state of the training",
    "scheduler*": "a state of the training",
    "zero_to_fp32.py": "a tool of the training",
    "runs": "logs of the training",
    "logs": "logs of the training",
    "wandb": "logs of the training",
    "cache": "a cache",
    "run.json": "a record of the training",
    "trainer_state.json": "a record of the training",
    "*.bin": "a pickle",
    "*.pt": "a pickle",
    "*.pth": "a pickle",
    "*.pkl": "a pickle",
    "*token.json": "perhaps a secret",
    "*token.txt": "perhaps a secret",
    "*secret*": "perhaps a secret",
    "*credentials*": "perhaps a secret",
}

CONFIG_CLASSES = (
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
)
# control characters, as a line break, and bytes that are no UTF-8
_NO_NAME = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_POINTER = b"version https://git-lfs"


def _reason_to_stay(path: Path) -> str | None:
    name = path.name.lower()
    for pattern, reason in LEFT_OUT.items():
        if fnmatch(name, pattern):
            return reason
    if path.is_dir():
        # a link may lead anywhere, also back to the folder itself
        return "a link to a folder" if path.is_symlink() else None
    if not any(fnmatch(name, pattern) for pattern in SENT):
        return "no kind of file that a model has"
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path} is a link to {os.readlink(path)!r}, where nothing is: moved, or not copied with it?")
    return None if path.is_file() else "no regular file"


def _walk(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the file of each path in the repository, and the reason for each that is left out."""
    files, left_out = {}, {}
    for path in sorted(folder.iterdir()):
        reason = _reason_to_stay(path)
        if _NO_NAME.search(path.name):
            left_out[ascii(path.name)] = "a name that the Hub cannot hold"
        elif reason is not None:
            left_out[path.name] = reason
        elif path.is_dir():
            inner, inner_left_out = _walk(path)
            files |= {f"{path.name}/{name}": file for name, file in inner.items()}
            left_out |= {f"{path.name}/{name}": why for name, why in inner_left_out.items()}
        else:
            files[path.name] = path
    return files, left_out


def gather(model: str | Path, processor: str | Path | None = None) -> tuple[dict[str, Path], dict[str, str]]:
    """List the files of a repository: those of a kind that a model has, and no states, logs or secrets.

    Nothing is copied. A link to a file counts as the file, as in the Hub's cache; one to a folder is left out. A
    folder without any of the code that its `auto_map`s name gets that of the installed packages.
    """
    for name, folder in (("model", model), ("processor", processor)):
        if folder is not None and not Path(folder).is_dir():
            raise InputError(f"`{name}` is {str(folder)!r}, which is no folder: save it with save_pretrained first.")
    files, left_out = _walk(Path(model))
    lacks_code = not code_closure(files, auto_map_entries(files).values())
    if processor is not None:
        added, _ = _walk(Path(processor))
        lacks_code = lacks_code or not code_closure(added, auto_map_entries(added).values())
        _add_processor(files, Path(model), Path(processor), added)
    if lacks_code:
        for name, file in installed_code(auto_map_entries(files).values()).items():
            if name in files and files[name].read_bytes() != file.read_bytes():
                raise InputError(
                    f"{name} of {str(files[name].parent)!r} is not that of the installed package, which the other "
                    "folder, without code, gets: save both again with one version."
                )
            files[name] = file
    return files, left_out


def _add_processor(files: dict[str, Path], model: Path, processor: Path, added: dict[str, Path]) -> None:
    chosen = {name for name in added if any(fnmatch(name, pattern) for pattern in PROCESSOR_FILES)}
    for name in [name for name in files if any(fnmatch(name, pattern) for pattern in PROCESSOR_FILES)]:
        del files[name]
    for name in sorted(chosen | code_closure(added, auto_map_entries({n: added[n] for n in chosen}).values())):
        if name.endswith(".py") and name in files and files[name].read_bytes() != added[name].read_bytes():
            raise InputError(
                f"{name} of `processor` {str(processor)!r} is not that of `model` {str(model)!r}: they were saved by "
                "different versions of the code; save both again with one."
            )
        files[name] = added[name]


def read_json(path: Path) -> dict:
    """Return a JSON file that holds an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path.name} cannot be read as JSON ({error}): was it written to the end?") from error
    if not isinstance(content, dict):
        raise InputError(f"{path.name} holds a {type(content).__name__}, not an object.")
    return content


def auto_map_entries(files: Mapping[str, Path]) -> dict[str, str]:
    """Return every `module.Class` that an `auto_map` in the files' configurations names, by where it does."""
    entries = {}
    for name in ("config.json", "processor_config.json", "tokenizer_config.json", f"{VQ_FOLDER}/config.json"):
        if name not in files:
            continue
        content = read_json(files[name])
        nested = _object_in(content, "image_processor", name)
        for place, auto_map in (
            ("auto_map", _object_in(content, "auto_map", name)),
            ("image_processor.auto_map", _object_in(nested, "auto_map", f"{name}: image_processor")),
        ):
            for auto, references in auto_map.items():
                # tokenizers name a slow and a fast class, either of which may be missing
                for reference in references if isinstance(references, list) else [references]:
                    if not isinstance(reference, str | None):
                        raise InputError(f"{name}: {place}.{auto} is {reference!r}, not a class: edited by hand?")
                    if reference is not None:
                        entries[f"{name}: {place}.{auto}"] = reference
    return entries


def _object_in(content: dict, field: str, where: str) -> dict:
    value = content.get(field) or {}
    if not isinstance(value, dict):
        raise InputError(f"{where}: {field} is {value!r}, not an object: edited by hand?")
    return value


def check_files(files: Mapping[str, Path]) -> Iterator[str]:
    """Check that the model loads from these files alone, without the package."""
    missing = [name for name in REQUIRED if name not in files]
    for name in missing:
        yield f"{name} is missing: {REQUIRED[name]}."
    for name in REQUIRED:
        if name.endswith(".json") and name in files:
            try:
                read_json(files[name])
            except ValueError as error:
                yield str(error)
                return
    for folder in ("", f"{VQ_FOLDER}/"):
        if f"{folder}config.json" in files:
            yield from check_weights(files, folder)
            yield from check_shapes(files, folder)
    if "processor_config.json" in files:
        yield from check_codecs(files)
    yield from check_code(files)
    if not missing:
        try:
            contents = {name: read_json(files[name]) for name in TOKEN_FILES}
        except ValueError as error:
            yield str(error)
            return
        yield from token_problems(contents)


def check_weights(files: Mapping[str, Path], folder: str = "") -> Iterator[str]:
    """Check that the weights of a folder (`""` or one that ends with a slash) are complete."""
    single, index = f"{folder}model.safetensors", f"{folder}model.safetensors.index.json"
    if single in files and index in files:
        yield f"{single} and {index} are both there: one is of an older save; remove it."
    elif single in files:
        yield from _tensor_problems(single, files[single])[1]
    elif index not in files:
        yield f"{single} is missing, and so is {index}: the weights were not saved as safetensors, or not at all."
    else:
        try:
            weight_map = read_json(files[index])["weight_map"]
            shards = sorted(set(weight_map.values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            yield f"{index} has no readable weight_map ({error}): was it written to the end?"
            return
        for shard in shards:
            name, expected = f"{folder}{shard}", {key for key, file in weight_map.items() if file == shard}
            if name not in files:
                yield f"{name} is missing, which {index} names: copy all shards."
                continue
            keys, problems = _tensor_problems(name, files[name])
            yield from problems
            if not problems and not expected <= keys.keys():
                lost = min(expected - keys.keys())
                yield f"{name} lacks {lost!r}, which {index} says is in it: shards of two saves."


def check_shapes(files: Mapping[str, Path], folder: str) -> Iterator[str]:
    """Check that weights are those of the model that the configuration beside them describes.

    Quantised ones, whose names are others, and image tokenizers of Transformers are not looked at.
    """
    name, config = f"{folder}config.json", read_json(files[f"{folder}config.json"])
    kinds = {"moma": (MomaForCausalLM, MomaConfig), "moma_vq": (MomaVQModel, MomaVQConfig)}
    kind = kinds.get(str(config.get("model_type")))
    if kind is None or config.get("quantization_config") is not None:
        return
    try:
        with torch.device("meta"):
            model = kind[0](kind[1].from_dict(config))
    # a configuration is strict in many ways
    except Exception as error:
        yield f"{name} describes no model ({one_line(error, 300)}): edited by hand?"
        return
    shapes: dict[str, tuple[int, ...]] = {}
    weights = _weight_files(files, folder)
    for path in weights:
        # told of already, as where there are no weights
        if path not in files:
            return
        found, problems = _tensor_problems(path, files[path])
        if problems:
            return
        shapes |= found
    wanted = {key: tuple(value.shape) for key, value in saved_tensors(model).items()} if weights else {}
    missing = sorted(wanted.keys() - shapes.keys())
    if missing:
        yield (
            f"{name} describes a model with {len(missing)} weights that are not there, such as {missing[0]!r}: edited "
            "by hand, or of another model?"
        )
    # a tied weight may be saved under both its names
    surplus = sorted(shapes.keys() - model.state_dict().keys())
    if surplus:
        yield (
            f"{name} describes a model without {len(surplus)} of the weights that are there, such as {surplus[0]!r}: "
            "edited by hand, or of another model?"
        )
    for key in sorted(wanted.keys() & shapes.keys()):
        if wanted[key] != shapes[key]:
            yield f"{name}: {key!r} has the shape {shapes[key]}, but by the configuration it is {wanted[key]}."
            return


def _weight_files(files: Mapping[str, Path], folder: str) -> list[str]:
    """Return the names of the files that weights are loaded from, others with tensors left out; none if unreadable."""
    single, index = f"{folder}model.safetensors", f"{folder}model.safetensors.index.json"
    if single in files:
        return [single]
    try:
        return sorted({f"{folder}{shard}" for shard in read_json(files[index])["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError):
        return []


def check_codecs(files: Mapping[str, Path]) -> Iterator[str]:
    """Check that the codecs are complete that `processor_config.json` names."""
    types = _object_in(read_json(files["processor_config.json"]), "codec_types", "processor_config.json")
    for modality, kind in types.items():
        folder = f"{modality}_codec/"
        found = sorted(name for name in files if name.startswith(folder))
        if not found:
            yield f"{folder} is missing, the codec that processor_config.json names: copy the whole processor."
            continue
        for name in CODEC_FILES.get(kind, ()):
            if f"{folder}{name}" not in files:
                yield f"{folder}{name} is missing, of the codec that processor_config.json names: copy it whole."
        for name in found:
            if name.endswith(".json"):
                try:
                    read_json(files[name])
                except ValueError as error:
                    yield f"{folder}: {error}"
        if f"{folder}config.json" in files:
            yield from check_weights(files, folder)
        elif f"{folder}codebook.safetensors" in files:
            yield from _tensor_problems(f"{folder}codebook.safetensors", files[f"{folder}codebook.safetensors"])[1]


def _tensor_problems(name: str, path: Path) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Return the shapes of a file's tensors, and what is wrong with it."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            return {}, [f"{name} is the pointer of a large file, not the file: run `git lfs pull`."]
    try:
        # reads the header alone, and compares the sizes in it with the file's
        with safe_open(path, framework="numpy") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}, []
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        return {}, [f"{name} of {size:,} bytes is no readable safetensors file ({error}): was its writing cut off?"]


def check_code(files: Mapping[str, Path]) -> Iterator[str]:
    """Check that each `auto_map` is complete, and that all code it leads to is there."""
    entries = auto_map_entries(files)
    wanted = [f"config.json: auto_map.{name}" for name in CONFIG_CLASSES]
    wanted += ["processor_config.json: auto_map.AutoProcessor"]
    wanted += ["processor_config.json: image_processor.auto_map.AutoImageProcessor"]
    for place in wanted:
        if place.split(":")[0] in files and place not in entries:
            yield (
                f"{place} is missing: saved without `import modeling_moma`, which registers the classes; import it "
                "and save again."
            )
    facts = {}
    for name in sorted(name for name in files if name.endswith(".py")):
        try:
            facts[name] = code_facts(files[name].read_bytes())
        except (SyntaxError, ValueError) as error:
            yield f"{name} is no Python ({error}): edited by hand?"
    for place, reference in entries.items():
        repository, _, local = reference.rpartition("--")
        module, _, name = local.partition(".")
        if repository:
            yield f"{place} is {reference!r}, code of another repository: save again with this package installed."
        elif f"{module}.py" not in files:
            yield (
                f"{place} is {reference!r}, but {module}.py is missing: saved without `import modeling_moma`, or "
                "copied without its code."
            )
        elif f"{module}.py" in facts and name not in facts[f"{module}.py"][0]:
            yield f"{place} is {reference!r}, but {module}.py has no class {name!r}: code of another version."
    for name in sorted(code_closure(files, entries.values()) & facts.keys()):
        for module in sorted(facts[name][1]):
            if f"{module}.py" not in files:
                yield f"{module}.py is missing, which {name} imports: copy all code of the saved folder."
