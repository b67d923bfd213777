# SPDX-License-Identifier: Apache-2.0
"""Images whose names are known, kept by what a model makes of them: a new image is called what the nearest are called.

A nearest neighbour language model ("Generalization through Memorization", arXiv 1911.00172) at one place alone, where
the caption of an image begins: its key is the hidden state there, its value a whole name, and its probabilities are
interpolated with the model's as there (equation 3).

Shape suffixes:
    N images, B of them at once, M kept ones, D hidden size, F numbers kept of each, K nearest, Q queries.
"""

import json
import lzma
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch.nn import functional as F
from transformers.utils import cached_file

from ..errors_moma import InputError
from ..utils.atomic_files import atomic_write, check_place
from ..utils.messages import one_line


# in the folder of a model: apart from its weights, since some readers take every file of tensors beside them
MEMORY_FILE = "memory/images.safetensors"
# kept images that an image is compared with in the end
NEAREST = 100
# images at once that are compared with all kept ones: of each pair there is a cosine
AT_ONCE = 256
# cosines are divided by it: how much nearer ones count for
TEMPERATURE = 0.06
# tags of a name that its images are given, its most frequent
MOST_TAGS = 12
# power of a component's deviation that is divided out: at 0 the first few decide, and at 1 noise does
WHITENING = 0.3
# kept numbers are whole ones up to this, two in a byte, in steps of a part of their deviation
LARGEST, STEPS = 7, 2.7
# of texts once they are unpacked
LARGEST_TEXTS = 256 << 20
# what texts begin with that are packed by lzma; earlier ones are by zlib
XZ = b"\xfd7zXZ"
PACKING_ERRORS = (zlib.error, lzma.LZMAError)
# cosine below which two models are different ones, and not one in another precision
SAME_MODEL = 0.98


@dataclass(frozen=True, eq=False)
class ImageMemory:
    """Names and tags of images that are kept by their hidden states.

    Args:
        keys (`torch.Tensor`):
            `[M, F]`, whole numbers from -7 to 7.
        mean (`torch.Tensor`):
            `[D]`, of hidden states, which is taken off.
        projection (`torch.Tensor`):
            `[D, F]`, from hidden states to what is kept of them.
        name_of (`torch.Tensor`):
            `[M]`, int64, the number of each image's name.
        names (`list[str]`):
            different ones, some perhaps of no image.
        tags (`list[list[str]]`):
            of each name, the most frequent first; perhaps none. Its images are given the first 12.
        probe (`torch.Tensor`):
            `[D]`, what the model made of a fixed image.
        processor (`str`):
            fingerprint of the processor that made the codes.
    """

    keys: torch.Tensor
    mean: torch.Tensor
    projection: torch.Tensor
    name_of: torch.Tensor
    names: list[str]
    tags: list[list[str]]
    probe: torch.Tensor
    processor: str

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_image_names(self) -> int:
        """How many names have images."""
        return len(self.name_of.unique())

    @classmethod
    def build(
        cls,
        features: torch.Tensor,
        names: Sequence[str],
        tags: Sequence[Sequence[str]],
        probe: torch.Tensor,
        processor: str,
        dimensions: int = 64,
    ) -> "ImageMemory":
        """Keep images."""
        features_MD = features.double()
        if len(features_MD) < 2:
            raise InputError(f"a memory of {len(features_MD)} images: it is made of two at least.")
        if not features_MD.isfinite().all():
            raise InputError("hidden states of the images are not finite: are the model's weights?")
        mean_D = features_MD.mean(0)
        variance_D, axes_DD = torch.linalg.eigh((features_MD - mean_D).T.cov())
        # half a byte each
        count = min(dimensions + dimensions % 2, features_MD.shape[1] // 2 * 2)
        variance_F, axes_DF = variance_D.flip(0)[:count], axes_DD.flip(1)[:, :count]
        if variance_F[0] <= 0:
            raise InputError("hidden states of the images are all alike: is the model trained?")
        share_F = (variance_F / variance_F[0]).clamp(min=1e-6)
        # as it is saved
        projection_DF = (axes_DF * share_F ** (-WHITENING / 2)).to(torch.float16).float().contiguous()
        nothing = cls(
            torch.zeros(0, count),
            mean_D.float(),
            projection_DF,
            torch.zeros(0, dtype=torch.long),
            [],
            [],
            probe.float(),
            processor,
        )
        return nothing.extended(features_MD, names, tags)

    def extended(self, features: torch.Tensor, names: Sequence[str], tags: Sequence[Sequence[str]]) -> "ImageMemory":
        """Return a memory that keeps further images as well; what it keeps already is not kept twice."""
        kept_MF = F.normalize((features.double() - self.mean).float() @ self.projection, dim=1)
        step_M1 = kept_MF.std(1, keepdim=True).clamp(min=1e-12) * STEPS / LARGEST
        keys_MF = (kept_MF / step_M1).round().clamp(-LARGEST, LARGEST)
        known = set(zip((self.names[place] for place in self.name_of.tolist()), _as_bytes(self.keys), strict=True))
        new = [place for place, image in enumerate(zip(names, _as_bytes(keys_MF), strict=True)) if image not in known]
        number = {name: place for place, name in enumerate(dict.fromkeys([*self.names, *names]))}
        counted = [Counter[str]() for _ in number]
        for name, found in zip(names, tags, strict=True):
            counted[number[name]].update(list(dict.fromkeys(found)))
        pooled = [[tag for tag, _ in counts.most_common()] for counts in counted]
        for found, earlier in zip(pooled, self.tags):
            found += [tag for tag in earlier if tag not in found]
        return replace(
            self,
            keys=torch.cat([self.keys, keys_MF[new]]),
            name_of=torch.cat([self.name_of, torch.tensor([number[names[place]] for place in new], dtype=torch.long)]),
            names=list(number),
            tags=pooled,
        )

    def with_tags(self, tags: Mapping[str, Sequence[str]]) -> "ImageMemory":
        """Return a memory of the same images that knows tags of further names, or further tags of its own."""
        known = dict(zip(self.names, self.tags, strict=True))
        names = [*known, *(name for name, found in tags.items() if found and name not in known)]
        both = {name: list(dict.fromkeys([*known.get(name, ()), *tags.get(name, ())])) for name in names}
        return replace(self, names=names, tags=list(both.values()))

    def name_shares(self, features: torch.Tensor) -> list[dict[str, float]]:
        """Return the names of the nearest images with their shares, which sum to 1."""
        found = []
        for shares_K, places_K in zip(*self._nearest(features), strict=True):
            shares = defaultdict(float)
            for share, place in zip(shares_K.tolist(), self.name_of[places_K].tolist(), strict=True):
                shares[self.names[place]] += share
            found.append(dict(shares))
        return found

    def tag_shares(self, features: torch.Tensor) -> list[dict[str, float]]:
        """Return the tags of the nearest images that have any, each the first of its image by equal chance."""
        found = []
        for shares_K, places_K in zip(*self._nearest(features), strict=True):
            shares, total = defaultdict(float), 0.0
            for share, place in zip(shares_K.tolist(), self.name_of[places_K].tolist(), strict=True):
                tags = self.tags[place][:MOST_TAGS]
                total += share if tags else 0.0
                for tag in tags:
                    shares[tag] += share / len(tags)
            found.append({tag: share / total for tag, share in shares.items()} if total else {})
        return found

    def match(self, features: torch.Tensor, queries: Sequence[str]) -> torch.Tensor:
        """Return the shares of nearest images whose name begins with words, and of those whose first tag they are."""
        shares_NK, places_NK = self._nearest(features)
        scores_NQ = torch.zeros(len(shares_NK), len(queries), dtype=torch.float64)
        for column, query in enumerate(queries):
            words = " ".join(query.split()).casefold()
            value = [
                float(_begins_with(name, words)) + (tags.count(words) / len(tags) if tags else 0.0)
                for name, tags in self._folded_texts
            ]
            value_NK = torch.tensor(value, dtype=torch.float64)[self.name_of[places_NK]]
            scores_NQ[:, column] = (shares_NK * value_NK).sum(1)
        return scores_NQ

    def _nearest(self, features_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return shares (float64) and places of the nearest images, `[N, K]` each."""
        wanted_NF = F.normalize((features_ND.float().cpu() - self.mean) @ self.projection, dim=1)
        count = min(NEAREST, len(self))
        found = [(part_BF @ self._unit_keys_MF.T).topk(count, dim=1) for part_BF in wanted_NF.split(AT_ONCE)]
        cosine_NK, places_NK = (torch.cat(parts) for parts in zip(*found, strict=True))
        return (cosine_NK.double() / TEMPERATURE).softmax(1), places_NK

    @cached_property
    def _unit_keys_MF(self) -> torch.Tensor:
        return F.normalize(self.keys, dim=1)

    @cached_property
    def _folded_texts(self) -> list[tuple[str, list[str]]]:
        """Names and their tags as they are compared with words."""
        return [
            (name.casefold(), [tag.casefold() for tag in tags[:MOST_TAGS]])
            for name, tags in zip(self.names, self.tags, strict=True)
        ]

    def check_fits(self, probe: torch.Tensor, processor: str, option: str = "memory") -> None:
        """Raise `ValueError` where a memory is of another model or processor."""
        is_same_model = len(probe) == len(self.probe) and (
            F.cosine_similarity(probe.float().cpu(), self.probe, dim=0).item() >= SAME_MODEL
        )
        if not is_same_model or processor != self.processor:
            what = "processor" if is_same_model else "model"
            raise InputError(
                f"{option}: it was made by another {what}, whose states mean something else: was the {what} trained "
                "further? Make it anew with `moma build-memory`, or do without it: move the file away, or "
                "give `moma label` and `moma search` `--memory-share 0`."
            )

    def save(self, path: str | Path) -> Path:
        """Write the memory aside and rename it; its folder is made where it is missing. Its names are sorted in it."""
        # of two numbers one in each half of a byte
        halves_MF = (self.keys + LARGEST + 1).to(torch.uint8)
        # names that begin alike take fewer bytes beside each other
        order = sorted(range(len(self.names)), key=self.names.__getitem__)
        rank = torch.tensor(order).argsort()
        sorted_texts = {"names": [self.names[place] for place in order], "tags": [self.tags[place] for place in order]}
        texts = json.dumps(sorted_texts, separators=(",", ":"))
        packed = lzma.compress(texts.encode("ascii"), preset=6 | lzma.PRESET_EXTREME)
        tensors = {
            "keys": halves_MF[:, 0::2] * 16 + halves_MF[:, 1::2],
            "mean": self.mean,
            "projection": self.projection.to(torch.float16),
            "name_of": rank[self.name_of].to(torch.uint16 if len(self.names) <= 1 << 16 else torch.int32),
            "probe": self.probe,
            "texts": torch.frombuffer(bytearray(packed), dtype=torch.uint8),
        }
        # one entry, since several are written in any order
        metadata = {"processor": self.processor}
        check_place(path)
        # `save_file` would let the owner alone read it
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
        return atomic_write(path, lambda aside: aside.write_bytes(data))

    @classmethod
    def load(cls, path: str | Path, option: str = "memory") -> "ImageMemory":
        """Read a memory."""
        if not Path(path).is_file():
            raise InputError(f"{option} {str(path)!r}: there is no such file.")
        try:
            tensors = load_file(path)
            with safe_open(path, framework="pt") as file:
                processor = (file.metadata() or {})["processor"]
            keys_MH = tensors["keys"]
            halves_MF = torch.stack([keys_MH // 16, keys_MH % 16], dim=2).flatten(1)
            texts = _unpacked(tensors["texts"])
            memory = cls(
                halves_MF.float() - (LARGEST + 1),
                tensors["mean"].float(),
                tensors["projection"].float(),
                tensors["name_of"].long(),
                texts["names"],
                texts["tags"],
                tensors["probe"].float(),
                processor,
            )
            memory._check()
        except (OSError, SafetensorError, LookupError, ValueError, TypeError, RuntimeError, *PACKING_ERRORS) as error:
            raise InputError(
                f"{option} {str(path)!r} is no memory of images that `moma build-memory` writes, or is damaged "
                f"({type(error).__name__}: {one_line(error, 200)})."
            ) from error
        return memory

    def _check(self) -> None:
        """Raise `ValueError` where parts do not go together."""
        count, size = self.projection.shape[1], self.projection.shape[0]
        shapes = [self.keys.shape[1:] == (count,), self.mean.shape == (size,), self.probe.shape == (size,)]
        if not all(shapes) or self.name_of.shape != self.keys.shape[:1] or len(self.names) != len(self.tags):
            raise InputError("its parts do not go together")
        if not all(isinstance(text, str) for texts in (self.names, *self.tags) for text in texts):
            raise InputError("its names and tags are no lists of texts")
        if not len(self) or self.name_of.min() < 0 or self.name_of.max() >= len(self.names):
            raise InputError("it holds no image, or numbers of names that it has not")


def memory_of(model: str) -> str | None:
    """Return the file of the memory that is saved with a model, `None` where there is none."""
    return cached_file(
        model,
        MEMORY_FILE,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def _begins_with(name: str, words: str) -> bool:
    """Return whether a name begins with words; as for the model, whatever is no letter or digit may follow them."""
    return name.startswith(words) and not name[len(words) : len(words) + 1].isalnum()


def _as_bytes(keys: torch.Tensor) -> list[bytes]:
    return [row.tobytes() for row in keys.to(torch.int8).numpy()]


def _unpacked(packed: torch.Tensor) -> dict[str, Any]:
    """Return the texts of a memory."""
    data = packed.numpy().tobytes()
    is_xz = data.startswith(XZ)
    unpack = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=LARGEST_TEXTS) if is_xz else zlib.decompressobj()
    text = unpack.decompress(data, LARGEST_TEXTS)
    if not unpack.eof:
        raise InputError(f"texts that are cut, or of more than {LARGEST_TEXTS >> 20} MiB")
    return json.loads(text)
