# SPDX-License-Identifier: Apache-2.0
"""Frames: the span of one item in a text and in token ids, which is a begin token, its codes and an end token."""

import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from .processor_errors_moma import InputError
from .text_tokenizer_moma import IMAGE, modality_tokens, unmarked_pattern


@dataclass(frozen=True)
class TokenFrame:
    """The tokens of one modality, and how an item (one image, one sound) is written with them."""

    modality: str
    offset: int
    num_codes: int
    begin: int
    end: int
    length: int | None

    @classmethod
    def from_tokenizer(
        cls, tokenizer: PreTrainedTokenizerFast, modality: str, num_codes: int, length: int | None, source: str
    ) -> "TokenFrame":
        """Read the ids from the vocabulary of a tokenizer."""
        vocab = tokenizer.get_vocab()
        call = f"add_image_tokens(tokenizer, {num_codes})"
        if modality != IMAGE:
            call = f"add_modality_tokens(tokenizer, {modality!r}, {num_codes})"
        fix = f"call `{call}` on a tokenizer without {modality} tokens"
        placeholder, begin, end, *codes = modality_tokens(modality, num_codes)
        for token in (placeholder, begin, end, codes[0]):
            if token not in vocab:
                raise InputError(f"tokenizer: it has no token {token!r}; {fix}.")
        count = 0
        while f"<|{modality}_{count}|>" in vocab:
            count += 1
        if count != num_codes:
            raise InputError(f"tokenizer: it has {count} {modality} codes, but {source}={num_codes}; {fix}.")
        offset = vocab[codes[0]]
        for code, token in enumerate(codes):
            if vocab[token] != offset + code:
                raise InputError(
                    f"tokenizer: {token!r} has the id {vocab[token]}, but the ids of the codes must follow one "
                    f"another from {offset} on; {fix}."
                )
        return cls(modality, offset, num_codes, vocab[begin], vocab[end], length)

    @property
    def bounds(self) -> list[int]:
        """The half-open range of the ids of the codes."""
        return [self.offset, self.offset + self.num_codes]

    def is_code(self, token_id: int) -> bool:
        """Return whether a token id is a code of this modality."""
        return self.offset <= token_id < self.offset + self.num_codes

    def check_codes(self, codes: list[int]):
        """Raise an error where codes cannot be those of one frame."""
        if not isinstance(codes, list):
            raise InputError(
                f"codes: expected a row of them for each {self.modality}, got {codes!r}; token ids of whole sequences "
                "go through `decode_parts`."
            )
        if len(codes) != self.length if self.length is not None else not codes:
            expected = "one code at least" if self.length is None else f"{self.length} codes"
            raise InputError(f"codes: one {self.modality} has {expected}, got {len(codes)}.")
        if wrong := [code for code in codes if not hasattr(code, "__index__")]:
            raise InputError(f"codes: those of one {self.modality} are whole numbers, got {wrong[0]!r}.")
        if min(codes) < 0 or max(codes) >= self.num_codes:
            raise InputError(
                f"codes: values from {min(codes)} to {max(codes)} lie outside [0, {self.num_codes}); "
                f"subtract {self.offset} from token ids."
            )

    def ids(self, codes: list[int]) -> list[int]:
        """Return the token ids of a frame."""
        self.check_codes(codes)
        return [self.begin, *[self.offset + code for code in codes], self.end]

    def text(self, codes: list[int]) -> str:
        """Return a frame as text, which the tokenizer turns into the ids of [`~TokenFrame.ids`]."""
        self.check_codes(codes)
        inner = "".join(f"<|{self.modality}_{code}|>" for code in codes)
        return f"<|begin_{self.modality}|>{inner}<|end_{self.modality}|>"

    def count_in_text(self, text: str) -> int:
        """Count the complete frames that a text spells out."""
        times = "+" if self.length is None else f"{{{self.length}}}"
        name = re.escape(self.modality)
        return len(re.findall(rf"<\|begin_{name}\|>(?:<\|{name}_\d+\|>){times}<\|end_{name}\|>", text))

    def count_in_ids(self, ids: list[int]) -> int:
        """Count the complete frames in token ids."""
        begins = (position for position, token in enumerate(ids) if token == self.begin)
        return sum(self._is_complete(ids, position, self._stop(ids, position)) for position in begins)

    def read(self, ids: list[int], position: int) -> tuple[list[int], int]:
        """Read the frame that begins at a position."""
        stop = self._stop(ids, position)
        if not self._is_complete(ids, position, stop):
            found = f"{stop - position - 1} codes" + ("" if self.length is None else f", of {self.length},")
            raise InputError(
                f"ids: the {self.modality} at position {position} is incomplete: {found} "
                f"and then {ids[stop : stop + 1] or 'nothing'}, where the id {self.end} belongs; generate more "
                f"tokens, or with generation_mode={self.modality!r}."
            )
        return [token - self.offset for token in ids[position + 1 : stop]], stop + 1

    def _stop(self, ids: list[int], position: int) -> int:
        stop = position + 1
        while stop < len(ids) and self.is_code(ids[stop]):
            stop += 1
        return stop

    def _is_complete(self, ids: list[int], position: int, stop: int) -> bool:
        count = stop - position - 1
        return (count >= 1 if self.length is None else count == self.length) and ids[stop : stop + 1] == [self.end]


def split_frames(ids: list[int], frames: dict[str, TokenFrame]) -> list[tuple[str | None, list[int]]]:
    """Split token ids into runs of text and frames."""
    by_begin = {frame.begin: frame for frame in frames.values()}
    runs: list[tuple[str | None, list[int]]] = [(None, [])]
    position = 0
    while position < len(ids):
        token = ids[position]
        if token in by_begin:
            codes, position = by_begin[token].read(ids, position)
            runs += [(by_begin[token].modality, codes), (None, [])]
            continue
        for frame in frames.values():
            if frame.is_code(token):
                raise InputError(
                    f"ids: the code {token} at position {position} stands outside a frame of {frame.modality!r}; "
                    f"pass the sequence from its <|begin_{frame.modality}|> on."
                )
        runs[-1][1].append(token)
        position += 1
    return runs


def replace_placeholders(texts: list[str], replacements: dict[str, list[str]]) -> tuple[list[str], list[list[dict]]]:
    """Replace placeholders by the text of frames, except placeholders that are marked as plain text."""
    pending = {modality: iter(values) for modality, values in replacements.items() if len(values) > 0}
    pattern = "|".join(unmarked_pattern(f"<{modality}>", group=modality) for modality in pending) or "(?!)"
    new_texts, all_offsets = [], []
    for text in texts:
        pieces, offsets, last, length = [], [], 0, 0
        for found in re.finditer(pattern, text):
            replacement = next(pending[str(found.lastgroup)])
            start = length + found.start() - last
            length = start + len(replacement)
            pieces += [text[last : found.start()], replacement]
            last = found.end()
            offsets.append(
                {
                    "type": found.lastgroup,
                    "span": found.span(),
                    "new_span": (start, length),
                    "text": found.group(),
                    "replacement": replacement,
                }
            )
        new_texts.append("".join([*pieces, text[last:]]))
        all_offsets.append(offsets)
    return new_texts, all_offsets
