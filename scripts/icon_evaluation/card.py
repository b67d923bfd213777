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

_SEARCHES = {
    "model": "MoMa",
    "with_memory": "MoMa and memory",
    "with_file_names": "as `moma search` does",
    "bm25_names": "BM25, names",
    "bm25_names_and_tags": "BM25, names and tags",
    "bm25_neighbours": "BM25, neighbours' words",
    "chance": "chance",
}


def percent(share: float) -> str:
    """A share of 1, in hundredths."""
    return f"{100 * share:.1f} %"


def _shares(found: dict, names: Sequence[str]) -> list[str]:
    return [percent(found[name]) for name in names]


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


def _found(report: dict, kind: str, measures: dict[str, str]) -> str:
    """Names or tags that are right; `evaluation.json` has those of several views as well."""
    whose = {"model": "MoMa", "with_memory": "MoMa and memory", "nearest_neighbour": "ImageNet neighbour"}
    rows = [
        [f"`{split}`, {title}", *_shares(found[key], list(measures))]
        for split, found in _splits(report[kind])
        for key, title in whose.items()
        if key in found
    ]
    return markdown_table([kind, *measures.values()], rows)


def _search(report: dict) -> str:
    searches = {key: title for key, title in _SEARCHES.items() if key != "with_memory" or report["memory"]}
    rows = [[f"`{split}`", *_shares(found["unnamed"], list(searches))] for split, found in _splits(report["search"])]
    return markdown_table(["recall@10", *searches.values()], rows)


def _sampling(settings: dict) -> str:
    """The arguments of `generate` that drawings were sampled with."""
    return ", ".join(f"{name}={settings[name]}" for name in ("temperature", "top_k", "guidance_scale"))


def _drawings(report: dict) -> str:
    drawings = report["drawings"]
    typical = drawings.get("typical")
    by_seed = (typical or drawings)["by_seed"]
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
        if found:
            shown[f"drawn, {whose}, one"] = found["drawn"]
            shown[f"drawn, {whose}, the likeliest of all seeds"] = found["likeliest"]
    rows = [[title, *_shares(figures, ("top1", "top5"))] for title, figures in shown.items()]
    return f"{text}\n\n{markdown_table(['images', 'top-1', 'top-5'], rows)}"


BLOCKS = {
    "model": _model,
    "command": lambda report: f"```bash\n{report['command']}\n```",
    "names": lambda report: _found(
        report, "names", {"top1": "top-1", "top5": "top-5", "word_in_common": "a word in common"}
    ),
    "tags": lambda report: _found(report, "tags", {"recall": "recall", "precision": "precision"}),
    "search": _search,
    "drawings": _drawings,
}


def fill_card(card: str, report: dict) -> str:
    """The card with its blocks, and the values of its `model-index`, as the report has them."""
    _, head, body = card.split("---\n", 2)
    metadata = yaml.safe_load(head)
    drawings, names = report["drawings"], report["names"][MAIN]
    # the style that names are best told by
    drawn = drawings.get("typical", drawings)["drawn"]
    # what `moma label` does by default
    way = "with_memory" if report["memory"] else "model"
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
