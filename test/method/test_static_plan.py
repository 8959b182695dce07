"""Steps in static buffers: what can be captured, and that planning never waits for the device.

Triton's kernels, and a captured step, are in ``test/kernels/interpreted/test_triton_graph.py``.
"""

import dataclasses

import pytest
import torch

from sgl_psa import static_plan
from sgl_psa.config import ConfigError, PSAConfig
from sgl_psa.policies import POLICIES
from sgl_psa.rule import RequestRule
from sgl_psa.rule_table import RuleTable
from sgl_psa.static_plan import StaticPlanner
from test.method.cache import PAGE, make_cache, make_wrapper
from test.method.fake_graph import NoWait

KV_HEADS, GROUP, DIM = 2, 3, 32
SCALE = DIM**-0.5
CONFIG = PSAConfig(min_context=2 * PAGE, group_pages=2, scorer="two_level", candidate_pages=8)
RULES = [{}, {"psa_coverage": 0.7}, {"psa_policy": "dense"}, {"psa_delta": 0.3}]
#: Rows of the batches that follow each other, by slot; -1 is padding.
BATCHES = [[0, 1, 2, -1], [3, -1, -1, -1], [2, 3, 0, 1], [1, 0], [1, 3], [0, -1]]


@pytest.fixture(autouse=True)
def any_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether kernels wait is no matter here: "torch" takes the place of "triton"."""
    monkeypatch.setattr(static_plan, "NEVER_WAITING", ("torch",))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"stop": "coverage", "coverage": 0.8},
        {"predict": True, "stop": "coverage", "coverage": 0.8},
        {"predict": True},
        {"stop": "change", "compensate": True},
        {"scorer": "hybrid", "summary_bits": 8, "conservative": True, "stop": "coverage"},
    ],
    ids=str,
)
def test_steps_are_those_of_the_eager_path(fields: dict) -> None:
    """Batches that change from step to step: outputs, statistics and predictions alike."""
    config = dataclasses.replace(CONFIG, **fields)
    cache = make_cache([30 * PAGE, 21 * PAGE + 5, 9 * PAGE, PAGE + 3], KV_HEADS, DIM, seed=1)
    # As in SGLang's request pool, slot 0 belongs to no request.
    tokens = torch.cat([torch.zeros_like(cache.req_to_token[:1]), cache.req_to_token])
    eager, static = (make_wrapper(cache, config, "torch")[0] for _ in range(2))
    planner = StaticPlanner(static, 4, 40 * PAGE, KV_HEADS * GROUP)
    table = RuleTable(config, len(tokens), "cpu")
    for slot, params in enumerate(RULES, 1):
        table.set(slot, RequestRule.parse(params, config))
    for size in (4, 2):
        slots = torch.zeros(size, dtype=torch.int64)
        planner.plan(tokens, slots, slots + 1, table.rows(slots), capture=True)
        q = torch.zeros(size, KV_HEADS * GROUP, DIM)
        static.run(0, q, cache.k, cache.v, SCALE)
    for number, batch in enumerate(BATCHES * 2):
        slots = torch.tensor([row + 1 for row in batch])
        padding = batch.count(-1)
        lens = torch.tensor([int(cache.seq_lens[row]) if row >= 0 else 1 for row in batch])
        rng = torch.Generator().manual_seed(number)
        q = torch.randn(len(batch), KV_HEADS * GROUP, DIM, generator=rng)
        with NoWait():
            planner.plan(tokens, slots, lens, table.rows(slots), num_padding=padding)
        got = static.run(0, q, cache.k, cache.v, SCALE)
        with NoWait():
            step = planner.finish()
        real = len(batch) - padding
        slots = slots[:real]
        eager.plan(tokens, slots, lens[:real], table.rows(slots))
        want = eager.run(0, q[:real], cache.k, cache.v, SCALE)
        wanted = eager.finish()
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a[:real], b, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(step.table[:, :real], wanted.table, rtol=1e-6, atol=1e-6)
        assert (step.table[:, real:] == 0).all()
        assert int(step.sparse_rows) == wanted.sparse_rows
    assert static.stats.decode_steps == eager.stats.decode_steps == 2 * len(BATCHES)
    assert static.stats.sparse_rows == eager.stats.sparse_rows > 0
    if config.predict:
        for a, b in zip(static.predictor.snapshot(1), eager.predictor.snapshot(1), strict=True):
            assert (a is None) == (b is None)
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_only_captured_sizes_can_be_planned() -> None:
    cache = make_cache([3 * PAGE], KV_HEADS, DIM, seed=1)
    wrapper, _ = make_wrapper(cache, CONFIG, "torch")
    planner = StaticPlanner(wrapper, 2, 4 * PAGE, KV_HEADS * GROUP)
    table, slots = RuleTable(CONFIG, 1, "cpu"), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="nothing was captured for 1 rows"):
        planner.plan(cache.req_to_token, slots, cache.seq_lens, table.rows(slots))
    many = slots.expand(3)
    with pytest.raises(RuntimeError, match="3 rows, made for 2"):
        planner.plan(cache.req_to_token, many, many + 1, table.rows(many), capture=True)
    assert wrapper.finish() is None and wrapper.stats.decode_steps == 0


@pytest.mark.parametrize(
    ("fields", "backend", "match"),
    [
        ({}, "cpu", "backend='cpu'.*use backend torch"),
        *(
            ({"policy": name, "scorer": "auto"}, "torch", f"policy='{name}'.*psa or dense")
            for name, policy in POLICIES.items()
            if policy.select and not name.startswith("oracle")
        ),
        ({"policy": "oracle_marginal", "scorer": "auto"}, "torch", "scorer='exact'"),
        ({"audit_rate": 0.1}, "torch", "drop audit_rate"),
    ],
)
def test_what_cannot_be_captured_is_refused(fields: dict, backend: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        static_plan.check(dataclasses.replace(CONFIG, **fields), backend)
