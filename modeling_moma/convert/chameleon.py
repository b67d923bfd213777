# SPDX-License-Identifier: Apache-2.0
"""Chameleon checkpoints of Transformers as MoMa 1t1i models: each modality's expert is a copy of the one there was."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import ChameleonConfig, ChameleonForConditionalGeneration
from transformers.utils import logging

from tokenization import MomaVQModel
from tokenization.processing_moma import VQ_SUBFOLDER

from ..configuration_moma import MomaConfig
from ..modeling_moma import MomaForCausalLM
from .chameleon_processor import (
    ImageVocabulary,
    ProcessorError,
    convert_processor,
    convert_vq_model,
    vq_config_of,
)
from .reading import CheckpointError, CheckpointReader
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
from .vqgan import has_decoder, read_vqgan


logger = logging.get_logger(__name__)

VQ_PREFIX = "model.vqmodel."
_TAKEN_FIELDS = (*SAME_NAMED_FIELDS, "vocab_size", "rope_parameters", "attention_bias")


def config_from_chameleon(config: Mapping) -> MomaConfig:
    """Return the MoMa 1t1i configuration that computes what a Chameleon computes."""
    source = _source_config(config)
    vocabulary = ImageVocabulary.from_map(source.vocabulary_map)
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


def _source_config(config: Mapping) -> ChameleonConfig:
    if config.get("model_type") != "chameleon":
        raise CheckpointError(f"model_type: config.json says {config.get('model_type')!r}, not 'chameleon'.")
    try:
        source = ChameleonConfig.from_dict(dict(config))
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise CheckpointError(f"config.json: Transformers cannot read it: {error}") from error
    if source.mlp_bias:
        raise CheckpointError("mlp_bias: True, but the experts of MoMa have no biases.")
    return source


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
    config = config_from_chameleon(reader.config)
    write_images, note = _convert_images(reader, vqgan, allow_pickle)
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
        probe=partial(_compare_logits, reader, config, dtype) if probe else None,
    )


def _convert_images(
    reader: CheckpointReader, vqgan: str | Path | None, allow_pickle: bool
) -> tuple[Callable[[Path], object] | None, str]:
    """Return a function that writes the image tokenizer into a folder, and what the report says of it."""
    source = _source_config(reader.config)
    vocabulary = ImageVocabulary.from_map(source.vocabulary_map)
    try:
        vocabulary.codebook_order(vq_config_of(source).num_embeddings)
    except CheckpointError as error:
        logger.warning(f"The language model is converted without an image tokenizer. {error}")
        return None, "image tokenizer, left out: the image ids do not fit the processor"
    tensors = {key.removeprefix(VQ_PREFIX): reader.read(key) for key in reader if key.startswith(VQ_PREFIX)}
    original = read_vqgan(vqgan, allow_pickle=allow_pickle) if vqgan is not None else None
    vq_model = convert_vq_model(source, vocabulary, tensors, original)
    note = "image tokenizer"
    if original is None and not has_decoder(tensors):
        logger.warning(
            "The checkpoint has no decoder for images: the model reads images, but those it writes cannot be "
            "shown. Pass the original vqgan.ckpt (--vqgan) to convert it as well."
        )
        note += ", decoder missing"
    try:
        processor = convert_processor(reader.folder, vocabulary, vq_model)
    except ProcessorError as error:
        logger.warning(f"No processor is written, its VQ model alone. {error}")
        processor = None
    if processor is None:
        save = partial(_save_vq_model, vq_model)
        return save, f"{note}, in {VQ_SUBFOLDER} without a processor for want of a tokenizer that fits"
    # truncation and pipelines cut there
    processor.tokenizer.model_max_length = source.max_position_embeddings
    return processor.save_pretrained, f"{note}, in the processor"


def _save_vq_model(vq_model: MomaVQModel, folder: Path) -> None:
    vq_model.save_pretrained(folder / VQ_SUBFOLDER)


def _compare_logits(
    reader: CheckpointReader, config: MomaConfig, dtype: torch.dtype | None, written: CheckpointReader
) -> dict[str, float]:
    images = [token_id for bounds in config.modality_token_ranges["image"] for token_id in range(*bounds)]
    texts = sorted(set(range(config.vocab_size)).difference(images))
    logits = probe_logits(
        # equal numbers of images and texts, so that both experts are tested
        images + texts[: len(images)],
        (ChameleonForConditionalGeneration, _source_config(reader.config), rounded_weights(reader, dtype)),
        (MomaForCausalLM, config, written),
    )
    return {"relative_difference": relative_difference(*logits)}
