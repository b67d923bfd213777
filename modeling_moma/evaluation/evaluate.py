# SPDX-License-Identifier: Apache-2.0
"""Takes the measures that are asked for on every source that allows them, and times them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors_moma import InputError
from ..generation_moma import own_image_sampling
from .captions import measure_captions
from .drawings import check_drawings, feature_extractor, measure_drawings
from .held_out import HeldOutSource
from .losses import source_losses
from .retrieval import DEFAULT_PAIRS, check_information, check_retrieval, measure_information, measure_retrieval


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
    chosen = DEFAULT_MEASURES if settings.measures is None else settings.measures
    captioned = {name: source.captioned for name, source in sources.items() if source.captioned is not None}
    in_need = [name for name in settings.measures or () if name != LOSSES]
    if in_need and not captioned:
        names = ", ".join(sources)
        raise InputError(f"`--measures {in_need[0]}` needs images with captions, but none of {names} has any.")
    # a missing extra should fail now rather than after hours of other measures
    extract = feature_extractor(model.device) if DRAWINGS in chosen else None
    for name, rows in captioned.items():
        if INFORMATION in chosen:
            check_information(name, rows.captions)
        if RETRIEVAL in chosen:
            check_retrieval(name, len(rows))
        if DRAWINGS in chosen:
            check_drawings(processor, len(rows))
    size, pairs, seed, sampling = settings.batch_size, settings.retrieval_pairs, settings.seed, settings.sampling
    if sampling is None:
        sampling = own_image_sampling(model.generation_config) or {"do_sample": True, "top_k": 0}
    report = {}
    for name, source in sources.items():
        rows = captioned.get(name)
        takers: dict[str, Callable[[], dict]] = {
            LOSSES: partial(source_losses, model, processor, source.documents, size, seed, name)
        }
        if rows is not None:
            takers[CAPTIONS] = partial(measure_captions, model, processor, rows, size, seed)
            takers[INFORMATION] = partial(measure_information, model, processor, rows, size)
            takers[RETRIEVAL] = partial(measure_retrieval, model, processor, rows, size, pairs, seed)
        if rows is not None and extract is not None:
            takers[DRAWINGS] = partial(measure_drawings, model, processor, rows, extract, size, sampling, seed)
        figures: dict[str, Any] = {"documents": len(source.documents), "images": 0 if rows is None else len(rows)}
        seconds = {}
        for measure, take in takers.items():
            if measure in chosen:
                start = time.perf_counter()
                figures[measure] = take()
                seconds[measure] = round(time.perf_counter() - start, 2)
        report[name] = {**figures, "seconds": seconds}
    return report
