# SPDX-License-Identifier: Apache-2.0
"""A model as EleutherAI's lm-evaluation-harness asks it, of text alone."""

from typing import Any

import torch

from ..utils.errors import needs_extra


with needs_extra("the harness is lm-evaluation-harness", "eval"):
    from lm_eval.models.huggingface import HFLM


class MomaTextLM(HFLM):
    """The `hf` model of the harness, of a [`MomaForCausalLM`] whose next token is sure to be one of text.

    `--model hf` takes a MoMa as it is, and then the tokens of images have a share of every prediction. Here the model
    of text in it is measured, as `generate(generation_mode="text")` writes it: so a converted model has the figures of
    the text model that it was made of.

    Example:
    ```python
    >>> import lm_eval
    >>> from modeling_moma.evaluation.harness import MomaTextLM

    >>> model = MomaTextLM(pretrained="runs/smollm2", dtype="float32", device="cpu", batch_size=8)
    >>> lm_eval.simple_evaluate(model=model, tasks=["lambada_openai"])["results"]
    ```
    """

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits_BSV = super()._model_call(inps, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        config = self.config  # pyright: ignore[reportAttributeAccessIssue]
        for start, stop in (bounds for ranges in config.modality_token_ranges.values() for bounds in ranges):
            logits_BSV[..., start:stop] = -torch.inf
        for frame in config.frames.values():
            logits_BSV[..., [frame.begin, frame.end]] = -torch.inf
        return logits_BSV
