# SPDX-License-Identifier: Apache-2.0
"""Checks of the words that images are searched by."""

from collections.abc import Sequence

from ..configuration_moma import MomaConfig
from ..data.encoding import DocumentEncoder
from ..errors_moma import InputError
from ..utils.fields import check_utf8


def check_queries(queries: Sequence[str]) -> None:
    """Raise `ValueError` where there is no list of queries, or one of them has no words or is no text."""
    if isinstance(queries, str):
        raise InputError(f"`queries` is the text {queries!r}: give a list of texts, [{queries!r}].")
    if not queries:
        raise InputError("`queries` is empty: give the words to look for.")
    if others := [query for query in queries if not isinstance(query, str)]:
        raise InputError(f"query {others[0]!r}: it is no text, but {type(others[0]).__name__}.")
    if blank := [query for query in queries if not query.strip()]:
        raise InputError(f"query {blank[0]!r}: there are no words in it to look for.")
    for query in queries:
        check_utf8("query", query)


def check_room(queries: Sequence[str], config: MomaConfig, encoder: DocumentEncoder, prompts: Sequence[str]) -> None:
    """Raise for the first query that does not fit behind an image into the model's positions."""
    # others are made to go beyond
    if config.rope_parameters["rope_type"] != "default":
        return
    processor = encoder.processor
    image_ids = encoder.opened(processor.image_ids([0] * processor.image_seq_length))
    room = config.max_position_embeddings - len(image_ids)
    for query in (" ".join(query.split()) for query in queries):
        texts = (f"{prompt} {query}" if prompt else query for prompt in prompts)
        if (length := max(len(encoder.text_ids(text)) for text in texts)) > room:
            short = query if len(query) <= 40 else f"{query[:40]}..."
            raise InputError(
                f"query {short!r}: with the model's prompt it has {length} tokens, and behind an image there is room "
                f"for {room}."
            )
