# SPDX-License-Identifier: Apache-2.0
"""Text models of the Llama family (Llama, Qwen2, Qwen3, Mistral) as MoMa 1t1i models with picture tokens."""

import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tokenization import MomaProcessor, add_picture_tokens

from .. import MomaConfig, MomaForCausalLM
from .fields import SAME_NAMED_FIELDS
from .generation import convert_generation_config
from .probe import (
    ProbeResult,
    new_token_probability,
    relative_difference,
    rounded_weights,
    streamed_model,
    text_batch,
)
from .reading import CheckpointError, CheckpointReader
from .receipt import Receipt
from .transfer import Entry, transfer


MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
IMAGE_GROUPS = ("copy", "new")
# new rows lie around the mean of the old ones, at this share of their spread, to be told apart. The mean row has the
# mean of the old logits; what the new tokens take of the probability by that is measured, and in the receipt
NEW_ROW_SPREAD = 0.1
STATISTICS_ROWS = 1024
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def convert_llama(
    source: str | Path,
    output: str | Path,
    *,
    processor: str | Path,
    image_group: str = "copy",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    max_shard_size: int | str = "2GB",
    probe: bool = True,
) -> Receipt:
    """Convert a text model into a MoMa 1t1i that computes the same logits on text, and can learn pictures.

    The text group takes the feed-forward weights. The source's tokenizer gets picture tokens; their rows of the
    embedding, and of an untied head, are drawn around the mean of the old rows with 0.1 of their standard deviation,
    channel by channel. All other rows of the source stay where they are.

    Args:
        source: folder of a checkpoint of Transformers, with its tokenizer.
        output: folder for the model and its processor.
        processor: folder of a [`MomaProcessor`], whose picture tokenizer the model shall use.
        image_group: `"copy"` starts the image group with the text group's weights, `"new"` with random ones.
        seed: of the new weights.
        dtype: of the output; by default the source's. The probe compares with the source rounded likewise.
        allow_pickle: see [`CheckpointReader`].
        max_shard_size: size of the output's files.
        probe: compare the logits of both models on a batch of text.

    Returns:
        Also saved as `conversion.json`. It says what share of the probability the new tokens have on text: about their
        share of the vocabulary where the source is undecided, less where it is sure.

    Raises:
        CheckpointError: the source is damaged, or has a feature that MoMa cannot express.
        ValueError: an argument is not one of the choices.
    """
    if image_group not in IMAGE_GROUPS:
        raise ValueError(f"`image_group` must be one of {IMAGE_GROUPS}, got {image_group!r}.")
    reader = CheckpointReader(source, allow_pickle)
    rounded = rounded_weights(reader, dtype)
    source_config = _source_config(reader)
    num_rows = source_config.vocab_size
    moma_processor, new_ids = _with_pictures(reader.folder, processor)
    vocab_size = max(num_rows, moma_processor.token_layout()["vocab_size"])
    new_ids = sorted({*new_ids, *range(num_rows, vocab_size)})
    config = _moma_config(source_config, {**moma_processor.token_layout(), "vocab_size": vocab_size}, reader)
    # truncation and pipelines cut there
    moma_processor.tokenizer.model_max_length = config.max_position_embeddings
    old_ids = sorted(set(range(num_rows)) - set(new_ids))
    _check_tied_head(reader, config)
    return transfer(
        reader,
        config,
        _entries(config, source_config, new_ids, image_group, seed),
        output,
        ignored=_ignored(config),
        max_shard_size=max_shard_size,
        dtype=dtype,
        generation_config=convert_generation_config(reader.folder, config, source_config),
        extras=moma_processor.save_pretrained,
        probe=functools.partial(_compare, source_config, rounded, config, old_ids) if probe else None,
    )


def _source_config(reader: CheckpointReader) -> PreTrainedConfig:
    raw, where = reader.config, reader.folder / "config.json"
    model_type = raw.get("model_type")
    if model_type == "smollm3":
        raise CheckpointError(
            f"{where}: `model_type` = 'smollm3': some of its layers have no rotary embeddings, which MoMa cannot "
            "express. SmolLM2 (model_type 'llama') can be converted."
        )
    if model_type not in MODEL_TYPES:
        raise CheckpointError(f"{where}: `model_type` = {model_type!r}: it must be one of {MODEL_TYPES}.")
    if raw.get("quantization_config"):
        raise CheckpointError(f"{where}: `quantization_config`: convert the unquantised checkpoint instead.")
    try:
        config = AutoConfig.from_pretrained(reader.folder)
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{where}: Transformers cannot read it: {reason}") from error
    rope = config.rope_parameters or {}
    sliding = model_type == "mistral" and config.sliding_window is not None
    sliding = sliding or "sliding_attention" in (getattr(config, "layer_types", None) or ())
    for is_foreign, field, what in (
        (getattr(config, "mlp_bias", False), "mlp_bias", "feed-forward layers with biases"),
        (sliding, "sliding_window", "attention within a sliding window"),
        (rope.get("partial_rotary_factor", 1.0) != 1.0, "partial_rotary_factor", "heads that turn in part only"),
        (rope.get("rope_type") not in ("default", *ROPE_INIT_FUNCTIONS), "rope_parameters", "such rotary embeddings"),
    ):
        if is_foreign:
            value = getattr(config, field, rope.get(field))
            raise CheckpointError(f"{where}: `{field}` = {value!r}: MoMa cannot express {what}.")
    return config


def _check_tied_head(reader: CheckpointReader, config: MomaConfig) -> None:
    if not config.tie_word_embeddings or not {EMBEDDING, HEAD} <= reader.shapes.keys():
        return
    for start in range(0, reader.shapes[EMBEDDING][0], STATISTICS_ROWS):
        rows = slice(start, start + STATISTICS_ROWS)
        if not torch.equal(reader.read(EMBEDDING, rows), reader.read(HEAD, rows)):
            raise CheckpointError(
                f"{reader.files[HEAD]}: {HEAD!r} differs from the embedding, but config.json has "
                "`tie_word_embeddings` = True. Set it to False there if the head is right, or remove the key."
            )


def _with_pictures(source: Path, processor: str | Path) -> tuple[MomaProcessor, set[int]]:
    try:
        parts = MomaProcessor.from_pretrained(processor)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{processor}: it does not load as a MomaProcessor: {error}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        old_ids = set(tokenizer.get_vocab().values())
        add_picture_tokens(tokenizer, parts.codebook_size)
    # an ImportError is that of a library which a file without tokenizer.json needs
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
        file = next((source / name for name in names if (source / name).is_file()), source / names[0])
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{file}: this tokenizer cannot be given picture tokens, which need a tokenizer.json that can be read: "
            f"{reason}"
        ) from error
    # prompts of a batch have to end side by side
    tokenizer.padding_side = "left"
    joined = MomaProcessor(parts.image_processor, tokenizer, parts.vq_model, chat_template=tokenizer.chat_template)
    return joined, set(tokenizer.get_vocab().values()) - old_ids


def _moma_config(source: PreTrainedConfig, layout: dict, reader: CheckpointReader) -> MomaConfig:
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
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{reader.folder / 'config.json'}: no MomaConfig can express it: {reason}") from error


def _ignored(config: MomaConfig) -> dict[str, str]:
    ignored = {"model.layers.*.self_attn.rotary_emb.inv_freq": "rotary frequencies, computed anew"}
    if config.tie_word_embeddings:
        ignored[HEAD] = "the head, tied to the embedding"
    return ignored


def _entries(
    config: MomaConfig, source: PreTrainedConfig, new_ids: list[int], image_group: str, seed: int
) -> list[Entry]:
    width = config.hidden_size
    names = [EMBEDDING] if config.tie_word_embeddings else [EMBEDDING, HEAD]
    entries = []
    for offset, name in enumerate(names):
        extend = functools.partial(
            extend_rows, num_rows=config.vocab_size, new_ids=new_ids, generator=_generator(seed, offset)
        )
        shapes = ((source.vocab_size, width),)
        entries.append(Entry(name, (config.vocab_size, width), (name,), extend, source_shapes=shapes))
    entries.append(Entry("model.norm.weight", (width,), ("model.norm.weight",)))
    for layer in range(config.num_hidden_layers):
        entries += _attention_entries(config, source, f"model.layers.{layer}.")
        entries += _feed_forward_entries(config, layer, image_group, seed)
    return entries


def _attention_entries(config: MomaConfig, source: PreTrainedConfig, layer: str) -> list[Entry]:
    width = config.hidden_size
    query_width, key_width = (
        heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    entries = [
        Entry(f"{layer}attention_norm.weight", (width,), (f"{layer}input_layernorm.weight",)),
        Entry(f"{layer}ffn_norm.weight", (width,), (f"{layer}post_attention_layernorm.weight",)),
    ]
    shapes = {
        "q_proj": (query_width, width),
        "k_proj": (key_width, width),
        "v_proj": (key_width, width),
        "o_proj": (width, query_width),
    }
    for projection, shape in shapes.items():
        name = f"{layer}self_attn.{projection}."
        entries.append(Entry(f"{name}weight", shape, (f"{name}weight",)))
        if not config.attention_bias:
            continue
        if projection == "o_proj" and source.model_type == "qwen2":
            zeros = functools.partial(torch.zeros, shape[0])
            entries.append(Entry(f"{name}bias", shape[:1], build=zeros, kind="new"))
        else:
            entries.append(Entry(f"{name}bias", shape[:1], (f"{name}bias",)))
    if config.qk_norm == "rmsnorm":
        for norm in ("q_norm", "k_norm"):
            name = f"{layer}self_attn.{norm}.weight"
            entries.append(Entry(name, (config.head_dim,), (name,)))
    return entries


def _feed_forward_entries(config: MomaConfig, layer: int, image_group: str, seed: int) -> list[Entry]:
    wide, narrow = (config.intermediate_size, config.hidden_size), (config.hidden_size, config.intermediate_size)
    entries = []
    for place, (projection, shape) in enumerate({"gate_proj": wide, "up_proj": wide, "down_proj": narrow}.items()):
        source_name = f"model.layers.{layer}.mlp.{projection}.weight"
        text, image = (
            f"model.layers.{layer}.mlp.groups.{group}.mlp.{projection}.weight" for group in ("text", "image")
        )
        entries.append(Entry(text, shape, (source_name,)))
        if image_group == "copy":
            entries.append(Entry(image, shape, (source_name,), kind="copied"))
        else:
            # the first two places are those of the embedding and the head
            draw = functools.partial(_draw, shape, config.initializer_range, seed, 2 + 3 * layer + place)
            entries.append(Entry(image, shape, build=draw, kind="new"))
    return entries


def _generator(seed: int, place: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed << 20) + place)


def _draw(shape: tuple[int, ...], std: float, seed: int, place: int) -> torch.Tensor:
    return torch.randn(shape, generator=_generator(seed, place)) * std


def extend_rows(old: torch.Tensor, num_rows: int, new_ids: list[int], generator: torch.Generator) -> torch.Tensor:
    """Give an embedding rows for new tokens: the mean of the old rows, and noise of 0.1 of their standard deviation.

    Args:
        old: the source's embedding, `[V, D]`.
        num_rows: rows of the result.
        new_ids: rows to draw: all beyond the old ones, and old ones that no token used.
        generator: of the noise.

    Returns:
        `[num_rows, D]`, in the type of the old rows.
    """
    new = torch.tensor(new_ids)
    is_kept = torch.ones(len(old), dtype=torch.bool)
    is_kept[new[new < len(old)]] = False
    total = torch.zeros(2, old.shape[1], dtype=torch.float64)
    # in pieces, as all rows in double precision would take several times the memory of the embedding
    for rows, kept in zip(old.split(STATISTICS_ROWS), is_kept.split(STATISTICS_ROWS)):
        rows = rows[kept].double()
        total += torch.stack([rows.sum(dim=0), rows.square().sum(dim=0)])
    mean, mean_square = total / is_kept.sum()
    std = (mean_square - mean.square()).clamp_min(0).sqrt()
    noise = torch.randn(len(new_ids), old.shape[1], generator=generator)
    result = old.new_empty(num_rows, old.shape[1])
    result[: len(old)] = old
    result[new] = (mean + NEW_ROW_SPREAD * std * noise).to(old.dtype)
    return result


def _compare(
    source_config: PreTrainedConfig,
    source: Mapping[str, torch.Tensor],
    config: MomaConfig,
    old_ids: list[int],
    converted: CheckpointReader,
) -> ProbeResult:
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
    difference = relative_difference(*(part[:, old_ids] for part in logits))
    return ProbeResult(difference, new_token_probability(logits[1], new_ids))
