# SPDX-License-Identifier: Apache-2.0
"""
Builds spoken words, spoken labels of emoji with their drawings, and the same drawings with written labels.

    python scripts/build_spoken.py --output data/spoken

Needs espeak-ng (on Debian: apt-get install espeak-ng) and the extra `audio`. Words are those of the image sets in
`data/`.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Audio, Features, Image, List, Value
from tqdm.auto import tqdm

from modeling_moma.utils.atomic_files import check_new_folder, replace_folder
from spoken_recipe.rows import (
    SPLITS,
    SpokenDrawing,
    SpokenWord,
    read_emoji,
    read_words,
    split_drawings,
    split_labels,
    split_words,
)
from spoken_recipe.speech import as_flac, speak


DATA = Path(__file__).resolve().parent.parent / "data"
CARD = DATA / "spoken" / "README.md"
WORD_FEATURES = {"audio": Audio(decode=False), "word": Value("string"), "voice": Value("string")}
DRAWING_FEATURES = {
    "segments": List({"audio": Audio(decode=False), "text": Value("string"), "image": Image(decode=False)}),
    "label": Value("string"),
    "voice": Value("string"),
}
WRITTEN_FEATURES = {"image": Image(decode=False), "label": Value("string")}


def sound(text: str, voice: Any) -> dict[str, Any]:
    return {"bytes": as_flac(speak(text, voice)), "path": f"{text}.flac"}


def word_row(entry: SpokenWord) -> dict[str, Any]:
    return {"audio": sound(entry.word, entry.voice), "word": entry.word, "voice": entry.voice.name}


def drawing_row(entry: SpokenDrawing) -> dict[str, Any]:
    parts = {"audio": sound(entry.label, entry.voice), "text": entry.label, "image": entry.image}
    segments = [{name: parts[name] if name == part else None for name in parts} for part in entry.order]
    return {"segments": segments, "label": entry.label, "voice": entry.voice.name}


def write_split(path: Path, entries: Sequence[Any], make: Callable[[Any], dict], features: dict, threads: int) -> None:
    """Write the rows of a split; espeak-ng is a process of its own, so threads are enough."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(threads) as pool:
        rows = list(tqdm(pool.map(make, entries), total=len(entries), desc=f"{path.parent.name} {path.stem}"))
    # `datasets` encodes sounds with torchcodec alone, even those that are files already; the schema says what they are
    pq.write_table(pa.Table.from_pylist(rows, schema=Features(features).arrow_schema), path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=CARD.parent, help="folder of the data set, replaced as a whole")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="words spoken side by side")
    args = parser.parse_args(arguments)
    check_new_folder(args.output, is_fine=lambda path: path.name in ("README.md", "words", "emoji", "drawings"))
    card = (args.output / "README.md" if (args.output / "README.md").is_file() else CARD).read_text(encoding="utf-8")
    emoji = read_emoji(DATA / "emoji" / "data" / "train-00000-of-00001.parquet")
    label_splits = split_labels({row["label"] for row in emoji})
    # what a fresh clone has, so that the words do not depend on whether all icons were built
    icons = [path for path in (DATA / "icons" / "data").glob("*.parquet") if not path.name.startswith("train-0")]
    words = split_words(read_words([*(DATA / "emoji" / "data").glob("*.parquet"), *icons]), label_splits)
    drawings = split_drawings(emoji, label_splits)

    def write(folder: Path) -> None:
        for split in SPLITS:
            write_split(folder / "words" / f"{split}.parquet", words[split], word_row, WORD_FEATURES, args.threads)
            write_split(
                folder / "emoji" / f"{split}.parquet", drawings[split], drawing_row, DRAWING_FEATURES, args.threads
            )
        write_split(folder / "drawings" / "train.parquet", emoji, dict, WRITTEN_FEATURES, args.threads)
        (folder / "README.md").write_text(card, encoding="utf-8")

    replace_folder(args.output, write)
    for name, rows in (("words", words), ("emoji", drawings)):
        counts = ", ".join(f"{len(rows[split]):,} {split}" for split in SPLITS)
        print(f"{args.output / name}: {counts}")
    print(f"{args.output / 'drawings'}: {len(emoji):,} train")


if __name__ == "__main__":
    main()
