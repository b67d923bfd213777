# SPDX-License-Identifier: Apache-2.0
"""The folder of a corpus: JSON lines of two splits and a card with counted numbers, there whole or not at all."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from modeling_moma.utils.atomic_files import check_new_folder, replace_folder


SPLITS = ("train", "validation")


def split_of(name: str, validation_share: float) -> str:
    """Returns `"validation"` for about `validation_share` of all names, always the same ones, else `"train"`."""
    if not 0 <= validation_share < 1:
        raise ValueError(f"`validation_share` is {validation_share}: it is a share of all, from 0 to below 1.")
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
    return "validation" if place < validation_share else "train"


def write_corpus(
    output: Path,
    rows: dict[str, Iterable[dict]],
    card: str,
    write_more: Callable[[Path], object] = lambda folder: None,
) -> Path:
    """
    Replaces a corpus as a whole: `train.jsonl`, `validation.jsonl`, `README.md` and what `write_more` adds.

    Args:
        output: the folder.
        rows: the rows of each of `SPLITS`, in order.
        card: the text of `README.md`.
        write_more: writes further files into the folder that it is given.

    Raises:
        ValueError: the folder has files that are not those of a corpus: they would be lost.
    """
    known = {"README.md", "LICENSE", "images", *(f"{split}.jsonl" for split in SPLITS)}
    check_new_folder(output, is_fine=lambda path: path.name in known)

    def write(folder: Path) -> None:
        folder.mkdir()
        for split in SPLITS:
            with (folder / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[split])
        write_more(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")

    return replace_folder(output, write)


def read_card(output: Path, otherwise: Path) -> str:
    """Returns the text of the card in the folder `output`; where there is none, of the file `otherwise`."""
    card = output / "README.md"
    return (card if card.exists() else otherwise).read_text(encoding="utf-8")
