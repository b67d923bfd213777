# SPDX-License-Identifier: Apache-2.0
"""JPEGs of many scans, which are small as files and large as work."""

from io import BytesIO

from PIL import Image


def repeated_scan(times: int) -> bytes:
    """A progressive JPEG of 64 x 64 pixels whose last scan comes so many times more."""
    file = BytesIO()
    Image.new("L", (64, 64), 128).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    scan = content[content.rindex(b"\xff\xda") : content.rindex(b"\xff\xd9")]
    return content[:-2] + scan * times + content[-2:]
