# SPDX-License-Identifier: Apache-2.0
"""Words as tokens: training a byte-level BPE, other modalities in a tokenizer, their frames, and chat templates."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import mark_control_tokens

from .processor_errors_moma import InputError


PAD_TOKEN = "<pad>"
BOS_TOKEN = "<bos>"
EOS_TOKEN = "<eos>"
IMAGE = "image"
IMAGE_TOKEN = "<image>"
# The marks that Transformers puts around a control token that is meant as plain text.
_MARKS = mark_control_tokens("a", re.compile("a")).split("a")
BEGIN_IMAGE_TOKEN = "<|begin_image|>"
END_IMAGE_TOKEN = "<|end_image|>"


def train_text_tokenizer(
    texts: Iterable[str], vocab_size: int = 4096, min_frequency: int = 2, show_progress: bool = False
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer.

    Any text can be encoded and is decoded unchanged, since all 256 bytes are in the vocabulary. Every sequence begins
    with `<bos>`; `<eos>` is not added, write it in the text where it belongs.

    Args:
        texts (`Iterable[str]`):
            The texts to learn from.
        vocab_size (`int`, *optional*, defaults to 4096):
            Largest number of tokens, special tokens included. It is less where the texts give fewer merges.
        min_frequency (`int`, *optional*, defaults to 2):
            How often a pair must occur to be merged.
        show_progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        `PreTrainedTokenizerFast`: with `<pad>`, `<bos>` and `<eos>` as ids 0, 1 and 2.

    Raises:
        TypeError: `texts` is a single string.
        ValueError: `vocab_size` is too small for the bytes and the special tokens.
    """
    if isinstance(texts, str):
        raise TypeError("texts: expected an iterable of strings, got a single string.")
    special_tokens = [PAD_TOKEN, BOS_TOKEN, EOS_TOKEN]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(special_tokens)
    if vocab_size < smallest:
        raise InputError(f"vocab_size: {vocab_size} is too small, all bytes and the special tokens need {smallest}.")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=special_tokens,
        initial_alphabet=sorted(alphabet),
        show_progress=show_progress,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A",
        pair=f"{BOS_TOKEN} $A $B",
        special_tokens=[(BOS_TOKEN, backend.token_to_id(BOS_TOKEN))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def check_modality(modality: str):
    """Raise an error where a name cannot be that of a modality with codes."""
    if not isinstance(modality, str) or not modality.isidentifier() or modality == "text":
        raise InputError(f"modality: {modality!r} must be a plain name, such as 'audio', and not 'text'.")


def modality_tokens(modality: str, num_codes: int) -> list[str]:
    """List the tokens of a modality."""
    codes = [f"<|{modality}_{code}|>" for code in range(num_codes)]
    return [f"<{modality}>", f"<|begin_{modality}|>", f"<|end_{modality}|>", *codes]


def image_code_tokens(codebook_size: int) -> list[str]:
    """List the tokens of the image codes."""
    return modality_tokens(IMAGE, codebook_size)[3:]


def add_image_tokens(tokenizer: PreTrainedTokenizerFast, codebook_size: int) -> PreTrainedTokenizerFast:
    """Add the image tokens that [`MomaProcessor`] needs to a tokenizer, in place.

    They are those of [`add_modality_tokens`] for `"image"`. The placeholder `<image>` becomes `tokenizer.image_token`.

    Args:
        tokenizer (`PreTrainedTokenizerFast`):
            Any fast tokenizer.
        codebook_size (`int`):
            Number of codes of the VQ model, `vq_model.config.num_embeddings`.

    Returns:
        `PreTrainedTokenizerFast`: the same tokenizer.

    Raises:
        TypeError: `tokenizer` is not a fast tokenizer.
        ValueError: `codebook_size` is below 1, or the tokenizer has another number of image codes already.
    """
    if codebook_size < 1:
        raise InputError(f"codebook_size: {codebook_size} must be at least 1.")
    add_modality_tokens(tokenizer, IMAGE, codebook_size)
    name_image_token(tokenizer)
    return tokenizer


def add_modality_tokens(tokenizer: PreTrainedTokenizerFast, modality: str, num_codes: int) -> PreTrainedTokenizerFast:
    """Add the tokens of a modality to a tokenizer, in place.

    For `"audio"` they are the placeholder `<audio>`, `<|begin_audio|>`, `<|end_audio|>`, and the codes `<|audio_0|>`
    to `<|audio_{num_codes - 1}|>` with consecutive ids. A missing padding, beginning or end token is added too
    (`<pad>`, `<bos>`, `<eos>`). Nothing else changes: a tokenizer that puts no beginning token before a text still
    puts none.

    All of them are special tokens, so `decode(..., skip_special_tokens=True)` leaves them out. Calling it again with
    the same `num_codes` changes nothing.

    Args:
        tokenizer (`PreTrainedTokenizerFast`):
            Any fast tokenizer.
        modality (`str`):
            A plain name, such as `"audio"`.
        num_codes (`int`):
            Number of different codes, `codec.num_codes`.

    Returns:
        `PreTrainedTokenizerFast`: the same tokenizer.

    Raises:
        TypeError: `tokenizer` is not a fast tokenizer.
        ValueError: `modality` is not a plain name, `num_codes` is below 1, or the tokenizer has another number of
            codes of the modality already.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(f"tokenizer: expected a fast tokenizer, got {type(tokenizer).__name__}.")
    check_modality(modality)
    if num_codes < 1:
        raise InputError(f"num_codes: {num_codes} must be at least 1.")
    names = modality_tokens(modality, num_codes)
    vocab = tokenizer.get_vocab()
    present = sum(code in vocab for code in names[3:])
    if present not in (0, num_codes) or f"<|{modality}_{num_codes}|>" in vocab:
        raise InputError(
            f"num_codes: the tokenizer already has {modality} codes, but not exactly {num_codes} of them; begin with "
            f"a tokenizer without {modality} tokens."
        )
    missing: dict[str, Any] = {
        name: token
        for name, token in (("pad_token", PAD_TOKEN), ("bos_token", BOS_TOKEN), ("eos_token", EOS_TOKEN))
        if getattr(tokenizer, name) is None
    }
    if missing:
        tokenizer.add_special_tokens(missing)
    tokens: Any = [AddedToken(name, special=True, normalized=False) for name in names]
    tokenizer.add_tokens(tokens, special_tokens=True)
    return tokenizer


def name_image_token(tokenizer: PreTrainedTokenizerFast):
    """Set `tokenizer.image_token`, where Transformers looks for the placeholder. It is saved with the tokenizer."""
    if getattr(tokenizer, "image_token", None) != IMAGE_TOKEN:
        tokenizer.SPECIAL_TOKENS_ATTRIBUTES = [*tokenizer.SPECIAL_TOKENS_ATTRIBUTES, "image_token"]
        tokenizer.image_token = IMAGE_TOKEN


def escape_special_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """Mark the special tokens in untrusted text, see [`MomaProcessor.escape_special_tokens`]."""
    tokens = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    return mark_control_tokens(text, re.compile("|".join(map(re.escape, tokens))))


def is_escaped(text: str) -> bool:
    """Return whether a text holds marks of [`escape_special_tokens`]."""
    return isinstance(text, str) and any(mark in text for mark in _MARKS)


def unmarked_pattern(token: str, group: str) -> str:
    """Build a regular expression for a token that [`escape_special_tokens`] has not marked."""
    return f"(?P<{group}>(?<!{re.escape(_MARKS[0])}){re.escape(token)})"


def beginning_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids that a tokenizer puts before a text, with which every training document begins.

    Often it is the beginning token. The tokenizers of SmolLM2, Qwen2 and Qwen3 add none.
    """
    ids: Any = tokenizer("a")["input_ids"]
    bare: Any = tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(ids) - len(bare) + 1):
        if ids[start : start + len(bare)] == bare:
            return ids[:start]
    return []


def with_beginning(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[int]:
    """Put [`beginning_ids`] before ids, so that they begin as a document in training and a prompt do.

    Without any ids the result is the tokenizer's beginning token, since a model needs a token to continue.
    """
    bos: Any = tokenizer.bos_token_id
    return [*beginning_ids(tokenizer), *ids] or ([] if bos is None else [bos])


def special_beginning(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the special tokens that a tokenizer puts before a text, as text."""
    beginning, ids = tokenizer("")["input_ids"], tokenizer("a")["input_ids"]
    if ids != [*beginning, *tokenizer("a", add_special_tokens=False)["input_ids"]]:
        raise InputError(
            "sanitize_control_tokens: the tokenizer puts special tokens after a text, too; pass "
            "add_special_tokens=False, and write them where they belong."
        )
    return "".join(tokenizer.convert_ids_to_tokens(beginning))


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
        count = next(number for number in range(len(vocab) + 1) if f"<|{modality}_{number}|>" not in vocab)
        if count != num_codes:
            raise InputError(f"tokenizer: it has {count} {modality} codes, but {source}={num_codes}; {fix}.")
        offset = vocab[codes[0]]
        if [vocab[token] for token in codes] != list(range(offset, offset + num_codes)):
            raise InputError(
                f"tokenizer: the ids of {codes[0]!r} and of the other codes must follow one another; {fix}."
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


def message_text(modalities: Sequence[str] = ("image",)) -> str:
    """Return Jinja for the body of a loop over messages: it sets `turn.text`, with a placeholder for each item."""
    placeholders = "".join(
        f"{{% {'elif' if place else 'if'} part['type'] == '{name}' %}}{{% set turn.text = turn.text + '<{name}>' %}}"
        for place, name in enumerate(modalities)
    )
    known = " or ".join([", ".join(["text", *modalities[:-1]]), modalities[-1]])
    return (
        "{% set turn = namespace(text='') %}"
        "{% if message['content'] is string %}"
        "{% set turn.text = message['content'] %}"
        "{% else %}"
        "{% for part in message['content'] %}" + placeholders + "{% elif part['type'] == 'text' %}"
        "{% set turn.text = turn.text + part['text'] %}"
        "{% else %}{{ raise_exception('content parts must be of type " + known + ", got ' + part['type']) }}"
        "{% endif %}"
        "{% endfor %}"
        "{% endif %}"
    )


def default_chat_template(modalities: Sequence[str] = ("image",)) -> str:
    """Return the template of a processor that is given none: turns of `role`, newline, content, `<eos>`.

    Turns end with `<eos>` and headers with a newline, so that no BPE token crosses the edge of a turn.
    """
    return (
        "{{ bos_token | default('', true) }}"
        "{% for message in messages %}" + message_text(modalities) + "{{ message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ turn.text | trim }}{{ eos_token }}{% endgeneration %}"
        "{% else %}"
        "{{ turn.text | trim }}{{ eos_token }}"
        "{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )


DEFAULT_CHAT_TEMPLATE = default_chat_template()
# Jinja to put in front of a template that expects strings: messages of parts become strings, others stay.
_PARTS_TO_TEXT = (
    "{% set flat = namespace(messages=[]) %}"
    "{% for message in messages %}"
    "{% if message['content'] is sequence and message['content'] is not string"
    " and message['content'] is not mapping %}"
    + message_text()
    + "{% set flat.messages = flat.messages + [dict(message, content=turn.text)] %}"
    "{% else %}{% set flat.messages = flat.messages + [message] %}{% endif %}"
    "{% endfor %}"
    "{% set messages = flat.messages %}"
    # Transformers drops this newline, and reads the template after it as the beginning of a line
    "\n"
)


def with_image_parts(template: str) -> str:
    """Make a text model's chat template take messages of parts: texts are joined, an image becomes `<image>`.

    Messages that are strings are rendered as before.
    """
    return template if template.startswith(_PARTS_TO_TEXT) else _PARTS_TO_TEXT + template
