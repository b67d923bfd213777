# SPDX-License-Identifier: Apache-2.0
"""Renders SVG files, whose paths it reads from its input, a line of JSON each.

It is a program of its own, and imports nothing of this package: a file can end the renderer's process, by groups that
are nested too deeply or by the memory that it asks for. For each file it writes a line of JSON, with the number of
bytes that follow (`size`) or why there are none (`error`), and those bytes, a PNG.
"""

import json
import sys

import resvg_py


# far more than an icon takes
MOST_BYTES = 2 << 30


def limit_memory() -> None:
    """End this process, and no other one, when a file asks for too much."""
    try:
        import resource
    # there is none on Windows
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))


def main(side: int) -> None:
    """Answer until the input ends; `side` is that of images in pixels."""
    limit_memory()
    for line in sys.stdin:
        image, answer = b"", {}
        try:
            # with one side alone the other may be as long as the file wants it
            image = bytes(
                resvg_py.svg_to_bytes(
                    svg_path=json.loads(line), width=side, height=side, background="#ffffff", skip_system_fonts=True
                )
            )
        # a panic of the renderer is no Exception
        except BaseException as error:
            answer["error"] = str(error)
        sys.stdout.buffer.write(json.dumps({"size": len(image), **answer}).encode() + b"\n" + image)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
