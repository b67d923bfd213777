# SPDX-License-Identifier: Apache-2.0
"""
Measures a model of `recipes/spoken.yaml` on words and labels that it never heard.

    python scripts/evaluate_spoken.py --model runs/spoken/model --report runs/spoken/report.json

A held-out word is spoken, and the model ranks all held-out words by the likelihood of their spelling, or writes one. A
held-out label of an emoji is spoken, and the model ranks drawings: after the sound, after the sound and the label that
the model itself has written down, and after what it has written alone. Everything is by causal inference.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import soundfile
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, logging, set_seed

from modeling_moma.data.encoding import DocumentEncoder
from modeling_moma.data.images import read_image
from modeling_moma.data.sources import undecoded_rows
from modeling_moma.evaluation.retrieval import rank_figures, ranks
from modeling_moma.evaluation.scoring import continuation_log_probs
from modeling_moma.hub.loading import MODEL, PROCESSOR, open_saved
from modeling_moma.utils.atomic_files import atomic_write
from sheet import SheetEntry, draw_contact_sheet
from tokenization.audio_input_moma import read_sound


DATA = Path(__file__).resolve().parent.parent / "data" / "spoken"
NEW_TOKENS = 16
# labels of a sheet, and of a row in it
SHEET, COLUMNS = 16, 4


def rows_of(path: Path, number: int, name: str) -> list[dict[str, Any]]:
    """The first so many rows with different names."""
    found: dict[str, dict[str, Any]] = {}
    for row in undecoded_rows(Dataset.from_parquet(str(path))):
        if len(found) < number:
            found.setdefault(row[name], row)
    return list(found.values())


def figures(scores_QA: torch.Tensor) -> dict:
    """Of the ranks where each query's own answer has its number."""
    own = torch.arange(len(scores_QA))
    return rank_figures(*ranks(scores_QA, own, own))


def measure_words(model, processor, rows: list[dict[str, Any]], batch_size: int) -> dict:
    """From sound to spelling, and from spelling to sound."""
    encoder = DocumentEncoder(processor)
    words = [row["word"] for row in rows]
    spelt = [[*encoder.text_ids(word), encoder.eos] for word in words]
    sounds = processor.encode_items("audio", [row["audio"] for row in rows])
    framed = [processor.frame_ids("audio", codes) for codes in sounds]
    heard = [encoder.opened(ids) for ids in framed]
    scores = continuation_log_probs(model, heard, spelt, batch_size, "words of each sound")
    asked = [[*encoder.opened(ids[:-1]), framed[0][0]] for ids in spelt]
    of_sounds = continuation_log_probs(model, asked, [ids[1:] for ids in framed], batch_size, "sounds of each word")
    alone = [[*encoder.opened([]), framed[0][0]]]
    (prior,) = continuation_log_probs(model, alone, [ids[1:] for ids in framed], batch_size, "sounds of no word")
    written = [write(model, processor, ids) for ids in heard]
    return {
        "words": len(words),
        "ranked": figures(scores),
        "sounds_ranked": figures(of_sounds - prior),
        "written_exactly": sum(map(str.__eq__, written, words)) / len(words),
        "letters_wrong": sum(map(distance, written, words)) / sum(map(len, words)),
        "written": dict(zip(words[:20], written)),
    }


@torch.inference_mode()
def write(model, processor, ids: list[int]) -> str:
    """The likeliest spelling after a sound, up to the end of the document or to an image."""
    prompt = torch.tensor([ids])
    ends = [model.config.eos_token_id, model.config.begin_image_token_id]
    out = model.generate(
        prompt, generation_mode="interleaved", max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=ends
    )
    return processor.decode(out[0, len(ids) :], skip_special_tokens=True).strip()


def distance(first: str, second: str) -> int:
    """Levenshtein's: letters to insert, delete or change."""
    row = list(range(len(second) + 1))
    for place, letter in enumerate(first, start=1):
        last, row[0] = row[0], place
        for other, wanted in enumerate(second, start=1):
            last, row[other] = row[other], min(row[other] + 1, row[other - 1] + 1, last + (letter != wanted))
    return row[-1]


def write_sounds(model, processor, rows: list[dict[str, Any]], folder: Path) -> None:
    """Of each word a file of what was spoken, of what its codes keep, and of what the model says when it reads it."""
    codec = processor.codecs["audio"]
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        prompt = processor(text=[row["word"]], return_tensors="pt")
        set_seed(0)
        ids = model.generate(
            **prompt, generation_mode="audio", max_new_tokens=60, do_sample=True, temperature=0.7, top_k=50
        )
        sounds = {
            "spoken": read_sound(row["audio"], codec.sampling_rate),
            "codes": codec.decode(processor.encode_items("audio", [row["audio"]])[0]),
            "said": processor.post_process_multimodal_output(ids, generation_mode="audio")[0],
        }
        for name, samples in sounds.items():
            soundfile.write(folder / f"{row['word']}-{name}.flac", samples, codec.sampling_rate)


def spoken_drawings(processor, rows: list[dict[str, Any]]) -> tuple[list[list[int]], list[Image.Image]]:
    """The ids of each row's sound, as a document begins with them, and its drawing."""
    encoder = DocumentEncoder(processor)
    parts = [{name: value for part in row["segments"] for name, value in part.items() if value} for row in rows]
    sounds = processor.encode_items("audio", [part["audio"] for part in parts])
    heard = [encoder.opened(processor.frame_ids("audio", sound)) for sound in sounds]
    return heard, [read_image(part["image"])[0] for part in parts]


@torch.inference_mode()
def draw_sheet(model, processor, rows: list[dict[str, Any]]) -> Image.Image:
    """Each label's drawing, its reconstruction, and what the model draws of what it has heard and written down."""
    heard, real = spoken_drawings(processor, rows)
    written = [write(model, processor, ids) for ids in heard]
    encoder = DocumentEncoder(processor)
    prompts = [torch.tensor([encoder.opened(encoder.text_ids(text))]) for text in written]
    ids = [model.generate(prompt, generation_mode="image", do_sample=False) for prompt in prompts]
    drawn = [processor.decode_images(model.decode_image_tokens(row))[0] for row in ids]
    again = processor.decode_images(processor.encode_images(real))
    labels = [row["label"] for row in rows]
    return draw_contact_sheet([SheetEntry(*entry) for entry in zip(real, again, drawn, labels, written)], COLUMNS)


def measure_drawings(model, processor, rows: list[dict[str, Any]], batch_size: int) -> dict:
    """From a spoken label to its drawing, at once or by writing down what was heard, and from the written label."""
    encoder = DocumentEncoder(processor)
    heard, real = spoken_drawings(processor, rows)
    images = processor.encode_images(real)
    begin, codes = processor.image_ids(images[0])[0], [processor.image_ids(image)[1:-1] for image in images]
    of_all = partial(continuation_log_probs, model, continuations=codes, batch_size=batch_size)
    labels = [row["label"] for row in rows]
    written = [write(model, processor, ids) for ids in heard]
    asked = {
        "sound": heard,
        "sound_and_writing": [[*ids, *encoder.text_ids(text)] for ids, text in zip(heard, written)],
        "writing": [encoder.opened(encoder.text_ids(text)) for text in written],
        "label": [encoder.opened(encoder.text_ids(label)) for label in labels],
    }
    (prior,) = of_all([[*encoder.opened([]), begin]], description="drawings of nothing")
    report: dict[str, Any] = {
        "labels": len(labels),
        "written_exactly": sum(map(str.__eq__, written, labels)) / len(labels),
        "written": dict(zip(labels[:20], written)),
    }
    for name, prompts in asked.items():
        gains = of_all([[*ids, begin] for ids in prompts], description=f"drawings of each {name}") - prior
        # by how many nats a drawing gets likelier
        report[f"of_{name}"] = {**figures(gains), "gain": gains.diagonal().mean().item()}
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a model")
    parser.add_argument("--processor", help="folder of its processor; by default that of the model")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of scripts/build_spoken.py")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--words", type=int, default=200, help="held-out words")
    parser.add_argument("--labels", type=int, default=100, help="held-out labels")
    parser.add_argument("--batch-size", type=int, default=100, help="continuations at once")
    parser.add_argument("--sounds", type=Path, help="folder for the sounds of the first three words, and nothing else")
    parser.add_argument("--sheet", type=Path, help="PNG of what the first labels make it draw, and nothing else")
    parser.add_argument("--report", type=Path, help="JSON file of the figures")
    args = parser.parse_args(arguments)
    if not (args.data / "words").is_dir():
        parser.error(f"--data {str(args.data)!r} has no sounds: `make data-spoken` makes them")
    logging.set_verbosity_error()
    option, place = ("--processor", args.processor) if args.processor else ("--model", args.model)
    processor = open_saved(PROCESSOR, option, place, partial(AutoProcessor.from_pretrained, place))
    load = partial(AutoModelForCausalLM.from_pretrained, args.model, dtype=torch.float32)
    model = open_saved(MODEL, "--model", args.model, load).eval()
    words = rows_of(args.data / "words" / f"{args.split}.parquet", args.words, "word")
    if args.sounds is not None:
        write_sounds(model, processor, words[:3], args.sounds)
        return 0
    labels = rows_of(args.data / "emoji" / f"{args.split}.parquet", args.labels, "label")
    if args.sheet is not None:
        sheet = draw_sheet(model, processor, labels[:SHEET])
        atomic_write(args.sheet, lambda aside: sheet.save(aside, "PNG"))
        return 0
    report = {
        "split": args.split,
        "words": measure_words(model, processor, words, args.batch_size),
        "drawings": measure_drawings(model, processor, labels, args.batch_size),
    }
    text = json.dumps(report, indent=2) + "\n"
    if args.report is not None:
        args.report.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(args.report, lambda aside: aside.write_text(text, encoding="utf-8"))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
