# SPDX-License-Identifier: Apache-2.0
"""Fills the blocks of a model card from the report of scripts/evaluate_icons.py: every number in them is measured."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import yaml

from cards import replace_block
from icon_evaluation.samples import MAIN
from icon_evaluation.typical import STYLE
from modeling_moma.errors_moma import InputError
from modeling_moma.utils.atomic_files import atomic_write
from modeling_moma.utils.messages import markdown_table


EVALUATION_FILE, SHEET_FILE = "evaluation.json", "samples.png"
# whose text is taken where a folder has no card of its own
RELEASED = Path(__file__).resolve().parents[2] / "model_cards" / "moma-icons" / "README.md"
# smallest values that the released model shall reach
AIM_INFORMATION, AIM_RECONSTRUCTIONS, AIM_ORIGINALS, AIM_TOP5 = 0.8, 0.7, 0.5, 0.4
# icons whose names are shown
SHOWN = 8

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
}
_TOPS = ("top1", "top5")


def percent(share: float) -> str:
    """A share of 1, in hundredths."""
    return f"{100 * share:.1f} %"


def _cells(texts: Sequence[str]) -> str:
    """Texts of any kind in one cell of a table."""
    return ", ".join(" ".join(text.replace("|", "\\|").split()) for text in texts) or "-"


def _shares(found: dict, names: Sequence[str]) -> list[str]:
    return [percent(found[name]) for name in names]


def _whose(found: dict) -> list[tuple[str, dict]]:
    """Whose names or tags were measured, and the figures; `evaluation.json` has those of several views as well."""
    titles = {"model": "MoMa", "with_memory": "MoMa and memory", "nearest_neighbour": "ImageNet neighbour"}
    return [(title, found[key]) for key, title in titles.items() if key in found]


def _model(report: dict) -> str:
    model, memory, quality = report["model"], report["memory"], report["tokenizer"]
    groups = ", ".join(f"{count} {group}" for group, count in model["num_experts"].items())
    lines = [
        f"- {model['parameters'] / 1e6:.1f}M parameters, {model['active_parameters'] / 1e6:.1f}M of them active for a "
        f"token; {groups} experts in each of {model['num_hidden_layers']} layers, and a shared expert beside them.",
        f"- Image tokenizer: {report['resolution']} pixels a side to {report['image_seq_length']} codes; "
        f"{quality['psnr']:.1f} dB PSNR on icons of `{MAIN}`; {quality['codes_used']:,} of "
        f"{quality['codebook_size']:,} codes used there, perplexity {quality['perplexity']:.0f}.",
    ]
    if memory:
        lines.append(
            f"- Memory: {memory['images']:,} training icons of {memory['names']:,} names and the tags of "
            f"{memory['tagged_names']:,}, {memory['bytes'] / 1e6:.1f} MB. It counts for {100 * memory['share']:.0f} %."
        )
    return "\n".join(lines)


def _splits(found: dict) -> list[tuple[str, dict]]:
    """What was measured on each split but `validation`, by which the training was chosen."""
    return [(split, figures) for split, figures in found.items() if split != "validation" and figures]


def _names(report: dict) -> str:
    measures = ("top1", "top5", "word_in_common")
    rows = [
        [f"`{split}`, {title}", *_shares(figures, measures)]
        for split, found in _splits(report["names"])
        for title, figures in _whose(found)
    ]
    return markdown_table(["names", "top-1", "top-5", "a word in common"], rows)


def _samples(report: dict) -> str:
    rows = [
        [f"`{sample['icon']}`", *map(_cells, (sample["names"], sample["neighbour"]))]
        for sample in report["names"][MAIN]["samples"][:SHOWN]
    ]
    return markdown_table(["icon", "names by the model", "neighbour's name"], rows)


def _emoji(report: dict) -> str:
    found = report["emoji"]
    if found is None:
        return "Not measured."
    own = {"model": "this model", "with_memory": "this model and its memory"}
    rows = [[title, *_shares(found[key], _TOPS)] for key, title in own.items() if key in found]
    titles = {"moma-emoji": "`moma-emoji`, greedy", "nearest_neighbour": "ImageNet neighbour"}
    rows += [[title, percent(found[key]), "-"] for key, title in titles.items() if key in found]
    return markdown_table(["names of emoji", "top-1", "top-5"], rows)


def _tags(report: dict) -> str:
    rows = [
        [f"`{split}`, {title}", *_shares(figures, ("recall", "precision"))]
        for split, found in _splits(report["tags"])
        for title, figures in _whose(found)
    ]
    return markdown_table(["tags", "recall", "precision"], rows)


def _search(report: dict) -> str:
    searches = {key: title for key, title in _SEARCHES.items() if key != "with_memory" or report["memory"]}
    rows = [[f"`{split}`", *_shares(found["unnamed"], list(searches))] for split, found in _splits(report["search"])]
    return markdown_table(["recall@10", *searches.values()], rows)


def _sampling(settings: dict) -> str:
    """The arguments of `generate` that drawings were sampled with."""
    return ", ".join(f"{name}={settings[name]}" for name in ("temperature", "top_k", "guidance_scale"))


def _best_drawings(report: dict) -> dict:
    """What was judged of the drawings that names are best told by."""
    return report["drawings"].get("typical", report["drawings"])


def _drawings(report: dict) -> str:
    drawings, best = report["drawings"], _best_drawings(report)
    by_seed, typical = best["by_seed"], drawings.get("typical")
    spread = f", ± {100 * stdev(by_seed):.1f} points between them" if len(by_seed) > 1 else ""
    text = (
        f"{drawings['captions']} captions of `{MAIN}`, {len(by_seed)} seeds; in a maker's style with colour and "
        f"{_sampling(drawings['settings'])}. The judge knows the {drawings['names']} most frequent names by "
        f"{drawings['train_images']:,} training icons. Of single drawings it finds {percent(fmean(by_seed))} right, "
        f"in the mean of seeds{spread}."
    )
    if typical:
        known = typical["known"]
        drawn, held_out = known["drawn"], known["reconstructions"]
        text += (
            f"\n\nIn the style `{STYLE}`, in black, drawings are sampled with {_sampling(typical['settings'])}. "
            f"{percent(drawn['of_their_name'])} of them are nearly one of the {known['icons']:,} icons of "
            f"`scripts/build_typical_icons.py` with that name, {percent(drawn['any'])} nearly any; of "
            "the held-out icons' reconstructions, in black, "
            f"{percent(held_out['of_their_name'])} and {percent(held_out['any'])} are."
        )
    shown = {"held-out icons": drawings["originals"], "their reconstructions": drawings["reconstructions"]}
    for whose, found in ((STYLE, typical), ("in its maker's style", drawings)):
        shown |= {f"drawn, {whose}, {title}": found[key] for key, title in _DRAWINGS.items() if found}
    rows = [[title, *_shares(figures, _TOPS)] for title, figures in shown.items()]
    return f"{text}\n\n{markdown_table(['images', 'top-1', 'top-5'], rows)}"


def _best_way(report: dict) -> str:
    """The key of what `moma label` does by default."""
    return "with_memory" if report["memory"] else "model"


def _aims(report: dict) -> str:
    information, drawings = report["information"]["plain"]["model"], _best_drawings(report)
    names, search = report["names"][MAIN], report["search"][MAIN]["unnamed"]
    image, of_caption = information["image"]["taken"], information["caption"]["taken"]
    aims = [
        (
            f"images take from captions at least {AIM_INFORMATION:g} of what captions take from images",
            f"{image:.2f} of {of_caption:.2f} nats",
            image >= AIM_INFORMATION * of_caption > 0,
        )
    ]
    drawn = drawings["drawn"]["top1"]
    for name, aim in (("reconstructions", AIM_RECONSTRUCTIONS), ("originals", AIM_ORIGINALS)):
        ceiling = drawings[name]["top1"]
        measured = f"{percent(drawn)} of {percent(ceiling)}"
        aims.append((f"drawings, judged: at least {aim:g} of the {name}'", measured, drawn >= aim * ceiling > 0))
    top5, other = names[f"{_best_way(report)}_of_views"]["top5"], names["nearest_neighbour"]["top5"]
    by_views = f"names by {report['views']} views, top-5"
    aims.append((f"{by_views}: at least {100 * AIM_TOP5:.0f} %", percent(top5), top5 >= AIM_TOP5))
    against = f"{percent(top5)} against {percent(other)}"
    aims.append((f"{by_views}: above the ImageNet neighbour's", against, top5 > other))
    # names alone find none of these, so that tags are the harder lexical search
    for key in ("bm25_names", "bm25_names_and_tags"):
        share, other = search["with_file_names"], search[key]
        aim = f"search as `moma search` does, tags not in the names: above {_SEARCHES[key]}"
        aims.append((aim, f"{percent(share)} against {percent(other)}", share > other))
    rows = [[aim, measured, "yes" if reached else "no"] for aim, measured, reached in aims]
    return markdown_table(["aim", "measured", "reached"], rows)


BLOCKS = {
    "model": _model,
    "command": lambda report: f"```bash\n{report['command']}\n```",
    "aims": _aims,
    "names": _names,
    "samples": _samples,
    "emoji": _emoji,
    "tags": _tags,
    "search": _search,
    "drawings": _drawings,
}


def fill_card(card: str, report: dict) -> str:
    """The card with its blocks, and the values of its `model-index`, as the report has them."""
    _, head, body = card.split("---\n", 2)
    metadata = yaml.safe_load(head)
    names, drawn, way = report["names"][MAIN], _best_drawings(report)["drawn"], _best_way(report)
    measured = {
        "name, top-1": names[way]["top1"],
        "name, top-5": names[way]["top5"],
        "name, top-5, 5 views": names[f"{way}_of_views"]["top5"],
        "makers' tags among the first 8": report["tags"][MAIN][way]["recall"],
        "recall@10 of tags not in the names": report["search"][MAIN]["unnamed"]["with_file_names"],
        "top-1 accuracy": drawn["top1"],
        "top-5 accuracy": drawn["top5"],
    }
    for result in metadata["model-index"][0]["results"]:
        for metric in result["metrics"]:
            metric["value"] = round(measured[metric["name"]], 4)
    for name, block in BLOCKS.items():
        body = replace_block(body, block(report), name)
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n{body}"


def write_card(folder: Path, report: dict) -> None:
    """Fills `README.md` beside a released model, by default that of moma-icons."""
    card = folder / "README.md"
    try:
        text = fill_card((card if card.exists() else RELEASED).read_text(), report)
    except ValueError as error:
        raise InputError(f"--write-card: {card}: {error}") from error
    atomic_write(card, lambda path: path.write_text(text))
