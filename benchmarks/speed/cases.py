# SPDX-License-Identifier: Apache-2.0
"""The comparisons: what of ours is measured against whom, at which shape, and how it should come out."""

from dataclasses import dataclass, replace

from transformers.utils import is_flash_attn_2_available

from benchmarks.speed.models import OLMOE


# without "batched_mm", which copies an expert's weights for each row: seconds a step, in training over 24 GiB
OLMOE_FOR_ROWS = tuple(name for name in OLMOE if "batched" not in name)


@dataclass(frozen=True)
class Case:
    """
    One comparison.

    Args:
        name: by which the command asks for it.
        ours: a contender.
        peers: contenders; the ratio is that to the fastest.
        kind: `"train"`, `"optimizer"`, `"prefill"` or `"decode"`.
        bar: the largest ratio of time that is wanted, where there is one.
        rows: of the batch.
        length: of the sequences.
        shape: a name of `SHAPES`.
        dtype: a name of torch's.
        text_share: share of words among the tokens.
        packing: of rows that hold several documents, a name of `PACKINGS`.
        needs: `"cuda"`, or `"flash-attn"` beside it, where a machine without them leaves the case out.
        bar_of_floor: the largest ratio to the bytes that a decoding reads, where there is one.
    """

    name: str
    ours: str
    peers: tuple[str, ...]
    kind: str
    bar: float | None = None
    rows: int = 4
    length: int = 512
    shape: str = "medium"
    dtype: str = "bfloat16"
    text_share: float = 0.5
    packing: str | None = None
    bar_of_floor: float | None = None
    needs: str | None = None

    def missing(self, device: str) -> str | None:
        """What the case needs and is not there."""
        if self.needs is None:
            return None
        if device != "cuda":
            return "a GPU"
        return "flash-attn" if self.needs == "flash-attn" and not is_flash_attn_2_available() else None


def _cases() -> list[Case]:
    train = Case("train-dense-llama", "dense", ("llama",), "train", 1.00)
    prefill = replace(train, name="prefill-dense-llama", kind="prefill", rows=1, length=1024)
    decode = Case("decode-dense-llama", "dense", ("llama",), "decode", 1.02, rows=1)
    against_dense = replace(train, peers=("dense",))
    # a model so small that attention, norms and loss take longer than its matmuls; `plain` has no layers for CPUs
    study = Case(
        "", "study 4t4i", ("study 4t4i plain",), "train", rows=16, shape="study", text_share=0.2, packing="captions"
    )
    cases = [
        train,
        prefill,
        decode,
        replace(against_dense, name="train-1t1i", ours="1t1i", bar=1.03, shape="90m"),
        replace(against_dense, name="train-4t4i", ours="4t4i", bar=1.06),
        replace(against_dense, name="train-4t4i-fp32", ours="4t4i", bar=1.06, dtype="float32"),
        replace(against_dense, name="train-4t4i-images", ours="4t4i", bar=1.06, text_share=0.1),
        replace(
            against_dense, name="train-4t4i-packed", ours="4t4i", bar=1.06, rows=1, length=4096, packing="quarters"
        ),
        replace(against_dense, name="train-4t4i-small", ours="4t4i", shape="small"),
        replace(study, name="train-study", bar=0.82),
        replace(study, name="train-study-dense", peers=("study dense",)),
        replace(against_dense, name="optimizer-4t4i", ours="4t4i", kind="optimizer"),
        replace(against_dense, name="train-threshold", ours="4t4i threshold", bar=1.15),
        replace(against_dense, name="train-token-choice", ours="4t4i token_choice", bar=1.15),
        replace(against_dense, name="train-4t4i-olmoe", ours="4t4i", peers=OLMOE_FOR_ROWS, bar=0.65),
        replace(against_dense, name="train-depth", ours="mod-4t4i", peers=("4t4i",), bar=1.08),
        replace(against_dense, name="train-16t16i", ours="16t16i", peers=("4t4i",), bar=1.35),
        replace(against_dense, name="train-16t16i-long", ours="16t16i", peers=("4t4i",), rows=1, length=4096),
        replace(prefill, name="prefill-4t4i", ours="4t4i", peers=("dense",), bar=1.08),
        replace(prefill, name="prefill-depth", ours="mod-4t4i", peers=("4t4i",), bar=1.08),
        replace(prefill, name="prefill-4t4i-olmoe", ours="4t4i", peers=OLMOE_FOR_ROWS),
        replace(decode, name="decode-4t4i", ours="4t4i", peers=("dense",), bar=1.10),
        replace(decode, name="decode-token-choice", ours="4t4i token_choice", peers=("dense",), bar=1.10),
        replace(decode, name="decode-4t4i-olmoe", ours="4t4i", peers=OLMOE, bar=1.0),
        replace(decode, name="decode-depth", ours="mod-4t4i", peers=("4t4i",), bar=1.1),
        replace(decode, name="decode-depth-8", ours="mod-4t4i", peers=("4t4i",), bar=1.1, rows=8),
    ]
    for rows in (8, 32):
        of_rows = replace(
            decode,
            name=f"decode-4t4i-{rows}",
            ours="4t4i",
            peers=OLMOE_FOR_ROWS,
            bar=0.75,
            rows=rows,
            bar_of_floor=1.3,
        )
        # rows at different places of words and images, and rows that all draw, as one call of `generate` does
        cases += [of_rows, replace(of_rows, name=f"decode-4t4i-{rows}-drawing", text_share=0.0)]
    # the sizes above leave a GPU idle between launches; these keep it busy, and answer what there is to choose there
    large = replace(against_dense, shape="large", length=2048, needs="cuda")
    packed = replace(
        train, ours="4t4i flash_attention_2", peers=("4t4i",), rows=4, length=4096, packing="quarters", bar=None
    )
    cases += [
        replace(large, name="train-4t4i-large", ours="4t4i", bar=None),
        replace(large, name="train-token-choice-large", ours="4t4i token_choice", bar=None),
        replace(large, name="train-4t4i-large-olmoe", ours="4t4i", peers=("olmoe grouped_mm",), bar=None),
        replace(large, name="train-4t4i-grouped", ours="4t4i", peers=("4t4i grouped_mm",), bar=None),
        replace(large, name="prefill-4t4i-large", kind="prefill", ours="4t4i", bar=None),
        replace(large, name="decode-4t4i-large", kind="decode", ours="4t4i", rows=8, bar=None),
        replace(packed, name="train-4t4i-packed-flash", needs="flash-attn"),
    ]
    return cases


CASES = {case.name: case for case in _cases()}
