"""The page tier on a GPU against a pool in which all pages lie on the device, bit for bit.

    python -m benchmark.gpu.check_memory
    TRITON_INTERPRET=1 python -m benchmark.gpu.check_memory --device cpu --tiny     # without a GPU

Requests come, share a prefix, grow and are released at random, in arenas of 100, 50, 25 and
10 % of their pages; copies are held up by random times, so that any order of events occurs. Over an
int8 host, with frames for open pages on top, the pool is rounded by ``page_tier/codec.py`` as its
pages fill. Prints a line a check and exits with 1 if one failed.
"""

from __future__ import annotations

import argparse
import random
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from sgl_psa_kernels.page_tier import HostStore, TierCounters, TierShape, TritonTier, codec
from sgl_psa_kernels.page_tier.triton_streams import Event, Inline, Streams
from sgl_psa_kernels.progressive_decode import progressive_decode

FRACTIONS = (1.0, 0.5, 0.25, 0.1)
#: (mode, threshold, kappa_floor, kappa_std) of a row, at random.
RULES = ((0, 0.0, 0.0, 0.0), (1, -2.0, 0.0, 0.0), (2, -2.0, 0.0, 1.0), (3, -1.5, 0.0, 1.0))
GROUP = 4


@dataclass(frozen=True)
class Size:
    """Of a check: the pages of all requests, their prompts in pages, most requests, steps."""

    shape: TierShape
    prompt: int
    requests: int
    steps: int


SIZES = (
    Size(TierShape(4, 400, 0, 16, 8, 128, torch.bfloat16), 60, 8, 60),
    Size(TierShape(3, 300, 0, 64, 2, 80, torch.float16), 40, 6, 40),
    Size(TierShape(2, 300, 0, 8, 3, 64, torch.float32), 50, 6, 40),
)
TINY = (Size(TierShape(1, 28, 0, 16, 1, 16, torch.float16), 4, 2, 4),)


def in_int8(size: Size) -> Size:
    return replace(size, shape=size.shape._replace(host_dtype=torch.int8))


class SlowStreams(Streams):
    """Side work waits for up to some milliseconds first."""

    def aside(self, work: Callable[[], None], *used: torch.Tensor) -> Event:
        def late() -> None:
            torch.cuda._sleep(random.choice((0, 0, 10**5, 10**7)))
            work()

        return super().aside(late, *used)


class Trace:
    """Requests [pages, length] on a tier and on a resident pool."""

    def __init__(self, size: Size, fraction: float, device: str, pipeline: bool, seed: int) -> None:
        self.size, self.device = size, torch.device(device)
        frames = int(fraction * size.shape.num_layers * size.shape.num_pages)
        frames = max(frames, size.shape.minimum_frames)
        if size.shape.int8_host:
            frames += size.shape.num_layers * size.requests
        shape = size.shape._replace(num_frames=frames)
        streams = SlowStreams(self.device) if device == "cuda" else Inline()
        self.tier = TritonTier(shape, HostStore.memory(shape.host_bytes), pipeline, streams)
        self.tier.set_open_pages(size.requests)
        self.tier.k_frames.fill_(float("nan"))
        self.tier.v_frames.fill_(float("nan"))
        slots = shape.num_pages * shape.page_size
        kv = (2, shape.num_layers, slots, shape.num_kv_heads, shape.head_dim)
        self.kv = torch.full(kv, float("nan"), dtype=shape.dtype, device=device)
        self.rng = torch.Generator(device=device).manual_seed(seed)
        self.choose = random.Random(seed)
        self.free = list(range(1, shape.num_pages))
        self.choose.shuffle(self.free)
        self.prefix = [self.free.pop() for _ in range(2)]
        self.requests: list[tuple[list[int], int]] = []
        self.write(self.slots(self.prefix))

    def slots(self, pages: list[int]) -> torch.Tensor:
        size = self.size.shape.page_size
        first = torch.tensor(pages, device=self.device)[:, None] * size
        return (first + torch.arange(size, device=self.device)).flatten()

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.rng, device=self.device)

    def write(self, slots: torch.Tensor) -> None:
        """Random tokens in all layers."""
        shape = self.tier.shape
        for layer in range(shape.num_layers):
            fused = self.normal(len(slots), 2, shape.num_kv_heads, shape.head_dim).to(shape.dtype)
            self.tier.write(layer, slots, fused[:, 0], fused[:, 1])
            self.kv[:, layer, slots] = fused.movedim(1, 0)
            if shape.int8_host:
                self.round(layer, slots[slots % shape.page_size == shape.page_size - 1])

    def round(self, layer: int, last: torch.Tensor) -> None:
        """Pages that are full now, by their last slots, as the host has them."""
        size = self.tier.shape.page_size
        slots = last[:, None] - size + 1 + torch.arange(size, device=self.device)
        for x, dim in ((self.kv[0, layer], 1), (self.kv[1, layer], 3)):  # [page, token, head, D]
            x[slots] = codec.dequantise(*codec.quantise(x[slots], dim), dim, x.dtype)

    def arrive(self) -> None:
        size = self.size.shape.page_size
        pages = [self.free.pop() for _ in range(self.choose.randint(1, self.size.prompt))]
        length = (len(self.prefix) + len(pages)) * size - self.choose.randrange(size)
        self.requests.append((self.prefix + pages, length))
        self.write(self.slots(pages)[: length - len(self.prefix) * size])

    def grow(self) -> None:
        """A token for every request; one that finds no page leaves."""
        size = self.size.shape.page_size
        for request in list(self.requests):
            pages, length = request
            if length == len(pages) * size:
                if not self.free:
                    self.leave(self.requests.index(request))
                    continue
                pages.append(self.free.pop())
            self.requests[self.requests.index(request)] = (pages, length + 1)
        last = [pages[-1] * size + (length - 1) % size for pages, length in self.requests]
        if last:
            self.write(torch.tensor(last, device=self.device))

    def leave(self, number: int) -> None:
        pages = self.requests.pop(number)[0][len(self.prefix) :]
        self.tier.release(torch.tensor(pages))
        self.free += pages

    def decode(self, layer: int, step: int) -> None:
        shape, count = self.tier.shape, len(self.requests)
        width = max(len(pages) for pages, _ in self.requests) + 2
        table = torch.full((count, width), 2**30, dtype=torch.int32)
        for row, (pages, _) in enumerate(self.requests):
            table[row, : len(pages)] = torch.tensor(pages)
        heads = 2 * shape.num_kv_heads
        q = self.normal(count, heads, shape.head_dim).to(shape.dtype)
        columns = list(zip(*(self.choose.choice(RULES) for _ in range(count)), strict=True))
        rest = [torch.tensor(x, device=self.device) for x in columns[1:]]
        lens = torch.tensor([length for _, length in self.requests], dtype=torch.int32)
        modes = torch.tensor(columns[0], dtype=torch.int32)
        mass = 2.5 * self.normal(count, heads, width)
        given = (table.to(self.device), lens.to(self.device), mass, modes.to(self.device), *rest)
        options = {"sm_scale": shape.head_dim**-0.5, "sink_pages": 1, "recent_pages": 2}
        options["group_pages"] = GROUP
        results = [
            self.tier.decode(layer, step, q, *given, **options),
            progressive_decode(
                q, *self.kv[:, layer], *given,
                page_size=shape.page_size, backend="triton", **options,
            ),
        ]  # fmt: skip
        for name, got, want in zip(("out", "lse", "statistics"), *results, strict=True):
            if not torch.equal(got, want):
                worst = float((got.double() - want.double()).abs().nan_to_num(float("inf")).max())
                raise AssertionError(f"step {step}, layer {layer}: {name} differs by {worst:.3g}")

    def gather(self) -> None:
        shape = self.tier.shape
        pages, length = self.choose.choice(self.requests)
        layer = self.choose.randrange(shape.num_layers)
        out = self.kv.new_empty(2, length, shape.num_kv_heads, shape.head_dim)
        self.tier.gather(layer, torch.tensor(pages), length, out[0], out[1])
        if not torch.equal(out, self.kv[:, layer, self.slots(pages)[:length]]):
            raise AssertionError(f"gathered tokens of layer {layer} are not those written")

    def place(self) -> None:
        """Victims in an order of chance, of which some will be attended."""
        frames = self.tier.shape.num_frames
        order = torch.randperm(frames)[: self.choose.randint(0, frames)]
        self.tier.set_victims(order.int()[None])

    def check(self) -> None:
        """Integrity, and that frames hold what was written."""
        problems = self.tier.check()
        if problems:
            raise AssertionError("; ".join(problems))
        shape, tables = self.tier.shape, self.tier.tables
        for frame in torch.nonzero(tables.owner >= 0).flatten().tolist():
            layer, page = divmod(int(tables.owner[frame]), shape.num_pages)
            filled = int(tables.filled[layer, page])
            held = torch.stack([self.tier.k_frames[frame], self.tier.v_frames[frame]])
            want = self.kv[:, layer, self.slots([page])[:filled]]
            if not torch.equal(held[:, :, :filled].movedim(1, 2), want):
                raise AssertionError(f"frame {frame} does not hold page {page} of layer {layer}")


def play(size: Size, fraction: float, device: str, pipeline: bool, seed: int) -> TierCounters:
    """All steps of a trace."""
    trace = Trace(size, fraction, device, pipeline, seed)
    for step in range(1, size.steps + 1):
        while len(trace.requests) < size.requests and len(trace.free) > size.prompt + 8:
            trace.arrive()
            if trace.choose.random() < 0.5:
                break
        trace.grow()
        for layer in range(trace.tier.shape.num_layers if trace.requests else 0):
            trace.decode(layer, step)
        if trace.requests and trace.choose.random() < 0.3:
            trace.gather()
        if trace.requests and trace.choose.random() < 0.2:
            trace.leave(trace.choose.randrange(len(trace.requests)))
        if trace.choose.random() < 0.5:
            trace.place()
    trace.check()
    counters = trace.tier.counters()
    trace.tier.clear()
    trace.check()
    trace.tier.close()
    return counters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="one small size, for the interpreter")
    options = parser.parse_args()
    failed = 0
    sizes = TINY if options.tiny else SIZES
    for size in (*sizes, *map(in_int8, sizes)):
        for fraction in (0.5,) if options.tiny else FRACTIONS:
            for pipeline in (True,) if options.tiny else (True, False):
                try:
                    seen = play(size, fraction, options.device, pipeline, 1)
                    verdict = f"{seen.loads} loads, {seen.hits} hits, ok"
                except Exception as error:  # Whatever is raised is a failed check; go on.
                    failed += 1
                    text = str(error).splitlines() or [""]
                    verdict = f"FAILED: {type(error).__name__}: {text[0]}"
                    if not isinstance(error, AssertionError):
                        traceback.print_exc()
                kind = str(size.shape.dtype).removeprefix("torch.")
                host = " on an int8 host" if size.shape.int8_host else ""
                name = f"{kind} pages of {size.shape.page_size}{host}, arena {fraction:.0%}"
                print(f"page_tier {name:52} pipeline {pipeline!s:5} {verdict}", flush=True)
    print(f"{failed} failed" if failed else "all passed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
