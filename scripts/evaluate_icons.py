# SPDX-License-Identifier: Apache-2.0
"""
Measures a model of icons and their names on held-out icons, and writes its report, a sheet of drawings and its card.

    python scripts/evaluate_icons.py --model model_cards/moma-icons --write-card

Some icons of every held-out split are measured, chosen by a hash of set and file name, so that they are a fair sample.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from icon_evaluation import measures, samples
from icon_evaluation.card import EVALUATION_FILE, SHEET_FILE, write_card
from icon_evaluation.samples import HELD_OUT, MAIN, TRAIN, Extract, Sample, caption, open_split
from icon_evaluation.typical import KnownDrawings, in_black, typical_caption
from image_sets.icon_names import spaced
from modeling_moma.errors_moma import InputError
from modeling_moma.evaluation.captions import derangement
from modeling_moma.evaluation.drawings import all_features, check_drawings, feature_extractor
from modeling_moma.evaluation.measures import (
    decode_images,
    draw_images,
    load_model,
    tokenizer_quality,
)
from modeling_moma.evaluation.retrieval import likeliest_drawings
from modeling_moma.labelling import FILE_NAME_SHARE
from modeling_moma.labelling.file_names import file_name_shares, with_file_names
from modeling_moma.labelling.labeler import Guess, ImageLabeler, mixed_guesses
from modeling_moma.labelling.memory import memory_of
from modeling_moma.utils.atomic_files import atomic_write, check_writable
from sheet import SheetEntry, draw_contact_sheet
from tokenization import MomaProcessor


# codings of each icon, beside one, by which it is named and tagged
VIEWS = 5
# at most, of each split: queries, captions to draw and to show, icons in tables
QUERIES, DRAWINGS, SHEET, SAMPLES = 50, 160, 24, 20
SHEET_COLUMNS = 4
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 0, "guidance_scale": 5.0}
TYPICAL_SAMPLING = SAMPLING | {"temperature": 0.3, "guidance_scale": 1.0}


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a MomaForCausalLM and its MomaProcessor")
    parser.add_argument("--data", default="data/icons", help="folder of the icons")
    parser.add_argument("--typical", help="folder of scripts/build_typical_icons.py that the model learnt to draw by")
    parser.add_argument("--features", help="file of the features of training images, made where it is missing")
    parser.add_argument("--train-images", type=int, help="to compare with, by default all")
    parser.add_argument("--limit", type=int, default=300, help="icons of each split, at least 8")
    parser.add_argument("--seeds", type=int, default=4, help="drawings of each caption")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--write-card", action="store_true", help="write README.md and its sheet beside the model")
    args = parser.parse_args(arguments)
    for name, least in (("train_images", 1), ("limit", 8), ("seeds", 1), ("batch_size", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value}: it must be at least {least}")
    words = sys.argv[1:] if arguments is None else arguments
    args.command = shlex.join(["python", "scripts/evaluate_icons.py", *words])
    return args


class Evaluation:
    """Loads what every measure needs; `run` measures, `sheet` draws."""

    def __init__(self, args: argparse.Namespace, extract: Extract | None = None):
        self.args = args
        check_writable(args.model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_model(args.model, device)
        self.processor = MomaProcessor.from_pretrained(args.model).to(device)
        check_drawings(self.processor, min(args.limit, DRAWINGS))
        self.labeler = ImageLabeler(self.model, self.processor, batch_size=args.batch_size)
        self.labeler.take_memory(memory_of(args.model), "memory")
        self.memory = self.labeler.memory
        self.labeler_of_views = ImageLabeler(
            self.model, self.processor, batch_size=args.batch_size, views=VIEWS, memory=self.memory
        )
        self.extract = extract or feature_extractor(device)
        self.typical = open_split(args.typical, TRAIN, "--typical") if args.typical else None
        self.train = samples.read_train_icons(
            open_split(args.data, TRAIN),
            self.processor,
            self.extract,
            args.batch_size,
            args.train_images,
            args.features,
        )
        self.tags_of_names = measures.tags_by_name(self.train.columns)
        self.samples = {split: self._sample(split, args.limit) for split in HELD_OUT}

    def _sample(self, split: str, limit: int, **kwargs) -> Sample:
        args = self.args
        return samples.take_sample(args.data, split, limit, self.processor, self.extract, args.batch_size, **kwargs)

    def neighbours(self) -> dict[str, list[list[dict]]]:
        """The training icons of other families that are nearest to each icon of each split."""
        taken = self.samples.values()
        features = torch.cat([sample.features for sample in taken])
        families = [row["family"] for sample in taken for row in sample.rows]
        # in one pass over the training icons
        found = iter(samples.nearest(self.train, features, families))
        return {sample.split: [next(found) for _ in sample.rows] for sample in taken}

    def guesses(self, sample: Sample, kind: str, count: int, places: Sequence[int]) -> dict[str, list[list[str]]]:
        """Names or tags of icons by the model alone and with its memory, by one view and by several."""
        found = {}
        for ending, labeler in (("", self.labeler), ("_of_views", self.labeler_of_views)):
            codes = (labeler.encode_pixels(torch.cat(sample.images)) if ending else sample.codes)[list(places)]
            written = getattr(labeler, f"beam_{kind}")(codes, count)
            found[f"model{ending}"] = texts_of(written, count)
            if self.memory is not None:
                shares_of = self.memory.name_shares if kind == "names" else self.memory.tag_shares
                mixed = mixed_guesses(written, shares_of(labeler.features(codes)), labeler.memory_share)
                found[f"with_memory{ending}"] = texts_of(mixed, count)
        return found

    def names(self, sample: Sample, neighbours: list[list[dict]]) -> dict:
        """How many names are found by beam search and by neighbours."""
        found = self.guesses(sample, "names", measures.NAMES, range(len(sample.rows)))
        others = [list(dict.fromkeys(spaced(row["name"]) for row in rows))[: measures.NAMES] for rows in neighbours]
        shown = zip(sample.rows[:SAMPLES], as_shipped(found), others)
        return {
            "images": len(sample.rows),
            **{key: measures.name_figures(texts, sample.rows) for key, texts in found.items()},
            "nearest_neighbour": measures.name_figures(others, sample.rows),
            "samples": [
                {"icon": f"{row['set']}:{row['icon']}", "name": row["name"], "names": texts, "neighbour": other[:1]}
                for row, texts, other in shown
            ],
        }

    def tags(self, sample: Sample, neighbours: list[list[dict]]) -> dict | None:
        """How many of the makers' tags are found; nothing where no icon has any."""
        places = [place for place, row in enumerate(sample.rows) if row["keywords"]]
        if not places:
            return None
        rows = [sample.rows[place] for place in places]
        found = self.guesses(sample, "tags", measures.TAGS, places)
        others = [
            list(dict.fromkeys(spaced(tag) for row in neighbours[place] for tag in row["keywords"]))[: measures.TAGS]
            for place in places
        ]
        return {
            "images": len(rows),
            "tags": sum(len(row["keywords"]) for row in rows) / len(rows),
            **{key: measures.tag_figures(texts, rows) for key, texts in found.items()},
            "nearest_neighbour": measures.tag_figures(others, rows),
            "samples": [
                {"icon": f"{row['set']}:{row['icon']}", "keywords": row["keywords"], "tags": texts}
                for row, texts in zip(rows[:SAMPLES], as_shipped(found))
            ],
        }

    def search(self, sample: Sample, neighbours: list[list[dict]]) -> dict | None:
        """The recall of search by tags that the names of icons lack; nothing without such tags."""
        rows = sample.rows
        queries = measures.queries_of(rows, QUERIES)
        if not queries:
            return None
        names = [measures.name_document(row) for row in rows]
        carried = [" ".join(self.tags_of_names.get(spaced(row["name"]), ())) for row in rows]
        documents = {
            "bm25_names": names,
            "bm25_names_and_tags": [" ".join(parts) for parts in zip(names, carried)],
            "bm25_neighbours": [measures.neighbour_document(found) for found in neighbours],
        }
        return {"unnamed": self._searched(sample, documents, queries)}

    def _searched(self, sample: Sample, documents: dict[str, list[str]], queries: list[measures.Query]) -> dict:
        texts = [query.text for query in queries]
        scores_NQ = self.labeler.written_match(sample.codes, texts)
        found = {"model": measures.recall(scores_NQ, queries)}
        if self.memory is not None:
            scores_NQ = self.labeler.with_memory(scores_NQ, sample.codes, texts)
            found["with_memory"] = measures.recall(scores_NQ, queries)
        shares_NQ = file_name_shares([row["icon"] for row in sample.rows], texts, self.memory)
        found["with_file_names"] = measures.recall(with_file_names(scores_NQ, shares_NQ, FILE_NAME_SHARE), queries)
        return {
            "images": len(sample.rows),
            "queries": len(queries),
            "wanted": sum(len(query.wanted) for query in queries) / len(queries),
            **found,
            **{
                name: measures.recall(measures.lexical_scores(texts, queries), queries)
                for name, texts in documents.items()
            },
            "chance": measures.chance(len(sample.rows), queries),
        }

    def draw(self, captions: Sequence[str], sampling: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of drawings `[N, seeds, L]`, and of those of which the model finds the captions likeliest `[N, L]`."""
        size = self.args.batch_size
        drawn = [
            draw_images(self.model, self.processor, list(captions), size, sampling, seed)
            for seed in range(self.args.seeds)
        ]
        drawn_NSL = torch.stack(drawn, dim=1)
        places_N = likeliest_drawings(self.model, self.processor, drawn_NSL, captions, size)
        return drawn_NSL, drawn_NSL[torch.arange(len(captions)), places_N]

    def drawings(self) -> dict:
        """What a judge sees in drawings of held-out captions whose names it knows."""
        judge = measures.fit_judge(self.train)
        names, limit = set(judge.names), min(self.args.limit, DRAWINGS)
        sample = self._sample(MAIN, limit, is_taken=lambda row: spaced(row["name"]) in names)
        others = derangement(len(sample.rows))

        def seen(codes: torch.Tensor) -> torch.Tensor:
            return all_features(self.extract, decode_images(self.processor, codes, self.args.batch_size))

        def figures(asked, sampling: dict) -> tuple[dict, torch.Tensor]:
            drawn = self.draw([asked(row) for row in sample.rows], sampling)
            settings = {**sampling, "seeds": list(range(self.args.seeds))}
            return {**measures.judged(judge, seen, sample, *drawn, others), "settings": settings}, drawn[0]

        found, _ = figures(partial(caption, with_colour=True), SAMPLING)
        if self.typical is not None:
            found["typical"], drawn_NSL = figures(typical_caption, TYPICAL_SAMPLING)
            found["typical"]["known"] = self._known(sample, drawn_NSL)
        return found

    def _known(self, sample: Sample, drawn_NSL: torch.Tensor) -> dict:
        """How many drawings are nearly typical icons, and how many reconstructions of held-out icons are."""
        known = KnownDrawings(self.typical, self.processor, self.args.batch_size)
        names, colours = ([row[name] for row in sample.rows] for name in ("name", "colour"))
        held_out = in_black(self.processor.decode_images(sample.codes), colours)
        drawn = [known.shares(self.processor.decode_images(codes), names) for codes in drawn_NSL.unbind(1)]
        return {
            "icons": len(known),
            "reconstructions": known.shares(map(Image.fromarray, held_out), names),
            "drawn": measures.means(drawn),
        }

    def run(self) -> dict:
        """The report."""
        main, near, config = self.samples[MAIN], self.neighbours(), self.model.config
        return {
            "command": self.args.command,
            "dtype": "float32",
            "model": {
                "parameters": config.num_parameters(),
                "active_parameters": config.num_parameters(active=True),
                "num_experts": config.num_experts,
                "num_hidden_layers": config.num_hidden_layers,
            },
            "image_seq_length": self.processor.image_seq_length,
            "resolution": self.processor.image_size[0],
            "train_icons": len(self.train.columns["name"]),
            "views": VIEWS,
            "memory": self._memory_facts(),
            "neighbour_images": len(self.train.rows),
            "tokenizer": tokenizer_quality(self.processor, main.images, main.codes),
            **{
                name: {split: measure(sample, near[split]) for split, sample in self.samples.items()}
                for name, measure in (("names", self.names), ("tags", self.tags), ("search", self.search))
            },
            "drawings": self.drawings(),
        }

    def _memory_facts(self) -> dict | None:
        if self.memory is None:
            return None
        return {
            "images": len(self.memory),
            "names": self.memory.num_image_names,
            "tagged_names": sum(map(bool, self.memory.tags)),
            "bytes": Path(memory_of(self.args.model) or "").stat().st_size,
            "share": self.labeler.memory_share,
        }

    def sheet(self) -> Image.Image:
        """Icons of different names by hash: as they are, through the image tokenizer, and from their captions."""
        opened = open_split(self.args.data, MAIN)
        rows = samples.without_images(opened)
        places = rows_of_names(rows, min(self.args.limit, SHEET))
        real = opened.select(places)["image"][:]
        codes = self.labeler.encode(real)
        asked, sampling = partial(caption, with_colour=True), SAMPLING
        if self.typical is not None:
            asked, sampling = typical_caption, TYPICAL_SAMPLING
        captions = [asked(rows[place]) for place in places]
        _, drawn = self.draw(captions, sampling)
        named = [guesses[0].text if guesses else "" for guesses in self.labeler.names(codes, 1)]
        shown = zip(real, *map(self.processor.decode_images, (codes, drawn)), captions, named, strict=True)
        return draw_contact_sheet([SheetEntry(*entry) for entry in shown], SHEET_COLUMNS)


def texts_of(guesses: Sequence[Sequence[Guess]], count: int) -> list[list[str]]:
    """So many texts of what images are given."""
    return [[guess.text for guess in found[:count]] for found in guesses]


def as_shipped(found: dict[str, list[list[str]]]) -> list[list[str]]:
    """What `moma label` writes by default: one view, and the memory where there is one."""
    return found.get("with_memory", found["model"])


def rows_of_names(rows: Sequence[dict], count: int) -> list[int]:
    """The places of icons of different names: the first names by their hashes, of each its first icon."""
    first = {}
    for place, row in enumerate(rows):
        first.setdefault(spaced(row["name"]), place)
    return [first[name] for name in sorted(first, key=samples.order)[:count]]


def main(arguments=None) -> int:
    args = parse_arguments(arguments)
    folder = Path(args.model)
    try:
        evaluation = Evaluation(args)
        report = evaluation.run()
        text = json.dumps(report, indent=2) + "\n"
        atomic_write(folder / EVALUATION_FILE, lambda path: path.write_text(text))
        if args.write_card:
            # so few colours are enough for icons, and the folder is downloaded whole
            sheet = evaluation.sheet().quantize(96, dither=Image.Dither.NONE)
            atomic_write(folder / SHEET_FILE, lambda path: sheet.save(path, "PNG", optimize=True))
            write_card(folder, report)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{folder / EVALUATION_FILE} has the report")
    return 0


if __name__ == "__main__":
    sys.exit(main())
