# SPDX-License-Identifier: Apache-2.0
"""Reads GIMP's user manual as documents in which text and images alternate."""

import hashlib
import io
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path, PurePosixPath

import resvg_py
from PIL import Image, UnidentifiedImageError

from .folder import SPLITS, split_of
from .page import read_page


PACKAGE = "gimp-help-en"
PAGES = "usr/share/gimp/3.0/help/en"
# smaller images show nothing that a model could read
SMALLEST = 16
# the longest side, in pixels, of drawings that have no pixels of their own
DRAWN = 64


@dataclass
class Manual:
    """
    What was read.

    Attributes:
        rows: the documents of each split, `{"title": ..., "segments": [...]}`, by the names of their pages.
        images: for each path that documents name, the file that it comes from.
        left_out: how often a page or an image was left out, by the reason.
    """

    rows: dict[str, list[dict]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    images: dict[str, Path] = field(default_factory=dict)
    left_out: Counter = field(default_factory=Counter)


def read_manual(folder: Path, validation_share: float) -> Manual:
    """
    Reads every page of a folder of HTML pages. Whole pages go to one split, drawn by a hash of the page's name.

    Pages with nothing but headings are left out, and so are images that are missing, that cannot be read or that
    have fewer than 16 pixels on a side.

    Args:
        folder: the pages; their images have paths relative to it.
        validation_share: share of pages in `validation`.
    """
    pages = sorted(folder.glob("*.html"))
    if not pages:
        raise ValueError(f"{folder} has no pages (*.html): is it not the folder of the manual?")
    manual = Manual()
    choose = cache(partial(choose_image, folder))
    for path in pages:
        asked: list[str] = []
        page = read_page(path.read_bytes(), partial(_choose, choose, asked))
        if not page.has_text:
            manual.left_out["pages without text"] += 1
            continue
        split = split_of(path.name, {"validation": validation_share})
        manual.rows[split].append({"title": page.title, "segments": page.segments})
        for source in asked:
            target, reason = choose(source)
            if target is None:
                manual.left_out[reason] += 1
            else:
                manual.images[target] = folder / source
    return manual


def choose_image(folder: Path, source: str) -> tuple[str | None, str]:
    """
    Decides about an image.

    Args:
        folder: what `source` is relative to.
        source: the `src` of the page.

    Returns:
        The path that documents name and `""`, or None and why the image is left out.
    """
    path = PurePosixPath(source)
    if not source or path.is_absolute() or ".." in path.parts or not (folder / path).is_file():
        return None, "images without a file"
    try:
        width, height = _size(folder / path)
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
        return None, "images that cannot be read"
    if min(width, height) < SMALLEST:
        return None, f"images below {SMALLEST} pixels"
    inside = path if path.parts[0] == "images" else PurePosixPath("images") / path
    return (f"{inside}.png" if path.suffix == ".svg" else str(inside)), ""


def copy_images(manual: Manual, folder: Path) -> None:
    """Copies the images below `folder` as they are; vector drawings become PNG on white, 64 pixels long."""
    for target, source in sorted(manual.images.items()):
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".svg":
            path.write_bytes(_draw(source))
        else:
            shutil.copyfile(source, path)


def count_table(manual: Manual, version: str) -> str:
    """Returns a Markdown table of each split's documents, images and words, and a list of further counts."""
    lines = [
        f"From {PACKAGE} {version}:",
        "",
        "| split | documents | with images | images | different images | words | bytes of text |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    everything = [row for split in SPLITS for row in manual.rows[split]]
    for name, rows in [*((split, manual.rows[split]) for split in SPLITS), ("all", everything)]:
        texts = [segment["text"] for row in rows for segment in row["segments"] if segment["type"] == "text"]
        names = _images_of(rows)
        numbers = (
            len(rows),
            sum(any(segment["type"] == "image" for segment in row["segments"]) for row in rows),
            len(names),
            len(set(names)),
            sum(len(text.split()) for text in texts),
            sum(len(text.encode()) for text in texts),
        )
        lines.append(f"| {name} | " + " | ".join(f"{number:,}" for number in numbers) + " |")
    hashes = {path: hashlib.sha256(source.read_bytes()).digest() for path, source in manual.images.items()}
    train = {hashes[name] for name in _images_of(manual.rows["train"])}
    held_out = [hashes[name] for name in _images_of(manual.rows["validation"])]
    drawings = sum(source.suffix == ".svg" for source in manual.images.values())
    size = sum(source.stat().st_size for source in manual.images.values())
    return "\n".join(
        [
            *lines,
            "",
            f"- Image files: {len(manual.images):,}, {size:,} bytes in the package, {drawings:,} of them vector "
            "drawings.",
            "- Images of `validation` that stand on a page of `train` too: "
            f"{sum(image in train for image in held_out):,} of {len(held_out):,}.",
            *(f"- Left out, {reason}: {count:,}." for reason, count in sorted(manual.left_out.items())),
        ]
    )


def _choose(choose: Callable[[str], tuple[str | None, str]], asked: list[str], source: str) -> str | None:
    asked.append(source)
    return choose(source)[0]


def _images_of(rows: list[dict]) -> list[str]:
    return [segment["image"] for row in rows for segment in row["segments"] if segment["type"] == "image"]


def _size(path: Path) -> tuple[int, int]:
    source = io.BytesIO(_draw(path)) if path.suffix == ".svg" else path
    with Image.open(source) as image:
        # a file cut short has a size, but no pixels
        image.load()
        return image.size


def _draw(path: Path) -> bytes:
    png = bytes(resvg_py.svg_to_bytes(svg_path=str(path), background="white"))
    with Image.open(io.BytesIO(png)) as image:
        side = "width" if image.width >= image.height else "height"
    return bytes(resvg_py.svg_to_bytes(svg_path=str(path), background="white", **{side: DRAWN}))
