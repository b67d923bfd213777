# SPDX-License-Identifier: Apache-2.0
"""The data collator: examples of different lengths become a padded batch with labels."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .processor_errors_moma import InputError


@dataclass
class MomaDataCollator:
    """Pad tokenised examples to one length, with the padding token and side of the tokenizer.

    `DataCollatorForLanguageModeling` marks padding by its id, which loses the end-of-text labels of a tokenizer that
    pads with `<eos>`; here the attention mask decides. The token after padding is no label either: the padding before
    it would have to predict it. `mm_token_type_ids` are padded as well.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Its `pad_token_id` and `padding_side` are used.
        pad_to_multiple_of (`int`, *optional*):
            Round the length of a batch up to a multiple of this number of tokens.
        label_pad_token_id (`int`, *optional*, defaults to -100):
            Label of padding and of the token after it, ignored by the loss.
    """

    tokenizer: PreTrainedTokenizerBase
    pad_to_multiple_of: int | None = None
    label_pad_token_id: int = -100

    def __post_init__(self):
        if self.tokenizer.pad_token_id is None:
            raise InputError("tokenizer: it has no padding token; set `tokenizer.pad_token` first.")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise InputError(f"pad_to_multiple_of: {self.pad_to_multiple_of} must be at least 1.")

    def __call__(self, features: list[dict]) -> dict[str, torch.Tensor]:
        """Pad a list of examples.

        Args:
            features (`list[dict]`):
                Each holds `input_ids`, and may hold `attention_mask`, `labels` and `mm_token_type_ids` of the same
                length. Where `labels` are missing they are the `input_ids`, so text and image tokens are learnt.

        Returns:
            `dict[str, torch.Tensor]`: `input_ids`, `attention_mask`, `labels` and, where given, `mm_token_type_ids`,
            each of shape `(batch_size, sequence_length)`.

        Raises:
            ValueError: there is no example, one is empty, holds an unknown field or fields of different lengths, or a
                field is given for some of the examples only.
        """
        if not features:
            raise InputError("features: the list is empty, and a batch needs an example.")
        padding = {
            "input_ids": self.tokenizer.pad_token_id,
            "attention_mask": 0,
            "labels": self.label_pad_token_id,
            "mm_token_type_ids": 0,
        }
        rows = [self._complete(index, example, padding) for index, example in enumerate(features)]
        names = rows[0].keys()
        for index, row in enumerate(rows):
            if row.keys() != names:
                raise InputError(f"features[{index}]: holds {sorted(row)}, but features[0] holds {sorted(names)}.")
        length = max(len(row["input_ids"]) for row in rows)
        if self.pad_to_multiple_of is not None:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {name: self._pad([row[name] for row in rows], length, padding[name]) for name in names}
        is_padding = batch["attention_mask"] == 0
        # a position predicts the next label, so the first token after padding gets none
        is_padding[:, 1:] |= is_padding[:, :-1].clone()
        batch["labels"].masked_fill_(is_padding, self.label_pad_token_id)
        return batch

    def _complete(self, index: int, example: dict, known: dict[str, int]) -> dict[str, torch.Tensor]:
        for name in example:
            if name not in known:
                raise InputError(f"features[{index}]: `{name}` is not one of {list(known)}; remove that column.")
        row = {name: torch.as_tensor(values, dtype=torch.long) for name, values in example.items()}
        if "input_ids" not in row or len(row["input_ids"]) == 0:
            raise InputError(f"features[{index}]: needs at least one token in `input_ids`.")
        for name, values in row.items():
            if values.shape != row["input_ids"].shape or values.ndim != 1:
                raise InputError(
                    f"features[{index}]: `{name}` has the shape {tuple(values.shape)} and `input_ids` the shape "
                    f"{tuple(row['input_ids'].shape)}; both must be one row of the same length."
                )
        row.setdefault("attention_mask", torch.ones_like(row["input_ids"]))
        row.setdefault("labels", row["input_ids"])
        return row

    def _pad(self, rows: list[torch.Tensor], length: int, value: int) -> torch.Tensor:
        side = self.tokenizer.padding_side
        batch = pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)
        more = length - batch.shape[1]
        return F.pad(batch, (more, 0) if side == "left" else (0, more), value=value)
