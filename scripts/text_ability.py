# SPDX-License-Identifier: Apache-2.0
"""
What a model knows of text: perplexity on WordNet's glosses and on a manual's pages, and greedy answers to 20 prompts.

    python scripts/text_ability.py --model runs/smollm2-moma --output runs/text-ability.json

Any causal language model goes, a GGUF file too, so that a converted model stands beside its source. Needs what
`make data-gloss data-manual` builds.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_moma  # noqa: F401, so that the Auto classes know MoMa
from modeling_moma.training.files import write_aside


COMPLETIONS = [
    "The capital of France is",
    "Water boils at",
    "Once upon a time there was",
    "def fibonacci(n):",
    "The three primary colours are",
    "The opposite of hot is",
    "A triangle has",
    "The sun rises in the",
    "In 1969, the first human",
    "Bread is made from",
]
QUESTIONS = [
    "What is the capital of Germany?",
    "Name three fruits.",
    "What is 2 + 2?",
    "Write a haiku about rain.",
    "What colour is the sky?",
    "How many days are in a week?",
    "Translate 'cat' to French.",
    "What do bees make?",
    "Who wrote Romeo and Juliet?",
    "What is the largest planet?",
]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a model and its tokenizer")
    parser.add_argument("--gguf-file", help="file in that folder to read instead")
    parser.add_argument("--gloss", default="data/gloss/validation.jsonl")
    parser.add_argument("--manual", default="data/manual/validation.jsonl")
    parser.add_argument("--limit", type=int, help="so many glosses, and windows of pages; by default all")
    parser.add_argument("--window", type=int, default=256, help="tokens of a page that are read at once")
    parser.add_argument("--new-tokens", type=int, default=24, help="of an answer")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", required=True, help="JSON file")
    return parser.parse_args(arguments)


def read_glosses(path: str) -> list[str]:
    return [json.loads(line)["text"] for line in Path(path).read_text(encoding="utf-8").splitlines()]


def read_pages(path: str) -> list[str]:
    """The pages' texts without their pictures."""
    pages = [json.loads(line)["segments"] for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return ["\n\n".join(part["text"] for part in page if part["type"] == "text") for page in pages]


def windows(tokenizer, texts: Sequence[str], length: int) -> list[list[int]]:
    """The texts' ids in pieces of at most so many tokens; pieces of one token predict nothing and are left out."""
    ids = [tokenizer(text)["input_ids"] for text in texts]
    pieces = [row[start : start + length] for row in ids for start in range(0, len(row), length)]
    return [piece for piece in pieces if len(piece) > 1]


@torch.no_grad()
def perplexity(model, pieces: list[list[int]], pad_token_id: int, batch_size: int, name: str) -> dict[str, float]:
    """
    Over all pieces, each from its second token on.

    Returns:
        `perplexity`, in which a MoMa's picture tokens take part; `perplexity_of_words`, from the probabilities among
        words, as in text mode, where picture tokens are none; and `tokens`, the number of targets.
    """
    total, total_of_words, count = 0.0, 0.0, 0
    is_word = words_of(model.config)
    by_length = sorted(pieces, key=len)
    for start in tqdm(range(0, len(by_length), batch_size), desc=name):
        batch = by_length[start : start + batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([piece + [pad_token_id] * (width - len(piece)) for piece in batch])
        mask = torch.tensor([[1] * len(piece) + [0] * (width - len(piece)) for piece in batch])
        logits = model(input_ids=ids, attention_mask=mask).logits
        targets = torch.where(mask.bool(), ids, -100)[:, 1:].flatten()
        scores = logits[:, :-1].flatten(0, 1).float()
        total += float(F.cross_entropy(scores, targets, reduction="sum"))
        of_words = scores.masked_fill_(~is_word, -torch.inf)
        total_of_words += float(F.cross_entropy(of_words, targets, reduction="sum"))
        count += int((targets >= 0).sum())
    means = {"perplexity": math.exp(total / count), "perplexity_of_words": math.exp(total_of_words / count)}
    return {**means, "tokens": count}


def words_of(config) -> torch.Tensor:
    """True for the tokens that are neither codes of a MoMa's pictures nor begin or end them."""
    is_word = torch.ones(config.vocab_size, dtype=torch.bool)
    if isinstance(config, modeling_moma.MomaConfig):
        for frame in config.frames.values():
            for start, stop in (*frame.ranges, (frame.begin, frame.begin + 1), (frame.end, frame.end + 1)):
                is_word[start:stop] = False
    return is_word


@torch.no_grad()
def answers(model, tokenizer, new_tokens: int) -> dict[str, str]:
    """Greedy answers by prompt; questions are asked in the tokenizer's chat template."""
    prompts = {prompt: tokenizer(prompt, return_tensors="pt") for prompt in COMPLETIONS}
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        prompts[question] = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    options = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": tokenizer.pad_token_id}
    if isinstance(model, modeling_moma.MomaForCausalLM):
        options["generation_mode"] = "text"
    said = {}
    for prompt, inputs in tqdm(prompts.items(), desc="answers"):
        output = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)
        said[prompt] = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


def main(arguments: Sequence[str] | None = None):
    args = parse_arguments(arguments)
    source = {"gguf_file": args.gguf_file} if args.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(args.model, **source)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, **source).eval()
    report: dict = {"arguments": vars(args)}
    for name, texts in {"gloss": read_glosses(args.gloss), "manual": read_pages(args.manual)}.items():
        pieces = windows(tokenizer, texts, args.window)[: args.limit]
        report[name] = perplexity(model, pieces, tokenizer.pad_token_id, args.batch_size, name)
        means = [f"{report[name][part]:.3f}" for part in ("perplexity", "perplexity_of_words")]
        print(f"{name}: perplexity {means[0]}, among words {means[1]}, over {report[name]['tokens']:,} tokens")
    report["answers"] = answers(model, tokenizer, args.new_tokens)
    write_aside(args.output, lambda path: path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n"))


if __name__ == "__main__":
    main()
