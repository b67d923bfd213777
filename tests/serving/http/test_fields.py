# SPDX-License-Identifier: Apache-2.0
"""Fields of a request: what is refused by its name, and what generation gets."""

import json

import pytest
from transformers import GenerationConfig

from modeling_moma.serving.http.errors import RequestError
from modeling_moma.serving.http.fields import ChatSettings, CompletionSettings, check_settings
from modeling_moma.serving.http.limits import Limits


def checked(**fields) -> dict:
    """The body after its check."""
    check_settings(fields, ChatSettings, Limits(pinned="moma"))
    return fields


@pytest.mark.parametrize("temperature", [1e-310, 1e-38, 9e-4])
def test_temperature_that_makes_logits_infinite_is_refused(temperature):
    with pytest.raises(RequestError, match="it must be 0, or at least 0.001") as refusal:
        checked(temperature=temperature)
    assert (refusal.value.field, refusal.value.status) == ("temperature", 400)
    with pytest.raises(RequestError, match="greater than or equal to 0.001") as refusal:
        checked(generation_config=json.dumps({"do_sample": True, "temperature": temperature}))
    assert (refusal.value.field, refusal.value.status) == ("generation_config.temperature", 400)


@pytest.mark.parametrize("logprobs", [0, 1, True])
def test_log_probabilities_of_a_completion_are_refused_also_those_of_its_tokens_alone(logprobs):
    body = {"prompt": "a", "logprobs": logprobs}
    with pytest.raises(RequestError, match="this server gives none") as refusal:
        check_settings(body, CompletionSettings, Limits(pinned="moma"))
    assert (refusal.value.field, refusal.value.status) == ("logprobs", 400)
    check_settings({"prompt": "a", "logprobs": False}, CompletionSettings, Limits(pinned="moma"))
    # of a chat it is yes or no, and 0 of others beside
    checked(logprobs=False, top_logprobs=0)


def test_temperatures_of_0_and_of_the_least_are_taken():
    for temperature in (0, 0.0, 1e-3, 2):
        checked(temperature=temperature)
    checked(generation_config='{"do_sample": true, "temperature": 0.001}')


def test_whole_numbers_of_generation_settings_become_fractions():
    whole = {"do_sample": True, "temperature": 2, "repetition_penalty": 1, "top_p": 1, "length_penalty": 0}
    others = {"top_k": 5, "max_new_tokens": 4, "stop_strings": ["a"], "min_p": None}
    body = checked(generation_config=json.dumps({**whole, **others}))
    taken = json.loads(body["generation_config"])
    assert taken == {**whole, **others}
    assert {type(taken[name]) for name in whole if name != "do_sample"} == {float}
    assert type(taken["top_k"]) is type(taken["max_new_tokens"]) is int
    GenerationConfig(**taken).validate()


def test_settings_that_are_not_given_stay_away():
    assert json.loads(checked(generation_config="{}")["generation_config"]) == {}
    assert "generation_config" not in checked(temperature=0)


@pytest.mark.parametrize(
    ("fields", "settings", "place"),
    [
        ({"max_tokens": 16}, {"max_new_tokens": 3}, "generation_config.max_new_tokens"),
        ({"max_tokens": 4, "max_completion_tokens": 8}, {}, "max_tokens"),
        ({"stop": "("}, {"stop_strings": ["ar"]}, "generation_config.stop_strings"),
        ({"temperature": 2}, {"do_sample": True, "temperature": 0.01}, "generation_config.temperature"),
        ({"top_p": 0.5}, {"do_sample": True, "top_p": 0.25}, "generation_config.top_p"),
        ({"frequency_penalty": 0.5}, {"repetition_penalty": 0.5}, "generation_config.repetition_penalty"),
        ({"max_tokens": 4}, {"min_new_tokens": 100}, "generation_config.min_new_tokens"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields, settings, place):
    with pytest.raises(RequestError, match="give one of them|is more than `max_tokens`, 4") as refusal:
        checked(**fields, generation_config=json.dumps(settings))
    assert (refusal.value.field, refusal.value.status) == (place, 400)


def test_fields_that_say_the_same_twice_are_taken():
    same = {"max_new_tokens": 4, "stop_strings": ["a"], "do_sample": True, "temperature": 1, "repetition_penalty": 1.5}
    checked(
        max_tokens=4,
        max_completion_tokens=4,
        stop="a",
        temperature=1.0,
        frequency_penalty=0.5,
        generation_config=json.dumps({**same, "min_new_tokens": 4}),
    )
