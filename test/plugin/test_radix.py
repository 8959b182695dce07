"""Rules of requests and their prefix-cache namespaces."""

from types import SimpleNamespace

import pytest
from sglang_psa import backend_hooks, radix, state

from sgl_psa.config import PSAConfig
from sgl_psa.rule import RequestRule
from sgl_psa.rule_table import RuleTable


@pytest.fixture
def config(monkeypatch):
    config = PSAConfig(stop="coverage", coverage=0.9)
    backend = SimpleNamespace(
        config=config,
        parse_rule=lambda params: RequestRule.parse(params, config),
        rules=RuleTable(config, 4, "cpu"),
    )
    monkeypatch.setattr(state, "_backend", backend)
    return config


class Request:
    def __init__(self, params=None, extra_key=None, slot=None):
        self.sampling_params = SimpleNamespace(custom_params=params)
        self.extra_key = extra_key
        self.req_pool_idx = slot
        self.aborted = None
        radix.attach_rule(None, self)

    def set_finish_with_abort(self, message):
        self.aborted = message


@pytest.mark.parametrize("params", [None, {}, {"__req__": object()}, {"psa_coverage": 0.9}])
def test_default_rule_shares_the_default_namespace(config, params):
    request = Request(params)
    assert request.extra_key is None
    assert request.psa_rule == RequestRule.default(config)


def test_other_rules_have_one_namespace_each(config):
    keys = [
        Request(params).extra_key
        for params in (
            {"psa_coverage": 0.5},
            {"psa_coverage": 0.95},
            {"psa_delta": 0.1},
            {"psa_policy": "dense"},
        )
    ]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert Request({"psa_coverage": 0.5}).extra_key == keys[0]


def test_all_ways_of_asking_for_exact_share_one_namespace(config):
    exact = [{"psa_policy": "dense"}, {"psa_coverage": 1.0}, {"psa_delta": 0.0}]
    assert len({Request(params).extra_key for params in exact}) == 1


def test_the_users_own_key_is_kept(config):
    plain = Request(extra_key="tenant")
    assert plain.extra_key == "tenant"
    request = Request({"psa_coverage": 0.5}, extra_key="tenant")
    assert request.extra_key.startswith("tenant|")
    assert request.extra_key != Request({"psa_coverage": 0.5}).extra_key


@pytest.mark.parametrize(
    "params, words",
    [({"psa_covrage": 0.5}, "psa_coverage"), ({"psa_coverage": 2}, "<= 1")],
)
def test_unusable_rule_ends_the_request_with_the_reason(config, params, words):
    request = Request(params)
    assert words in request.aborted
    assert request.psa_rule == RequestRule.default(config)
    assert request.extra_key is None


def test_without_the_backend_requests_are_untouched(monkeypatch):
    monkeypatch.setattr(state, "_backend", None)
    request = Request({"psa_nonsense": 1})
    assert not hasattr(request, "psa_rule")
    assert request.aborted is None and request.extra_key is None


def test_rules_reach_the_table_by_slot_and_slots_are_reused(config):
    table = state.get_backend().rules
    first = Request({"psa_policy": "dense"}, slot=2)
    backend_hooks.store_rules(None, object, SimpleNamespace(reqs=[first, Request(slot=1)]), None)
    assert table.rules[2].is_dense and not table.rules[1].is_dense
    backend_hooks.store_rules(None, object, SimpleNamespace(reqs=[Request(slot=2)]), None)
    assert table.rules[2] == RequestRule.default(config)


def test_batches_without_requests_are_fine(config):
    backend_hooks.store_rules(None, object, SimpleNamespace(reqs=None), None)
    backend_hooks.store_rules(None, object, SimpleNamespace(reqs=[SimpleNamespace()]), None)
