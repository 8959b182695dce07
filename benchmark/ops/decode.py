"""What our decode attention costs: dense, sparse given the estimates, and the whole step of PSA."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from sgl_psa_kernels.progressive_decode import STAT_NAMES, progressive_decode

from benchmark.ops.op import Op
from benchmark.ops.setting import Setting
from sgl_psa.config import PSAConfig
from sgl_psa.rule_table import RuleTable
from sgl_psa.scorers import Scorer
from sgl_psa.wrapper import PSADecodeWrapper

COVERAGE = 0.95
_TOKENS = STAT_NAMES.index("tokens_attended")
_PAGES = STAT_NAMES.index("pages_attended")


def rules() -> dict[str, dict[str, Any]]:
    """Suffix of an op's name to the settings that differ from the defaults.

    On these keys groups of 4 pages stop short of the coverage asked for, groups of 32 do not
    (``python -m benchmark.group_growth``).
    """
    coverage = {"stop": "coverage", "coverage": COVERAGE}
    name = f"_coverage_{COVERAGE}"
    return {"": {}, name: coverage, f"{name}_groups_of_32": {**coverage, "group_pages": 32}}


def ops(s: Setting, **settings: Any) -> list[Op]:
    """All of them; ``settings`` of :class:`PSAConfig` hold for each. Sparse in any context."""
    settings = {"min_context": 0, **settings}
    scorer = s.scorer(PSAConfig(**settings))
    log_mass = scorer.score(0, s.q, s.pages, s.scale)
    found = [_given("dense_decode", s, PSAConfig(policy="dense", **settings), None)]
    for suffix, rule in rules().items():
        config = PSAConfig(**{**settings, **rule})
        found.append(_given(f"progressive_decode{suffix}", s, config, log_mass))
    for suffix, rule in rules().items():
        found.append(_step(f"psa{suffix}", s, PSAConfig(**{**settings, **rule}), scorer))
    return found


def _given(name: str, s: Setting, config: PSAConfig, log_mass: torch.Tensor | None) -> Op:
    """The loop alone, by estimates that are there."""
    rows = RuleTable(config, s.batch, "cpu").rows(torch.arange(s.batch))
    call = partial(_decode, s, config, log_mass, rows)
    stats = call(0)[2]
    return Op(
        name,
        s.backend,
        call,
        float(stats[..., _TOKENS].sum()) * s.heads.token_bytes,
        "K and V of the pages attended",
        float(stats[..., _PAGES].mean()) / math.ceil(s.context / s.heads.page),
        whole=log_mass is None,
    )


def _decode(
    s: Setting, config: PSAConfig, log_mass: torch.Tensor | None, rows: Any, layer: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return progressive_decode(
        s.q,
        s.k[layer],
        s.v[layer],
        s.page_table,
        s.seq_lens,
        log_mass,
        rows.mode,
        rows.threshold,
        rows.kappa_floor,
        rows.kappa_std,
        page_size=s.heads.page,
        sm_scale=s.scale,
        sink_pages=config.sink_pages,
        recent_pages=config.recent_pages,
        group_pages=config.group_pages,
        backend=s.backend,
    )


def _step(name: str, s: Setting, config: PSAConfig, scorer: Scorer) -> Op:
    """``PSADecodeWrapper.run``: scoring and loop. ``plan``, once a step for all layers, is not in
    it."""
    wrapper = PSADecodeWrapper(config, scorer, backend=s.backend, kv_element_bytes=2)
    table = RuleTable(config, s.batch, "cpu")
    rows = torch.arange(s.batch)

    def plan() -> None:
        wrapper.plan(s.slots.int(), rows, s.seq_lens, table.rows(rows))

    def call(layer: int) -> None:
        wrapper.run(layer, s.q, s.k[layer], s.v[layer], s.scale)

    plan()
    for layer in range(s.layers):
        call(layer)
    wrapper.finish()
    total = wrapper.stats.total()
    plan()
    return Op(
        name,
        s.backend,
        call,
        total.bytes_read / s.layers,
        "K and V of the pages attended, and what was read to score",
        total.pages_attended / total.pages_total,
        whole=True,
    )
