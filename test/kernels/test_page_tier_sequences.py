"""Random sequences of calls: a tier in C++ beside the reference and a resident pool."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sgl_psa_kernels.page_tier import TierShape
from sgl_psa_kernels.progressive_decode import progressive_decode
from tier_cases import Pool

PAGES, LAYERS, SIZE = 26, 3, 16
SHAPE = TierShape(LAYERS, PAGES, 8, SIZE, 2, 16, torch.float32)


class Twins:
    """A tier and its reference, given the same calls; requests hold pages, as a server's do."""

    def __init__(
        self, frames: int, host: str, pipeline: bool, seed: int, host_dtype: torch.dtype | None
    ) -> None:
        shape = SHAPE._replace(num_frames=frames, host_dtype=host_dtype)
        self.native = Pool.make(shape, "cpu", host, pipeline, seed)
        self.reference = Pool.make(shape, "reference", "memory", pipeline, seed)
        self.free = list(range(1, PAGES))
        self.requests: list[tuple[list[int], int]] = []
        self.step = 0
        self.rng = torch.Generator().manual_seed(seed)

    def pools(self) -> tuple[Pool, Pool]:
        return self.native, self.reference

    def slots(self, pages: list[int], begin: int, end: int) -> torch.Tensor:
        return self.native.slots(torch.tensor(pages))[begin:end]

    def extend(self, i: int, tokens: int) -> None:
        pages, length = self.requests[i]
        missing = -(-(length + tokens) // SIZE) - len(pages)
        if missing > len(self.free):
            return
        pages = pages + [self.free.pop() for _ in range(missing)]
        for layer in range(LAYERS):
            for pool in self.pools():
                pool.write(layer, self.slots(pages, length, length + tokens))
        self.requests[i] = (pages, length + tokens)

    def prefill(self, tokens: int) -> None:
        shape = self.native.shape
        open_frames = LAYERS * (len(self.requests) + 1)
        if shape.int8_host and open_frames + shape.block_pages > shape.num_frames:
            return
        self.requests.append(([], 0))
        self.extend(-1, tokens)
        if not self.requests[-1][0]:
            self.requests.pop()

    def finish(self, i: int) -> None:
        pages, _ = self.requests.pop(i)
        for pool in self.pools():
            pool.tier.release(torch.tensor(pages))
        self.free += pages

    def clear(self) -> None:
        for pool in self.pools():
            pool.tier.clear()
        self.free, self.requests = list(range(1, PAGES)), []

    def victims(self) -> None:
        order = torch.randperm(self.native.shape.num_frames, generator=self.rng)
        for pool in self.pools():
            pool.tier.set_victims(order[None].int())

    def gather(self, i: int) -> None:
        pages, length = self.requests[i]
        for pool in self.pools():
            for layer in range(LAYERS):
                got = pool.gather(layer, torch.tensor(pages), length)
                assert torch.equal(got, pool.truth(layer, torch.tensor(pages), length))

    def decode(self, mode: int) -> None:
        """A token for every request, then attention in every layer."""
        for i in range(len(self.requests)):
            self.extend(i, 1)
        if not self.requests:
            return
        self.step += 1
        rows, width = len(self.requests), max(len(pages) for pages, _ in self.requests)
        table = torch.zeros(rows, width, dtype=torch.int32)
        for row, (pages, _) in enumerate(self.requests):
            table[row, : len(pages)] = torch.tensor(pages)
        lens = torch.tensor([length for _, length in self.requests], dtype=torch.int32)
        modes = (torch.arange(rows) + mode).remainder(4).int()
        q = torch.randn(rows, 4, 16, generator=self.rng)
        log_mass = torch.randn(rows, 4, width, generator=self.rng)
        rule = (modes, torch.full((rows,), -1.0), torch.zeros(rows), torch.ones(rows))
        options = {"sm_scale": 0.25, "sink_pages": 1, "recent_pages": 1, "group_pages": 2}
        for layer in range(LAYERS):
            want = progressive_decode(
                q,
                self.native.k[layer],
                self.native.v[layer],
                table,
                lens,
                log_mass,
                *rule,
                page_size=SIZE,
                backend="cpu",
                **options,
            )
            args = (layer, self.step, q, table, lens, log_mass, *rule)
            got = self.native.tier.decode(*args, **options)
            assert all(map(torch.equal, got, want))
            reference = self.reference.tier.decode(*args, **options)
            torch.testing.assert_close(got[0], reference[0], rtol=1e-4, atol=1e-5)

    def compare(self) -> None:
        """What does not depend on which frames were taken is the same."""
        self.native.tier.drain()
        for pool in self.pools():
            assert pool.tier.check() == []
        native, reference = self.native.tier.tables, self.reference.tier.tables
        assert torch.equal(native.filled, reference.filled)
        assert torch.equal(native.stamp, reference.stamp)
        full = native.filled == SIZE
        assert (native.saved[full] == SIZE).all()
        if self.native.shape.int8_host:
            for tables in (native, reference):
                assert (tables.frame_of[(tables.filled > 0) & ~full] >= 0).all()
                assert (tables.saved[~full] == 0).all()
        loads = self.native.tier.counters()
        assert loads.bytes_loaded == loads.loads * self.native.shape.record_bytes


ACTIONS = st.one_of(
    st.tuples(st.just("prefill"), st.integers(1, 5 * SIZE)),
    st.tuples(st.just("decode"), st.integers(0, 3)),
    st.tuples(st.just("decode"), st.integers(0, 3)),
    st.tuples(st.just("extend"), st.integers(1, 2 * SIZE)),
    st.tuples(st.just("finish"), st.integers(0, 5)),
    st.tuples(st.just("gather"), st.integers(0, 5)),
    st.tuples(st.just("victims"), st.just(0)),
    st.tuples(st.just("clear"), st.just(0)),
)


@pytest.mark.parametrize("host_dtype", [None, torch.int8])
@pytest.mark.parametrize("host", ["memory", "file"])
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    actions=st.lists(ACTIONS, max_size=25),
    frames=st.sampled_from([8, 9, 20, 80]),
    pipeline=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_sequence_of_calls(
    host, host_dtype, actions, frames: int, pipeline: bool, seed: int
) -> None:
    twins = Twins(frames, host, pipeline, seed, host_dtype)
    for name, argument in actions:
        if name in ("extend", "finish", "gather"):
            if not twins.requests:
                continue
            i = argument % len(twins.requests)
            if name == "extend":
                twins.extend(i, argument)
            else:
                getattr(twins, name)(i)
        elif name in ("victims", "clear"):
            getattr(twins, name)()
        else:
            getattr(twins, name)(argument)
    twins.compare()
    for i in range(len(twins.requests)):
        twins.gather(i)
    twins.native.tier.close()
