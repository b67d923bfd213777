# SPDX-License-Identifier: Apache-2.0
"""A third modality through every door: the commands from a recipe to a sound, pipeline, chats."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from transformers import AutoProcessor, pipeline

from helpers.sounds import RATE, THREE, as_file, processor_of_sounds, tiny_library_model, tone
from helpers.tiny import noise_images, tiny_model, tiny_processor, tiny_vq_model
from modeling_moma.cli.main import main as moma
from tokenization.processor_errors_moma import InputError


TONES = {"low": 400, "middle": 900, "high": 1900}


@pytest.fixture(scope="module")
def processor():
    return processor_of_sounds()


@pytest.fixture(scope="module")
def model(processor):
    return tiny_model(processor, **THREE)


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("moma")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sound_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("sounds") / "tone.wav"
    path.write_bytes(as_file(tone(500)))
    return str(path)


def greedy(model, processor, inputs, **kwargs):
    return model.generate(**inputs, do_sample=False, max_new_tokens=8, **kwargs)[:, inputs["input_ids"].shape[1] :]


def test_a_pipeline_hears_and_speaks(model, processor, sound_file):
    pipe = pipeline("any-to-any", model=model, processor=processor)
    inputs = processor(text=["<audio>red"], audio=[sound_file], return_tensors="pt")
    expected = processor.batch_decode(greedy(model, processor, inputs), skip_special_tokens=True)[0]
    heard = pipe(audio=sound_file, text="<audio>red", max_new_tokens=8, do_sample=False, return_full_text=False)
    assert heard[0]["generated_text"] == expected
    again = pipe(audio=read(sound_file), text="<audio>red", max_new_tokens=8, do_sample=False, return_full_text=False)
    assert again == heard
    (said,) = pipe(text="red", generation_mode="audio", generate_kwargs={"do_sample": False, "max_new_tokens": 30})
    prompt = processor(text=["red"], return_tensors="pt")
    ids = model.generate(**prompt, generation_mode="audio", do_sample=False, max_new_tokens=30)
    (codes,) = model.decode_modality_tokens(ids, "audio")
    assert np.array_equal(said["generated_audio"], processor.decode_items("audio", [codes])[0])
    # the sound of the prompt is not the answer
    speak = {"do_sample": False, "max_new_tokens": 30}
    (both,) = pipe(audio=sound_file, text="<audio>red", generation_mode="audio", generate_kwargs=speak)
    assert len(both["generated_audio"]) > 0
    with pytest.raises(ValueError, match="a row of token ids has no audio"):
        processor.post_process_multimodal_output(prompt["input_ids"], generation_mode="audio")


def read(path) -> np.ndarray:
    return soundfile.read(path, dtype="float32")[0]


def test_chats_hear(model, processor, sound_file):
    image = noise_images(1)[0]
    parts = [
        {"type": "text", "text": "hear "},
        {"type": "audio", "audio": sound_file},
        {"type": "image", "image": image},
    ]
    chat = [{"role": "user", "content": parts}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    (expected,) = processor.encode_items("audio", [sound_file])
    shown = [part for part in processor.decode_parts(inputs["input_ids"][0]) if not isinstance(part, str)]
    assert np.array_equal(shown[0], processor.decode_items("audio", [expected])[0]) and shown[1].size == (16, 16)
    samples, content = read(sound_file), Path(sound_file).read_bytes()
    ways = [{"url": sound_file}, {"path": sound_file}, {"audio": None, "path": Path(sound_file)}]
    given = [samples, torch.from_numpy(samples), {"array": samples, "sampling_rate": RATE}, content]
    given += [base64.b64encode(content).decode(), "data:application/ogg;base64," + base64.b64encode(content).decode()]
    for way in [*ways, *({"audio": sound} for sound in given)]:
        other = [{"role": "user", "content": [parts[0], {"type": "audio", **way}, parts[2]]}]
        again = processor.apply_chat_template(other, add_generation_prompt=True, tokenize=True, return_dict=True)
        assert again["input_ids"][0] == inputs["input_ids"][0].tolist()
    pipe = pipeline("any-to-any", model=model, processor=processor)
    (answer,) = pipe(text=chat, max_new_tokens=8, do_sample=False, return_full_text=False)
    ids = greedy(model, processor, inputs)
    assert answer["generated_text"] == processor.batch_decode(ids, skip_special_tokens=True)[0]
    with pytest.raises(Exception, match="must be of type text, image or audio, got video"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}])


@pytest.mark.parametrize(
    "part, message",
    [
        ({"path": "nowhere.wav"}, r"^conversation\[1\]\['content'\]\[0\]: sound missing: .* file 'nowhere.wav'"),
        ({"audio": None}, "the number of <audio> tokens .* got 1 and 0"),
    ],
)
def test_a_chat_names_the_part_whose_sound_cannot_be_read(processor, part, message):
    chat = [{"role": "system", "content": "hear"}, {"role": "user", "content": [{"type": "audio", **part}]}]
    with pytest.raises(InputError, match=message):
        processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    with pytest.raises(InputError, match=message.replace("^conversation", r"^conversation\[1\]")):
        processor.apply_chat_template([[chat[0]], chat], tokenize=True, return_dict=True)
    assert chat[1]["content"] == [{"type": "audio", **part}]


def write_recipe(folder) -> str:
    """Tones with their names, and drawings with theirs."""
    lines, rng = [], np.random.default_rng(0)
    for index in range(48):
        name = list(TONES)[index % 3]
        sound = tone(TONES[name] * rng.uniform(0.95, 1.05), rng.uniform(0.04, 0.06))
        (folder / f"{index}.wav").write_bytes(as_file(sound))
        noise_images(3)[index % 3].save(folder / f"{index}.png")
        lines.append({"audio": f"{index}.wav", "image": f"{index}.png", "name": name})
    (folder / "tones.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data, sizes = {"data": str(folder / "tones.jsonl"), "text": "name"}, dict.fromkeys(("text", "image", "audio"), 48)
    codec = {"num_codes": 16, "sampling_rate": RATE, "hop_length": 40, "win_length": 160, "num_mels": 8}
    model = {"hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model |= {"norm_placement": "pre", "num_experts": dict.fromkeys(sizes, 2)}
    trainer = {"max_steps": 100, "per_device_train_batch_size": 16, "learning_rate": 5e-3, "logging_steps": 50}
    recipe = {
        "sources": {"tones": {**data, "audio": "audio", "audio_first": 1.0}, "drawings": {**data, "image": "image"}},
        "data": {"sequence_length": 64, "packed": True},
        "processor": {"vocab_size": 280},
        "audio_tokenizer": {**codec, "frames_per_code": 2},
        "model": {**model, "max_position_embeddings": 64, "shared_expert_intermediate_size": sizes},
        "trainer": trainer,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return str(folder / "recipe.yaml")


def test_commands_lead_from_a_recipe_to_a_sound(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    tiny_vq_model().save_pretrained(tmp_path / "vq")
    place = {name: str(tmp_path / name) for name in ("vq", "audio", "processor", "tokens", "run")}
    assert moma(["train-audio-tokenizer", recipe, "--output", place["audio"]]) == 0
    assert "16 codes, 100.0 a second, learnt from" in capsys.readouterr().out
    facts = json.loads((tmp_path / "audio" / "metrics.json").read_text())
    assert facts["sounds"] + facts["held_out_sounds"] == 48 and 0 < facts["train_db"] < 6 and facts["left_out"] == {}
    build = ["build-processor", recipe, "--image-tokenizer", place["vq"], "--output", place["processor"]]
    assert moma([*build, "--audio-tokenizer", place["audio"]]) == 0
    assert "16 of them codes of audio" in capsys.readouterr().out
    paths = ["--processor", place["processor"], "--tokens", place["tokens"]]
    tokenize = ["tokenize", recipe, "--processor", place["processor"], "--output", place["tokens"]]
    assert moma([*tokenize, "--processes", "1"]) == 0
    assert "| source | documents | text tokens | image tokens | audio tokens |" in capsys.readouterr().out
    assert moma(["pretrain", recipe, *paths, "--output", place["run"]]) == 0
    capsys.readouterr()
    heard = []
    for name, frequency in TONES.items():
        (tmp_path / f"{name}.wav").write_bytes(as_file(tone(frequency, 0.05)))
        assert moma(["generate", "--model", place["run"], "--audio", str(tmp_path / f"{name}.wav")]) == 0
        heard.append(capsys.readouterr().out.strip())
    assert heard == list(TONES)
    output = str(tmp_path / "said" / "sound.flac")
    ask = ["generate", "--model", place["run"], "--prompt", "low", "--mode", "audio"]
    ask += ["--set", "sampling.max_new_tokens=40"]
    assert moma([*ask, "--prompt", "high", "--output", output]) == 0
    samples, rate = soundfile.read(tmp_path / "said" / "sound-1.flac")
    assert rate == RATE and 0 < len(samples) <= 40 * 80
    measure = ["evaluate", "--model", place["run"], "--tokens", place["tokens"], "--split", "validation"]
    assert moma([*measure, "--measures", "losses", "--output", str(tmp_path / "report.json")]) == 0
    assert "audio" in capsys.readouterr().out


def test_library_codecs_are_built_into_a_processor(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    tiny_vq_model().save_pretrained(tmp_path / "vq")
    tiny_library_model("dac").save_pretrained(tmp_path / "dac")
    build = ["build-processor", recipe, "--image-tokenizer", str(tmp_path / "vq"), "--output", str(tmp_path / "built")]
    build += ["--audio-tokenizer", str(tmp_path / "dac"), "--set", "processor.audio_codebooks=3"]
    assert moma(build) == 0 and "48 of them codes of audio" in capsys.readouterr().out
    assert AutoProcessor.from_pretrained(tmp_path / "built").codecs["audio"].num_codebooks == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--audio", "nowhere.wav"], "sound missing: there is no file 'nowhere.wav'"),
        (["--prompt", "red", "--mode", "audio", "--output", "sound.png"], "no ending of a format of sounds"),
        (["--prompt", "red", "--mode", "audio", "--candidates", "2"], "only images are chosen"),
        ([], "--prompt, --image, --audio: give at least one of them"),
    ],
)
def test_bad_arguments_are_one_line(folder, arguments, message, capsys):
    assert moma(["generate", "--model", str(folder), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("error: ")


def test_models_without_sounds_say_so(tmp_path, capsys):
    processor = tiny_processor()
    tiny_model(processor).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for arguments in (
        ["--audio", "a.wav"],
        ["--mode", "audio", "--prompt", "red", "--output", str(tmp_path / "a.wav")],
    ):
        assert moma(["generate", "--model", str(tmp_path), *arguments]) == 2
        assert "has no codec of sounds; it knows text, image" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_codes": 10**6}, "num_codes = 1000000, and the .* sounds that were read have only"),
        ({"hop_length": 0}, "hop_length"),
    ],
)
def test_settings_of_an_audio_tokenizer_are_checked(fields, message, tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    content = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    content["audio_tokenizer"] = fields
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    assert moma(["train-audio-tokenizer", recipe, "--output", str(tmp_path / "audio")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "audio").exists()


def test_a_recipe_without_sounds_is_refused(tmp_path, capsys):
    recipe = {"sources": {"texts": {"data": str(tmp_path / "t.txt"), "text": "text"}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert moma(["train-audio-tokenizer", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "a")]) == 2
    assert "has no source with sounds, but {'texts': 'text'}" in capsys.readouterr().err
