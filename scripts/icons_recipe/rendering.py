# SPDX-License-Identifier: Apache-2.0
"""Renders whole sets in a pool of processes, each into a file of its own that a later run finds again."""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py

from icons_recipe import drawing
from icons_recipe.sets import ICONIFY, PACKAGES, read_set_files, visible_icons
from modeling_moma.utils.atomic_files import atomic_write


_SCHEMA = pa.schema(
    {
        "icon": pa.string(),
        "webp": pa.binary(),
        "colour": pa.string(),
        "hash": pa.string(),
        # of the drawing, and of the file that is stored of it
        "grey": pa.binary(drawing.GREY_SIDE**2),
        "stored_grey": pa.binary(drawing.GREY_SIDE**2),
    }
)


def rendered_folder(cache: Path) -> Path:
    """Returns the folder of rendered sets, whose name changes with all that changes the images."""
    sizes = (drawing.RESOLUTION, drawing.WEBP_QUALITY, drawing.GREY_SIDE)
    recipe = (resvg_py.__version__, sizes, drawing.COLOURS, drawing.BLACK_SHARE, _SCHEMA.names)
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]
    return cache / f"rendered-{PACKAGES[ICONIFY]}-{key}"


def render_sets(
    cache: Path, collections: dict[str, dict], processes: int, on_done: Callable[[int], None] = lambda icons: None
) -> None:
    """
    Renders every set that is not there yet.

    Args:
        cache: the folder of the archives, which gets the folder of rendered sets.
        collections: the entry of each set in Iconify's list.
        processes: rendering processes.
        on_done: called with the number of icons of each set that is there.
    """
    folder = rendered_folder(cache)
    missing = [prefix for prefix in collections if not (folder / f"{prefix}.parquet").exists()]
    for prefix in collections:
        if prefix not in missing:
            on_done(pq.read_metadata(folder / f"{prefix}.parquet").num_rows)
    if not missing:
        return
    # the largest sets first, so that no process is left alone with one in the end
    documents = sorted(read_set_files(cache, missing), key=lambda item: -len(item[1]))
    with ProcessPoolExecutor(processes) as pool:
        running = [
            pool.submit(_render_set, document, bool(collections[prefix].get("palette")), folder / f"{prefix}.parquet")
            for prefix, document in documents
        ]
        for future in as_completed(running):
            on_done(future.result())


def read_rendered(cache: Path, prefix: str) -> pa.Table:
    """Returns the icons of a rendered set: name, WebP file, colour or null, hash, 16x16 greys."""
    return pq.read_table(rendered_folder(cache) / f"{prefix}.parquet")


def _render_set(document, has_palette, path):
    icon_set = json.loads(document)
    rows = [_render_row(icon_set, name, icon, has_palette) for name, icon in visible_icons(icon_set).items()]
    atomic_write(path, lambda aside: pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), aside))
    return len(rows)


def _render_row(icon_set, name, icon, has_palette):
    pixels = drawing.render_icon(icon_set, icon)
    colour, grey = None, drawing.small_grey(pixels)
    if not has_palette and drawing.is_grey(pixels):
        colour = drawing.choose_colour(icon_set["prefix"], name)
        pixels = drawing.paint(pixels, colour)
    webp = drawing.encode(pixels)
    stored = drawing.decode(webp)
    return {
        "icon": name,
        "webp": webp,
        "colour": colour,
        "hash": drawing.image_hash(stored),
        "grey": grey.tobytes(),
        "stored_grey": drawing.small_grey(stored, colour).tobytes(),
    }
