# SPDX-License-Identifier: Apache-2.0
"""The folder of a corpus: JSON lines of two splits and a card with counted numbers, there whole or not at all."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from modeling_moma.utils.atomic_files import check_new_folder, replace_folder


SPLITS = ("train", "validation")


def draw(name: str) -> float:
    """A number in [0, 1), always the same one for a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64


def split_of(name: str, shares: dict, rest="train"):
    """One of the keys of shares by a hash of a name, or the rest."""
    place = draw(name)
    for key, share in shares.items():
        if place < share:
            return key
        place -= share
    return rest


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
