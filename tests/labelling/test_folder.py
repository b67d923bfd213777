# SPDX-License-Identifier: Apache-2.0
"""`moma label` and `moma search` on folders that hold more than images, and files that hostile people made."""

import base64
import csv
import gzip
import importlib.util
import json
import math
import os
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
from huggingface_hub import constants
from PIL import Image

from helpers.captions import IMAGES, caption_model, caption_processor
from helpers.tiny import noise_images, tiny_model, tiny_processor
from modeling_moma.cli import main as moma
from modeling_moma.data.images import SkippedRow
from modeling_moma.labelling import images as reading
from modeling_moma.labelling.folder import CodedFolder, Found, search_folder, write_table
from modeling_moma.labelling.images import SVG_SIDE, SvgRenderer, folder_files, read_files
from modeling_moma.labelling.labeler import ImageLabeler, open_labeler


SQUARE = '<svg xmlns="http://www.w3.org/2000/svg" {}><rect width="12" height="24" fill="red"/></svg>'
DEEP = 3000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    processor = tiny_processor()
    tiny_model(processor, initializer_range=0.3).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path):
    """Three images, six files that are none, and what is not read at all."""
    root = tmp_path / "icons"
    (root / "sub").mkdir(parents=True)
    (root / ".git").mkdir()
    for place, image in enumerate(noise_images(2)):
        image.save(root / f"{place}.png")
    (root / "sub" / "square.SVG").write_text(SQUARE.format('viewBox="0 0 24 24"'))
    (root / ".git" / "hidden.png").write_bytes((root / "0.png").read_bytes())
    (root / "notes.txt").write_text("hello")
    (root / "empty.png").touch()
    (root / "torn.png").write_bytes((root / "0.png").read_bytes()[:200])
    (root / "bad.svg").write_text("<svg>")
    os.mkfifo(root / "pipe.png")
    (root / "link.png").symlink_to("nowhere")
    return root


def moma_command(*arguments):
    return moma.main([str(argument) for argument in arguments])


def test_labels_are_written_and_what_is_no_image_is_told_in_a_line_each(folder, model, tmp_path, capfd):
    output = tmp_path / "labels.csv"
    assert moma_command("label", folder, "--model", model, "--names", 2, "--tags", 2, "--output", output) == 0
    told = [line for line in capfd.readouterr().err.splitlines() if "left out" in line]
    assert [line.partition(":")[0].strip() for line in told] == [
        *("bad.svg", "empty.png", "link.png", "notes.txt", "pipe.png", "torn.png")
    ]
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == ["0.png", "1.png", os.path.join("sub", "square.SVG")]
    assert rows[0].keys() == {"file", "name", "probability", "other_names", "tags"}


def test_what_is_blank_on_white_is_left_out_and_other_plain_images_are_not(model, tmp_path, capfd):
    for name, mode, colour in (
        ("white-on-nothing.png", "LA", (255, 128)),
        ("nothing.png", "RGBA", (0, 0, 0, 0)),
        ("white.png", "RGB", "white"),
        ("black.png", "RGB", "black"),
        ("grey.png", "L", 254),
    ):
        Image.new(mode, (20, 30), colour).save(tmp_path / name)
    (tmp_path / "white.svg").write_text(SQUARE.format('viewBox="0 0 24 24"').replace("red", "white"))
    assert moma.main(["label", str(tmp_path), "--model", model, "--output", str(tmp_path / "labels.json")]) == 0
    assert {entry["file"] for entry in json.loads((tmp_path / "labels.json").read_text())} == {"black.png", "grey.png"}
    told = [line for line in capfd.readouterr().err.splitlines() if "left out: image blank: white all over" in line]
    assert len(told) == 4


def test_an_image_that_a_model_names_nothing_is_told_so(folder, model, monkeypatch, capfd):
    monkeypatch.setattr(ImageLabeler, "names", lambda self, codes, most: [[] for _ in codes])
    assert moma_command("label", folder, "--model", model, "--tags", 0) == 0
    assert capfd.readouterr().out.splitlines()[:2] == ["0.png: no name found", "1.png: no name found"]


def test_a_second_run_with_the_table_in_the_folder_gives_the_same(folder, model, capfd):
    output = folder / "labels.json"
    written = []
    for _ in range(2):
        assert moma_command("label", folder, "--model", model, "--output", output) == 0
        written.append(output.read_text())
        assert "labels.json: left out" not in capfd.readouterr().err
    assert written[0] == written[1]
    assert [entry["file"] for entry in json.loads(written[0])][0] == "0.png"


@pytest.mark.parametrize(
    "mode, size",
    [("1", (1, 1)), ("L", (300, 7)), ("P", (16, 40)), ("RGBA", (1, 1)), ("CMYK", (300, 7)), ("I;16", (16, 40))],
)
def test_images_of_every_mode_and_shape_are_labelled(model, tmp_path, mode, size):
    (tmp_path / "icons").mkdir()
    # white where 0 is clear or no ink: then there would be nothing to see
    image = Image.new(mode, size, {"RGBA": (0, 0, 0, 255), "CMYK": (0, 255, 0, 0)}.get(mode, 0))
    image.save(tmp_path / "icons" / ("icon.tiff" if mode == "CMYK" else "icon.png"))
    output = tmp_path / "labels.json"
    assert moma_command("label", tmp_path / "icons", "--model", model, "--tags", 0, "--output", output) == 0
    (entry,) = json.loads(output.read_text())
    assert entry["tags"] == []


def test_names_of_files_that_are_no_text_and_links_in_circles(model, tmp_path, capfd):
    folder = tmp_path / "icons"
    folder.mkdir()
    (image,) = noise_images(1)
    names = [b"caf\xe9.png", b"line\nbreak.png", "Gr\u00fcn\u56fe.png".encode()]
    for name in names:
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            image.save(file, format="png")
    if importlib.util.find_spec("resvg_py"):
        svg = SQUARE.format('viewBox="0 0 24 24"').encode()
        for name, content in ((b"caf\xe9.svg", svg), (b"caf\xe9.svgz", gzip.compress(svg))):
            Path(os.fsdecode(os.path.join(os.fsencode(folder), name))).write_bytes(content)
            names.append(name)
    (folder / "circle.png").symlink_to("circle.png")
    for ending in ("csv", "json"):
        assert moma_command("label", folder, "--model", model, "--output", tmp_path / f"labels.{ending}") == 0
    told = [line for line in capfd.readouterr().err.splitlines() if "left out" in line]
    assert len(told) == 2 and all(line.strip().startswith("circle.png: left out: no file") for line in told)
    entries = json.loads((tmp_path / "labels.json").read_text())
    assert sorted(os.fsencode(entry["file"]) for entry in entries) == sorted(names)
    escaped = [name.decode("utf-8", "surrogateescape").replace("\udce9", "\\udce9") for name in names]
    with (tmp_path / "labels.csv").open(newline="", encoding="utf-8") as file:
        assert sorted(row["file"] for row in csv.DictReader(file)) == sorted(escaped)
    assert moma_command("search", folder, "red", "--model", model) == 0
    assert sorted(line.split()[-1] for line in capfd.readouterr().out.splitlines()) == sorted(
        name.replace("\n", "\\n") for name in escaped
    )


def test_a_search_ranks_every_image_for_every_query(folder, model, tmp_path, capfd):
    output = tmp_path / "found.json"
    assert moma_command("search", folder, "red", "castle", "--model", model, "--top", 2, "--output", output) == 0
    found = json.loads(output.read_text())
    places = [(query, rank) for query in ("red", "castle") for rank in (1, 2)]
    assert [(entry["query"], entry["rank"]) for entry in found] == places
    assert found[0]["score"] >= found[1]["score"]
    capfd.readouterr()
    assert moma_command("search", folder, "red", "--model", model) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].split() == [f"{found[0]['score']:.2f}", found[0]["file"]]


def test_a_second_search_codes_only_what_has_changed(folder, model, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    coded, encode, labeler = [], ImageLabeler.encode_pixels, open_labeler(model)
    monkeypatch.setattr(ImageLabeler, "encode_pixels", lambda *given: coded.append(len(given[1])) or encode(*given))

    def search():
        coded.clear()
        found = {entry.file: entry.score for entry in search_folder(str(folder), ["red"], labeler)}
        return sum(coded), found

    first = search()
    assert first[0] == 3 and search() == (0, first[1])
    (place,) = (path for path in (tmp_path / "assets").rglob("*") if path.is_file())
    # one changed, one removed, and one of known content added
    noise_images(3)[2].save(folder / "0.png")
    (folder / "again.png").write_bytes((folder / "1.png").read_bytes())
    (folder / "1.png").unlink()
    count, found = search()
    square = os.path.join("sub", "square.SVG")
    assert count == 1 and sorted(found) == ["0.png", "again.png", square] and found[square] == first[1][square]
    whole = place.read_bytes()
    for damaged in (whole[:-9], whole[:-1] + bytes([whole[-1] ^ 1])):
        place.write_bytes(damaged)
        assert search() == (3, pytest.approx(found)) and search()[0] == 0
    place.unlink()
    place.parent.rmdir()
    place.parent.touch()
    capfd.readouterr()
    assert search() == (3, pytest.approx(found))
    assert "not kept for the next search" in capfd.readouterr().err


def test_images_that_are_not_compared_with_a_query_fit_it_less(tmp_path, monkeypatch):
    processor = caption_processor()
    for place, image in enumerate(noise_images(IMAGES)):
        image.save(tmp_path / f"{place}.png")
    labeler = ImageLabeler(caption_model(processor), processor, batch_size=1)
    folder, queries = CodedFolder.read(str(tmp_path), labeler), ["house", "red apple"]
    scores_NQ = labeler.match(folder.codes, queries)
    assert (labeler.bounds(folder.states, queries) >= scores_NQ - 1e-4).all()
    compared, match = [], ImageLabeler.written_match
    monkeypatch.setattr(ImageLabeler, "written_match", lambda *given: compared.append(given) or match(*given))
    found = folder.search(queries, labeler, top=1)
    assert [entry.file for entry in found] == [folder.paths[place] for place in scores_NQ.argmax(0).tolist()]
    assert len(compared) < len(queries) * IMAGES


def test_a_query_that_is_too_long_is_named_before_an_image_is_read(folder, model, monkeypatch, capfd):
    monkeypatch.setattr(ImageLabeler, "pixel_values", None)
    assert moma_command("search", folder, "red", "long " * 5000, "--model", model) == 2
    assert "query 'long long" in capfd.readouterr().err


def test_queries_are_printed_as_one_line_each(folder, model, capfd):
    assert moma_command("search", folder, "red\x1b[31m", "castle\nwall", "--model", model, "--top", 1) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 4 and "\x1b" not in "".join(lines)


def test_a_search_finds_words_in_names_of_files(model, tmp_path, capfd):
    folder = tmp_path / "icons"
    folder.mkdir()
    (image,) = noise_images(1)
    for name in ("a.png", "b.png", "big-house.png"):
        image.save(folder / name)
    assert moma_command("search", folder, "house", "--model", model) == 0
    files = [line.split()[-1] for line in capfd.readouterr().out.splitlines()]
    # the same image in another row of a batch may differ in its last bit, so the other two have no order
    assert files[0] == "big-house.png" and sorted(files) == ["a.png", "b.png", "big-house.png"]
    alone = search_folder(str(folder), ["house"], open_labeler(model), file_name_share=0)
    assert [entry.score for entry in alone] == pytest.approx([alone[0].score] * 3)


def test_a_share_of_file_names_that_is_none_is_refused_before_the_work(model, tmp_path):
    with pytest.raises(ValueError, match="`file_name_share` is 1.5"):
        search_folder(str(tmp_path / "nowhere"), ["red"], open_labeler(model), file_name_share=1.5)


def test_a_score_of_minus_infinity_is_null_in_json(tmp_path):
    found = [Found("red", 1, "a.png", -0.5), Found("red", 2, "b.png", -math.inf)]
    path = write_table(str(tmp_path / "found.json"), found, [])
    entries = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert [entry["score"] for entry in entries] == [-0.5, None]


def test_more_images_than_a_piece_come_in_the_order_of_their_paths(folder, model, tmp_path, monkeypatch):
    outputs = [tmp_path / "one.csv", tmp_path / "two.csv"]
    for output, piece in zip(outputs, (256, 1)):
        monkeypatch.setattr("modeling_moma.labelling.folder.PIECE", piece)
        assert moma_command("label", folder, "--model", model, "--output", output) == 0
    one, two = ([row[:2] for row in csv.reader(output.read_text().splitlines())] for output in outputs)
    assert one == two


def test_subfolder_that_cannot_be_read_is_told_in_one_line(folder, model, monkeypatch, tmp_path, capfd):
    # whoever runs the tests, no system reads a path of more than 4,096 characters
    monkeypatch.chdir(folder)
    for _ in range(25):
        os.mkdir("d" * 200)
        os.chdir("d" * 200)
    os.chdir(folder)
    assert moma_command("label", folder, "--model", model, "--output", tmp_path / "labels.csv") == 0
    (told,) = [line for line in capfd.readouterr().err.splitlines() if "folder not read" in line]
    assert told.startswith("d" * 200) and "File name too long" in told
    assert len((tmp_path / "labels.csv").read_text().splitlines()) > 1


def test_a_link_to_a_folder_is_told_in_one_line(folder, model, tmp_path, capfd):
    (folder / "others").symlink_to(folder / "sub")
    (folder / "sub" / "around").symlink_to(folder)
    (folder / ".hidden").symlink_to(folder / "sub")
    assert moma_command("label", folder, "--model", model, "--output", tmp_path / "labels.csv") == 0
    told = [line.strip() for line in capfd.readouterr().err.splitlines() if "a link to a folder" in line]
    around = os.path.join("sub", "around")
    assert told == ["others: left out: a link to a folder", f"{around}: left out: a link to a folder"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["label", "{root}/nowhere"], "does not exist"),
        (["label", "{root}/empty"], "holds no files"),
        (["label", "{root}/texts"], "none of its 1 files is an image"),
        (["label", "{root}/texts/notes.txt"], "is a file"),
        (["label", "{root}/icons", "--output", "{root}/labels.xls"], "neither of .csv and .json"),
        (["label", "{root}/icons", "--output", "{root}/texts/notes.txt/a.csv"], "nothing can be written into"),
        (["label", "a" * 300], "File name too long"),
        (["label", "{root}/icons", "--output", "{root}/" + "a" * 240 + ".csv"], "is too long"),
        (["label", "{root}/icons", "--memory", ""], "--memory '': there is no such file"),
        (["search", "{root}/icons", " "], "there are no words in it"),
        (["search", "{root}/icons", "red \udcff"], "is no text in UTF-8 (character 4)"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(folder, model, capfd, arguments, said):
    root = folder.parent
    for name in ("empty", "texts"):
        (root / name).mkdir()
    (root / "texts" / "notes.txt").write_text("hello")
    assert moma_command(*(argument.format(root=root) for argument in arguments), "--model", model) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert said in line


@pytest.mark.parametrize("option, least, most", [("--names", 1, 100), ("--tags", 0, 100), ("--views", 1, 9)])
def test_too_many_names_tags_or_views_are_refused_before_a_model_is_read(capfd, option, least, most):
    with pytest.raises(SystemExit):
        moma_command("label", "icons", "--model", "none", option, most + 1)
    assert f"{option} = '{most + 1}' must be between {least} and {most}" in capfd.readouterr().err


def test_views_of_a_folder_are_those_of_the_labeler(folder, model, tmp_path):
    output, labeler = tmp_path / "found.json", open_labeler(model, views=2)
    arguments = ("--model", model, "--views", 2, "--file-name-share", 0, "--output", output)
    assert moma_command("search", folder, "house", *arguments) == 0
    found = {entry["file"]: entry["score"] for entry in json.loads(output.read_text())}
    with Image.open(folder / "0.png") as image:
        assert found["0.png"] == pytest.approx(labeler.match(labeler.encode([image]), ["house"]).item(), abs=1e-4)


@pytest.mark.parametrize(
    "view, size",
    [('viewBox="0 0 24 24"', (256, 256)), ('viewBox="0 0 24 12"', (256, 128)), ('viewBox="0 0 1 9999999"', (1, 256))],
)
def test_an_svg_is_rendered_to_the_same_longer_side_whatever_it_asks_for(tmp_path, view, size):
    (tmp_path / "icon.svg").write_text(SQUARE.format(view))
    ((_, image),) = read_files(folder_files(tmp_path))
    assert isinstance(image, Image.Image) and image.size == size and max(size) == SVG_SIDE


@pytest.mark.parametrize(
    "head, encoding", [("", "utf-16"), ('<?xml version="1.0" encoding="ISO-8859-1"?><!-- \u00e9 -->', "latin-1")]
)
def test_an_svg_is_read_in_its_own_encoding(tmp_path, head, encoding):
    text = SQUARE.format('viewBox="0 0 24 24"')
    (tmp_path / "icon.svg").write_text(head + text, encoding=encoding)
    (tmp_path / "plain.svg").write_text(text)
    (tmp_path / "wrong.svg").write_text(f"<!-- \u00e9 -->{text}", encoding="latin-1")
    found = {file.name: image for file, image in read_files(folder_files(tmp_path))}
    assert found["icon.svg"].tobytes() == found["plain.svg"].tobytes()
    assert str(found["wrong.svg"]) == "SVG not rendered: its text is not in UTF-8, as it should be"


def test_an_svg_shows_no_other_file(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "secret.png")
    os.mkfifo(tmp_path / "pipe.png")
    folder = tmp_path / "icons"
    folder.mkdir()
    monkeypatch.chdir(folder)
    square = SQUARE.format('viewBox="0 0 24 24"')
    (folder / "plain.svg").write_text(square)
    encoded = base64.b64encode((tmp_path / "secret.png").read_bytes()).decode()
    for name, address in {
        "absolute": tmp_path / "secret.png",
        "beside": "../secret.png",
        "pipe": tmp_path / "pipe.png",
        "inside": f"data:image/png;base64,{encoded}",
    }.items():
        image = f'<image href="{address}" width="24" height="24"/>'
        (folder / f"{name}.svg").write_text(square.replace("</svg>", f"{image}</svg>"))
    found = {file.name: image for file, image in read_files(folder_files(folder))}
    plain = found.pop("plain.svg")
    # what it brings along is a part of it
    assert found.pop("inside.svg").getpixel((200, 128))[:3] == (255, 0, 0)
    assert len(found) == 3
    for name, image in found.items():
        assert image.tobytes() == plain.tobytes(), name


def test_an_svg_that_ends_the_renderer_is_left_out_and_the_next_one_is_rendered(tmp_path):
    inner = '<g opacity="0.5">' * DEEP + '<path d="M0 0h9"/>' + "</g>" * DEEP
    for name, text in (("a", ""), ("deep", inner), ("z", "")):
        (tmp_path / f"{name}.svg").write_text(SQUARE.format('viewBox="0 0 9 9"').replace("</svg>", f"{text}</svg>"))
    found = {file.name: image for file, image in read_files(folder_files(tmp_path))}
    assert isinstance(found["deep.svg"], SkippedRow) and "not rendered" in str(found["deep.svg"])
    assert all(isinstance(found[name], Image.Image) for name in ("a.svg", "z.svg"))


def test_an_svg_that_takes_too_long_is_given_up(tmp_path, monkeypatch):
    (tmp_path / "icon.svg").write_text(SQUARE.format('viewBox="0 0 24 24"'))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with closing(SvgRenderer()) as renderer:
        monkeypatch.setattr(renderer, "_process", subprocess.Popen(["sleep", "60"], **pipes))
        with pytest.raises(SkippedRow, match="takes too long"):
            renderer.render(tmp_path / "icon.svg", seconds=0.1)
        monkeypatch.undo()
        assert renderer.render(tmp_path / "icon.svg").startswith(b"\x89PNG")


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LARGEST_FILE", 10)
    (tmp_path / "icon.png").write_bytes(b"x" * 11)
    ((_, found),) = read_files(folder_files(tmp_path))
    assert isinstance(found, SkippedRow) and found.reason == "file too large"


def test_an_image_of_too_many_pixels_is_told_so_and_a_large_one_brings_no_warning(tmp_path, monkeypatch, recwarn):
    # Pillow warns above this, and refuses twice as many
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for side in (40, 50):
        Image.new("1", (side, side)).save(tmp_path / f"{side}.png")
    (_, large), (_, too_large) = read_files(folder_files(tmp_path))
    assert isinstance(large, Image.Image) and not len(recwarn)
    assert too_large.reason == "image too large" and "the file is too large (" in str(too_large)


def test_without_a_renderer_an_svg_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(reading.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "icon.svg").write_text(SQUARE.format('viewBox="0 0 24 24"'))
    ((_, found),) = read_files(folder_files(tmp_path))
    assert isinstance(found, SkippedRow) and "modeling-moma[icons]" in str(found)
