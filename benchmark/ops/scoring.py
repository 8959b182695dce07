"""What it costs to score the pages, and to keep up what is scored when keys are written."""

from __future__ import annotations

from typing import cast

from benchmark.ops.op import Op
from benchmark.ops.setting import Setting
from sgl_psa.config import PSAConfig, ScorerName
from sgl_psa.scorers import Scorer

SCORERS = (
    ("sketch", 1),
    ("sketch", 2),
    ("sketch", 4),
    ("rotated_sketch", 1),
    ("two_level", 2),
    ("mean", 16),
    ("box", 16),
)
#: Scorer -> name of the op that writes its state.
WRITTEN = {"two_level": "sketch_write", "box": "page_summary_update"}
_OF_PAGES = ("mean", "box")


def ops(s: Setting) -> list[Op]:
    """A read of each scorer's state; the state's update after a prefill of all keys."""
    found = []
    for name, bits in SCORERS:
        of_pages = name in _OF_PAGES
        chosen = cast(ScorerName, name)
        policy = "topk" if of_pages else "psa"
        key = "summary_bits" if of_pages else "sketch_bits"
        scorer = s.scorer(PSAConfig(policy=policy, scorer=chosen, **{key: bits}))
        op = f"page_summary_score_{name}" if of_pages else f"sketch_score_{name}_{bits}_bit"
        found.append(_score("sketch_score_two_level" if name == "two_level" else op, s, scorer))
        if name in WRITTEN:
            found.append(_write(WRITTEN[name], s, scorer))
    return found


def _score(name: str, s: Setting, scorer: Scorer) -> Op:
    def call(layer: int) -> object:
        return scorer.score(layer, s.q, s.pages, s.scale)

    call(0)
    read = scorer.read_bytes(0)
    pages = s.page_table.numel() * s.heads.kv
    count = pages * scorer.bytes_per_page if read is None else float(read.sum())
    return Op(name, s.backend, call, count, "sketches or summaries of every page scored")


def _write(name: str, s: Setting, scorer: Scorer) -> Op:
    slots = s.slots.flatten()

    def call(layer: int) -> None:
        scorer.on_write(layer, slots, s.k[layer])

    return Op(name, s.backend, call, s.layer_bytes / 2, "K of every token")
