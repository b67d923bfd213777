# SPDX-License-Identifier: Apache-2.0
"""Chameleon checkpoints of Transformers as MoMa 1t1i models: each modality's expert is a copy of the one there was."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import AddedToken, Tokenizer
from torch import nn
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonImageProcessor,
    ChameleonVQVAEConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from tokenization import MomaImageProcessor, MomaProcessor, MomaVQConfig, MomaVQModel
from tokenization.processing_moma import VQ_SUBFOLDER
from tokenization.text_tokenizer_moma import BEGIN_IMAGE_TOKEN, END_IMAGE_TOKEN, IMAGE_TOKEN, image_code_tokens

from ..configuration_moma import MomaConfig
from ..data.encoding import PIXEL_SETTINGS
from ..modeling_moma import MomaForCausalLM
from ..utils.messages import one_line
from .reading import CheckpointError, CheckpointReader, read_json
from .transfer import (
    HEAD,
    SAME_NAMED_FIELDS,
    Receipt,
    check_tied_head,
    decoder_entries,
    probe_logits,
    relative_difference,
    rounded_weights,
    transfer,
)
from .vqgan import has_decoder, load_vq_model, read_vqgan


logger = logging.get_logger(__name__)

VQ_PREFIX = "model.vqmodel."
_TAKEN_FIELDS = (*SAME_NAMED_FIELDS, "vocab_size", "rope_parameters", "attention_bias")
_CODE_NAME_START, _CODE_NAME_END = "IMGIMG", "Z"
_DIGITS = {chr(ord("A") + digit): str(digit) for digit in range(10)}
_BEGIN_NAME, _END_NAME = "<racm3:break>", "<eoss>"
# tensors without which codes would mean other images; the decoder may differ
_ENCODING_PREFIXES = ("encoder.", "quant_conv.", "quantize.")
_IMAGE_PROCESSOR_FIELDS = ("do_convert_rgb", *PIXEL_SETTINGS)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.json")
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


def read_config(fields: Mapping) -> ChameleonConfig:
    """Return the configuration of a source out of its `config.json`."""
    if fields.get("model_type") != "chameleon":
        raise CheckpointError(f"model_type: config.json says {fields.get('model_type')!r}, not 'chameleon'.")
    try:
        source = ChameleonConfig.from_dict(dict(fields))
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise CheckpointError(f"config.json: Transformers cannot read it: {error}") from error
    if source.mlp_bias:
        raise CheckpointError("mlp_bias: True, but the experts of MoMa have no biases.")
    return source


def vq_config_of(source: ChameleonConfig) -> ChameleonVQVAEConfig:
    """Return the configuration of the source's image tokenizer, which reading has made a configuration of."""
    return source.vq_config  # pyright: ignore[reportReturnType]


def config_from_chameleon(source: ChameleonConfig, vocabulary: ImageVocabulary) -> MomaConfig:
    """Return the MoMa 1t1i configuration that computes what a Chameleon computes."""
    names, vq = source.vocabulary_map or {}, vq_config_of(source)
    special_ids = {
        field: names.get(name, getattr(source, field))
        for field, name in (("bos_token_id", "<s>"), ("eos_token_id", "</s>"), ("pad_token_id", "<pad>"))
    }
    try:
        return MomaConfig(
            **{name: getattr(source, name) for name in _TAKEN_FIELDS},
            **special_ids,
            num_experts={"text": 1, "image": 1},
            norm_placement="post" if source.swin_norm else "pre",
            qk_norm="layernorm_per_head",
            modality_token_ranges={"image": vocabulary.ranges},
            begin_image_token_id=vocabulary.begin_id,
            end_image_token_id=vocabulary.end_id,
            image_seq_length=(vq.resolution // 2 ** (len(vq.channel_multiplier) - 1)) ** 2,
        )
    except (ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"config.json: no MomaConfig can express it: {error}") from error


def convert_chameleon(
    source: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    max_shard_size: int | str = "2GB",
    probe: bool = True,
    vqgan: str | Path | None = None,
) -> Receipt:
    """Write a Chameleon checkpoint as a MoMa 1t1i with its processor. Token ids stay the source's.

    The codebook is renumbered, so that code `c` belongs to the `c`-th image id, as [`MomaProcessor`] wants it.
    Where the image ids do not allow that, or the folder has no tokenizer, the language model is written all the
    same, and the log and the report say what is missing.
    """
    reader = CheckpointReader(source, allow_pickle)
    source_config = read_config(reader.config)
    vocabulary = ImageVocabulary.from_map(source_config.vocabulary_map)
    config = config_from_chameleon(source_config, vocabulary)
    original = read_vqgan(vqgan, allow_pickle=allow_pickle) if vqgan is not None else None
    write_images, note = _convert_images(reader, source_config, vocabulary, original)
    ignored = {f"{VQ_PREFIX}*": note}
    if config.tie_word_embeddings:
        check_tied_head(reader, config)
        ignored[HEAD] = "tied to the embedding"
    return transfer(
        reader,
        config,
        decoder_entries(config).values(),
        output,
        ignored=ignored,
        max_shard_size=max_shard_size,
        dtype=dtype,
        extras=write_images,
        probe=partial(_compare_logits, source_config, rounded_weights(reader, dtype), config) if probe else None,
    )


def _convert_images(
    reader: CheckpointReader,
    source: ChameleonConfig,
    vocabulary: ImageVocabulary,
    original: Mapping[str, torch.Tensor] | None,
) -> tuple[Callable[[Path], object] | None, str]:
    """Return a function that writes the image tokenizer into a folder, and what the report says of it."""
    try:
        vocabulary.codebook_order(vq_config_of(source).num_embeddings)
    except CheckpointError as error:
        logger.warning(f"The language model is converted without an image tokenizer. {error}")
        return None, "image tokenizer, left out: the image ids do not fit the processor"
    tensors = {key.removeprefix(VQ_PREFIX): reader[key] for key in reader if key.startswith(VQ_PREFIX)}
    vq_model = convert_vq_model(source, vocabulary, tensors, original)
    note = "image tokenizer"
    if original is None and not vq_model.config.use_decoder:
        logger.warning(
            "The checkpoint has no decoder for images: the model reads images, but those it writes cannot be "
            "shown. Pass the original vqgan.ckpt (--vqgan) to convert it as well."
        )
        note += ", decoder missing"
    try:
        processor = convert_processor(reader.folder, vocabulary, vq_model)
    except ProcessorError as error:
        logger.warning(f"No processor is written, its VQ model alone. {error}")

        def save_vq_model(folder: Path) -> None:
            vq_model.save_pretrained(folder / VQ_SUBFOLDER)

        return save_vq_model, f"{note}, in {VQ_SUBFOLDER} without a processor for want of a tokenizer that fits"
    # truncation and pipelines cut there
    processor.tokenizer.model_max_length = source.max_position_embeddings
    return processor.save_pretrained, f"{note}, in the processor"


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


def convert_tokenizer(folder: str | Path, vocabulary: ImageVocabulary) -> PreTrainedTokenizerFast:
    """Return the source's tokenizer with its image tokens renamed to those of [`MomaProcessor`]; ids stay.

    The chat template stays as it is. One that takes `content` for a string knows no parts of a message: write
    `<image>` into the text, and pass the images to the processor beside it.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ProcessorError("The checkpoint has no tokenizer.json.")
    names = dict(zip(vocabulary.code_of_id, image_code_tokens(len(vocabulary.code_of_id))))
    frame = {
        vocabulary.begin_id: BEGIN_IMAGE_TOKEN,
        vocabulary.end_id: END_IMAGE_TOKEN,
        vocabulary.placeholder_id: IMAGE_TOKEN,
    }
    names |= {token_id: name for token_id, name in frame.items() if token_id is not None}
    # said of a file by its name, before the library says less
    legacy = [read_json(folder / name, default={}) for name in _TOKENIZER_FILES][-1]
    try:
        source = PreTrainedTokenizerFast.from_pretrained(folder)
    # the library raises nothing narrower
    except Exception as error:
        raise CheckpointError(
            f"{folder}: no tokenizer can be made of its tokenizer.json and tokenizer_config.json: {one_line(error)}"
        ) from error
    backend = _rename_tokens(source.backend_tokenizer, names)
    # tokens that were ordinary ones become special, under their ids
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names.values()])
    given = {**source.init_kwargs, **source.special_tokens_map}
    settings = {name: given[name] for name in _TOKENIZER_FIELDS if given.get(name) is not None}
    vocab = backend.get_vocab()
    for field, token in (("bos_token", "<s>"), ("eos_token", "</s>"), ("pad_token", "<pad>")):
        if token in vocab:
            settings.setdefault(field, token)
    template = source.chat_template
    if not (folder / "chat_template.jinja").is_file():
        template = legacy.get("chat_template", template)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=template,
        **settings,
    )


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


def convert_processor(folder: str | Path, vocabulary: ImageVocabulary, vq_model: MomaVQModel) -> MomaProcessor:
    """Join the source's tokenizer and image processor with the converted VQ model."""
    tokenizer = convert_tokenizer(folder, vocabulary)
    image_processor = convert_image_processor(folder, vq_model.config.resolution)
    try:
        return MomaProcessor(image_processor, tokenizer, vq_model, chat_template=tokenizer.chat_template)
    except ValueError as error:
        raise ProcessorError(f"The parts of the processor do not fit together. {error}") from error


def _compare_logits(
    source: ChameleonConfig, weights: Mapping[str, torch.Tensor], config: MomaConfig, written: CheckpointReader
) -> dict[str, float]:
    images = [token_id for bounds in config.modality_token_ranges["image"] for token_id in range(*bounds)]
    texts = sorted(set(range(config.vocab_size)).difference(images))
    logits = probe_logits(
        # equal numbers of images and texts, so that both experts are tested
        images + texts[: len(images)],
        (ChameleonForConditionalGeneration, source, weights),
        (MomaForCausalLM, config, written),
    )
    return {"relative_difference": relative_difference(*logits)}
