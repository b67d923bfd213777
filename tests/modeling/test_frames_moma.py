# SPDX-License-Identifier: Apache-2.0
"""Generation with frames of several modalities: images of six codes, sounds of any length; speech has no frame."""

import pytest
import torch

from modeling_moma.configuration_moma import MomaConfig
from modeling_moma.modeling_moma import MomaForCausalLM


PAD, BOS, EOS = 1, 0, 2
FRAMES = {"image": (3, 4, range(100, 140), 6), "audio": (5, 6, range(140, 160), None)}
SPEECH = range(160, 170)
IMAGE = [3, 100, 101, 102, 103, 104, 105, 4]
SOUND = [5, 140, 141, 6]
STRATEGIES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0},
    "beams": {"num_beams": 3, "do_sample": False},
    "guidance": {"do_sample": True, "guidance_scale": 3.0},
    "without_cache": {"do_sample": False, "use_cache": False},
}


def make_model(**kwargs):
    torch.manual_seed(0)
    fields = {
        "vocab_size": 170,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "begin_image_token_id": 3,
        "end_image_token_id": 4,
        "image_seq_length": 6,
        "modality_token_ranges": {"image": [[100, 140]], "audio": [[140, 160]], "speech": [[160, 170]]},
        "modality_frames": {"audio": {"begin": 5, "end": 6, "length": None}},
        "num_experts": {"text": 2, "image": 2, "audio": 2, "speech": 1},
        "initializer_range": 0.2,
    }
    return MomaForCausalLM(MomaConfig(**{**fields, **kwargs})).eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


def batch(*rows):
    width = max(len(row) for row in rows)
    ids = torch.tensor([[PAD] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


TEXTS = batch([BOS, 20, 21], [BOS, *IMAGE, 30], [BOS, *SOUND, *IMAGE])
# no sound yet, one begun, one with a code, and a whole one behind
SOUNDS = batch([BOS, 20, 21], [BOS, *IMAGE, 5], [BOS, 40, 5, 141], [BOS, *SOUND, 30])
MIXED = batch([BOS, 20, 21], [BOS, 3, 101], [BOS, 40, 5, 141])


def frames_of(row):
    """The modality of each frame of a row, or a failure at the first breach; a plain loop over the tokens."""
    found, open_frame, count = [], None, 0
    for token in row:
        owner = next((name for name, (_, _, codes, _) in FRAMES.items() if token in codes), None)
        begun = next((name for name, frame in FRAMES.items() if frame[0] == token), None)
        ended = next((name for name, frame in FRAMES.items() if frame[1] == token), None)
        assert token not in SPEECH, row
        if open_frame is None:
            assert owner is None and ended is None, row
            open_frame, count = begun, 0
        elif owner is not None:
            count += 1
            assert owner == open_frame, row
        else:
            length = FRAMES[open_frame][3]
            assert ended == open_frame and (count == length if length else count >= 1), row
            found.append(open_frame)
            open_frame = None
    assert open_frame is None, row
    return found


@pytest.mark.parametrize(("loved", "strategy"), zip([3, 6, 150, 165, 5], STRATEGIES.values()))
def test_text_mode_writes_no_token_of_any_modality(model, strategy, loved):
    out = model.generate(**TEXTS, max_new_tokens=6, sequence_bias={(loved,): 100.0}, **strategy)
    new = out[:, TEXTS["input_ids"].shape[1] :]
    assert not ((new >= 100) | ((new >= 3) & (new <= 6))).any()


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_codes_of_a_modality_without_a_frame_are_never_written(mode):
    model = make_model(modality_frames=None)
    for loved in (150, 165):
        bias = {(loved,): 100.0, (3,): 5.0}
        out = model.generate(**TEXTS, generation_mode=mode, max_new_tokens=12, sequence_bias=bias, do_sample=False)
        new = out[:, TEXTS["input_ids"].shape[1] :]
        assert not (new >= 140).any()
    with pytest.raises(ValueError, match=r"must be one of \('text', 'interleaved', 'image'\), got 'audio'"):
        model.generate(**TEXTS, generation_mode="audio")


@pytest.mark.parametrize(("max_new_tokens", "strategy"), zip([3, 12, None, 3, 12], STRATEGIES.values()))
def test_audio_mode_gives_every_row_exactly_one_sound(model, strategy, max_new_tokens):
    torch.manual_seed(0)
    # an untrained model seldom ends a sound
    call = {"sequence_bias": {(6,): 2.0}, "max_new_tokens": max_new_tokens, **strategy}
    out = model.generate(**SOUNDS, generation_mode="audio", **call)
    width = SOUNDS["input_ids"].shape[1]
    assert [frames_of(row).count("audio") for row in out.tolist()] == [1, 1, 1, 2]
    for row in out[:, width:].tolist():
        assert set(row[row.index(6) + 1 :]) <= {EOS, PAD}
    assert out.shape[1] <= (64 if max_new_tokens is None else width + max_new_tokens)
    assert [len(codes) > 0 for codes in model.decode_modality_tokens(out, "audio")] == [True] * 5
    assert model.decode_image_tokens(out).shape == (1, 6)


def test_a_sound_may_last_to_the_end_of_the_context(model):
    out = model.generate(**SOUNDS, generation_mode="audio", do_sample=False, sequence_bias={(6,): -100.0})
    assert out.shape[1] == 64
    assert (out[:, -1] == 6).all()


@pytest.mark.parametrize("length", [1, 6])
def test_a_third_modality_may_have_a_fixed_length(length):
    model = make_model(modality_frames={"audio": {"begin": 5, "end": 6, "length": length}})
    prompts = batch([BOS, 20], [BOS, 20, 5])
    out = model.generate(**prompts, generation_mode="audio", do_sample=False)
    codes = model.decode_modality_tokens(out, "audio")
    assert codes.shape == (2, length) and codes.min() >= 0 and codes.max() < 20
    assert out.shape[1] == 3 + length + 2


@pytest.mark.parametrize(("max_new_tokens", "strategy"), zip([25, 8, 7, 25, 25], STRATEGIES.values()))
def test_interleaved_mode_keeps_the_grammar_of_all_frames(model, strategy, max_new_tokens):
    torch.manual_seed(0)
    bias = {(3,): 4.0, (5,): 4.0, (6,): 2.0}
    call = {"generation_mode": "interleaved", "max_new_tokens": max_new_tokens, "sequence_bias": bias, **strategy}
    found = [frames_of(row) for row in model.generate(**MIXED, **call).tolist()]
    assert found[1][0] == "image" and found[2][0] == "audio"
    if max_new_tokens == 25 and "num_beams" not in strategy:
        assert {name for row in found for name in row} == {"image", "audio"}


def test_interleaved_mode_begins_what_fits(model):
    call = {**TEXTS, "generation_mode": "interleaved", "do_sample": False}
    width = TEXTS["input_ids"].shape[1]
    for room, bias, expected in (
        (2, {(5,): 100.0}, 0),
        (3, {(5,): 100.0}, 1),
        (7, {(3,): 100.0}, 0),
        (8, {(3,): 100.0}, 1),
    ):
        new = model.generate(**call, max_new_tokens=room, sequence_bias=bias)[:, width:]
        begun = (new == 3) | (new == 5)
        assert (begun.sum(1) >= expected).all() and (expected or not begun.any())
        assert all(frames_of(row) is not None for row in new.tolist())


@pytest.mark.parametrize(
    ("mode", "drafted"), [("audio", "prompt_lookup"), ("interleaved", "prompt_lookup"), ("interleaved", "assistant")]
)
def test_drafts_keep_the_grammar_and_equal_greedy(model, mode, drafted):
    call = {"generation_mode": mode, "do_sample": False, "max_new_tokens": 20, "sequence_bias": {(5,): 4.0, (6,): 2.0}}
    ids = torch.tensor([[BOS, *SOUND, 20, *SOUND, 21]])
    plain = model.generate(ids, **call)
    more = {"prompt_lookup_num_tokens": 4}
    if drafted == "assistant":
        more = {"assistant_model": make_model(num_hidden_layers=1)}
    assert torch.equal(model.generate(ids, **call, **more), plain)
    assert frames_of(plain[0].tolist())


@torch.no_grad()
def test_guidance_sees_the_open_sound_alone(model):
    call = {"generation_mode": "audio", "do_sample": False, "max_new_tokens": 12, "guidance_scale": 3.0}
    row = model.generate(torch.tensor([[BOS, 40, 41, 5, 141]]), **call)
    with_text = model(row).logits[0].log_softmax(-1)
    alone = model(torch.cat([torch.tensor([[BOS]]), row[:, 3:]], dim=1)).logits[0].log_softmax(-1)
    end = row[0].tolist().index(6)
    assert end > 7
    # the last token is forced
    for place in range(5, end):
        mixed = alone[place - 3] + 3.0 * (with_text[place - 1] - alone[place - 3])
        allowed = [*range(140, 160), 6]
        assert int(row[0, place]) == allowed[int(mixed[allowed].argmax())]


def test_embedded_prompts_get_whole_sounds(model):
    ids = torch.tensor([[BOS, 20, 21]])
    embeds = model.get_input_embeddings()(ids)
    for call in ({}, {"max_new_tokens": 9}):
        call = {"generation_mode": "audio", "do_sample": False, "sequence_bias": {(6,): -100.0}, **call}
        out = model.generate(inputs_embeds=embeds, **call)
        assert frames_of(out[0].tolist()) == ["audio"]
        assert torch.equal(out, model.generate(ids, **call)[:, 3:])


@pytest.mark.parametrize(
    ("row", "mode", "open_modality"),
    [
        ([BOS, 5, 141], "text", "audio"),
        ([BOS, 5], "image", "audio"),
        ([BOS, 3, 101], "audio", "image"),
        ([BOS, 3], "text", "image"),
    ],
)
def test_a_frame_that_the_mode_cannot_continue_raises(model, row, mode, open_modality):
    message = f"row 1 ends inside a frame of '{open_modality}', which generation_mode='{mode}' cannot continue"
    with pytest.raises(ValueError, match=message):
        model.generate(**batch([BOS, 20], row), generation_mode=mode)


def test_bad_calls_raise_with_the_numbers(model):
    ids = torch.tensor([[BOS, 20, 21]])
    with pytest.raises(ValueError, match="needs 3 new tokens, but there is room for 2"):
        model.generate(ids, generation_mode="audio", max_new_tokens=2)
    with pytest.raises(ValueError, match="A prompt of 62 positions leaves no room for 3 new tokens"):
        model.generate(torch.full((1, 62), 30), generation_mode="audio")
    with pytest.raises(ValueError, match=r"must be one of \('text', 'interleaved', 'audio', 'image'\), got 'video'"):
        model.generate(ids, generation_mode="video")
    with pytest.raises(ValueError, match=r"no frame for 'speech', only for \['audio', 'image'\]"):
        model.decode_modality_tokens(ids, "speech")


def test_codes_of_sounds_are_read_in_order(model):
    ids = torch.tensor([[*SOUND, 20, 5, 159, 6], [*IMAGE], [20] * 4 + SOUND])
    assert [codes.tolist() for codes in model.decode_modality_tokens(ids, "audio")] == [[0, 1], [19], [0, 1]]
    assert model.decode_modality_tokens(ids, "image").tolist() == [[0, 1, 2, 3, 4, 5]]
    assert model.decode_modality_tokens(torch.tensor([[20, 21]]), "audio") == []
    for row, message in (
        ([20, 5, 140], "audio at row 0, position 1 is incomplete, with 1 codes"),
        ([5, 6, 20], "position 0 is incomplete, with 0 codes"),
        ([5, 140, 100, 6], "incomplete, with 1 codes"),
        ([140, *SOUND], "1 codes stand outside the 1 frames of audio"),
    ):
        with pytest.raises(ValueError, match=message):
            model.decode_modality_tokens(torch.tensor([row]), "audio")
    # the codes of a row are not those of the next one
    with pytest.raises(ValueError, match="row 0, position 1 is incomplete, with 0 codes"):
        model.decode_modality_tokens(torch.tensor([[20, 5], [140, 6]]), "audio")
    with pytest.raises(ValueError, match="no frame for 'speech'"):
        model.decode_modality_tokens(ids, "speech")
