# SPDX-License-Identifier: Apache-2.0
"""A third modality by a codec of one's own: sounds in texts, in saved processors and on the Hub."""

import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from helpers.absent import WITHOUT_PACKAGES
from helpers.forked_python import run_python
from helpers.mu_law_codec import MuLawCodec
from helpers.tiny import CARD, noise_images, tiny_model, tiny_processor
from modeling_moma import MomaConfig, MomaForCausalLM
from modeling_moma.hub.upload import check_loads, lay_out
from tokenization import MomaProcessor, add_modality_tokens, register_codec
from tokenization.codecs_moma import CODECS


RATE = 800
LOAD_WITHOUT_THE_PACKAGE = """
from transformers import AutoProcessor

class OwnCodec:
    num_codes, length, save_pretrained, from_pretrained = 256, None, None, None

    def encode(self, items):
        return [[200, 50] for item in items]

    def decode(self, codes):
        return codes

own = {"audio": OwnCodec()}
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True, codecs=own)
assert "tokenization" not in sys.modules and "transformers_modules" in type(processor).__module__
ids = processor(text=["<audio>"], audio=["one.wav"])["input_ids"][0]
print(processor.decode_parts(ids))
try:
    AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
except ValueError as error:
    print(error)
"""


def tone(frequency: float, num_samples: int) -> np.ndarray:
    return 0.8 * np.sin(2 * np.pi * frequency * np.arange(num_samples) / RATE)


def make_processor(codec: MuLawCodec | None = None) -> MomaProcessor:
    """The tiny processor, and a codec of sounds beside its images."""
    codec = codec or MuLawCodec(RATE)
    images = tiny_processor()
    tokenizer = add_modality_tokens(images.tokenizer, "audio", codec.num_codes)
    return MomaProcessor(images.image_processor, tokenizer, images.vq_model, codecs={"audio": codec})


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def codec(processor):
    return processor.codecs["audio"]


@pytest.fixture(scope="module")
def model(processor):
    return tiny_model(processor, num_experts={"text": 1, "image": 1, "audio": 1})


def test_placeholders_become_the_codes_of_their_sounds(processor, codec):
    sounds = [tone(100, 5), tone(200, 9)]
    first, second = (processor.frame_ids("audio", codes) for codes in codec.encode(sounds))
    assert len(first) == 7 and len(second) == 11
    image = noise_images(1)[0]
    ids = processor(text="<audio> red <image><audio>", audio=sounds, images=image)["input_ids"][0]
    red = processor.tokenizer(" red ", add_special_tokens=False)["input_ids"]
    drawn = processor.image_ids(processor.encode_images([image])[0])
    assert ids == [processor.tokenizer.bos_token_id, *first, *red, *drawn, *second]
    parts = processor.decode_parts(torch.tensor(ids))
    assert len(parts[0]) == 5 and parts[1] == " red " and parts[2].size == (16, 16) and len(parts[3]) == 9


def test_rows_of_a_batch_have_their_own_sounds(processor):
    out = processor(
        text=["red", "<audio>", "<audio> and <audio>"],
        audio=[[], [tone(50, 4)], [tone(100, 3), tone(200, 2)]],
        padding=True,
        return_tensors="pt",
        return_labels=True,
        return_mm_token_type_ids=True,
    )
    is_code = (out["input_ids"] >= processor.frames["audio"].offset) & (
        out["input_ids"] < processor.frames["audio"].offset + 256
    )
    assert is_code.sum(1).tolist() == [0, 4, 5]
    # the places in `MomaConfig.modalities`
    assert torch.equal(out["mm_token_type_ids"], is_code.long())
    image = processor(text="<image>", images=noise_images(1), return_mm_token_type_ids=True)
    assert set(image["mm_token_type_ids"][0]) == {0, 2}


def test_offsets_of_replacements_are_those_of_the_texts(processor):
    text = "a <audio> b <image> c"
    out = processor(text=[text], audio=[tone(50, 3)], images=noise_images(1), return_text_replacement_offsets=True)
    first, second = out["text_replacement_offsets"][0]
    assert [text[slice(*offsets["span"])] for offsets in (first, second)] == ["<audio>", "<image>"]
    assert first["new_span"] == (2, 2 + len(first["replacement"]))
    assert second["new_span"][0] == first["new_span"][1] + len(" b ")


def test_escaped_placeholders_are_text(processor):
    said = processor.escape_special_tokens("<audio><|audio_3|>")
    out = processor(text=[f"<audio>{said}"], audio=[tone(50, 3)], sanitize_control_tokens=True)
    assert len([token for token in out["input_ids"][0] if processor.frames["audio"].is_code(token)]) == 3
    assert processor.decode(out["input_ids"][0][6:]) == "<audio><|audio_3|>"


@pytest.mark.parametrize(
    ("text", "audio", "message"),
    [
        (["<audio>"], None, "audio: the number of <audio> tokens .* got 1 and 0"),
        (None, [tone(50, 4)], "text=None has no place"),
        (["<audio>", ""], [[], [tone(50, 4)]], r"text\[0\]: the number of <audio> tokens .* got 1 and 0"),
    ],
)
def test_sounds_that_do_not_match_their_placeholders_raise(processor, text, audio, message):
    with pytest.raises(ValueError, match=message):
        processor(text=text, audio=audio)


def test_codes_that_cannot_be_raise(processor, codec, monkeypatch):
    audio = processor.frames["audio"]
    with pytest.raises(ValueError, match="one code at least, got 0"):
        processor(text=["<audio>"], audio=[np.zeros(0)])
    with pytest.raises(ValueError, match=r"outside \[0, 256\)"):
        processor.frame_ids("audio", [3, 256])
    with pytest.raises(ValueError, match="one image has 16 codes, got 2"):
        processor.image_ids([3, 4])
    with pytest.raises(ValueError, match=r"'speech' is none of \['audio', 'image'\]"):
        processor.frame_ids("speech", [3])
    with pytest.raises(ValueError, match="the audio at position 1 is incomplete: 1 codes and then"):
        processor.decode_parts([5, audio.begin, audio.offset, 5])
    with pytest.raises(ValueError, match="outside a frame of 'audio'"):
        processor.decode_parts([5, audio.offset, audio.end])
    for made, told in (([1, 1.5], "1.5"), (np.float32([2]), "2.0"), ("12", "'1'"), ([[1, 2]], r"\[1, 2\]")):
        monkeypatch.setattr(codec, "encode", lambda items, made=made: [made])
        with pytest.raises(ValueError, match=f"codes: those of one audio are whole numbers, got {told}"):
            processor.encode_items("audio", [tone(50, 4)])
    monkeypatch.setattr(codec, "encode", lambda items: [np.uint8([7]), [torch.tensor(8)]])
    assert processor.encode_items("audio", [tone(50, 4)] * 2) == [[7], [8]]
    monkeypatch.setattr(codec, "encode", lambda items: [])
    with pytest.raises(ValueError, match="codes of 0 items for 1"):
        processor.encode_items("audio", [tone(50, 4)])


def test_parts_that_are_no_codecs_raise():
    images = tiny_processor()
    parts = (images.image_processor, images.tokenizer, images.vq_model)
    with pytest.raises(ValueError, match=r"add_modality_tokens\(tokenizer, 'audio', 256\)"):
        MomaProcessor(*parts, codecs={"audio": MuLawCodec()})
    with pytest.raises(TypeError, match="Linear is no codec, it lacks num_codes"):
        MomaProcessor(*parts, codecs={"audio": torch.nn.Linear(1, 1)})
    for name in ("image", "padding", "return_tensors", "chat_template", "sampling_rate"):
        with pytest.raises(ValueError, match=f"'{name}' is not free"):
            MomaProcessor(*parts, codecs={name: MuLawCodec()})
    for name in ("text", "a b", "../audio", ""):
        with pytest.raises(ValueError, match="must be a plain name"):
            MomaProcessor(*parts, codecs={name: MuLawCodec()})
        with pytest.raises(ValueError, match="must be a plain name"):
            add_modality_tokens(images.tokenizer, name, 8)
    add_modality_tokens(images.tokenizer, "audio", 16)
    with pytest.raises(ValueError, match="it has 16 audio codes, but its codec MuLawCodec has num_codes=256"):
        MomaProcessor(*parts, codecs={"audio": MuLawCodec()})
    with pytest.raises(ValueError, match="videos, audio: this processor reads text and images only"):
        images(text=["red"], audio=[tone(50, 4)])


def test_token_layout_has_the_frame_of_each_modality(processor):
    layout = processor.token_layout()
    vocab = processor.tokenizer.get_vocab()
    assert layout["modality_frames"] == {
        "audio": {"begin": vocab["<|begin_audio|>"], "end": vocab["<|end_audio|>"], "length": None}
    }
    assert layout["modality_token_ranges"]["audio"] == [[vocab["<|audio_0|>"], vocab["<|audio_255|>"] + 1]]
    assert "modality_frames" not in tiny_processor().token_layout()
    frames = MomaConfig(**layout, num_experts=1).frames
    assert list(frames) == ["audio", "image"]
    assert (frames["image"].begin, frames["image"].length) == (processor.begin_image_token_id, 16)
    fixed = make_processor(MuLawCodec(RATE, length=12)).token_layout()
    assert fixed["modality_frames"]["audio"]["length"] == 12


def test_saved_and_loaded_processor_and_model_are_the_same(processor, model, tmp_path):
    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    assert settings["codec_types"] == {"audio": "mu_law"} and "codecs" not in settings
    assert (tmp_path / "audio_codec" / "codec_config.json").exists()
    loaded_model = MomaForCausalLM.from_pretrained(tmp_path)
    sound = tone(100, 20)
    for loaded in (MomaProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert loaded.token_layout() == processor.token_layout() and loaded.chat_template == processor.chat_template
        inputs = loaded(text=["<audio>low"], audio=[sound], return_tensors="pt")
        assert torch.equal(
            inputs["input_ids"], processor(text=["<audio>low"], audio=[sound], return_tensors="pt").input_ids
        )
    assert loaded_model.config.frames == model.config.frames
    with torch.no_grad():
        assert torch.equal(loaded_model(**inputs).logits, model(**inputs).logits)


def test_a_codec_of_ones_own_code_is_laid_out_but_loads_nowhere_else(processor, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text(CARD)
    processor.save_pretrained(tmp_path / "processor")
    (tmp_path / "repository").mkdir()
    lay_out(tmp_path / "repository", tmp_path / "model", tmp_path / "processor")
    assert any((tmp_path / "repository" / "audio_codec").iterdir())
    with pytest.raises(ValueError, match="would not load: .*codec 'mu_law' is none of"):
        check_loads(tmp_path / "repository")


def test_codecs_are_found_by_their_registered_name(processor, tmp_path, monkeypatch):
    processor.save_pretrained(tmp_path)
    monkeypatch.delitem(CODECS, "mu_law")
    with pytest.raises(ValueError, match="codec 'mu_law' is none of .* import the module that registers it"):
        MomaProcessor.from_pretrained(tmp_path)
    own = MuLawCodec(RATE)
    assert MomaProcessor.from_pretrained(tmp_path, codecs={"audio": own}).codecs["audio"] is own
    register_codec("mu_law")(MuLawCodec)
    with pytest.raises(ValueError, match="'mu_law' is already the codec MuLawCodec"):
        register_codec("mu_law")(dict)
    monkeypatch.delattr(MuLawCodec, "codec_type")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for folder in (tmp_path, tmp_path / "again"):
        with pytest.raises(ValueError, match=re.escape("put `@register_codec(name)`")):
            processor.save_pretrained(folder)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_folder_is_read_without_the_package_by_a_codec_that_is_given(processor, tmp_path):
    processor.save_pretrained(tmp_path / "saved")
    code = WITHOUT_PACKAGES + LOAD_WITHOUT_THE_PACKAGE
    remote = run_python(["-P", "-c", code, tmp_path / "saved"], cwd=tmp_path)
    assert remote.returncode == 0, remote.stderr[-3000:]
    parts, refusal = remote.stdout.strip().splitlines()
    assert parts == "[[200, 50]]"
    assert "'mu_law' is none of ['mel', 'transformers']" in refusal and "codecs={'audio': codec}" in refusal
