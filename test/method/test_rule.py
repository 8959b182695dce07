"""Rules of single requests: parsing, meaning, prefix-cache namespaces, table rows."""

import math

import pytest
import torch

from sgl_psa.config import ConfigError, PSAConfig
from sgl_psa.policies import POLICIES
from sgl_psa.row import CONSERVATIVE, COVERAGE, DENSE, MARGINAL
from sgl_psa.rule import RequestRule
from sgl_psa.rule_table import RuleTable
from sgl_psa.stop import CONSERVATIVE_STD

CONFIG = PSAConfig()


def test_nothing_asked_is_the_default() -> None:
    for params in (None, {}, {"temperature": 1, "__req__": object()}):
        rule = RequestRule.parse(params, CONFIG)
        assert rule == RequestRule.default(CONFIG)
        assert rule.namespace(CONFIG) is None


def test_a_knob_selects_its_rule() -> None:
    assert RequestRule.parse({"psa_coverage": 0.5}, CONFIG).stop == "coverage"
    assert RequestRule.parse({"psa_delta": "0.5"}, PSAConfig(stop="coverage")).stop == "marginal"
    both = {"psa_coverage": 0.5, "psa_delta": 0.2}
    with pytest.raises(ConfigError, match="add psa_stop"):
        RequestRule.parse(both, CONFIG)
    assert RequestRule.parse({**both, "psa_stop": "marginal"}, CONFIG).knob == 0.2


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"psa_coverage": 0}, "psa_coverage=0"),
        ({"psa_coverage": "high"}, "psa_coverage='high'"),
        ({"psa_delta": float("nan")}, "psa_delta=nan"),
        ({"psa_policy": "sparse"}, "psa_policy='sparse'"),
        ({"psa_stop": None}, "psa_stop=None"),
        ({"psa_covreage": 0.9}, "did you mean 'psa_coverage'"),
        ({"psa_scorer": "hybrid"}, "unknown key 'psa_scorer'"),
    ],
)
def test_bad_requests_are_refused_by_field(params: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RequestRule.parse(params, CONFIG)


def test_namespaces_separate_settings_and_unite_dense_ones() -> None:
    def names(*params):
        return [RequestRule.parse(p, CONFIG).namespace(CONFIG) for p in params]

    a, b, c = names({"psa_coverage": 0.9}, {"psa_coverage": 0.8}, {"psa_delta": 0.2})
    assert len({a, b, c, None}) == 4
    dense = names({"psa_policy": "dense"}, {"psa_coverage": 1}, {"psa_delta": 0})
    assert len(set(dense)) == 1 and dense[0] not in (None, a, b, c)


@pytest.mark.parametrize("policy", POLICIES)
def test_asking_for_everything_is_the_dense_pass(policy: str) -> None:
    config = PSAConfig(policy=policy)
    limits = [POLICIES[policy].limit] if POLICIES[policy].limit else ["coverage", "marginal"]
    for limit in limits:
        params = {"coverage": {"psa_coverage": 1.0}, "marginal": {"psa_delta": 0}}.get(limit, {})
        rule = RequestRule.parse(params, config)
        assert rule.is_dense == bool(params)
        assert (POLICIES[policy].row(rule, config).mode == DENSE) == bool(params)


BUDGET_POLICIES = [name for name, policy in POLICIES.items() if policy.limit == "budget"]


@pytest.mark.parametrize("policy", BUDGET_POLICIES)
def test_a_budget_holds_for_its_policies(policy: str) -> None:
    rule = RequestRule.parse({"psa_policy": policy, "psa_budget_pages": "12"}, CONFIG)
    assert (rule.limit, rule.knob, rule.is_dense) == ("budget", 12, False)
    other = RequestRule.parse({"psa_policy": policy, "psa_budget_pages": 13}, CONFIG)
    assert rule.namespace(CONFIG) != other.namespace(CONFIG)
    assert rule.namespace(PSAConfig(policy=policy, budget_pages=12, scorer="sketch")) is None
    with pytest.raises(ConfigError, match=r"psa_budget_pages=2: .*set psa_budget_pages to 3"):
        RequestRule.parse({"psa_policy": policy, "psa_budget_pages": 2}, CONFIG)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"psa_budget_pages": 9},
            r"psa_budget_pages=9: no effect on policy psa; .*psa_policy topk or window or swa",
        ),
        ({"psa_policy": "window", "psa_delta": 0.1}, r"psa_delta=0.1: no effect on policy window"),
        ({"psa_policy": "top_p", "psa_delta": 0.1}, r"psa_delta=0.1: no effect on policy top_p"),
        ({"psa_policy": "top_p", "psa_stop": "marginal"}, r"psa_stop='marginal': no effect"),
        (
            {"psa_policy": "oracle_top_p"},
            r"psa_policy='oracle_top_p': needs scorer exact, and this server runs two_level; .*"
            r"--psa-scorer exact",
        ),
        ({"psa_policy": "oracle_marginal", "psa_delta": 0.1}, "needs scorer exact"),
    ],
)
def test_what_a_policy_cannot_use_is_refused(params: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RequestRule.parse(params, CONFIG)


def test_rows_hold_the_thresholds() -> None:
    config = PSAConfig(correction_std=2.0)
    table = RuleTable(config, 4, "cpu")
    table.set(1, RequestRule.parse({"psa_coverage": 0.75}, config))
    table.set(2, RequestRule.parse({"psa_policy": "dense"}, config))
    rows = table.rows(torch.tensor([2, 1, 0]))
    assert rows.mode.tolist() == [DENSE, COVERAGE, MARGINAL]
    assert rows.threshold[1:].tolist() == pytest.approx([math.log(1 / 3), math.log(config.delta)])
    assert rows.kappa_floor[1] == -math.inf and rows.kappa_std[1] == 2
    table.set(1, RequestRule.default(config))
    assert table.rows(torch.tensor([1])).mode.tolist() == [MARGINAL]


def test_rows_are_kept_until_a_slot_or_the_batch_changes() -> None:
    table = RuleTable(CONFIG, 4, "cpu")
    slots = torch.tensor([2, 1])
    rows = table.rows(slots)
    assert table.rows(slots.clone()) is rows
    assert table.rows(torch.tensor([1, 2])) is not rows
    rows = table.rows(slots)
    table.set(1, RequestRule.parse({"psa_policy": "dense"}, CONFIG))
    assert table.rows(slots).mode.tolist() == [MARGINAL, DENSE]


def test_the_correction_may_lower_the_estimate_unless_conservative() -> None:
    rule = RequestRule.parse({"psa_coverage": 0.9}, CONFIG)
    assert POLICIES["psa"].row(rule, CONFIG).kappa_floor == -math.inf
    for std, used in ((1.0, CONSERVATIVE_STD), (5.0, 5.0)):
        row = POLICIES["psa"].row(rule, PSAConfig(conservative=True, correction_std=std))
        assert (row.mode, row.kappa_floor, row.kappa_std) == (CONSERVATIVE, 0.0, used)


def test_rows_that_choose_their_pages_are_told_to_the_host_only_where_there_are_some() -> None:
    table = RuleTable(CONFIG, 4, "cpu")
    slots = torch.tensor([3, 0, 2])
    assert table.rows(slots).picks == ()
    window = RequestRule.parse({"psa_policy": "window"}, CONFIG)
    table.set(0, window)
    rows = table.rows(slots)
    assert [(pick.row, pick.slot, pick.rule) for pick in rows.picks] == [(1, 0, window)]
    assert rows.scored.tolist() == [True, False, True]
    table.set(0, RequestRule.default(CONFIG))
    assert table.rows(slots).picks == ()


def test_another_rule_object_is_another_request() -> None:
    table = RuleTable(CONFIG, 2, "cpu")
    first, second = (RequestRule.parse({"psa_policy": "swa"}, CONFIG) for _ in range(2))

    def generation(rule: RequestRule) -> int:
        table.set(1, rule)
        return table.rows(torch.tensor([1])).picks[0].generation

    assert first == second and first is not second
    assert generation(first) == generation(first) != generation(second)
