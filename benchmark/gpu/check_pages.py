"""Checks of candidate pages and tail compensation."""

from __future__ import annotations

import torch
from sgl_psa_kernels.candidate_pages import candidate_pages
from sgl_psa_kernels.tail_compensation import compensate

from benchmark.gpu.close import close
from benchmark.gpu.pool import Pool


def check_candidates(host: Pool, pool: Pool, count: int = 40) -> float:
    """Flags that differ are of shares that do not, up to the rounding of float32."""
    rng = torch.Generator().manual_seed(7)
    shape = (host.batch, host.q.shape[1], host.page_table.shape[1])
    log_mass = 5 * torch.randn(shape, generator=rng)
    log_mass[torch.rand(shape, generator=rng) < 0.05] = float("inf")
    device = pool.q.device

    def choose(place: Pool, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        active = torch.ones(host.batch, dtype=torch.uint8, device=place.q.device)
        return candidate_pages(
            log_mass.to(place.q.device),
            place.seq_lens,
            active,
            num_kv_heads=host.num_kv,
            page_size=host.page,
            count=count,
            backend=backend,
        )

    want, number = choose(host, "torch")
    got, chosen = choose(pool, "triton")
    close("count", chosen, number, 0.0, 0.0)
    close("flags set", got.sum(-1), number, 0.0, 0.0)
    assert got.device.type == device.type
    different = float((got.cpu() != want).float().mean())
    if different > 1e-4:
        raise AssertionError(f"{different:.2%} of the flags differ")
    return different


def check_compensation(host: Pool, pool: Pool) -> float:
    """Random choices, masses and means."""
    rng = torch.Generator().manual_seed(8)
    pages, heads = host.page_table.shape[1], host.q.shape[1]
    dim = host.q.shape[2]
    attended = (torch.rand(host.batch, host.num_kv, pages, generator=rng) < 0.3).to(torch.uint8)
    attended[:, :, 0] = 1
    means = torch.randn(host.num_pages, host.num_kv, dim, generator=rng).bfloat16()
    log_mass = 2 * torch.randn(host.batch, heads, pages, generator=rng)
    lse = torch.randn(host.batch, heads, generator=rng) + 2
    active = torch.ones(host.batch, dtype=torch.uint8)
    results = []
    for place, name in ((host, "reference"), (pool, "triton")):
        out = host.q.double() if name == "reference" else pool.q
        given = (t.to(place.q.device) for t in (lse, log_mass, attended, means))
        rest = (place.page_table, place.seq_lens, active.to(place.q.device))
        results.append(compensate(out, *given, *rest, page_size=host.page, backend=name))
    unit = torch.finfo(host.q.dtype).eps
    return close("out", results[1], results[0], unit, 2e-5)
