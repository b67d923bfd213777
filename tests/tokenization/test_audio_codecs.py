# SPDX-License-Identifier: Apache-2.0
"""Sounds as people have them, and codecs of sounds: a small one by mel spectrograms, and those of Transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import AutoProcessor, DacFeatureExtractor, EncodecConfig, EncodecFeatureExtractor, EncodecModel
from transformers.models.clap import ClapConfig

from helpers.absent import WITHOUT_PACKAGES
from helpers.forked_python import run_python
from helpers.sounds import (
    MELS,
    RATE,
    as_file,
    processor_of_sounds,
    tiny_library_model,
    tiny_mel_codec,
    tone,
)
from tokenization.audio_codecs_moma import LibraryAudioCodec, MelCodec, load_audio_codec
from tokenization.audio_input_moma import read_sound


LIBRARY = ("encodec", "dac", "mimi")
STEP = MELS["hop_length"] * MELS["frames_per_code"]


@pytest.fixture(scope="module")
def codec():
    return tiny_mel_codec()


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_files_of_several_formats_are_read(kind, tmp_path):
    content = as_file(tone(440, 0.5), kind=kind)
    (tmp_path / "sound.file").write_bytes(content)
    ways = [content, str(tmp_path / "sound.file"), tmp_path / "sound.file", {"bytes": content, "path": None}]
    ways += [memoryview(content), bytearray(content), {"bytes": memoryview(content), "path": None}]
    ways += [{"bytes": None, "path": str(tmp_path / "sound.file")}]
    sounds = [read_sound(way, RATE) for way in ways]
    for sound in sounds:
        assert sound.dtype == np.float32 and np.array_equal(sound, sounds[0])
    spectrum = np.abs(np.fft.rfft(sounds[0][:4000]))
    assert abs(spectrum.argmax() * RATE / 4000 - 440) < 5


def test_samples_are_taken_as_they_are_or_resampled():
    samples = tone(440, 0.5)
    assert np.array_equal(read_sound(samples, RATE), samples)
    assert np.array_equal(read_sound(torch.from_numpy(samples), RATE), samples)
    assert np.array_equal(read_sound({"array": samples, "sampling_rate": RATE}, RATE), samples)
    rounded = torch.from_numpy(samples).bfloat16()
    assert np.array_equal(read_sound(rounded, RATE), rounded.float().numpy())
    whole = read_sound((samples * 32767).astype(np.int16), RATE)
    assert np.abs(whole - samples).max() < 1e-4
    doubled = read_sound({"array": tone(440, 0.5, 2 * RATE), "sampling_rate": 2 * RATE}, RATE)
    assert len(doubled) == len(samples) and np.abs(doubled - samples)[200:-200].max() < 1e-2
    assert np.abs(read_sound(as_file(tone(440, 0.5, 11025), 11025), RATE) - samples)[200:-200].max() < 1e-2


def test_a_flac_that_tells_no_length_is_read_to_its_end():
    content = as_file(np.stack([tone(440), np.zeros_like(tone(440))], axis=1), kind="FLAC")
    # the number of samples in its header
    streamed = content[:21] + bytes([content[21] & 0xF0, 0, 0, 0, 0]) + content[26:]
    assert np.array_equal(read_sound(streamed, RATE), read_sound(content, RATE))
    with pytest.raises(ValueError, match=f"sound too large: at least 798 samples, over {2 * len(tone(440)) - 3}"):
        read_sound(streamed, RATE, max_samples=2 * len(tone(440)) - 3)
    content = as_file(np.zeros(601 * RATE, np.int16), kind="FLAC")
    with pytest.raises(ValueError, match="sound too long: at least 600 s, over 600"):
        read_sound(content[:21] + bytes([content[21] & 0xF0, 0, 0, 0, 0]) + content[26:], RATE)


def test_channels_are_averaged_and_roots_are_folders(tmp_path):
    both = np.stack([tone(440), np.zeros_like(tone(440))], axis=1)
    (tmp_path / "two.wav").write_bytes(as_file(both))
    assert np.abs(read_sound("two.wav", RATE, tmp_path) - tone(440) / 2).max() < 1e-4


@pytest.mark.parametrize(
    "item, message",
    [
        (None, "sound missing"),
        (b"", "sound missing"),
        ({"bytes": None, "path": None}, "sound missing"),
        ("nowhere.wav", "sound missing: there is no file 'nowhere.wav'"),
        (b"RIFF, and then nothing", "sound damaged: 22 bytes cannot be decoded"),
        (as_file(tone(440))[:30], "sound damaged"),
        (np.zeros(0, np.float32), "sound empty"),
        (np.array([0.1, np.nan]), "sound damaged: some samples are not finite"),
        (np.zeros((2, 100)), r"samples have one axis .* shape \(2, 100\)"),
        (np.array(["a"]), "samples have one axis and are numbers"),
        (np.zeros(601 * RATE, np.int16), "sound too long: 601 s, over 600"),
        (as_file(np.zeros(601 * RATE, np.int16), kind="FLAC"), "sound too long: 601 s, over 600"),
        (as_file(np.zeros(600, np.int16), rate=1), "sound not readable: sampling_rate = 1: expected 1,000 to 384,000"),
        (as_file(np.zeros(600, np.int16), rate=384_001), "sound not readable: sampling_rate = 384001"),
        ({"array": np.zeros(600), "sampling_rate": 1}, "sound not readable: sampling_rate = 1:"),
        ({"array": np.zeros(600), "sampling_rate": 0}, "sound not readable: sampling_rate = 0:"),
        (
            {"array": np.zeros(600), "sampling_rate": "16000"},
            "sampling_rate = '16000' is no number",
        ),
        ("UklGR" + "A" * 5000, r"sound missing: 'UklGRA+' is no path .*File name too long\); is it .* in base64\?"),
        (as_file(tone(440) * 32767, subtype="FLOAT"), r"sound not readable: float samples are in .* reach 1\d{4}"),
        (tone(440) * 32767, r"sound not readable: float samples are in \[-1, 1\], and these reach 1\d{4}"),
        ((tone(440) * 32767).astype(np.int16).tolist(), "sound not readable: samples of int64 tell no range"),
        ((16000, tone(440)), "sound not readable: a tuple is no row of samples"),
    ],
)
def test_what_is_no_sound_is_refused(item, message):
    with pytest.raises(ValueError, match=message):
        read_sound(item, RATE)


def test_samples_count_at_the_rate_that_is_asked_for():
    content = as_file(np.zeros(1_000, np.int16), rate=1_000)
    assert len(read_sound(content, 16_000, max_samples=16_000)) == 16_000
    with pytest.raises(ValueError, match="sound too large: 16,000 samples, over 15,999"):
        read_sound(content, 16_000, max_samples=15_999)


@hypothesis_settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 2000), seed=st.integers(0, 99))
def test_codes_of_a_sound_follow_from_its_length(codec, length, seed):
    samples = np.random.default_rng(seed).normal(0, 0.1, length).astype(np.float32)
    (codes,) = codec.encode([samples])
    assert len(codes) == -(-length // STEP)
    assert all(0 <= code < codec.num_codes for code in codes)
    decoded = codec.decode(codes)
    assert decoded.shape == (len(codes) * STEP,) and np.isfinite(decoded).all() and np.abs(decoded).max() <= 1


def test_neighbours_and_loudness_change_no_code(codec):
    sounds = [tone(300, 0.1), tone(1200, 0.07), tone(2500, 0.2)]
    together = codec.encode(sounds)
    assert together == [codec.encode([sound])[0] for sound in sounds] == codec.encode([sound / 7 for sound in sounds])
    assert len({tuple(codes[:5]) for codes in together}) == 3
    assert len(set(codec.encode([np.zeros(400, np.float32)])[0])) == 1


@pytest.mark.parametrize("frequency", [500, 1000, 2000])
def test_a_tone_comes_back_at_its_pitch(frequency):
    codec = tiny_mel_codec(400, num_mels=40, hop_length=50, win_length=320)
    decoded = codec.decode(codec.encode([tone(frequency, 0.5)])[0])[800:3200]
    spectrum = np.abs(np.fft.rfft(decoded * np.hanning(len(decoded))))
    assert abs(spectrum.argmax() * RATE / len(decoded) / frequency - 1) < 0.06


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"hop_length": 100}, "hop_length = 100, win_length = 160: a frame must reach over two hops"),
        ({"num_mels": 200}, "num_mels: 200 bands are more than win_length=160 samples"),
    ],
)
def test_settings_that_make_no_codec_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MelCodec.untrained(**{**MELS, **settings})


def test_codebooks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="codebook: it holds NaN or infinite values"):
        MelCodec(torch.full((4, 16), torch.nan), **MELS)
    with pytest.raises(ValueError, match=r"codebook: its shape is \(4, 7\).* must be \(num_codes, 16\)"):
        MelCodec(torch.zeros(4, 7), **MELS)


@pytest.mark.parametrize("name", LIBRARY)
def test_codes_and_samples_are_those_of_the_library(name):
    model = tiny_library_model(name)
    sound = np.random.default_rng(0).normal(0, 0.3, 800).astype(np.float32)
    codec = LibraryAudioCodec(model, 2)
    inputs = torch.from_numpy(sound)[None, None]
    if name == "encodec":
        inputs = EncodecFeatureExtractor(sampling_rate=RATE)(sound, sampling_rate=RATE, return_tensors="pt")[
            "input_values"
        ]
        codes = model.encode(inputs, bandwidth=8.0).audio_codes[0]
        decoded = model.decode(codes[None], [None]).audio_values
    elif name == "dac":
        extractor = DacFeatureExtractor(sampling_rate=RATE, hop_length=8)
        inputs = extractor(sound, sampling_rate=RATE, return_tensors="pt")["input_values"]
        codes = model.encode(inputs, n_quantizers=2).audio_codes
        decoded = model.decode(audio_codes=codes).audio_values
    else:
        codes = model.encode(inputs, num_quantizers=2).audio_codes
        decoded = model.decode(codes).audio_values
    (own,) = codec.encode([sound])
    # frame by frame, the second codebook behind the first
    assert own == (codes[0].T + torch.tensor([0, 16])).flatten().tolist()
    assert len(set(own)) > 2 and codec.num_codes == 32 and codec.sampling_rate == RATE
    assert np.abs(codec.decode(own) - decoded.flatten().detach().numpy()).max() < 1e-6
    # what is generated may miss its place
    assert np.array_equal(codec.decode([*own, 3]), codec.decode(own))
    assert np.array_equal(codec.decode([code % 16 for code in own]), codec.decode(own))


@pytest.mark.parametrize("name", LIBRARY)
def test_sounds_of_a_few_samples_have_codes(name):
    codec = LibraryAudioCodec(tiny_library_model(name))
    for length in (1, 7, 8, 9):
        (codes,) = codec.encode([tone(440)[:length] + 0.1])
        assert codes and len(codec.decode(codes)) >= length


@pytest.mark.parametrize("name", ["mel", *LIBRARY])
def test_codes_of_sounds_do_not_depend_on_autocast(name):
    codec = tiny_mel_codec() if name == "mel" else LibraryAudioCodec(tiny_library_model(name))
    noise = [*np.random.default_rng(0).normal(0, 0.1, (8, 2 * RATE)).astype(np.float32)]
    codes = codec.encode(noise)
    with torch.autocast("cpu", torch.bfloat16):
        assert codec.encode(noise) == codes


def test_a_default_device_is_not_where_spectrograms_are_made(codec):
    codes = codec.encode([tone(440)])
    samples = codec.decode(codes[0])
    with torch.device("meta"):
        assert codec.encode([tone(440)]) == codes
        assert np.array_equal(codec.decode(codes[0]), samples)


def test_library_models_that_do_not_fit_are_refused():
    chunked = tiny_library_model("encodec")
    chunked.config.chunk_length_s = 0.1
    with pytest.raises(ValueError, match="EncodecModel has chunk_length_s=0.1"):
        LibraryAudioCodec(chunked)
    with pytest.raises(ValueError, match=r"num_codebooks: 4 is none that this DacModel can use, \[1, 2, 3\]"):
        LibraryAudioCodec(tiny_library_model("dac"), 4)
    with pytest.raises(ValueError, match="one frame of this codec has 3 codes, got 2 in all"):
        LibraryAudioCodec(tiny_library_model("dac"), 3).decode([1, 17])
    stereo = EncodecConfig(
        audio_channels=2,
        normalize=True,
        num_filters=4,
        hidden_size=8,
        codebook_dim=8,
        upsampling_ratios=[2],
        num_lstm_layers=1,
        target_bandwidths=[3.0],
        sampling_rate=100,
    )
    with pytest.raises(ValueError, match="audio_channels=2, normalize=True"):
        LibraryAudioCodec(EncodecModel(stereo))
    with pytest.raises(TypeError, match="Linear gives no codes .* MelCodec, EncodecModel, DacModel, MimiModel"):
        LibraryAudioCodec(torch.nn.Linear(1, 1))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["mel", *LIBRARY])
def test_saved_and_loaded_codecs_give_the_same(name, tmp_path):
    codec = tiny_mel_codec() if name == "mel" else LibraryAudioCodec(tiny_library_model(name), 2)
    processor = processor_of_sounds(codec)
    processor.save_pretrained(tmp_path)
    # who may read the settings may read the weights
    assert len({path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}) == 1
    loaded = AutoProcessor.from_pretrained(tmp_path)
    sounds = [tone(440, 0.1), tone(900, 0.03)]
    codes = processor.encode_items("audio", sounds)
    assert loaded.encode_items("audio", sounds) == codes
    for first, second in zip(loaded.decode_items("audio", codes), processor.decode_items("audio", codes)):
        assert np.array_equal(first, second)
    assert loaded.codecs["audio"].sampling_rate == RATE
    again = load_audio_codec(tmp_path / "audio_codec")
    assert type(again) is type(codec) and again.encode(sounds) == codes


def test_codecs_are_loaded_from_folders_of_the_library(tmp_path):
    tiny_library_model("dac").save_pretrained(tmp_path / "dac")
    codec = load_audio_codec(tmp_path / "dac", 3)
    assert codec.num_codes == 48 and load_audio_codec(tmp_path / "dac").num_codes == 16
    tiny_mel_codec().save_pretrained(_made(tmp_path / "mel"))
    with pytest.raises(ValueError, match="num_codebooks: 2 of the codec in .*, which has one"):
        load_audio_codec(tmp_path / "mel", 2)
    ClapConfig().save_pretrained(tmp_path / "clap")
    with pytest.raises(TypeError, match="a model of type 'clap' gives no codes"):
        load_audio_codec(tmp_path / "clap")


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


LOAD_ALONE = """
import sys
import numpy as np
from transformers import AutoProcessor

processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "tokenization" not in sys.modules and "transformers_modules" in type(processor).__module__
print(processor(text=["<audio>"], audio=[np.linspace(-0.5, 0.5, 400, dtype=np.float32)])["input_ids"][0])
"""


@pytest.mark.parametrize("name", ["mel", "dac"])
def test_a_processor_of_sounds_is_loaded_without_the_package(name, tmp_path):
    codec = tiny_mel_codec() if name == "mel" else LibraryAudioCodec(tiny_library_model(name), 2)
    processor = processor_of_sounds(codec)
    processor.save_pretrained(tmp_path)
    alone = run_python(["-P", "-c", WITHOUT_PACKAGES + LOAD_ALONE, tmp_path], cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr[-3000:]
    ids = processor(text=["<audio>"], audio=[np.linspace(-0.5, 0.5, 400, dtype=np.float32)])["input_ids"][0]
    assert alone.stdout.strip() == str(ids)


def test_rates_are_compared(codec):
    processor = processor_of_sounds(codec)
    ids = processor(text=["<audio>"], audio=[tone(440)], sampling_rate=RATE)["input_ids"]
    assert ids == processor(text=["<audio>"], audio=[tone(440)])["input_ids"]
    chat = [{"role": "user", "content": [{"type": "audio", "audio": tone(440)}]}]
    for rate in ({"sampling_rate": 16000}, {"audio_kwargs": {"sampling_rate": 16000}}):
        with pytest.raises(ValueError, match="sampling_rate: 16000 samples of a second, and the codec of audio takes"):
            processor(text=["<audio>"], audio=[tone(440)], **rate)
        with pytest.raises(ValueError, match="sampling_rate: 16000 samples of a second, and the codec of audio takes"):
            processor.apply_chat_template(chat, tokenize=True, return_dict=True, processor_kwargs=dict(rate))
    same = {"audio_kwargs": {"sampling_rate": RATE}}
    assert processor(text=["<audio>"], audio=[tone(440)], **same)["input_ids"] == ids
    plain, asked = (
        processor.apply_chat_template(chat, tokenize=True, return_dict=True, processor_kwargs=dict(given))
        for given in ({}, same)
    )
    assert plain["input_ids"] == asked["input_ids"]
