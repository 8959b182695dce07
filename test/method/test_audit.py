"""The auditor against attention in float64; what it samples; what conservative mode promises."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from sgl_psa.audit import TOLERANCE, AuditCounts, Auditor
from sgl_psa.audit.auditor import AuditSample, sampled
from sgl_psa.audit.capture import CapturedModel
from sgl_psa.audit.contexts import make_context
from sgl_psa.audit.counts import BIN_EDGES, merge_reports
from sgl_psa.audit.replay import Replay
from sgl_psa.audit.report import row as report_row
from sgl_psa.audit.settings import MODES, REQUESTED, settings
from sgl_psa.backends import resolve_backend
from sgl_psa.config import PSAConfig
from sgl_psa.policies import POLICIES, legal
from sgl_psa.scorers import SCORERS
from sgl_psa.wrapper import PSADecodeWrapper
from test.method.cache import PAGE, Cache, decode, dense, make_cache, make_wrapper

CONFIG = PSAConfig(min_context=20 * PAGE, recent_pages=1, group_pages=2, audit_rate=1.0)
LENGTHS = [40 * PAGE + 7, 0, 64 * PAGE, 5 * PAGE]
KV_HEADS, GROUP, DIM = 2, 3, 32
SCALE = DIM**-0.5
RULES = [{"psa_coverage": 0.8}, {}, {"psa_delta": 0.2}, {}]


class Recorder(Auditor):
    """Keeps every sample."""

    def __init__(self, wrapper: PSADecodeWrapper) -> None:
        super().__init__(1, 1.0, page_size=PAGE, backend=wrapper.backend)
        self.samples: list[AuditSample] = []

    def record(self, layer: int, sample: AuditSample) -> None:
        super().record(layer, sample)
        self.samples.append(sample)


def queries(rows: int, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rows, KV_HEADS * GROUP, DIM, generator=rng)


def exact_lse(cache: Cache, q: torch.Tensor, row: int) -> torch.Tensor:
    """Float64 log-sum-exp of all logits, [Hq]."""
    keys = cache.k[cache.tokens(row)].double().repeat_interleave(GROUP, 1)
    return torch.logsumexp(torch.einsum("hd,nhd->hn", q[row].double(), keys) * SCALE, 1)


def audited(backend: str, seed: int = 1):
    """One audited step of a mixed batch: (cache, q, out, lse, wrapper)."""
    cache = make_cache([max(n, 1) for n in LENGTHS], KV_HEADS, DIM, seed)
    cache.seq_lens = torch.tensor(LENGTHS)
    q = queries(len(LENGTHS), seed + 50)
    wrapper, _ = make_wrapper(cache, CONFIG, backend)
    wrapper.audit = Recorder(wrapper)
    run, kept = wrapper.run, []
    wrapper.run = lambda *args: kept.append(run(*args)) or kept[-1]  # type: ignore[method-assign]
    decode(wrapper, cache, q, SCALE, RULES)
    return cache, q, *kept[0], wrapper


def test_numbers_equal_a_dense_computation_in_float64(backend: str) -> None:
    cache, q, out, lse, wrapper = audited(backend)
    sample = wrapper.audit.samples[0]
    assert sample.valid.tolist() == [True, False, True, False]
    assert sample.requested[0] == pytest.approx(0.8)
    assert sample.requested[1:].isnan().all()
    truth = dense(cache, q, SCALE)
    want = AuditCounts()
    for row in (0, 2):
        coverage = torch.exp(lse[row].double() - exact_lse(cache, q, row))
        error = (out[row].double() - truth[row]).norm(dim=-1) / truth[row].norm(dim=-1)
        assert coverage.max() < 1 and error.min() > 0
        torch.testing.assert_close(sample.coverage[row].double(), coverage, rtol=1e-5, atol=0)
        torch.testing.assert_close(sample.error[row].double(), error, rtol=1e-3, atol=1e-6)
        bins = (coverage[:, None] >= torch.tensor(BIN_EDGES)).sum(1) - 1
        want.rows += KV_HEADS * GROUP
        want.coverage += float(coverage.sum())
        want.error += float(error.sum())
        want.histogram = [n + int((bins == i).sum()) for i, n in enumerate(want.histogram)]
        if row == 0:
            want.requested_rows, want.requested = KV_HEADS * GROUP, 0.8 * KV_HEADS * GROUP
            want.violations = int((coverage < 0.8 - TOLERANCE).sum())
    got = wrapper.audit.total()
    assert got.histogram == want.histogram
    for name in ("rows", "coverage", "error", "requested_rows", "requested", "violations"):
        assert getattr(got, name) == pytest.approx(getattr(want, name), rel=1e-4), name
    assert wrapper.audit.layers == [wrapper.audit.total()] and wrapper.audit.audited == 1


def test_the_claim_is_exact_when_the_scores_are(backend: str) -> None:
    """With true log masses the kernel's own coverage is the worst head's true coverage."""
    cache = make_cache([40 * PAGE], KV_HEADS, DIM, seed=3)
    q = queries(1, 4)
    wrapper, scorer = make_wrapper(cache, CONFIG, backend)
    keys = cache.k[cache.tokens(0)].repeat_interleave(GROUP, 1)
    logits = torch.einsum("hd,nhd->hn", q[0], keys) * SCALE
    scorer.score = lambda *args: torch.logsumexp(logits.unflatten(1, (-1, PAGE)), 2)[None]
    wrapper.audit = Recorder(wrapper)
    decode(wrapper, cache, q, SCALE, [{"psa_delta": 0.1}])
    sample = wrapper.audit.samples[0]
    worst = sample.coverage.unflatten(1, (KV_HEADS, GROUP)).amin(2)
    claimed = sample.claimed.unflatten(1, (KV_HEADS, GROUP))
    torch.testing.assert_close(claimed.amin(2), worst, rtol=1e-4, atol=0)
    torch.testing.assert_close(claimed.amax(2), worst, rtol=1e-4, atol=0)
    assert 0 < worst.min() < 1


def test_violations_are_rows_over_a_percent_below(backend: str) -> None:
    auditor = Auditor(2, 1.0, page_size=PAGE, backend=backend)
    nan = float("nan")
    coverage = torch.tensor([[0.891, 0.889], [0.2, 0.2], [0.95, 1.0]])
    sample = AuditSample(
        coverage,
        torch.tensor([[1.0, 0.5], [1.0, 1.0], [nan, nan]]),
        torch.zeros(3, 2),
        torch.tensor([0.9, 0.9, nan]),
        torch.tensor([True, False, True]),
    )
    auditor.record(1, sample)
    total = auditor.total()
    assert (total.rows, total.requested_rows, total.violations) == (4, 2, 1)
    assert (total.claimed_rows, total.claimed) == (2, 1.5)
    assert total.coverage == pytest.approx(0.891 + 0.889 + 0.95 + 1.0)
    assert dict(zip(BIN_EDGES, total.histogram, strict=True))[0.8] == 2
    assert sum(total.histogram) == 4 and auditor.layers[0] == AuditCounts()


def test_rows_without_a_measurement_do_not_poison_the_sums(backend: str) -> None:
    *_, wrapper = audited(backend, seed=6)
    report = wrapper.audit.as_dict()
    assert report["rows"] == 2 * KV_HEADS * GROUP
    for name in ("mean_coverage", "mean_claimed", "violation_rate"):
        assert 0 <= report[name] <= 1
    assert 0 < report["mean_error"] < 10


def test_rate_zero_observes_nothing(backend: str) -> None:
    cache = make_cache([40 * PAGE], KV_HEADS, DIM, seed=8)
    wrapper, _ = make_wrapper(cache, dataclasses.replace(CONFIG, audit_rate=0.0), backend)
    decode(wrapper, cache, queries(1, 9), SCALE)
    assert wrapper.audit is None and wrapper.stats.as_dict()["audit"] is None


def test_the_rate_is_that_of_the_sample(backend: str) -> None:
    cache = make_cache([40 * PAGE], KV_HEADS, DIM, seed=8)
    q = queries(1, 9)

    def run(seed: int) -> list[int]:
        wrapper, _ = make_wrapper(cache, dataclasses.replace(CONFIG, audit_rate=0.3), backend)
        assert wrapper.audit is not None
        wrapper.audit.seed = seed
        counts = []
        for _ in range(20):
            decode(wrapper, cache, q, SCALE)
            counts.append(wrapper.stats.as_dict()["audit"]["audited"])
        return counts

    first = run(0)
    assert first == run(0) and first != run(1)
    assert 0 < first[-1] < 20
    visits = [sampled(5, layer, visit, 0.3) for layer in range(40) for visit in range(100)]
    assert sum(visits) == pytest.approx(0.3 * 4000, rel=0.1)


def test_dense_steps_are_not_audited(backend: str) -> None:
    cache = make_cache([40 * PAGE], KV_HEADS, DIM, seed=8)
    wrapper, _ = make_wrapper(cache, CONFIG, backend)
    decode(wrapper, cache, queries(1, 9), SCALE, [{"psa_policy": "dense"}])
    assert wrapper.stats.as_dict()["audit"]["audited"] == 0


def test_reports_of_ranks_add_up(backend: str) -> None:
    parts = [audited(backend, seed)[-1].audit for seed in (1, 2)]
    merged = merge_reports([part.as_dict() for part in parts])
    total = parts[0].total()
    total.add(parts[1].total())
    assert merged is not None and merged["audited"] == 2
    for name, value in total.as_dict().items():
        assert merged[name] == (value if name == "histogram" else pytest.approx(value))
    assert merged["layers"][0]["rows"] == total.rows
    assert merge_reports([None, None]) is None


def spiky(rng: torch.Generator, q: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Noise, and in one page in eight a key along the query."""
    keys = torch.randn(shape, generator=rng)
    place = torch.arange(0, shape[0], PAGE * 8) + torch.randint(PAGE, (1,), generator=rng)
    size = 3 + 6 * torch.rand(len(place), 1, 1, generator=rng)
    keys[place] += size * torch.nn.functional.normalize(q, dim=-1) * DIM**0.5 / 3
    return keys


def diffuse(rng: torch.Generator, q: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=rng)


def low_rank(rng: torch.Generator, q: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Keys in a subspace of 3 dimensions, plus an offset that all keys share."""
    basis = torch.randn(3, DIM, generator=rng)
    mixture = torch.randn(*shape[:2], 3, generator=rng)
    return 1.5 * mixture @ basis + 3 * torch.randn(shape[1:], generator=rng)


def violation_rate(config: PSAConfig, make_keys, steps: int = 12) -> Iterator[tuple[float, float]]:
    """(requested coverage, share of violations) over several caches, sharp and flat queries."""
    for requested in (0.9, 0.95, 0.99):
        total = AuditCounts()
        for seed in range(steps):
            rng = torch.Generator().manual_seed(1000 + seed)
            cache = make_cache([96 * PAGE], KV_HEADS, DIM, seed)
            q = queries(1, seed + 500) * (1.0, 2.0, 4.0)[seed % 3]
            slots = cache.tokens(0)
            direction = q[0].unflatten(0, (KV_HEADS, GROUP))[:, 0]
            cache.k[slots] = make_keys(rng, direction, (len(slots), KV_HEADS, DIM))
            wrapper, _ = make_wrapper(cache, config, resolve_backend("auto", "cpu"))
            decode(wrapper, cache, q, SCALE, [{"psa_coverage": requested}])
            assert wrapper.audit is not None
            total.add(wrapper.audit.total())
        assert total.requested_rows == steps * KV_HEADS * GROUP
        yield requested, total.violations / total.requested_rows


@pytest.mark.parametrize("make_keys", [spiky, diffuse, low_rank])
@pytest.mark.parametrize("scorer", SCORERS)
def test_conservative_mode_keeps_its_promise_on_made_up_keys(scorer, make_keys) -> None:
    config = dataclasses.replace(CONFIG, scorer=scorer, conservative=True)
    rates = dict(violation_rate(config, make_keys))
    assert max(rates.values()) <= 0.05, rates


@pytest.fixture(scope="module")
def replay() -> Replay:
    """The embedded model's own queries and keys: one context of 1024 tokens, 10 positions."""
    model = CapturedModel()
    context = make_context(model.tokenizer, 1024, 10, seed=0)
    assert len(context.ids) == 1024 and context.first == 1014
    return Replay([model.layers(context.ids, 10)], PAGE)


@pytest.mark.parametrize("scorer", ["sketch", "hybrid"])
def test_the_safe_modes_keep_their_promise_on_a_model(replay: Replay, scorer) -> None:
    table = settings(scorer)
    rows = [
        report_row(s, {replay.length: m}) for s, m in zip(table, replay.measure(table), strict=True)
    ]
    heads = replay.contexts[0][0].q.shape[0]
    assert {r["rows"] for r in rows} == {10 * heads * len(replay.k)}
    asked = {(r["mode"], r["requested"]): r for r in rows if r["stop"] == "coverage"}
    for requested in REQUESTED:
        safe, tracked = asked["conservative", requested], asked["tracked", requested]
        for mode in (safe, tracked):
            assert mode["violation_rate"] <= 0.05
            assert mode["achieved_mean"] > requested
        assert safe["pages_fraction"] >= asked["plain", requested]["pages_fraction"]
        assert tracked["pages_fraction"] >= asked["corrected", requested]["pages_fraction"]
    for mode in MODES:
        pages = [asked[mode, requested]["pages_fraction"] for requested in REQUESTED]
        assert pages == sorted(pages) and pages[-1] < 1
    marginal = [r for r in rows if r["stop"] == "marginal"]
    assert [r["requested"] for r in marginal] == [None] * len(marginal)
    assert all(0 < r["achieved_p05"] < r["achieved_mean"] < 1 for r in marginal)


def test_captured_tensors_are_those_of_the_layers() -> None:
    """Attention over the captured tensors is the layer's own output."""
    model = CapturedModel()
    context = make_context(model.tokenizer, 256, 40, seed=3)
    outputs = []
    attention = model.model.model.layers[0].self_attn
    handle = attention.o_proj.register_forward_pre_hook(lambda _, x: outputs.append(x[0]))
    first = model.layers(context.ids, 5)[0]
    handle.remove()
    group = first.q.shape[0] // first.k.shape[0]
    k, v = (x.repeat_interleave(group, 0) for x in (first.k, first.v))
    logits = torch.einsum("htd,hnd->htn", first.q, k)[:, -1] * first.sm_scale
    want = torch.einsum("hn,hnd->hd", logits.softmax(-1), v)
    torch.testing.assert_close(want.flatten(), outputs[0][0, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_can_be_audited(backend: str, policy: str) -> None:
    cache = make_cache([48 * PAGE], KV_HEADS, DIM, seed=21)
    q = queries(1, 22)
    scorer = (*POLICIES[policy].scorers, legal.DEFAULT_SCORER)[0]
    config = dataclasses.replace(CONFIG, policy=policy, scorer=scorer, budget_pages=6)
    wrapper, _ = make_wrapper(cache, config, backend)
    decode(wrapper, cache, q, SCALE)
    report = wrapper.stats.as_dict()["audit"]
    assert report["rows"] == (0 if policy == "dense" else KV_HEADS * GROUP)
    assert report["claimed_rows"] in (0, report["rows"])
    if report["rows"]:
        assert 0 < report["mean_coverage"] < 1 + 1e-5 and report["mean_error"] >= 0
