"""Working-set admission in SGLang's scheduler, for a server whose KV pool has tiers.

SGLang's scheduler counts the host tier's tokens. Here the arena limits what it does with them: a
decode step runs the requests that :class:`sgl_psa.memory.admission.Admission` chooses, and prefill
admits no more than it allows. All else is SGLang's own, because its running batch stays whole: see
:mod:`sglang_psa.decode_part`.

On a CUDA device the overlap scheduler prepares a step while the one before runs. Which pages a
request has is then asked for in one step and looked at in the next, when the copy has arrived; the
tier's tables are on the host. So preparing a step waits for nothing that the device still does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from sgl_psa.memory import open_pages
from sgl_psa.memory.admission import Admission, Running
from sglang_psa import compat, state
from sglang_psa.decode_part import is_part, prepare_part, take_part
from sglang_psa.hooks import Hook, Kind
from sglang_psa.late_copy import LateCopy
from sglang_psa.server_args import psa_config, uses_psa

#: Decode steps between two measurements of working sets.
MEASURE_EVERY = 4


class PagesOf:
    """Logical pages of running requests.

    Attributes:
        late: whether they are on their way from a device.
    """

    def __init__(self, reqs: list[Any], req_to_token: torch.Tensor, page_size: int) -> None:
        """
        Args:
            reqs: SGLang's.
            req_to_token: int32 [request slots, max context], KV slot of each token.
        """
        self._page_size = page_size
        self._names = [req.rid for req in reqs]
        firsts = [
            req_to_token[req.req_pool_idx, : req.kv_committed_len : page_size] for req in reqs
        ]
        self._counts = [len(slots) for slots in firsts]
        self._slots = LateCopy(torch.cat(firsts))
        self.late = self._slots.late

    def get(self) -> dict[str, torch.Tensor]:
        """Name of a request -> int64 [n] on the CPU."""
        pages = torch.div(self._slots.get(), self._page_size, rounding_mode="floor").long()
        return dict(zip(self._names, pages.split(self._counts), strict=True))


class SchedulerAdmission:
    """Admission of one scheduler.

    Attributes:
        admission: the decisions.
        held_back: times that prefill had to wait for the arena.
    """

    def __init__(self, scheduler: Any, tier: Any, set_aside: int = 0) -> None:
        """
        Args:
            scheduler: SGLang's.
            tier: the pool's ``TieredCache``.
            set_aside: frames that only pages which are not full get.
        """
        config = psa_config(scheduler.server_args)
        self.page_size: int = scheduler.page_size
        backend = state.get_backend()
        dense_tokens = backend.wrapper.min_context if backend is not None else 0
        self.admission = Admission(
            tier.sizes.num_frames - set_aside,
            tier.sizes.num_layers,
            forced_pages=config.sink_pages + config.recent_pages,
            dense_pages=-(-dense_tokens // self.page_size),
        )
        self.held_back = 0
        self._tier = tier
        self._scheduler = scheduler
        #: Forward passes, time and waiting (ns) when the newest decode step was prepared.
        self._before = (0, 0, 0)
        #: Time and waiting of decode steps since the last measurement.
        self._spent, self._waited = 0, 0
        self._req_to_token: torch.Tensor = scheduler.req_to_token_pool.req_to_token
        self._group = scheduler.tp_cpu_group if scheduler.ps.tp_size > 1 else None
        self._held_pages: int | None = None
        #: Pages that were asked for in the step before.
        self._asked: PagesOf | None = None
        self._whole: Any = None
        self._part: Any = None

    def prepare_step(self, running: Any) -> None:
        """Choose who decodes, and prepare the step of these.

        Args:
            running: SGLang's running batch without finished requests, not prepared yet.
        """
        admission = self.admission
        self._watch()
        asked, self._asked = self._asked, None
        if admission.step and admission.step % MEASURE_EVERY == 0:
            asked = PagesOf(running.reqs, self._req_to_token, self.page_size)
            if asked.late:
                self._asked, asked = asked, None
        if asked is not None:
            self._measure(asked, {req.rid for req in running.reqs})
        requests = [self._describe(req) for req in running.reqs]
        rows = [i for i, decodes in enumerate(admission.decide(requests)) if decodes]
        if self._held_pages is not None and admission.admits(
            self._held_pages, [(one.key, one.pages) for one in requests]
        ):
            self._held_pages, running.batch_is_full = None, False
        if len(rows) == len(requests):
            self._whole = self._part = None
            running.prepare_for_decode()
            return
        self._whole, self._part = running, take_part(running, rows)
        prepare_part(running, self._part, rows)

    def part_of(self, batch: Any) -> Any:
        """What to run of a batch that was prepared: the part, or all of it."""
        if batch is None or batch is not self._whole:
            return batch
        self._part.fpm_start_time = batch.fpm_start_time
        return self._part

    def admits(self, adder: Any, req: Any) -> bool:
        """Whether a prefill batch in the making may take one more request."""
        going = [*adder.running_batch.reqs, *adder.can_run_list]
        others = [self._describe(one) for one in going if not one.finished()]
        pages = self._describe(req).pages
        if self.admission.admits(pages, [(one.key, one.pages) for one in others]):
            return True
        self.held_back += 1
        self._held_pages = pages
        return False

    def paused_last(self, order: list[int], reqs: list[Any]) -> list[int]:
        """An order of retraction, its last first, that takes requests that pause before others."""
        return sorted(order, key=lambda i: not self.admission.decoding(reqs[i].rid))

    def _describe(self, req: Any) -> Running:
        tokens = len(req.origin_input_ids) + len(req.output_ids)
        return Running(req.rid, -(-tokens // self.page_size), req.to_finish is not None)

    def _measure(self, asked: PagesOf, running: set[str]) -> None:
        """Working sets of those that decoded, and the time that decode waited in 1/1000; every
        tensor-parallel rank takes the largest, so that all decide alike.

        Args:
            running: names of the requests that run now; the pages of others may have been released
                since they were asked for.
        """
        pages = {rid: mine for rid, mine in asked.get().items() if rid in running}
        if not pages:
            return
        holders = torch.bincount(torch.cat(list(pages.values())))
        several = torch.nonzero(holders > 1).flatten()
        decoding = [rid for rid in pages if self.admission.decoding(rid)]
        found = [self._tier.working_set(pages[rid][holders[pages[rid]] == 1]) for rid in decoding]
        found.append(self._tier.working_set(several) if len(several) else 0)
        found.append(1000 * self._waited // self._spent if self._spent else -1)
        self._spent = self._waited = 0
        if self._group is not None:
            counts = torch.tensor(found)
            torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MAX, self._group)
            found = counts.tolist()
        *own, shared, waited = found
        self.admission.observe(dict(zip(decoding, own, strict=True)), shared)
        if waited >= 0:
            self.admission.pace(waited / 1000)

    def _watch(self) -> None:
        """Add the time since the last decode step was prepared, unless prefill came between."""
        passes, now = self._scheduler.forward_ct, time.perf_counter_ns()
        waited = self._tier.waited_ns()
        before, self._before = self._before, (passes, now, waited)
        if passes == before[0] + 1:
            self._spent += now - before[1]
            self._waited += waited - before[2]


_admission: SchedulerAdmission | None = None


def admission_stats() -> dict[str, Any] | None:
    """``Admission.snapshot`` and ``held_back``; ``None`` where the pool has no tiers."""
    if _admission is None:
        return None
    return {**_admission.admission.snapshot(), "held_back": _admission.held_back}


def tier_of(scheduler: Any) -> Any:
    """The ``TieredCache`` of a scheduler's KV pool; ``None`` if that has no tiers."""
    return getattr(scheduler.token_to_kv_pool_allocator.get_kvcache(), "tier", None)


def start(result: None, scheduler: Any) -> None:
    """Begin with the scheduler, if its pool has tiers.

    Raises:
        ConfigError: the device tier is too small for the requests that the scheduler lets run.
    """
    global _admission
    tier = tier_of(scheduler)
    if tier is None or not uses_psa(scheduler.server_args):
        return
    config = psa_config(scheduler.server_args)
    set_aside = 0
    if config.host_dtype == "int8":
        set_aside = open_pages.reserve(config, tier.tier, scheduler.max_running_requests)
    _admission = SchedulerAdmission(scheduler, tier, set_aside)
    # SGLang's books of a busy pool count requests of both batches, once where these are one.
    scheduler.invariant_checker.get_last_batch = lambda: (
        scheduler.running_batch if is_part(scheduler.last_batch) else scheduler.last_batch
    )


def update_running_batch(original: Callable[..., Any], scheduler: Any, batch: Any) -> Any:
    """SGLang's update of the running batch, its preparation of the step apart."""
    if _admission is None:
        return original(scheduler, batch)
    batch.prepare_for_decode = lambda: None
    try:
        running = original(scheduler, batch)
    finally:
        del batch.prepare_for_decode
    if not running.is_empty():
        _admission.prepare_step(running)
    return running


def run_part(plan: Any, *args: Any, **kwargs: Any) -> None:
    """Run the part of the running batch that was chosen."""
    if _admission is not None:
        plan.batch_to_run = _admission.part_of(plan.batch_to_run)


def add_request(original: Callable[..., Any], adder: Any, req: Any, *args: Any, **kw: Any) -> Any:
    """Keep a request in the queue while the arena is promised to others."""
    if _admission is not None and not _admission.admits(adder, req):
        return compat.AddReqResult.NO_TOKEN
    return original(adder, req, *args, **kw)


def retraction_order(order: list[int], reqs: list[Any], server_args: Any) -> list[int] | None:
    """Retract requests that pause before those that decode, unless priorities say otherwise."""
    if _admission is None or server_args.retraction_policy == "priority":
        return None
    return _admission.paused_last(order, reqs)


HOOKS = (
    Hook("admission", compat.INIT_INVARIANT_CHECKER, start, Kind.AFTER),
    Hook("decode batch", compat.UPDATE_RUNNING_BATCH, update_running_batch, Kind.AROUND),
    Hook("batch to run", compat.GET_NEXT_BATCH, run_part, Kind.AFTER),
    Hook("prefill admission", compat.ADD_ONE_REQUEST, add_request, Kind.AROUND),
    Hook("retraction order", compat.RETRACTION_ORDER, retraction_order, Kind.AFTER),
)
