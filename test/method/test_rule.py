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

    a, b, c = names({"psa_coverage": 0.9}, {"psa_coverage": 0.8}, {"psa_delta": 0.05})
    assert len({a, b, c, None}) == 4
    dense = names({"psa_policy": "dense"}, {"psa_coverage": 1}, {"psa_delta": 0})
    assert len(set(dense)) == 1 and dense[0] not in (None, a, b, c)


@pytest.mark.parametrize("policy", POLICIES)
def test_asking_for_everything_is_the_dense_pass(policy: str) -> None:
    for params in ({"psa_coverage": 1.0}, {"psa_delta": 0}):
        rule = RequestRule.parse({**params, "psa_policy": policy}, CONFIG)
        assert POLICIES[policy](rule, CONFIG).mode == DENSE


def test_rows_hold_the_thresholds() -> None:
    config = PSAConfig(correction_std=2.0)
    table = RuleTable(config, 4, "cpu")
    table.set(1, RequestRule.parse({"psa_coverage": 0.75}, config))
    table.set(2, RequestRule.parse({"psa_policy": "dense"}, config))
    rows = table.rows(torch.tensor([2, 1, 0]))
    assert rows.mode.tolist() == [DENSE, COVERAGE, MARGINAL]
    assert rows.threshold[1:].tolist() == pytest.approx([math.log(1 / 3), math.log(0.1)])
    assert rows.kappa_floor[1] == -math.inf and rows.kappa_std[1] == 2
    table.set(1, RequestRule.default(config))
    assert table.rows(torch.tensor([1])).mode.tolist() == [MARGINAL]


def test_the_correction_may_lower_the_estimate_unless_conservative() -> None:
    rule = RequestRule.parse({"psa_coverage": 0.9}, CONFIG)
    assert POLICIES["psa"](rule, CONFIG).kappa_floor == -math.inf
    for std, used in ((1.0, CONSERVATIVE_STD), (5.0, 5.0)):
        row = POLICIES["psa"](rule, PSAConfig(conservative=True, correction_std=std))
        assert (row.mode, row.kappa_floor, row.kappa_std) == (CONSERVATIVE, 0.0, used)
