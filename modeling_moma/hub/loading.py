# SPDX-License-Identifier: Apache-2.0
"""Opening what a subcommand is given: models, processors and tokenizers, in folders or on the Hub."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from tokenization import MomaProcessor
from tokenization.audio_codecs_moma import load_audio_codec
from tokenization.image_tokenizers_moma import MODEL_TYPES, load_image_tokenizer, why_no_image_tokenizer

from ..errors_moma import InputError
from ..modeling_moma import MomaForCausalLM
from ..utils.errors import needs_extra
from ..utils.messages import one_line
from .names import not_found_message


T = TypeVar("T")
# file names under which weights may be saved
WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


@dataclass(frozen=True)
class Saved:
    """What a folder holds that something was saved into."""

    name: str
    subcommand: str
    files: tuple[tuple[str, ...], ...]
    model_types: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The name with its article."""
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"


MODEL = Saved("model", "pretrain", (("config.json",), WEIGHTS), ("moma",))
IMAGE_TOKENIZER = Saved("image tokenizer", "train-image-tokenizer", (("config.json",), WEIGHTS), MODEL_TYPES)
AUDIO_TOKENIZER = Saved("audio tokenizer", "train-audio-tokenizer", (("codec_config.json", "config.json"),))
PROCESSOR = Saved(
    "processor",
    "build-processor",
    (
        ("processor_config.json", "preprocessor_config.json"),
        ("tokenizer.json", "tokenizer_config.json"),
        ("vq_model/config.json",),
        tuple(f"vq_model/{name}" for name in WEIGHTS),
    ),
)
TEXT_TOKENIZER = Saved("text tokenizer", "build-processor", (("tokenizer.json", "tokenizer_config.json"),))


def open_model(place: str, option: str = "--model", **kwargs: Any) -> MomaForCausalLM:
    """Return a model; see [`open_saved`]. One that lacks weights, for which random ones would stand, is an error."""
    missing: list[str] = []

    def load() -> MomaForCausalLM:
        # Transformers would cast what is not quantised alone, and the layers refuse inputs of another type
        quantization = PreTrainedConfig.get_config_dict(place)[0].get("quantization_config") or {}
        if "dtype" in kwargs and quantization.get("quant_method") == "bitsandbytes":
            kwargs["dtype"] = "auto"
        both: Any = MomaForCausalLM.from_pretrained(place, output_loading_info=True, **kwargs)
        model, loaded = both
        tensors = saved_tensors(model)
        missing.extend(sorted(name for name in loaded["missing_keys"] if name in tensors))
        return model

    model = open_saved(MODEL, option, place, load)
    if missing:
        raise InputError(
            f"`{option}` {str(place)!r}: {len(missing)} weights of the model that its config.json describes are "
            f"missing, such as {missing[0]!r}; was config.json changed, or a file of weights lost?"
        )
    return model


def saved_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what a saved model has to hold: its parameters, tied ones once, and thresholds and biases of routers."""
    parameters, buffers, saved = model.named_parameters(), model.named_buffers(), model.state_dict().keys()
    return {**dict(parameters), **{name: buffer for name, buffer in buffers if name in saved}}


def open_processor(place: str, option: str = "--processor") -> MomaProcessor:
    """Return a processor; see [`open_saved`]."""
    return open_saved(PROCESSOR, option, place, lambda: MomaProcessor.from_pretrained(place))


def open_image_tokenizer(place: str, option: str = "--image-tokenizer") -> Any:
    """Return an image tokenizer, ours or one of Transformers; see [`load_image_tokenizer`] and [`open_saved`]."""
    return open_saved(IMAGE_TOKENIZER, option, place, lambda: load_image_tokenizer(place, dtype=torch.float32))


def open_audio_tokenizer(place: str, num_codebooks: int | None = None, option: str = "--audio-tokenizer") -> Any:
    """Return a codec of sounds, ours or one of Transformers; see [`load_audio_codec`] and [`open_saved`]."""
    return open_saved(AUDIO_TOKENIZER, option, place, lambda: load_audio_codec(place, num_codebooks))


def open_text_tokenizer(place: str) -> Any:
    """Return a tokenizer of any model; see [`open_saved`]."""
    return open_saved(
        TEXT_TOKENIZER, "RECIPE, processor: text_tokenizer", place, lambda: AutoTokenizer.from_pretrained(place)
    )


def open_saved(saved: Saved, option: str, place: str, load: Callable[[], T]) -> T:
    """Load what a folder or a repository on the Hub holds."""
    check_saved(saved, option, place)
    loaded = open_checked(saved, option, place, load)
    where = f"`{option}` {str(place)!r}"
    for part, source in ((loaded, where), (getattr(loaded, "vq_model", None), f"{where}, image tokenizer")):
        if isinstance(part, nn.Module):
            refuse_non_finite(part, source)
    return loaded


def open_checked(saved: Saved, option: str, place: str, load: Callable[[], T]) -> T:
    """Load what has gone through [`check_saved`]; arguments and errors are those of [`open_saved`]."""
    where = f"`{option}` {str(place)!r}"
    try:
        return load()
    # damaged files make readers raise all kinds of errors
    except Exception as error:
        if saved is MODEL and isinstance(error, ImportError):
            extra = "finetune" if (Path(place) / ADAPTER_CONFIG_NAME).is_file() else "quantize"
            with needs_extra(f"{where}: the model in it needs a library that is not installed", extra):
                raise
        raise InputError(
            f"{where}: the {saved.name} in it cannot be read; is a file of it damaged, or of another version? "
            f"({type(error).__name__}: {one_line(error, 300)})"
        ) from error


def check_saved(saved: Saved, option: str, place: str) -> None:
    """Raise for a place that [`open_saved`] cannot read, by its files alone; arguments and errors are the same."""
    where, folder = f"`{option}` {str(place)!r}", Path(place)
    if folder.is_file():
        raise InputError(f"{where} is a file: the folder of {saved.title} is needed, or its name on the Hub.")
    if not folder.is_dir():
        problem = not_found_message(str(place))
        if problem is not None:
            raise InputError(f"{where}: {problem}.")
        return
    # a folder of adapters is read by PEFT, which loads their base model from elsewhere
    if saved is MODEL and (folder / ADAPTER_CONFIG_NAME).is_file():
        if base_of_adapters(folder) is None:
            raise InputError(
                f"{where}: {ADAPTER_CONFIG_NAME} names no base model, so its adapters fit nothing. A training of new "
                "weights with `--lora-rank` writes its whole model at the end."
            )
        return
    found = model_type_of(folder) if saved.model_types else None
    if found not in (None, *saved.model_types):
        why = f": it {why_no_image_tokenizer(found)}" if saved is IMAGE_TOKENIZER and found != "moma" else ""
        raise InputError(f"{where}: config.json is that of a model of type {found!r}, not of {saved.title}{why}.")
    missing = next((group[0] for group in saved.files if not any((folder / name).is_file() for name in group)), None)
    if missing is not None:
        raise InputError(f"{where} has no {missing}: {_likely_cause(saved, folder)}")


def base_of_adapters(folder: str | Path) -> str | None:
    """Return the base model that PEFT's adapters in a folder name, `None` where they name none."""
    try:
        return json.loads((Path(folder) / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        return None


def require_plain_weights(option: str, place: str, config: PreTrainedConfig) -> None:
    """Raise for a model whose weights can be neither trained nor saved again: quantised ones, and adapters alone."""
    if (Path(place) / ADAPTER_CONFIG_NAME).is_file():
        raise InputError(
            f"`{option}` {place!r} holds adapters over {base_of_adapters(place)!r}, and whole weights are needed: "
            "merge them first, see docs/how-to/fine-tune.md."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"`{option}` {place!r} is quantised, and such weights are neither trained nor saved again: give the model "
            "that it was made from, and quantise the result."
        )


def refuse_non_finite(model: nn.Module, source: str):
    """Raise for a model whose parameters or buffers hold NaN or infinity."""
    for name, tensor in model.state_dict().items():
        count = int((~_is_finite(tensor)).sum()) if tensor.is_floating_point() else 0
        if count:
            raise InputError(
                f"{source}: the tensor {name!r} holds NaN or infinite values ({count} of {tensor.numel()}). The "
                "training run has diverged, or the file is damaged."
            )


def _is_finite(tensor: torch.Tensor) -> torch.Tensor:
    try:
        return torch.isfinite(tensor)
    # torchao's quantised tensors implement no comparison
    except NotImplementedError:
        return torch.isfinite(tensor.dequantize())


def model_type_of(folder: Path) -> str | None:
    """Return the type of the model that is saved in a folder, `None` where its `config.json` does not tell."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    # a damaged file is reported by the loader that reads it as a whole
    except (OSError, ValueError, AttributeError):
        return None


def _likely_cause(saved: Saved, folder: Path) -> str:
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    if checkpoints and saved in (MODEL, IMAGE_TOKENIZER):
        return (
            f"its training is not finished; go on with `moma {saved.subcommand} ... --resume`, or name a checkpoint, "
            f"such as {str(checkpoints[-1])!r}."
        )
    if saved in (MODEL, IMAGE_TOKENIZER) and any((folder / name).exists() for name in ("run.json", "images")):
        return f"its training has not come to a checkpoint yet; `moma {saved.subcommand}` has to finish first."
    if not any(folder.iterdir()):
        return "the folder is empty."
    model_type = model_type_of(folder)
    if model_type is not None and model_type in saved.model_types:
        return "its weights are missing; were they not copied, or was their writing cut off?"
    found = {
        "tokens": (folder / "job.json").exists() or (folder / "manifest.json").exists(),
        "a processor": (folder / "vq_model").exists() and saved is not PROCESSOR,
        "an image tokenizer alone": model_type in IMAGE_TOKENIZER.model_types,
        "a model alone": model_type is not None,
    }
    for name, is_so in found.items():
        if is_so:
            return f"the folder holds {name}, and not {saved.title} of `moma {saved.subcommand}`."
    return f"`moma {saved.subcommand}` writes it; is that the right folder, and is it copied whole?"
