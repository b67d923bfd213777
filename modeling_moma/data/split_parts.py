# SPDX-License-Identifier: Apache-2.0
"""Parts of a data set's splits, such as `"train[:98%]"`: which of them have rows in common."""

from dataclasses import dataclass

from datasets import ReadInstruction

from ..errors_moma import InputError
from ..utils.messages import one_line


# stands for the length of any split: parts in percent end where they do in one of any other length
_MANY_ROWS = 10**12


@dataclass(frozen=True)
class SplitPart:
    """Rows of one split that follow one another."""

    split: str
    unit: str | None
    rows: range

    def overlaps(self, other: "SplitPart") -> bool:
        """Return whether another part has some of the rows, as far as no length is needed to tell."""
        # where a row is in percent, the length alone says
        if {self.unit, other.unit} == {"%", "rows"}:
            return False
        return max(self.rows.start, other.rows.start) < min(self.rows.stop, other.rows.stop)


def split_parts(text: str) -> list[SplitPart]:
    """Return the parts that a text of `datasets` names."""
    parts = []
    for entry in map(str.strip, text.split("+")):
        split, bracket, bounds = entry.partition("[")
        unit = None if not bracket else "%" if "%" in bounds else "rows"
        try:
            (found,) = ReadInstruction.from_spec(entry).to_absolute({split: _MANY_ROWS})
        except (ValueError, AssertionError) as error:
            raise InputError(f"the split {text!r} cannot be read: {one_line(error)}.") from error
        parts.append(SplitPart(split, unit, range(found.from_, found.to)))
    return parts


def refuse_shared_parts(where: str, train: str, validation: str | None) -> None:
    """Raise `ValueError` where rows of `validation` are those of `train`, too."""
    try:
        trained_on, held_out = split_parts(train), [] if validation is None else split_parts(validation)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    for part in held_out:
        if any(part.split == own.split and part.overlaps(own) for own in trained_on):
            raise InputError(
                f"{where}: validation = {validation!r} has rows of train = {train!r}, which would be trained on and "
                f"held out; name two parts, `{{train: '{part.split}[:98%]', validation: '{part.split}[98%:]'}}`."
            )
