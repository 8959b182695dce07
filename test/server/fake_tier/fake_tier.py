"""An SGLang plugin for tests: working sets of a fixed share, for a KV pool that has no tiers.

``FAKE_TIER`` holds the frames of the arena and the share of its pages that a request needs.
"""

import os
import time
from types import SimpleNamespace

import torch


class FakeTier:
    """What admission asks of a ``TieredCache``."""

    def __init__(self, frames, share, layers):
        self.sizes = SimpleNamespace(num_frames=frames, num_layers=layers)
        self.share = share

    def waited_ns(self):
        """Decode waits all the time: loads are never hidden."""
        return time.perf_counter_ns() // torch.get_num_threads()

    def working_set(self, pages):
        return int(len(pages) * self.sizes.num_layers * self.share)


def tier_of(scheduler):
    frames, share = os.environ["FAKE_TIER"].split(",")
    layers = scheduler.token_to_kv_pool_allocator.get_kvcache().layer_num
    return FakeTier(int(frames), float(share), layers)


def register():
    from sglang_psa import admission

    admission.tier_of = tier_of
