# SPDX-License-Identifier: Apache-2.0
"""Rows of the embedding and of the head for the tokens that a text model gets: images begin at a uniform loss.

Shape suffixes:
    B rows of a batch, T positions, N positions in one line, D hidden size, V vocabulary, C codes, R dimensions that
    the positions span.
"""

import math
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.utils import logging

from ..configuration_moma import MomaConfig
from ..modeling_moma import MomaForCausalLM
from .transfer import streamed_model


# of an embedding
ROWS_AT_ONCE = 1024
# new rows lie around the mean of the old ones, at this share of their spread, to be told apart
NEW_ROW_SPREAD = 0.1
# codes of an image in the texts for the fit; longer ones look the same to a model that learnt none
MOST_CODES = 64
# fits in a row with a tied head: each moves the embedding, and with it the states that the next one sees
ROUNDS = 4
# margin in nats by which image codes shall stay below words where words follow
MARGIN = 2.0
# weight of the distance from the mean row, against that of the mean error
RIDGE = 1e-2
# dimensions of the states before codes in which the rows of the codes are all equal
LEVELLED = 32
# share of the kinds of positions in the error
SHARES = {"codes": 0.2, "words": 0.3, "first": 0.2, "after": 0.2, "odd": 0.1}
TEXTS = (
    "The weather was fine, so we walked to the market and bought bread, cheese and two bottles of milk.",
    "noto: red apple",
    "A small dog with a blue collar runs across a wide green field.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))",
    "In 1969 the first people landed on the moon. It took them four days to get there.",
    "tags: flag, europe, blue, white, cross",
    "What is the capital of France? The capital of France is Paris.",
    "Mix the flour with the eggs, add a little salt, and bake it for half an hour.",
    "He opened the window and looked out. It had rained all night, and the street was still wet.",
    "Yes, I can help you with that. Here are three steps:\n1. Open the file.\n2. Read each line.",
    "flag: belgium",
    "This is a picture of a house. What can you see in it? A house.",
)
# kinds of positions by what follows: a code, a word, a word after the first token, a word after an image, a word of
# words at random
CODES, WORDS, FIRST, AFTER, ODD, NEITHER = range(6)


def extend_rows(old: torch.Tensor, num_rows: int, new_ids: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Give an embedding rows for new tokens: the mean of the old, and noise of 0.1 of their standard deviation."""
    new = torch.tensor(new_ids)
    is_kept = torch.ones(len(old), dtype=torch.bool)
    is_kept[new[new < len(old)]] = False
    total = torch.zeros(2, old.shape[1], dtype=torch.float64)
    # summed in pieces: all rows in double precision would take several times the embedding's memory
    for rows, kept in zip(old.split(ROWS_AT_ONCE), is_kept.split(ROWS_AT_ONCE)):
        rows = rows[kept].double()
        total += torch.stack([rows.sum(dim=0), rows.square().sum(dim=0)])
    mean, mean_square = total / is_kept.sum()
    std = (mean_square - mean.square()).clamp_min(0).sqrt()
    noise = torch.randn(len(new_ids), old.shape[1], generator=generator)
    result = old.new_empty(num_rows, old.shape[1])
    result[: len(old)] = old
    result[new] = (mean + NEW_ROW_SPREAD * std * noise).to(old.dtype)
    return result


@dataclass
class ImageTexts:
    """Token ids of texts with an image each, before the words or after them."""

    words: Sequence[tuple[Sequence[int], Sequence[int]]]
    opening: Sequence[int]
    begin: int
    end: int
    code_ids: Sequence[int]
    num_codes: int
    odd: Sequence[Sequence[int]]

    def batch(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids, padded with -1, and the kind of each position, both `[B, T]`; every seed draws other codes."""
        generator = torch.Generator().manual_seed(seed)
        rows, kinds = [], []
        for place, (opened, plain) in enumerate(self.words):
            picks = torch.randint(len(self.code_ids), (self.num_codes,), generator=generator).tolist()
            image = [self.begin, *(self.code_ids[pick] for pick in picks), self.end]
            # the last code is followed by the end token, which the grammar forces: nothing to fit
            of_image = [CODES] * self.num_codes + [NEITHER, AFTER]
            if place % 2:
                rows.append([*opened, *image])
                kinds.append([FIRST, *[WORDS] * (len(opened) - 1), *of_image])
            else:
                rows.append([*self.opening, *image, *plain])
                kinds.append([FIRST] * len(self.opening) + of_image + [WORDS] * len(plain))
                # the first position of all has a state of its own, alike for words and images
                if not self.opening:
                    kinds[-1][0] = NEITHER
        for words in self.odd:
            rows.append([*self.opening, *words])
            kinds.append([FIRST, *[ODD] * (len(rows[-1]) - 1)])
        longest = max(map(len, rows))
        rows = [row + [-1] * (longest - len(row)) for row in rows]
        kinds = [kind + [NEITHER] * (longest - len(kind)) for kind in kinds]
        return torch.tensor(rows), torch.tensor(kinds)


@torch.no_grad()
def fit_code_rows(
    config: MomaConfig, weights: Mapping[str, torch.Tensor], texts: ImageTexts, head: str
) -> torch.Tensor:
    """Return rows of the head with which codes follow codes and words follow words, each code as likely as the next.

    A new token whose row is the mean of the others has the mean of their logits, which a model that is sure of its
    words leaves far behind: images then begin at a loss far above that of a guess among all tokens. The codes share
    a vector instead, found by a logistic regression on the model's own states: it tells positions before a code from
    positions before a word by `log sum exp` of the codes' logits less that of the words'. The logits of the words stay
    as they are.
    """
    is_tied = config.tie_word_embeddings
    # computed before the head is loaded, to save memory
    states = None if is_tied else _states(config, weights, texts, seed=0)
    head_VD = weights[head]
    codes = torch.tensor(texts.code_ids)
    start_CD = head_VD[codes].float()
    mean_D = start_CD.mean(dim=0)
    noise_CD, shared_D = start_CD - mean_D, mean_D
    for number in logging.tqdm(range(ROUNDS if is_tied else 1), desc="rows of image codes"):
        moved = ChainMap({head: head_VD}, weights)  # pyright: ignore[reportArgumentType]
        state_ND, kind_N = states or _states(config, moved, texts, seed=number)
        # nothing can be fitted to damaged weights; the probe reports them
        if not state_ND.isfinite().all():
            return start_CD
        fitted_D = _fit_shared(state_ND, kind_N, _log_sum_exp(state_ND, head_VD, texts.code_ids), mean_D, len(codes))
        # move half the way only, since the states follow
        shared_D = fitted_D if number == 0 else (shared_D + fitted_D) / 2
        head_VD[codes] = (shared_D + _levelled(noise_CD, state_ND[kind_N == CODES])).to(head_VD.dtype)
    return head_VD[codes]


@torch.no_grad()
def image_loss(config: MomaConfig, weights: Mapping[str, torch.Tensor], texts: ImageTexts, head: str) -> float:
    """Return the mean cross-entropy of the codes in nats over the whole vocabulary, on codes that no fit has seen."""
    ids_BT, kind_BT = texts.batch(seed=ROUNDS)
    state_ND, kind_N = _states(config, weights, texts, seed=ROUNDS)
    targets_N = F.pad(ids_BT, (0, 1))[:, 1:].flatten()[kind_BT.flatten() == CODES]
    state_ND = state_ND[kind_N == CODES]
    head_VD = weights[head]
    logit_N = (state_ND * head_VD[targets_N].float()).sum(dim=1)
    return float((_log_sum_exp(state_ND, head_VD, []) - logit_N).mean())


def _states(
    config: MomaConfig, weights: Mapping[str, torch.Tensor], texts: ImageTexts, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return last hidden states `[N, D]` of all positions and their kinds `[N]`."""
    ids_BT, kind_BT = texts.batch(seed)
    model = streamed_model(MomaForCausalLM, config, weights)
    output = model.model(input_ids=ids_BT.clamp_min(0), attention_mask=(ids_BT >= 0).long(), use_cache=False)
    return output.last_hidden_state.float().flatten(0, 1), kind_BT.flatten()


def _log_sum_exp(state_ND: torch.Tensor, head_VD: torch.Tensor, without: Sequence[int]) -> torch.Tensor:
    """Return `log sum exp` `[N]` of the logits of all tokens but some, in pieces of the vocabulary."""
    hidden_V = torch.zeros(len(head_VD))
    hidden_V[list(without)] = -torch.inf
    result_N = torch.full((len(state_ND),), -torch.inf)
    for part_VD, part_V in zip(head_VD.split(ROWS_AT_ONCE), hidden_V.split(ROWS_AT_ONCE)):
        logits_NV = state_ND @ part_VD.float().T + part_V
        result_N = torch.logaddexp(result_N, logits_NV.logsumexp(dim=1))
    return result_N


def _fit_shared(
    state_ND: torch.Tensor, kind_N: torch.Tensor, words_N: torch.Tensor, mean_D: torch.Tensor, num_codes: int
) -> torch.Tensor:
    """Return the vector that all codes share, by Newton's method in the space that the states span."""
    chosen_N = kind_N != NEITHER
    state_ND, kind_N, words_N = state_ND[chosen_N].double(), kind_N[chosen_N], words_N[chosen_N].double()
    is_code_N = (kind_N == CODES).double()
    weight_N = torch.zeros_like(words_N)
    for kind, share in zip((CODES, WORDS, FIRST, AFTER, ODD), SHARES.values()):
        members = kind_N == kind
        weight_N[members] = share / members.sum().clamp_min(1)
    basis_DR, _ = torch.linalg.qr(state_ND.T)
    state_NR = state_ND @ basis_DR
    ridge = RIDGE * float(state_ND.square().sum(dim=1).mean()) / state_ND.shape[1]
    # log odds of the codes against the words for the mean row
    offset_N = state_ND @ mean_D.double() + math.log(num_codes) - words_N + MARGIN * (1 - is_code_N)

    def error(change_R: torch.Tensor) -> float:
        odds_N = offset_N + state_NR @ change_R
        return float(
            (weight_N * (F.softplus(odds_N) - is_code_N * odds_N)).sum() + ridge / 2 * change_R.square().sum()
        )

    change_R = torch.zeros(state_NR.shape[1], dtype=torch.float64)
    for _ in range(50):
        share_N = torch.sigmoid(offset_N + state_NR @ change_R)
        slope_R = state_NR.T @ (weight_N * (share_N - is_code_N)) + ridge * change_R
        bend_RR = (state_NR.T * (weight_N * share_N * (1 - share_N))) @ state_NR
        bend_RR.diagonal().add_(ridge)
        step_R, length, here = torch.linalg.solve(bend_RR, slope_R), 1.0, error(change_R)
        while error(change_R - length * step_R) > here and length > 1e-4:
            length /= 2
        change_R = change_R - length * step_R
        if length * float(step_R.norm()) < 1e-5:
            break
    return (mean_D.double() + basis_DR @ change_R).float()


def _levelled(noise_CD: torch.Tensor, state_ND: torch.Tensor) -> torch.Tensor:
    """Return noise without the part that states before codes see most of, so that no code is likelier than another."""
    dimensions = min(LEVELLED, noise_CD.shape[1] // 4)
    _, _, directions_RD = torch.linalg.svd(state_ND, full_matrices=False)
    directions_RD = directions_RD[:dimensions]
    return noise_CD - noise_CD @ directions_RD.T @ directions_RD
