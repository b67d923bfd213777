# SPDX-License-Identifier: Apache-2.0
"""Text models of the Llama family (Llama, Qwen2, Qwen3, Mistral) as MoMa 1t1i models with image tokens."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tokenization import MomaProcessor, add_image_tokens
from tokenization.text_tokenizer_moma import beginning_ids, with_image_parts

from ..configuration_moma import MomaConfig
from ..errors_moma import InputError
from ..hub.loading import open_processor
from ..hub.names import not_found_message
from ..modeling_moma import MomaForCausalLM
from ..utils.messages import one_line
from .embedding_rows import MOST_CODES, TEXTS, ImageTexts, extend_rows, fit_code_rows, image_loss
from .gguf import GgufReader
from .reading import CheckpointError, CheckpointReader, LazyWeights, TensorSource
from .transfer import (
    EMBEDDING,
    HEAD,
    SAME_NAMED_FIELDS,
    Entry,
    Receipt,
    check_tied_head,
    decoder_entries,
    probe_logits,
    relative_difference,
    rounded_weights,
    transfer,
)


MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# of kinds that are much like these, what they may have and MoMa lacks
DIFFERENCES = {
    "smollm3": "layers without rotary embeddings (SmolLM2, of model_type 'llama', can be converted)",
    "gemma3": (
        "norms both before and after attention and feed-forward (`norm_placement` is 'pre' or 'post'); embeddings "
        "scaled at the input but not in a tied head; attention within `sliding_window`, with rotary embeddings of its "
        "own"
    ),
    "qwen3_moe": (
        "gates that are a softmax over all experts (gates of MoMa are sigmoids of single scores); layers without "
        "experts between layers with them"
    ),
}
# configuration, index and tokenizer of a repository; no weights
SMALL_FILES = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
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
    reader = _open_source(source, gguf_file, allow_pickle)
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
    entries = _entries(config, source_config, new_ids, image_group, seed)
    texts = _image_texts(moma_processor, old_ids)
    ignored = {"model.layers.*.self_attn.rotary_emb.inv_freq": "rotary frequencies, computed anew"}
    if config.tie_word_embeddings:
        ignored[HEAD] = "the head, tied to the embedding"

    def write_extras(folder: Path) -> None:
        if code_rows == "fitted":
            _fit(config, reader, entries, texts, dtype)
        moma_processor.save_pretrained(folder)

    return transfer(
        reader,
        config,
        entries.values(),
        output,
        ignored=ignored,
        max_shard_size=max_shard_size,
        dtype=dtype,
        source_config=source_config,
        extras=write_extras,
        probe=partial(_compare, source_config, rounded, config, old_ids, texts) if probe else None,
    )


def _open_source(source: str | Path, gguf_file: str | None, allow_pickle: bool) -> TensorSource:
    folder = Path(source)
    if folder.is_file():
        raise CheckpointError(f"{source}: it is a file, and the folder of a checkpoint is needed.")
    is_name = not folder.is_dir()
    if is_name:
        folder = _fetch(str(source), gguf_file, allow_pickle)
    reader = CheckpointReader(folder, allow_pickle) if gguf_file is None else GgufReader(folder, gguf_file)
    if is_name:
        # the folder's is a hash
        reader.label = str(source) if gguf_file is None else f"{source}/{gguf_file}"
    return reader


def _fetch(name: str, gguf_file: str | None, allow_pickle: bool) -> Path:
    advice = (
        f"Without a network fetch it elsewhere, `hf download {name} --local-dir FOLDER`, and pass --source FOLDER."
    )
    problem = not_found_message(name)
    if problem is not None:
        raise CheckpointError(f"{name}: {problem}. {advice}")
    # and not those of other formats beside them, such as consolidated.safetensors
    weights = ["model*.safetensors", *(["pytorch_model*.bin"] if allow_pickle else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=[*SMALL_FILES, *([gguf_file] if gguf_file else weights)]))
    # the network's errors and those of missing files are OSErrors; that of a malformed name is a ValueError
    except (OSError, HFValidationError) as error:
        raise CheckpointError(f"{name}: it cannot be fetched from the Hub: {one_line(error)} {advice}") from error


def _source_config(reader: TensorSource) -> PreTrainedConfig:
    where = reader.path if isinstance(reader, GgufReader) else reader.folder / "config.json"
    model_type = reader.config.get("model_type")
    if model_type not in MODEL_TYPES:
        lacking = DIFFERENCES.get(str(model_type).removesuffix("_text"))
        why = f"it may have what MoMa cannot express: {lacking}" if lacking else f"it must be one of {MODEL_TYPES}"
        raise CheckpointError(f"{where}: `model_type` = {model_type!r}: {why}.")
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
    _check_features(config, where)
    for name in ("vocab_size", "num_attention_heads", "hidden_size", "num_hidden_layers"):
        if not (type(value := getattr(config, name)) is int and value > 0):
            raise CheckpointError(f"{where}: {name} = {value!r} describes no model.")
    return config


def _check_features(config: PreTrainedConfig, where: Path) -> None:
    """Refuse, by its field, what a model of a known kind may have and MoMa lacks."""
    rope = config.rope_parameters or {}
    sliding = config.model_type == "mistral" and config.sliding_window is not None
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


def _entries(
    config: MomaConfig, source: PreTrainedConfig, new_ids: list[int], image_group: str, seed: int
) -> dict[str, Entry]:
    """Return an entry for every tensor of the target."""
    entries = decoder_entries(config)

    def generator(place: int) -> torch.Generator:
        # the same draws however often a tensor is built
        return torch.Generator().manual_seed((seed << 20) + place)

    def extend(num_rows: int, place: int, old: torch.Tensor) -> torch.Tensor:
        return extend_rows(old, num_rows, new_ids, generator(place))

    def draw(shape: tuple[int, ...], place: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator(place)) * config.initializer_range

    for place, name in enumerate((EMBEDDING, HEAD)):
        if name in entries:
            entries[name].build = partial(extend, entries[name].shape[0], place)
            entries[name].source_shape = (source.vocab_size, config.hidden_size)
    for layer in range(config.num_hidden_layers):
        bias = f"model.layers.{layer}.self_attn.o_proj.bias"
        if source.model_type == "qwen2":
            entries[bias].source, entries[bias].build = None, partial(torch.zeros, config.hidden_size)
        if image_group == "new":
            for part, projection in enumerate(("gate_proj", "up_proj", "down_proj")):
                entry = entries[f"model.layers.{layer}.mlp.groups.image.mlp.{projection}.weight"]
                # the first two places are those of the embedding and the head
                entry.source, entry.build = None, partial(draw, entry.shape, 2 + 3 * layer + part)
    return entries


def _image_texts(processor: MomaProcessor, old_ids: list[int]) -> ImageTexts:
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


def _fit(
    config: MomaConfig, reader: TensorSource, entries: dict[str, Entry], texts: ImageTexts, dtype: torch.dtype | None
) -> None:
    """Let the head's rows of image codes come as [`fit_code_rows`] finds them."""
    head = _head_name(config)
    built = rounded_weights(LazyWeights(entries, lambda name: entries[name].made(reader)), dtype)
    row_CD = fit_code_rows(config, built, texts, head)
    extend = entries[head].build

    def build(old: torch.Tensor) -> torch.Tensor:
        result = extend(old)
        result[torch.tensor(texts.code_ids)] = row_CD.to(result.dtype)
        return result

    entries[head].build = build


def _head_name(config: MomaConfig) -> str:
    return EMBEDDING if config.tie_word_embeddings else HEAD


def _compare(
    source_config: PreTrainedConfig,
    source: Mapping[str, torch.Tensor],
    config: MomaConfig,
    old_ids: list[int],
    texts: ImageTexts,
    converted: CheckpointReader,
) -> dict[str, float]:
    source_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(source_config)]
    logits = probe_logits(old_ids, (source_class, source_config, source), (MomaForCausalLM, config, converted))
    new_ids = sorted(set(range(config.vocab_size)) - set(old_ids))
    return {
        "relative_difference": relative_difference(*(part[:, old_ids] for part in logits)),
        # of all of them together, the mean over positions
        "new_token_probability": float(logits[1].softmax(dim=-1)[:, new_ids].sum(dim=-1).mean()),
        "image_loss": image_loss(config, converted, texts, _head_name(config)),
    }
