# SPDX-License-Identifier: Apache-2.0
"""Tests of the images that an image tokenizer is trained on: which they are, and what becomes of bad ones."""

import csv
import json
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

from helpers.tiny import tiny_processor
from modeling_moma.cli import tokenize
from modeling_moma.cli.train_image_tokenizer import main
from modeling_moma.data.jobs import read_manifest
from modeling_moma.data.kinds import ImageKind
from modeling_moma.data.sources import Source
from modeling_moma.training import image_store
from modeling_moma.training.image_store import ArrayWriter, open_store, read_array, to_pixel_values
from tokenization import MomaImageProcessor


SIDE = 32
EXIF_ORIENTATION, TURNED_LEFT = 0x0112, 6
TINY = {
    **{"base_channels": 16, "channel_multiplier": [1, 1], "num_res_blocks": 1, "embed_dim": 8, "num_embeddings": 32},
    **{"latent_channels": 16, "resolution": SIDE, "patch_size": 4, "norm_type": "none", "codebook_decay": 0.9},
}


def noise(rng, height=40, width=40):
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def bomb() -> bytes:
    """The head of a PNG of 20,000 pixels a side, which would fill gigabytes."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def write_camera_folder(folder: Path, num_good: int = 10) -> Path:
    """Photos as they come from a camera or a download, with a file of captions."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = []

    def save(name, image, **options):
        image.save(folder / name, **options)
        names.append(name)

    for index in range(num_good):
        save(f"good{index}.jpg", noise(rng))
    save("cmyk.jpg", noise(rng).convert("CMYK"))
    save("deep.png", Image.fromarray(rng.integers(0, 65536, (40, 40), dtype=np.uint16)))
    save("moving.gif", noise(rng), save_all=True, append_images=[noise(rng)])
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = TURNED_LEFT
    save("turned.jpg", noise(rng), exif=exif)
    save("dot.png", noise(rng, 1, 1))
    whole = BytesIO()
    noise(rng).save(whole, format="JPEG")
    contents = {"half.jpg": whole.getvalue()[:600], "empty.jpg": b"", "bomb.png": bomb()}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    names += [*contents, "gone.jpg"]
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("file_name", "caption"), *((name, f"an image, {name}") for name in names)])
    return folder


LEFT_OUT = {"image too small": 1, "image damaged": 2, "image too large": 1, "image missing": 1}
CHANGED = {"CMYK": 1, "16 bit": 1, "animated": 1, "EXIF-rotated": 1}


@pytest.fixture(scope="module")
def camera(tmp_path_factory):
    return write_camera_folder(tmp_path_factory.mktemp("camera") / "photos")


def command(tmp_path, sources, *extra, **settings):
    settings = {"config": TINY, "steps": 3, "batch_size": 4, "warmup_steps": 1, **settings}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"sources": sources, "image_tokenizer": settings}, sort_keys=False))
    return [str(recipe), "--output", str(tmp_path / "out"), *extra]


@pytest.mark.parametrize("by", ["folder", "file"])
def test_photos_with_bad_ones_among_them_train_and_are_counted(camera, tmp_path, by, capsys):
    data = {"folder": {"data": str(camera), "image": "image"}}
    data["file"] = {"data": str(camera / "metadata.csv"), "image": "file_name"}
    main(command(tmp_path, {"photos": {**data[by], "text": "caption"}}))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    counts = report["sources"]["photos"]
    assert counts["left_out"] == LEFT_OUT and counts["changed"] == CHANGED
    assert counts["train"] + counts["held_out"] == 14 and counts["held_out"] >= 1
    assert len(report["examples"]) == 5 and any("row 15" in example for example in report["examples"])
    assert "image damaged 2" in capsys.readouterr().out
    assert np.load(tmp_path / "out" / "images" / "train.npy").shape == (counts["train"], 3, SIDE, SIDE)


def test_strict_stops_at_the_first_bad_image(camera, tmp_path):
    sources = {"photos": {"data": str(camera), "image": "image", "text": "caption"}}
    with pytest.raises(ValueError, match="--strict: source 'photos', split 'train', row 14.*image too small"):
        main(command(tmp_path, sources, "--strict"))
    main(command(tmp_path, sources))
    # also where they were left out by an earlier start
    with pytest.raises(ValueError, match="--strict: source 'photos', split 'train', row 14"):
        main(command(tmp_path, sources, "--strict", "--resume"))


def test_no_image_left_says_why(tmp_path):
    folder = write_camera_folder(tmp_path / "photos", num_good=0)
    for name in ("cmyk.jpg", "deep.png", "moving.gif", "turned.jpg"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="0 to train on, 0 held out; left out: .*image missing 5"):
        main(command(tmp_path, {"photos": {"data": str(folder), "image": "image", "text": "caption"}}))
    assert not (tmp_path / "out" / "images").exists()


def test_documents_give_all_of_their_images(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(7):
        noise(rng).save(tmp_path / f"{index}.png")

    def document(*names):
        return {"segments": [{"text": "See"}, *({"image": f"{name}.png"} for name in names)]}

    rows = [document(0, 1), document(2), {"segments": [{"text": "None."}]}, document(3, 4, 5, "gone")]
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = [{"messages": [{"role": "user", "content": "What?"}], "images": ["6.png"]}] * 2
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    (tmp_path / "a.txt").write_text("no image\n")
    sources = {
        "pages": {"data": str(tmp_path / "pages.jsonl"), "segments": "segments", "held_out": 0},
        "words": {"data": str(tmp_path / "a.txt"), "text": "text"},
        "chats": {"data": str(tmp_path / "chats.jsonl"), "messages": "messages", "images": "images", "held_out": 0},
    }
    main(command(tmp_path, sources))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["sources"]["pages"] == {
        **{"train": 6, "held_out": 0},
        **{"left_out": {"image missing": 1}, "changed": {}},
    }
    # nothing else was held out, so the last one is
    assert report["sources"]["chats"] == {"train": 1, "held_out": 1, "left_out": {}, "changed": {}}
    seen = np.load(tmp_path / "out" / "images" / "train.npy")
    processor = MomaImageProcessor.for_resolution(SIDE, do_rescale=False, do_normalize=False)
    wanted = [processor(str(tmp_path / f"{index}.png"), return_tensors="np")["pixel_values"][0] for index in range(7)]
    np.testing.assert_array_equal(seen, wanted)


def test_strict_takes_the_pages_that_tokenizing_takes(tmp_path):
    for index in range(6):
        noise(np.random.default_rng(index)).save(tmp_path / f"{index}.png")
    # as tables keep what does not apply
    rows = [{"segments": [{"text": "See", "image": ""}, {"text": "", "image": f"{index}.png"}]} for index in range(6)]
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {"pages": {"data": str(tmp_path / "pages.jsonl"), "segments": "segments", "held_out": 0}}
    main(command(tmp_path, sources, "--strict"))
    counts = json.loads((tmp_path / "out" / "report.json").read_text())["sources"]["pages"]
    assert counts == {"train": 5, "held_out": 1, "left_out": {}, "changed": {}}
    processor = tiny_processor()
    processor.save_pretrained(tmp_path / "processor")
    folders = ["--processor", str(tmp_path / "processor"), "--output", str(tmp_path / "tokens")]
    tokenize.main([str(tmp_path / "recipe.yaml"), *folders, "--processes", "1", "--strict"])
    entry = read_manifest(tmp_path / "tokens")["sources"]["pages"]["splits"]["train"]
    assert entry["tokens"]["image"] == 6 * processor.image_seq_length


def image_source(folder: Path, count: int, **fields) -> Source:
    """A source of `count` images, each of one colour: its number."""
    folder.mkdir(exist_ok=True)
    images = [Image.fromarray(np.full((16, 16, 3), index, dtype=np.uint8)) for index in range(count)]
    Dataset.from_dict({"image": images}).cast_column("image", ImageFeature()).to_parquet(folder / "all.parquet")
    return Source("numbers", str(folder), ImageKind("image"), **fields)


def test_a_second_start_reads_no_image_and_other_sources_are_read_anew(tmp_path, monkeypatch):
    source = image_source(tmp_path / "data", 12)
    first = open_store(tmp_path / "store", [source], 16, 100)
    assert sorted([*first.train[:, 0, 0, 0], *first.held_out[:, 0, 0, 0]]) == list(range(12))
    reads = []
    read = image_store.read_image
    monkeypatch.setattr(image_store, "read_image", lambda *args: reads.append(args) or read(*args))
    again = open_store(tmp_path / "store", [source], 16, 100)
    assert not reads and again.report == first.report
    np.testing.assert_array_equal(again.train, first.train)
    larger = open_store(tmp_path / "store", [source], 24, 100)
    assert len(reads) == 12 and larger.train.shape[1:] == (3, 24, 24)
    monkeypatch.setattr("modeling_moma.training.image_store.HELD_OUT_RULE", "another")
    open_store(tmp_path / "store", [source], 24, 100)
    assert len(reads) == 24
    assert {path.name for path in tmp_path.iterdir()} == {"data", "store"}


def test_images_that_came_later_are_read(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "photos"
    folder.mkdir()
    for number in range(9):
        noise(rng).save(folder / f"{number}.png")
        if number in (4, 8):
            store = open_store(tmp_path / "store", [Source("photos", str(folder), ImageKind("image"))], 16, 4)
            assert len(store.train) + len(store.held_out) == number + 1


@pytest.mark.parametrize("named", ["text", "list", "mapping", "data_dir"])
def test_files_that_load_names_are_read_anew_where_they_changed(tmp_path, named):
    file = tmp_path / "data" / "all.parquet"
    files = {"text": str(file), "list": [str(file)], "mapping": {"train": [str(file)]}}
    load = {"data_dir": str(file.parent)} if named == "data_dir" else {"data_files": files[named]}
    source = Source("numbers", "parquet", ImageKind("image"), load=load)
    for colours in (range(12), range(20, 32), range(15)):
        images = [Image.fromarray(np.full((16, 16, 3), colour, dtype=np.uint8)) for colour in colours]
        Dataset.from_dict({"image": images}).cast_column("image", ImageFeature()).to_parquet(file)
        store = open_store(tmp_path / "store", [source], 16, 100)
        assert sorted([*store.train[:, 0, 0, 0], *store.held_out[:, 0, 0, 0]]) == list(colours)


def test_held_out_images_are_a_part_of_bounded_size(tmp_path):
    source = image_source(tmp_path / "data", 60, held_out=0.5)
    everything = open_store(tmp_path / "all", [source], 16, 100)
    held_out = [row for row in range(60) if source.is_held_out(str(row))]
    assert everything.held_out[:, 0, 0, 0].tolist() == held_out
    some = open_store(tmp_path / "some", [source], 16, 5)
    assert len(some.held_out) == 5 and set(some.held_out[:, 0, 0, 0].tolist()) < set(held_out)
    # those that are not looked at are not trained on either
    np.testing.assert_array_equal(some.train, everything.train)
    assert some.report["sources"]["numbers"]["held_out"] == 5


def test_the_emoji_are_all_there_in_their_order(tmp_path):
    data = Path(__file__).resolve().parents[2] / "data" / "emoji"
    if not (data / "data").exists():
        pytest.skip("the emoji set is not here: a checkout without large files")
    # its training images are too many for a test
    splits = {"train": "validation", "validation": "test"}
    store = open_store(tmp_path / "store", [Source("emoji", str(data), ImageKind("image"), splits=splits)], 64, 1024)
    processor = MomaImageProcessor.for_resolution(64, do_rescale=False, do_normalize=False)
    for images, split in ((store.train, "validation"), (store.held_out, "test")):
        rows = load_dataset(str(data), split=split)
        wanted = [processor(image, return_tensors="np")["pixel_values"][0] for image in rows["image"]]
        np.testing.assert_array_equal(images, wanted)


@pytest.mark.parametrize("do_pad", [False, True])
def test_the_model_is_trained_on_the_pixels_that_the_processor_gives(tmp_path, do_pad):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (64, 128, 4), dtype=np.uint8)
    images = [
        # a clear ground, sixteen bits, and sides that differ
        Image.fromarray(values[:, :64] * np.array([1, 1, 1, 0], dtype=np.uint8)),
        Image.fromarray(rng.integers(0, 65536, (64, 64), dtype=np.uint16)),
        Image.fromarray(values[..., :3]),
        Image.fromarray(values[:40, :40, :3]),
        Image.fromarray(values[..., 0]).convert("P"),
    ]
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    paths = [str(tmp_path / f"{index}.png") for index in range(len(images))]
    dataset = Dataset.from_dict({"image": paths}).cast_column("image", ImageFeature())
    dataset.to_parquet(tmp_path / "data" / "train.parquet")
    dataset.select([0]).to_parquet(tmp_path / "data" / "validation.parquet")
    sources = [Source("mixed", str(tmp_path / "data"), ImageKind("image"))]
    # of an earlier start, with the other setting
    open_store(tmp_path / "store", sources, SIDE, 100, do_pad=not do_pad)
    store = open_store(tmp_path / "store", sources, SIDE, 100, do_pad=do_pad)
    seen = to_pixel_values(torch.from_numpy(store.train), torch.device("cpu"))
    processor = MomaImageProcessor.for_resolution(SIDE, do_pad=do_pad)
    given = processor(list(dataset["image"]), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(seen.contiguous(), given, atol=1e-6, rtol=0)
    assert seen[0].min() == 1.0 and len(store.held_out) == 1


def test_an_array_grows_on_the_disk(tmp_path):
    entries = np.arange(1200, dtype=np.float32).reshape(200, 2, 3)
    with ArrayWriter(tmp_path / "a.npy", (2, 3), np.float32) as writer:
        for entry in entries[:150]:
            writer.write(entry)
        writer.extend(entries[150:])
        writer.write(entries[7], 3)
        writer.drop_last()
    expected = entries[:-1].copy()
    expected[3] = entries[7]
    np.testing.assert_array_equal(read_array(tmp_path / "a.npy"), expected)
