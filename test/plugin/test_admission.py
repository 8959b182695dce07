"""Admission in SGLang's scheduler: which hook does what, with a stand-in scheduler."""

from types import SimpleNamespace

import pytest
import torch
from sgl_psa_kernels.page_tier import TierShape
from sglang_psa import admission, compat, decode_part
from sglang_psa.late_copy import LateCopy

from sgl_psa.config import ConfigError, PSAConfig

PAGE, LAYERS = 8, 2


class Tier:
    """Every page of a request counts in every layer."""

    def __init__(self, frames):
        self.sizes = SimpleNamespace(num_frames=frames, num_layers=LAYERS)
        self.tier = SimpleNamespace(shape=None)
        self.asked = []
        self.waited = 0

    def waited_ns(self):
        return self.waited

    def working_set(self, pages):
        self.asked.append(pages.tolist())
        return len(pages) * LAYERS


class Request:
    def __init__(self, name, pages, slot):
        self.rid = name
        self.origin_input_ids = [0] * (pages * PAGE)
        self.output_ids = []
        self.to_finish = None
        self.req_pool_idx = slot
        self.kv_committed_len = pages * PAGE

    def finished(self):
        return False


class Batch:
    """A running batch that knows who was prepared."""

    def __init__(self, reqs):
        self.reqs = reqs
        self.batch_is_full = False
        self.fpm_start_time = 7.0
        self.prepared = []

    def is_empty(self):
        return not self.reqs

    def prepare_for_decode(self):
        self.prepared.append([req.rid for req in self.reqs])


@pytest.fixture
def scheduler(monkeypatch):
    """A scheduler whose arena holds two of three requests; every batch part is a ``Batch``."""
    monkeypatch.setattr(admission, "_admission", None)
    monkeypatch.setattr(
        admission, "take_part", lambda whole, rows: Batch([whole.reqs[i] for i in rows])
    )
    monkeypatch.setattr(
        admission, "prepare_part", lambda whole, part, rows: part.prepare_for_decode()
    )
    table = torch.arange(4)[:, None] * 100 * PAGE + torch.arange(64 * PAGE)
    table[2, : 4 * PAGE] = table[1, : 4 * PAGE]
    pool = SimpleNamespace(tier=Tier(frames=50))
    args = SimpleNamespace(
        attention_backend="psa",
        prefill_attention_backend=None,
        decode_attention_backend=None,
        retraction_policy="length",
        **{f"psa_{k}": v for k, v in PSAConfig().as_dict().items()},
    )
    made = SimpleNamespace(
        server_args=args,
        page_size=PAGE,
        forward_ct=0,
        ps=SimpleNamespace(tp_size=1),
        tp_cpu_group=None,
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
        invariant_checker=SimpleNamespace(get_last_batch=None),
        running_batch="running",
        last_batch="last",
        tier=pool.tier,
    )
    admission.start(None, made)
    return made


def update(scheduler, batch):
    """A scheduler's round: SGLang's update, then what is run."""

    def original(scheduler, batch):
        if not batch.is_empty():
            batch.prepare_for_decode()
        return batch

    running = admission.update_running_batch(original, scheduler, batch)
    plan = SimpleNamespace(batch_to_run=running, running_batch=running)
    admission.run_part(plan, scheduler)
    scheduler.forward_ct += 1
    return plan


def requests(*pages):
    return [Request("abcdef"[i], count, i) for i, count in enumerate(pages)]


def test_a_pool_without_tiers_leaves_sglang_alone(monkeypatch, scheduler):
    monkeypatch.setattr(admission, "_admission", None)
    scheduler.token_to_kv_pool_allocator.get_kvcache = lambda: SimpleNamespace(tier=None)
    admission.start(None, scheduler)
    assert admission.admission_stats() is None
    batch = Batch(requests(20, 20, 20))
    plan = update(scheduler, batch)
    assert plan.batch_to_run is batch and batch.prepared == [["a", "b", "c"]]
    assert admission.add_request(lambda *a: "added", None, None) == "added"
    assert admission.retraction_order([1, 0], [], scheduler.server_args) is None


def test_all_run_as_one_batch_while_they_fit(scheduler):
    batch = Batch(requests(9, 9))
    plan = update(scheduler, batch)
    assert plan.batch_to_run is batch
    assert batch.prepared == [["a", "b"]], "prepared once, by us"
    assert "prepare_for_decode" not in vars(batch)


def test_a_part_runs_and_the_running_batch_stays_whole(scheduler):
    batch = Batch(requests(30, 30, 30))
    plan = update(scheduler, batch)
    assert [req.rid for req in plan.batch_to_run.reqs] == ["a", "b"]
    assert plan.batch_to_run.prepared and not batch.prepared
    assert plan.running_batch is batch and len(batch.reqs) == 3
    assert plan.batch_to_run.fpm_start_time == 7.0
    stats = admission.admission_stats()
    assert stats["decoding"] + stats["paused"] == 3 and stats["paused"] == 1


def test_prefill_batches_run_as_they_are(scheduler):
    update(scheduler, Batch(requests(30, 30, 30)))
    prefill = Batch(requests(5))
    plan = SimpleNamespace(batch_to_run=prefill)
    admission.run_part(plan, scheduler)
    assert plan.batch_to_run is prefill
    plan = SimpleNamespace(batch_to_run=None)
    admission.run_part(plan, scheduler)
    assert plan.batch_to_run is None


def test_a_paused_request_that_is_aborted_gets_its_last_step(scheduler):
    batch = Batch(requests(40, 40, 40))
    assert [req.rid for req in update(scheduler, batch).batch_to_run.reqs] == ["a"]
    batch.reqs[2].to_finish = "abort"
    assert [req.rid for req in update(scheduler, batch).batch_to_run.reqs] == ["a", "c"]


def test_an_empty_running_batch_is_left_alone(scheduler):
    plan = update(scheduler, Batch([]))
    assert plan.batch_to_run.reqs == []
    assert admission.admission_stats()["decoding"] == 0


def test_the_hook_leaves_the_batch_as_it_was_when_sglang_raises(scheduler):
    batch = Batch(requests(5))

    def broken(scheduler, batch):
        raise RuntimeError("retract")

    with pytest.raises(RuntimeError, match="retract"):
        admission.update_running_batch(broken, scheduler, batch)
    assert "prepare_for_decode" not in vars(batch)


def test_working_sets_are_measured_and_shared_pages_once(scheduler):
    batch = Batch(requests(9, 9, 9))
    for _ in range(admission.MEASURE_EVERY + 1):
        update(scheduler, batch)
    own = [list(range(0, 9)), list(range(104, 109)), list(range(204, 209))]
    assert scheduler.tier.asked == [*own, [100, 101, 102, 103]]
    assert admission.admission_stats()["working_set_shared"] == 4 * LAYERS


class Late(LateCopy):
    """A copy from a device: it arrives when it is looked at."""

    def __init__(self, tensor):
        super().__init__(tensor)
        self.late, self.looks = True, 0
        COPIES.append(self)

    def get(self):
        self.looks += 1
        return super().get()


COPIES = []


def test_working_sets_of_a_device_are_measured_a_step_late(scheduler, monkeypatch):
    """What was asked for is looked at in the next step, and not of requests that are gone."""
    monkeypatch.setattr(admission, "LateCopy", Late)
    COPIES.clear()
    batch = Batch(requests(9, 9, 9))
    for _ in range(admission.MEASURE_EVERY + 1):
        update(scheduler, batch)
    assert [copy.looks for copy in COPIES] == [0] and scheduler.tier.asked == []
    del batch.reqs[1]  # Its pages may be another's by now; those that it shared are nobody's else.
    update(scheduler, batch)
    assert [copy.looks for copy in COPIES] == [1]
    assert scheduler.tier.asked == [list(range(0, 9)), [*range(100, 104), *range(204, 209)]]
    for _ in range(admission.MEASURE_EVERY - 1):
        update(scheduler, batch)
    assert [copy.looks for copy in COPIES] == [1, 0]
    update(scheduler, Batch([]))
    update(scheduler, Batch([Request("new", 5, 3)]))
    assert len(scheduler.tier.asked) == 2, "nobody of those that were asked about is left"


def test_prefill_waits_for_the_arena_and_goes_on_when_there_is_room(scheduler):
    batch = Batch(requests(30, 30))
    update(scheduler, batch)
    adder = SimpleNamespace(running_batch=batch, can_run_list=[])
    added = []
    pages = 10
    while True:
        new = Request(f"new {pages}", pages, 3)
        result = admission.add_request(lambda a, r, *x: added.append(r), adder, new, False, None)
        if result is compat.AddReqResult.NO_TOKEN:
            break
        adder.can_run_list.append(new)
        pages += 10
        assert pages < 1000
    assert added == adder.can_run_list
    assert admission.admission_stats()["held_back"] == 1
    batch.batch_is_full = True
    update(scheduler, batch)
    assert not batch.batch_is_full, "the others of the batch in the making are gone"


def test_alone_a_request_of_any_length_is_admitted(scheduler):
    adder = SimpleNamespace(running_batch=Batch([]), can_run_list=[])
    new = Request("new", 10_000, 0)
    assert admission.add_request(lambda *a: "added", adder, new) == "added"


def test_paused_requests_are_retracted_first(scheduler):
    batch = Batch(requests(40, 40, 40))
    update(scheduler, batch)
    args = scheduler.server_args
    assert admission.retraction_order([2, 0, 1], batch.reqs, args) == [0, 2, 1]
    args.retraction_policy = "priority"
    assert admission.retraction_order([2, 0, 1], batch.reqs, args) is None


def test_more_requests_than_an_int8_host_leaves_frames_for_do_not_start(scheduler):
    shape = TierShape(LAYERS, 99, 50, PAGE, 1, 16, torch.float32, torch.int8)
    told = []
    scheduler.tier.tier = SimpleNamespace(shape=shape, set_open_pages=told.append, set_aside=5)
    vars(scheduler.server_args).update(
        psa_host_dtype="int8", psa_device_pool_bytes=1, psa_host_pool_bytes=1
    )
    scheduler.max_running_requests = (50 - shape.minimum_frames) // LAYERS - 1
    frames = scheduler.tier.sizes.num_frames
    admission.start(None, scheduler)
    assert admission._admission.admission.num_frames == frames - 5
    assert told == [scheduler.max_running_requests + 1]
    scheduler.max_running_requests += 1
    with pytest.raises(ConfigError, match=r"17 requests .* --max-running-requests to 16 or less"):
        admission.start(None, scheduler)


def test_sglangs_books_take_a_part_for_the_batch_it_comes_from(scheduler):
    last = scheduler.invariant_checker.get_last_batch
    assert last() == "last"
    scheduler.last_batch = SimpleNamespace(is_part=True)
    assert decode_part.is_part(scheduler.last_batch)
    assert last() == "running"


@pytest.mark.parametrize("prefills, waits, stretched", [(0, 0, True), (0, 9, False), (1, 0, False)])
def test_more_decode_together_while_loads_are_hidden(scheduler, prefills, waits, stretched):
    """Time in which prefill ran says nothing about decode; ``waits`` are seconds a step."""
    batch = Batch(requests(40, 40, 40))
    for _ in range(4 * admission.MEASURE_EVERY):
        update(scheduler, batch)
        scheduler.forward_ct += prefills
        scheduler.tier.waited += int(waits * 1e9)
    assert (admission.admission_stats()["stretch"] > 1) is stretched
