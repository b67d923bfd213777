# SPDX-License-Identifier: Apache-2.0
"""Captions by vLLM and by `generate`: equal tokens, and tokens a second of wall clock and of CPU.

Run it with the Python of `make test-vllm`. `generate` answers once in one batch and once row by row; vLLM gets all
requests at once. `generate` comes first, since vLLM puts a class of its own under the model's.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable

import torch
from datasets import load_dataset

from modeling_moma import MomaForCausalLM
from tokenization import MomaProcessor


def timed(work: Callable[[], list[list[int]]], repeats: int) -> tuple[list[list[int]], float, float]:
    """Answers, and the shortest wall clock and CPU seconds of some repetitions, after one that does not count."""
    answers, walls, cpus = work(), [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        answers = work()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return answers, min(walls), min(cpus)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="model_cards/moma-emoji", help="folder with a processor")
    parser.add_argument("--data", default="data/emoji", help="data set whose test images are captioned")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

    processor = MomaProcessor.from_pretrained(args.model)
    model = MomaForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    rows = load_dataset(args.data, split="test").shuffle(seed=0).select(range(args.requests))
    prompts = [processor(images=[image], text=["<image>"])["input_ids"][0] for image in rows["image"]]
    # all as long, so that every contender does the same work
    length = {"min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens, "do_sample": False}

    def batch() -> list[list[int]]:
        return model.generate(torch.tensor(prompts), **length)[:, len(prompts[0]) :].tolist()

    def one_by_one() -> list[list[int]]:
        return [model.generate(torch.tensor([row]), **length)[0, len(row) :].tolist() for row in prompts]

    results = {
        "generate, one batch": timed(batch, args.repeats),
        "generate, one by one": timed(one_by_one, args.repeats),
    }

    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    # nothing of a repetition is left for the next
    llm = LLM(args.model, dtype="float32", max_num_seqs=args.requests, enable_prefix_caching=False)
    # `generate` forbids the end until then, as vLLM does
    params = SamplingParams(temperature=0.0, min_tokens=args.new_tokens, max_tokens=args.new_tokens)

    def served() -> list[list[int]]:
        outputs = llm.generate([{"prompt_token_ids": row} for row in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    results["vLLM, all at once"] = timed(served, args.repeats)
    expected = results["generate, one by one"][0]
    total = args.requests * args.new_tokens
    threads = torch.get_num_threads()
    print(f"\n{args.requests} requests of {len(prompts[0])} + {args.new_tokens} tokens, {threads} threads")
    print("| | tokens a second | tokens a CPU second | rows equal to one by one |\n|---|---|---|---|")
    for name, (answers, wall, cpu) in results.items():
        equal = sum(answer == row for answer, row in zip(answers, expected))
        print(f"| {name} | {total / wall:.0f} | {total / cpu:.0f} | {equal} of {args.requests} |")
    unequal = [name for name, (answers, *_) in results.items() if answers != expected]
    if unequal:
        sys.exit(f"other tokens than one by one: {', '.join(unequal)}")


if __name__ == "__main__":
    main()
