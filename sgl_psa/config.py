"""Every knob of Progressive Sparse Attention, its default, its range and its meaning.

One frozen dataclass is parsed once. The command line (``--psa-coverage``), JSON (``"coverage"``)
and the environment (``SGL_PSA_COVERAGE``) share its field names.
"""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from sgl_psa.config_field import BYTES, ConfigError, ConfigField, check_value, unknown_key

__all__ = [
    "ConfigError",
    "ConfigField",
    "PSAConfig",
    "check_value",
    "convert",
    "fields",
    "unknown_key",
]

ENV_PREFIX = "SGL_PSA_"
#: Variables with the prefix that configure the build and the plugin, not the method.
ENV_RESERVED = frozenset({"CACHE_DIR", "CPU_ISA", "CPU_OVERLAP", "ALLOW_UNTESTED_SGLANG"})

PolicyName = Literal[
    "psa", "dense", "topk", "window", "swa", "top_p", "oracle_top_p", "oracle_marginal"
]
StopName = Literal["marginal", "coverage", "change"]
ScorerName = Literal[
    "sketch",
    "hybrid",
    "mean",
    "box",
    "gaussian",
    "cuboid_mean",
    "rotated_sketch",
    "two_level",
    "exact",
]
BackendName = Literal["auto", "cpu", "torch", "triton", "flashinfer", "reference"]
PlacementName = Literal["demand", "lru", "even"]
HostDtypeName = Literal["auto", "int8"]
#: Stands for what suits the kernels in use: :mod:`sgl_psa.crossover`, :mod:`sgl_psa.groups`.
AUTO: Literal["auto"] = "auto"
#: Stands for the policy's own default; a constructed PSAConfig holds a scorer's name instead.
AUTO_SCORER = "auto"


@dataclass(frozen=True)
class PSAConfig:
    """Server-wide settings; immutable, validated on construction.

    ``scorer="auto"`` is replaced by the name of the policy's default scorer on construction, so
    that whoever reads the settings sees what runs.

    Raises:
        ConfigError: a value is of the wrong type, out of range, not one of the choices, or does
            not go with the policy.
    """

    policy: Annotated[
        PolicyName,
        Meta(
            description="Which pages a decode step reads: psa, all of them (dense), BUDGET_PAGES "
            "of the best scores (topk), of the newest (window) or of the most attended so far "
            "(swa), the fewest that reach COVERAGE by the scores (top_p), or psa and top_p by the "
            "true masses, for comparison (oracle_marginal, oracle_top_p)."
        ),
    ] = "psa"
    stop: Annotated[
        StopName,
        Meta(
            description="When to stop reading: marginal (no remaining page holds more than DELTA "
            "of the mass attended), coverage (COVERAGE of the attention mass is attended) or "
            "change (as marginal, a page's mass weighted by its largest value norm)."
        ),
    ] = "marginal"
    coverage: Annotated[
        float,
        Meta(
            gt=0, le=1, description="Attention mass to cover under --psa-stop coverage; 1 = dense."
        ),
    ] = 0.95
    delta: Annotated[
        float,
        Meta(
            ge=0,
            lt=1,
            description="Page mass that may be left unread, relative to the mass "
            "attended, under --psa-stop marginal and change; 0 = dense.",
        ),
    ] = 0.05
    scorer: Annotated[
        Literal[ScorerName, "auto"],
        Meta(
            description="How the mass of an unread page is estimated. Low-bit keys: sketch, "
            "rotated_sketch, two_level (more bits for candidate pages). Page summaries: hybrid, "
            "mean, box (Quest), gaussian, cuboid_mean (ArkVale). exact reads all keys (audits). "
            "auto: the one that the policy is known with."
        ),
    ] = "auto"
    sketch_bits: Annotated[
        Literal[1, 2, 4],
        Meta(
            description="Bits per key element of sketch, rotated_sketch and the second level "
            "of two_level: 1, 2 or 4."
        ),
    ] = 2
    summary_bits: Annotated[
        Literal[8, 16],
        Meta(
            description="Bits per element of page summaries: 16 or 8, which halves their bytes; a "
            "box is rounded outward."
        ),
    ] = 16
    group_pages: Annotated[
        int, Meta(ge=1, le=1024, description="Least pages attended between two stop tests.")
    ] = 4
    group_percent: Annotated[
        Annotated[int, Meta(ge=0, le=1000)] | Literal["auto"],
        Meta(
            description="Pages attended between two stop tests, as a percentage of those attended "
            "before them, where that is more than GROUP_PAGES. auto: 100 for Triton's kernels, as "
            "a GPU has to read many pages at once, 0 for others."
        ),
    ] = AUTO
    sink_pages: Annotated[
        int, Meta(ge=0, le=1024, description="First pages of a request, always attended.")
    ] = 1
    recent_pages: Annotated[
        int,
        Meta(
            ge=1,
            le=4096,
            description="Last pages of a request (the open one included), always attended.",
        ),
    ] = 2
    min_context: Annotated[
        Annotated[int, Meta(ge=0)] | Literal["auto"],
        Meta(
            description="Requests shorter than this many tokens are decoded densely. auto: those "
            "for which the kernels in use are faster so, by measurement."
        ),
    ] = AUTO
    correction_std: Annotated[
        float,
        Meta(
            ge=0,
            le=16,
            description="Standard deviations added to the residual correction "
            "of the coverage rule.",
        ),
    ] = 1.0
    conservative: Annotated[
        bool,
        Meta(
            description="Coverage rule: correct the estimate of what remains by all pages read "
            "so far, at least 3 standard deviations up, never down."
        ),
    ] = False
    compensate: Annotated[
        bool,
        Meta(
            description="Add the pages left out to the output, by their estimated mass and the "
            "mean of their values; low-bit and exact scorers only."
        ),
    ] = False
    budget_pages: Annotated[
        int,
        Meta(
            ge=1,
            description="Pages a KV head reads under --psa-policy topk, window and swa, sink and "
            "recent pages included.",
        ),
    ] = 64
    audit_rate: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="Share of (layer, decode step) that a dense shadow pass audits; 0 = none.",
        ),
    ] = 0.0
    backend: Annotated[
        BackendName,
        Meta(
            description="Kernels: auto (cpu or triton), cpu (C++), torch (any device), triton "
            "(CUDA), flashinfer (triton's, with large groups and dense rows by FlashInfer) or "
            "reference (slow).",
        ),
    ] = "auto"
    candidate_pages: Annotated[
        int,
        Meta(
            ge=1,
            description="Most pages of a request and KV head that the second level of two_level "
            "reads.",
        ),
    ] = 128
    predict: Annotated[
        bool,
        Meta(
            description="Attend the predicted number of pages before the first stop test, so that "
            "one round usually suffices; predictions follow each request, layer and KV head. Under "
            "--psa-stop coverage, past errors of the estimates also correct those of the next step."
        ),
    ] = False
    predict_rho: Annotated[
        float,
        Meta(gt=0, lt=1, description="Share of decode steps that a prediction should suffice for."),
    ] = 0.97
    budget_prior: Annotated[
        str,
        Meta(
            description="File written by python -m sgl_psa.calibrate, from which predictions "
            "start; none: from the forced pages and one group."
        ),
    ] = ""
    device_pool_bytes: Annotated[
        int,
        Meta(
            ge=0,
            extra=BYTES,
            description="Bytes of K and V near the compute, of each tensor-parallel rank, for the "
            "pages that layers need now, such as 512M; 0: every page of every layer stays there.",
        ),
    ] = 0
    host_pool_bytes: Annotated[
        int,
        Meta(
            ge=0,
            extra=BYTES,
            description="Bytes of the host tier, which holds all K and V of each rank and so says "
            "how many tokens the server has room for, such as 8G; goes with "
            "--psa-device-pool-bytes.",
        ),
    ] = 0
    host_path: Annotated[
        str,
        Meta(description="Folder in which the host tier is a file; none: it is memory."),
    ] = ""
    host_dtype: Annotated[
        HostDtypeName,
        Meta(
            description="Elements of the host tier: auto, those of the KV cache, or int8 with "
            "shared exponents, which holds 1.9 times as many tokens as 16 bits and rounds every "
            "page that is full."
        ),
    ] = "auto"
    placement: Annotated[
        PlacementName,
        Meta(
            description="Which page leaves the device pool: the one selected least often lately "
            "(demand), the one attended longest ago (lru), or that of the same layer, with an "
            "equal share for every layer (even)."
        ),
    ] = "demand"
    pipeline: Annotated[
        bool,
        Meta(
            description="Load the next group of pages from the host tier while one is attended; "
            "off: load only what is known to be needed."
        ),
    ] = True

    def __post_init__(self) -> None:
        for field in _FIELDS:
            value = check_value(field, getattr(self, field.name), where=field.name)
            object.__setattr__(self, field.name, value)
        # Policies know settings, so their table can only be imported when one is checked.
        from sgl_psa.policies import POLICIES, legal

        policy = POLICIES[self.policy]
        object.__setattr__(self, "scorer", legal.resolve_scorer(policy, self.scorer))
        legal.check_budget(policy, self.budget_pages, self.sink_pages, self.recent_pages)
        legal.check_prediction(policy, self.predict, self.budget_prior)
        if self.compensate:
            legal.check_compensation(policy, self.scorer)
        from sgl_psa.memory import legal as memory

        memory.check(self)
        if self.scorer == "two_level" and self.sketch_bits == 1:
            raise ConfigError(
                "scorer='two_level' reads one bit first and sketch_bits second: set sketch_bits to "
                "2 or 4, or scorer to 'rotated_sketch'"
            )

    @classmethod
    def from_sources(
        cls,
        flags: Mapping[str, Any] | None = None,
        document: str | Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> PSAConfig:
        """Merge the sources: ``flags`` over ``document`` over ``environ`` over the defaults.

        Args:
            flags: field name -> value; ``None`` means not given.
            document: a mapping, JSON text, or the path of a JSON file.
            environ: variables such as ``SGL_PSA_COVERAGE``; ``None`` reads ``os.environ``.

        Raises:
            ConfigError: unknown key (the nearest one is named), bad value, unreadable document.
        """
        merged = {
            **_from_environ(os.environ if environ is None else environ),
            **_from_document(document),
            **{k: v for k, v in (flags or {}).items() if v is not None},
        }
        return cls(**convert(merged, where="--psa-config"))

    @property
    def tiered(self) -> bool:
        """Whether K and V live on two tiers."""
        return self.device_pool_bytes > 0

    def as_dict(self) -> dict[str, Any]:
        """Field name -> value."""
        return dataclasses.asdict(self)


def fields() -> tuple[ConfigField, ...]:
    """The settings in declaration order, with their types and help resolved."""
    return _FIELDS


def convert(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check keys and convert values (text included) to their fields' types."""
    by_name = {f.name: f for f in fields()}
    result = {}
    for key, value in values.items():
        if key not in by_name:
            raise unknown_key(key, by_name, where)
        result[key] = check_value(by_name[key], value, where=key)
    return result


def _from_environ(environ: Mapping[str, str]) -> dict[str, str]:
    known = {f.name for f in fields()}
    found = {}
    for key, value in environ.items():
        if not key.startswith(ENV_PREFIX) or key[len(ENV_PREFIX) :] in ENV_RESERVED:
            continue
        name = key[len(ENV_PREFIX) :].lower()
        if name not in known:
            raise unknown_key(key, [ENV_PREFIX + k.upper() for k in known], "environment")
        found[name] = value
    return found


def _from_document(document: str | Mapping[str, Any] | None) -> dict[str, Any]:
    if document is None:
        return {}
    if isinstance(document, Mapping):
        return dict(document)
    text = document
    if not document.lstrip().startswith("{"):
        try:
            text = Path(document).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"--psa-config {document!r}: neither JSON text (it would start with '{{') nor a "
                f"readable file: {error.strerror}"
            ) from None
    try:
        loaded = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--psa-config is not valid JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise ConfigError('--psa-config must be a JSON object such as {"coverage": 0.9}')
    return loaded


def _collect_fields() -> tuple[ConfigField, ...]:
    hints = typing.get_type_hints(PSAConfig, include_extras=True)
    collected = []
    for f in dataclasses.fields(PSAConfig):
        meta = next(m for m in hints[f.name].__metadata__ if isinstance(m, Meta))
        collected.append(ConfigField(f.name, hints[f.name], f.default, meta.description or ""))
    return tuple(collected)


_FIELDS = _collect_fields()

#: Read-only view of the defaults, field name -> value.
DEFAULTS: Mapping[str, Any] = types.MappingProxyType({f.name: f.default for f in _FIELDS})
