"""A decode step of some of the running requests.

The running batch stays whole, with every request in it, so all that SGLang does with running
requests (abort, timeouts, retraction, flush, load, admission) holds for those that pause too. Only
the batch that is run is a part of it: a copy that is filtered like SGLang filters a batch, and
whose state of the step is written back.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch


def take_part(whole: Any, rows: list[int]) -> Any:
    """A ``ScheduleBatch`` of rows of ``whole``, which stays as it is."""
    part = copy.copy(whole)
    part.sampling_info = copy.copy(whole.sampling_info)
    part.sampling_info.penalizer_orchestrator = _copy_penalties(
        whole.sampling_info.penalizer_orchestrator, part
    )
    part.filter_batch(keep_indices=rows)
    part.is_part = True
    return part


def is_part(batch: Any) -> bool:
    """Whether a batch comes from :func:`take_part`."""
    return getattr(batch, "is_part", False)


def prepare_part(whole: Any, part: Any, rows: list[int]) -> None:
    """Prepare the step of a part, and keep ``whole`` up to date: lengths and penalties.

    Tensors of ``whole`` are replaced, not changed: a forward pass under way may read them.
    """
    part.prepare_for_decode()
    whole.forward_mode = part.forward_mode
    whole.input_ids = whole.input_embeds = whole.out_cache_loc = whole.seq_lens_sum = None
    on_host = torch.tensor(rows)
    where = on_host.to(whole.seq_lens.device, non_blocking=True)
    whole.seq_lens = whole.seq_lens.index_copy(0, where, part.seq_lens)
    whole.orig_seq_lens = whole.orig_seq_lens.index_copy(0, where, part.orig_seq_lens)
    whole.seq_lens_cpu = whole.seq_lens_cpu.index_copy(0, on_host, part.seq_lens_cpu)
    _return_penalties(
        whole.sampling_info.penalizer_orchestrator, part.sampling_info.penalizer_orchestrator, where
    )


def _copy_penalties(penalties: Any, batch: Any) -> Any:
    """The same state in objects of its own, for ``batch``."""
    twin = copy.copy(penalties)
    twin.batch = batch
    twin.penalizers = {kind: copy.copy(one) for kind, one in penalties.penalizers.items()}
    for one in twin.penalizers.values():
        one._orchestrator_ref = weakref.ref(twin)
    return twin


def _return_penalties(whole: Any, part: Any, where: torch.Tensor) -> None:
    for kind, theirs in part.penalizers.items():
        ours = whole.penalizers.get(kind)
        if ours is None or not (ours.is_prepared() and theirs.is_prepared()):
            continue
        for name, value in vars(theirs).items():
            if isinstance(value, torch.Tensor):
                setattr(ours, name, getattr(ours, name).index_copy(0, where, value))
