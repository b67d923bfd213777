# SPDX-License-Identifier: Apache-2.0
"""Text models of the Llama family (Llama, Qwen2, Qwen3, Mistral) as MoMa 1t1i models with image tokens."""

import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from tokenization import MomaProcessor, add_image_tokens
from tokenization.text_tokenizer_moma import beginning_ids, with_image_parts

from ..configuration_moma import MomaConfig
from ..errors_moma import InputError
from ..hub.loading import open_processor
from ..modeling_moma import MomaForCausalLM
from ..utils.messages import one_line
from .embedding_rows import MOST_CODES, ROUNDS, TEXTS, ImageTexts, fit_code_rows, image_loss
from .gguf import GgufReader
from .llama_entries import BuiltWeights, ignored_keys, llama_entries, set_code_rows
from .output_comparison import (
    new_token_probability,
    relative_difference,
    rounded_weights,
    streamed_model,
    text_batch,
)
from .reading import CheckpointError, CheckpointReader, TensorSource
from .sources import open_source
from .transfer import (
    EMBEDDING,
    HEAD,
    SAME_NAMED_FIELDS,
    Entry,
    Receipt,
    check_dtype,
    check_free,
    check_source,
    check_tied_head,
    transfer,
)
from .unsupported import check_features, check_model_type


IMAGE_GROUPS = ("copy", "new")
CODE_ROWS = ("fitted", "mean")
# longest text, in words, that code rows are fitted to
MOST_WORDS = 24
# texts of words at random beside them
ODD_ROWS = 4


def convert_llama(
    source: str | Path,
    output: str | Path,
    *,
    processor: str | Path,
    gguf_file: str | None = None,
    image_group: str = "copy",
    code_rows: str = "fitted",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    max_shard_size: int | str = "2GB",
    probe: bool = True,
) -> Receipt:
    """Convert a text model into a MoMa 1t1i that computes the same logits on text, and can learn images.

    The text group takes the feed-forward weights. The source's tokenizer gets image tokens; their rows of the
    embedding, and of an untied head, are drawn around the mean of the old rows with 0.1 of their standard deviation,
    channel by channel. All other rows of the source stay where they are. The chat template of the source stays for
    messages that are strings, and takes parts with images.
    """
    for name, value, choices in (("image_group", image_group, IMAGE_GROUPS), ("code_rows", code_rows, CODE_ROWS)):
        if value not in choices:
            raise InputError(f"`{name}` must be one of {choices}, got {value!r}.")
    # before minutes are spent on the fit
    check_dtype(dtype)
    check_free(Path(output).absolute())
    reader = open_source(source, gguf_file, allow_pickle)
    rounded = rounded_weights(reader, dtype)
    source_config = _source_config(reader)
    num_rows = source_config.vocab_size
    moma_processor, new_ids = _with_images(reader, processor)
    vocab_size = max(num_rows, moma_processor.token_layout()["vocab_size"])
    new_ids = sorted({*new_ids, *range(num_rows, vocab_size)})
    config = _moma_config(source_config, {**moma_processor.token_layout(), "vocab_size": vocab_size}, reader)
    # truncation and pipelines cut there
    moma_processor.tokenizer.model_max_length = config.max_position_embeddings
    old_ids = sorted(set(range(num_rows)) - set(new_ids))
    check_tied_head(reader, config)
    entries = llama_entries(config, source_config, new_ids, image_group, seed)
    texts = image_texts(moma_processor, old_ids)
    ignored = ignored_keys(config)
    check_source(reader, entries.values(), ignored)
    if code_rows == "fitted":
        _fit(config, reader, entries, texts, dtype)
    return transfer(
        reader,
        config,
        entries.values(),
        output,
        ignored=ignored,
        max_shard_size=max_shard_size,
        dtype=dtype,
        source_config=source_config,
        extras=moma_processor.save_pretrained,
        probe=functools.partial(_compare, source_config, rounded, config, old_ids, texts) if probe else None,
    )


def _source_config(reader: TensorSource) -> PreTrainedConfig:
    where = reader.path if isinstance(reader, GgufReader) else reader.folder / "config.json"
    check_model_type(reader.config, where)
    if isinstance(reader, GgufReader):
        config = reader.source_config
    else:
        if reader.config.get("quantization_config"):
            raise CheckpointError(
                f"{where}: `quantization_config`: convert the unquantised checkpoint instead. Of a GGUF file pass "
                "--gguf-file, without saving it first."
            )
        try:
            config = AutoConfig.from_pretrained(reader.folder)
        except (ValueError, KeyError, TypeError, ArithmeticError, StrictDataclassError) as error:
            reason = one_line(error)
            raise CheckpointError(f"{where}: Transformers cannot read it: {reason}") from error
    check_features(config, where)
    for name in ("vocab_size", "num_attention_heads", "hidden_size", "num_hidden_layers"):
        if not (type(value := getattr(config, name)) is int and value > 0):
            raise CheckpointError(f"{where}: {name} = {value!r} describes no model.")
    return config


def _with_images(reader: TensorSource, processor: str | Path) -> tuple[MomaProcessor, set[int]]:
    try:
        parts = open_processor(str(processor))
    except InputError as error:
        raise CheckpointError(str(error)) from error
    if parts.codecs:
        raise CheckpointError(
            f"--processor {str(processor)!r} has codecs of {', '.join(parts.codecs)}, which a conversion does not "
            "take over: give a processor of images alone, such as the one that these were added to."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(reader.folder, **reader.loading)
        old_ids = set(tokenizer.get_vocab().values())
        add_image_tokens(tokenizer, parts.codebook_size)
    # tokenizers raises nothing narrower at a file of another version; an ImportError is that of a library which a file
    # without tokenizer.json needs
    except Exception as error:
        names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
        found = (reader.folder / name for name in names if (reader.folder / name).is_file())
        file = next(found, reader.folder / names[0])
        reason = one_line(error)
        raise CheckpointError(
            f"{file}: this tokenizer cannot be given image tokens, which need a tokenizer.json that can be read: "
            f"{reason}"
        ) from error
    # prompts of a batch have to end side by side
    tokenizer.padding_side = "left"
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = {name: with_image_parts(one) for name, one in template.items()}
    elif template is not None:
        template = with_image_parts(template)
    # the file of the processor's template is the tokenizer's, too
    tokenizer.chat_template = template
    joined = MomaProcessor(parts.image_processor, tokenizer, parts.vq_model, chat_template=template)
    return joined, set(tokenizer.get_vocab().values()) - old_ids


def _moma_config(source: PreTrainedConfig, layout: dict, reader: TensorSource) -> MomaConfig:
    # Qwen2 has biases for queries, keys and values whatever its configuration says
    bias = source.model_type == "qwen2" or getattr(source, "attention_bias", False)
    try:
        return MomaConfig(
            **{field: getattr(source, field) for field in SAME_NAMED_FIELDS},
            **layout,
            head_dim=getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads,
            rope_parameters=dict(source.rope_parameters),
            attention_bias=bias,
            norm_placement="pre",
            qk_norm="rmsnorm" if source.model_type == "qwen3" else "none",
            num_experts={"text": 1, "image": 1},
        )
    except (ValueError, StrictDataclassError) as error:
        reason = one_line(error)
        raise CheckpointError(f"{reader.folder / 'config.json'}: no MomaConfig can express it: {reason}") from error


def image_texts(processor: MomaProcessor, old_ids: list[int]) -> ImageTexts:
    """Return the texts with images in the ids of a processor."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(old_ids), (ODD_ROWS, MOST_WORDS), generator=generator)
    tokenizer, frame = processor.tokenizer, processor.frames["image"]
    opening = beginning_ids(tokenizer)
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"][:MOST_WORDS] for text in TEXTS]
    return ImageTexts(
        words=[([*opening, *ids], ids) for ids in plain],
        opening=opening,
        begin=frame.begin,
        end=frame.end,
        code_ids=range(*frame.bounds),
        num_codes=min(MOST_CODES, processor.image_seq_length),
        odd=torch.tensor(old_ids)[picks].tolist(),
    )


def _head_name(config: MomaConfig) -> str:
    return EMBEDDING if config.tie_word_embeddings else HEAD


def _fit(
    config: MomaConfig, reader: TensorSource, entries: dict[str, Entry], texts: ImageTexts, dtype: torch.dtype | None
) -> None:
    rounds, head = ROUNDS if config.tie_word_embeddings else 1, _head_name(config)
    with logging.tqdm(total=rounds, desc="rows of image codes") as progress:
        rows = fit_code_rows(config, BuiltWeights(reader, entries, dtype), texts, head, progress.update)
    set_code_rows(entries[head], texts.code_ids, rows)


def _compare(
    source_config: PreTrainedConfig,
    source: Mapping[str, torch.Tensor],
    config: MomaConfig,
    old_ids: list[int],
    texts: ImageTexts,
    converted: CheckpointReader,
) -> dict[str, float]:
    batch = text_batch(old_ids)
    is_token = batch["attention_mask"].bool()
    logits = []
    for model_class, model_config, weights in (
        (MODEL_FOR_CAUSAL_LM_MAPPING[type(source_config)], source_config, source),
        (MomaForCausalLM, config, converted),
    ):
        model = streamed_model(model_class, model_config, weights)  # pyright: ignore[reportArgumentType]
        with torch.no_grad():
            logits.append(model(**batch, use_cache=False).logits[is_token])
    new_ids = sorted(set(range(config.vocab_size)) - set(old_ids))
    return {
        "relative_difference": relative_difference(*(part[:, old_ids] for part in logits)),
        "new_token_probability": new_token_probability(logits[1], new_ids),
        "image_loss": image_loss(config, converted, texts, _head_name(config)),
    }
