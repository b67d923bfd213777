# SPDX-License-Identifier: Apache-2.0
"""The page without a browser: its own server, uploads, examples, messages, the command, and pages of every model."""

import base64
import io
import os
import socket
import wave

import httpx
import numpy as np
import pytest
from PIL import Image

from helpers.captions import caption_model, caption_processor
from helpers.sounds import RATE, THREE, as_file, processor_of_sounds, tone
from helpers.tiny import noise_images, tiny_model, tiny_processor
from modeling_moma.cli.demo import parse_arguments
from modeling_moma.cli.main import main as moma


gr = pytest.importorskip("gradio", reason="`pip install 'modeling-moma[demo]'` is missing")

from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

from modeling_moma.demo.page import (  # noqa: E402
    LEAST_SIDE,
    Examples,
    as_html,
    as_sound,
    build_page,
    enlarged,
    open_page,
    read_image,
    read_sound_upload,
)
from modeling_moma.demo.studio import DemoSession, load_studio  # noqa: E402
from modeling_moma.labelling.folder import search_folder  # noqa: E402


TABS = ["Caption", "Names", "Draw", "Interleaved", "Routing"]


@pytest.fixture(scope="module", autouse=True)
def uploads(tmp_path_factory):
    """The folder of what visitors upload."""
    folder = tmp_path_factory.mktemp("page") / "uploads"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        yield folder


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
def hearing_studio():
    processor = processor_of_sounds()
    return DemoSession(tiny_model(processor, **THREE), processor, "tiny")


def visit(studio, answers):
    page = build_page(studio)
    yield Client(open_page(page, port=0), verbose=False, download_files=str(answers))
    page.close()


@pytest.fixture(scope="module")
def client(studio, tmp_path_factory):
    yield from visit(studio, tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def hearing_client(hearing_studio, tmp_path_factory):
    yield from visit(hearing_studio, tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def functions(studio):
    """What the page calls, by name."""
    page = build_page(studio)
    yield {function.api_name: function.fn for function in page.fns.values()}
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
    # one that is gone since is left out
    (icons / "1.png").rename(icons / "gone")
    try:
        assert len(client.predict("red apple", api_name="/find")) == 4
    finally:
        (icons / "gone").rename(icons / "1.png")


@pytest.mark.parametrize("name", ["find", "draw"])
def test_requests_that_pass_by_the_queue_are_refused(client, name):
    answer = httpx.post(f"{client.src}gradio_api/run/{name}", json={"data": ["cog"]})
    assert answer.status_code in (401, 403, 404)


def test_an_upload_that_is_no_image_is_told(client, icons):
    with pytest.raises(AppError, match="not an image that can be read"):
        client.predict(handle_file(str(icons / "notes.txt")), api_name="/label")


@pytest.mark.parametrize("name", ["label", "caption"])
def test_an_address_in_a_request_is_not_fetched(client, name):
    with pytest.raises(AppError, match="not uploaded"):
        client.predict({"path": "http://192.0.2.1/an.png", "meta": {"_type": "gradio.FileData"}}, api_name=f"/{name}")


@pytest.mark.parametrize(
    "words, told", [("  ", "no words yet"), ("a" * 2001, "2001 characters"), ("a\ud800", "surrogate")]
)
@pytest.mark.parametrize(
    "name, arguments",
    [
        ("find", lambda words: (words,)),
        ("draw", lambda words: (words, 1, 0.7, 1.0, 0)),
        ("answer", lambda words: ({"text": words, "files": []}, 0.7, 1.0, 1, 0)),
        ("route", lambda words: (None, words, 1)),
    ],
    ids=["find", "draw", "answer", "route"],
)
def test_words_of_a_request_made_by_hand_have_the_limits_of_the_page(functions, name, arguments, words, told):
    told = {"answer": "prompt is empty", "route": "Give an image or words"}.get(name, told) if words == "  " else told
    with pytest.raises(gr.Error, match=told):
        # generators run only when they are read
        list(functions[name](*arguments(words)))


def test_images_that_are_drawn_are_shown_once(functions, studio):
    shown = list(functions["draw"]("red apple", 2, 1.0, 1.0, 3))
    whole = studio.processor.image_seq_length
    counts = [int(said.split()[0]) for _, said in shown]
    assert len(counts) > 2 and counts == sorted(set(counts)) and counts[-1] == whole
    assert all(f" of {whole} codes" in said for _, said in shown[:-1]) and shown[-1][1].endswith(" s")


def test_large_images_of_any_kind_and_name_are_found_and_sent_small(tmp_path, capsys):
    image = noise_images(1, 64)[0].resize((1500, 1000)).convert("CMYK")
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg"), "wb") as file:
        image.save(file, format="jpeg")
    (tmp_path / "prompts.txt").write_text("house\n")
    processor = caption_processor()
    found = DemoSession(caption_model(processor), processor, "tiny", library=str(tmp_path)).find("red apple")
    assert "prompts.txt" not in capsys.readouterr().err, "words to draw beside the images are no news"
    gallery = gr.Gallery(format="png")
    gallery.GRADIO_CACHE = str(tmp_path)
    (entry,) = gallery.postprocess(found).root
    assert entry.caption == r"caf\udce9.jpg" and entry.caption.encode()
    assert Image.open(entry.image.path).size == (320, 213)


@pytest.mark.parametrize(
    "files, told",
    [(None, "does not exist"), ([], "holds no files"), (["notes.txt"], "none of its 1 files is an image")],
    ids=["nowhere", "empty", "words"],
)
def test_a_folder_without_images_to_search_is_one_line(tmp_path, capsys, files, told):
    processor = tiny_processor()
    tiny_model(processor).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for name in files or []:
        (tmp_path / "icons").mkdir()
        (tmp_path / "icons" / name).write_text("hello")
    if files == []:
        (tmp_path / "icons").mkdir()
    assert moma(["demo", str(tmp_path / "model"), "--search", str(tmp_path / "icons")]) == 2
    said = capsys.readouterr().err
    assert told in said and "--search" in said and "FOLDER" not in said


def saved(image: Image.Image, kind: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "not an image"),
        (saved(noise_images(1, 64)[0], "PNG")[:2000], "truncated or damaged"),
        (saved(Image.new("F", (20, 20), 0.5), "TIFF"), "32 bits a pixel"),
        (b"P6 8000 8000 255\n", "million pixels"),
        # Pillow takes this size for an attack
        (b"P6 60000 60000 255\n", "million pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
    ids=["empty", "truncated", "floats", "large", "huge", "eps"],
)
def test_uploads_that_are_no_usable_image_are_refused_without_naming_files(data, message, uploads):
    (uploads / "upload.png").write_bytes(data)
    with pytest.raises(ValueError, match=message) as refusal:
        read_image(str(uploads / "upload.png"))
    assert str(uploads) not in str(refusal.value)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"these are words", "not a sound that can be read"),
        (as_file(tone(500))[:44], "not a sound that can be read"),
        (as_file(np.zeros(31 * RATE, np.int16), kind="FLAC"), "longer than 30 s"),
        (as_file(np.zeros(700 * RATE, np.int16), kind="FLAC"), "too long"),
    ],
    ids=["words", "cut", "longer", "long"],
)
def test_uploads_that_are_no_usable_sound_are_refused_without_naming_files(data, message, uploads):
    (uploads / "upload.wav").write_bytes(data)
    with pytest.raises(ValueError, match=message) as refusal:
        read_sound_upload(str(uploads / "upload.wav"), RATE)
    assert str(uploads) not in str(refusal.value)


@pytest.mark.parametrize("path", ["mine.png", "uploads/../mine.png", "uploads/link.png"])
@pytest.mark.parametrize("read", [read_image, lambda path: read_sound_upload(path, RATE)], ids=["image", "sound"])
def test_files_of_this_machine_that_nobody_uploaded_are_refused(tmp_path, monkeypatch, path, read):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    noise_images(1)[0].save(tmp_path / "mine.png")
    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads" / "link.png").symlink_to(tmp_path / "mine.png")
    with pytest.raises(ValueError, match="not uploaded"):
        read(str(tmp_path / path))


def test_an_upload_is_decoded_and_upright(uploads):
    exif = Image.Exif()
    exif[274] = 6
    (uploads / "upload.jpg").write_bytes(saved(Image.new("RGB", (40, 20)), "JPEG", exif=exif))
    assert read_image(str(uploads / "upload.jpg")).size == (20, 40)


def test_examples_are_the_images_and_the_lines_of_a_folder(tmp_path):
    for name in ("b.png", "a.jpg"):
        noise_images(1)[0].save(tmp_path / name)
    (tmp_path / "prompts.txt").write_text("noto: red apple\n\ncastle \n", encoding="utf-8-sig")
    (tmp_path / "notes.md").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to("nowhere.png")
    examples = Examples.from_folder(tmp_path)
    assert [path.rsplit("/", 1)[1] for path in examples.images] == ["a.jpg", "b.png"]
    assert examples.prompts == ["noto: red apple", "castle"]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="neither"):
        Examples.from_folder(tmp_path / "none")
    (tmp_path / "prompts.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"prompts.txt' cannot be read as text in UTF-8"):
        Examples.from_folder(tmp_path)


def test_the_folder_is_needed_outside_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        parse_arguments([])
    assert "FOLDER is needed" in capsys.readouterr().err
    (tmp_path / "model_cards" / "moma-icons").mkdir(parents=True)
    assert parse_arguments([]).folder == "model_cards/moma-icons" and parse_arguments([]).examples is None
    examples = tmp_path / "model_cards" / "moma-icons-space" / "examples"
    examples.mkdir(parents=True)
    given, others = parse_arguments([]), parse_arguments(["--search", "mine"])
    assert given.examples == given.search == str(examples.relative_to(tmp_path))
    assert others.search == "mine" and others.examples == given.examples
    # another model knows nothing of these
    other = parse_arguments(["other"])
    assert (other.folder, other.search, other.examples) == ("other", None, None)


def test_a_model_that_writes_no_images_is_refused(tmp_path):
    processor = tiny_processor()
    model = tiny_model(processor)
    model.config.begin_image_token_id = model.config.end_image_token_id = None
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="writes no images"):
        load_studio(tmp_path)


def test_missing_examples_and_a_taken_port_are_one_line(tmp_path, capsys):
    assert moma(["demo", str(tmp_path), "--examples", str(tmp_path / "nowhere")]) == 2
    assert "error: --examples: there is no folder" in capsys.readouterr().err
    processor = tiny_processor()
    tiny_model(processor).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert moma(["demo", str(tmp_path), "--port", str(taken.getsockname()[1])]) == 2
    assert "error: --host, --port: nobody can listen on 127.0.0.1" in capsys.readouterr().err


def test_small_images_are_enlarged_by_whole_numbers():
    image = noise_images(1)[0]
    shown = enlarged(image)
    assert shown.size == (LEAST_SIDE, LEAST_SIDE) and shown.getpixel((15, 15)) == image.getpixel((0, 0))
    assert enlarged(shown).size == shown.size


@pytest.mark.parametrize(
    "fields", [{"num_experts": 1, "num_hidden_layers": 1}, {"depth_layers": [1]}], ids=["dense", "depth"]
)
def test_pages_of_other_models_are_built_with_all_tabs_and_phone_nobody(fields):
    processor = tiny_processor()
    studio = DemoSession(tiny_model(processor, **fields), processor, "tiny")
    page = build_page(studio)
    try:
        assert [block.label for block in page.blocks.values() if isinstance(block, gr.Tab)] == TABS
        assert page.get_config_file()["analytics_enabled"] is False
        # requests of all kinds use the model one at a time
        functions = [function for function in page.fns.values() if function.concurrency_id == "model"]
        assert len(functions) >= 5 and {function.concurrency_limit for function in functions} == {1}
        # there is no folder to search
        assert "find" not in {function.api_name for function in page.fns.values()}
    finally:
        page.close()


@pytest.fixture
def sound_file(uploads):
    (uploads / "tone.wav").write_bytes(as_file(tone(500)))
    return str(uploads / "tone.wav")


def samples_of(file) -> tuple[int, np.ndarray]:
    with wave.open(file) as sound:
        return sound.getframerate(), np.frombuffer(sound.readframes(sound.getnframes()), "<i2")


def test_a_visitor_has_a_sound_written_and_hears_what_the_model_heard(hearing_client, hearing_studio, sound_file):
    written, heard = hearing_client.predict(handle_file(sound_file), api_name="/listen")
    samples = read_sound_upload(sound_file, RATE)
    assert written == hearing_studio.listen(samples)
    rate, found = samples_of(heard)
    assert rate == RATE and np.array_equal(found, as_sound(hearing_studio.heard(samples), RATE)[1])


def test_a_visitor_has_a_sound_drawn_and_words_spoken(hearing_client, hearing_studio, sound_file):
    drawn = hearing_client.predict(handle_file(sound_file), 0, 1, 0, api_name="/draw_sound")
    assert drawn["path"] if isinstance(drawn, dict) else drawn
    _, found = samples_of(hearing_client.predict("red apple", 0.7, 1, 3, api_name="/say"))
    assert np.array_equal(found, as_sound(hearing_studio.say("red apple", 0.7, 1.0, 3), RATE)[1])


def test_only_models_that_hear_have_the_tab_of_sounds(hearing_studio):
    page = build_page(hearing_studio)
    tabs = [block.label for block in page.blocks.values() if isinstance(block, gr.Tab)]
    assert tabs == [*TABS[:3], "Sounds", *TABS[3:]]


def test_sounds_of_an_answer_are_played(hearing_studio):
    frame = hearing_studio.processor.frame_ids("audio", [1, 2, 3])
    words = hearing_studio.processor.tokenizer("red apple", add_special_tokens=False)["input_ids"]
    parts = hearing_studio.partial.parts([*words, *frame, *frame[:2]])
    assert parts[0] == "red apple" and len(parts) == 2 and len(parts[1]) == 3 * 80
    shown = as_html(parts, RATE)
    assert shown.count("<audio controls") == 1
    rate, found = samples_of(io.BytesIO(base64.b64decode(shown.split("base64,")[1].split('"')[0])))
    assert rate == RATE and np.array_equal(found, as_sound(parts[1], RATE)[1])
