"""Prometheus series ``sglang:psa_memory_*``: the two tiers of K and V of one scheduler."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from sglang_psa.admission import admission_stats

PREFIX = "sglang:psa_memory_"
#: Series -> field of the section ``memory`` of ``/psa/stats``, unit of it, and what it counts.
COUNTERS: dict[str, tuple[str, float, str]] = {
    "hits": ("hits", 1, "Pages that decode attended without waiting for the host tier."),
    "loads": ("loads", 1, "Pages brought from the host tier."),
    "loaded_bytes": ("bytes_loaded", 1, "Bytes brought from the host tier."),
    "saved_bytes": ("bytes_saved", 1, "Bytes written to the host tier."),
    "in_vain_bytes": ("bytes_in_vain", 1, "Bytes brought and given up without being attended."),
    "evictions": ("evictions", 1, "Frames taken from a page."),
    "stall_seconds": ("stall_ms", 1e-3, "Core time of decode with nothing to do but to wait."),
    "pauses": ("pauses", 1, "Times that a decoding request had to wait for room."),
    "misses": ("misses", 1, "Pages that decode attended and that had no frame."),
}
#: Series -> field, and what it shows.
GAUGES: dict[str, tuple[str, str]] = {
    "frames_used": ("frames_used", "Frames of the device tier that hold a page."),
    "working_set_frames": ("working_set_frames", "Pages that the last 12 steps attended."),
    "paused_requests": ("paused", "Running requests that wait for room on the device tier."),
    "device_bytes": ("device_bytes", "Size of the device tier."),
    "host_bytes": ("host_bytes", "Size of the host tier."),
}
#: Seconds between two updates.
INTERVAL = 1.0


class TierMetrics:
    """The series of one scheduler; ``observe`` after every step, which rarely does something."""

    def __init__(self, labels: Mapping[str, Any], registry: Any = None) -> None:
        """
        Args:
            labels: label names and values, the same as of SGLang's series.
            registry: a ``prometheus_client`` registry; ``None`` means the default one.
        """
        from prometheus_client import REGISTRY, Counter, Gauge

        names, where = list(labels), registry or REGISTRY
        self._labels = labels
        self._counters = {
            name: Counter(PREFIX + name, text, names, registry=where).labels(**labels)
            for name, (_, _, text) in COUNTERS.items()
        }

        def gauge(name: str, text: str, *more: str) -> Any:
            return Gauge(
                PREFIX + name,
                text,
                [*names, *more],
                registry=where,
                multiprocess_mode="mostrecent",
            )

        self._gauges = {
            name: gauge(name, text).labels(**labels) for name, (_, text) in GAUGES.items()
        }
        self._frames = gauge("frames", "Frames that a layer holds.", "layer")
        self._seen = dict.fromkeys(COUNTERS, 0.0)
        self._next = 0.0

    def observe(self, tier: Any, now: float | None = None) -> None:
        """Bring the series up to date, if the last time is long enough ago.

        Args:
            tier: a :class:`sgl_psa.memory.tiered_cache.TieredCache`.
            now: seconds of a monotonic clock; ``None`` reads it.
        """
        now = time.monotonic() if now is None else now
        if now < self._next:
            return
        self._next = now + INTERVAL
        found = {"paused": 0, "pauses": 0, **tier.snapshot(), **(admission_stats() or {})}
        for name, (field, unit, _) in COUNTERS.items():
            value = found[field] * unit
            self._counters[name].inc(value - self._seen[name])
            self._seen[name] = value
        for name, (field, _) in GAUGES.items():
            self._gauges[name].set(found[field])
        for layer, frames in enumerate(found["frames_by_layer"]):
            self._frames.labels(**self._labels, layer=layer).set(frames)
