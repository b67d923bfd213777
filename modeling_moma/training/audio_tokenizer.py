# SPDX-License-Identifier: Apache-2.0
"""Learns the codebook of a small audio tokenizer from the sounds of a recipe's sources."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from tokenization.audio_codecs_moma import MelCodec

from ..data.images import SkippedRow, read_row_sound, refused_sounds_left_out
from ..data.sources import TRAIN, VALIDATION, Source, placed_rows, warn_of_shared_rows
from ..errors_moma import InputError
from ..utils.errors import needs_extra
from .tokenizer_settings import AudioTokenizerSettings


# a natural logarithm of power, in decibels
DECIBELS = 10 / math.log(10)


@dataclass(frozen=True)
class TrainedCodec:
    """A codec, and what was found of it."""

    codec: MelCodec
    facts: dict[str, Any]


def train_audio_tokenizer(sources: Sequence[Source], settings: AudioTokenizerSettings) -> TrainedCodec:
    """Learn a codebook by k-means on the mel spectrograms of sounds."""
    with needs_extra("moma train-audio-tokenizer needs scikit-learn", "audio"):
        from sklearn.cluster import MiniBatchKMeans

    warn_of_shared_rows(sources, {source.name: source.split_names() for source in sources})
    left_out: dict[str, int] = {}
    untrained = MelCodec.untrained(**{name: getattr(settings, name) for name in MelCodec.SETTINGS})
    held_out = _vectors(untrained, _sounds(sources, True), settings.held_out_sounds, left_out)
    train = _vectors(untrained, _sounds(sources, False), settings.sounds, left_out)
    num_vectors = sum(map(len, train))
    if num_vectors < settings.num_codes:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none left out"
        raise InputError(
            f"audio_tokenizer: num_codes = {settings.num_codes}, and the {len(train)} sounds that were read have only "
            f"{num_vectors} places to learn them from ({reasons}); ask for fewer codes, or give more sounds."
        )
    vectors = torch.cat(train).numpy()
    # its stubs say what scikit-learn does not
    k_means: Any = MiniBatchKMeans
    means = k_means(settings.num_codes, batch_size=8192, n_init=1, max_iter=50, random_state=settings.seed)
    codebook = torch.from_numpy(means.fit(vectors).cluster_centers_.astype(np.float32))
    codec = MelCodec(codebook, **untrained.settings())
    step = settings.hop_length * settings.frames_per_code
    facts = {
        "sounds": len(train),
        "held_out_sounds": len(held_out),
        "left_out": left_out,
        "codes_a_second": settings.sampling_rate / step,
    }
    for name, part in (("train", train), ("held_out", held_out)):
        distance, codes = _distance(codec, part) if part else (None, None)
        facts |= {f"{name}_db": distance, f"{name}_codes": codes}
    return TrainedCodec(codec, facts)


def _sounds(sources: Sequence[Source], held_out: bool) -> Iterator[tuple[Source, Any]]:
    """Yield the sounds to learn from, or those held out, of all sources in turn."""
    readers = [_source_sounds(source, held_out) for source in sources]
    while readers:
        for reader in list(readers):
            try:
                yield next(reader)
            except StopIteration:
                readers.remove(reader)


def _source_sounds(source: Source, held_out: bool) -> Iterator[tuple[Source, Any]]:
    names = source.split_names()
    has_own = VALIDATION in names
    rows = source.open(names[VALIDATION if held_out and has_own else TRAIN])
    for place, row in placed_rows(rows):
        if not has_own and source.is_held_out(place) != held_out:
            continue
        yield from ((source, value) for value in source.kind.row_sounds(row))


def _vectors(
    codec: MelCodec, sounds: Iterator[tuple[Source, Any]], number: int, left_out: dict[str, int]
) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    with tqdm(total=number, desc="sounds", unit=" sounds") as progress:
        for source, value in sounds:
            if len(found) == number:
                break
            try:
                samples = read_row_sound(value, codec.sampling_rate, source.image_root())
                with refused_sounds_left_out():
                    found.append(codec.log_mels(samples))
            except SkippedRow as error:
                left_out[error.reason] = left_out.get(error.reason, 0) + 1
                continue
            progress.update()
    return found


def _distance(codec: MelCodec, vectors: Sequence[torch.Tensor]) -> tuple[float, int]:
    """Return the mean distance from the nearest codes, and how many codes these are."""
    chunks = torch.cat(list(vectors)).split(8192)
    codes = [torch.cdist(chunk, codec.codebook).argmin(1) for chunk in chunks]
    total = sum((chunk - codec.codebook[code]).abs().sum().item() for chunk, code in zip(chunks, codes))
    return DECIBELS * total / sum(chunk.numel() for chunk in chunks), len(torch.cat(codes).unique())
