# SPDX-License-Identifier: Apache-2.0
"""Pictures and words that a page offers to begin with."""

from dataclasses import dataclass, field
from pathlib import Path


PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
PROMPTS = "prompts.txt"


@dataclass
class Examples:
    """Examples of a page.

    Attributes:
        pictures: paths.
        prompts: words to draw.
    """

    pictures: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Examples":
        """
        The pictures of a folder, by name, and the lines of its `prompts.txt`, where it has one.

        Args:
            folder: holds PNG, JPEG or WebP files.

        Raises:
            ValueError: there is no such folder, or it holds neither.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"--examples: there is no folder {str(folder)!r}.")
        pictures = sorted(str(path.resolve()) for path in folder.iterdir() if path.suffix.lower() in PICTURE_ENDINGS)
        prompts = folder / PROMPTS
        lines = prompts.read_text(encoding="utf-8").splitlines() if prompts.exists() else []
        if not pictures and not lines:
            raise ValueError(
                f"--examples: {str(folder)!r} holds neither pictures ({', '.join(PICTURE_ENDINGS)}) nor a {PROMPTS}."
            )
        return cls(pictures, [line.strip() for line in lines if line.strip()])
