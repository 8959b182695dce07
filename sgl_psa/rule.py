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

#: Prefix of the keys in a request, e.g. ``psa_coverage``.
REQUEST_PREFIX = "psa_"
REQUEST_FIELDS = ("policy", "stop", "coverage", "delta")


@dataclass(frozen=True)
class RequestRule:
    """Policy, stop rule and its knob for one request."""

    policy: PolicyName
    stop: StopName
    coverage: float
    delta: float

    @classmethod
    def default(cls, config: PSAConfig) -> RequestRule:
        """What a request gets that asks for nothing."""
        return cls(config.policy, config.stop, config.coverage, config.delta)

    @classmethod
    def parse(cls, params: Mapping[str, Any] | None, config: PSAConfig) -> RequestRule:
        """The rule of a request with keys such as ``psa_stop`` and ``psa_coverage`` in ``params``.

        Keys without the prefix belong to others and are ignored. A knob without its rule selects
        the rule: ``psa_coverage`` alone means ``psa_stop="coverage"``, ``psa_delta`` alone
        ``psa_stop="marginal"``.

        Raises:
            ConfigError: unknown key with the prefix, a bad value, or both knobs without a rule.
        """
        default = cls.default(config)
        given = _given(params)
        if not given:
            return default
        if "stop" not in given:
            knobs = {"coverage": "coverage", "delta": "marginal"}
            implied = [knobs[k] for k in knobs if k in given]
            if len(implied) == 2:
                raise ConfigError(
                    "psa_coverage and psa_delta: a request uses one of them; "
                    "add psa_stop to say which, or drop one"
                )
            if implied:
                given["stop"] = implied[0]
        return cls(**{**asdict(default), **given})

    @property
    def is_dense(self) -> bool:
        """Whether the rule reads every page whatever the scores say."""
        if self.policy == "dense":
            return True
        return self.coverage == 1.0 if self.stop == "coverage" else self.delta == 0.0

    @property
    def knob(self) -> float:
        """The number that the stop rule uses."""
        return self.coverage if self.stop == "coverage" else self.delta

    def namespace(self, config: PSAConfig) -> str | None:
        """Name of the prefix-cache namespace, ``None`` for the server's default setting.

        KV that was decoded under sparse attention is shared only between requests that decode in
        the same way, so that nobody reads what a laxer setting wrote.
        """
        if self == RequestRule.default(config):
            return None
        if self.is_dense:
            return "psa:dense"
        return f"psa:{self.policy}:{self.stop}:{self.knob:.6g}"


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
