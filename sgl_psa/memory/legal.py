"""Which settings go with a KV pool of two tiers, for the server and for a single request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sgl_psa.config import DEFAULTS, ConfigError
from sgl_psa.policies import POLICIES
from sgl_psa.policies.base import Policy
from sgl_psa.policies.legal import DEFAULT_SCORER, is_page_summary

if TYPE_CHECKING:
    from sgl_psa.config import PSAConfig

#: Settings that mean nothing without tiers.
_OF_TIERS = ("host_path", "host_dtype", "placement", "pipeline")


def check(config: PSAConfig) -> None:
    """Refuse half a pair of tiers, settings of tiers without them, and what tiers do not serve.

    Raises:
        ConfigError: naming the setting to change.
    """
    device, host = config.device_pool_bytes, config.host_pool_bytes
    if bool(device) != bool(host):
        missing = "host_pool_bytes" if device else "device_pool_bytes"
        given = "device_pool_bytes" if device else "host_pool_bytes"
        raise ConfigError(
            f"{given}={device or host}: the KV pool has two tiers or one; set {missing} too, or "
            f"drop {given}"
        )
    if not device:
        for name in _OF_TIERS:
            if getattr(config, name) != DEFAULTS[name]:
                raise ConfigError(
                    f"{name}={getattr(config, name)!r}: no effect without device_pool_bytes and "
                    f"host_pool_bytes; set them, or drop {name}"
                )
        return
    # Pages in int8 are smaller than their frames: by how much, their shape says, in `sizes`.
    if host < device and config.host_dtype == "auto":
        raise ConfigError(
            f"host_pool_bytes={host}: the host tier holds every page, those of the device pool "
            f"({device} bytes) too; set host_pool_bytes to {device} or more"
        )
    check_readers(config)


def check_readers(config: PSAConfig) -> None:
    """Refuse what reads K and V beside the pages that attention reads: they need not be there.

    Raises:
        ConfigError: naming the setting to change.
    """
    if config.audit_rate:
        raise ConfigError(
            f"audit_rate={config.audit_rate}: an audit reads all of K and V, which the device pool "
            "does not hold; set audit_rate to 0, or drop device_pool_bytes and host_pool_bytes"
        )
    if POLICIES[config.policy].keeps_sums:
        raise ConfigError(
            f"policy={config.policy!r}: its attention sums read keys again, which may have left "
            "the device pool; set policy to psa, or drop device_pool_bytes and host_pool_bytes"
        )
    if not serves_scorer(config.scorer):
        own = [name for name in POLICIES[config.policy].scorers if serves_scorer(name)]
        fix = f"scorer to {own[0] if own else DEFAULT_SCORER}"
        if not own and POLICIES[config.policy].scorers:
            fix += " and policy to psa"
        raise ConfigError(
            f"scorer={config.scorer!r}: reads the keys of whole pages, which may have left the "
            f"device pool; set {fix}, or drop device_pool_bytes and host_pool_bytes"
        )
    if config.compensate:
        raise ConfigError(
            "compensate=true: the means of values are taken of whole pages, which may have left "
            "the device pool; drop compensate, or device_pool_bytes and host_pool_bytes"
        )
    if config.stop == "change":
        raise ConfigError(
            "stop='change': the norms of values are taken of whole pages, which may have left the "
            "device pool; set stop to marginal, or drop device_pool_bytes and host_pool_bytes"
        )


def serves_scorer(scorer: str) -> bool:
    """Whether a scorer's state of a key follows from that key alone."""
    return scorer != "exact" and not is_page_summary(scorer)


def check_request(policy: Policy, config: PSAConfig) -> None:
    """Refuse a request's policy that reads K where pages may be away.

    Raises:
        ConfigError: naming the field.
    """
    if config.tiered and policy.keeps_sums:
        raise ConfigError(
            f"psa_policy={policy.name!r}: this server keeps K and V on two tiers, and the policy "
            "reads keys that may be away; choose another psa_policy"
        )
