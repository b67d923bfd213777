# SPDX-License-Identifier: Apache-2.0
"""The image side of a Chameleon checkpoint: its vocabulary of codes, VQ model, tokenizer and image processor."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import AddedToken, Tokenizer
from torch import nn
from transformers import ChameleonConfig, ChameleonImageProcessor, ChameleonVQVAEConfig, PreTrainedTokenizerFast

from tokenization import MomaImageProcessor, MomaProcessor, MomaVQConfig, MomaVQModel
from tokenization.text_tokenizer_moma import BEGIN_IMAGE_TOKEN, END_IMAGE_TOKEN, IMAGE_TOKEN, image_code_tokens

from ..data.encoding import PIXEL_SETTINGS
from ..utils.messages import one_line
from .reading import CheckpointError, read_json
from .vqgan import has_decoder, load_vq_model


_CODE_NAME_START, _CODE_NAME_END = "IMGIMG", "Z"
_DIGITS = {chr(ord("A") + digit): str(digit) for digit in range(10)}
_BEGIN_NAME, _END_NAME = "<racm3:break>", "<eoss>"
# tensors without which codes would mean other images; the decoder may differ
_ENCODING_PREFIXES = ("encoder.", "quant_conv.", "quantize.")
_IMAGE_PROCESSOR_FIELDS = ("do_convert_rgb", *PIXEL_SETTINGS)
_TOKENIZER_FIELDS = (
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "sep_token",
    "padding_side",
    "model_max_length",
    "clean_up_tokenization_spaces",
)


class ProcessorError(CheckpointError):
    """Parts that are complete, but of which no [`MomaProcessor`] can be made."""


@dataclass(frozen=True)
class ImageVocabulary:
    """Which token ids are images, and which code of the source's codebook each one stands for."""

    code_of_id: dict[int, int]
    begin_id: int | None
    end_id: int | None
    placeholder_id: int | None

    @classmethod
    def from_map(cls, vocabulary_map: Mapping[str, int] | None) -> "ImageVocabulary":
        """Read `ChameleonConfig.vocabulary_map`, where `IMGIMGBCZ` is code 12: letters are digits, A is 0."""
        if not vocabulary_map:
            raise CheckpointError("vocabulary_map: config.json has none, so nothing tells which ids are images.")
        if odd := [name for name, token_id in vocabulary_map.items() if type(token_id) is not int]:
            raise CheckpointError(f"vocabulary_map: {odd[0]!r} has {vocabulary_map[odd[0]]!r}, which is no id.")
        code_of_id = {}
        for name, token_id in sorted(vocabulary_map.items(), key=lambda item: item[1]):
            if not name.startswith(_CODE_NAME_START):
                continue
            digits = [_DIGITS.get(letter, "?") for letter in name[len(_CODE_NAME_START) : -1]]
            if not digits or "?" in digits or name[-1] != _CODE_NAME_END:
                raise CheckpointError(f"vocabulary_map: {name!r} spells no code; expected IMGIMG, letters A to J, Z.")
            code_of_id[token_id] = int("".join(digits))
        if not code_of_id:
            raise CheckpointError("vocabulary_map: no name begins with IMGIMG, so there are no image tokens.")
        frame = (vocabulary_map.get(name) for name in (_BEGIN_NAME, _END_NAME, IMAGE_TOKEN))
        return cls(code_of_id, *frame)

    @property
    def ranges(self) -> list[list[int]]:
        """Half-open ranges of the image ids."""
        runs = groupby(enumerate(self.code_of_id), key=lambda pair: pair[1] - pair[0])
        spans = [[token_id for _, token_id in run] for _, run in runs]
        return [[span[0], span[-1] + 1] for span in spans]

    def codebook_order(self, num_embeddings: int) -> torch.Tensor:
        """Return the source's code of each id, from the first image id on, `[num_embeddings]`."""
        if len(self.ranges) != 1:
            raise CheckpointError(
                f"vocabulary_map: the image ids lie in {len(self.ranges)} ranges, {self.ranges[:4]}, but the "
                "processor needs a single one."
            )
        codes = list(self.code_of_id.values())
        if sorted(codes) != list(range(num_embeddings)):
            raise CheckpointError(
                f"vocabulary_map: its {len(codes)} image tokens do not name each of the {num_embeddings} codes of "
                "vq_config.num_embeddings once."
            )
        return torch.tensor(codes)


def convert_vq_model(
    config: ChameleonConfig,
    vocabulary: ImageVocabulary,
    tensors: Mapping[str, torch.Tensor],
    vqgan: Mapping[str, torch.Tensor] | None = None,
) -> MomaVQModel:
    """Return the source's image tokenizer with a renumbered codebook: code `c` is that of the `c`-th image id.

    Token ids stay the source's, so that logits can be compared id by id.
    """
    fields = vq_config_of(config).to_dict()
    known = MomaVQConfig().to_dict().keys() - {"model_type", "transformers_version", "dtype"}
    try:
        vq_config = MomaVQConfig(**{name: fields[name] for name in known & fields.keys()})
    except (ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"vq_config: no MomaVQConfig can express it: {error}") from error
    order = vocabulary.codebook_order(vq_config.num_embeddings)
    if vqgan is not None:
        _check_same_codes(tensors, vqgan)
        tensors = vqgan
    vq_config.use_decoder = has_decoder(tensors)
    model = load_vq_model(tensors, vq_config)
    # a copy, as the caller may still use the tensors
    model.quantize.embedding.weight = nn.Parameter(model.quantize.embedding.weight.detach()[order])
    return model


def vq_config_of(config: ChameleonConfig) -> ChameleonVQVAEConfig:
    """Return the configuration of the source's image tokenizer, which reading has made a configuration of."""
    return config.vq_config  # pyright: ignore[reportReturnType]


def _check_same_codes(tensors: Mapping[str, torch.Tensor], vqgan: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if not name.startswith(_ENCODING_PREFIXES):
            continue
        other = vqgan.get(name)
        # the checkpoint may be the rounded one of the two
        if other is None or other.shape != tensor.shape or not torch.allclose(other.to(tensor.dtype), tensor):
            raise CheckpointError(
                f"vqgan: {name!r} is missing or differs from the checkpoint's 'model.vqmodel.{name}', so its codes "
                "mean other images; pass the tokenizer that the checkpoint was trained with."
            )


def convert_tokenizer(folder: str | Path, vocabulary: ImageVocabulary) -> PreTrainedTokenizerFast | None:
    """Return the source's tokenizer with its image tokens renamed to those of [`MomaProcessor`]; ids stay.

    The chat template stays as it is. One that takes `content` for a string knows no parts of a message: write
    `<image>` into the text, and pass the images to the processor beside it.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        return None
    names = dict(zip(vocabulary.code_of_id, image_code_tokens(len(vocabulary.code_of_id))))
    names |= {
        token_id: name
        for token_id, name in (
            (vocabulary.begin_id, BEGIN_IMAGE_TOKEN),
            (vocabulary.end_id, END_IMAGE_TOKEN),
            (vocabulary.placeholder_id, IMAGE_TOKEN),
        )
        if token_id is not None
    }
    read_json(folder / "tokenizer.json")
    try:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # the library raises nothing narrower
    except Exception as error:
        raise CheckpointError(f"{folder / 'tokenizer.json'}: no tokenizer can be made of it: {error}") from error
    backend = _rename_tokens(backend, names)
    # tokens that were ordinary ones become special, under their ids
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names.values()])
    source_settings = read_json(folder / "tokenizer_config.json", default={})
    settings = read_json(folder / "special_tokens_map.json", default={}) | source_settings
    settings = {name: settings[name] for name in _TOKENIZER_FIELDS if settings.get(name) is not None}
    vocab = backend.get_vocab()
    for field, token in (("bos_token", "<s>"), ("eos_token", "</s>"), ("pad_token", "<pad>")):
        if field not in settings and token in vocab:
            settings[field] = token
    settings = {name: value.get("content") if isinstance(value, dict) else value for name, value in settings.items()}
    try:
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            model_input_names=["input_ids", "attention_mask"],
            chat_template=_chat_template(folder, source_settings),
            **settings,
        )
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: no tokenizer can be made of it: {one_line(error)}"
        ) from error


def _chat_template(folder: Path, settings: dict) -> str | dict[str, str] | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = read_json(folder / "chat_template.json", default={}).get("chat_template", settings.get("chat_template"))
    # several templates, by name
    return {entry["name"]: entry["template"] for entry in template} if isinstance(template, list) else template


def _rename_tokens(backend: Tokenizer, names: dict[int, str]) -> Tokenizer:
    absent = [token_id for token_id in names if backend.id_to_token(token_id) is None]
    if absent:
        raise ProcessorError(f"tokenizer.json: no token has the id {absent[0]}, which vocabulary_map names.")
    new_name = {backend.id_to_token(token_id): name for token_id, name in names.items()}
    content = json.loads(backend.to_str())
    model = content["model"]
    if not isinstance(model.get("vocab"), dict):
        raise ProcessorError(f"tokenizer.json: tokens of a {model.get('type')} model cannot be renamed, only of BPE.")
    model["vocab"] = {new_name.get(token, token): token_id for token, token_id in model["vocab"].items()}
    # no text is merged into an image
    model["merges"] = [
        merge for merge in model.get("merges", []) if not new_name.keys() & {merge[0], merge[1], merge[0] + merge[1]}
    ]
    for token in content["added_tokens"]:
        token["content"] = new_name.get(token["content"], token["content"])
    return Tokenizer.from_str(json.dumps(content))


def convert_image_processor(folder: str | Path, resolution: int) -> MomaImageProcessor:
    """Return an image processor that gives the pixel values that the source's gives."""
    folder = Path(folder)
    files = [folder / name for name in ("preprocessor_config.json", "processor_config.json")]
    if any([read_json(path, default={}) for path in files]):
        try:
            source = ChameleonImageProcessor.from_pretrained(folder)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{files[0]}: no image processor can be made of it: {one_line(error)}") from error
    else:
        crop = {"height": resolution, "width": resolution}
        source = ChameleonImageProcessor(size={"shortest_edge": resolution}, crop_size=crop)
    settings = source.to_dict()
    return MomaImageProcessor(**{name: settings[name] for name in _IMAGE_PROCESSOR_FIELDS if name in settings})


def convert_processor(folder: str | Path, vocabulary: ImageVocabulary, vq_model: MomaVQModel) -> MomaProcessor | None:
    """Join the source's tokenizer and image processor with the converted VQ model."""
    tokenizer = convert_tokenizer(folder, vocabulary)
    if tokenizer is None:
        return None
    image_processor = convert_image_processor(folder, vq_model.config.resolution)
    try:
        return MomaProcessor(image_processor, tokenizer, vq_model, chat_template=tokenizer.chat_template)
    except ValueError as error:
        raise ProcessorError(f"The parts of the processor do not fit together. {error}") from error
