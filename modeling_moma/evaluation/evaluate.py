# SPDX-License-Identifier: Apache-2.0
"""Takes the measures that are asked for on every source that allows them, and times them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..errors_moma import InputError
from ..generation_moma import own_image_sampling
from .captions import measure_captions
from .drawings import check_drawings, feature_extractor, measure_drawings
from .held_out import HeldOutSource
from .information import check_information, measure_information
from .losses import source_losses
from .retrieval import DEFAULT_PAIRS, check_retrieval, measure_retrieval


LOSSES, CAPTIONS, INFORMATION = "losses", "captions", "information"
RETRIEVAL, DRAWINGS = "retrieval", "drawings"
# measures run in this order; all but the first need images with captions
MEASURES = (LOSSES, CAPTIONS, INFORMATION, RETRIEVAL, DRAWINGS)
# the default measures; captions only for sources that have them
DEFAULT_MEASURES = (LOSSES, CAPTIONS)


@dataclass
class MeasureSettings:
    """How to measure."""

    measures: tuple[str, ...] | None = None
    batch_size: int = 64
    seed: int = 0
    retrieval_pairs: int = DEFAULT_PAIRS
    sampling: dict | None = None

    def __post_init__(self):
        unknown = [name for name in self.measures or () if name not in MEASURES]
        if unknown or self.measures == ():
            raise InputError(f"`measures` has {unknown or 'nothing'} in it; it must be some of {MEASURES}.")
        if self.batch_size < 1:
            raise InputError(f"`batch_size` = {self.batch_size}: it must be at least 1.")
        if self.retrieval_pairs < 2:
            raise InputError(f"`retrieval_pairs` = {self.retrieval_pairs}: there must be two to tell apart.")


def measure_sources(model, processor, sources: Mapping[str, HeldOutSource], settings: MeasureSettings) -> dict:
    """Measure a model on every source."""
    chosen = _chosen_measures(sources, settings)
    # a missing extra should fail now rather than after hours of other measures
    extract = feature_extractor(model.device) if DRAWINGS in chosen else None
    for name, source in sources.items():
        if source.captioned is None:
            continue
        if INFORMATION in chosen:
            check_information(name, source.captioned.captions)
        if RETRIEVAL in chosen:
            check_retrieval(name, len(source.captioned))
        if DRAWINGS in chosen:
            check_drawings(processor, len(source.captioned))
    report = {}
    for name, source in sources.items():
        num_images = 0 if source.captioned is None else len(source.captioned)
        figures: dict[str, Any] = {"documents": len(source.documents), "images": num_images}
        seconds = {}
        for measure, take in _runners(model, processor, name, source, settings, extract).items():
            if measure in chosen:
                start = time.perf_counter()
                figures[measure] = take()
                seconds[measure] = round(time.perf_counter() - start, 2)
        report[name] = {**figures, "seconds": seconds}
    return report


def _chosen_measures(sources: Mapping[str, HeldOutSource], settings: MeasureSettings) -> tuple[str, ...]:
    has_captions = any(source.captioned is not None for source in sources.values())
    if settings.measures is None:
        return DEFAULT_MEASURES
    in_need = [name for name in settings.measures if name != LOSSES]
    if in_need and not has_captions:
        names = ", ".join(sources)
        raise InputError(f"`--measures {in_need[0]}` needs images with captions, but none of {names} has any.")
    return settings.measures


def _runners(
    model,
    processor,
    name: str,
    source: HeldOutSource,
    settings: MeasureSettings,
    extract: Callable[[torch.Tensor], torch.Tensor] | None,
) -> dict[str, Callable[[], dict]]:
    """Return the measures that a source allows, ready to be taken."""
    size, seed = settings.batch_size, settings.seed
    takers: dict[str, Callable[[], dict]] = {
        LOSSES: partial(source_losses, model, processor, source.documents, size, seed, name)
    }
    rows = source.captioned
    if rows is not None:
        takers[CAPTIONS] = partial(measure_captions, model, processor, rows, size, seed)
        takers[INFORMATION] = partial(measure_information, model, processor, rows, size)
        takers[RETRIEVAL] = partial(measure_retrieval, model, processor, rows, size, settings.retrieval_pairs, seed)
    if rows is not None and extract is not None:
        own = own_image_sampling(model.generation_config) or {"do_sample": True, "top_k": 0}
        sampling = own if settings.sampling is None else settings.sampling
        takers[DRAWINGS] = partial(measure_drawings, model, processor, rows, extract, size, sampling, seed)
    return takers
