# SPDX-License-Identifier: Apache-2.0
"""Generation with frames of several modalities: images of six codes, sounds of any length; speech has no frame."""

import copy
from functools import partial

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.utils import logging

from modeling_moma.configuration_moma import MomaConfig
from modeling_moma.errors_moma import InputError
from modeling_moma.modeling_moma import MomaForCausalLM


PAD, BOS, EOS, BEGIN, END = 1, 0, 2, 3, 4
START, STOP, LENGTH = 100, 140, 6
FRAMES = {"image": (BEGIN, END, range(START, STOP), LENGTH), "audio": (5, 6, range(140, 160), None)}
SPEECH = range(160, 170)
CODES = [100, 101, 102, 103, 104, 105]
IMAGE = [BEGIN, *CODES, END]
SOUND = [5, 140, 141, 6]
STRATEGIES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0},
    "top_k": {"do_sample": True, "top_k": 3, "temperature": 0.5},
    "beams": {"num_beams": 3, "do_sample": False},
    "beam_sampling": {"num_beams": 2, "do_sample": True},
    "three_answers": {"do_sample": True, "num_return_sequences": 3},
    "guidance": {"do_sample": True, "guidance_scale": 3.0},
    "guidance_three_answers": {"do_sample": True, "guidance_scale": 3.0, "num_return_sequences": 3},
    "without_cache": {"do_sample": False, "use_cache": False},
}
FEW = [STRATEGIES[name] for name in ("greedy", "sampling", "beams", "guidance", "without_cache")]


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


# three rows in different states: no image yet, a whole one behind, and a begun one
STATES = batch([BOS, 20, 21, 22], [BOS, *IMAGE, 30, BEGIN], [BOS, 40, BEGIN, 110, 111])
TEXTS = batch([BOS, 20, 21, 22, 23, 24], [BOS, 30])
PROMPTS = batch([BOS, 20, 21], [BOS, *IMAGE, 30], [BOS, *SOUND, *IMAGE])
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


def assert_grammar(rows):
    for row in rows.tolist():
        frames_of(row)


# an image alone, with words before and behind it, two of them, and words alone
CAPTIONED = batch([BOS, *IMAGE], [BOS, *IMAGE, 30, 31], [BOS, 20, *IMAGE], [BOS, *IMAGE, *IMAGE], [BOS, 20, 21])


@pytest.mark.parametrize("ends", [torch.tensor(EOS), torch.tensor([EOS, 31]), [EOS]], ids=str)
def test_an_image_ends_with_the_first_of_its_end_tokens(model, ends):
    call = {**STATES, "generation_mode": "image", "do_sample": False}
    expected = model.generate(**call, eos_token_id=EOS)
    assert torch.equal(model.generate(**call, eos_token_id=ends), expected)


@pytest.mark.parametrize(
    ("mode", "more"), [("interleaved", {}), ("text", {"num_beams": 3}), ("text", {"prompt_lookup_num_tokens": 2})]
)
def test_what_begins_no_caption_is_left_out_behind_an_image_alone(model, mode, more):
    rows = range(len(CAPTIONED["input_ids"]))
    call = {"generation_mode": mode, "do_sample": False, "max_new_tokens": 9, **more}

    def first_tokens(row, **settings):
        inputs = {name: values[row : row + 1] for name, values in CAPTIONED.items()}
        return model.generate(**inputs, **call, **settings)[0, CAPTIONED["input_ids"].shape[1] :].tolist()

    plain = [first_tokens(row) for row in rows]
    banned = [EOS, *sorted({tokens[0] for tokens in plain} - {EOS})]
    suppressed = [first_tokens(row, caption_suppress_tokens=banned) for row in rows]
    assert suppressed[0][0] not in banned and suppressed[1:] == plain[1:]
    # as a setting of the model, which an argument goes before
    own = copy.deepcopy(model)
    own.generation_config.caption_suppress_tokens = banned
    inputs = {name: values[:1] for name, values in CAPTIONED.items()}
    start = CAPTIONED["input_ids"].shape[1]
    assert own.generate(**inputs, **call)[0, start:].tolist() == suppressed[0]
    assert own.generate(**inputs, **call, caption_suppress_tokens=[])[0, start:].tolist() == plain[0]
    given = GenerationConfig(caption_suppress_tokens=banned, eos_token_id=EOS, pad_token_id=PAD)
    assert model.generate(**inputs, **call, generation_config=given)[0, start:].tolist() == suppressed[0]


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES.keys())
def test_image_mode_gives_every_row_exactly_one_image(model, strategy):
    torch.manual_seed(0)
    out = model.generate(**STATES, generation_mode="image", **strategy)
    assert_grammar(out)
    copies = strategy.get("num_return_sequences", 1)
    width = STATES["input_ids"].shape[1]
    # one new image where none was begun; the begun ones are finished
    expected = torch.tensor([1, 2, 1]).repeat_interleave(copies)
    assert torch.equal((out == END).sum(1), expected)
    assert out.shape == (3 * copies, width + LENGTH + 2)
    assert (out[:, width:] == BEGIN).sum(1).tolist() == [1] * copies + [0] * 2 * copies
    assert model.decode_image_tokens(out).shape == (4 * copies, LENGTH)


# the released tokenizer pads with id 0, which the stock search takes for none
@pytest.mark.parametrize(
    ("pad", "more"),
    [(PAD, {}), (0, {"num_return_sequences": 3}), (0, {"max_new_tokens": 30}), (PAD, {"length_penalty": 0.5})],
)
def test_beams_of_a_row_that_ends_early_are_those_of_the_row_alone(model, more, pad):
    call = {"num_beams": 3, "do_sample": False, "return_dict_in_generate": True, "output_scores": True, **more}
    call |= {"generation_mode": "image", "pad_token_id": pad}
    width, copies = STATES["input_ids"].shape[1], more.get("num_return_sequences", 1)
    together = model.generate(**STATES, **call)
    for index in range(3):
        mask = STATES["attention_mask"][index].bool()
        prompt = STATES["input_ids"][index : index + 1, mask]
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **call)
        rows = slice(index * copies, (index + 1) * copies)
        torch.testing.assert_close(together.sequences_scores[rows], alone.sequences_scores)
        new, expected = together.sequences[rows, width:], alone.sequences[:, prompt.shape[1] :]
        length = expected.shape[1]
        assert torch.equal(new[:, :length], expected)
        assert (new[:, length:] == pad).all()


@pytest.mark.parametrize("name", ["top_k", "beams", "guidance_three_answers"])
def test_image_mode_ends_the_row_after_the_image_when_there_is_more_room(model, name):
    torch.manual_seed(0)
    strategy = STRATEGIES[name]
    out = model.generate(**STATES, generation_mode="image", max_new_tokens=30, **strategy)
    assert_grammar(out)
    # beams end with the image itself
    end = [] if "num_beams" in strategy else [EOS]
    for row in out[:, STATES["input_ids"].shape[1] :].tolist():
        tail = row[row.index(END) + 1 :]
        assert tail[: len(end)] in ([], end) and set(tail[len(end) :]) <= {PAD}
    assert out.shape[1] == STATES["input_ids"].shape[1] + LENGTH + 2 + len(end)


def test_interleaved_images_stay_inside_the_context():
    torch.manual_seed(0)
    model = make_model(max_position_embeddings=20)
    bias = {(BEGIN,): 50.0, (EOS,): 30.0}
    call = {"generation_mode": "interleaved", "sequence_bias": bias, "do_sample": False, "max_new_tokens": 40}
    # 20 positions hold one more image after 12, none after 13
    for length, images in ((12, 1), (13, 0)):
        out = model.generate(torch.full((1, length), 30), **call)
        assert_grammar(out)
        assert int((out == END).sum()) == images


@pytest.mark.parametrize(
    "call", [{"min_new_tokens": 20}, {"suppress_tokens": [BEGIN, END, EOS]}, {"repetition_penalty": 5.0}]
)
def test_image_is_whole_against_processors_that_forbid_its_frame(model, call):
    torch.manual_seed(0)
    out = model.generate(**STATES, generation_mode="image", max_new_tokens=30, do_sample=True, **call)
    assert_grammar(out)
    assert (out == END).sum(1).tolist() == [1, 2, 1]


def test_too_few_new_tokens_raise_with_the_numbers(model):
    ids = torch.tensor([[BOS, 20, 21]])
    assert model.generate(ids, generation_mode="image", max_new_tokens=LENGTH + 2).shape == (1, 3 + LENGTH + 2)
    for limit in ({"max_length": 3 + LENGTH + 1}, {"generation_config": GenerationConfig(max_new_tokens=LENGTH + 1)}):
        with pytest.raises(ValueError, match=r"needs 8 new tokens, but there is room for 7"):
            model.generate(ids, generation_mode="image", **limit)
    with pytest.raises(ValueError, match=r"needs 5 new tokens, but there is room for 4"):
        model.generate(torch.tensor([[BOS, BEGIN, 110, 111]]), generation_mode="interleaved", max_new_tokens=4)


@pytest.mark.parametrize("is_given", [True, False])
def test_a_configured_number_of_new_tokens_goes_before_a_length(is_given):
    model = make_model()
    call = {"generation_mode": "image", "max_length": 60, "do_sample": False}
    config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD) if is_given else model.generation_config
    if is_given:
        call["generation_config"] = config
    ids = torch.tensor([[BOS, 20, 21]])
    config.max_new_tokens = LENGTH + 2
    assert model.generate(ids, **call).shape == (1, 3 + LENGTH + 2)
    config.max_new_tokens = 4
    # an argument of `None` unsets it
    assert_grammar(model.generate(ids, max_new_tokens=None, **call))
    with pytest.raises(ValueError, match=r"needs 8 new tokens, but there is room for 4"):
        model.generate(ids, **call)


def test_generation_config_without_a_limit_is_sized_and_left_alone(model):
    config = GenerationConfig(do_sample=False, eos_token_id=EOS, pad_token_id=PAD)
    before = copy.deepcopy(config.to_dict())
    out = model.generate(torch.tensor([[BOS, 20]]), generation_config=config, generation_mode="image")
    assert out.shape == (1, 2 + LENGTH + 2)
    assert config.to_dict() == before


def test_negative_prompts_that_nothing_heeds_are_told(model, caplog):
    call = {**TEXTS, "generation_mode": "image", "do_sample": False}
    negative = batch([BOS, 50, 51, 52], [BOS, 60])
    logging.warning_once.cache_clear()
    steered = model.generate(**call, negative_prompt_ids=negative["input_ids"])
    assert "`negative_prompt_ids` change nothing at `guidance_scale` = None" in caplog.text
    assert torch.equal(steered, model.generate(**call))


def test_penalties_of_words_in_the_models_own_configuration_touch_no_image(model):
    call = {**TEXTS, "do_sample": False}
    drawn = model.generate(**call, generation_mode="image")
    other = copy.deepcopy(model)
    other.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1)
    assert torch.equal(other.generate(**call, generation_mode="image"), drawn)
    asked = model.generate(**call, generation_mode="image", repetition_penalty=5.0)
    config = GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=0)
    assert torch.equal(other.generate(**call, generation_mode="image", generation_config=config), asked)
    assert not torch.equal(asked, drawn)
    words = {"max_new_tokens": 12, "generation_mode": "text"}
    assert not torch.equal(other.generate(**call, **words), model.generate(**call, **words))


def test_a_configuration_names_the_mode_where_the_call_does_not(model):
    drawn = model.generate(**TEXTS, generation_mode="image", do_sample=False)
    config = GenerationConfig(generation_mode="image", do_sample=False)
    assert torch.equal(model.generate(**TEXTS, generation_config=config), drawn)
    words = model.generate(**TEXTS, generation_config=config, generation_mode="text", max_new_tokens=4)
    assert torch.equal(words, model.generate(**TEXTS, do_sample=False, max_new_tokens=4))
    other = copy.deepcopy(model)
    other.generation_config.generation_mode = "image"
    assert torch.equal(other.generate(**TEXTS, do_sample=False), drawn)
    with pytest.raises(ValueError, match="generation_mode.*'pictures'"):
        model.generate(**TEXTS, generation_config=GenerationConfig(generation_mode="pictures"))


@torch.no_grad()
def test_a_negative_prompt_has_what_the_prompt_holds_of_an_image(model):
    negative, scale = batch([BOS, 50, 51, 52], [BOS, 60], [BOS, 60, 61]), 3.0
    call = {**STATES, "generation_mode": "image", "do_sample": False, "guidance_scale": scale}
    ids, mask = negative["input_ids"], negative["attention_mask"]
    out = model.generate(**call, negative_prompt_ids=ids, negative_prompt_attention_mask=mask)
    for row, mask_T, against, against_T in zip(out, STATES["attention_mask"], ids, mask):
        row = row[int((mask_T == 0).sum()) :]
        start = int((row == BEGIN).nonzero()[-1])
        against = torch.cat([against[against_T == 1], row[start:]])
        given, other = (model(x[None]).logits[0].log_softmax(-1) for x in (row, against))
        for place in range(max(start + 1, int(mask_T.sum())), start + 1 + LENGTH):
            other_V = other[int((against == BEGIN).nonzero()[-1]) + place - start - 1]
            mixed = other_V + scale * (given[place - 1] - other_V)
            assert int(mixed[START:STOP].argmax()) + START == int(row[place])
    # one that brings the open images along is taken as it is
    whole = batch([BOS, 50, 51, 52], [BOS, 60, BEGIN], [BOS, 60, 61, BEGIN, 110, 111])
    arguments = {"negative_prompt_ids": whole["input_ids"], "negative_prompt_attention_mask": whole["attention_mask"]}
    assert torch.equal(out, model.generate(**call, **arguments))


@pytest.mark.parametrize(
    "strategy",
    [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}, {"routing": "threshold"}],
)
def test_guidance_refuses_strategies_that_its_branch_cannot_follow(model, strategy):
    with pytest.raises(ValueError, match=f"`guidance_scale` cannot be combined with `{next(iter(strategy))}`"):
        model.generate(torch.tensor([[BOS, 20]]), generation_mode="image", guidance_scale=2.0, **strategy)


def test_decode_image_tokens_gives_codes_in_order(model):
    other = [BEGIN, *(token + 10 for token in CODES), END]
    ids = torch.tensor([[*IMAGE, 20, *other], [30] * 9 + IMAGE])
    first, second = [code - START for code in CODES], [code - START + 10 for code in CODES]
    codes = model.decode_image_tokens(ids)
    assert codes.tolist() == [first, second, first] and codes.last_of_rows.tolist() == [1, 2]
    assert model.decode_image_tokens(torch.tensor([[20, 21]])).shape == (0, LENGTH)


def test_bad_calls_raise_by_name(model):
    ids = torch.tensor([[BOS, 20]])
    with pytest.raises(ValueError, match="`generation_mode` must be one of .* got 'video'"):
        model.generate(ids, generation_mode="video")
    for shape, name in (((2, 2), "position_ids"), ((1, 1), "attention_mask"), ((1, 3), "attention_mask")):
        with pytest.raises(ValueError, match=rf"`{name}` has the shape \({shape[0]}, {shape[1]}\), but "):
            model.generate(ids, attention_mask=torch.ones(shape, dtype=torch.long), generation_mode="image")
    with pytest.raises(ValueError, match="row 1 is all padding"):
        mask = torch.tensor([[1, 1], [0, 0]])
        model.generate(ids.repeat(2, 1), attention_mask=mask, generation_mode="image")
    with pytest.raises(ValueError, match="row 0 ends inside a frame of 'image'"):
        model.generate(torch.tensor([[BOS, BEGIN, 110]]), generation_mode="text")
    with pytest.raises(ValueError, match="`cache_implementation` is 'paged': continuous batching heeds no"):
        model.generate(ids, cache_implementation="paged")


def test_text_only_model_generates_text_and_refuses_images():
    torch.manual_seed(0)
    fields = {"modality_token_ranges": {}, "modality_frames": None, "num_experts": 2}
    model = make_model(**fields, begin_image_token_id=None, end_image_token_id=None)
    assert model.generate(torch.tensor([[BOS, 20]]), max_new_tokens=3).shape[1] <= 5
    for mode in ("image", "interleaved"):
        with pytest.raises(ValueError, match="`generation_mode` must be one of \\('text',\\), got '"):
            model.generate(torch.tensor([[BOS, 20]]), generation_mode=mode)


@pytest.mark.parametrize(
    ("mode", "depth"), [("text", {"depth_layers": [1, 3]}), ("image", {}), ("interleaved", {"depth_layers": [1, 3]})]
)
def test_a_model_may_draft_for_itself_with_its_first_layers(mode, depth):
    torch.manual_seed(0)
    model = make_model(num_hidden_layers=4, **depth)
    ids = torch.tensor([[BOS, 20, 21, 22]])
    call = {"generation_mode": mode, "do_sample": False, "max_new_tokens": LENGTH + 4}
    expected = model.generate(ids, **call)
    for early_exit in (1, 3):
        assert torch.equal(model.generate(ids, assistant_early_exit=early_exit, **call), expected)
        assert model.config.num_hidden_layers == 4
    assert torch.equal(model.generate(ids, **call), expected)


@pytest.mark.parametrize(
    ("strategy", "num_prompt"),
    [
        ({}, 40),
        ({"num_beams": 2}, 39),
        ({"cache_implementation": "static"}, 5),
        ({"prompt_lookup_num_tokens": 5}, 5),
        ({"prompt_lookup_num_tokens": 5}, 39),
        ({"assistant": True}, 5),
    ],
)
def test_rows_end_at_the_last_position(num_prompt, strategy):
    torch.manual_seed(0)
    model = make_model(max_position_embeddings=40)
    strategy = dict(strategy)
    if strategy.pop("assistant", False):
        strategy["assistant_model"] = make_model(max_position_embeddings=40)
    call = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None, "suppress_tokens": [EOS]}
    # tokens that come again, so that lookup finds drafts
    ids = torch.tensor([[BOS, *[20, 21, 22] * 13]])[:, :num_prompt]
    if num_prompt == 40:
        with pytest.raises(InputError, match="A prompt of 40 positions leaves no room"):
            model.generate(ids, **call, **strategy)
        return
    rows = model.generate(ids, **call, **strategy)
    assert rows.shape[1] == 40
    if "num_beams" not in strategy:
        assert torch.equal(rows, model.generate(ids, **{**call, "max_new_tokens": 40 - num_prompt}))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["text", "interleaved"])
def test_a_frame_that_is_open_in_the_cache_goes_on_with_the_ids_of_all_turns(model, mode):
    ids = torch.tensor([[BOS, 20, 21, 22, 23], [BOS, 20, BEGIN, 110, 111]])
    cache, new = DynamicCache(config=model.config), torch.tensor([[PAD, 30], [PAD, 112]])
    model(ids, cache=cache)
    mask = torch.tensor([[1] * 5 + [0, 1]] * 2)
    with pytest.raises(InputError, match="`input_ids`: row 1 goes on inside a frame of 'image' that began among"):
        model.generate(new, attention_mask=mask, cache=cache, generation_mode=mode)
    if mode != "text":
        call = {"attention_mask": mask, "generation_mode": mode, "do_sample": False, "max_new_tokens": 12}
        whole = torch.cat([ids, new], dim=1)
        assert torch.equal(model.generate(whole, cache=cache, **call), model.generate(whole, **call))


@torch.no_grad()
def test_ids_beside_embeddings_tell_their_modalities(model):
    ids = torch.tensor([[BOS, *IMAGE, 30, 31]])
    call = {"do_sample": False, "max_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(ids, **call)
    out = model.generate(ids, inputs_embeds=model.get_input_embeddings()(ids), **call)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), atol=1e-5, rtol=1e-5)
    assert torch.equal(out.sequences, expected.sequences)


def cached_turn(model, num_seen, static=False):
    """Ids of a turn, and a cache that holds them."""
    ids = torch.tensor([[BOS, *[20, 21, 22] * 13]])[:, :num_seen]
    cache = StaticCache(config=model.config, max_cache_len=60) if static else DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, cache=cache)
    return ids, cache


@pytest.mark.parametrize(("static", "num_new"), [(False, 1), (True, 5), (False, 8)])
def test_new_ids_alone_need_a_mask_over_what_the_cache_holds(num_new, static):
    torch.manual_seed(0)
    model = make_model()
    ids, cache = cached_turn(model, 8, static)
    new = torch.full((1, num_new), 30)
    with pytest.raises(InputError, match=f"`cache` holds 8 positions and the prompt has {num_new}, so none is left"):
        model.generate(new, cache=cache, max_new_tokens=3)
    whole = torch.cat([ids, new], dim=1)
    call = {"attention_mask": torch.ones_like(whole), "max_new_tokens": 3, "do_sample": False}
    expected = model.generate(whole, **call)[:, 8:]
    assert torch.equal(model.generate(new, cache=cache, **call), expected)


@pytest.mark.parametrize(
    ("depth", "configured"), [({}, True), ({"depth_layers": [1], "depth_capacity": 0.5}, False)], ids=["full", "depth"]
)
def test_rows_of_new_ids_end_at_the_last_position(configured, depth):
    torch.manual_seed(0)
    model = make_model(max_position_embeddings=40, **depth)
    ids, cache = cached_turn(model, 30)
    new = torch.tensor([[20, 21]])
    whole = torch.cat([ids, new], dim=1)
    options = {"max_new_tokens": 60, "do_sample": False, "suppress_tokens": [EOS]}
    call = {"generation_config": GenerationConfig(**options)} if configured else options
    call["attention_mask"] = torch.ones_like(whole)
    rows = model.generate(new, cache=cache, **call)
    assert torch.equal(rows, model.generate(whole, **call)[:, 30:])
    assert rows.shape[1] == 10
    assert not configured or call["generation_config"].max_new_tokens == 60


def drawn(model, **options):
    torch.manual_seed(0)
    return model.generate(**{**STATES, "generation_mode": "image", **options})


def test_images_are_drawn_as_the_model_has_it_where_no_option_says_how(model, monkeypatch):
    own, draw = {"do_sample": True, "temperature": 0.7, "top_k": 3}, partial(drawn, model)
    sampled, greedy = draw(**own), draw(do_sample=False)
    assert not torch.equal(sampled, greedy)
    monkeypatch.setattr(model.generation_config, "image_sampling", own, raising=False)
    assert torch.equal(draw(), sampled)
    # what is no choice of tokens leaves it as it is
    assert torch.equal(draw(use_cache=False, num_return_sequences=1), sampled)
    for options in ({"do_sample": False}, {"temperature": 1.0}, {"num_beams": 1}, {"guidance_scale": 1.0}):
        assert torch.equal(draw(**options), greedy), options
    assert torch.equal(draw(generation_config=GenerationConfig(eos_token_id=EOS, pad_token_id=PAD)), greedy)


def test_only_images_are_drawn_as_the_model_has_it(model, monkeypatch):
    calls = [{"generation_mode": "text"}, {"generation_mode": "interleaved"}, {}]
    before = [model.generate(**TEXTS, max_new_tokens=12, **call) for call in calls]
    own = {"do_sample": True, "temperature": 5.0, "top_k": 0}
    monkeypatch.setattr(model.generation_config, "image_sampling", own, raising=False)
    after = [model.generate(**TEXTS, max_new_tokens=12, **call) for call in calls]
    assert all(map(torch.equal, before, after))


def test_a_way_to_draw_brings_its_guidance_only_where_that_goes(model, monkeypatch):
    draw = partial(drawn, model)
    own = {"do_sample": True, "temperature": 5.0, "top_k": 0}
    one = {name: values[:1] for name, values in STATES.items()}
    unguided = [{"routing": "threshold"}, {"prompt_lookup_num_tokens": 2, **one}]
    plain = [draw(**own, **options) for options in unguided]
    monkeypatch.setattr(model.generation_config, "image_sampling", own | {"guidance_scale": 3.0}, raising=False)
    assert all(torch.equal(draw(**options), ids) for options, ids in zip(unguided, plain, strict=True))
    assert torch.equal(draw(routing=None), draw(**own, guidance_scale=3.0))
    with pytest.raises(InputError, match="guidance_scale. cannot be combined with .routing"):
        draw(**own, guidance_scale=3.0, routing="threshold")


def test_own_options_of_generation_are_saved_with_the_model(model, tmp_path):
    own = {"image_sampling": {"do_sample": True, "top_k": 3}, "caption_suppress_tokens": [EOS, 20]}
    copied = copy.deepcopy(model)
    for name, value in {**own, "generation_mode": "image"}.items():
        setattr(copied.generation_config, name, value)
    copied.save_pretrained(tmp_path / "own")
    loaded = MomaForCausalLM.from_pretrained(tmp_path / "own").generation_config
    assert {name: getattr(loaded, name) for name in own} == own and loaded.generation_mode == "image"
    model.save_pretrained(tmp_path / "none")
    assert MomaForCausalLM.from_pretrained(tmp_path / "none").generation_config._from_model_config


@pytest.mark.parametrize(("loved", "strategy"), zip([3, 6, 150, 165, 5], FEW))
def test_text_mode_writes_no_token_of_any_modality(model, strategy, loved):
    out = model.generate(**PROMPTS, max_new_tokens=6, sequence_bias={(loved,): 100.0}, **strategy)
    new = out[:, PROMPTS["input_ids"].shape[1] :]
    assert not ((new >= 100) | ((new >= 3) & (new <= 6))).any()


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_codes_of_a_modality_without_a_frame_are_never_written(mode):
    model = make_model(modality_frames=None)
    for loved in (150, 165):
        bias = {(loved,): 100.0, (3,): 5.0}
        out = model.generate(**PROMPTS, generation_mode=mode, max_new_tokens=12, sequence_bias=bias, do_sample=False)
        new = out[:, PROMPTS["input_ids"].shape[1] :]
        assert not (new >= 140).any()
    with pytest.raises(ValueError, match=r"must be one of \('text', 'interleaved', 'image'\), got 'audio'"):
        model.generate(**PROMPTS, generation_mode="audio")


@pytest.mark.parametrize(("max_new_tokens", "strategy"), zip([3, 12, None, 3, 12], FEW))
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


@pytest.mark.parametrize(("max_new_tokens", "strategy"), zip([25, 8, 7, 25, 25], FEW))
def test_interleaved_mode_keeps_the_grammar_of_all_frames(model, strategy, max_new_tokens):
    torch.manual_seed(0)
    bias = {(3,): 4.0, (5,): 4.0, (6,): 2.0}
    call = {"generation_mode": "interleaved", "max_new_tokens": max_new_tokens, "sequence_bias": bias, **strategy}
    found = [frames_of(row) for row in model.generate(**MIXED, **call).tolist()]
    assert found[1][0] == "image" and found[2][0] == "audio"
    if max_new_tokens == 25 and "num_beams" not in strategy:
        assert {name for row in found for name in row} == {"image", "audio"}


def test_interleaved_mode_begins_what_fits(model):
    call = {**PROMPTS, "generation_mode": "interleaved", "do_sample": False}
    width = PROMPTS["input_ids"].shape[1]
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
