"""Policies on the command line, such as ``psa:marginal:0.1``, ``topk:box:64`` or ``dense``.

A spec is the policy's name and, in any order, a stop rule, a scorer, the number of the policy's
knob, and any setting as ``name=value``: ``psa:coverage:0.95:sketch_bits=1:conservative=true``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from sgl_psa.config import ConfigError, PSAConfig, convert, unknown_key
from sgl_psa.policies import KNOBS, POLICIES, legal
from sgl_psa.rule import RequestRule
from sgl_psa.scorers import SCORERS
from sgl_psa.stop import STOP_RULES

_SKETCHES = ("sketch", "rotated_sketch", "two_level")
DENSE = "dense"


@dataclass(frozen=True)
class PolicySpec:
    """One policy with its settings, and what a result row says of it.

    Attributes:
        text: the spec as written; it identifies the policy in results.
        config: every setting.
        knob: the number that was given or is the default; ``None`` for a policy without one.
        knob_name: the setting that ``knob`` is.
    """

    text: str
    config: PSAConfig
    knob: float | None
    knob_name: str | None

    @property
    def policy(self) -> str:
        return self.config.policy

    @property
    def scorer(self) -> str | None:
        """The scorer; ``None`` if the policy reads no scores."""
        blind = self.policy == DENSE or not POLICIES[self.policy].reads_scores
        return None if blind else self.config.scorer

    @property
    def stop(self) -> str | None:
        """The stop rule; ``None`` if the policy has none of ours."""
        return self.config.stop if self.policy == "psa" else None

    @property
    def curve(self) -> str:
        """Name of the curve that this is a point of: everything but the knob."""
        scorer = self.scorer
        if scorer in _SKETCHES:
            scorer += f" {self.config.sketch_bits} bit"
        return " ".join(part for part in (self.policy, self.stop, scorer, *self._extras()) if part)

    def _extras(self) -> list[str]:
        shown = {"policy", "stop", "scorer", "sketch_bits", self.knob_name}
        default = PSAConfig().as_dict()
        return [
            f"{name}={value}"
            for name, value in self.config.as_dict().items()
            if name not in shown and value != default[name]
        ]

    def rule(self) -> RequestRule:
        """What a request asks for."""
        return RequestRule.default(self.config)

    def request(self) -> dict[str, Any]:
        """``psa_*`` parameters of a request; only those that the policy uses."""
        given = {"policy": self.policy, "stop": self.stop, self.knob_name: self.knob}
        return {f"psa_{k}": v for k, v in given.items() if k is not None and v is not None}

    def server_settings(self) -> dict[str, Any]:
        """The settings that are not a request's own: they decide scorer state and wrapper."""
        own = {f.name for f in fields(RequestRule)}
        return {k: v for k, v in self.config.as_dict().items() if k not in own}


def parse(text: str, base: PSAConfig | None = None) -> PolicySpec:
    """The policy of a spec.

    Args:
        base: settings that the spec does not name.

    Raises:
        ConfigError: unknown policy or part, or a bad value; the message says what is known.
    """
    name, *parts = text.strip().split(":")
    if name not in POLICIES:
        raise unknown_key(name, POLICIES, "--policies")
    given: dict[str, Any] = {"policy": name}
    number: str | None = None
    for part in parts:
        if "=" in part:
            key, value = part.split("=", 1)
            given[key] = value
        elif part in STOP_RULES:
            given["stop"] = part
        elif part in SCORERS:
            given["scorer"] = part
        elif _is_number(part) and number is None:
            number = part
        else:
            known = [*STOP_RULES, *SCORERS, "NUMBER", "SETTING=VALUE"]
            raise ConfigError(f"--policies {text!r}: {part!r} is none of {', '.join(known)}")
    settings = {**(base or PSAConfig()).as_dict(), **_default_scorer(name, base), **given}
    if "compensate" not in given:
        settings["compensate"] &= legal.may_compensate(POLICIES[name], settings["scorer"])
    limit = POLICIES[name].limit or settings["stop"]
    knob_name = None if name == DENSE else KNOBS[limit]
    if number is not None:
        if knob_name is None:
            raise ConfigError(f"--policies {text!r}: {name} has no knob, drop {number!r}")
        settings[knob_name] = number
    config = PSAConfig(**convert(settings, where=f"--policies {text!r}"))
    knob = None if knob_name is None else getattr(config, knob_name)
    return PolicySpec(text.strip(), config, knob, knob_name)


def parse_all(texts: list[str], base: PSAConfig | None = None) -> list[PolicySpec]:
    """Every spec once, dense first: the others are compared with it."""
    specs = [parse(text, base) for text in dict.fromkeys([DENSE, *texts])]
    return list({spec.text: spec for spec in specs}.values())


def default_specs(quick: bool) -> list[str]:
    """A table over every policy; ``quick`` keeps one or two points of each."""
    return list(_QUICK if quick else _FULL)


def _is_number(part: str) -> bool:
    try:
        float(part)
    except ValueError:
        return False
    return True


def _default_scorer(policy: str, base: PSAConfig | None) -> dict[str, str]:
    """The policy's own scorer, unless the base's is one that it may run with."""
    scorers = POLICIES[policy].scorers
    suits = not scorers or (base is not None and base.scorer in scorers)
    return {} if suits else {"scorer": scorers[0]}


_QUICK = (
    "dense",
    "psa:marginal:0.05",
    "psa:coverage:0.95",
    "topk:two_level:16",
    "topk:box:64",
    "topk:cuboid_mean:64",
    "window:64",
    "swa:64",
    "top_p:0.95",
    "oracle_top_p:0.95",
    "oracle_marginal:0.05",
)
_FULL = (
    "dense",
    *(f"psa:marginal:{delta}" for delta in (0.3, 0.1, 0.05, 0.02)),
    "psa:marginal:0.05:sketch_bits=4:candidate_pages=32",
    *(f"psa:marginal:rotated_sketch:0.05:sketch_bits={bits}" for bits in (1, 2)),
    "psa:marginal:sketch:0.05",
    "psa:marginal:hybrid:0.02",
    *(f"psa:coverage:{p}" for p in (0.9, 0.95)),
    *(f"topk:two_level:{k}" for k in (16, 32)),
    *(f"topk:box:{k}" for k in (64, 128, 256, 384)),
    *(f"topk:cuboid_mean:{k}" for k in (64, 128, 256)),
    "window:128",
    "swa:128",
    "top_p:0.9",
    "oracle_top_p:0.9",
    "oracle_marginal:0.05",
)
