# SPDX-License-Identifier: Apache-2.0
"""What a conversion did: numbers of keys and bytes, and how far the outputs lie apart."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


RECEIPT_FILE = "conversion.json"


@dataclass
class Receipt:
    """The account of one conversion."""

    source: str
    model_type: str
    taken: int = 0
    copied: int = 0
    new: int = 0
    ignored: dict[str, int] = field(default_factory=dict)
    tensor_bytes: int = 0
    files: int = 0
    relative_difference: float | None = None
    new_token_probability: float | None = None
    image_loss: float | None = None

    def table(self) -> str:
        """Return the report as lines of `name  value`."""
        difference = self.relative_difference
        rows = [
            ("source", f"{self.source} ({self.model_type})"),
            ("keys taken", self.taken),
            ("keys copied", self.copied),
            ("keys new", self.new),
            *[(f"keys not in the model: {reason}", count) for reason, count in self.ignored.items()],
            ("size", f"{self.tensor_bytes / 1e6:.1f} MB in {self.files} file{'s' if self.files != 1 else ''}"),
            ("relative output difference", "not measured" if difference is None else f"{difference:.1e}"),
        ]
        if self.new_token_probability is not None:
            rows.append(("probability of new tokens", f"{self.new_token_probability:.2%}"))
        if self.image_loss is not None:
            rows.append(("loss of image codes", f"{self.image_loss:.2f} nats"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def save(self, folder: Path):
        """Write `conversion.json` into a folder."""
        (folder / RECEIPT_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
