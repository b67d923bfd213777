# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance by two requests a token, for servers whose requests know nothing of one another.

Shape suffixes: V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...configuration_moma import MomaConfig
from ...errors_moma import InputError
from ...frames_moma import IMAGE
from .grammar import FREE, FrameGrammar, FrameRow


# takes rows of ids, and gives each the log-probabilities `[V]` of its next token
NextLogprobs = Callable[[list[list[int]]], Sequence[torch.Tensor]]


def guided_frame(
    next_logprobs: NextLogprobs,
    config: MomaConfig,
    prompt: Sequence[int],
    guidance_scale: float,
    modality: str = IMAGE,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Write one frame with guidance: greedily it equals `generate(guidance_scale=...)`.

    Each code takes two requests of one token, with the prompt and without. A server with a prefix cache computes
    little more than that token.

    Args:
        next_logprobs (`NextLogprobs`):
            asks the server, see [`engine_logprobs`] and [`server_logprobs`].
        config (`MomaConfig`):
            of the model.
        prompt (`Sequence[int]`):
            token ids of the words, which may end inside a frame.
        guidance_scale (`float`):
            1 is no guidance.
        modality (`str`, *optional*, defaults to `IMAGE`):
            what to draw, one of `config.frames`.
        temperature (`float`, *optional*, defaults to `0.0`):
            0 is greedy.
        generator (`torch.Generator`, *optional*):
            for temperatures above 0.

    Returns:
        `list[int]`: new token ids, from the frame's begin (unless the prompt has it) to its end.

    Raises:
        ValueError: a modality without a frame, no beginning token, a negative temperature, or no tokens for the frame.
    """
    if modality not in config.frames:
        raise InputError(f"`modality` must be one of {list(config.frames)}, got {modality!r}.")
    if config.bos_token_id is None:
        raise InputError("`bos_token_id` of the configuration is None: the row without the prompt begins with it.")
    if temperature < 0:
        raise InputError(f"`temperature` must be 0 or more, got {temperature}.")
    frame = config.frames[modality]
    conditional = list(prompt)
    ids_BT = torch.tensor([conditional])
    missing = int(frame.missing_tokens(ids_BT))
    if len(conditional) + missing > config.max_position_embeddings:
        raise InputError(
            f"`prompt` has {len(conditional)} tokens and the frame needs {missing} more, which exceeds "
            f"`max_position_embeddings` ({config.max_position_embeddings}): shorten the prompt."
        )
    open_codes = int(frame.open_codes(ids_BT))
    unconditional = [config.bos_token_id, *(conditional[-1 - open_codes :] if open_codes >= 0 else [])]
    grammar = FrameGrammar(config)
    row = FrameRow(grammar, modality, conditional, config.max_position_embeddings)
    written: list[int] = []
    while not row.is_done:
        verdict = row.verdict()
        token = verdict.forced
        if token is None:
            with_prompt_V, without_V = next_logprobs([conditional, unconditional])
            scores_1V = (without_V + guidance_scale * (with_prompt_V - without_V))[None]
            scores_V = grammar.restrict(scores_1V, {0: verdict})[0]
            token = _choose(scores_V, temperature, generator)
        for ids in (conditional, unconditional, written):
            ids.append(token)
        row.write([token])
    return written


def engine_logprobs(llm: Any) -> NextLogprobs:
    """Ask vLLM's `LLM`.

    Args:
        llm (`Any`):
            made with `max_logprobs=-1`.
    """
    # without vLLM pyright takes this folder for it
    from vllm import SamplingParams  # pyright: ignore[reportAttributeAccessIssue]

    # detokenizing the whole vocabulary would take longer than the model
    params = SamplingParams(
        max_tokens=1, temperature=0.0, logprobs=-1, detokenize=False, extra_args={"generation_mode": FREE}
    )

    def ask(rows: list[list[int]]) -> list[torch.Tensor]:
        prompts = [{"prompt_token_ids": row} for row in rows]
        answers = llm.generate(prompts, params, use_tqdm=False)
        tables = [answer.outputs[0].logprobs[0] for answer in answers]
        return [_row({token: entry.logprob for token, entry in table.items()}) for table in tables]

    return ask


def server_logprobs(client: Any, model: str, vocab_size: int) -> NextLogprobs:
    """Ask vLLM's server, started with `--max-logprobs -1`.

    Args:
        client (`Any`):
            an `openai.OpenAI`.
        model (`str`):
            the name that the server has for the model.
        vocab_size (`int`):
            `config.vocab_size`.
    """

    def ask(rows: list[list[int]]) -> list[torch.Tensor]:
        answer = client.completions.create(
            model=model,
            prompt=rows,
            max_tokens=1,
            temperature=0.0,
            logprobs=vocab_size,
            extra_body={"vllm_xargs": {"generation_mode": FREE}, "return_tokens_as_token_ids": True},
        )
        choices = sorted(answer.choices, key=lambda choice: choice.index)
        tables = [choice.logprobs.top_logprobs[0] for choice in choices]
        # the server names tokens "token_id:17"
        return [_row({int(name.rpartition(":")[2]): value for name, value in table.items()}) for table in tables]

    return ask


def _row(logprobs: dict[int, float]) -> torch.Tensor:
    values_V = torch.full((max(logprobs) + 1,), -torch.inf)
    values_V[list(logprobs)] = torch.tensor(list(logprobs.values()), dtype=torch.float32)
    return values_V


def _choose(scores_V: torch.Tensor, temperature: float, generator: torch.Generator | None) -> int:
    if temperature == 0:
        return int(scores_V.argmax())
    return int(torch.multinomial(torch.softmax(scores_V / temperature, dim=-1), 1, generator=generator))
