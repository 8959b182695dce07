"""The wrapper on a CUDA device against dense attention in float64.

python -m pytest test/gpu -m gpu        # on a machine with a CUDA device
"""

import dataclasses

import pytest
import torch

from sgl_psa.backends import resolve_backend
from sgl_psa.config import PSAConfig
from sgl_psa.policies import POLICIES
from sgl_psa.rule import RequestRule
from sgl_psa.rule_table import RuleTable
from sgl_psa.scorers import SCORERS, CacheShape, make_scorer
from sgl_psa.stats import ROUNDS
from sgl_psa.stop import STOP_RULES
from sgl_psa.summaries import make_summaries
from sgl_psa.wrapper import PSADecodeWrapper
from test.method.cache import PAGE, dense, make_cache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

KV_HEADS, GROUP, DIM = 2, 4, 64
SCALE = DIM**-0.5


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("stop", STOP_RULES)
@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("knobs", [{"coverage": 1.0, "delta": 0.0}, {"delta": 1e-12}, {}])
def test_decode_on_cuda(stop: str, scorer: str, knobs: dict, backend: str) -> None:
    config = dataclasses.replace(PSAConfig(min_context=0), stop=stop, scorer=scorer, **knobs)
    cache = make_cache([1, PAGE + 1, 60 * PAGE + 3], KV_HEADS, DIM, seed=3)
    q = torch.randn(3, KV_HEADS * GROUP, DIM, generator=torch.Generator().manual_seed(4))
    device = torch.device("cuda")
    assert resolve_backend(backend, device) == backend
    shape = CacheShape(1, cache.num_pages, PAGE, KV_HEADS, DIM, device)
    summaries = make_summaries(config, shape, backend)
    k, v = cache.k.to(device), cache.v.to(device)
    for row in range(3):
        summaries.on_write(0, cache.tokens(row).to(device), k, v)
    wrapper = PSADecodeWrapper(
        config, summaries.scorer, backend=backend, kv_element_bytes=4, values=summaries.values
    )
    table = RuleTable(config, 3, device)
    for row in range(3):
        table.set(row, RequestRule.default(config))
    rows = torch.arange(3, device=device)
    wrapper.plan(cache.req_to_token.to(device), rows, cache.seq_lens.to(device), table.rows(rows))
    out, _ = wrapper.run(0, q.to(device), k, v, SCALE)
    step = wrapper.finish()
    exact = dense(cache, q, SCALE)
    if knobs:
        torch.testing.assert_close(out.double().cpu(), exact, rtol=0, atol=1e-5)
    assert step is not None and step.row(2).pages_attended <= step.row(2).pages_total


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "fields",
    [
        *({"policy": name} for name in POLICIES),
        {"compensate": True},
        {"compensate": True, "stop": "change"},
        {"compensate": True, "policy": "topk", "scorer": "sketch"},
        {"scorer": "hybrid", "summary_bits": 8},
    ],
    ids=str,
)
def test_policies_on_cuda(fields: dict, backend: str) -> None:
    """Three steps of a growing request against the same steps on the CPU, in torch."""
    config = PSAConfig(min_context=0, budget_pages=9, coverage=0.8, **fields)
    cache = make_cache([60 * PAGE + 3], KV_HEADS, DIM, seed=5)
    outputs, pages = {}, {}
    for name in ("cpu", "cuda"):
        device, kernels = torch.device(name), "torch" if name == "cpu" else backend
        shape = CacheShape(1, cache.num_pages, PAGE, KV_HEADS, DIM, device)
        summaries = make_summaries(config, shape, kernels)
        k, v = cache.k.to(device), cache.v.to(device)
        summaries.on_write(0, cache.tokens(0).to(device), k, v)
        wrapper = PSADecodeWrapper(
            config, summaries.scorer, backend=kernels, kv_element_bytes=4, values=summaries.values
        )
        table, rows = RuleTable(config, 1, device), torch.arange(1, device=device)
        for step in range(3):
            q = 3 * torch.randn(1, KV_HEADS * GROUP, DIM, generator=torch.manual_seed(step))
            lens = (cache.seq_lens - 2 + step).to(device)
            wrapper.plan(cache.req_to_token.to(device), rows, lens, table.rows(rows))
            outputs[name], _ = wrapper.run(0, q.to(device), k, v, SCALE)
            counts = wrapper.finish()
            assert counts is not None
            pages[name] = counts.row(0).pages_attended
    assert pages["cuda"] == pages["cpu"]
    torch.testing.assert_close(outputs["cuda"].cpu(), outputs["cpu"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_prediction_on_cuda(backend: str) -> None:
    """Learns, starts anew and inherits on the device."""
    config = PSAConfig(min_context=0, group_pages=2, scorer="exact", predict=True, delta=0.02)
    cache = make_cache([60 * PAGE, 40 * PAGE + 3], KV_HEADS, DIM, seed=3)
    q = torch.randn(2, KV_HEADS * GROUP, DIM, generator=torch.Generator().manual_seed(4))
    device = torch.device("cuda")
    shape = CacheShape(1, cache.num_pages, PAGE, KV_HEADS, DIM, device)
    scorer = make_scorer(config, shape, backend)
    k, v = cache.k.to(device), cache.v.to(device)
    for row in range(2):
        scorer.on_write(0, cache.tokens(row).to(device), k)
    wrapper = PSADecodeWrapper(config, scorer, backend=backend, kv_element_bytes=4)
    table, rows = RuleTable(config, 2, device), torch.arange(2, device=device)
    tokens, lens = cache.req_to_token.to(device), cache.seq_lens.to(device)

    def rounds() -> torch.Tensor:
        wrapper.plan(tokens, rows, lens, table.rows(rows))
        wrapper.run(0, q.to(device), k, v, SCALE)
        taken = wrapper.columns(0)[..., ROUNDS].cpu()
        wrapper.finish()
        return taken

    first = rounds()
    for _ in range(20):
        last = rounds()
    # A prediction that suffices falls slowly, until a step takes a second round.
    assert (first > 4).all() and (last <= 2).all()
    predictor = wrapper.predictor
    assert predictor is not None
    for row in range(2):
        table.set(row, RequestRule.default(config))
    predictor.inherit(1, table.generation(1), predictor.snapshot(1))
    again = rounds()
    assert torch.equal(again[0], first[0]) and (again[1] <= 2).all()
