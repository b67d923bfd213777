# SPDX-License-Identifier: Apache-2.0
"""Takes all measures of a model of icons, one after the other, and times them."""

import json
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from PIL import Image

from evaluate_emoji import describe
from icons_recipe.coverage import expert_coverage
from icons_recipe.judging import LinearJudge, fit_judge, frequent_names, judge_drawings, means
from icons_recipe.model_card import MAIN
from icons_recipe.naming import NAMES, TAGS, name_figures, rank_names, tag_figures
from icons_recipe.neighbours import (
    TrainIcons,
    compute_features,
    distinct_names,
    distinct_tags,
    kept_features,
    nearest,
    rows_by_hash,
    train_columns,
)
from icons_recipe.samples import (
    HELD_OUT,
    TRAIN,
    Sample,
    caption,
    lone_icons,
    normalised,
    open_split,
    read_emoji,
    take_sample,
)
from icons_recipe.searching import (
    Query,
    chance,
    lexical_scores,
    name_document,
    neighbour_document,
    queries_of,
    recall,
    tags_by_name,
)
from icons_recipe.sheet import draw_sheet, likeliest_of
from icons_recipe.typical import KnownDrawings, in_black, typical_caption
from modeling_moma.data.encoding import DocumentEncoder
from modeling_moma.errors_moma import InputError
from modeling_moma.evaluation.drawings import check_drawings, feature_extractor
from modeling_moma.evaluation.held_out import CaptionedImages
from modeling_moma.evaluation.information import measure_information
from modeling_moma.evaluation.measures import load_model, tokenizer_quality
from modeling_moma.labelling import FILE_NAME_SHARE
from modeling_moma.labelling.file_names import file_name_shares, with_file_names
from modeling_moma.labelling.guesses import Guess, mixed_guesses
from modeling_moma.labelling.labeler import ImageLabeler
from modeling_moma.labelling.memory import memory_of
from tokenization import MomaProcessor


# of the model of emoji alone, on all of the same images
EMOJI_REPORT = Path(__file__).resolve().parents[2] / "model_cards" / "moma-emoji" / "evaluation.json"
NUM_SAMPLES = 20
# icons of each frequent name that the judge learns from where features are not kept
JUDGED_EACH = 24


class Evaluation:
    """Loads what every measure needs; `run` measures, `sheet` draws.

    Args:
        args: of scripts/evaluate_icons.py.
        extract: pixel values `[B, 3, H, W]` in [-1, 1] to features `[B, D]`; by default ImageNet's.
    """

    def __init__(self, args: Namespace, extract: Callable[[torch.Tensor], torch.Tensor] | None = None):
        self.args = args
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_model(args.model, device)
        self.processor = MomaProcessor.from_pretrained(args.model).to(device)
        check_drawings(self.processor, args.drawings)
        self.labeler = ImageLabeler(self.model, self.processor, batch_size=args.batch_size)
        self.labeler.take_memory(memory_of(args.model), "memory")
        self.memory = self.labeler.memory
        self.labeler_of_views = ImageLabeler(
            self.model, self.processor, batch_size=args.batch_size, views=args.views, memory=self.memory
        )
        self.extract = extract or feature_extractor(device)
        self.control = load_model(args.control, device) if args.control else None
        sampling = {name: getattr(args, name) for name in ("temperature", "top_k", "guidance_scale")}
        self.sampling = {"do_sample": True, **sampling}
        typical_sampling = {name: getattr(args, f"typical_{name}") for name in ("temperature", "guidance_scale")}
        self.typical_sampling = self.sampling | typical_sampling
        self.typical = open_split(args.typical, TRAIN, "--typical") if args.typical else None
        self.earlier = read_report(args.neighbours) if args.neighbours else None
        self.train = self._train_icons()
        self.tags_of_names = tags_by_name(self.train.columns)
        self.samples = {split: self._sample(split, args.limit) for split in HELD_OUT}
        self.views = {
            split: self.labeler_of_views.encode_pixels(torch.cat(sample.images))
            for split, sample in self.samples.items()
        }

    def _sample(self, split: str, limit: int, **kwargs) -> Sample:
        args = self.args
        return take_sample(args.data, split, limit, self.processor, self.extract, args.batch_size, **kwargs)

    def _train_icons(self) -> TrainIcons:
        args, opened = self.args, open_split(self.args.data, TRAIN)
        columns = train_columns(opened)
        if args.features:
            return kept_features(args.features, opened, columns, self.processor, self.extract, args.batch_size)
        limit, each = args.train_images, JUDGED_EACH
        if self.earlier is not None:
            # the judge alone needs any, and learns from all
            limit, each = 0, len(columns["name"])
        rows = rows_by_hash(columns, limit, frequent_names(columns), each)
        return compute_features(opened, columns, rows, self.processor, self.extract, args.batch_size)

    def neighbours(self) -> dict[str, list[list[dict]]]:
        """Returns the training icons of other families that are nearest to each icon of each split.

        There are none where an earlier report has what they tell.
        """
        samples = self.samples.values()
        if self.earlier is not None:
            return {sample.split: [[] for _ in sample.rows] for sample in samples}
        features = torch.cat([sample.features for sample in samples])
        families = [row["family"] for sample in samples for row in sample.rows]
        # in one pass over the training icons
        found = iter(nearest(self.train, features, families))
        return {sample.split: [next(found) for _ in sample.rows] for sample in samples}

    def names(self, sample: Sample, neighbours: list[list[dict]]) -> dict:
        """Returns how many names are found by beam search and by neighbours, and the true names' ranks among all."""
        args, name_end = self.args, self.labeler.form.name_ends[0]
        found = self._guesses(sample, "names", NAMES)
        others = [distinct_names(rows, NAMES) for rows in neighbours]
        ranked = rank_names(self.model, self.processor, sample, args.ranked, name_end, 4 * args.batch_size)
        return {
            "images": len(sample.rows),
            **{key: name_figures(texts, sample.rows) for key, texts in found.items()},
            "nearest_neighbour": name_figures(others, sample.rows),
            "ranked": ranked,
            "samples": [
                {"icon": f"{row['set']}:{row['icon']}", "name": row["name"], "names": texts, "neighbour": other[:1]}
                for row, texts, other in zip(sample.rows[:NUM_SAMPLES], _as_shipped(found), others)
            ],
        }

    def tags(self, sample: Sample, neighbours: list[list[dict]]) -> dict | None:
        """Returns how many of the makers' tags are found; nothing where no icon has any."""
        places = [place for place, row in enumerate(sample.rows) if row["keywords"]]
        if not places:
            return None
        rows = [sample.rows[place] for place in places]
        found = self._guesses(sample, "tags", TAGS, places)
        others = [distinct_tags(neighbours[place], TAGS) for place in places]
        return {
            "images": len(rows),
            "tags": sum(len(row["keywords"]) for row in rows) / len(rows),
            **{key: tag_figures(texts, rows) for key, texts in found.items()},
            "nearest_neighbour": tag_figures(others, rows),
            "samples": [
                {"icon": f"{row['set']}:{row['icon']}", "keywords": row["keywords"], "tags": texts}
                for row, texts in zip(rows[:NUM_SAMPLES], _as_shipped(found))
            ],
        }

    def _guesses(
        self, sample: Sample, kind: str, count: int, places: Sequence[int] = ()
    ) -> dict[str, list[list[str]]]:
        """Returns names or tags of icons by the model alone and with its memory, by one view and by several."""
        found = {}
        for ending, labeler, codes in (
            ("", self.labeler, sample.codes),
            ("_of_views", self.labeler_of_views, self.views[sample.split]),
        ):
            codes = codes[list(places)] if places else codes
            written = getattr(labeler, f"written_{kind}")(codes, count)
            found[f"model{ending}"] = texts_of(written, count)
            if self.memory is not None:
                shares_of = self.memory.name_shares if kind == "names" else self.memory.tag_shares
                mixed = mixed_guesses(written, shares_of(labeler.features(codes)), labeler.memory_share)
                found[f"with_memory{ending}"] = texts_of(mixed, count)
        return found

    def search(self, sample: Sample, neighbours: list[list[dict]]) -> dict | None:
        """Returns the recall of search by tags, of icons whose names lack them and of all; nothing without tags."""
        rows, limit = sample.rows, self.args.queries
        kinds = {"unnamed": queries_of(rows, limit), "any": queries_of(rows, limit, in_names=True)}
        if not all(kinds.values()):
            return None
        names = [name_document(row) for row in rows]
        carried = [" ".join(self.tags_of_names.get(normalised(row["name"]), ())) for row in rows]
        documents = {
            "bm25_names": names,
            "bm25_names_and_tags": [" ".join(parts) for parts in zip(names, carried)],
        }
        if self.earlier is None:
            documents["bm25_neighbours"] = [neighbour_document(found) for found in neighbours]
        return {kind: self._searched(sample, documents, queries) for kind, queries in kinds.items()}

    def _searched(self, sample: Sample, documents: dict[str, list[str]], queries: list[Query]) -> dict:
        number = len(sample.rows)
        texts = [query.text for query in queries]
        scores_NQ = self.labeler.written_match(sample.codes, texts)
        found = {"model": recall(scores_NQ, queries)}
        if self.memory is not None:
            scores_NQ = self.labeler.with_memory(scores_NQ, sample.codes, texts)
            found["with_memory"] = recall(scores_NQ, queries)
        shares_NQ = file_name_shares([row["icon"] for row in sample.rows], texts, self.memory)
        found["with_file_names"] = recall(with_file_names(scores_NQ, shares_NQ, FILE_NAME_SHARE), queries)
        return {
            "images": number,
            "queries": len(queries),
            "wanted": sum(len(query.wanted) for query in queries) / len(queries),
            **found,
            **{name: recall(lexical_scores(texts, queries), queries) for name, texts in documents.items()},
            "chance": chance(number, queries),
        }

    def emoji(self) -> dict | None:
        """Returns how many names of the emoji's own test are found, and by others; nothing without its folder."""
        if not self.args.emoji:
            return None
        rows, codes = read_emoji(self.args.emoji, self.processor, self.args.batch_size)
        result: dict = {"images": len(rows)}
        for key, guesses in (
            ("model", self.labeler.beam_names(codes, NAMES)),
            ("with_memory", self.memory and self.labeler.names(codes, NAMES)),
        ):
            if guesses is not None:
                figures = name_figures(texts_of(guesses, NAMES), rows)
                result[key] = {name: figures[name] for name in ("top1", "top5", "word_in_common")}
        if EMOJI_REPORT.exists():
            captions = json.loads(EMOJI_REPORT.read_text())["captions"]
            result["moma-emoji"] = captions["model"]["label"]
            result["nearest_neighbour"] = captions["nearest_neighbour"]["label"]
        return result

    def fit(self) -> dict:
        """Returns how many names the model alone finds of training icons, and of such icons of `MAIN`, held out."""
        args, train, found = self.args, self.train.columns, {}
        held_out = open_split(args.data, MAIN).select_columns(["name", "family"]).to_dict()
        for split, columns in ((TRAIN, train), (MAIN, held_out)):
            sample = self._sample(split, args.limit, is_taken=lone_icons(columns, train))
            names = texts_of(self.labeler.beam_names(sample.codes, NAMES), NAMES)
            found[split] = {"images": len(names), **name_figures(names, sample.rows)}
        return found

    def drawings(self) -> dict:
        """Returns what a judge sees in drawings of held-out captions whose names it knows."""
        args, judge = self.args, fit_judge(self.train, frequent_names(self.train.columns))
        names = set(judge.names)
        sample = self._sample(MAIN, args.drawings, is_taken=lambda row: normalised(row["name"]) in names)
        found = self._judged(judge, sample, [caption(row, with_colour=True) for row in sample.rows], self.sampling)[0]
        if self.typical is not None:
            asked = [typical_caption(row) for row in sample.rows]
            judged, drawn_NSL = self._judged(judge, sample, asked, self.typical_sampling)
            judged["known"] = self._known(sample, drawn_NSL, self.typical)
            found["typical"] = judged
        return found

    def _known(self, sample: Sample, drawn_NSL: torch.Tensor, typical: Dataset) -> dict:
        """Returns how many drawings are nearly typical icons, and how many reconstructions of held-out icons are."""
        known = KnownDrawings(typical, self.processor, self.args.batch_size)
        names, colours = ([row[name] for row in sample.rows] for name in ("name", "colour"))
        held_out = in_black(self.processor.decode_images(sample.codes), colours)
        return {
            "icons": len(known),
            "reconstructions": known.shares(map(Image.fromarray, held_out), names),
            "drawn": means(
                [known.shares(self.processor.decode_images(codes), names) for codes in drawn_NSL.unbind(1)]
            ),
        }

    def _judged(self, judge: LinearJudge, sample: Sample, captions: Sequence[str], sampling: dict) -> tuple:
        """Returns what a judge sees in drawings of captions, and their codes."""
        args, seeds = self.args, range(self.args.seeds)
        drawn = likeliest_of(self.model, self.processor, captions, args.batch_size, sampling, seeds)
        found = judge_drawings(self.processor, judge, sample, *drawn, self.extract, args.batch_size)
        return {**found, "settings": {**sampling, "seeds": list(seeds)}}, drawn[0]

    def information(self) -> dict:
        """Returns by how many nats captions make images likelier, with and without their colour, and the reverse."""
        sample, found = self.samples[MAIN], {}
        models = {"model": self.model, "control": self.control}
        for key, with_colour in (("plain", False), ("coloured", True)):
            captioned = CaptionedImages(sample.codes, [caption(row, with_colour) for row in sample.rows])
            found[key] = {
                name: measure_information(model, self.processor, captioned, self.args.batch_size)
                for name, model in models.items()
                if model is not None
            }
        return found

    def coverage(self) -> dict[str, list[float]]:
        """Returns the shares of tokens that get a routed expert, in both orders of images and captions."""
        sample, encoder = self.samples[MAIN], DocumentEncoder(self.processor)
        documents = [
            encoder.caption(caption(row, with_colour=True), codes, image_first)
            for row, codes in zip(sample.rows, sample.codes.numpy(), strict=True)
            for image_first in (True, False)
        ]
        return expert_coverage(self.model, documents, self.args.batch_size)

    def run(self) -> dict:
        """Returns the report: what was measured of each split, and the seconds that it took."""
        main, seconds = self.samples[MAIN], {}
        report = {
            "command": self.args.command,
            "dtype": "float32",
            "model": describe(self.model),
            "image_seq_length": self.processor.image_seq_length,
            "resolution": self.processor.image_size[0],
            "train_icons": len(self.train.columns["name"]),
            "views": self.args.views,
            "memory": self._memory_facts(),
            "neighbour_images": len(self.train.rows) if self.earlier is None else self.earlier["neighbour_images"],
            "tokenizer": tokenizer_quality(self.processor, main.images, main.codes),
        }
        start = time.monotonic()
        near = self.neighbours()

        def of_splits(measure):
            return lambda: {split: measure(sample, near[split]) for split, sample in self.samples.items()}

        seconds["neighbours"] = round(time.monotonic() - start, 1)
        for name, measure in (
            ("names", of_splits(self.names)),
            ("tags", of_splits(self.tags)),
            ("search", of_splits(self.search)),
            ("emoji", self.emoji),
            ("fit", self.fit),
            ("drawings", self.drawings),
            ("information", self.information),
            ("coverage", self.coverage),
        ):
            start = time.monotonic()
            report[name] = measure()
            seconds[name] = round(time.monotonic() - start, 1)
        if self.earlier is not None:
            take_neighbours(report, self.earlier)
        return {**report, "seconds": seconds}

    def _memory_facts(self) -> dict | None:
        """Returns what the memory holds, or nothing where the model has none."""
        if self.memory is None:
            return None
        size = Path(memory_of(self.args.model) or "").stat().st_size
        return {
            "images": len(self.memory),
            "names": self.memory.num_image_names,
            "tagged_names": sum(map(bool, self.memory.tags)),
            "bytes": size,
            "share": self.labeler.memory_share,
        }

    def sheet(self):
        """Returns an image of drawings of held-out captions."""
        args = self.args
        asked, sampling = partial(caption, with_colour=True), self.sampling
        if self.typical is not None:
            asked, sampling = typical_caption, self.typical_sampling
        return draw_sheet(self.labeler, args.data, MAIN, args.sheet, asked, sampling, range(args.seeds))


def texts_of(guesses: Sequence[Sequence[Guess]], count: int) -> list[list[str]]:
    """Returns so many texts of what images are given."""
    return [[guess.text for guess in found[:count]] for found in guesses]


def _as_shipped(found: dict[str, list[list[str]]]) -> list[list[str]]:
    """Returns what `moma label` writes by default: one view, and the memory where there is one."""
    return found.get("with_memory", found["model"])


def read_report(path: str) -> dict:
    """
    Reads an earlier report.

    Args:
        path: its file.

    Raises:
        InputError: it is no such file.
    """
    try:
        report = json.loads(Path(path).read_text())
        return {name: report[name] for name in ("train_icons", "neighbour_images", "names", "tags", "search")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--neighbours {path!r} is no report of this script ({type(error).__name__}: {error})."
        ) from error


def take_neighbours(report: dict, earlier: dict) -> None:
    """
    Takes what neighbours tell, whatever the model, from an earlier report of the same icons.

    Args:
        report: which gets it.
        earlier: see `read_report`.

    Raises:
        InputError: the earlier report is of other icons.
    """
    if _what_is_measured(report) != _what_is_measured(earlier):
        raise InputError("--neighbours: the report is of other icons or queries: compute neighbours by --features.")
    for split, names in report["names"].items():
        for mine, others in ((names, earlier["names"][split]), (report["tags"][split], earlier["tags"][split])):
            if mine is not None:
                mine["nearest_neighbour"] = others["nearest_neighbour"]
        for mine, others in zip(names["samples"], earlier["names"][split]["samples"], strict=True):
            mine["neighbour"] = others["neighbour"]
        for kind, found in (report["search"][split] or {}).items():
            found["bm25_neighbours"] = earlier["search"][split][kind]["bm25_neighbours"]


def _what_is_measured(report: dict) -> list:
    """Returns what tells reports on the same icons and queries from others."""
    icons = {
        split: [found["images"], *(sample["icon"] for sample in found["samples"])]
        for split, found in report["names"].items()
    }
    tagged = {split: found and [found["images"], found["tags"]] for split, found in report["tags"].items()}
    queries = {
        split: found and {kind: [entry["queries"], entry["wanted"], entry["chance"]] for kind, entry in found.items()}
        for split, found in report["search"].items()
    }
    return [report["train_icons"], icons, tagged, queries]
