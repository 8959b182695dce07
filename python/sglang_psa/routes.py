"""``GET /psa/stats``: what the server read since it started, and how it is set;
``GET /psa/memory/check``: whether the tiers of K and V are in order.

The schedulers add their part to SGLang's internal state, which ``/server_info`` shows too. A
data-parallel server has one part a rank; the route sums them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from sgl_psa.audit.counts import merge_reports
from sgl_psa.stats import ReadCounts
from sglang_psa import compat, state, tiered_report
from sglang_psa.admission import admission_stats
from sglang_psa.hooks import Hook, Kind
from sglang_psa.server_args import uses_psa

ROUTE = "/psa/stats"
CHECK_ROUTE = "/psa/memory/check"
KEY = "psa"
#: Fields of the statistics that are the same in every rank.
COMMON = (
    "config",
    "backend",
    "isa",
    "threads",
    "page_size",
    "sparse_from",
    "group_percent",
    "tp_size",
    "scope",
)


def describe(result: Any, scheduler: Any, question: Any = None) -> None:
    """Add the rank's statistics to SGLang's internal state, under ``psa``."""
    backend = state.get_backend()
    if backend is None:
        return
    ranks = scheduler.ps
    result.internal_state[KEY] = {
        **backend.wrapper.stats.as_dict(),
        "config": backend.config.as_dict(),
        "backend": backend.wrapper.backend,
        "isa": _isa(backend.wrapper.backend),
        "threads": torch.get_num_threads(),
        "page_size": backend.wrapper.page_size,
        "sparse_from": backend.wrapper.min_context,
        "group_percent": backend.wrapper.group_percent,
        "dp_rank": ranks.dp_rank or 0,
        "tp_rank": ranks.tp_rank,
        "tp_size": ranks.tp_size,
        "cpu_layers": None if backend.layer_calls is None else dict(backend.layer_calls),
        "memory": tiered_report.section(backend.pool, scheduler, question),
        "admission": admission_stats(),
        "scope": f"KV heads of tensor-parallel rank {ranks.tp_rank} of {ranks.tp_size}",
    }


def _isa(backend: str) -> str | None:
    """Instruction set of the C++ kernels in use; ``None`` where they are not."""
    if backend != "cpu":
        return None
    from sgl_psa_kernels._native import native_available

    _, name = native_available()
    return name


def merge(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The JSON of the route, from the parts of the data-parallel ranks.

    Counts and bytes are sums over ranks, fractions and means follow from them. ``layers`` has one
    entry a layer; ``inherited`` (requests whose predictions started from a shared prefix's) is
    ``None`` unless the server predicts (``--psa-predict``), ``audit`` unless it audits
    (``--psa-audit-rate``), ``cpu_layers`` (calls of layers around attention, by kernel) unless the
    model runs on the kernels for CPUs, ``memory`` (of all tensor-parallel ranks) unless K and V are
    on two tiers; ``ranks`` has the parts without their layers, audits and memory.
    """
    layers = [
        _sum([rank["layers"][i] for rank in ranks]).as_dict()
        for i in range(len(ranks[0]["layers"]))
    ]
    return {
        "active": any(rank["active"] for rank in ranks),
        "decode_steps": sum(rank["decode_steps"] for rank in ranks),
        "sparse_rows": sum(rank["sparse_rows"] for rank in ranks),
        **_sum(ranks).as_dict(),
        **{name: ranks[0][name] for name in COMMON},
        "layers": layers,
        "inherited": _total([rank["inherited"] for rank in ranks]),
        "audit": merge_reports([rank["audit"] for rank in ranks]),
        "cpu_layers": _total_calls([rank["cpu_layers"] for rank in ranks]),
        "memory": tiered_report.merge([rank["memory"] for rank in ranks]),
        "ranks": [
            {k: v for k, v in rank.items() if k not in ("layers", "audit", "memory", *COMMON)}
            for rank in ranks
        ],
    }


def _total_calls(parts: Sequence[dict[str, int] | None]) -> dict[str, int] | None:
    known = [Counter(part) for part in parts if part is not None]
    return dict(sum(known, Counter())) if known else None


def _total(parts: Sequence[int | None]) -> int | None:
    known = [part for part in parts if part is not None]
    return sum(known) if known else None


def _sum(parts: Sequence[dict[str, Any]]) -> ReadCounts:
    """The counts behind ``ReadCounts.as_dict`` of several parts, added up."""
    total = ReadCounts()
    for part in parts:
        sums = {
            **part,
            "rounds": part["mean_rounds"] * part["visits"],
            "coverage": (part["mean_coverage"] or 0.0) * part["estimates"],
        }
        total.add(ReadCounts(**{f.name: sums[f.name] for f in fields(ReadCounts)}))
    return total


def add_route(server_args: Any, tokenizer_manager: Any, *args: Any, **kwargs: Any) -> None:
    """Add the route to SGLang's application, in a server that uses psa."""
    if not uses_psa(server_args):
        return
    from fastapi import APIRouter, HTTPException

    router = APIRouter()

    @router.get(ROUTE)
    async def psa_stats() -> dict[str, Any]:
        states = await tokenizer_manager.get_internal_state()
        return merge([one[KEY] for one in states])

    @router.get(CHECK_ROUTE)
    async def psa_memory_check() -> dict[str, Any]:
        """``problems``: every inconsistency of the tiers of K and V; the server must be idle."""
        tokenizer_manager.auto_create_handle_loop()
        question = compat.GetInternalStateReq(rid=tiered_report.CHECK)
        answers = await tokenizer_manager.get_internal_state_communicator(question)
        found = tiered_report.merge([one.internal_state[KEY]["memory"] for one in answers])
        if found is None:
            raise HTTPException(404, "K and V are not on two tiers (--psa-device-pool-bytes)")
        if not found["idle"]:
            raise HTTPException(409, "the server is not idle: ask again when no request runs")
        return {"problems": found["problems"]}

    compat.http_app.include_router(router)


HOOKS = (
    Hook("internal state", compat.GET_INTERNAL_STATE, describe, Kind.AFTER),
    Hook("statistics route", compat.RUN_HTTP_SERVER, add_route, Kind.BEFORE, "main"),
)
