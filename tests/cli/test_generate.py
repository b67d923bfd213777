# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers.tiny import tiny_model, tiny_processor
from modeling_moma.cli.generate import parse_arguments, write_rows
from modeling_moma.cli.main import main as moma
from modeling_moma.errors_moma import InputError
from modeling_moma.modeling_moma import MomaForCausalLM


SIDE, CODES = 16, 32


def main(arguments):
    return moma(["generate", *arguments])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    processor = tiny_processor()
    tiny_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def image_file(tmp_path):
    path = tmp_path / "apple.png"
    values = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def copy_folder(folder, target):
    for path in folder.rglob("*"):
        if path.is_file():
            copied = target / path.relative_to(folder)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(path.read_bytes())
    return target


def test_command_draws_an_image(model_folder, tmp_path, capfd):
    output = tmp_path / "new" / "image.png"
    command = ["--model", str(model_folder), "--prompt", "noto: red apple", "--mode", "image"]
    assert main([*command, "--output", str(output)]) == 0
    assert capfd.readouterr().out.split() == [str(output)]
    with Image.open(output) as image:
        assert image.size == (SIDE, SIDE)
    assert [path.name for path in output.parent.iterdir()] == ["image.png"]


def test_several_prompts_give_numbered_images_that_follow_the_seed(model_folder, tmp_path):
    prompts = ["--prompt", "noto: red apple", "--prompt", "apple"]
    pixels = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        call = ["--model", str(model_folder), *prompts, "--output", str(tmp_path / f"{name}.png"), "--seed", str(seed)]
        sampling = ["--set", "sampling.temperature=0.9", "sampling.top_k=20", "sampling.top_p=0.9"]
        sampling.append("sampling.guidance_scale=2")
        assert main([*call, *sampling]) == 0
        pixels[name] = [Image.open(tmp_path / f"{name}-{index}.png").tobytes() for index in range(2)]
    assert pixels["a"] == pixels["b"] != pixels["c"]


def test_images_are_drawn_as_the_model_has_it_where_no_flag_says_how(model_folder, tmp_path):
    own = copy_folder(model_folder, tmp_path / "own")
    model = MomaForCausalLM.from_pretrained(own)
    sampling = {"do_sample": True, "temperature": 0.5, "top_k": 4, "guidance_scale": 2.0}
    model.generation_config.image_sampling = sampling
    model.save_pretrained(own)
    flags = ["--set", "sampling.temperature=0.5", "sampling.top_k=4", "sampling.guidance_scale=2"]
    pixels = {}
    for name, folder, more in (
        ("a", own, []),
        ("b", model_folder, flags),
        ("c", own, ["--set", "sampling.guidance_scale=1"]),
    ):
        call = ["--model", str(folder), "--prompt", "apple", "--output", str(tmp_path / f"{name}.png"), *more]
        assert main(call) == 0
        pixels[name] = Image.open(tmp_path / f"{name}.png").tobytes()
    assert main(["--model", str(model_folder), "--prompt", "apple", "--output", str(tmp_path / "d.png")]) == 0
    assert pixels["a"] == pixels["b"] and pixels["c"] == Image.open(tmp_path / "d.png").tobytes() != pixels["a"]


def test_of_candidates_one_is_written_for_each_prompt(model_folder, tmp_path):
    prompts = ["noto: red apple", "apple"]
    command = ["--model", str(model_folder), "--prompt", prompts[0], "--prompt", prompts[1]]
    assert main([*command, "--candidates", "3", "--output", str(tmp_path / "one.png")]) == 0
    written = [Image.open(tmp_path / f"one-{index}.png").tobytes() for index in range(2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one-0.png", "one-1.png"]
    # the same three images of each, one by one
    rows = [word for prompt in prompts for word in ["--prompt", prompt] * 3]
    assert main(["--model", str(model_folder), *rows, "--output", str(tmp_path / "all.png")]) == 0
    drawn = [Image.open(tmp_path / f"all-{index}.png").tobytes() for index in range(6)]
    assert written[0] in drawn[:3] and written[1] in drawn[3:]


def test_images_are_captioned_one_line_each(model_folder, image_file, capsys):
    call = ["--model", str(model_folder), "--image", str(image_file), "--image", str(image_file)]
    assert main([*call, "--prompt", "noto:", "--set", "sampling.num_beams=2", "sampling.max_new_tokens=4"]) == 0
    first, second, *rest = capsys.readouterr().out.split("\n")
    assert first == second and rest == [""]


def test_interleaved_output_is_written_or_said_to_be_missing(model_folder, image_file, tmp_path, capsys):
    call = ["--model", str(model_folder), "--image", str(image_file), "--mode", "interleaved"]
    assert main([*call, "--output", str(tmp_path / "out.png")]) == 0
    capsys.readouterr()
    # no room for one
    assert main([*call, "--output", str(tmp_path / "none.png"), "--set", "sampling.max_new_tokens=2"]) == 0
    assert f"no image came, and '{tmp_path}/none.png' is not written" in capsys.readouterr().err
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("mode, output", [("image", "x.mpg"), ("interleaved", "x"), ("audio", "x.png")])
def test_an_output_of_a_wrong_ending_is_told_before_anything_is_loaded(mode, output):
    with pytest.raises(InputError, match="^--output: "):
        parse_arguments(["--model", "m", "--prompt", "a", "--mode", mode, "--output", output])


@pytest.mark.parametrize("part, file", [("model", "model.safetensors"), ("tokenizer", "vq_model/model.safetensors")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_checkpoint_with_non_finite_weights_is_refused_by_name(model_folder, tmp_path, capsys, part, file, value):
    folder = copy_folder(model_folder, tmp_path / "broken")
    tensors = load_file(folder / file)
    name = next(name for name in sorted(tensors) if tensors[name].is_floating_point() and tensors[name].ndim > 1)
    tensors[name].view(-1)[3] = value
    save_file(tensors, folder / file, metadata={"format": "pt"})
    assert main(["--model", str(folder), "--prompt", "apple", "--output", str(tmp_path / "p.png")]) == 2
    error = capsys.readouterr().err
    assert f"the tensor {name!r} holds NaN or infinite values (1 of" in error
    assert not (tmp_path / "p.png").exists()


def test_truncated_image_ends_with_a_message_and_no_traceback(model_folder, image_file, capfd):
    image_file.write_bytes(image_file.read_bytes()[:300])
    assert main(["--model", str(model_folder), "--image", str(image_file)]) == 2
    error = capfd.readouterr().err
    assert "apple.png" in error and "truncated" in error and "Traceback" not in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--prompt, --image, --audio: give at least one"),
        (
            ["--prompt", "a", "--prompt", "b", "--image", "x", "--image", "y", "--image", "z"],
            "--prompt: given 2 times",
        ),
        (["--prompt", "a", "--output", "image"], "--output: 'image' has no ending"),
        (["--prompt", "a", "--output", "x.mpg"], "cannot be written as .mpg (MPEG)"),
        (["--prompt", "a", "--output", "x.xbm"], "cannot be written as .xbm (XBM)"),
        (["--prompt", "a", "--output", "x.h5"], "cannot be written as .h5 (HDF5)"),
        (["--prompt", "a", "--output", "/proc/x.png"], "--output: nothing can be written into '/proc'"),
        (["--prompt", "a", "--set", "sampling.max_new_tokens=5"], "needs 18 new tokens, but there is room for 5"),
        (["--image", "missing.png"], "missing.png"),
        (["--image", "http://127.0.0.1:1/x.png"], "Connection refused"),
        (["--image", "http://[::1/"], "images: 'http://[::1/' cannot be fetched"),
        (["--prompt", "apple " * 3000, "--mode", "text"], "leaves no room for 1 new token"),
        (["--prompt", "a \udcff"], r"--prompt 'a \udcff': it is no text in UTF-8 (character 2)"),
        (
            ["--prompt", "a", "--set", "sampling.temperature=1e-310"],
            "sampling.temperature = 1e-310: it is below 1e-06",
        ),
        (
            ["--prompt", "a", "--mode", "text", "--set", "sampling.top_k=5"],
            "sampling.top_k = 5: nothing is sampled here",
        ),
        (
            ["--prompt", "a", "--set", "sampling.temperature=0", "sampling.top_p=0.9"],
            "sampling.top_p = 0.9: nothing is sampled here",
        ),
        (
            ["--prompt", "a", "--candidates", "2", "--set", "sampling.num_beams=2"],
            "--candidates 2: they would be alike",
        ),
        (["--prompt", "<image>"], "images: the number of <image> tokens"),
        (["--prompt", "a", "--mode", "text", "--candidates", "2"], "--candidates 2: only images are chosen"),
        (["--prompt", "a", "--prompt", " ", "--candidates", "2"], "--candidates 2: images are chosen by the words"),
        (
            ["--image", "x.png", "--mode", "image", "--candidates", "2"],
            "--candidates 2: images are chosen by the words",
        ),
    ],
)
def test_bad_arguments_end_with_a_message(model_folder, capsys, arguments, message):
    assert main(["--model", str(model_folder), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["image", "interleaved"])
def test_where_nothing_can_be_written_is_found_before_anything_is_drawn(tmp_path, capsys, mode):
    (tmp_path / "folder.png").mkdir()
    arguments = ["--model", str(tmp_path / "no model is asked for"), "--prompt", "a", "--mode", mode]
    assert main([*arguments, "--output", str(tmp_path / "folder.png")]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_a_numbered_output_that_cannot_be_written_is_found_before_anything_is_drawn(tmp_path, capsys):
    (tmp_path / "image-1.png").mkdir()
    arguments = ["--model", str(tmp_path / "no model is asked for"), "--prompt", "a", "--prompt", "b"]
    assert main([*arguments, "--output", str(tmp_path / "image.png")]) == 2
    assert "image-1.png' is a folder" in capsys.readouterr().err


def test_one_image_that_cannot_be_written_loses_no_other(tmp_path, capsys):
    rows = [[Image.new("RGB", (4, 4), colour), "said"] for colour in ("red", "green", "blue")]
    (tmp_path / "image-1.png").mkdir()
    with pytest.raises(InputError, match="--output: 1 of 3 could not be written: image-1.png: .*"):
        write_rows(rows, tmp_path / "image.png", "PNG", ".wav", None)
    assert {path.name for path in tmp_path.iterdir()} == {"image-0.png", "image-1.png", "image-2.png"}
    assert capsys.readouterr().out.split() == [
        *(str(tmp_path / "image-0.png"), "said", "said", str(tmp_path / "image-2.png"), "said")
    ]


def test_the_address_that_is_not_reached_is_named(model_folder, image_file, capsys):
    # nothing listens there
    images = ["--image", str(image_file), "--image", "http://127.0.0.1:9/apple.png"]
    assert main(["--model", str(model_folder), *images]) == 2
    assert "--image: <urlopen error 'http://127.0.0.1:9/apple.png' cannot be fetched" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, values",
    [
        ("--set=sampling.num_beams", ["0", "-1", "two"]),
        ("--set=sampling.max_new_tokens", ["0", "-3"]),
        ("--set=sampling.temperature", ["-1", "nan", "inf", "1e300"]),
        ("--set=sampling.top_k", ["-1"]),
        ("--set=sampling.top_p", ["1.5", "-0.1", "nan"]),
        ("--set=sampling.guidance_scale", ["nan", "inf", "-2", "1e300"]),
        ("--seed", ["-1", "4294967296"]),
    ],
)
def test_numbers_out_of_range_are_named(model_folder, capsys, option, values):
    for value in values:
        with pytest.raises(SystemExit) as ended:
            main(["--model", str(model_folder), "--prompt", "a", f"{option}={value}"])
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert option.removeprefix("--set=") in error and value in error


@pytest.mark.parametrize("mode", ["image", "interleaved"])
@pytest.mark.parametrize("prompt", ["<|begin_image|>", "a<|begin_image|><|image_3|><|image_4|>"])
def test_an_image_that_the_prompt_begins_is_finished_and_written(model_folder, tmp_path, prompt, mode):
    call = ["--model", str(model_folder), "--prompt", prompt, "--mode", mode, "--set", "sampling.max_new_tokens=20"]
    assert main([*call, "--output", str(tmp_path / "image.png")]) == 0
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (SIDE, SIDE)


def test_of_a_prompt_with_an_image_the_drawn_one_is_written(model_folder, image_file, tmp_path):
    output = tmp_path / "image.png"
    call = ["--model", str(model_folder), "--image", str(image_file), "--mode", "image", "--output", str(output)]
    assert main(call) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apple.png", "image.png"]


def test_defect_keeps_its_traceback(model_folder, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("none of the arguments did this")

    monkeypatch.setattr(MomaForCausalLM, "generate", fail)
    with pytest.raises(ValueError, match="none of the arguments"):
        main(["--model", str(model_folder), "--prompt", "a", "--mode", "text"])


def test_missing_model_ends_with_a_message(tmp_path, capsys):
    assert main(["--model", str(tmp_path / "nothing"), "--prompt", "a"]) == 2
    assert "nothing" in capsys.readouterr().err
