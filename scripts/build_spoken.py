# SPDX-License-Identifier: Apache-2.0
"""
Builds spoken words, spoken labels of emoji with their drawings, and the same drawings with written labels.

    python scripts/build_spoken.py --output data/spoken

Needs espeak-ng (on Debian: apt-get install espeak-ng) and the extra `audio`. Words are those of the image sets in
`data/`.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from datasets import Audio, Features, Image, List, Value
from tqdm.auto import tqdm

from cards import DATA, read_card
from corpora_recipe.folder import draw, split_of
from modeling_moma.utils.atomic_files import check_new_folder, replace_folder
from tokenization.audio_input_moma import read_sound


WORD_FEATURES = {"audio": Audio(decode=False), "word": Value("string"), "voice": Value("string")}
DRAWING_FEATURES = {
    "segments": List({"audio": Audio(decode=False), "text": Value("string"), "image": Image(decode=False)}),
    "label": Value("string"),
    "voice": Value("string"),
}
WRITTEN_FEATURES = {"image": Image(decode=False), "label": Value("string")}
SAMPLING_RATE = 16000
# of the loudest sample, below which the ends of a sound are cut off
_SILENCE = 0.02
# samples that are kept before and behind what is loud enough, 20 ms
_MARGIN = 320
SPLITS = ("train", "validation", "test")
# shares of the held-out splits, of all words and of all labels
HELD_OUT_WORDS = {"validation": 0.025, "test": 0.05}
HELD_OUT_LABELS = {"validation": 0.04, "test": 0.1}
# letters of a word
LETTERS = (3, 14)
# voices that speak each word, and each label of a drawing
VOICES_A_WORD, VOICES_A_DRAWING = 3, 4
# the designer whose drawings are taken: one for a label, so that a small model may learn what belongs to a word
STYLE = "noto"
# shares of the drawings in `train` by what comes in which order: a sound, perhaps the label written, and the drawing
ORDERS = {("audio", "text", "image"): 0.5, ("audio", "image"): 0.35, ("image", "audio"): 0.15}
HELD_OUT_ORDER = ("audio", "image")
# columns of words and of lists of words
_TEXTS = ("label", "name", "keywords", "aliases")


class Voice(NamedTuple):
    """A voice of espeak-ng: its name for `-v`, words a minute, and pitch from 0 to 99."""

    name: str
    speed: int
    pitch: int


VOICES = (
    Voice("en-us", 160, 50),
    Voice("en-us+m3", 150, 40),
    Voice("en-us+f2", 165, 55),
    Voice("en-us+f4", 145, 60),
    Voice("en-us+m7", 170, 45),
    Voice("en-gb", 155, 50),
    Voice("en-gb+f5", 150, 60),
    Voice("en-gb-x-rp+m1", 165, 35),
)


def choose_voices(name: str, number: int) -> list[Voice]:
    """So many different voices, always the same ones for a name."""
    return sorted(VOICES, key=lambda voice: hashlib.sha256(f"{name}/{voice.name}".encode()).digest())[:number]


def speak(text: str, voice: Voice) -> np.ndarray:
    """The samples of a text in [-1, 1], at `SAMPLING_RATE`, without silence around them."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise ValueError("espeak-ng is not installed; on Debian: apt-get install espeak-ng")
    command = [program, "-v", voice.name, "-s", str(voice.speed), "-p", str(voice.pitch), "--stdout", "--", text]
    spoken = subprocess.run(command, capture_output=True, check=True).stdout
    samples = read_sound(spoken, SAMPLING_RATE)
    loud = np.flatnonzero(np.abs(samples) > _SILENCE * np.abs(samples).max())
    if not len(loud):
        raise ValueError(f"espeak-ng says nothing for {text!r}")
    return samples[max(0, loud[0] - _MARGIN) : loud[-1] + _MARGIN]


def as_flac(samples: np.ndarray) -> bytes:
    """A file of samples, without loss but for 16 bits each."""
    file = BytesIO()
    soundfile.write(file, samples, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


class SpokenWord(NamedTuple):
    """A word and a voice."""

    word: str
    voice: Voice


class SpokenDrawing(NamedTuple):
    """A label, a voice, a drawing of the emoji, and the order in which they stand, of `ORDERS`."""

    label: str
    voice: Voice
    image: dict[str, Any]
    order: tuple[str, ...]


def read_words(files: Iterable[Path]) -> list[str]:
    """The words in labels, names, tags and aliases of image sets, of `LETTERS` letters, in order."""
    words: set[str] = set()
    for path in files:
        names = [name for name in _TEXTS if name in pq.read_schema(path).names]
        for column in pq.read_table(path, columns=names).columns:
            for value in column.to_pylist():
                for text in value if isinstance(value, list) else [value or ""]:
                    words.update(re.findall(r"[a-z]+", text.lower()))
    return sorted(word for word in words if LETTERS[0] <= len(word) <= LETTERS[1])


def split_words(words: Sequence[str], label_splits: dict[str, str]) -> dict[str, list[SpokenWord]]:
    """Each split's words with their voices, in an order drawn by hash; one that is a label stands where that does."""
    rows: dict[str, list[SpokenWord]] = {split: [] for split in SPLITS}
    for word in words:
        split = label_splits.get(word) or split_of(f"word/{word}", HELD_OUT_WORDS)
        rows[split] += [SpokenWord(word, voice) for voice in choose_voices(word, VOICES_A_WORD)]
    return {
        split: sorted(found, key=lambda row: draw(f"{row.word}/{row.voice.name}")) for split, found in rows.items()
    }


def split_labels(labels: Iterable[str]) -> dict[str, str]:
    """The split of each label."""
    return {label: split_of(f"label/{label}", HELD_OUT_LABELS) for label in labels}


def read_emoji(path: Path) -> list[dict[str, Any]]:
    """`label` and `image` (its file's bytes) of the rows of one split that are of `STYLE`."""
    rows = pq.read_table(path, columns=["label", "style", "image"]).to_pylist()
    return [{"label": row["label"], "image": row["image"]} for row in rows if row["style"] == STYLE]


def split_drawings(rows: Sequence[dict[str, Any]], label_splits: dict[str, str]) -> dict[str, list[SpokenDrawing]]:
    """Each split's drawings with voices: of each label in `train` several, of each other label one."""
    drawings: dict[str, list[SpokenDrawing]] = {split: [] for split in SPLITS}
    for row in rows:
        label, split = row["label"], label_splits[row["label"]]
        for voice in choose_voices(label, VOICES_A_DRAWING if split == "train" else 1):
            order = split_of(f"order/{label}/{voice.name}", ORDERS if split == "train" else {}, HELD_OUT_ORDER)
            drawings[split].append(SpokenDrawing(label, voice, row["image"], order))
    return {
        split: sorted(found, key=lambda row: draw(f"{row.label}/{row.voice.name}"))
        for split, found in drawings.items()
    }


def sound(text: str, voice: Voice) -> dict[str, Any]:
    return {"bytes": as_flac(speak(text, voice)), "path": f"{text}.flac"}


def word_row(entry: SpokenWord) -> dict[str, Any]:
    return {"audio": sound(entry.word, entry.voice), "word": entry.word, "voice": entry.voice.name}


def drawing_row(entry: SpokenDrawing) -> dict[str, Any]:
    parts = {"audio": sound(entry.label, entry.voice), "text": entry.label, "image": entry.image}
    segments = [{name: parts[name] if name == part else None for name in parts} for part in entry.order]
    return {"segments": segments, "label": entry.label, "voice": entry.voice.name}


def write_split(path: Path, entries: Sequence[Any], make: Callable[[Any], dict], features: dict, threads: int) -> None:
    """Writes the rows of a split; espeak-ng is a process of its own, so threads are enough."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(threads) as pool:
        rows = list(tqdm(pool.map(make, entries), total=len(entries), desc=f"{path.parent.name} {path.stem}"))
    # `datasets` encodes sounds with torchcodec alone, even those that are files already; the schema says what they are
    pq.write_table(pa.Table.from_pylist(rows, schema=Features(features).arrow_schema), path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=DATA / "spoken", help="folder of the data set, replaced as a whole"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="words spoken side by side")
    args = parser.parse_args(arguments)
    check_new_folder(args.output, is_fine=lambda path: path.name in ("README.md", "words", "emoji", "drawings"))
    card = read_card(args.output, "spoken")
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
