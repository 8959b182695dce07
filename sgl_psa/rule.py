"""The part of the settings that a single request can choose for itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sgl_psa.config import (
    ConfigError,
    PolicyName,
    PSAConfig,
    StopName,
    check_value,
    fields,
    unknown_key,
)
from sgl_psa.memory import legal as memory
from sgl_psa.policies import KNOBS, POLICIES, legal
from sgl_psa.policies.base import Limit

#: Prefix of the keys in a request, e.g. ``psa_coverage``.
REQUEST_PREFIX = "psa_"
REQUEST_FIELDS = ("policy", "stop", "coverage", "delta", "budget_pages")


@dataclass(frozen=True)
class RequestRule:
    """Policy, stop rule and the knobs for one request."""

    policy: PolicyName
    stop: StopName
    coverage: float
    delta: float
    budget_pages: int

    @classmethod
    def default(cls, config: PSAConfig) -> RequestRule:
        """What a request gets that asks for nothing."""
        return cls(**{name: getattr(config, name) for name in REQUEST_FIELDS})

    @classmethod
    def parse(cls, params: Mapping[str, Any] | None, config: PSAConfig) -> RequestRule:
        """The rule of a request with keys such as ``psa_stop`` and ``psa_coverage`` in ``params``.

        Keys without the prefix belong to others and are ignored. A knob without its rule selects
        the rule: ``psa_coverage`` alone means ``psa_stop="coverage"``, ``psa_delta`` alone
        ``psa_stop="marginal"``, or ``change`` where that is the server's rule.

        Raises:
            ConfigError: unknown key with the prefix, a bad value, both knobs without a rule, a
                knob that the policy does not use, or a policy or stop rule that the server's
                settings do not suit.
        """
        default = cls.default(config)
        given = _given(params)
        if not given:
            return default
        policy = POLICIES[given.get("policy", default.policy)]
        legal.check_request(policy, config.scorer)
        memory.check_request(policy, config)
        if "stop" not in given:
            by_delta = "change" if default.stop == "change" else "marginal"
            knobs = {"coverage": "coverage", "delta": policy.limit or by_delta}
            implied = [knobs[k] for k in knobs if k in given]
            if len(implied) == 2:
                raise ConfigError(
                    "psa_coverage and psa_delta: a request uses one of them; "
                    "add psa_stop to say which, or drop one"
                )
            if implied:
                given["stop"] = implied[0]
        legal.check_knobs(policy, given, POLICIES.values(), REQUEST_PREFIX)
        legal.check_stop(given.get("stop", default.stop), config.stop, REQUEST_PREFIX)
        rule = cls(**{**asdict(default), **given})
        legal.check_budget(
            policy, rule.budget_pages, config.sink_pages, config.recent_pages, REQUEST_PREFIX
        )
        return rule

    @property
    def limit(self) -> Limit:
        """What ends reading: ``coverage``, ``marginal``, ``change`` or ``budget``."""
        return POLICIES[self.policy].limit or self.stop

    @property
    def knob(self) -> float:
        """The number that sets the limit."""
        value: float = getattr(self, KNOBS[self.limit])
        return value

    @property
    def is_dense(self) -> bool:
        """Whether the rule reads every page whatever the scores say."""
        if self.policy == "dense":
            return True
        everything = {"coverage": 1.0, "delta": 0.0}
        return self.knob == everything.get(KNOBS[self.limit])

    def namespace(self, config: PSAConfig) -> str | None:
        """Name of the prefix-cache namespace, ``None`` for the server's default setting.

        KV that was decoded under sparse attention is shared only between requests that decode in
        the same way, so that nobody reads what a laxer setting wrote.
        """
        if self == RequestRule.default(config):
            return None
        if self.is_dense:
            return "psa:dense"
        return f"psa:{self.policy}:{self.limit}:{self.knob:.6g}"


def _given(params: Mapping[str, Any] | None) -> dict[str, Any]:
    by_name = {f.name: f for f in fields()}
    given = {}
    for key, value in (params or {}).items():
        if not key.startswith(REQUEST_PREFIX):
            continue
        name = key.removeprefix(REQUEST_PREFIX)
        if name not in REQUEST_FIELDS:
            known = [REQUEST_PREFIX + f for f in REQUEST_FIELDS]
            raise unknown_key(key, known, "request")
        given[name] = check_value(by_name[name], value, where=key)
    return given
