# SPDX-License-Identifier: Apache-2.0
"""Renders SVG files, whose paths it reads from its input, a line of JSON each.

It is a program of its own, and imports nothing of this package: a file can end the renderer's process, by groups that
are nested too deeply or by the memory that it asks for. For each file it writes a line of JSON, with the number of
bytes that follow (`size`) or why there are none (`error`), and those bytes, a PNG.
"""

import codecs
import gzip
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import resvg_py


try:
    import resource
# there is none on Windows
except ImportError:
    resource = None
# far more than an icon takes
MOST_BYTES = 2 << 30
DECLARATION = re.compile(rb"""<\?xml[^>]*encoding=["']([\w.-]+)["']""")


def limit_memory() -> None:
    """End this process, and no other one, when a file asks for too much."""
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))


@contextmanager
def no_more_files() -> Iterator[None]:
    """Let nothing be opened meanwhile: an SVG may name any file of this machine as an image in it."""
    if resource is None:
        yield
        return
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def read_text(path: str) -> str:
    """Return the text of a file, compressed or not, in the encoding that its first bytes tell."""
    content = Path(path).read_bytes()
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    declared = DECLARATION.match(content)
    is_utf16 = content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return content.decode("utf-16" if is_utf16 else declared[1].decode() if declared else "utf-8-sig")


def main(side: int) -> None:
    """Answer until the input ends; `side` is that of images in pixels."""
    limit_memory()
    for line in sys.stdin:
        image, answer = b"", {}
        try:
            text = read_text(json.loads(line))
            with no_more_files():
                # with one side alone the other may be as long as the file wants it
                image = bytes(
                    resvg_py.svg_to_bytes(
                        svg_string=text, width=side, height=side, background="#ffffff", skip_system_fonts=True
                    )
                )
        except UnicodeDecodeError as error:
            answer["error"] = f"its text is not in {error.encoding.upper()}, as it should be"
        # a panic of the renderer is no Exception
        except BaseException as error:
            answer["error"] = str(error)
        sys.stdout.buffer.write(json.dumps({"size": len(image), **answer}).encode() + b"\n" + image)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
