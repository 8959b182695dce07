"""Which policy may run with which settings, for the server and for a single request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sgl_psa.config import AUTO_SCORER, ConfigError
from sgl_psa.policies.base import KNOBS, Policy
from sgl_psa.scorers import SCORERS
from sgl_psa.scorers.page_summary import PageSummaryScorer

if TYPE_CHECKING:
    from sgl_psa.config import PSAConfig

#: Scorer of policies that run with any.
DEFAULT_SCORER = "two_level"


def resolve_scorer(policy: Policy, scorer: str) -> str:
    """``scorer``, or the policy's default if it is ``auto``.

    Raises:
        ConfigError: the policy cannot run with it.
    """
    if scorer == AUTO_SCORER:
        return policy.scorers[0] if policy.scorers else DEFAULT_SCORER
    if policy.scorers and scorer not in policy.scorers:
        allowed = " or ".join(policy.scorers)
        raise ConfigError(
            f"scorer={scorer!r}: policy {policy.name} runs with {allowed}; "
            f"set scorer to {policy.scorers[0]}, or leave it out"
        )
    return scorer


def check_request(policy: Policy, scorer: str) -> None:
    """Refuse a request's policy that the server's scorer does not suit.

    Raises:
        ConfigError: naming the scorer that it needs.
    """
    if policy.scorers and scorer not in policy.scorers:
        allowed = " or ".join(policy.scorers)
        raise ConfigError(
            f"psa_policy={policy.name!r}: needs scorer {allowed}, and this server runs {scorer}; "
            f"choose another psa_policy, or start the server with --psa-scorer {policy.scorers[0]}"
        )


def is_page_summary(scorer: str) -> bool:
    """Whether a scorer knows a page by a few vectors, not by a copy of every key."""
    return issubclass(SCORERS[scorer], PageSummaryScorer)


def caution(config: PSAConfig) -> str | None:
    """What to warn of at start: settings that run, but do not keep the promise of their rule.

    Measured by ``python -m sgl_psa.audit``: the correction by the last group, which orders pages by
    the same summaries, leaves the coverage rule short of what was asked in about a sixth of rows.
    """
    plain_coverage = config.policy == "psa" and config.stop == "coverage" and config.coverage < 1
    if plain_coverage and not config.conservative and is_page_summary(config.scorer):
        return (
            f"stop=coverage with scorer {config.scorer} often covers less than coverage="
            f"{config.coverage:g}: add --psa-conservative, or choose --psa-scorer {DEFAULT_SCORER}"
        )
    return None


def may_compensate(policy: Policy, scorer: str) -> bool:
    """Whether what the policy leaves out is known well enough for tail compensation."""
    return policy.reads_scores and not is_page_summary(scorer)


def check_compensation(policy: Policy, scorer: str) -> None:
    """Refuse tail compensation without good estimates of what was left out.

    Raises:
        ConfigError: the policy reads no scores, or the scorer's estimates are too coarse.
    """
    if not policy.reads_scores:
        raise ConfigError(
            f"compensate=true: policy {policy.name} reads no scores, so nothing says what weight "
            "the pages left out have; drop compensate, or set policy to psa"
        )
    if is_page_summary(scorer):
        fits = ", ".join(name for name in SCORERS if not is_page_summary(name))
        raise ConfigError(
            f"compensate=true: scorer {scorer} estimates masses so coarsely that pages left out "
            f"may get far too much weight; set scorer to one of {fits}, or drop compensate"
        )


def check_stop(stop: str, kept: str, prefix: str) -> None:
    """Refuse a request's stop rule ``change`` where no value norms are kept.

    Args:
        kept: the server's stop rule; norms are kept for ``change`` only.

    Raises:
        ConfigError: naming the flag that the server needs.
    """
    if stop == "change" and kept != "change":
        raise ConfigError(
            f"{prefix}stop='change': this server keeps no norms of values; choose {prefix}stop "
            "marginal, or start the server with --psa-stop change"
        )


def check_budget(
    policy: Policy, budget_pages: int, sink_pages: int, recent_pages: int, prefix: str = ""
) -> None:
    """Refuse a budget below the pages that are always attended.

    Args:
        prefix: of the field's name where it was given, ``psa_`` in a request.

    Raises:
        ConfigError: naming the smallest budget.
    """
    least = sink_pages + recent_pages
    if policy.limit == "budget" and budget_pages < least:
        raise ConfigError(
            f"{prefix}budget_pages={budget_pages}: policy {policy.name} always reads sink_pages + "
            f"recent_pages = {sink_pages} + {recent_pages} pages; set {prefix}budget_pages to "
            f"{least} or more"
        )


def check_prediction(policy: Policy, predict: bool, prior: str) -> None:
    """Refuse a prior that nothing reads, and predictions where no stop rule ends reading.

    Raises:
        ConfigError: naming the setting to change.
    """
    if prior and not predict:
        raise ConfigError(f"budget_prior={prior!r}: no effect without predict; set predict")
    if predict and not policy.stops:
        raise ConfigError(
            f"predict: policy {policy.name} has no stop rule whose pages could be predicted; drop "
            "predict, or choose policy psa"
        )


def check_knobs(
    policy: Policy, given: Mapping[str, Any], policies: Iterable[Policy], prefix: str
) -> None:
    """Refuse a knob, or a stop rule, that the policy does not use.

    Args:
        given: field name -> value, as asked for.
        policies: all of them, to name those that use the knob.
        prefix: of the fields' names where they were given.

    Raises:
        ConfigError: naming the knob and the policies that have it.
    """
    policies = tuple(policies)
    for knob in dict.fromkeys(KNOBS.values()):
        if knob in given and not _uses(policy, knob):
            names = " or ".join(p.name for p in policies if _uses(p, knob))
            raise ConfigError(
                f"{prefix}{knob}={given[knob]!r}: no effect on policy {policy.name}; drop it, or "
                f"choose {prefix}policy {names}"
            )
    stop = given.get("stop")
    if stop is not None and policy.limit is not None and stop != policy.limit:
        raise ConfigError(
            f"{prefix}stop={stop!r}: no effect on policy {policy.name}; drop it, or choose "
            f"{prefix}policy psa"
        )


def _uses(policy: Policy, knob: str) -> bool:
    return knob == KNOBS[policy.limit] if policy.limit else knob != KNOBS["budget"]
