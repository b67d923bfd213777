# SPDX-License-Identifier: Apache-2.0
"""What the page is made of, without a browser: uploads, examples, messages, the command, and pages of every model."""

import io
import socket
import struct
import zlib

import pytest
from PIL import Image

from helpers.tiny import noise_images, tiny_model, tiny_processor
from modeling_moma.cli.demo import parse_arguments
from modeling_moma.cli.main import main as moma


gr = pytest.importorskip("gradio", reason="`pip install 'modeling-moma[demo]'` is missing")

from modeling_moma.demo.inputs import Examples, read_upload, show_errors  # noqa: E402
from modeling_moma.demo.page import build_page  # noqa: E402
from modeling_moma.demo.studio import DemoSession, load_studio  # noqa: E402
from modeling_moma.demo.tabs import LEAST_SIDE, enlarged  # noqa: E402


def png_of_size(width: int, height: int) -> bytes:
    """The head of a PNG file, whose pixels do not follow."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def whole_png() -> bytes:
    data = io.BytesIO()
    noise_images(1, 64)[0].save(data, "PNG")
    return data.getvalue()


def float_tiff() -> bytes:
    data = io.BytesIO()
    Image.new("F", (20, 20), 0.5).save(data, "TIFF")
    return data.getvalue()


@pytest.mark.parametrize(
    "data, message",
    [
        (b"these are words", "not an image"),
        (b"", "not an image"),
        (whole_png()[:2000], "truncated or damaged"),
        (float_tiff(), "32 bits a pixel"),
        (png_of_size(8000, 8000), "million pixels"),
        # Pillow takes this size for an attack
        (png_of_size(60000, 60000), "million pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
    ids=["text", "empty", "truncated", "floats", "large", "huge", "eps"],
)
def test_uploads_that_are_no_usable_image_are_refused_without_naming_files(data, message, tmp_path):
    path = tmp_path / "upload.png"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as refusal:
        read_upload(str(path), str(tmp_path))
    assert str(tmp_path) not in str(refusal.value)


def test_an_upload_is_decoded_and_upright(tmp_path):
    path = tmp_path / "upload.jpg"
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (40, 20)).save(path, exif=exif)
    assert read_upload(str(path), str(tmp_path)).size == (20, 40)


def test_files_of_this_machine_that_nobody_uploaded_are_refused(tmp_path):
    noise_images(1)[0].save(tmp_path / "mine.png")
    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads" / "link.png").symlink_to(tmp_path / "mine.png")
    for path in (tmp_path / "mine.png", tmp_path / "uploads" / ".." / "mine.png", tmp_path / "uploads" / "link.png"):
        with pytest.raises(ValueError, match="not uploaded"):
            read_upload(str(path), str(tmp_path / "uploads"))


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
    for folder, message in ((tmp_path / "none", "neither"), (tmp_path / "nowhere", "no folder")):
        with pytest.raises(ValueError, match=message):
            Examples.from_folder(folder)
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
    assert parse_arguments(["other"]).folder == "other"
    examples = tmp_path / "model_cards" / "moma-icons-space" / "examples"
    examples.mkdir(parents=True)
    given, others = parse_arguments([]), parse_arguments(["--search", "mine"])
    assert given.examples == given.search == str(examples.relative_to(tmp_path))
    assert others.search == "mine" and others.examples == given.examples
    # another model knows nothing of these
    assert parse_arguments(["other"]).search is None and parse_arguments(["other"]).examples is None


def test_a_model_that_writes_no_images_is_refused(tmp_path, monkeypatch):
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
    page = build_page(DemoSession(tiny_model(processor, **fields), processor, "tiny"))
    try:
        config = page.get_config_file()
        tabs = [part["props"]["label"] for part in config["components"] if part["type"] == "tabitem"]
        assert tabs == ["Caption", "Names", "Draw", "Interleaved", "Routing"]
        assert config["analytics_enabled"] is False
        # requests of all kinds use the model one at a time
        functions = [function for function in page.fns.values() if function.concurrency_id == "model"]
        assert len(functions) >= 5 and {function.concurrency_limit for function in functions} == {1}
    finally:
        page.close()


def test_messages_of_errors_reach_the_page():
    @show_errors
    def fails():
        raise ValueError("too small")

    @show_errors
    def fails_later():
        yield 1
        raise ValueError("too late")

    with pytest.raises(gr.Error, match="too small"):
        fails()
    stream = fails_later()
    assert next(stream) == 1
    with pytest.raises(gr.Error, match="too late"):
        next(stream)


def test_images_that_are_drawn_are_shown_once():
    processor = tiny_processor()
    page = build_page(DemoSession(tiny_model(processor), processor, "tiny"))
    try:
        draw = next(function.fn for function in page.fns.values() if function.api_name == "draw")
        shown = list(draw("red apple", 2, 1.0, 1.0, 3))
    finally:
        page.close()
    whole = processor.image_seq_length
    counts = [int(said.split()[0]) for _, said in shown]
    assert len(counts) > 2 and counts == sorted(set(counts)) and counts[-1] == whole
    assert all(f" of {whole} codes" in said for _, said in shown[:-1]) and shown[-1][1].endswith(" s")


def test_words_of_a_request_made_by_hand_have_the_limit_of_the_page():
    processor = tiny_processor()
    page = build_page(DemoSession(tiny_model(processor), processor, "tiny"))
    seen = []

    def reached(*arguments):
        seen.append(arguments)
        raise ValueError("the model is asked")

    sent = {
        "draw": lambda words: (words, 1, 0.7, 1.0, 0),
        "answer": lambda words: ({"text": words, "files": []}, 0.7, 1.0, 1, 0),
        "route": lambda words: (None, words, 1),
    }
    try:
        functions = {function.api_name: function.fn for function in page.fns.values()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DemoSession, "_inputs", reached)
            for name, arguments in sent.items():
                for words, said in (
                    ("a" * 2001, "2001 characters"),
                    ("a\ud800", "surrogate"),
                    ("a" * 2000, "is asked"),
                ):
                    with pytest.raises(gr.Error, match=said):
                        answer = functions[name](*arguments(words))
                        # generators run only when they are read
                        list(answer)
        assert len(seen) == len(sent)
    finally:
        page.close()
