"""The backend over a real pool, driven as SGLang drives it, against plain softmax."""

import logging
from types import SimpleNamespace

import pytest
import torch
from sglang_psa import state
from sglang_psa.layers import UnsupportedLayer

from sgl_psa.policies import POLICIES
from sgl_psa.rule import RequestRule
from test.plugin.engine_parts import DIM, KV_HEADS, LAYERS, Driver, Mode, make_backend, make_layer

CLOSE = dict(rtol=2e-4, atol=2e-5)


def assert_exact(results):
    for out, exact in results:
        torch.testing.assert_close(out, exact, **CLOSE)


@pytest.mark.parametrize("news", [{0: 5}, {1: 8}, {2: 19, 0: 1, 3: 16}])
def test_first_prefill(monkeypatch, news):
    assert_exact(Driver(make_backend(monkeypatch)).step("extend", news))


def test_prefill_in_chunks_with_prefixes_of_any_length(monkeypatch):
    driver = Driver(make_backend(monkeypatch))
    for news in ({0: 16, 1: 3}, {0: 9}, {1: 20, 0: 7}, {1: 1}):
        assert_exact(driver.step("extend", news))


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "dense", "min_context": 0},
        {"stop": "coverage", "coverage": 1.0, "min_context": 0},
        {"delta": 0.0, "min_context": 0},
        {"delta": 0.9, "min_context": 1000},
    ],
    ids=["dense", "coverage 1", "delta 0", "short context"],
)
def test_decode_is_exact_where_it_promises_to_be(monkeypatch, settings):
    driver = Driver(make_backend(monkeypatch, **settings))
    driver.step("extend", {0: 70, 2: 33})
    for _ in range(10):
        assert_exact(driver.step("decode", {2: 1, 0: 1}))
    driver.step("extend", {1: 12})
    assert_exact(driver.step("decode", {0: 1, 1: 1, 2: 1}))


def test_sparse_decode_reads_less_and_counts_it(monkeypatch):
    backend = make_backend(
        monkeypatch, delta=0.5, min_context=0, recent_pages=1, group_pages=1, scorer="sketch"
    )
    driver = Driver(backend)
    driver.step("extend", {0: 200})
    assert backend.last_step is None
    driver.step("decode", {0: 1})
    counts = backend.last_step.row(0)
    assert counts.visits == LAYERS * KV_HEADS
    assert counts.pages_total == 26 * LAYERS * KV_HEADS
    assert 0 < counts.pages_attended < counts.pages_total
    assert counts.stale_pages == 0
    assert backend.wrapper.stats.sparse_rows == 1


@pytest.mark.parametrize("stop", ["marginal", "change"])
def test_compensated_decode_is_closer_and_counts_the_means(monkeypatch, stop):
    error, read = {}, {}
    for compensate in (False, True):
        backend = make_backend(
            monkeypatch,
            **{"min_context": 0, "recent_pages": 1, "group_pages": 1, "stop": stop, "delta": 0.2},
            **{"scorer": "exact", "compensate": compensate},
        )
        driver = Driver(backend)
        driver.step("extend", {0: 200})
        results = driver.step("decode", {0: 1})
        error[compensate] = sum(float((out - exact).norm()) for out, exact in results)
        counts = read[compensate] = backend.last_step.row(0)
    assert error[True] < 0.7 * error[False]
    left = counts.pages_total - counts.pages_attended
    assert read[True].bytes_read == read[False].bytes_read + left * 2 * DIM > 0


def test_requests_in_one_batch_follow_their_own_rules(monkeypatch):
    backend = make_backend(monkeypatch, delta=0.9, min_context=0, recent_pages=1, group_pages=1)
    driver = Driver(backend)
    driver.step("extend", {0: 120, 1: 120})
    backend.rules.set(1, RequestRule.parse({"psa_policy": "dense"}, backend.config))
    results = driver.step("decode", {0: 1, 1: 1})
    step = backend.last_step
    assert step.row(1).pages_attended == step.row(1).pages_total
    assert step.row(0).pages_attended < step.row(0).pages_total
    for out, exact in results:
        torch.testing.assert_close(out[1], exact[1], **CLOSE)
    backend.rules.set(1, RequestRule.default(backend.config))
    driver.step("decode", {0: 1, 1: 1})
    assert backend.last_step.row(1).pages_attended < backend.last_step.row(1).pages_total


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_runs_as_the_servers(monkeypatch, policy):
    backend = make_backend(
        monkeypatch,
        policy=policy,
        **{"min_context": 0, "recent_pages": 1, "group_pages": 1, "budget_pages": 6},
        **{"delta": 0.5, "coverage": 0.5, "sketch_bits": 4},
    )
    driver = Driver(backend)
    driver.step("extend", {0: 200, 1: 100})
    for _ in range(3):
        results = driver.step("decode", {0: 1, 1: 1})
    counts = backend.last_step.row(0)
    assert counts.stale_pages == 0 and counts.pages_total == 26 * LAYERS * KV_HEADS
    if policy == "dense":
        assert_exact(results)
        assert counts.pages_attended == counts.pages_total
    elif POLICIES[policy].limit == "budget":
        assert counts.pages_attended == 6 * LAYERS * KV_HEADS
    else:
        assert 0 < counts.pages_attended < counts.pages_total


def test_the_log_says_once_that_psa_ran_and_only_then(monkeypatch, caplog):
    def said():
        return [r.getMessage() for r in caplog.records if "PSA decoded" in r.getMessage()]

    driver = Driver(make_backend(monkeypatch, min_context=64))
    with caplog.at_level(logging.INFO):
        driver.step("extend", {0: 32})
        driver.step("decode", {0: 1})
        assert said() == []
        driver.step("extend", {1: 100})
        driver.step("decode", {0: 1, 1: 1})
        driver.step("decode", {0: 1, 1: 1})
    assert len(said()) == 1
    assert said()[0].startswith("PSA decoded 1 tokens")


def test_idle_batch(monkeypatch):
    backend = make_backend(monkeypatch)
    batch = SimpleNamespace(forward_mode=Mode("idle"))
    backend.init_forward_metadata(batch)
    out = backend.forward(torch.zeros(0, 128), None, None, make_layer(), batch)
    assert out.shape == (0, 128)


def test_backend_is_known_to_its_process(monkeypatch):
    assert make_backend(monkeypatch) is state.get_backend()


@pytest.mark.parametrize("extras", [{"sinks": torch.zeros(4)}, {"score_mod": object()}])
def test_unknown_extras_are_refused(monkeypatch, extras):
    backend = make_backend(monkeypatch)
    kv = torch.zeros(1, KV_HEADS, 32)
    with pytest.raises(UnsupportedLayer, match=next(iter(extras))):
        backend.forward_extend(torch.zeros(1, 128), kv, kv, make_layer(), None, **extras)


def test_layers_without_their_own_kv_are_refused(monkeypatch):
    backend = make_backend(monkeypatch)
    with pytest.raises(UnsupportedLayer, match="share"):
        backend.forward_decode(torch.zeros(1, 128), None, None, make_layer(), None)


def test_absent_extras_are_fine(monkeypatch):
    assert_exact(Driver(make_backend(monkeypatch)).step("extend", {0: 3}))
    backend = make_backend(monkeypatch)
    driver = Driver(backend)
    original = backend.forward_extend
    monkeypatch.setattr(
        backend, "forward_extend", lambda *a: original(*a, sinks=None), raising=False
    )
    assert_exact(driver.step("extend", {0: 3}))
