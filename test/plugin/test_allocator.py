"""The torch allocator against a plain model: no leak, no double use, pages filled in order."""

import random

import pytest
import torch
from sglang_psa.allocator import CpuPagedAllocator

PAGES = 64


class Server:
    """A toy of SGLang's use of the allocator: requests that grow, and share nothing."""

    def __init__(self, page_size, need_sort):
        self.size = page_size
        self.alloc = CpuPagedAllocator(
            PAGES * page_size, page_size, torch.bfloat16, "cpu", None, need_sort
        )
        self.requests: list[list[int]] = []

    def pages_used(self):
        return sum(-(-len(r) // self.size) for r in self.requests)

    def check(self):
        used = [slot for r in self.requests for slot in r]
        assert len(used) == len(set(used))
        assert all(self.size <= slot < (PAGES + 1) * self.size for slot in used)
        assert self.alloc.available_size() == (PAGES - self.pages_used()) * self.size
        for request in self.requests:
            for position, slot in enumerate(request):
                assert slot % self.size == position % self.size
                if position % self.size:
                    assert slot == request[position - 1] + 1

    def extend(self, indices, news):
        prefix = torch.tensor([len(self.requests[i]) for i in indices])
        ends = prefix + torch.tensor(news)
        last = torch.tensor([self.requests[i][-1] if self.requests[i] else -1 for i in indices])
        slots = self.alloc.alloc_extend(prefix, prefix, ends, ends, last, sum(news))
        needed = int((-(-ends // self.size) - -(-prefix // self.size)).sum())
        free = PAGES - self.pages_used()
        assert (slots is None) == (needed > free)
        if slots is not None:
            for i, part in zip(indices, slots.split(news), strict=True):
                self.requests[i] += part.tolist()

    def decode(self, indices):
        lens = torch.tensor([len(self.requests[i]) + 1 for i in indices])
        last = torch.tensor([self.requests[i][-1] for i in indices], dtype=torch.int32)
        slots = self.alloc.alloc_decode(lens, lens, last)
        needed = sum(len(self.requests[i]) % self.size == 0 for i in indices)
        assert (slots is None) == (needed > PAGES - self.pages_used())
        if slots is not None:
            assert slots.dtype == torch.int64
            for i, slot in zip(indices, slots.tolist(), strict=True):
                self.requests[i].append(slot)

    def finish(self, index):
        self.alloc.free(torch.tensor(self.requests.pop(index), dtype=torch.int64))


@pytest.mark.parametrize("need_sort", [False, True])
@pytest.mark.parametrize("page_size", [8, 16])
@pytest.mark.parametrize("seed", range(4))
def test_random_use(page_size, seed, need_sort):
    rng, server = random.Random(seed), Server(page_size, need_sort)
    for _ in range(300):
        filled = [i for i, r in enumerate(server.requests) if r]
        action = rng.random()
        if action < 0.3:
            server.requests.append([])
            chosen = rng.sample(filled, min(len(filled), rng.randint(0, 2)))
            chosen.append(len(server.requests) - 1)
            server.extend(chosen, [rng.randint(1, 5 * page_size) for _ in chosen])
            server.requests = [r for r in server.requests if r]
        elif action < 0.8 and filled:
            server.decode(rng.sample(filled, rng.randint(1, len(filled))))
        elif filled:
            server.finish(rng.choice(filled))
        server.check()
    while server.requests:
        server.finish(0)
    assert server.alloc.available_size() == PAGES * page_size


def test_refused_allocation_takes_nothing():
    server = Server(16, False)
    server.requests = [[]]
    server.extend([0], [PAGES * 16 + 1])
    assert server.requests == [[]]
    assert server.alloc.available_size() == PAGES * 16


def test_exactly_everything_fits():
    server = Server(16, False)
    server.requests = [[]]
    server.extend([0], [PAGES * 16])
    server.check()
    assert server.alloc.available_size() == 0
