# SPDX-License-Identifier: Apache-2.0
"""Names, tags and search on the page, through the page's own server."""

import asyncio
import os

import httpx
import pytest
from PIL import Image

from helpers.captions import caption_model, caption_processor
from helpers.tiny import noise_images, tiny_model, tiny_processor


pytest.importorskip("gradio", reason="`pip install 'modeling-moma[demo]'` is missing")

import gradio as gr  # noqa: E402
from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

from modeling_moma.cli.main import main as moma  # noqa: E402
from modeling_moma.demo.page import build_page, open_page  # noqa: E402
from modeling_moma.demo.studio import DemoSession  # noqa: E402
from modeling_moma.labelling.folder import search_folder  # noqa: E402


@pytest.fixture(scope="module")
def icons(tmp_path_factory):
    """Five images, and a file that is none."""
    folder = tmp_path_factory.mktemp("icons")
    (folder / "sub").mkdir()
    for place, image in enumerate(noise_images(5)):
        image.save(folder / ("sub" if place > 2 else "") / f"{place}.png")
    (folder / "notes.txt").write_text("hello")
    return folder


@pytest.fixture(scope="module")
def studio(icons):
    processor = caption_processor()
    return DemoSession(caption_model(processor), processor, "tiny", library=str(icons))


@pytest.fixture(scope="module")
def client(studio, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        page = build_page(studio)
        yield Client(open_page(page, port=0), verbose=False, download_files=str(folder / "answers"))
        page.close()


def test_a_visitor_has_an_image_named_and_tagged(client, studio, icons):
    shown, tags = client.predict(handle_file(str(icons / "0.png")), api_name="/label")
    names, tagged = studio.label(noise_images(5)[0])
    found = [(entry["label"], entry["confidence"]) for entry in shown["confidences"]]
    assert found == [(guess.text, pytest.approx(guess.probability)) for guess in names] and found
    assert tags == ", ".join(guess.text for guess in tagged)


def test_a_visitor_finds_images_by_words_as_the_command_does(client, studio, icons):
    shown = client.predict("red apple", api_name="/find")
    expected = [found.file for found in search_folder(str(icons), ["red apple"], studio.labeler)]
    assert [entry["caption"] for entry in shown] == expected and len(expected) == 5


def test_requests_that_pass_by_the_queue_are_refused(client):
    answers = {
        name: httpx.post(f"{client.src}gradio_api/run/{name}", json={"data": ["cog"]}) for name in ("find", "draw")
    }
    assert all(answer.status_code in (401, 403, 404) for answer in answers.values()), answers


def test_an_image_that_is_gone_since_is_left_out(client, studio, icons):
    (icons / "1.png").rename(icons / "gone")
    try:
        assert len(client.predict("red apple", api_name="/find")) == 4
    finally:
        (icons / "gone").rename(icons / "1.png")


@pytest.mark.parametrize(
    ("words", "told"), [("", "no words yet"), ("  ", "no words yet"), ("a" * 2001, "more than 2000")]
)
def test_words_that_cannot_be_looked_for_are_told(client, words, told):
    with pytest.raises(AppError, match=told):
        client.predict(words, api_name="/find")


def test_an_upload_that_is_no_image_is_told(client, icons):
    with pytest.raises(AppError, match="not an image that can be read"):
        client.predict(handle_file(str(icons / "notes.txt")), api_name="/label")


def test_an_address_in_place_of_an_upload_is_not_fetched(studio):
    page = build_page(studio)
    for block in page.blocks.values():
        with pytest.raises(gr.Error, match="not uploaded"):
            asyncio.run(block.async_move_resource_to_block_cache("http://192.0.2.1/an.png"))
    page.close()


def test_an_address_in_a_request_is_told(client):
    with pytest.raises(AppError, match="not uploaded"):
        client.predict({"path": "http://192.0.2.1/an.png", "meta": {"_type": "gradio.FileData"}}, api_name="/label")


def test_found_images_are_sent_small(tmp_path):
    noise_images(1, 64)[0].resize((1500, 1000)).save(tmp_path / "large.png")
    processor = caption_processor()
    ((image, name),) = DemoSession(caption_model(processor), processor, "tiny", library=str(tmp_path)).find(
        "red apple"
    )
    assert name == "large.png" and image.size == (320, 213)


def test_images_and_names_that_a_page_cannot_take_are_found_all_the_same(tmp_path):
    (image,) = noise_images(1)
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg"), "wb") as file:
        image.convert("CMYK").save(file, format="jpeg")
    processor = caption_processor()
    found = DemoSession(caption_model(processor), processor, "tiny", library=str(tmp_path)).find("red apple")
    gallery = gr.Gallery(format="png")
    gallery.GRADIO_CACHE = str(tmp_path)
    (entry,) = gallery.postprocess(found).root
    assert entry.caption == r"caf\udce9.jpg" and entry.caption.encode()
    assert Image.open(entry.image.path).size == image.size


def test_words_to_draw_beside_the_images_are_no_news(tmp_path, capsys):
    noise_images(1)[0].save(tmp_path / "an.png")
    (tmp_path / "prompts.txt").write_text("house\n")
    processor = caption_processor()
    studio = DemoSession(caption_model(processor), processor, "tiny", library=str(tmp_path))
    assert studio.coded is not None and studio.coded.paths == ["an.png"]
    assert "prompts.txt" not in capsys.readouterr().err


def test_a_page_without_a_folder_has_no_search():
    processor = tiny_processor()
    studio = DemoSession(tiny_model(processor), processor, "tiny")
    names = {function.api_name for function in build_page(studio).fns.values()}
    assert "label" in names and not {"find", "find_on_enter"} & names
    with pytest.raises(ValueError, match="no folder of images"):
        studio.find("red apple")


def test_a_folder_without_images_is_one_line(tmp_path, capsys):
    processor = tiny_processor()
    tiny_model(processor).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "icons").mkdir()
    for folder, told in (("icons", "holds no files"), ("nowhere", "does not exist")):
        assert moma(["demo", str(tmp_path / "model"), "--search", str(tmp_path / folder)]) == 2
        said = capsys.readouterr().err
        assert told in said and "--search" in said and "FOLDER" not in said
    (tmp_path / "icons" / "notes.txt").write_text("hello")
    assert moma(["demo", str(tmp_path / "model"), "--search", str(tmp_path / "icons")]) == 2
    said = capsys.readouterr().err
    assert "--search" in said and "none of its 1 files is an image" in said and "FOLDER" not in said
