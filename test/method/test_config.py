"""Settings: one dataclass, three sources, clear refusals."""

import dataclasses
import math
import typing

import pytest

from sgl_psa.config import (
    DEFAULTS,
    ConfigError,
    PolicyName,
    PSAConfig,
    ScorerName,
    StopName,
    fields,
)
from sgl_psa.policies import POLICIES, legal
from sgl_psa.scorers import SCORERS
from sgl_psa.stop import STOP_RULES


def test_flags_win_over_document_and_document_over_environment() -> None:
    config = PSAConfig.from_sources(
        {"coverage": 0.5, "delta": None},
        '{"coverage": 0.6, "delta": 0.2}',
        {"SGL_PSA_COVERAGE": "0.7", "SGL_PSA_DELTA": "0.3", "SGL_PSA_SINK_PAGES": "4"},
    )
    assert (config.coverage, config.delta, config.sink_pages) == (0.5, 0.2, 4)


def test_document_may_be_a_file(tmp_path) -> None:
    path = tmp_path / "psa.json"
    path.write_text('{"scorer": "hybrid", "sketch_bits": 4}')
    config = PSAConfig.from_sources(document=str(path), environ={})
    assert (config.scorer, config.sketch_bits) == ("hybrid", 4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("coverage", 0),
        ("coverage", 1.0001),
        ("coverage", math.nan),
        ("coverage", "nan"),
        ("coverage", "most"),
        ("coverage", None),
        ("coverage", True),
        ("delta", 1),
        ("delta", -0.1),
        ("delta", math.inf),
        ("policy", "fastest"),
        ("stop", "never"),
        ("scorer", "quest"),
        ("sketch_bits", 3),
        ("summary_bits", 4),
        ("budget_pages", 0),
        ("group_pages", 0),
        ("group_pages", 1.5),
        ("group_percent", -1),
        ("group_percent", "some"),
        ("recent_pages", 0),
        ("min_context", -1),
        ("min_context", "long"),
        ("min_context", True),
        ("conservative", "perhaps"),
        ("backend", "cuda"),
    ],
)
def test_a_bad_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}=.*expected"):
        PSAConfig(**{name: value})


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown key 'covrage'; did you mean 'coverage'"):
        PSAConfig.from_sources(document={"covrage": 0.9}, environ={})
    with pytest.raises(ConfigError, match="did you mean 'SGL_PSA_DELTA'"):
        PSAConfig.from_sources(environ={"SGL_PSA_DELTTA": "0.1"})


@pytest.mark.parametrize("document", ["{bad", '["coverage"]', "/nonexistent/psa.json"])
def test_an_unreadable_document_is_refused(document: str) -> None:
    with pytest.raises(ConfigError, match="psa-config"):
        PSAConfig.from_sources(document=document, environ={})


def test_text_is_converted_and_the_object_is_frozen() -> None:
    config = PSAConfig.from_sources({"coverage": "0.9", "conservative": "true"}, None, {})
    assert config.coverage == 0.9 and config.conservative is True
    assert dataclasses.replace(config, coverage="0.8").coverage == 0.8
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.coverage = 0.1


def test_the_choices_are_the_tables() -> None:
    assert set(typing.get_args(PolicyName)) == set(POLICIES)
    assert set(typing.get_args(StopName)) == set(STOP_RULES)
    assert set(typing.get_args(ScorerName)) == set(SCORERS)


def test_every_field_has_help_and_a_default_of_its_kind() -> None:
    for field in fields():
        assert field.help and DEFAULTS[field.name] == field.default
        assert isinstance(field.default, field.kind) or field.default == field.word


@pytest.mark.parametrize("policy", POLICIES)
def test_a_scorer_that_was_not_chosen_is_the_policys(policy: str) -> None:
    default = (*POLICIES[policy].scorers, legal.DEFAULT_SCORER)[0]
    assert PSAConfig(policy=policy).scorer == default
    assert (
        PSAConfig.from_sources({"policy": policy, "scorer": "auto"}, environ={}).as_dict()["scorer"]
        == default
    )


def test_a_chosen_scorer_is_kept_or_refused() -> None:
    assert PSAConfig(policy="topk", scorer="hybrid").scorer == "hybrid"
    with pytest.raises(ConfigError, match=r"^scorer='hybrid': .*set scorer to exact, or leave"):
        PSAConfig(policy="oracle_marginal", scorer="hybrid")


def test_a_budget_below_what_is_always_read_is_refused_where_it_counts() -> None:
    assert PSAConfig(budget_pages=2, sink_pages=4).budget_pages == 2
    with pytest.raises(ConfigError, match=r"^budget_pages=2: .* 4 \+ 2 pages; set .* to 6"):
        PSAConfig(policy="window", budget_pages=2, sink_pages=4)
