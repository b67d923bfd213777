# SPDX-License-Identifier: Apache-2.0
"""A memory of named images against plain loops, from a data set to the commands, and one that is of another model."""

import json
import math
import zlib

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.captions import IMAGES, caption_model, caption_processor
from helpers.tiny import noise_images
from modeling_moma.cli import main as moma
from modeling_moma.data.sources import Source
from modeling_moma.errors_moma import InputError
from modeling_moma.labelling import memory as memories
from modeling_moma.labelling.labeler import Guess, ImageLabeler, mixed_guesses, open_labeler
from modeling_moma.labelling.memory import MEMORY_FILE, ImageMemory
from modeling_moma.labelling.reference_images import NamedImages, build_memory


ROWS = [
    {"name": "house", "keywords": ["home", "building"], "family": "a"},
    {"name": "house", "keywords": ["home"], "family": "a"},
    {"name": "red apple", "keywords": [], "family": "a"},
    {"name": "house", "keywords": None, "family": "b"},
    {"name": "red apple", "keywords": ["fruit"], "family": "b"},
    {"name": "pear", "keywords": ["fruit"], "family": "b"},
    {"name": " ", "keywords": ["nothing"], "family": "c"},
]


@pytest.fixture(scope="module")
def processor():
    return caption_processor()


@pytest.fixture(scope="module")
def model(processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    caption_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def labeler(model):
    return open_labeler(str(model), batch_size=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set of the rows with images of their own, the third one no image."""
    folder = tmp_path_factory.mktemp("data")
    images = [{"bytes": as_png(image, folder), "path": None} for image in noise_images(len(ROWS))]
    images[2] = {"bytes": b"no image", "path": None}
    rows = [{**row, "image": image} for row, image in zip(ROWS, images, strict=True)]
    Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    return folder


def as_png(image, folder):
    image.save(folder / "one.png")
    return (folder / "one.png").read_bytes()


def some_memory(features, names, tags=None, **kwargs):
    tags = [[] for _ in names] if tags is None else tags
    return ImageMemory.build(features, names, tags, torch.ones(features.shape[1]), "processor", **kwargs)


def loop_shares(memory, feature):
    """The shares of the nearest images of one image, number by number."""

    def unit(numbers):
        length = math.sqrt(sum(number**2 for number in numbers))
        return [number / length for number in numbers]

    centred = [(a - b).item() for a, b in zip(feature, memory.mean, strict=True)]
    columns = memory.projection.T.tolist()
    wanted = unit([sum(a * b for a, b in zip(centred, column, strict=True)) for column in columns])
    cosines = [sum(a * b for a, b in zip(wanted, unit(key), strict=True)) for key in memory.keys.tolist()]
    places = sorted(range(len(cosines)), key=lambda place: -cosines[place])[: memories.NEAREST]
    weights = {place: math.exp(cosines[place] / memories.TEMPERATURE) for place in places}
    return {place: weight / sum(weights.values()) for place, weight in weights.items()}


def test_names_tags_and_matches_are_sums_over_the_nearest_images(monkeypatch):
    monkeypatch.setattr(memories, "NEAREST", 4)
    torch.manual_seed(0)
    names = ["house", "House-2", "pear", "house", "red apple", "pear"]
    tags = [["home", "building"], [], ["fruit"], ["home"], ["fruit", "Fruit", "red"], []]
    memory = some_memory(torch.randn(6, 8), names, tags, dimensions=6)
    assert memory.tags == [["home", "building"], [], ["fruit"], ["fruit", "Fruit", "red"]]
    wanted_ND = torch.randn(3, 8)
    found = memory.match(wanted_ND, ["House", "fruit", "ho", "red"])
    for row, named, tagged in zip(range(3), memory.name_shares(wanted_ND), memory.tag_shares(wanted_ND), strict=True):
        shares = loop_shares(memory, wanted_ND[row])
        expected = {name: sum(share for place, share in shares.items() if names[place] == name) for name in names}
        assert named == pytest.approx({name: share for name, share in expected.items() if share}, rel=1e-4)
        of_name = dict(zip(memory.names, memory.tags, strict=True))
        with_tags = {place: share for place, share in shares.items() if of_name[names[place]]}
        wanted = {}
        for place, share in with_tags.items():
            for tag in of_name[names[place]]:
                wanted[tag] = wanted.get(tag, 0) + share / len(of_name[names[place]]) / sum(with_tags.values())
        assert tagged == pytest.approx(wanted, rel=1e-4)
        begins = sum(share for place, share in shares.items() if names[place].lower().split("-")[0] == "house")
        firsts = [
            (share / len(of_name[names[place]]), tag)
            for place, share in shares.items()
            for tag in of_name[names[place]]
        ]
        fruit = sum(share for share, tag in firsts if tag.lower() == "fruit")
        # the name, and the last of its three tags
        red = sum(4 / 3 * share for place, share in shares.items() if names[place] == "red apple")
        assert found[row].tolist() == pytest.approx([begins, fruit, 0.0, red], rel=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(2, 40),
    size=st.integers(2, 33),
    dimensions=st.integers(2, 40),
    seed=st.integers(0, 99),
    letters=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=3),
)
def test_a_memory_is_saved_as_it_is(tmp_path_factory, count, size, dimensions, seed, letters):
    torch.manual_seed(seed)
    names = [f"{letters}{place % 7}" for place in range(count)]
    memory = some_memory(torch.randn(count, size), names, [[name] for name in names], dimensions=dimensions)
    memory = memory.with_tags({"A name of no image": ["its tag"], names[0]: [names[0], letters]})
    assert memory.keys.abs().max() <= 7 and memory.keys.shape[1] % 2 == 0 and len(memory) == count
    loaded = ImageMemory.load(memory.save(tmp_path_factory.mktemp("memory") / "new" / "images.safetensors"))
    for name in ("keys", "mean", "projection", "probe"):
        assert torch.equal(getattr(memory, name), getattr(loaded, name))
    assert loaded.names == sorted(memory.names) and loaded.processor == "processor"
    assert dict(zip(loaded.names, loaded.tags, strict=True)) == dict(zip(memory.names, memory.tags, strict=True))
    assert [loaded.names[place] for place in loaded.name_of] == names
    features = torch.randn(3, size)
    for found, shares in zip(loaded.name_shares(features), memory.name_shares(features), strict=True):
        assert found == pytest.approx(shares)


def test_a_memory_of_texts_that_zlib_packed_is_read(tmp_path):
    torch.manual_seed(0)
    memory = some_memory(torch.randn(3, 8), ["a", "b", "a"], [["x"], [], ["y"]])
    file = memory.save(tmp_path / "images.safetensors")
    (tmp_path / "another").touch()
    assert file.stat().st_mode == (tmp_path / "another").stat().st_mode
    tensors = load_file(file)
    packed = zlib.compress(json.dumps({"names": memory.names, "tags": memory.tags}).encode())
    tensors["texts"] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    save_file(tensors, file, {"processor": "processor"})
    assert ImageMemory.load(file).tags == [["x", "y"], []]


def test_names_may_have_more_tags_than_their_images_are_given_and_names_may_have_no_image():
    torch.manual_seed(0)
    numbers, feature = [str(number) for number in range(40)], torch.randn(1, 8)
    memory = some_memory(torch.randn(3, 8), ["a", "b", "a"], [numbers[:10], [], []], dimensions=8)
    more = memory.with_tags({"c": ["0", "z", "z"], "a": numbers[::-1], "d": []})
    assert more.names == ["a", "b", "c"] and more.num_image_names == 2 and len(more) == 3
    assert more.tags == [[*numbers[:10], *numbers[:9:-1]], [], ["0", "z"]]
    assert more.name_shares(feature) == memory.name_shares(feature)
    # the first twelve
    assert set(more.tag_shares(feature)[0]) == {*numbers[:10], "39", "38"}
    found = more.match(feature, ["39", "37", "z"])[0]
    assert found[0] > 0 and found[1:].tolist() == [0, 0]
    again = more.extended(torch.randn(1, 8), ["c"], [["own"]])
    assert again.num_image_names == 3 and again.tags[2] == ["own", "0", "z"]


class LargestTensor(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that is made."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        parts = found if isinstance(found, (tuple, list)) else [found]
        self.count = max([self.count, *(part.numel() for part in parts if isinstance(part, torch.Tensor))])
        return found


def test_many_images_are_compared_with_a_memory_in_parts(monkeypatch):
    monkeypatch.setattr(memories, "NEAREST", 5)
    torch.manual_seed(0)
    memory = some_memory(torch.randn(200, 24), [f"name {place % 60}" for place in range(200)], dimensions=8)
    wanted_ND = torch.randn(90, 24)
    whole = memory.match(wanted_ND, ["name 1"])
    monkeypatch.setattr(memories, "AT_ONCE", 4)
    with LargestTensor() as largest:
        parts = memory.match(wanted_ND, ["name 1"])
    assert torch.allclose(parts, whole) and whole.max() > 0
    # where each image has a cosine with each of the memory's, these are 18,000
    assert largest.count <= 90 * 24


def test_a_memory_takes_further_images_and_none_twice():
    torch.manual_seed(0)
    features = torch.randn(40, 24)
    names, tags = [f"name {place % 9}" for place in range(40)], [[f"tag {place % 5}"] for place in range(40)]
    first = some_memory(features[:30], names[:30], tags[:30])
    both = first.extended(features[20:], [*names[20:30], *(f"new {name}" for name in names[30:])], tags[20:])
    assert len(both) == 40 and torch.equal(both.keys[:30], first.keys) and both.names[:9] == first.names
    found = [max(shares, key=shares.get) for shares in both.name_shares(features)]
    assert found == [*names[:30], *(f"new {name}" for name in names[30:])]
    # own tags of a known name come first, and those that it had stay
    more = first.extended(features[30:31], ["name 0"], [["own"]])
    assert more.tags[0] == ["own", *first.tags[0]]


@pytest.mark.parametrize(
    "features, message",
    [
        (torch.randn(1, 8), "a memory of 1 images"),
        (torch.full((3, 8), math.nan), "not finite"),
        (torch.ones(3, 8), "all alike"),
    ],
)
def test_images_that_make_no_memory_are_refused(features, message):
    with pytest.raises(InputError, match=message):
        some_memory(features, ["house"] * len(features))


def test_probabilities_are_means_of_model_and_memory(labeler, processor):
    codes = labeler.encode(noise_images(IMAGES))
    memory = some_memory(labeler.features(codes), ["house", "red apple", "pear"], [["home"], [], ["fruit"]])
    both = ImageLabeler(labeler.model, processor, memory=memory, memory_share=0.25)
    for kind in ("names", "tags"):
        known = getattr(memory, f"{kind[:-1]}_shares")(labeler.features(codes))
        written = getattr(labeler, f"beam_{kind}")(codes, 2)
        found = getattr(both, kind)(codes, 2)
        assert all(len(guesses) == 2 for guesses in found)
        for guesses, of_model, shares in zip(found, written, known, strict=True):
            alone = {guess.text: guess.probability for guess in of_model}
            for guess in guesses:
                expected = 0.75 * alone.get(guess.text, 0) + 0.25 * shares.get(guess.text, 0)
                assert guess.probability == pytest.approx(expected, rel=1e-4)
    queries = ["house", "fruit", "no such"]
    alone, known = labeler.match(codes, queries).exp(), memory.match(labeler.features(codes), queries)
    assert torch.allclose(both.match(codes, queries).exp(), 0.75 * alone + 0.25 * known)
    only = ImageLabeler(labeler.model, processor, memory=memory, memory_share=1.0)
    assert torch.allclose(only.match(codes, queries).exp(), known)
    assert [guesses[0].text for guesses in only.names(codes, 1)] == ["house", "red apple", "pear"]


def test_a_model_alone_tells_of_tags_that_no_near_image_has():
    found = mixed_guesses([[Guess("home", 0.5)], [Guess("home", 0.5)]], [{}, {"fruit": 1.0}], 0.5)
    assert found == [[Guess("home", 0.5)], [Guess("fruit", 0.5), Guess("home", 0.25)]]


def test_features_of_views_are_their_mean(labeler, processor):
    codes = ImageLabeler(labeler.model, processor, views=3).encode(noise_images(2))
    each = torch.stack([labeler.features(codes[:, view]) for view in range(3)])
    assert torch.allclose(labeler.features(codes), each.mean(0), atol=1e-6)


def test_one_image_of_a_name_and_group_is_kept_and_what_is_no_image_told(data, labeler, capsys):
    kind = NamedImages("image", tags="keywords", group="family")
    memory = build_memory(Source("data", str(data), kind), labeler, least_groups=2)
    # rows 0, 3 and 4: the second house of a maker and a name of one maker alone are left out, and so is what is none
    assert [memory.names[number] for number in memory.name_of] == ["house", "house", "red apple"]
    assert dict(zip(memory.names, memory.tags)) == {
        "house": ["home", "building"],
        "red apple": ["fruit"],
        # of one maker alone, so that no image of it is kept
        "pear": ["fruit"],
    }
    assert memory.num_image_names == 2
    said = capsys.readouterr().err
    assert "row 2: left out: image damaged" in said and "left out: 1 of 7 rows, which have no name in 'name'" in said
    every = build_memory(Source("data", str(data), NamedImages("image")), labeler, most=2)
    assert [every.names[number] for number in every.name_of] == ["house", "house", "red apple", "pear"]
    by_name = build_memory(Source("data", str(data), NamedImages("image", tags="name")), labeler)
    assert by_name.tags == [[name] for name in by_name.names]
    streamed = Source("data", str(data), kind, load={"streaming": True})
    assert torch.equal(build_memory(streamed, labeler, least_groups=2).keys, memory.keys)


def test_a_built_memory_is_what_the_commands_name_by(data, model, tmp_path, capsys):
    place = model / MEMORY_FILE
    command = ["build-memory", str(data), "--model", str(model), "--tags", "keywords", "--group", "family"]
    assert moma.main(command) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{place}: 4 images of 3 names")
    first = place.read_bytes()
    assert moma.main(command) == 0 and place.read_bytes() == first
    folder = tmp_path / "icons"
    folder.mkdir()
    noise_images(len(ROWS))[5].save(folder / "five.png")
    capsys.readouterr()
    label = ["label", str(folder), "--model", str(model), "--tags", "1"]
    assert moma.main([*label, "--memory-share", "1"]) == 0
    assert capsys.readouterr().out.startswith("five.png: pear (")
    assert moma.main([*label, "--memory-share", "0"]) == 0
    alone = capsys.readouterr().out
    more = str(tmp_path / "more.safetensors")
    command = ["build-memory", str(data), "--model", str(model), "--output", more, "--extend", str(place)]
    # without groups the second house and the pear, which is known, come
    assert moma.main(command) == 0 and f"{more}: 5 images of 3 names" in capsys.readouterr().out
    assert moma.main([*label, "--memory", more, "--memory-share", "1"]) == 0
    assert capsys.readouterr().out.startswith("five.png: pear (")
    assert moma.main([*label, "--memory", more, "--memory-share", "0"]) == 2
    assert "with --memory-share 0 it is not read" in capsys.readouterr().err
    place.unlink()
    assert moma.main(label) == 0
    assert capsys.readouterr().out == alone


def test_a_memory_of_another_model_is_refused(data, labeler, model, processor, tmp_path, capsys):
    kind = NamedImages("image")
    memory = build_memory(Source("data", str(data), kind), labeler)
    memory.check_fits(*labeler.probe())
    # the same weights in another precision make the same of images
    half = ImageLabeler(caption_model(processor).to(torch.bfloat16), processor)
    memory.check_fits(*half.probe())
    with pytest.raises(InputError, match="made by another processor"):
        memory.check_fits(labeler.probe()[0], "other")
    caption_model(processor, hidden_act="gelu").save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    file = memory.save(tmp_path / "images.safetensors")
    capsys.readouterr()
    status = moma.main(["label", str(tmp_path), "--model", str(tmp_path / "other"), "--memory", str(file)])
    assert status == 2 and f"--memory {str(file)!r}: it was made by another model" in capsys.readouterr().err


@pytest.mark.parametrize("harm", ["cut", "absent", "keys", "packed", "other texts", "numbers", "no metadata"])
def test_a_file_that_is_no_memory_is_refused_by_its_name(tmp_path, harm):
    torch.manual_seed(0)
    file = some_memory(torch.randn(5, 8), list("aabcd")).save(tmp_path / "images.safetensors")
    tensors = load_file(file)
    if harm == "keys":
        tensors["keys"] = tensors["keys"][:, 1:]
    elif harm == "packed":
        tensors["texts"][-9:] = 0
    elif harm == "other texts":
        packed = zlib.compress(json.dumps({"names": [1, 2, 3, 4], "tags": [[]] * 4}).encode())
        tensors["texts"] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    elif harm == "numbers":
        tensors["name_of"] = torch.full_like(tensors["name_of"].long(), 77)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, file, None if harm == "no metadata" else {"processor": "processor"})
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    elif harm == "absent":
        file.unlink()
    with pytest.raises(InputError, match=r"images\.safetensors'(.*is no memory of images|: there is no such file)"):
        ImageMemory.load(file)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--name", "label"], "has no column 'label'"),
        (["--least-groups", "2"], "--least-groups 2: name the column of the groups"),
        (["--output", "memory.bin"], "does not end in .safetensors"),
        (["--group", "family", "--least-groups", "3"], "none of its rows is kept"),
        (["--tags", "family", "--set", "memory.dimensions=1"], "memory.dimensions"),
        (
            ["--extend", "memory.safetensors", "--set", "memory.dimensions=8"],
            "a memory that is extended keeps its own",
        ),
    ],
)
def test_wrong_flags_are_told(data, model, flags, message, capsys):
    try:
        status = moma.main(["build-memory", str(data), "--model", str(model), *flags])
    except SystemExit as error:
        status = error.code
    assert status == 2 and message in capsys.readouterr().err
    assert not (model / MEMORY_FILE).exists()
