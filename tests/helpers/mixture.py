# SPDX-License-Identifier: Apache-2.0
"""A tiny mixture on the disk: captioned images, documents of text and images, and texts, with its recipe."""

import json
from pathlib import Path

import yaml
from datasets import Dataset, Features, Image, Value

from helpers.tiny import noise_images


MODEL = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "norm_placement": "pre",
}
WEIGHTS = {"photos": 0.5, "pages": 0.2, "lines": 0.3}


def write_mixture(folder: Path, **trainer) -> Path:
    """Writes the data and `recipe.yaml` into a folder; the recipe's paths are absolute."""
    folder.mkdir(parents=True, exist_ok=True)
    images = noise_images(60)
    rows = {"image": images[:40], "label": [f"thing {index}" for index in range(40)]}
    features = Features({"image": Image(), "label": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(folder / "photos.parquet")
    for index, image in enumerate(images[40:]):
        image.save(folder / f"{index}.png")
    pages = [
        {"segments": [{"text": "red apple " * (index % 7 + 1)}, {"image": f"{index}.png"}, {"text": "castle"}]}
        for index in range(20)
    ]
    (folder / "pages.jsonl").write_text("\n".join(map(json.dumps, pages)))
    (folder / "lines.txt").write_text("\n".join("green apple castle " * (index % 9 + 1) for index in range(60)))
    sources = {
        "photos": {"data": str(folder / "photos.parquet"), "image": "image", "text": "label", "held_out": 0.2},
        "pages": {"data": str(folder / "pages.jsonl"), "segments": "segments", "held_out": 0.2},
        "lines": {"data": str(folder / "lines.txt"), "text": "text", "held_out": 0.1},
    }
    for name, weight in WEIGHTS.items():
        sources[name]["weight"] = weight
    recipe = {
        "sources": sources,
        "data": {"sequence_length": 96, "packed": True},
        "model": MODEL,
        "trainer": {"per_device_train_batch_size": 2, "warmup_steps": 2, "learning_rate": 0.003, **trainer},
        "samples": {"every": 4, "prompts": ["thing 1", "thing 2"], "images": 2, "max_new_tokens": 4},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path
