# SPDX-License-Identifier: Apache-2.0
"""The source's `generation_config.json` with the special tokens of the MoMa."""

from pathlib import Path

from transformers import GenerationConfig, PreTrainedConfig

from ..configuration_moma import MomaConfig
from .reading import CheckpointError, read_json


FILE = "generation_config.json"


def convert_generation_config(
    folder: Path, config: MomaConfig, source: PreTrainedConfig | None = None
) -> GenerationConfig:
    """Keep how the source generates, with the padding and beginning tokens of the MoMa, and its end token added."""
    path = folder / FILE
    try:
        if read_json(path, default={}):
            generation_config = GenerationConfig.from_pretrained(folder)
        else:
            generation_config = GenerationConfig.from_model_config(source or config)
        # chat models stop at several tokens
        stops = []
        for ids in (generation_config.eos_token_id, source.eos_token_id if source else None, config.eos_token_id):
            stops += [ids] if isinstance(ids, int) else ids or []
        stops = list(dict.fromkeys(stops))
        generation_config.eos_token_id = stops[0] if len(stops) == 1 else stops
        # the ids of released files may disagree with the vocabulary
        generation_config.pad_token_id = config.pad_token_id
        generation_config.bos_token_id = config.bos_token_id
        # saving checks as strictly
        generation_config.validate(strict=True)
    except CheckpointError:
        raise
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: Transformers cannot use it: {error}") from error
    return generation_config
