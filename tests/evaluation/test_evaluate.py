# SPDX-License-Identifier: Apache-2.0
"""Which measures are taken on which source, their tables, and the command from end to end."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.tiny import tiny_model, tiny_processor, write_tokens
from modeling_moma.cli.evaluate import main
from modeling_moma.data.encoding import DocumentEncoder
from modeling_moma.evaluation.evaluate import MEASURES, MeasureSettings, measure_sources
from modeling_moma.evaluation.held_out import CaptionedImages, HeldOutSource
from modeling_moma.evaluation.losses import EXPERT_CHOICE
from modeling_moma.evaluation.report import report_tables


@pytest.fixture(scope="module")
def sources():
    """A source of nine captioned images, and one of texts."""
    processor = tiny_processor()
    codes = torch.randint(0, 32, (9, 16), generator=torch.Generator().manual_seed(0))
    captions = [f"noto: {word}" for word in "red green apple castle fruit flat fluent tags noto".split()]
    documents = [
        {"input_ids": DocumentEncoder(processor).caption(text, image, True)} for text, image in zip(captions, codes)
    ]
    words = [processor.tokenizer(f"{text}<eos>", add_special_tokens=False)["input_ids"] for text in captions]
    return processor, {
        "emoji": HeldOutSource(documents, CaptionedImages(codes, captions)),
        "gloss": HeldOutSource([{"input_ids": [1, *ids]} for ids in words]),
    }


def test_each_source_has_the_measures_that_it_allows(sources):
    processor, sources = sources
    model = tiny_model(processor)
    found = measure_sources(model, processor, sources, MeasureSettings(("losses", "retrieval"), batch_size=4))
    assert set(found["emoji"]) == {"documents", "images", "losses", "retrieval", "seconds"}
    assert set(found["gloss"]) == {"documents", "images", "losses", "seconds"}
    assert (found["emoji"]["images"], found["gloss"]["images"]) == (9, 0)
    assert set(found["emoji"]["seconds"]) == {"losses", "retrieval"}
    # what is asked for by default is no error where it cannot be had
    texts = measure_sources(model, processor, {"gloss": sources["gloss"]}, MeasureSettings())
    assert "losses" in texts["gloss"] and "captions" not in texts["gloss"]
    by_default = measure_sources(model, processor, {"emoji": sources["emoji"]}, MeasureSettings())["emoji"]
    assert "captions" in by_default and "retrieval" not in by_default
    json.dumps(found)


def test_tables_have_a_row_for_each_source_and_columns_that_line_up(sources):
    processor, sources = sources
    found = measure_sources(tiny_model(processor), processor, sources, MeasureSettings(MEASURES[:4], batch_size=4))
    tables = report_tables(found).split("\n\n")
    assert len(tables) == 4
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    losses, captions, _, retrieval = (
        {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in table.splitlines()}
        for table in tables
    )
    causal = found["emoji"]["losses"]["causal"]
    assert losses["emoji, causal"][0] == f"{causal['overall']:.4f}"
    assert losses["emoji, causal"][5] == f"{causal['bits_per_code']['image']:.3f}"
    # texts have no codes
    assert losses["gloss, causal"][4:6] == ["-", "-"]
    assert f"emoji, {EXPERT_CHOICE}" in losses
    assert captions["emoji"][-1] == "9" and "gloss" not in captions
    assert retrieval["emoji: captions, chance"][:2] == ["11.1 %", "55.6 %"]


def test_wishes_that_cannot_be_met_are_refused_before_anything_is_measured(sources, monkeypatch):
    processor, sources = sources
    model = tiny_model(processor)
    for measure in MEASURES[1:]:
        with pytest.raises(ValueError, match=f"--measures {measure}. needs images with captions, but none of gloss"):
            measure_sources(model, processor, {"gloss": sources["gloss"]}, MeasureSettings(("losses", measure)))
    for measures in ((), ("losses", "beauty")):
        with pytest.raises(ValueError, match="measures"):
            MeasureSettings(measures)
    with pytest.raises(ValueError, match="batch_size"):
        MeasureSettings(batch_size=0)
    with pytest.raises(ValueError, match="retrieval_pairs` = 1"):
        MeasureSettings(retrieval_pairs=1)
    rows = sources["emoji"].captioned
    one = HeldOutSource([], CaptionedImages(rows.codes[:1], rows.captions[:1]))
    # the losses, for which there is no document, would come first
    with pytest.raises(ValueError, match="retrieval: the source 'one' has 1 captioned images"):
        measure_sources(model, processor, {"one": one}, MeasureSettings(("losses", "retrieval")))
    wordless = HeldOutSource([], CaptionedImages(rows.codes[:3], ["apple", " ", ""]))
    with pytest.raises(ValueError, match="information: the source 'wordless' has 1 images with words"):
        measure_sources(model, processor, {"wordless": wordless}, MeasureSettings(("losses", "information")))
    few = HeldOutSource([], CaptionedImages(rows.codes[:7], rows.captions[:7]))
    # of a package that is not there
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match="extra `train`"):
        measure_sources(model, processor, {"few": few}, MeasureSettings(("losses", "drawings")))


def test_figures_that_are_no_numbers_are_null_in_the_file(folder, tmp_path, capsys, processor):
    processor.save_pretrained(tmp_path / "model")
    model = tiny_model(processor)
    # finite, but no logit of them is
    torch.nn.init.constant_(model.lm_head.weight, torch.finfo(torch.float32).max)
    model.save_pretrained(tmp_path / "model")
    given = ["--model", tmp_path / "model", "--tokens", folder / "tokens", "--measures", "losses"]
    main([*map(str, given), "--output", str(tmp_path / "report.json")])
    assert "nan" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    losses = report["sources"]["emoji"]["losses"]["causal"]
    assert losses["overall"] is losses["perplexity"] is losses["bits_per_code"]["image"] is None
    assert losses["targets"]["overall"] > 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with its processor, and codes."""
    folder = tmp_path_factory.mktemp("evaluate")
    processor = tiny_processor()
    processor.save_pretrained(folder / "model")
    tiny_model(processor, num_experts={"text": 2, "image": 2}).save_pretrained(folder / "model")
    write_tokens(folder / "tokens", processor, train=4, test=10)
    return folder


def arguments(folder, *more):
    return ["--model", str(folder / "model"), "--tokens", str(folder / "tokens"), "--batch-size", "4", *more]


def test_the_command_writes_and_prints_every_measure(folder, tmp_path, capsys):
    pytest.importorskip("efficientnet_lite_pytorch", reason="the extra `train` is not installed")
    sampling = ["--set", "sampling.temperature=0.7", "sampling.top_k=5", "sampling.guidance_scale=2"]
    output = ["--measures", *MEASURES, "--retrieval-pairs", "5", *sampling, "--output", str(tmp_path / "report.json")]
    main(arguments(folder, *output))
    report = json.loads((tmp_path / "report.json").read_text())
    codes = report["sources"]["emoji"]
    assert report["arguments"]["split"] == "test" and report["arguments"]["top_k"] == 5
    assert (codes["documents"], codes["images"], codes["retrieval"]["pairs"]) == (20, 10, 5)
    assert set(codes["seconds"]) == set(MEASURES)
    drawn = {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 1.0, "guidance_scale": 2.0}
    assert codes["drawings"]["sampling"] == drawn
    printed = capsys.readouterr().out
    assert report_tables(report["sources"]) in printed
    assert "emoji (real: reconstructions): drawn" in printed


def test_the_command_measures_losses_and_captions_by_default(folder, tmp_path):
    main(arguments(folder, "--limit", "3", "--output", str(tmp_path / "report.json")))
    codes = json.loads((tmp_path / "report.json").read_text())["sources"]["emoji"]
    assert (codes["documents"], codes["images"], list(codes["seconds"])) == (6, 3, ["losses", "captions"])


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (("--split", "validation"), r"--split 'validation': no source of .* has it, only .'test', 'train'."),
        (("--sources", "icons"), r"--sources 'icons'"),
    ],
)
def test_data_that_is_not_there_is_named(folder, more, error):
    with pytest.raises(ValueError, match=error):
        main(arguments(folder, *more))


@pytest.mark.parametrize(
    "file, what",
    [("model.safetensors", ""), ("vq_model/model.safetensors", ", image tokenizer")],
    ids=["model", "codes"],
)
def test_weights_of_a_training_that_has_diverged_are_not_measured(folder, tmp_path, file, what):
    shutil.copytree(folder / "model", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / file)
    name = min(name for name in tensors if tensors[name].is_floating_point())
    tensors[name].view(-1)[0] = math.nan
    save_file(tensors, tmp_path / "model" / file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"`--model` '.*'{what}: the tensor '{name}' holds NaN or infinite values"):
        main(arguments(folder, "--model", str(tmp_path / "model")))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--measures drawings --set sampling.temperature=1e308", "sampling.temperature = '1e308' must be"),
        ("--set sampling.guidance_scale=-2", "sampling.guidance_scale = '-2' must be"),
        ("--set sampling.top_k=-1", "sampling.top_k = '-1' must be"),
        ("--set sampling.top_p=1.5", "sampling.top_p = '1.5' must be"),
        ("--retrieval-pairs 1", "--retrieval-pairs = '1' must be"),
        ("--limit 0", "--limit = '0' must be at least 1"),
        ("--measures beauty", "drawings"),
        ("--measures drawings --set sampling.temperature=1e-320", "sampling.temperature = 1e-320: it is below"),
        ("--measures drawings --set sampling.temperature=0 sampling.top_k=5", "top_k = 5: nothing is sampled here"),
        ("--measures losses --set sampling.guidance_scale=7", "guidance_scale: it is read by `--measures drawings`"),
        ("--measures losses --retrieval-pairs 2", "--retrieval-pairs: it is read by `--measures retrieval` alone"),
        ("--output=", "--output '': it names no file"),
    ],
)
def test_flags_that_would_fail_or_change_nothing_are_refused_first(folder, more, message, capsys):
    with pytest.raises((SystemExit, ValueError)) as refused:
        main(arguments(folder, *more.split()))
    assert message in f"{refused.value}{capsys.readouterr().err}"


def test_temperature_zero_draws_the_likeliest_codes(folder, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch", reason="the extra `train` is not installed")
    output = ["--measures", "drawings", "--set", "sampling.temperature=0", "--output", str(tmp_path / "report.json")]
    main(arguments(folder, *output))
    drawings = json.loads((tmp_path / "report.json").read_text())["sources"]["emoji"]["drawings"]
    assert drawings["sampling"] == {"do_sample": False, "guidance_scale": 1.0}


def test_images_are_drawn_as_the_model_has_it_where_no_flag_says_how(folder, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch", reason="the extra `train` is not installed")
    copied = Path(shutil.copytree(folder / "model", tmp_path / "model"))
    settings = json.loads((copied / "generation_config.json").read_text())
    own = {"do_sample": True, "temperature": 0.5, "top_k": 4}
    settings |= {"image_sampling": own, "_from_model_config": False}
    (copied / "generation_config.json").write_text(json.dumps(settings))
    sampling = {}
    for flags in ((), ("--set", "sampling.top_p=0.9")):
        output = ["--measures", "drawings", "--output", str(tmp_path / "report.json"), *flags]
        main(["--model", str(copied), *arguments(folder, *output)[2:]])
        report = json.loads((tmp_path / "report.json").read_text())
        sampling[flags] = report["sources"]["emoji"]["drawings"]["sampling"]
    by_flags = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.9, "guidance_scale": 1.0}
    assert list(sampling.values()) == [own, by_flags]


def test_output_that_cannot_be_written_is_refused_before_anything_is_read(folder, tmp_path):
    (tmp_path / "file").write_text("")
    for output, why in ((tmp_path / "file" / "report.json", "nothing can be written into"), (tmp_path, "is a folder")):
        with pytest.raises(ValueError, match=f"--output: .*{why}"):
            main(["--model", str(tmp_path / "none"), "--tokens", str(folder / "tokens"), "--output", str(output)])
