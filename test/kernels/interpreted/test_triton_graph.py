"""A decode step, captured and replayed with other requests, on Triton's kernels."""

import dataclasses

import pytest
import torch

from sgl_psa.config import PSAConfig
from sgl_psa.rule import RequestRule
from sgl_psa.rule_table import RuleTable
from sgl_psa.scorers import CacheShape
from sgl_psa.static_plan import StaticPlanner
from sgl_psa.summaries import make_summaries
from sgl_psa.wrapper import PSADecodeWrapper
from test.method.cache import PAGE, make_cache
from test.method.fake_graph import FakeGraph, NoWait

LAYERS, KV_HEADS, GROUP, DIM = 1, 1, 2, 16
SCALE = DIM**-0.5
CONFIG = PSAConfig(
    min_context=PAGE,
    group_pages=1,
    group_percent=40,
    recent_pages=1,
    scorer="two_level",
    candidate_pages=3,
    delta=0.5,
)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "predict": True,
            "stop": "coverage",
            "coverage": 0.4,
            "compensate": True,
            "scorer": "rotated_sketch",
        },
        {"stop": "change", "scorer": "hybrid", "summary_bits": 8, "group_percent": 0},
    ],
    ids=["defaults", "predict", "change"],
)
def test_replays_are_the_eager_steps(fields: dict) -> None:
    config = dataclasses.replace(CONFIG, **fields)
    cache = make_cache([6 * PAGE + 3, 20, 2 * PAGE], KV_HEADS, DIM, seed=2, sharp=2.0)
    tokens = torch.cat([torch.zeros_like(cache.req_to_token[:1]), cache.req_to_token])
    shape = CacheShape(LAYERS, cache.num_pages, PAGE, KV_HEADS, DIM, torch.device("cpu"))
    summaries = make_summaries(config, shape, "triton")
    for row in range(3):
        for layer in range(LAYERS):
            summaries.on_write(layer, cache.tokens(row), cache.k, cache.v)
    eager, static = (
        PSADecodeWrapper(
            config,
            summaries.scorer,
            backend="triton",
            kv_element_bytes=4,
            values=summaries.values,
        )
        for _ in range(2)
    )
    planner = StaticPlanner(static, 2, 7 * PAGE, KV_HEADS * GROUP)
    table, q = RuleTable(config, 4, "cpu"), torch.zeros(2, KV_HEADS * GROUP, DIM)
    for slot in (1, 2, 3):
        table.set(slot, RequestRule.default(config))

    def layers(wrapper: PSADecodeWrapper, q: torch.Tensor) -> list[torch.Tensor]:
        return [wrapper.run(i, q * (i + 1), cache.k, cache.v, SCALE)[0] for i in range(LAYERS)]

    none = torch.zeros(2, dtype=torch.int64)
    planner.plan(tokens, none, none + 1, table.rows(none), capture=True)
    graph = FakeGraph()
    with graph:
        captured = layers(static, q)
    for number, batch in enumerate(([1, 0], [3, 1])):
        slots = torch.tensor(batch)
        real = sum(slot > 0 for slot in batch)
        lens = torch.tensor([int(cache.seq_lens[slot - 1]) if slot else 1 for slot in batch])
        q.copy_(torch.randn(q.shape, generator=torch.Generator().manual_seed(number)))
        with NoWait():
            planner.plan(tokens, slots, lens, table.rows(slots), num_padding=2 - real)
        graph.replay()
        with NoWait():
            step = planner.finish()
        eager.plan(tokens, slots[:real], lens[:real], table.rows(slots[:real]))
        want = layers(eager, q[:real])
        wanted = eager.finish()
        for got, expected in zip(captured, want, strict=True):
            torch.testing.assert_close(got[:real], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(step.table[:, :real], wanted.table, rtol=1e-5, atol=1e-5)
    assert 0 < static.stats.total().pages_attended < static.stats.total().pages_total
