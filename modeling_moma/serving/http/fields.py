# SPDX-License-Identifier: Apache-2.0
"""What the fields of a request may be. One that is not named here is an error."""

import json
import math
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
)
from pydantic_core import PydanticCustomError
from transformers import GenerationConfig

from ...errors_moma import InputError
from .errors import RequestError, short
from .limits import (
    MAX_BEAMS,
    MAX_BIASES,
    MAX_CHARACTERS,
    MAX_DEPTH,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    MIN_TEMPERATURE,
    Limits,
)


MAX_SEED = 2**63 - 1


def _refusal(reason: str) -> PydanticCustomError:
    # pydantic would take braces of the reason for names of its message template
    return PydanticCustomError("refused", "{reason}", {"reason": reason})


def _unused(value: Any) -> Any:
    if value:
        raise _refusal("this server does nothing with it: leave it out")
    return value


def _no_logprobs(value: Any) -> Any:
    # 0 asks for those of the tokens themselves, beside none of others
    if value is not False:
        raise _refusal("this server gives none: leave it out")
    return value


def _one(value: Any) -> Any:
    if value is not None and (value != 1 or isinstance(value, bool)):
        raise _refusal("a request has one answer, so it must be 1")
    return value


def _limits(info: ValidationInfo) -> Limits:
    return cast(Limits, info.context)


def _new_tokens(value: int, info: ValidationInfo) -> int:
    most = _limits(info).max_new_tokens
    if value > most:
        raise _refusal(f"it must be at most {most} (`--max-new-tokens`)")
    return value


def _zero_or_warm(value: float) -> float:
    if 0 < value < MIN_TEMPERATURE:
        raise _refusal(f"it must be 0, or at least {MIN_TEMPERATURE}")
    return value


def _stops(value: Any) -> Any:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
        raise _refusal("it must be a text, or a list of texts, none of them empty")
    if len(words) > MAX_STOPS or max(map(len, words)) > MAX_STOP_CHARACTERS:
        raise _refusal(f"it must be at most {MAX_STOPS} texts of at most {MAX_STOP_CHARACTERS} characters each")
    return value


def _template_arguments(value: Any, info: ValidationInfo) -> Any:
    names = _limits(info).template_arguments
    for name, argument in value.items():
        if name not in names:
            known = ", ".join(sorted(names)) or "there are none"
            raise _refusal(f"{short(name)} is none of the names of `--template-arguments` ({known})")
        if argument is not None and not isinstance(argument, (bool, int, float, str)) or len(str(argument)) > 256:
            raise _refusal(f"{name} must be a short text, a number, true or false")
    return value


Unused = Annotated[Any, AfterValidator(_unused)]
One = Annotated[Any, AfterValidator(_one)]
Short = Annotated[str, Field(max_length=512)]
NewTokens = Annotated[int, Field(ge=1), AfterValidator(_new_tokens)]
Stops = Annotated[Any, BeforeValidator(_stops)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Fields):
    """`stream_options` of a request."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Format(_Fields):
    """`text.format` of a request."""

    type: Literal["text"]


class TextOptions(_Fields):
    """`text` of a request."""

    format: Format | None = None
    verbosity: Unused = None


class GenerationSettings(_Fields):
    """What `generation_config` may hold: settings of sampling and length."""

    do_sample: bool | None = None
    early_stopping: bool | None = None
    renormalize_logits: bool | None = None
    max_new_tokens: NewTokens | None = None
    min_new_tokens: Annotated[int, Field(ge=0), AfterValidator(_new_tokens)] | None = None
    max_time: Annotated[float, Field(gt=0)] | None = None
    temperature: Annotated[float, Field(ge=MIN_TEMPERATURE, le=100)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**20)] | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    typical_p: Share | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=64)] | None = None
    guidance_scale: Annotated[float, Field(ge=1, le=20)] | None = None
    num_beams: Annotated[int, Field(ge=1, le=MAX_BEAMS)] | None = None
    num_return_sequences: One = 1
    stop_strings: Stops | None = None


class Settings(_Fields):
    """Fields that every kind of request has."""

    model: Short | None = None
    temperature: Annotated[float, Field(ge=0, le=2), AfterValidator(_zero_or_warm)] | None = None
    top_p: Share | None = None
    seed: Annotated[int, Field(ge=-MAX_SEED, le=MAX_SEED)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    generation_config: Annotated[str, Field(max_length=4096)] | None = None
    user: Short | None = None


class _Completing(Settings):
    """Fields of chat and of completions."""

    max_tokens: NewTokens | None = None
    # the server sets repetition_penalty to 1 + frequency_penalty, which must stay above 0
    frequency_penalty: Annotated[float, Field(ge=-0.99, le=2)] | None = None
    presence_penalty: Unused = None
    stop: Stops | None = None
    n: One = 1
    logprobs: Unused = None


class _Conversing(Settings):
    """Fields of chat and of responses."""

    metadata: Annotated[dict[Short, Short], Field(max_length=16)] | None = None
    safety_identifier: Short | None = None
    prompt_cache_key: Short | None = None
    service_tier: Short | None = None
    store: Unused = None
    top_logprobs: Unused = None
    parallel_tool_calls: bool | None = None
    tools: Unused = None
    tool_choice: Literal["none", "auto"] | None = None


class CompletionSettings(_Completing):
    """`/v1/completions`."""

    prompt: Annotated[str, Field(min_length=1)]
    suffix: Short | None = None
    logprobs: Annotated[Any, AfterValidator(_no_logprobs)] = False
    best_of: One = 1
    echo: Unused = None
    logit_bias: Unused = None


Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[str, Field(pattern="^[0-9]{1,9}$")]


class ChatSettings(_Completing, _Conversing):
    """`/v1/chat/completions`."""

    messages: Any = None
    max_completion_tokens: NewTokens | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Field(min_length=1, max_length=MAX_BIASES)] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_template_arguments)] | None = None
    response_format: Format | None = None
    modalities: list[Literal["text"]] | None = None


class ResponseSettings(_Conversing):
    """`/v1/responses`."""

    input: Any = None
    instructions: str | None = None
    max_output_tokens: NewTokens | None = None
    text: TextOptions | None = None
    truncation: Literal["disabled"] | None = None
    include: Unused = None
    background: Unused = None


# fields of a request, and the setting of generation that each of them sets
SETS = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_output_tokens": "max_new_tokens",
    "stop": "stop_strings",
    "temperature": "temperature",
    "top_p": "top_p",
    "frequency_penalty": "repetition_penalty",
}


def check_settings(body: dict[str, Any], kind: type[Settings], limits: Limits):
    """Check all of a body but its messages.

    Args:
        body (`dict[str, Any]`):
            without nulls; comes back with `stream`, and with fractions where generation takes no whole numbers,
            also in its `generation_config`.
        kind (`type[Settings]`):
            of the request.
        limits (`Limits`):
            of the server.

    Raises:
        RequestError: a text that is none, a number that is not finite, an unknown field (status 422), or a value of
            another type or out of its range; or two that contradict each other, one of which would not be heeded.
    """
    _check_values(body)
    settings: Any = _validated(kind, body, limits)
    if limits.pinned is not None and settings.model not in (None, limits.pinned):
        raise RequestError("model", f"{short(settings.model)} is not served here, only {limits.pinned!r}.", 404)
    if limits.pinned is None and not (settings.model and settings.model.isprintable()):
        raise RequestError(
            "model", "there must be the name or the folder of a model: this server has none of its own."
        )
    body["stream"] = settings.stream
    if "logit_bias" in body:
        body["logit_bias"] = settings.logit_bias
    if settings.generation_config is not None:
        body["generation_config"] = _checked_generation_config(settings.generation_config, settings.stream, limits)
    _check_agreement(body)


def _check_agreement(body: dict[str, Any]):
    """Check that no two fields say different things of one setting, and that the fewest new tokens fit."""
    given = {
        name: (f"generation_config.{name}", value)
        for name, value in json.loads(body.get("generation_config", "{}")).items()
        if value is not None
    }
    for field, name in SETS.items():
        if field not in body:
            continue
        # as the server takes them
        wanted = body[field] + 1 if field == "frequency_penalty" else body[field]
        place, value = given.setdefault(name, (field, wanted))
        if _listed(value) != _listed(wanted):
            raise RequestError(place, f"{short(value)}, but `{field}` is {short(body[field])}: give one of them.")
    least, most = (given.get(name, (name, None)) for name in ("min_new_tokens", "max_new_tokens"))
    if least[1] is not None and most[1] is not None and least[1] > most[1]:
        raise RequestError(least[0], f"{least[1]} is more than `{most[0]}`, {most[1]}.")


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _check_values(body: dict[str, Any]):
    """Check that texts can be encoded and are short enough, numbers are finite, and nothing is nested deep."""
    characters = 0
    pending: list[tuple[str, Any, int]] = [("", body, 0)]
    while pending:
        place, value, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise RequestError(place[:80], f"it is nested deeper than {MAX_DEPTH} levels.")
        if isinstance(value, str):
            if not value.isascii():
                _check_encodable(place, value)
            # images and sounds have bounds of their own
            characters += 0 if place.endswith((".image_url", ".image_url.url", ".input_audio.data")) else len(value)
            if characters > MAX_CHARACTERS:
                raise RequestError(place, f"the texts have more than {MAX_CHARACTERS:,} characters in all.", 413)
        elif isinstance(value, float) and not math.isfinite(value):
            raise RequestError(place, f"{value} is no finite number.")
        elif isinstance(value, dict):
            for name in value:
                _check_encodable(place or "body", name)
                pending.append((f"{place}.{name[:64]}" if place else name[:64], value[name], depth + 1))
        elif isinstance(value, list):
            pending += [(f"{place}[{index}]", entry, depth + 1) for index, entry in enumerate(value)]


def _check_encodable(place: str, text: str):
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise RequestError(
            place, f"half a pair of surrogates (\\u{code:04x}) at character {error.start} is no text."
        ) from None


def _validated(kind: type[BaseModel], values: Any, limits: Limits, prefix: str = "") -> BaseModel:
    try:
        return kind.model_validate(values, context=limits)
    except ValidationError as errors:
        error = errors.errors(include_url=False, include_context=False)[0]
        place = prefix + ".".join(str(part) for part in error["loc"])
        if error["type"] == "extra_forbidden":
            raise RequestError(place[:120], "this server reads no such field.", 422) from None
        given = "" if error["type"] == "missing" else f"{short(error['input'])}: "
        raise RequestError(place[:120], f"{given}{error['msg'][0].lower()}{error['msg'][1:]}.") from None


def _checked_generation_config(text: str, is_stream: bool, limits: Limits) -> str:
    """Return the settings as Transformers takes them: it refuses a temperature of 2, which clients write for 2.0."""
    name = "generation_config"
    try:
        given = json.loads(text)
        if not isinstance(given, dict):
            raise InputError(f"it holds a {type(given).__name__}")
    # RecursionError: 4,096 characters may nest deeper than the parser can follow
    except (ValueError, RecursionError) as error:
        raise RequestError(
            name, f"{short(text)} must be the JSON of an object of generation settings ({error})."
        ) from error
    _check_values({name: given})
    settings: Any = _validated(GenerationSettings, given, limits, f"{name}.")
    if is_stream and (settings.num_beams or 1) > 1:
        raise RequestError(f"{name}.num_beams", "beams end together and cannot be streamed: ask for the whole answer.")
    taken = settings.model_dump(exclude_unset=True)
    try:
        GenerationConfig(**taken).validate()
    except (ValueError, TypeError, AttributeError) as error:
        raise RequestError(name, f"{short(text)} contradicts itself ({error}).") from error
    return json.dumps(taken)
