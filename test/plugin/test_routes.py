"""``GET /psa/stats``: one rank, several ranks, no traffic."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_psa import routes, state

from sgl_psa.audit import Auditor
from sgl_psa.audit.auditor import AuditSample
from sgl_psa.config import PSAConfig
from sgl_psa.stats import NUM_COLUMNS, ByteCost, PSAStats, step_stats

LAYERS, PAGE = 2, 16


def stats_of(pages: list[int], rounds: float = 1.0, coverage: float = 0.5) -> PSAStats:
    """Decode steps of one row of 10 pages that read so many of them; 2 heads."""
    stats = PSAStats(LAYERS)
    for n in pages:
        columns = torch.zeros(LAYERS, 1, 2, NUM_COLUMNS)
        columns[:] = torch.tensor([n, n * PAGE, 0, rounds, coverage, 0])
        lens = torch.tensor([160], dtype=torch.int32)
        stats.add(step_stats(columns, lens, int(n < 10), PAGE, ByteCost(8, 0)))
    return stats


def part(monkeypatch: pytest.MonkeyPatch, stats: PSAStats, dp_rank: int | None) -> dict[str, Any]:
    """The internal state that a scheduler with these statistics reports."""
    kernels = {"backend": "reference", "min_context": 1024, "group_percent": 0}
    wrapper = SimpleNamespace(stats=stats, page_size=PAGE, **kernels)
    pool = SimpleNamespace(tier=None)
    calls = {"rope": 3, "torch": 1} if dp_rank is not None else None
    backend = SimpleNamespace(
        wrapper=wrapper, config=PSAConfig(), pool=pool, layer_calls=calls and Counter(calls)
    )
    monkeypatch.setattr(state, "get_backend", lambda: backend)
    result = SimpleNamespace(internal_state={"other": 1})
    scheduler = SimpleNamespace(ps=SimpleNamespace(dp_rank=dp_rank, tp_rank=0, tp_size=2))
    routes.describe(result, scheduler)
    assert result.internal_state["other"] == 1
    return result.internal_state["psa"]  # type: ignore[return-value]


def test_no_traffic_is_not_active(monkeypatch: pytest.MonkeyPatch) -> None:
    merged = routes.merge([part(monkeypatch, PSAStats(LAYERS), None)])
    assert merged["active"] is False
    assert merged["pages_attended"] == merged["bytes_read"] == merged["decode_steps"] == 0
    assert len(merged["layers"]) == LAYERS


def test_dense_steps_are_not_active(monkeypatch: pytest.MonkeyPatch) -> None:
    merged = routes.merge([part(monkeypatch, stats_of([10]), None)])
    assert merged["active"] is False
    assert merged["pages_fraction"] == 1.0


def test_one_rank_is_reported_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = stats_of([4, 6], rounds=3.0)
    rank = part(monkeypatch, stats, None)
    merged = routes.merge([rank])
    assert merged["active"] is True
    for key, value in stats.as_dict().items():
        assert merged[key] == pytest.approx(value) if key != "layers" else True
    assert merged["layers"] == rank["layers"]
    assert merged["config"] == PSAConfig().as_dict()
    assert merged["backend"] == "reference"
    assert merged["isa"] is None and merged["cpu_layers"] is None
    assert "rank 0 of 2" in merged["scope"]
    assert [r["dp_rank"] for r in merged["ranks"]] == [0]


def test_data_parallel_ranks_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [
        part(monkeypatch, stats_of([2], rounds=1.0), 0),
        part(monkeypatch, stats_of([10, 6, 6], rounds=5.0), 1),
    ]
    merged = routes.merge(ranks)
    assert merged["decode_steps"] == 4
    assert merged["inherited"] is None
    assert merged["cpu_layers"] == {"rope": 6, "torch": 2}
    inherited = [{**rank, "inherited": n} for rank, n in zip(ranks, (2, 3), strict=True)]
    assert routes.merge(inherited)["inherited"] == 5
    assert merged["pages_attended"] == 24 * LAYERS * 2
    assert merged["pages_fraction"] == pytest.approx(24 / 40)
    assert merged["mean_rounds"] == pytest.approx((1 + 3 * 5) / 4)
    assert merged["layers"][0]["pages_attended"] == 24 * 2
    assert [r["pages_fraction"] for r in merged["ranks"]] == pytest.approx([0.2, 22 / 30])
    assert all("layers" not in r and "config" not in r for r in merged["ranks"])


def test_audits_of_ranks_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = []
    for coverage in (0.5, 1.0):
        stats = stats_of([4])
        stats.audit = Auditor(LAYERS, 0.25, page_size=PAGE, backend="reference")
        ones = torch.ones(1, 2)
        asked, valid = torch.tensor([0.9]), torch.tensor([True])
        stats.audit.record(1, AuditSample(coverage * ones, ones, ones, asked, valid))
        ranks.append(part(monkeypatch, stats, None))
    audit = routes.merge(ranks)["audit"]
    assert audit["rate"] == 0.25 and audit["rows"] == 4
    assert audit["mean_coverage"] == pytest.approx(0.75)
    assert audit["violation_rate"] == pytest.approx(0.5)
    assert [layer["rows"] for layer in audit["layers"]] == [0, 4]
    assert audit["histogram"]["0.5"] == 2 and audit["histogram"]["0.999"] == 2


def test_coverage_is_the_mean_of_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = part(monkeypatch, stats_of([2, 2], coverage=float("nan")), 0)
    assert unknown["mean_coverage"] is None
    assert routes.merge([unknown])["mean_coverage"] is None
    known = part(monkeypatch, stats_of([4], coverage=0.75), 1)
    assert routes.merge([unknown, known])["mean_coverage"] == pytest.approx(0.75)


def test_other_backends_report_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "get_backend", lambda: None)
    result = SimpleNamespace(internal_state={})
    routes.describe(result, SimpleNamespace())
    assert result.internal_state == {}


def test_a_dense_server_has_no_route(monkeypatch: pytest.MonkeyPatch) -> None:
    added = []
    app = SimpleNamespace(include_router=added.append)
    monkeypatch.setattr(routes.compat, "http_app", app, raising=False)
    args = SimpleNamespace(
        attention_backend="triton", prefill_attention_backend=None, decode_attention_backend=None
    )
    routes.add_route(args, None)
    assert added == []
    args.decode_attention_backend = "psa"
    routes.add_route(args, None)
    assert [route.path for route in added[0].routes] == ["/psa/stats", "/psa/memory/check"]
