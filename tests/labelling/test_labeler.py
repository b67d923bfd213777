# SPDX-License-Identifier: Apache-2.0
"""Names, tags and matches of images against plain sums over whole rows, without a cache."""

import math
import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers.captions import IMAGES, caption_model, caption_processor
from helpers.tiny import noise_images, tiny_model
from modeling_moma.data.encoding import DocumentEncoder
from modeling_moma.errors_moma import InputError
from modeling_moma.labelling.labeler import SHIFTS, CaptionForm, ImageLabeler, mean_guesses, moved
from tokenization import MomaProcessor, add_image_tokens


WORDS = ("house", "red apple", "home", "building", "fruit")


@pytest.fixture(scope="module")
def processor():
    return caption_processor()


@pytest.fixture(scope="module", params=["4t4i", "depth"])
def labeler(request, processor):
    fields = {"depth_layers": [1], "depth_capacity": 0.5} if request.param == "depth" else {}
    # images of unequal batches
    return ImageLabeler(caption_model(processor, **fields), processor, batch_size=2)


@pytest.fixture(scope="module")
def codes(labeler):
    return labeler.encode(noise_images(IMAGES))


@torch.no_grad()
def loop_log_prob(labeler, image, prompt, text, ends):
    """`log p(text, one of the ends | image, prompt)`, token by token from whole rows."""
    encoder = DocumentEncoder(labeler.processor)
    before = [*encoder.opened(labeler.processor.image_ids(image.tolist())), *encoder.text_ids(prompt)]
    words = encoder.text_ids(f"{prompt} {text}" if prompt else text)[len(encoder.text_ids(prompt)) :]
    log_probs = labeler.model(input_ids=torch.tensor([[*before, *words]])).logits[0].double().log_softmax(-1)
    total = sum(log_probs[len(before) - 1 + place, token] for place, token in enumerate(words))
    return float(total + (log_probs[-1, list(ends)].logsumexp(0) if ends else 0))


def ends_of(labeler, texts):
    encoder = DocumentEncoder(labeler.processor)
    return [encoder.eos, *(encoder.text_ids(f"x{text}")[1] for text in texts)]


@pytest.mark.parametrize("kind", ["names", "tags"])
def test_probabilities_are_those_of_the_texts_and_their_ends(labeler, codes, kind):
    form = labeler.form
    prompt, ends = (form.name_prompt, form.name_ends) if kind == "names" else (form.tag_prompt, form.tag_ends)
    found = getattr(labeler, kind)(codes, 3)
    assert len(found) == IMAGES and all(0 < len(guesses) <= 3 for guesses in found)
    learnt = 0
    for image, guesses in zip(codes, found):
        probabilities = [guess.probability for guess in guesses]
        assert probabilities == sorted(probabilities, reverse=True) and all(guess.text for guess in guesses)
        assert len({guess.text for guess in guesses}) == len(guesses)
        # what is no list of tags
        others = 1 - math.exp(loop_log_prob(labeler, image, "", "tags:", [])) if kind == "names" else 1
        for guess in guesses:
            assert not guess.text.startswith("tags:")
            if guess.text in WORDS:
                wanted = math.exp(loop_log_prob(labeler, image, prompt, guess.text, ends_of(labeler, ends))) / others
                # unlikely ends may have fallen out of the beam, and the same text may be written by unlikely tokens
                if wanted > 0.05:
                    assert guess.probability == pytest.approx(wanted, rel=0.1)
                    learnt += 1
    assert learnt > 0


def test_matches_are_sums_over_names_and_first_tags(labeler, codes):
    queries = ["house", "red  apple", "home"]
    scores = labeler.match(codes, queries)
    tokenizer = labeler.processor.tokenizer
    special = set(tokenizer.all_special_ids)
    boundary = [tokenizer.eos_token_id]
    boundary += [
        token
        for token in range(len(tokenizer))
        if token not in special and re.match(r"[\x00-\x7f]", tokenizer.decode([token]))
        if not re.match("[A-Za-z0-9]", tokenizer.decode([token]))
    ]
    for row, image in enumerate(codes):
        for column, query in enumerate(queries):
            query = " ".join(query.split())
            name = loop_log_prob(labeler, image, "", query, boundary)
            tag = loop_log_prob(labeler, image, "tags:", query, ends_of(labeler, labeler.form.tag_ends))
            assert scores[row, column].item() == pytest.approx(math.log(math.exp(name) + math.exp(tag)), abs=1e-4)


def test_words_end_in_tokenizers_that_mark_their_beginning(processor):
    """Those of Llama's kind, whose decoder leaves out the space before a text."""
    texts = ["smiling face (noto)", "smiling cat (noto)", "smiles (noto)", "tags: happy, face"] * 3
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<pad>", "<unk>", "<bos>", "<eos>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=[*special, *bytes_]))
    names = {f"{name.strip('<>')}_token": name for name in special}
    tokenizer = add_image_tokens(PreTrainedTokenizerFast(tokenizer_object=bpe, **names), 32)
    of_words = MomaProcessor(processor.image_processor, tokenizer, processor.vq_model)
    labeler = ImageLabeler(tiny_model(of_words), of_words)
    ends = set(labeler._word_ends_of_vocabulary())
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(bpe.get_vocab()))))
    begun = [token for token, piece in enumerate(pieces) if piece.startswith("\u2581")]
    assert len(begun) > 5 and set(begun) <= ends
    within = [token for token, piece in enumerate(pieces) if piece.isalnum()]
    assert within and not set(within) & ends
    assert pieces.index("<0x41>") not in ends and pieces.index("<0x2C>") in ends


def test_a_prompt_that_is_no_text_is_named():
    for name in ("name_prompt", "tag_prompt"):
        with pytest.raises(InputError, match=f"`{name}` .*no text in UTF-8"):
            CaptionForm(**{name: "\udcff"})


@pytest.mark.parametrize("down, right", SHIFTS)
def test_views_are_moved_and_repeat_their_edges(down, right):
    height, width = 3, 192
    pixels = torch.rand(2, 3, height, width)
    y, x = down * max(1, round(height / 64)), right * max(1, round(width / 64))
    rows = torch.arange(height).sub(y).clamp(0, height - 1)
    columns = torch.arange(width).sub(x).clamp(0, width - 1)
    assert torch.equal(moved(pixels, down, right), pixels[:, :, rows][..., columns])


def test_matches_of_several_views_are_means_of_probabilities(processor, labeler):
    several = ImageLabeler(labeler.model, processor, batch_size=4, views=3)
    codes = several.encode(noise_images(IMAGES))
    assert codes.shape == (IMAGES, 3, processor.image_seq_length)
    assert torch.equal(codes[:, 0], labeler.encode(noise_images(IMAGES)))
    # views that are alike would show nothing
    assert all((codes[:, 0] != codes[:, view]).any() for view in (1, 2))
    queries = ["house", "red apple"]
    scores = torch.stack([labeler.match(codes[:, view], queries).exp() for view in range(3)]).mean(0).log()
    torch.testing.assert_close(several.match(codes, queries), scores, atol=1e-5, rtol=0)


def test_names_of_several_views_have_their_mean_probabilities(labeler, codes):
    alike = labeler.names(codes.unsqueeze(1).expand(-1, 2, -1), 3)
    for guesses, alone in zip(alike, labeler.names(codes, 3), strict=True):
        assert [guess.text for guess in guesses] == [guess.text for guess in alone]
        for guess, other in zip(guesses, alone):
            assert guess.probability == pytest.approx(other.probability, rel=1e-4)
    # what most views find unlikely does not win by one of them
    found = mean_guesses([{"house": 0.6, "home": 0.3}, {"home": 0.5}, {"home": 0.4, "hut": 0.3}])
    assert [guess.text for guess in found] == ["home", "house", "hut"]
    assert [guess.probability for guess in found] == pytest.approx([0.4, 0.2, 0.1])


@pytest.mark.parametrize("count, sizes", [(8, [4, 1]), (40, [1] * 5)])
def test_the_more_tags_the_fewer_images_at_once(processor, monkeypatch, count, sizes):
    labeler = ImageLabeler(tiny_model(processor, initializer_range=0.3), processor, batch_size=16)
    generate, seen = labeler.model.generate, []

    def counted(input_ids, **kwargs):
        seen.append(len(input_ids))
        return generate(input_ids, **kwargs)

    monkeypatch.setattr(labeler.model, "generate", counted)
    assert len(labeler.tags(labeler.encode(noise_images(5)), count)) == 5
    assert seen == sizes


def test_what_a_model_generates_by_changes_no_name(labeler, codes, monkeypatch):
    plain = labeler.names(codes, 3), labeler.tags(codes, 3)
    monkeypatch.setattr(labeler.model.generation_config, "min_new_tokens", 5)
    monkeypatch.setattr(labeler.model.generation_config, "exponential_decay_length_penalty", (1, 2.0))
    assert (labeler.names(codes, 3), labeler.tags(codes, 3)) == plain
    assert labeler.model.generation_config.min_new_tokens == 5


@pytest.mark.parametrize("queries, said", [([], "is empty"), (["house", " "], "no words"), (["house", 3], "no text")])
def test_queries_without_words_are_refused(labeler, codes, queries, said):
    with pytest.raises(InputError, match=said):
        labeler.match(codes, queries)


def test_a_query_fills_the_room_behind_an_image_and_no_more(labeler, codes):
    limit = labeler.model.config.max_position_embeddings
    room = limit - len(labeler._image_ids(codes[:1])[0]) - len(labeler._encoder.text_ids("tags:"))
    # a token for each letter, and one for the space before the first
    query = "é" * 2 * limit
    while len(labeler._encoder.text_ids(f"tags: {query}")) - len(labeler._encoder.text_ids("tags:")) > room:
        with pytest.raises(InputError, match=f"query '{query[:40]}.*': .* room for {limit - len(codes[0]) - 3}"):
            labeler.match(codes, ["house", query])
        query = query[: len(query) // 2] if len(query) > 2 * room else query[:-1]
    assert labeler.match(codes, [query]).isfinite().all()


def test_what_are_no_images_or_codes_of_images_is_refused(labeler, codes, processor):
    for wrong in (codes[:0], codes[0], codes[:, :-1], codes[None, None]):
        with pytest.raises(InputError, match=rf"`codes` has the shape {re.escape(str(list(wrong.shape)))}: give"):
            labeler.names(wrong)
    with pytest.raises(InputError, match="`images` is empty"):
        labeler.encode([])
    with pytest.raises(InputError, match=r"`queries` is the text 'house': give a list of texts, \['house'\]"):
        labeler.match(codes, "house")
    with pytest.raises(InputError, match="`batch_size` is 0: it must be at least 1"):
        ImageLabeler(labeler.model, processor, batch_size=0)


def test_a_space_at_the_end_of_a_prompt_changes_nothing(labeler, codes, processor):
    form = CaptionForm(name_prompt="red", tag_prompt="tags:")
    spaced = CaptionForm(name_prompt="red ", tag_prompt="tags:  ")
    plain, other = (ImageLabeler(labeler.model, processor, kind, batch_size=2) for kind in (form, spaced))
    assert plain.names(codes, 3) == other.names(codes, 3) and plain.tags(codes, 3) == other.tags(codes, 3)
    assert torch.equal(plain.match(codes, WORDS), other.match(codes, WORDS))


def test_no_names_and_ends_within_words_are_refused(labeler, codes, processor):
    with pytest.raises(InputError, match="`count` is 101: ask for 1 to 100"):
        labeler.names(codes, 101)
    with pytest.raises(InputError, match="`views` is 0: an image can have 1 to 9"):
        ImageLabeler(labeler.model, processor, views=0)
    with pytest.raises(InputError, match="does not part 'x'"):
        ImageLabeler(labeler.model, processor, CaptionForm(name_ends=("",)))
