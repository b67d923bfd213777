# SPDX-License-Identifier: Apache-2.0
"""See a MoMa at work: caption held-out images, draw from held-out captions, fine-tune, save, reload, and again."""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoProcessor, Trainer, TrainingArguments, set_seed

from emoji_recipe.captions import emoji_documents, label_caption
from emoji_recipe.routing_image import draw_routing, route_example
from emoji_recipe.sheet import SheetEntry, draw_contact_sheet
from modeling_moma import MomaMetricsCallback
from modeling_moma.cli.arguments import add_renamed
from modeling_moma.data.examples import HeldOutExamples
from modeling_moma.data.stream import DocumentExamples
from modeling_moma.utils.atomic_files import write_aside
from tokenization import MomaDataCollator


ROUTED_IMAGES = 3
FINE_TUNE_IMAGES = 320
EVALUATION_IMAGES = 32
CAPTION_TOKENS = 32
# as recommended by the card of the released model
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 0}


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="model_cards/moma-emoji", help="folder of a model and its processor")
    parser.add_argument("--data", default="data/emoji", help="folder of the data set")
    parser.add_argument("--output", default="quickstart", help="folder for the images and the fine-tuned model")
    add_renamed(parser, "--images", "--pictures", type=int, default=12, help="held-out images to caption and to draw")
    parser.add_argument("--guidance-scale", type=float, default=5.0, help="how closely a drawing follows its caption")
    parser.add_argument("--fine-tune-steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32, help="examples of a fine-tuning step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    for name in ("model", "data"):
        # a folder that is missing would be looked for on the Hub
        if not Path(getattr(args, name)).is_dir():
            parser.error(f"--{name}: there is no folder {getattr(args, name)!r}; run from the root of the repository.")
    return args


def load(folder):
    """Model in fp32, which CPUs run fastest, and processor."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)


def pick_rows(data, split: str, count: int, seed: int):
    """Random rows of a split, the same ones for a seed; other images are not even decoded."""
    rows = load_dataset(data, split=split)
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows.select(order[: min(count, len(rows))])


def caption_images(model, processor, images: list) -> list[str]:
    """The model's greedy caption of each image."""
    inputs = processor(images=images, text=[processor.image_token] * len(images), return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=CAPTION_TOKENS, do_sample=False, generation_mode="text")
    words = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [" ".join(caption.split()) for caption in words]


def draw_captions(model, processor, captions: list[str], guidance_scale: float, seed: int) -> list:
    """One sampled image for each caption."""
    inputs = processor(text=captions, padding=True, padding_side="left", return_tensors="pt")
    set_seed(seed)
    ids = model.generate(**inputs, generation_mode="image", guidance_scale=guidance_scale, **SAMPLING)
    return processor.post_process_multimodal_output(model.decode_image_tokens(ids), generation_mode="image")


def print_captions(captions: list[str], model_captions: list[str]):
    width = max(map(len, captions))
    print(f"  {'true caption':<{width}} | model's caption")
    for caption, model_caption in zip(captions, model_captions, strict=True):
        print(f"  {caption:<{width}} | {model_caption}")


def show_both_ways(model, processor, rows, args, sheet_path: Path) -> list[str]:
    """Captions the rows' images, draws from their captions, prints the first and saves all on one sheet."""
    images = [image.convert("RGB") for image in rows["image"]]
    captions = [label_caption(style, label) for style, label in zip(rows["style"], rows["label"], strict=True)]
    start = time.time()
    model_captions = caption_images(model, processor, images)
    print(f"{len(images)} held-out images captioned in {time.time() - start:.1f} s:")
    print_captions(captions, model_captions)
    start = time.time()
    drawn = draw_captions(model, processor, captions, args.guidance_scale, args.seed)
    print(f"{len(drawn)} images drawn from held-out captions in {time.time() - start:.1f} s")
    reconstructed = processor.decode_images(processor.encode_images(images))
    entries = map(SheetEntry, images, reconstructed, drawn, captions, model_captions)
    sheet = draw_contact_sheet(list(entries))
    write_aside(sheet_path, lambda path: sheet.save(path, format="PNG"))
    print(f"wrote {sheet_path}")
    return captions


def encode_rows(rows, processor):
    """Codes of the rows' images, one coding each, as the examples want them."""
    return rows.map(
        lambda batch: {"codes": [[codes] for codes in processor.encode_images(batch["image"])]},
        batched=True,
        batch_size=64,
        remove_columns=["image"],
        # the processor's weights are no part of the fingerprint
        load_from_cache_file=False,
        desc="images to codes",
    )


def fine_tune(model, processor, args, folder: Path):
    """A minute with the plain Trainer, to show the interface; it is too short to teach the model much."""
    train, validation = (
        emoji_documents(encode_rows(pick_rows(args.data, split, count, args.seed), processor).to_list(), processor)
        for split, count in (("train", FINE_TUNE_IMAGES), ("validation", EVALUATION_IMAGES))
    )
    training_arguments = TrainingArguments(
        output_dir=folder,
        max_steps=args.fine_tune_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=1e-4,
        weight_decay=0.1,
        use_cpu=not torch.cuda.is_available(),
        # torch warns where there is nothing to pin memory for
        dataloader_pin_memory=torch.cuda.is_available(),
        eval_strategy="steps",
        eval_steps=args.fine_tune_steps,
        eval_on_start=True,
        prediction_loss_only=True,
        logging_steps=10,
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
    # Trainer moves the model to the accelerator, if there is one
    return trainer.model.to("cpu").eval()


def main(arguments=None):
    args = parse_arguments(arguments)
    output, fine_tuned = Path(args.output), Path(args.output) / "fine-tuned"
    output.mkdir(parents=True, exist_ok=True)
    start = time.time()

    print(f"\n1. Load {args.model} with AutoModelForCausalLM and AutoProcessor")
    model, processor = load(args.model)
    total, active = model.config.num_parameters(), model.config.num_parameters(active=True)
    print(f"{total:,} parameters, of which a token meets {active:,}; experts: {model.config.num_experts}")

    print("\n2. Images to words and words to images, on drawings that no training image shows")
    rows = pick_rows(args.data, "test", args.images, args.seed)
    captions = show_both_ways(model, processor, rows, args, output / "contact_sheet.png")
    routed = [
        route_example(model, processor, image, caption)
        for image, caption in zip(rows[:ROUTED_IMAGES]["image"], captions, strict=False)
    ]
    image = draw_routing(routed, model.config)
    write_aside(output / "routing.png", lambda path: image.save(path, format="PNG"))
    print(f"wrote {output / 'routing.png'}")

    print(f"\n3. Fine-tune for {args.fine_tune_steps} steps with Trainer (to show how; so few steps teach little)")
    model = fine_tune(model, processor, args, fine_tuned)

    print("\n4. Save, reload, and the same once more")
    model.save_pretrained(fine_tuned)
    processor.save_pretrained(fine_tuned)
    del model, processor
    print(f"wrote {fine_tuned}")
    model, processor = load(fine_tuned)
    show_both_ways(model, processor, rows, args, output / "contact_sheet_fine_tuned.png")

    print(f"\nDone in {time.time() - start:.0f} s. Look at:")
    print(f"  {output / 'contact_sheet.png'}: real | reconstructed | drawn, with both captions")
    print(f"  {output / 'routing.png'}: which expert took which token")
    print(f"  {output / 'contact_sheet_fine_tuned.png'}: the same sheet after the fine-tuning")
    print(f"  {fine_tuned}: the fine-tuned model and its processor, for AutoModelForCausalLM and AutoProcessor")


if __name__ == "__main__":
    main()
