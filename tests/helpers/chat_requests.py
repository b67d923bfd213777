# SPDX-License-Identifier: Apache-2.0
"""Parts of requests in OpenAI's form, and images in them."""

import base64
import io
import struct
import zlib

from PIL import Image, ImageDraw


CHAT, DRAW = "/v1/chat/completions", "/v1/images/generations"


def disc(colour: str, pixels: int = 64) -> Image.Image:
    image = Image.new("RGB", (pixels, pixels), "white")
    ImageDraw.Draw(image).ellipse((pixels // 6, pixels // 8, pixels - pixels // 4, pixels - pixels // 8), fill=colour)
    return image


def address_of(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def huge_png(side: int) -> bytes:
    """The beginning of an image of `side` times `side` pixels: few bytes that a reader allocates much for."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(3 * side + 1) * 16)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def message(*parts: dict | str) -> list[dict]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


def image_part(address: str) -> dict:
    return {"type": "image_url", "image_url": {"url": address}}
