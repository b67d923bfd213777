# SPDX-License-Identifier: Apache-2.0
"""Names, tags and search of images by the likelihoods of a model that was trained on captions, and by its memory.

Shape suffixes:
    N images, S views of them, B of these at once, L codes of an image, Q queries, K beams, T tokens, V vocabulary,
    D hidden size.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F
from transformers import DynamicCache

from ..data.encoding import DocumentEncoder, processor_fingerprint, with_channels_last
from ..errors_moma import InputError
from ..hub.loading import open_model, open_processor
from ..utils.fields import check_utf8
from . import MOST_GUESSES, MOST_VIEWS
from .memory import ImageMemory, memory_of


# beams for each name or tag that is asked for: some differ in the token that ends them alone
BEAMS_EACH = 2
# of an image at least: fewer lose the likeliest text behind its first tokens, and the first of few would be another
LEAST_BEAMS = 10
# longest name or tag
MOST_TOKENS = 16
# beams of each image in a full batch: where there are more, images are fewer, since beams are what needs memory
FULL_BATCH_BEAMS = 4
# by how much the views of an image are moved down and to the right, in parts of its sides: a pixel of 64
SHIFT = 1 / 64
SHIFTS = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1))


@dataclass(frozen=True)
class Guess:
    """A name or a tag of an image."""

    text: str
    probability: float


def mean_guesses(views: Sequence[Mapping[str, float]]) -> list[Guess]:
    """Return the texts of the views of an image with their mean probabilities, the likeliest first."""
    totals = _likeliest((1.0, texts) for texts in views)
    return [Guess(guess.text, guess.probability / len(views)) for guess in totals]


def mixed_guesses(
    written: Sequence[Sequence[Guess]], known: Sequence[Mapping[str, float]], share: float
) -> list[list[Guess]]:
    """Return guesses of a model and shares of a memory as one, the likeliest first."""
    found = []
    for guesses, shares in zip(written, known, strict=True):
        weight = share if shares else 0.0
        texts = {guess.text: guess.probability for guess in guesses}
        both = _likeliest([(1 - weight, texts), (weight, shares)])
        found.append([guess for guess in both if guess.probability > 0])
    return found


def _likeliest(parts: Iterable[tuple[float, Mapping[str, float]]]) -> list[Guess]:
    """Return the sums of weighted probabilities, the largest first."""
    totals = defaultdict(float)
    for weight, texts in parts:
        for text, probability in texts.items():
            totals[text] += weight * probability
    return [Guess(text, total) for text, total in sorted(totals.items(), key=lambda entry: -entry[1])]


def check_queries(queries: Sequence[str]) -> None:
    """Raise `ValueError` where there is no list of queries, or one of them has no words or is no text."""
    if isinstance(queries, str):
        raise InputError(f"`queries` is the text {queries!r}: give a list of texts, [{queries!r}].")
    if not queries:
        raise InputError("`queries` is empty: give the words to look for.")
    if others := [query for query in queries if not isinstance(query, str)]:
        raise InputError(f"query {others[0]!r}: it is no text, but {type(others[0]).__name__}.")
    if blank := [query for query in queries if not query.strip()]:
        raise InputError(f"query {blank[0]!r}: there are no words in it to look for.")
    for query in queries:
        check_utf8("query", query)


@dataclass(frozen=True)
class CaptionForm:
    """How the captions are written that a model was trained on, behind their images.

    The defaults are for captions such as `house (tabler, filled)`, and `tags: home, building` in any order.
    """

    name_prompt: str = ""
    name_ends: tuple[str, ...] = (" (",)
    tag_prompt: str = "tags:"
    tag_ends: tuple[str, ...] = (",",)

    def __post_init__(self):
        """Leave out spaces that words bring along: captions do not have two."""
        for name in ("name_prompt", "tag_prompt"):
            check_utf8(f"`{name}`", getattr(self, name))
            object.__setattr__(self, name, getattr(self, name).rstrip(" "))


class ImageLabeler:
    """Names, tags and finds images.

    A name's probability is that of a caption to begin with it and to end or to go on as `form` says, among those that
    are no lists of tags. Tags stand in any order in training, so those that are likely as the first one are the tags.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        form: CaptionForm = CaptionForm(),
        batch_size: int = 32,
        views: int = 1,
        memory: ImageMemory | None = None,
        memory_share: float = 0.5,
    ):
        if not 1 <= views <= MOST_VIEWS:
            raise InputError(f"`views` is {views}: an image can have 1 to {MOST_VIEWS} of them.")
        if batch_size < 1:
            raise InputError(f"`batch_size` is {batch_size}: it must be at least 1.")
        if not 0 <= memory_share <= 1:
            raise InputError(f"`memory_share` is {memory_share}: it is a share, from 0 to 1.")
        self.model, self.processor, self.form = model, processor, form
        self.batch_size, self.views = batch_size, views
        self.memory, self.memory_share = memory, memory_share
        self._encoder, self._prompts = DocumentEncoder(processor), (form.name_prompt, form.tag_prompt)
        self._name_ends = self._ends(form.name_prompt, form.name_ends)
        self._tag_ends = self._ends(form.tag_prompt, form.tag_ends)
        self._word_ends = self._word_ends_of_vocabulary()
        # what makes tags of a caption that has begun as one of a name does
        tags_begin_alike = form.tag_prompt.startswith(form.name_prompt) and form.tag_prompt != form.name_prompt
        self._tag_begins = self._text_ids(form.name_prompt, form.tag_prompt) if tags_begin_alike else []

    def encode(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return the codes of images, which is all that the model sees of them."""
        if not len(images):
            raise InputError("`images` is empty: give the images to encode.")
        return self.encode_pixels(torch.cat([self.pixel_values(image) for image in images]))

    def pixel_values(self, image: Image.Image) -> torch.Tensor:
        """Return an image as the image tokenizer takes it, `[1, 3, height, width]`."""
        return self.processor.image_processor([image], return_tensors="pt")["pixel_values"]

    def is_blank(self, pixel_values: torch.Tensor) -> bool:
        """Return whether [`pixel_values`] of one image are white all over: no name of it would mean anything."""
        if pixel_values.min() != pixel_values.max():
            return False
        (image,) = self.processor.image_processor.postprocess(pixel_values)["pixel_values"]
        return image.getpixel((0, 0)) == (255, 255, 255)

    def encode_pixels(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the codes of pixel values `[N, 3, height, width]`, as [`encode`] does."""
        # what reads data sets is imported late, here and below: a search of what has been coded needs none of it
        from ..evaluation.measures import encode_images

        views = (moved(pixel_values, *shift) for shift in SHIFTS[: self.views])
        codes = [encode_images(self.processor, iter(view.split(self.batch_size))) for view in views]
        return codes[0] if self.views == 1 else torch.stack(codes, dim=1)

    def names(self, codes: torch.Tensor, count: int = 5) -> list[list[Guess]]:
        """Return the likeliest names of each image, the likeliest first, by a beam search and by the memory."""
        found = self.beam_names(codes, count)
        if self.memory is not None:
            found = mixed_guesses(found, self.memory.name_shares(self.features(codes)), self.memory_share)
        return [guesses[:count] for guesses in found]

    def tags(self, codes: torch.Tensor, count: int = 8) -> list[list[Guess]]:
        """Return the likeliest tags of each image, see [`names`]."""
        found = self.beam_tags(codes, count)
        if self.memory is not None:
            found = mixed_guesses(found, self.memory.tag_shares(self.features(codes)), self.memory_share)
        return [guesses[:count] for guesses in found]

    def beam_names(self, codes: torch.Tensor, count: int = 5) -> list[list[Guess]]:
        """Return what the beam search of [`names`] finds without a memory: `count` names and what else it met."""
        return self._guesses(codes, self.form.name_prompt, self._name_ends, count, self._tag_begins)

    def beam_tags(self, codes: torch.Tensor, count: int = 8) -> list[list[Guess]]:
        """Return what the beam search of [`tags`] finds without a memory, see [`beam_names`]."""
        return self._guesses(codes, self.form.tag_prompt, self._tag_ends, count)

    def features(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the hidden states where captions of images begin, means over views, `[N, D]`, float32 on the CPU."""
        return self.states(codes, ())[:, :, 0].float().mean(1)

    @torch.no_grad()
    def states(self, codes: torch.Tensor, prompts: Sequence[str] | None = None) -> torch.Tensor:
        """Return the hidden states behind images, behind a prompt of names and behind one of tags, `[N, views, 3, D]`.

        They are all that [`bounds`] and a memory need of images.
        """
        codes_SL, views = self._flat(codes)
        found = []
        for codes_B in codes_SL.split(self.batch_size):
            ids_BT, cache = self._image_ids(codes_B), DynamicCache(config=self.model.config)
            states = [self.model.model(input_ids=ids_BT, cache=cache, use_cache=True).last_hidden_state[:, -1]]
            for prompt in self._prompts if prompts is None else prompts:
                ids_BC = ids_BT.new_tensor(self._encoder.text_ids(prompt)).expand(len(ids_BT), -1)
                inputs = {"input_ids": ids_BC, "cache": copy.deepcopy(cache), "use_cache": True}
                states.append(self.model.model(**inputs).last_hidden_state[:, -1] if prompt else states[0])
            found.append(torch.stack(states, dim=1).cpu())
        return torch.cat(found).unflatten(0, (-1, views))

    @torch.no_grad()
    def bounds(self, states: torch.Tensor, queries: Sequence[str]) -> torch.Tensor:
        """Return what [`written_match`] is at most, but for rounding: it, were words over with their first tokens."""
        words = [" ".join(query.split()) for query in queries]
        first_PQ = [[self._word_ids(prompt, text)[0] for text in words] for prompt in self._prompts]
        found = []
        for states_BPD in states.flatten(0, 1)[:, 1:].split(self.batch_size):
            logits_BPV = self.model.get_output_embeddings()(states_BPD.to(self.model.device))
            log_probs_BPV = logits_BPV.double().log_softmax(-1).cpu()
            found.append(torch.logaddexp(*(log_probs_BPV[:, place, ids] for place, ids in enumerate(first_PQ))))
        views = states.shape[1]
        return torch.cat(found).unflatten(0, (-1, views)).logsumexp(1) - math.log(views)

    def probe(self) -> tuple[torch.Tensor, str]:
        """Return what tells whether a memory is of this model: the features of a fixed image, and the processor's."""
        codes = torch.arange(self.processor.image_seq_length).unsqueeze(0) % 2
        return self.features(codes)[0], processor_fingerprint(self.processor)

    def take_memory(self, place: str | None, option: str = "--memory") -> None:
        """Name by a memory of images as well."""
        memory = None if place is None else ImageMemory.load(place, option)
        if memory is not None:
            memory.check_fits(*self.probe(), f"{option} {str(place)!r}")
        self.memory = memory

    @torch.no_grad()
    def match(self, codes: torch.Tensor, queries: Sequence[str]) -> torch.Tensor:
        """Return how well words fit images: `log (p(a name begins with them) + p(they are the first tag))`."""
        check_queries(queries)
        return self.with_memory(self.written_match(codes, queries), codes, queries)

    def with_memory(self, scores: torch.Tensor, codes: torch.Tensor, queries: Sequence[str]) -> torch.Tensor:
        """Return scores of [`written_match`] and the memory's as one; without a memory they stay."""
        memory = self.used_memory
        return scores if memory is None else self.mixed(scores, memory.match(self.features(codes), queries))

    @property
    def used_memory(self) -> ImageMemory | None:
        """The memory, unless it counts for nothing."""
        return self.memory if self.memory_share else None

    def mixed(self, scores: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """Return scores of [`written_match`] and those of [`ImageMemory.match`] as one."""
        share = torch.tensor(self.memory_share).double()
        return torch.logaddexp(scores + (1 - share).log(), known.log() + share.log())

    @torch.no_grad()
    def written_match(self, codes: torch.Tensor, queries: Sequence[str]) -> torch.Tensor:
        """Return what [`match`] does without a memory."""
        self.check_room(queries)
        words = [" ".join(query.split()) for query in queries]
        (codes_SL, views), scores = self._flat(codes), []
        for prefix, ids_BT in self._prefixes(codes_SL, self.batch_size):
            found = []
            for text in words:
                as_name, as_tag = (
                    self._log_prob(prefix, ids_BT, prompt, self._word_ids(prompt, text), ends)
                    for prompt, ends in zip(self._prompts, (self._word_ends, self._tag_ends), strict=True)
                )
                found.append(torch.logaddexp(as_name, as_tag))
            scores.append(torch.stack(found, dim=1))
        return torch.cat(scores).unflatten(0, (-1, views)).logsumexp(1) - math.log(views)

    def check_room(self, queries: Sequence[str]) -> None:
        """Raise `ValueError` for the first query that does not fit behind an image into the model's positions."""
        # others are made to go beyond
        if self.model.config.rope_parameters["rope_type"] != "default":
            return
        image_ids = self._encoder.opened(self.processor.image_ids([0] * self.processor.image_seq_length))
        room = self.model.config.max_position_embeddings - len(image_ids)
        for query in (" ".join(query.split()) for query in queries):
            texts = (f"{prompt} {query}" if prompt else query for prompt in self._prompts)
            if (length := max(len(self._encoder.text_ids(text)) for text in texts)) > room:
                short = query if len(query) <= 40 else f"{query[:40]}..."
                raise InputError(
                    f"query {short!r}: with the model's prompt it has {length} tokens, and behind an image there is "
                    f"room for {room}."
                )

    @torch.no_grad()
    def _guesses(
        self, codes: torch.Tensor, prompt: str, ends: Sequence[int], count: int, never: Sequence[int] = ()
    ) -> list[list[Guess]]:
        """Return texts after a prompt, none of which begins with the ids `never`, and their shares of all others."""
        from ..evaluation.measures import plain_generation

        if not 1 <= count <= MOST_GUESSES:
            raise InputError(f"`count` is {count}: ask for 1 to {MOST_GUESSES} names or tags.")
        beams = max(LEAST_BEAMS, BEAMS_EACH * count)
        batch_size = max(1, min(self.batch_size, self.batch_size * FULL_BATCH_BEAMS // beams))
        (codes_SL, views), found = self._flat(codes), []
        for prefix, ids_BT in self._prefixes(codes_SL, batch_size):
            prompt_BT = ids_BT.new_tensor(self._encoder.text_ids(prompt)).expand(len(ids_BT), -1)
            others_B = 1 - self._log_prob(prefix, ids_BT, prompt, never).exp() if never else torch.ones(len(ids_BT))
            ids_BT = torch.cat([ids_BT, prompt_BT], dim=1)
            cache = copy.deepcopy(prefix)
            cache.batch_repeat_interleave(beams)
            # minimum lengths and the like that the model's own configuration has would change the probabilities
            with plain_generation(self.model):
                written = self.model.generate(
                    input_ids=ids_BT,
                    attention_mask=torch.ones_like(ids_BT),
                    cache=cache,
                    generation_mode="text",
                    do_sample=False,
                    guidance_scale=1.0,
                    # what is no name or tag is known here, whatever captions of the model begin with
                    caption_suppress_tokens=[],
                    max_new_tokens=MOST_TOKENS,
                    # so that a score is the sum over tokens
                    num_beams=beams,
                    num_return_sequences=beams,
                    length_penalty=0.0,
                    bad_words_ids=[list(never)] if never else None,
                    eos_token_id=list(ends),
                    return_dict_in_generate=True,
                    output_scores=True,
                )
            new_BKT = written.sequences[:, ids_BT.shape[1] :].unflatten(0, (-1, beams)).tolist()
            shares_BK = written.sequences_scores.double().exp().cpu().unflatten(0, (-1, beams)) / others_B.unsqueeze(1)
            found += [self._texts(*rows, ends) for rows in zip(new_BKT, shares_BK.tolist(), strict=True)]
        return [mean_guesses(found[place : place + views]) for place in range(0, len(found), views)]

    def _texts(self, rows: list[list[int]], shares: list[float], ends: Sequence[int]) -> dict[str, float]:
        """Return the texts of a view's beams and their shares; those of equal text are one."""
        texts = defaultdict(float)
        for row, share in zip(rows, shares, strict=True):
            length = next((place for place, token in enumerate(row) if token in ends), None)
            # a beam that has not come to its end is a part of a name
            if length is not None and (text := self.processor.decode(row[:length], skip_special_tokens=True).strip()):
                texts[text] += share
        return texts

    def _flat(self, codes: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Return the codes of all views of images, and how many views of each there are."""
        length = self.processor.image_seq_length
        if codes.ndim not in (2, 3) or not codes.numel() or codes.shape[-1] != length:
            raise InputError(
                f"`codes` has the shape {list(codes.shape)}: give {length} codes of each image, one image at "
                "least, as `encode` returns them."
            )
        return codes.flatten(0, -2), codes.shape[1] if codes.ndim == 3 else 1

    def _prefixes(self, codes_SL: torch.Tensor, batch_size: int) -> Iterator[tuple[DynamicCache, torch.Tensor]]:
        """Yield batches of views of images as ids `[B, T]`, with the cache of all but the last of these."""
        for codes_B in codes_SL.split(batch_size):
            ids_BT = self._image_ids(codes_B)
            cache = DynamicCache(config=self.model.config)
            self.model(input_ids=ids_BT[:, :-1], cache=cache, use_cache=True, logits_to_keep=1)
            yield cache, ids_BT

    def _image_ids(self, codes_B: torch.Tensor) -> torch.Tensor:
        """Return documents that begin with images, `[B, T]`."""
        rows = [self._encoder.opened(self.processor.image_ids(view)) for view in codes_B.tolist()]
        return torch.tensor(rows, device=self.model.device)

    def _word_ids(self, prompt: str, words: str) -> list[int]:
        return self._text_ids(prompt, f"{prompt} {words}" if prompt else words)

    def _log_prob(
        self, prefix: DynamicCache, ids_BT: torch.Tensor, prompt: str, words: Sequence[int], ends: Sequence[int] = ()
    ) -> torch.Tensor:
        """Return `log p(words, then one of the ends if there are any | image, prompt)` `[B]`."""
        before = self._encoder.text_ids(prompt)
        ids_BC = torch.tensor([*before, *words], device=ids_BT.device).expand(len(ids_BT), -1)
        inputs = torch.cat([ids_BT[:, -1:], ids_BC], dim=1)
        logits = self.model(input_ids=inputs, cache=copy.deepcopy(prefix), use_cache=True).logits
        log_probs_BTV = logits[:, len(before) :].double().log_softmax(-1)
        words_BT1 = ids_BC[:, len(before) :].unsqueeze(2)
        scores_B = log_probs_BTV[:, :-1].gather(2, words_BT1).sum(dim=(1, 2))
        if ends:
            scores_B = scores_B + log_probs_BTV[:, -1, list(ends)].logsumexp(-1)
        return scores_B.cpu()

    def _text_ids(self, prompt: str, text: str) -> list[int]:
        """Return the ids of what a text has after a prompt with which it begins."""
        before, ids = self._encoder.text_ids(prompt), self._encoder.text_ids(text)
        if ids[: len(before)] != before or len(ids) == len(before):
            raise InputError(
                f"the tokenizer does not part {prompt!r} from what follows it in {text!r}: {before}, {ids}."
            )
        return ids[len(before) :]

    def _ends(self, prompt: str, ends: Sequence[str]) -> list[int]:
        """Return the tokens that may follow a name or a tag: the end of a document, and the first ones of texts."""
        word = f"{prompt} x" if prompt else "x"
        return [self._encoder.eos, *(self._text_ids(word, word + end)[0] for end in ends)]

    def _word_ends_of_vocabulary(self) -> list[int]:
        """Return the tokens of words that do not go on with the word before them, and the end of a document."""
        tokenizer = self.processor.tokenizer
        special = set(tokenizer.all_special_ids)
        # behind a word, since some decoders leave out the space at the beginning of a text
        word = self._encoder.text_ids("x")
        begin = len(tokenizer.decode(word))
        tokens = [token for token in range(len(tokenizer)) if token not in special]
        texts = {token: tokenizer.decode([*word, token])[begin:] for token in tokens}
        # of a letter of several bytes the first one alone decodes to this
        within = "\ufffd"
        ends = (token for token, text in texts.items() if text and not text[0].isalnum() and text[0] != within)
        return [self._encoder.eos, *ends]


def moved(pixel_values: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """Return images moved by so many times `SHIFT` of their sides, a pixel at least; their edges are repeated."""
    height, width = pixel_values.shape[-2:]
    y, x = down * max(1, round(height * SHIFT)), right * max(1, round(width * SHIFT))
    # the sides of which there is more, and less, of the image
    padding = (max(x, 0), max(-x, 0), max(y, 0), max(-y, 0))
    padded = F.pad(pixel_values, padding, mode="replicate")
    return padded[..., max(-y, 0) : max(-y, 0) + height, max(-x, 0) : max(-x, 0) + width]


def open_labeler(
    model: str,
    form: CaptionForm = CaptionForm(),
    batch_size: int = 32,
    views: int = 1,
    memory: str | None = None,
    memory_share: float = 0.5,
) -> ImageLabeler:
    """Return the labeler of a saved model with its processor and memory, on a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = with_channels_last(open_processor(model, "--model")).to(device)
    labeler = ImageLabeler(
        open_model(model).to(device).eval(), processor, form, batch_size, views, memory_share=memory_share
    )
    if memory_share:
        labeler.take_memory(memory_of(model) if memory is None else memory)
    return labeler
