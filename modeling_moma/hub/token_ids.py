# SPDX-License-Identifier: Apache-2.0
"""What the files of a model repository say of its token ids: the model's, the tokenizer's and those of codes agree."""

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import GenerationConfig

from tokenization import MomaVQConfig
from tokenization.image_tokenizers_moma import codebook_field

from ..utils.messages import one_line


VQ_FOLDER, GENERATION_FILE = "vq_model", "generation_config.json"
# those of a repository that say it
TOKEN_FILES = (
    "config.json",
    f"{VQ_FOLDER}/config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "processor_config.json",
    GENERATION_FILE,
)


def token_problems(contents: Mapping[str, dict]) -> Iterator[str]:
    """Check that model, tokenizer, image tokenizer and codecs mean the same by a token id."""
    config, vq_config, tokenizer, settings, processor, generation = (contents[name] for name in TOKEN_FILES)
    try:
        facts = _token_facts(config, vq_config, tokenizer)
        facts += _special_facts(config, tokenizer, settings)
        facts += _grid_facts(config, vq_config, processor)
        named = [("config.json", *fact) for fact in facts]
        facts = _special_facts({**config, **generation}, tokenizer, settings)
        named += [(GENERATION_FILE, *fact) for fact in facts if fact[0] in generation]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        yield f"config.json, tokenizer.json: the tokens in them cannot be compared ({error}): edited by hand?"
        return
    yield from _generation_problems(generation, config["vocab_size"])
    for file, name, of_model, of_processor in named:
        if of_model != of_processor:
            yield (
                f"{file}: {name} {of_model}, but the processor has {of_processor} there: it is the processor of "
                "another model."
            )


def _generation_problems(generation: dict, vocab_size: int) -> Iterator[str]:
    """Check that what `generate` goes by can be read, and names tokens that there are."""
    try:
        GenerationConfig.from_dict(generation).validate(strict=True)
    # whatever a value of another type meets there
    except Exception as error:
        yield f"{GENERATION_FILE}: Transformers cannot use it: {one_line(error)}"
        return
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = generation.get(name)
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is not None and not (type(token_id) is int and 0 <= token_id < vocab_size):
                yield f"{GENERATION_FILE}: {name} = {token_id!r} is no token of the model, which has {vocab_size}."
    for name in ("caption_suppress_tokens", "begin_suppress_tokens", "suppress_tokens"):
        ids = generation.get(name)
        are_ids = isinstance(ids, list) and all(
            type(token_id) is int and 0 <= token_id < vocab_size for token_id in ids
        )
        if ids is not None and not are_ids:
            yield f"{GENERATION_FILE}: {name} = {ids!r} is no list of tokens of the model, which has {vocab_size}."


def _token_facts(config: dict, vq_config: dict, tokenizer: dict) -> list[tuple[str, Any, Any]]:
    """Return what model and processor each say of the tokens, by what it is."""
    ids = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    ranges = config.get("modality_token_ranges") or {}
    start, stop = (ranges.get("image") or [[None, None]])[0]
    num_codes = vq_config.get(codebook_field(vq_config.get("model_type"))) or 0
    codes = sum(f"<|image_{code}|>" in ids for code in range(num_codes))
    facts = [
        ("begin_image_token_id", config.get("begin_image_token_id"), ids.get("<|begin_image|>")),
        ("end_image_token_id", config.get("end_image_token_id"), ids.get("<|end_image|>")),
        ("modality_token_ranges.image starts at", start, ids.get("<|image_0|>")),
        ("modality_token_ranges.image holds", start is not None and stop - start, codes),
    ]
    for modality, frame in (config.get("modality_frames") or {}).items():
        first = (ranges.get(modality) or [[None]])[0][0]
        facts += [
            (f"modality_frames.{modality}.begin", frame.get("begin"), ids.get(f"<|begin_{modality}|>")),
            (f"modality_frames.{modality}.end", frame.get("end"), ids.get(f"<|end_{modality}|>")),
            (f"modality_token_ranges.{modality} starts at", first, ids.get(f"<|{modality}_0|>")),
        ]
    return facts


def _special_facts(config: dict, tokenizer: dict, settings: dict) -> list[tuple[str, Any, Any]]:
    vocabulary = tokenizer["model"].get("vocab")
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    ids |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    needed = max(ids.values(), default=-1) + 1
    # rows of the embedding beyond the tokenizer's tokens do no harm
    facts = [("vocab_size", min(config["vocab_size"], needed), needed)]
    for name in ("pad", "bos", "eos"):
        token = settings.get(f"{name}_token")
        content = token.get("content") if isinstance(token, dict) else token
        value = config.get(f"{name}_token_id")
        # several tokens may end a text
        is_fine = value is None or isinstance(value, list) and ids.get(content) in value
        if content in ids and not is_fine:
            facts.append((f"{name}_token_id", value, ids[content]))
    return facts


def _grid_facts(config: dict, vq_config: dict, settings: dict) -> list[tuple[str, Any, Any]]:
    crop = (settings.get("image_processor") or {}).get("crop_size")
    if vq_config.get("model_type") != "moma_vq" or not isinstance(crop, dict):
        return []
    side = MomaVQConfig.from_dict(vq_config).downsample_factor
    return [("image_seq_length", config.get("image_seq_length"), (crop["height"] // side) * (crop["width"] // side))]
