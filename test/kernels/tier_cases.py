"""Page tiers under test, beside a resident pool with the same tokens."""

import os
import tempfile
from dataclasses import dataclass

import torch
from sgl_psa_kernels.page_tier import HostStore, PageTier, TierShape, codec, make_tier


def host_store(kind: str, num_bytes: int) -> HostStore:
    """A store in memory, or in a file that has no name any more."""
    if kind == "memory":
        return HostStore.memory(num_bytes)
    with tempfile.TemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
        return HostStore.file(os.dup(file.fileno()), num_bytes)


@dataclass
class Pool:
    """A tier and the resident pool [L, slots, Hkv, D] that it stands for. Empty slots are NaN;
    with an int8 host, pages are rounded as they fill."""

    tier: PageTier
    k: torch.Tensor
    v: torch.Tensor
    rng: torch.Generator

    @classmethod
    def make(
        cls,
        shape: TierShape,
        backend: str,
        host: str = "memory",
        pipeline: bool = True,
        seed: int = 0,
    ) -> "Pool":
        store = host_store(host, shape.host_bytes)
        tier = make_tier(shape, store, backend=backend, pipeline=pipeline)
        slots = shape.num_pages * shape.page_size
        size = (shape.num_layers, slots, shape.num_kv_heads, shape.head_dim)
        k = torch.full(size, float("nan"), dtype=shape.dtype)
        return cls(tier, k, k.clone(), torch.Generator().manual_seed(seed))

    @property
    def shape(self) -> TierShape:
        return self.tier.shape

    def write(self, layer: int, slots: torch.Tensor) -> None:
        """Random tokens."""
        fused = torch.randn(
            len(slots), 2, self.shape.num_kv_heads, self.shape.head_dim, generator=self.rng
        ).to(self.shape.dtype)
        k, v = fused[:, 0], fused[:, 1]  # strided, as a slice of a fused projection is
        self.tier.write(layer, slots, k, v)
        self.k[layer, slots], self.v[layer, slots] = k, v
        if self.shape.int8_host:
            size = self.shape.page_size
            for page in torch.unique(slots[slots % size == size - 1] // size).tolist():
                self._round(layer, slice(page * size, (page + 1) * size))

    def _round(self, layer: int, slots: slice) -> None:
        page = [pool[layer, slots].movedim(0, 1) for pool in (self.k, self.v)]
        rounded = codec.decode(codec.encode(*page), self.shape).movedim(1, 2)
        self.k[layer, slots], self.v[layer, slots] = rounded

    def fill(self, pages: torch.Tensor, tokens: int) -> None:
        """The first tokens of consecutive pages, in all layers."""
        slots = self.slots(pages)[:tokens]
        for layer in range(self.shape.num_layers):
            self.write(layer, slots)

    def slots(self, pages: torch.Tensor) -> torch.Tensor:
        size = self.shape.page_size
        return (pages[:, None] * size + torch.arange(size)).flatten()

    def gather(self, layer: int, pages: torch.Tensor, tokens: int) -> torch.Tensor:
        """[2, tokens, Hkv, D]."""
        out = self.k.new_empty(2, tokens, self.shape.num_kv_heads, self.shape.head_dim)
        self.tier.gather(layer, pages, tokens, out[0], out[1])
        return out

    def truth(self, layer: int, pages: torch.Tensor, tokens: int) -> torch.Tensor:
        slots = self.slots(pages)[:tokens]
        return torch.stack([self.k[layer, slots], self.v[layer, slots]])
