# SPDX-License-Identifier: Apache-2.0
"""What the commands do with a folder: read it in pieces, label its images or rank them for queries, write tables."""

import csv
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load, save
from tqdm.auto import tqdm

from ..data.encoding import processor_fingerprint
from ..data.images import SkippedRow
from ..errors_moma import InputError
from ..utils.atomic_files import atomic_write, check_place
from ..utils.messages import one_line
from ..utils.records import only_finite
from . import FILE_NAME_SHARE
from .file_names import file_name_shares, with_file_names
from .images import LARGEST_FILE, SVG_ENDINGS, SVG_SIDE, folder_files, read_files
from .labeler import Guess, ImageLabeler, check_queries


# files that are coded and labelled together
PIECE = 256
# nats by which a score may exceed its bound: numbers of a bfloat16 model depend on the images beside one in a batch
ROUNDING = 0.1
TABLES = (".csv", ".json")
# raised where the same images are read or coded to something else than before
FORM = 1
# of which others may read an image otherwise
READERS = ("pillow", "resvg_py", "transformers")
DIGEST_BYTES = hashlib.sha256().digest_size

Kept = Mapping[bytes, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Label:
    """What a model says of an image."""

    file: str
    names: list[Guess]
    tags: list[Guess]


@dataclass(frozen=True)
class Found:
    """An image that a search has found."""

    query: str
    rank: int
    file: str
    score: float


def told_files(folder: str, output: str | None = None, option: str = "FOLDER") -> list[Path]:
    """Return the files of a folder; each subfolder that is left out is told in a line on the standard error."""
    own = None if output is None else os.path.realpath(output)
    files = folder_files(folder, option, lambda path, why: _tell_left_out(os.path.relpath(path, folder), why))
    return [file for file in files if os.path.realpath(file) != own]


def _tell_left_out(name: str, why: str) -> None:
    tqdm.write(f"{shown(name)}: left out: {why}", file=sys.stderr)


def coded_images(folder: str, files: list[Path], labeler: ImageLabeler) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Yield the images among files in pieces: paths in the folder, and codes as [`ImageLabeler.encode`] has them.

    Each file that is left out is told in a line on the standard error.
    """
    read = _pixels(folder, files, labeler)
    while piece := list(islice(read, PIECE)):
        paths, pixels = zip(*piece, strict=True)
        yield list(paths), labeler.encode_pixels(torch.cat(pixels))


def _pixels(folder: str, files: list[Path], labeler: ImageLabeler) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what the image tokenizer sees of images: of large ones nothing else stays in memory."""
    for file, found in tqdm(read_files(files), total=len(files), desc="images", disable=None):
        name = str(file.relative_to(folder))
        if isinstance(found, SkippedRow):
            _tell_left_out(name, one_line(found, 200))
        elif labeler.is_blank(values := labeler.pixel_values(found)):
            _tell_left_out(name, "image blank: white all over, as white on transparency is")
        else:
            yield name, values


def _no_image(folder: str, files: list[Path], option: str = "FOLDER") -> InputError:
    return InputError(f"{option} {folder!r}: none of its {len(files)} files is an image that can be read.")


def shown(text: str) -> str:
    """Return a text as it can be printed in one line: line breaks and bytes of no text as escapes, all else as is."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in text)


def label_folder(
    folder: str, labeler: ImageLabeler, names: int = 5, tags: int = 8, output: str | None = None
) -> list[Label]:
    """Return names and tags of the images of a folder, in the order of their paths; see [`coded_images`]."""
    labels, files = [], told_files(folder, output)
    for paths, codes in coded_images(folder, files, labeler):
        named = labeler.names(codes, names)
        tagged = labeler.tags(codes, tags) if tags else [[] for _ in paths]
        labels += [Label(*entry) for entry in zip(paths, named, tagged, strict=True)]
    if not labels:
        raise _no_image(folder, files)
    return labels


def search_folder(
    folder: str,
    queries: Sequence[str],
    labeler: ImageLabeler,
    top: int = 10,
    output: str | None = None,
    file_name_share: float = FILE_NAME_SHARE,
) -> list[Found]:
    """Return the images of a folder that fit words best, query by query; see [`CodedFolder`]."""
    check_queries(queries)
    labeler.check_room(queries)
    if not 0 <= file_name_share <= 1:
        raise InputError(f"`file_name_share` is {file_name_share}: it is a share, from 0 to 1.")
    return CodedFolder.read(folder, labeler, output=output).search(queries, labeler, top, file_name_share)


@dataclass(frozen=True)
class CodedFolder:
    """The images of a folder, coded once to be searched again and again.

    Args:
        folder (`str`):
            of the images.
        paths (`list[str]`):
            in it.
        codes (`torch.Tensor`):
            see [`ImageLabeler.encode`].
        states (`torch.Tensor`):
            see [`ImageLabeler.states`].
    """

    folder: str
    paths: list[str]
    codes: torch.Tensor
    states: torch.Tensor

    @classmethod
    def read(
        cls, folder: str, labeler: ImageLabeler, option: str = "FOLDER", output: str | None = None
    ) -> "CodedFolder":
        """Read a folder; only files that have changed since the last time are coded."""
        files, place = told_files(folder, output, option), kept_file(folder, labeler)
        digests, kept = {str(file.relative_to(folder)): content_digest(file) for file in files}, read_kept(place)
        found = {path: kept[digest] for path, digest in digests.items() if digest is not None and digest in kept}
        new = [file for file, path in zip(files, digests, strict=True) if path not in found]
        for paths, codes in coded_images(folder, new, labeler):
            found |= zip(paths, zip(codes, labeler.states(codes), strict=True), strict=True)
        if not found:
            raise _no_image(folder, files, option)
        found = {path: found[path] for path in digests if path in found}
        now = {digest: found[path] for path, digest in digests.items() if path in found and digest is not None}
        if now.keys() != kept.keys():
            write_kept(place, now)
        codes, states = (torch.stack(parts) for parts in zip(*found.values(), strict=True))
        return cls(folder, list(found), codes, states)

    def search(
        self, queries: Sequence[str], labeler: ImageLabeler, top: int = 10, file_name_share: float = 0.0
    ) -> list[Found]:
        """Return the images that fit words best, query by query, equal ones in the order of their paths.

        Only images whose scores may be among the first, by [`ImageLabeler.bounds`], are compared with a query.
        """
        check_queries(queries)
        memory = labeler.used_memory
        features_ND = self.states[:, :, 0].float().mean(1)
        known_NQ = None if memory is None else memory.match(features_ND, queries)
        shares_NQ = file_name_shares(self.paths, queries, memory) if file_name_share else None
        bounds_NQ = labeler.bounds(self.states, queries) + ROUNDING

        def whole(scores: torch.Tensor, places: Any) -> torch.Tensor:
            """Return scores by the model, of some places of `[N, Q]`, as those that images are ranked by."""
            scores = scores if known_NQ is None else labeler.mixed(scores, known_NQ[places])
            return scores if shares_NQ is None else with_file_names(scores, shares_NQ[places], file_name_share)

        most_NQ, found = whole(bounds_NQ, ...), []
        for column, query in enumerate(queries):
            most_N = most_NQ[:, column]
            scores_N = torch.full_like(most_N, -torch.inf)
            for place, places_n in enumerate(most_N.argsort(descending=True).split(labeler.batch_size)):
                done = place * labeler.batch_size
                if done >= top and scores_N.topk(top).values[-1] > most_N[places_n[0]]:
                    break
                written_n = labeler.written_match(self.codes[places_n], [query])[:, 0]
                scores_N[places_n] = whole(written_n, (places_n, column))
            order_N = scores_N.argsort(descending=True, stable=True)[:top].tolist()
            found += [Found(query, rank, self.paths[at], scores_N[at].item()) for rank, at in enumerate(order_N, 1)]
        return found

    def images(self, found: Sequence[Found]) -> list[tuple[Image.Image, str]]:
        """Return what was found with its paths; a file that is gone since is left out."""
        read = read_files([Path(self.folder, entry.file) for entry in found])
        return [
            (image, entry.file)
            for (_, image), entry in zip(read, found, strict=True)
            if not isinstance(image, SkippedRow)
        ]


def check_table(output: str) -> None:
    """Make the folder of a table, and raise `ValueError` where it could not be written, before time is spent on it."""
    path = Path(output)
    if path.suffix.lower() not in TABLES:
        raise InputError(f"--output: {output!r} ends in neither of {' and '.join(TABLES)}, which say what is written.")
    check_place(path)


def label_rows(labels: Sequence[Label]) -> list[dict[str, Any]]:
    """Return labels as rows of a CSV table: one name with its probability, others and tags joined by commas."""
    return [
        {
            "file": label.file,
            "name": label.names[0].text if label.names else "",
            "probability": f"{label.names[0].probability:.4f}" if label.names else "",
            "other_names": ", ".join(guess.text for guess in label.names[1:]),
            "tags": ", ".join(guess.text for guess in label.tags),
        }
        for label in labels
    ]


def write_table(output: str, entries: Sequence[Label | Found], rows: Sequence[dict[str, Any]]) -> Path:
    """Write a table aside and rename it."""

    def write(path: Path) -> None:
        if Path(output).suffix.lower() == ".json":
            # JSON has no infinity, which the score is of an image that a memory alone does not find
            content = only_finite([asdict(entry) for entry in entries])
            # in escapes a path keeps bytes that are no text
            path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            return
        with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    return atomic_write(output, write)


class _Hashed(io.RawIOBase):
    """A file that is hashed, and not written."""

    def __init__(self):
        super().__init__()
        self.hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return len(data)


def kept_file(folder: str, labeler: Any) -> Path:
    """Return where codes are kept of a folder, a labeler's model and processor, and what reads images."""
    settings = [FORM, SVG_SIDE, *map(_version, READERS), os.path.realpath(folder), labeler.form, labeler.views]
    key: Any = _Hashed()
    torch.save(labeler.model.state_dict(), key)
    for setting in (*settings, labeler.model.config.to_json_string(), processor_fingerprint(labeler.processor)):
        key.write(f"{setting!r}\n".encode("utf-8", "surrogateescape"))
    return Path(constants.HF_ASSETS_CACHE, "modeling-moma", "search", key.hash.hexdigest())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def content_digest(file: Path) -> bytes | None:
    """Return a hash of a file and of what reads it, `None` where it is not read."""
    try:
        if not file.is_file() or file.stat().st_size > LARGEST_FILE:
            return None
        kind = b"svg" if file.suffix.lower() in SVG_ENDINGS else b"image"
        return hashlib.sha256(kind + file.read_bytes()).digest()
    except OSError:
        return None


def read_kept(place: Path) -> Kept:
    """Return codes and states of images by their digests; none where the file is missing or damaged."""
    try:
        data = place.read_bytes()
    except OSError:
        return {}
    if hashlib.sha256(data[DIGEST_BYTES:]).digest() != data[:DIGEST_BYTES]:
        return {}
    tensors = load(data[DIGEST_BYTES:])
    names = (row.tobytes() for row in tensors["digests"].numpy())
    return dict(zip(names, zip(tensors["codes"], tensors["states"], strict=True), strict=True))


def write_kept(place: Path, kept: Kept) -> None:
    """Write what [`read_kept`] reads; where nothing can be written, it is told."""
    codes, states = (torch.stack(parts) for parts in zip(*kept.values(), strict=True))
    digests = torch.frombuffer(bytearray(b"".join(kept)), dtype=torch.uint8).view(-1, DIGEST_BYTES)
    data = save({"digests": digests, "codes": codes, "states": states})
    try:
        atomic_write(place, lambda aside: aside.write_bytes(hashlib.sha256(data).digest() + data))
    except OSError as error:
        tqdm.write(f"what was coded is not kept for the next search: {error}", file=sys.stderr)
