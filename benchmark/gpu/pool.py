"""A paged pool of one layer with requests of given lengths, their pages scattered."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sgl_psa_kernels import key_sketch


@dataclass
class Pool:
    """Tensors of one layer on one device.

    Attributes:
        q: [B, Hq, D]; k, v: [slots, Hkv, D]; page_table: int32 [B, max_pages]; seq_lens: int32 [B].
        page: tokens per page.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    page: int

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def num_kv(self) -> int:
        return self.k.shape[1]

    @property
    def num_pages(self) -> int:
        return self.k.shape[0] // self.page

    @property
    def scale(self) -> float:
        return self.q.shape[2] ** -0.5

    def slots(self, row: int) -> torch.Tensor:
        """Slots of a row's tokens, int64."""
        length = int(self.seq_lens[row])
        pages = self.page_table[row, : -(-length // self.page)].long()
        offsets = torch.arange(self.page, device=pages.device)
        return (pages[:, None] * self.page + offsets).flatten()[:length]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Pool:
        """A copy on ``device``; q, k and v in ``dtype`` if given."""
        wide = [t.to(device=device, dtype=dtype or t.dtype) for t in (self.q, self.k, self.v)]
        return Pool(*wide, self.page_table.to(device), self.seq_lens.to(device), self.page)


def make_pool(
    lengths: list[int],
    *,
    page: int,
    q_heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
    poison: bool = False,
) -> Pool:
    """Normal keys and values; ``poison``: NaN in all slots that no request uses."""
    rng = torch.Generator(device=device).manual_seed(seed)
    counts = [-(-length // page) for length in lengths]
    total = sum(counts) + 3
    shape = (total * page, kv_heads, dim)

    def normal() -> torch.Tensor:
        x = torch.empty(shape, dtype=dtype, device=device)
        return x.normal_(generator=rng)

    k, v = normal(), normal()
    order = (torch.randperm(total - 1, generator=rng, device=device) + 1).to(torch.int32)
    table = torch.full((len(lengths), max(counts)), 2**30, dtype=torch.int32, device=device)
    for row, (count, part) in enumerate(zip(counts, order.split([*counts, 2]), strict=False)):
        table[row, :count] = part
    q = torch.empty(len(lengths), q_heads, dim, dtype=dtype, device=device).normal_(generator=rng)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    pool = Pool(1.5 * q, k, v, table, seq_lens, page)
    if poison:
        used = torch.cat([pool.slots(row) for row in range(len(lengths))])
        unused = torch.ones(shape[0], dtype=torch.bool, device=device)
        unused[used] = False
        k[unused] = v[unused] = float("nan")
    return pool


def heat(pool: Pool, pages: int, seed: int = 1) -> None:
    """Plant keys that put most of each head's mass in ``pages`` pages of each row."""
    rng = torch.Generator().manual_seed(seed)
    group = pool.q.shape[1] // pool.num_kv
    for row in range(pool.batch):
        slots = pool.slots(row).cpu()
        chosen = torch.randint(len(slots) // pool.page, (pages,), generator=rng) * pool.page
        for number, slot in enumerate(slots[chosen + 3 % pool.page].tolist()):
            target = pool.q[row].float().unflatten(0, (pool.num_kv, group))[:, number % group]
            key = target * (14.0 / pool.scale) / target.square().sum(-1, keepdim=True)
            pool.k[slot] = key.to(pool.k.dtype)


@dataclass
class Sketch:
    """Two-bit sketches of every key of a pool."""

    codes: torch.Tensor
    affine: torch.Tensor
    watermark: torch.Tensor
    active: torch.Tensor
    bits: int


def make_sketch(pool: Pool, backend: str, bits: int = 2, rotated: bool = False) -> Sketch:
    """Sketch all tokens in use."""
    device, dim = pool.k.device, pool.k.shape[2]
    shape = (pool.num_pages, pool.num_kv, pool.page)
    width = key_sketch.packed_bytes(dim, bits)
    codes = torch.zeros(*shape, width, dtype=torch.uint8, device=device)
    affine = torch.zeros(*shape, 1 if rotated else 2, dtype=torch.float16, device=device)
    signs = key_sketch.rotation_signs(dim, device) if rotated else None
    slots = torch.cat([pool.slots(row) for row in range(pool.batch)])
    for part in slots.split(1 << 20):
        key_sketch.write(
            pool.k, part, codes, affine, signs, bits=bits, page_size=pool.page, backend=backend
        )
    watermark = torch.full((pool.num_pages,), pool.page, dtype=torch.int32, device=device)
    active = torch.ones(pool.batch, dtype=torch.uint8, device=device)
    return Sketch(codes, affine, watermark, active, bits)


def score(pool: Pool, sketch: Sketch, backend: str) -> torch.Tensor:
    """Estimated log masses float32 [B, Hq, max_pages]."""
    q = pool.q
    if sketch.affine.shape[3] == 1:
        q = q.float() @ key_sketch.rotation_matrix(q.shape[2], q.device)
    return key_sketch.score(
        q,
        sketch.codes,
        sketch.affine,
        sketch.watermark,
        pool.page_table,
        pool.seq_lens,
        sketch.active,
        bits=sketch.bits,
        page_size=pool.page,
        sm_scale=pool.scale,
        backend=backend,
    )
