# SPDX-License-Identifier: Apache-2.0
"""Renders icons, colours the monochrome ones, and reduces images to what near-identity is measured on."""

import hashlib
import io
import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm.auto import tqdm

from image_sets.emoji import RESOLUTION, WEBP_QUALITY
from image_sets.icon_sets import read_set_files
from image_sets.packages import ICONIFY, VERSIONS, icon_svg
from modeling_moma.utils.atomic_files import atomic_write


COLOURS = {
    "black": (0, 0, 0),
    "red": (214, 40, 40),
    "orange": (240, 130, 20),
    "yellow": (240, 195, 20),
    "green": (40, 150, 60),
    "teal": (20, 150, 150),
    "blue": (40, 90, 210),
    "purple": (130, 60, 180),
    "pink": (235, 100, 165),
    "brown": (130, 80, 45),
    "grey": (128, 128, 128),
}
BLACK_SHARE = 1 / 3
GREY_SIDE = 16

_BRIGHTNESS = np.array((0.299, 0.587, 0.114))
_SVG = "{http://www.w3.org/2000/svg}"
ElementTree.register_namespace("", _SVG.strip("{}"))
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
_SCHEMA = pa.schema(
    {
        "icon": pa.string(),
        "webp": pa.binary(),
        "colour": pa.string(),
        "hash": pa.string(),
        # of the drawing, and of the file that is stored of it
        "grey": pa.binary(GREY_SIDE**2),
        "stored_grey": pa.binary(GREY_SIDE**2),
    }
)


def settle(document: str) -> str:
    """
    Brings an animated SVG document to a stand, since renderers show its first moment, in which parts are missing.

    An animation that ends and stays gives its last value. One that goes on for ever gives the middle one of its
    values: drops of rain are invisible at both ends of their fall. Movements are left at their start.
    """
    if "<animate" not in document and "<set" not in document:
        return document
    root = ElementTree.fromstring(document)
    for element in list(root.iter()):
        for change in [child for child in element if child.tag in (f"{_SVG}animate", f"{_SVG}set")]:
            values = change.get("values", "").split(";")
            stays = change.get("fill") == "freeze" or change.tag == f"{_SVG}set"
            if values == [""]:
                value = change.get("to") if stays else None
            else:
                value = values[-1] if stays else values[len(values) // 2]
            if value is not None and (attribute := change.get("attributeName")) is not None:
                element.set(attribute, value)
            element.remove(change)
    return ElementTree.tostring(root, encoding="unicode")


def choose_colour(prefix: str, icon: str) -> str:
    """The colour of a monochrome icon, by a hash of set and name: a third is black, the rest is even."""
    digest = hashlib.sha256(f"{prefix}:{icon}".encode()).digest()
    if int.from_bytes(digest[:4]) < BLACK_SHARE * 2**32:
        return "black"
    others = [name for name in COLOURS if name != "black"]
    return others[int.from_bytes(digest[4:8]) % len(others)]


def render_icon(icon_set: dict, icon: dict) -> np.ndarray:
    """An icon with black as its current colour, on white, in the middle: uint8 of shape (64, 64, 3)."""
    # whoever measures a model has no icons to render
    import resvg_py

    document = settle(icon_svg(icon_set, icon, size=RESOLUTION).replace("currentColor", "#000"))
    return decode(resvg_py.svg_to_bytes(svg_string=document, background="#ffffff", skip_system_fonts=True))


def paint(pixels: np.ndarray, colour: str) -> np.ndarray:
    """Replaces black by a colour of `COLOURS`, and the greys by its lighter shades."""
    ink = (255 - pixels.astype(np.float32)) / 255 * (255 - np.array(COLOURS[colour], dtype=np.float32))
    return (255 - ink).round().astype(np.uint8)


def unpaint(pixels: np.ndarray, colour: str) -> np.ndarray:
    """An image of a colour of `COLOURS` in black: the inverse of `paint`, but for what files lose."""
    ink = 255 - np.array(COLOURS[colour], dtype=np.float32)
    # the share of ink by least squares over the channels
    share = np.clip((255 - pixels.astype(np.float32)) @ ink / (ink @ ink), 0, 1)
    return np.repeat((255 * (1 - share)).round().astype(np.uint8)[..., None], 3, axis=-1)


def encode(pixels: np.ndarray) -> bytes:
    """An image as a lossy WebP file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="WEBP", quality=WEBP_QUALITY, method=4)
    return buffer.getvalue()


def decode(file: bytes) -> np.ndarray:
    """The RGB pixels of a stored image, uint8 of shape (64, 64, 3)."""
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def small_grey(pixels: np.ndarray, colour: str | None = None) -> np.ndarray:
    """An image of 64 pixels, painted in a colour, as 16x16 grey values of a black drawing: uint8 of shape (256,)."""
    # lossy files blur colours more than brightness
    ink = (255 - pixels.astype(np.float64)) @ _BRIGHTNESS
    if colour is not None:
        ink = np.clip(ink / ((255 - np.array(COLOURS[colour])) @ _BRIGHTNESS), 0, 1) * 255
    step = RESOLUTION // GREY_SIDE
    blocks = ink.reshape(GREY_SIDE, step, GREY_SIDE, step).mean(axis=(1, 3))
    return (255 - blocks).round().astype(np.uint8).reshape(-1)


def image_hash(pixels: np.ndarray) -> str:
    """The sha256 of a stored image's RGB pixels, in hexadecimal."""
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def rendered_folder(cache: Path) -> Path:
    """The folder of rendered sets, whose name changes with all that changes the images."""
    import resvg_py

    sizes = (RESOLUTION, WEBP_QUALITY, GREY_SIDE)
    recipe = (resvg_py.__version__, sizes, COLOURS, BLACK_SHARE, _SCHEMA.names)
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]
    return cache / f"rendered-{VERSIONS[ICONIFY]}-{key}"


def render_sets(cache: Path, collections: dict[str, dict], processes: int) -> None:
    """Renders every set that has no file yet in `rendered_folder`, in a pool of processes."""
    folder = rendered_folder(cache)
    missing = [prefix for prefix in collections if not (folder / f"{prefix}.parquet").exists()]
    # the largest sets first, so that no process is left alone with one in the end
    documents = sorted(read_set_files(cache, missing), key=lambda item: -len(item[1]))
    with ProcessPoolExecutor(processes) as pool:
        running = [
            pool.submit(_render_set, document, bool(collections[prefix].get("palette")), folder / f"{prefix}.parquet")
            for prefix, document in documents
        ]
        for future in tqdm(as_completed(running), total=len(running), desc="rendering", unit=" sets"):
            future.result()


def _render_set(document, has_palette, path):
    icon_set = json.loads(document)
    rows = [
        _render_row(icon_set, name, icon, has_palette)
        for name, icon in sorted(icon_set["icons"].items())
        # withdrawn by its maker
        if not icon.get("hidden")
    ]
    atomic_write(path, lambda aside: pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), aside))


def _render_row(icon_set, name, icon, has_palette):
    pixels = render_icon(icon_set, icon)
    colour, grey = None, small_grey(pixels)
    # without a colour but black, white and what lies between
    if not has_palette and (pixels == pixels[..., :1]).all():
        colour = choose_colour(icon_set["prefix"], name)
        pixels = paint(pixels, colour)
    webp = encode(pixels)
    stored = decode(webp)
    return {
        "icon": name,
        "webp": webp,
        "colour": colour,
        "hash": image_hash(stored),
        "grey": grey.tobytes(),
        "stored_grey": small_grey(stored, colour).tobytes(),
    }
