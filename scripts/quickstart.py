# SPDX-License-Identifier: Apache-2.0
"""See a MoMa at work: name, find and draw held-out images, fine-tune, save, reload, and see what it learnt."""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from modeling_moma import MomaMetricsCallback
from modeling_moma.data.documents import HeldOutExamples
from modeling_moma.data.encoding import DocumentEncoder
from modeling_moma.data.kinds import CaptionDocuments, Template
from modeling_moma.data.sources import Source
from modeling_moma.data.stream import DocumentExamples
from modeling_moma.labelling.labeler import CaptionForm, ImageLabeler, check_queries
from modeling_moma.labelling.memory import memory_of
from modeling_moma.training.recipe import read_recipe
from modeling_moma.utils.atomic_files import atomic_write, check_writable
from routing_image import draw_routing, route_example
from sheet import SheetEntry, draw_contact_sheet
from tokenization import MomaDataCollator


ROUTED_IMAGES = 3
SEARCHED_IMAGES, FOUND_IMAGES = 100, 5
NAMES, TAGS = 3, 4
FINE_TUNE_IMAGES = 320
EVALUATION_IMAGES = 32
CAPTION_TOKENS = 32
SPLITS = ("test", "train", "validation")
# of the icons: by makers of whom nothing was learnt
NEW_SPLIT = "test_family"
# the released model, what it draws best by, and how, as its card recommends
RELEASED, TYPICAL = "model_cards/moma-icons", "{name} (typical)"
SAMPLING = {"do_sample": True, "top_k": 0}


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=RELEASED, help="folder of a model and its processor")
    parser.add_argument("--recipe", default="recipes/moma-icons.yaml", help="its first source has images and captions")
    parser.add_argument("--data", help="folder of the data set, by default the recipe's")
    parser.add_argument("--output", default="quickstart", help="folder for the images and the fine-tuned model")
    parser.add_argument("--images", type=int, default=12, help="held-out images to name and to draw")
    parser.add_argument("--query", default="arrow", help="words to look for among held-out images")
    parser.add_argument("--name-prompt", default="", help="what the model's captions have before a name")
    parser.add_argument("--tag-prompt", default="tags:", help="what they have before tags")
    parser.add_argument("--fine-tune-steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32, help="examples of a fine-tuning step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    for name, least in (("images", 1), ("fine_tune_steps", 1), ("batch_size", 1), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: it must be at least {least}")
    # a folder that is missing would be looked for on the Hub
    if not (Path(args.model) / "config.json").is_file():
        parser.error(f"--model: there is no model in a folder {args.model!r}; run from the root of the repository.")
    try:
        check_queries([args.query])
        check_writable(args.output)
        source = read_recipe(args.recipe, needs=("sources",)).sources[0]
        if not source.kind.has_captions:
            parser.error(f"--recipe {args.recipe!r}: its first source, {source.name!r}, has no images with captions.")
        args.source = dataclasses.replace(source, data=args.data or source.data)
        if not Path(args.source.data).is_dir():
            parser.error(f"--data: there is no folder {args.source.data!r}; run from the root of the repository.")
        # one of them is read only after some minutes
        splits = list(args.source.split_names().values())
        if missing := [split for split in SPLITS if split not in splits]:
            parser.error(f"--data {args.source.data!r} has no split {missing[0]!r}, but {splits}.")
        args.learns_new = NEW_SPLIT in splits
        is_released = Path(args.model).resolve() == Path(RELEASED).resolve()
        args.drawing = Template(TYPICAL) if is_released else args.source.kind.templates()[0]
    except ValueError as error:
        parser.error(str(error))
    return args


def load(folder):
    """Model in fp32, which CPUs run fastest, and processor."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)


def pick_rows(source: Source, split: str, count: int, seed: int) -> Dataset:
    """Random rows of a split, the same ones for a seed; other images are not even decoded."""
    rows = source.open(split)
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows.select(order[: min(count, len(rows))])


def captions_of(source: Source, rows: Dataset) -> list[str]:
    """The caption of each row by the recipe's first form."""
    template = source.kind.templates()[0]
    return [template.render(row) for row in rows.select_columns(template.columns)]


def caption_images(model, processor, images: list) -> list[str]:
    """The model's greedy caption of each image."""
    inputs = processor(images=images, text=[processor.image_token] * len(images), return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=CAPTION_TOKENS, do_sample=False, generation_mode="text")
    words = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [" ".join(caption.split()) for caption in words]


def draw(model, processor, prompts: list[str], seed: int) -> list:
    """One sampled image for each prompt, as the model's own configuration samples, if it does."""
    inputs = processor(text=prompts, padding=True, padding_side="left", return_tensors="pt")
    set_seed(seed)
    sampling = {} if getattr(model.generation_config, "image_sampling", None) else SAMPLING
    ids = model.generate(**inputs, generation_mode="image", **sampling)
    return processor.post_process_multimodal_output(model.decode_image_tokens(ids), generation_mode="image")


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]):
    """Columns as wide as their longest entry."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        print("  " + " | ".join(f"{entry:<{width}}" for entry, width in zip(row, widths, strict=True)).rstrip())


def open_images(rows: Dataset, source: Source) -> list[Image.Image]:
    """The images of rows."""
    return [image.convert("RGB") for image in rows[source.kind.image]]


def show_both_ways(
    model, processor, rows: Dataset, args: argparse.Namespace, sheet_path: Path, before: Sequence[str] | None = None
) -> list[str]:
    """Captions the rows' images, beside captions of before, draws what they show, and saves all on one sheet."""
    images, captions = open_images(rows, args.source), captions_of(args.source, rows)
    start = time.time()
    model_captions = caption_images(model, processor, images)
    print(f"{len(images)} held-out images captioned in {time.time() - start:.1f} s:")
    heads = ("true caption", "model's caption") if before is None else ("true caption", "before", "after")
    print_table(heads, list(zip(*filter(None, (captions, before, model_captions)), strict=True)))
    prompts = [args.drawing.render(row) for row in rows.select_columns(args.drawing.columns)]
    start = time.time()
    drawn = draw(model, processor, prompts, args.seed)
    print(f"{len(drawn)} images drawn from words such as {prompts[0]!r} in {time.time() - start:.1f} s")
    reconstructed = processor.decode_images(processor.encode_images(images))
    entries = map(SheetEntry, images, reconstructed, drawn, captions, model_captions)
    sheet = draw_contact_sheet(list(entries))
    atomic_write(sheet_path, lambda path: sheet.save(path, format="PNG"))
    print(f"wrote {sheet_path}")
    return captions


def show_names(labeler: ImageLabeler, rows: Dataset, source: Source):
    """Prints the likeliest names of the rows' images with their probabilities, and tags."""
    start = time.time()
    codes = labeler.encode(rows[source.kind.image][:])
    named, tagged = labeler.names(codes, NAMES), labeler.tags(codes, TAGS)
    whose = "the model alone" if labeler.memory is None else "the model and its memory of named images"
    print(f"the likeliest names and tags of them, by {whose}, in {time.time() - start:.1f} s:")
    lines = [
        (
            caption,
            ", ".join(f"{guess.text} {guess.probability:.2f}" for guess in names),
            ", ".join(guess.text for guess in tags),
        )
        for caption, names, tags in zip(captions_of(source, rows), named, tagged, strict=True)
    ]
    print_table(("true caption", "names, and how likely", "tags"), lines)


def show_search(labeler: ImageLabeler, rows: Dataset, source: Source, query: str):
    """Prints the captions of the images that words fit best."""
    start = time.time()
    scores = labeler.match(labeler.encode(rows[source.kind.image][:]), [query])[:, 0]
    captions = captions_of(source, rows)
    best = [captions[place] for place in scores.topk(min(FOUND_IMAGES, len(rows))).indices]
    print(f"found in {time.time() - start:.1f} s: of {len(rows)} held-out images those that {query!r} fits best:")
    print("  " + ", ".join(best))


def encode_rows(rows: Dataset, processor, source: Source) -> Dataset:
    """Codes of the rows' images, one coding each, as the examples want them."""
    image = source.kind.image
    return rows.map(
        lambda batch: {"codes": [[codes] for codes in processor.encode_images(batch[image])]},
        batched=True,
        batch_size=64,
        remove_columns=[image],
        # the processor's weights are no part of the fingerprint
        load_from_cache_file=False,
        desc="images to codes",
    )


def fine_tuning_rows(args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """Rows that are learnt, and others by which that is measured; no row of `NEW_SPLIT` is among both."""
    source, seed = args.source, args.seed
    if not args.learns_new:
        return tuple(
            pick_rows(source, split, count, seed)
            for split, count in (("train", FINE_TUNE_IMAGES), ("validation", EVALUATION_IMAGES))
        )
    rows = pick_rows(source, NEW_SPLIT, FINE_TUNE_IMAGES + EVALUATION_IMAGES, seed)
    # a tenth of them where there are few
    held_out = min(EVALUATION_IMAGES, -(-len(rows) // 10))
    return rows.skip(held_out), rows.take(held_out)


def fine_tune(model, processor, args, learnt: Dataset, held_out: Dataset, folder: Path):
    """A minute with the plain Trainer, to show the interface."""
    source, encoder = args.source, DocumentEncoder(processor)
    train, validation = (
        CaptionDocuments.from_rows(source.name, source.kind, encode_rows(rows, processor, source).to_list(), encoder)
        for rows in (learnt, held_out)
    )
    training_arguments = TrainingArguments(
        output_dir=folder,
        max_steps=args.fine_tune_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=1e-4 if args.learns_new else 2e-5,
        weight_decay=0.1,
        use_cpu=not torch.cuda.is_available(),
        # torch warns where there is nothing to pin memory for
        dataloader_pin_memory=torch.cuda.is_available(),
        eval_strategy="steps",
        eval_steps=args.fine_tune_steps,
        eval_on_start=True,
        prediction_loss_only=True,
        logging_steps=10,
        disable_tqdm=True,
        save_strategy="no",
        report_to=[],
        seed=args.seed,
    )
    trainer = Trainer(
        model=model,
        args=training_arguments,
        train_dataset=DocumentExamples([train], [1.0], args.fine_tune_steps * args.batch_size, args.seed),
        eval_dataset=HeldOutExamples(validation.held_out()),
        data_collator=MomaDataCollator(processor.tokenizer),
        callbacks=[MomaMetricsCallback()],
        processing_class=processor.tokenizer,
    )
    trainer.train()
    first, last = ([log for log in trainer.state.log_history if "eval_loss" in log][place] for place in (0, -1))
    for modality in model.config.modalities:
        name = f"eval_{modality}_loss"
        print(f"held out, a token of modality {modality} costs {last[name]:.2f} nats, before {first[name]:.2f}")
    # Trainer moves the model to the accelerator, if there is one
    return trainer.model.to("cpu").eval()


def main(arguments=None):
    args = parse_arguments(arguments)
    # most last a moment
    logging.disable_progress_bar()
    disable_progress_bars()
    output, fine_tuned = Path(args.output), Path(args.output) / "fine-tuned"
    output.mkdir(parents=True, exist_ok=True)
    start = time.time()

    print(f"\n1. Load {args.model} with AutoModelForCausalLM and AutoProcessor")
    model, processor = load(args.model)
    total, active = model.config.num_parameters(), model.config.num_parameters(active=True)
    print(f"{total:,} parameters, of which a token meets {active:,}; experts: {model.config.num_experts}")

    print("\n2. Images to words and words to images, on drawings that no training image shows")
    rows = pick_rows(args.source, "test", args.images, args.seed)
    captions = show_both_ways(model, processor, rows, args, output / "contact_sheet.png")
    labeler = ImageLabeler(model, processor, CaptionForm(name_prompt=args.name_prompt, tag_prompt=args.tag_prompt))
    labeler.take_memory(memory_of(args.model), "--model")
    show_names(labeler, rows, args.source)
    show_search(labeler, pick_rows(args.source, "test", SEARCHED_IMAGES, args.seed), args.source, args.query)
    routed = [
        route_example(model, processor, image, caption)
        for image, caption in zip(rows[:ROUTED_IMAGES][args.source.kind.image], captions, strict=False)
    ]
    image = draw_routing(routed, model.config)
    atomic_write(output / "routing.png", lambda path: image.save(path, format="PNG"))
    print(f"wrote {output / 'routing.png'}")

    learnt, held_out = fine_tuning_rows(args)
    what = "images of makers that are new to it" if args.learns_new else "images that it knows, to show how"
    print(f"\n3. Fine-tune for {args.fine_tune_steps} steps with Trainer on {len(learnt)} {what}")
    if weights := model.config.modality_loss_weights:
        weighed = ", ".join(f"{modality} {weight:g} times" for modality, weight in weights.items())
        print(f"the training's loss counts {weighed}, and so lies above its parts; eval_loss counts all tokens once")
    print(
        "peak_load: tokens of the busiest expert over the experts' mean; uncovered, covered_twice: shares of tokens "
        "that no expert, and that several took"
    )
    rows = held_out.take(min(args.images, len(held_out)))
    before = caption_images(model, processor, open_images(rows, args.source))
    model = fine_tune(model, processor, args, learnt, held_out, fine_tuned)

    print("\n4. Save, reload, and caption others of these images, before and after")
    model.save_pretrained(fine_tuned)
    processor.save_pretrained(fine_tuned)
    del model, processor
    print(f"wrote {fine_tuned}")
    model, processor = load(fine_tuned)
    show_both_ways(model, processor, rows, args, output / "contact_sheet_fine_tuned.png", before)

    print(f"\nDone in {time.time() - start:.0f} s. Look at:")
    print(f"  {output / 'contact_sheet.png'}: real | reconstructed | drawn, with both captions")
    print(f"  {output / 'routing.png'}: which expert took which token")
    print(f"  {output / 'contact_sheet_fine_tuned.png'}: such a sheet after the fine-tuning")
    print(f"  {fine_tuned}: the fine-tuned model and its processor, for AutoModelForCausalLM and AutoProcessor")


if __name__ == "__main__":
    main()
